"""The command line without root: arguments, the wording of errors, exit codes, offline tools."""

import errno
import inspect
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import pytest
import typer

from devmapper import errors
from devmapper.cli import border, main
from devmapper.cli.output import new_file, printable
from devmapper.cli.settings import Settings
from devmapper.engine.device_lock import device_lock
from devmapper.thin import format as layout
from devmapper.thin.blocks import FileDevice
from devmapper.thin.format import BLOCK_SIZE
from devmapper.thin.metadata import PoolMetadata
from devmapper.thin.superblock import read_superblock
from devmapper.units import Bytes, ThinId, TransactionId

NOBODY = 65534
DOCS = Path(__file__).parents[2] / "docs"
DAMAGED = 30


def commands() -> list[str]:
    """The words that call each command."""
    command = typer.main.get_command(main.app)

    def below(group: Any, prefix: str) -> list[str]:
        found = []
        for name, each in group.commands.items():
            words = f"{prefix}{name}"
            found += below(each, f"{words} ") if hasattr(each, "commands") else [words]
        return found

    return below(command, "")


@pytest.fixture
def metadata(tmp_path):
    """A small pool with an origin and a snapshot that shares all but one block."""
    path = tmp_path / "metadata"
    with path.open("wb") as file:
        file.truncate(1 << 20)
    with (
        FileDevice.open(path) as device,
        PoolMetadata.format(device, data_block_size=Bytes(65536), nr_data_blocks=1000) as pool,
    ):
        pool.create_thin(ThinId(1))
        for block in range(10):
            pool.insert(ThinId(1), block, pool.allocate_data_block())
        pool.create_snap(ThinId(2), ThinId(1))
        pool.insert(ThinId(2), 20, pool.allocate_data_block())
        pool.set_transaction_id(TransactionId(0), TransactionId(7))
        pool.commit()
    return path


def program(*words: object, **kwargs: Any) -> "subprocess.CompletedProcess[str]":
    """The command as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "devmapper.cli.main", *map(str, words)],
        capture_output=True, text=True, timeout=60, **kwargs,
    )  # fmt: skip


# Arguments

WRONG = [
    (["nonsense"], "no such command 'nonsense'"),
    (["--nonsense", "ls"], "no such option: --nonsense"),
    (["create"], "missing argument"),
    (["pool"], "missing command"),
    (["create", ""], "is empty"),
    (["create", "a/b"], "contains '/'"),
    (["create", ".."], "starts with a dot"),
    (["create", "base"], "is reserved"),
    (["create", "x" * 256], "has 256 bytes, expected at most 255"),
    (["create", "ä" * 128], "has 256 bytes, expected at most 255"),
    (["create", "a\nb"], "cannot be printed"),
    (["create", "a", "--parent", "../b"], "layer id '../b'"),
    (["create", "a", "--size", "10 X"], "size '10 X' is not a number"),
    (["rm", "a", "b/c"], "layer id 'b/c'"),
    (["get", "a", "b"], "extra argument"),
    (["exists", "/"], "contains '/'"),
    (["import", "a/b", "-"], "contains '/'"),
    (["pool", "resize", "-5G"], "no such option"),
    (["pool", "resize", "much"], "size 'much' is not a number"),
    (["pool", "resize", "--metadata", "much"], "size 'much' is not a number"),
    (["pool", "create"], "--device"),
    (["pool", "create", "--device", "/dev/x", "--data-percent", "90"], "need each other"),
    (
        ["pool", "create", "--device", "/dev/x", "--data-percent", "99", "--metadata-percent=2"],
        "at most 100%",
    ),
    (["pool", "create", "--device", "/dev/x", "--autoextend-threshold", "x"], "from 0 to 100"),
    (["--engine", "steam", "ls"], "engine 'steam' is none of auto, kernel, embedded"),
    (["--id-map", "0:100000", "ls"], "id map '0:100000': expected CONTAINER:HOST:SIZE"),
    (["--id-map", "1:100000:10", "create", "a"], "uid maps 1:100000:10 have no root"),
    (["get", "a", "--mount-label", 'u:r:t",ro'], "is no SELinux label"),
    (["--root", "", "ls"], "root '' is not a directory"),
]


@pytest.mark.parametrize(("words", "fragment"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_arguments_are_one_sentence_and_exit_code_2(words, fragment, capsys, tmp_path):
    home = tmp_path / "home"
    root = [] if "--root" in words else ["--root", str(home)]
    assert main.run([*root, *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    message, *hint = err.splitlines()
    assert message.startswith("devmapper: ")
    assert fragment.lower() in message.lower()
    assert len(hint) <= 1
    assert not home.exists()


def test_id_that_is_not_unicode_is_refused(capsys):
    assert main.run(["create", "a\udcff"]) == 2
    assert "is not valid Unicode" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--json", "nonsense"], ["nonsense", "--json"], ["--json", "create", "a/b"]]
)
def test_errors_are_json_where_json_is_asked_for(words, capsys):
    assert main.run(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    told = json.loads(err)
    assert list(told) == ["error", "hint", "exit_code"]
    assert told["exit_code"] == 2


@pytest.mark.parametrize("name", sorted(commands()))
def test_help_of_each_command_has_an_example(name, capsys):
    assert main.run([*name.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert f"Usage: devmapper {name} [OPTIONS]" in out
    assert re.search(rf"Example: .*devmapper ([^|]* )?{name}\b", " ".join(out.split()))


def test_no_arguments_show_the_help(capsys):
    assert main.run([]) == 0
    out = capsys.readouterr().out
    for name in commands():
        assert re.search(rf"^  {name.split()[0]} ", out, re.MULTILINE)
    assert "..." not in out.split("Commands:")[1], "a first sentence is too long for the list"


def test_version(capsys):
    assert main.run(["--version"]) == 0
    assert re.fullmatch(r"devmapper \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_environment_variables_name_root_and_engine(monkeypatch, capsys):
    monkeypatch.setenv("DEVMAPPER_ENGINE", "steam")
    assert main.run(["ls"]) == 2
    assert "engine 'steam'" in capsys.readouterr().err


def test_completion_lists_layers_without_an_engine(tmp_path):
    records = tmp_path / "metadata"
    records.mkdir()
    for name in ("web1", "web2", "db", "base", "deviceset-metadata", ".tmp1"):
        (records / name).write_text("{}")
    line = f"devmapper --root {tmp_path} rm w"
    environment = {
        **os.environ,
        "_DEVMAPPER_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": "4",
    }
    done = program(env=environment)
    assert done.stdout.split() == ["web1", "web2"]


# The wording of errors


def every_error_class() -> list[type[errors.DevmapperError]]:
    found = [errors.DevmapperError]
    for each in found:
        found += each.__subclasses__()
    return sorted(set(found), key=lambda each: each.__name__)


def example(kind: Callable[..., errors.DevmapperError]) -> errors.DevmapperError:
    """An error of this class with made-up data."""
    made_up = {int: 7, Path: Path("/graph"), str: "word"}
    arguments = []
    keywords = {}
    for parameter in inspect.signature(kind).parameters.values():
        if parameter.default is not parameter.empty or parameter.kind is parameter.VAR_POSITIONAL:
            continue
        value = made_up.get(parameter.annotation, "word")
        if parameter.name == "kind" and kind is errors.PoolFull:
            value = errors.Space.DATA
        if parameter.kind is parameter.KEYWORD_ONLY:
            keywords[parameter.name] = value
        else:
            arguments.append(value)
    return kind(*arguments, **keywords)


@pytest.mark.parametrize("kind", every_error_class(), ids=lambda kind: kind.__name__)
def test_each_error_ends_with_its_exit_code(kind, capsys):
    error = example(kind)
    assert border.report(error, Settings()) == kind.exit_code
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"devmapper: {error}"
    assert lines[1:] == ([f"hint: {error.hint}"] if error.hint else [])


def test_os_error_names_the_object_and_what_to_do():
    told = border.explain(OSError(errno.ENOSPC, "No space left on device", "/graph/data"))
    assert told == (
        "'/graph/data': No space left on device",
        "make room on the file system that holds it",
        1,
    )


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_a_refusal_without_root_says_so(number, monkeypatch):
    error = OSError(number, os.strerror(number), "/graph")
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    assert border.explain(error)[1:] == ("run the command with sudo", 3)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert border.explain(error).exit_code == 1


def test_notes_of_an_error_are_a_part_of_its_sentence():
    error = errors.ArchiveError("etc/passwd", "its\ncheck sum is wrong")
    error.add_note("the half-made layer 'a' was removed")
    assert border.explain(error).message == (
        "tar entry 'etc/passwd': its check sum is wrong; the half-made layer 'a' was removed"
    )


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), 130), (border.Terminated(signal.SIGTERM), 143), (MemoryError(), 1)],
    ids=repr,
)
def test_ends_that_are_no_errors(error, status, capsys):
    assert border.report(error, Settings()) == status
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_bug_is_told_without_a_traceback(capsys, caplog):
    def broken() -> int:
        raise ZeroDivisionError("by zero")

    assert border.run(broken, Settings()) == 70
    err = capsys.readouterr().err
    assert err.startswith("devmapper: internal error: ZeroDivisionError: by zero\nhint: ")
    assert not caplog.records

    assert border.run(broken, Settings(verbose=1)) == 70
    assert caplog.records[0].exc_info[0] is ZeroDivisionError


def test_in_the_journal_an_error_is_an_error(tmp_path, monkeypatch):
    with open(tmp_path / "log", "w") as stream:
        found = os.fstat(stream.fileno())
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        border.report(errors.LayerNotFound("one"), Settings())
        monkeypatch.setenv("JOURNAL_STREAM", "8:1")  # of a program above, whose stderr it was
        border.report(MemoryError(), Settings())
    assert (tmp_path / "log").read_text().splitlines() == [
        "<3>devmapper: layer 'one' does not exist",
        "<3>hint: devmapper ls lists them",
        "devmapper: out of memory",
    ]


def test_surrogates_in_a_message_are_escaped(capsys):
    border.report(OSError(errno.ENOENT, "No such file", "a\udcff"), Settings())
    assert "udcff" in capsys.readouterr().err
    assert printable("a\udcff") == "a\\xff"


def test_a_closed_pipe_is_no_error(metadata):
    process = subprocess.Popen(
        [sys.executable, "-m", "devmapper.cli.main", "pool", "dump", str(metadata)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    assert process.communicate(timeout=60)[1] == b""
    assert process.returncode == 141


def test_a_full_disk_under_stdout_is_an_error(metadata):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "devmapper.cli.main", "pool", "dump", str(metadata)],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "devmapper: No space left on device"


def test_output_file_appears_as_a_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out"
    target.write_bytes(b"old")
    writing = new_file(target)
    writing.__enter__().write(b"half")
    assert writing.__exit__(ValueError, ValueError("stop"), None) is False
    assert target.read_bytes() == b"old"
    with new_file(target) as file:
        file.write(b"new")
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["out"]


# Start-up


def test_heavy_modules_are_not_imported_for_a_short_command():
    code = (
        "import sys, devmapper.cli.main, devmapper.driver, devmapper.engine.embedded.client;"
        "print(*sorted(set(sys.modules) & {'rich', 'zstandard', 'tarfile', 'asyncio', 'unittest',"
        " 'xml', 'http', 'email', 'multiprocessing', 'google_crc32c', 'pydantic'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("", "")


# Offline tools

# The interpreter itself may stand where an ordinary user cannot read: all is imported before
AS_NOBODY = f"""
import contextlib, io, os, sys
from devmapper.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    main.run(sys.argv[1:])
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid({NOBODY})
    os.setuid({NOBODY})
sys.exit(main.run(sys.argv[1:]))
"""


def as_nobody(*words: object) -> "subprocess.CompletedProcess[str]":
    """The command as an ordinary user, whoever runs the tests."""
    return subprocess.run(
        [sys.executable, "-c", AS_NOBODY, *map(str, words)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.fixture
def for_all(metadata):
    """The metadata where an ordinary user can read them."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="devmapper-test-") as directory:
        place = Path(directory)
        place.chmod(0o755)
        copy = place / "metadata"
        copy.write_bytes(metadata.read_bytes())
        copy.chmod(0o444)
        yield copy


def test_check_and_dump_of_a_file_need_no_root(for_all):
    checked = as_nobody("pool", "check", for_all)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert checked.stdout == f"{for_all}: no damage\n"
    dumped = as_nobody("pool", "dump", for_all)
    assert (dumped.returncode, dumped.stderr) == (0, "")
    assert dumped.stdout.startswith('<superblock uuid="" time="1" transaction="7"')
    assert dumped.stdout.endswith("</superblock>\n")


def test_what_needs_root_says_so_in_one_sentence(tmp_path):
    done = as_nobody("--root", "/nonexistent/graph", "ls")
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "devmapper: layers are mounted file systems, which only root can make",
        "hint: run the command with sudo; pool check FILE and pool dump FILE need no root",
    ]


def test_check_reports_json(metadata, capsys):
    assert main.run(["--json", "pool", "check", str(metadata)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "metadata": str(metadata), "clean": True, "needs_check": False,
        "cleared_needs_check": False,
        "leaked_data_blocks": 0, "leaked_metadata_blocks": 0, "damages": [], "notes": [],
    }  # fmt: skip


def flip(path: Path, block: int, offset: int = 100) -> None:
    with path.open("r+b") as file:
        file.seek(block * BLOCK_SIZE + offset)
        byte = file.read(1)[0]
        file.seek(block * BLOCK_SIZE + offset)
        file.write(bytes([byte ^ 0x10]))


def superblock_of(path: Path) -> layout.Superblock:
    with FileDevice.open(path, read_only=True) as device:
        return layout.Superblock.unpack(device.read(0))


def set_incompatible_feature(path: Path) -> None:
    from devmapper.thin.checksum import seal

    with FileDevice.open(path) as device:
        superblock = layout.Superblock.unpack(device.read(0))
        device.write(0, seal(superblock._replace(incompat_flags=1).pack(), layout.SUPERBLOCK))


DAMAGES: Final[dict[str, Callable[[Path], object]]] = {
    "random": lambda path: path.write_bytes(os.urandom(1 << 16)),
    "zeros": lambda path: path.write_bytes(bytes(1 << 16)),
    "empty": lambda path: path.write_bytes(b""),
    "half a block": lambda path: os.truncate(path, BLOCK_SIZE // 2),
    "truncated": lambda path: os.truncate(path, 3 * BLOCK_SIZE),
    "flipped superblock": lambda path: flip(path, 0),
    "flipped mapping tree": lambda path: flip(path, superblock_of(path).data_mapping_root),
    "flipped device details": lambda path: flip(path, superblock_of(path).device_details_root),
    "unknown feature": set_incompatible_feature,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", ["check", "dump"])
def test_damaged_metadata_is_one_sentence_and_nothing_is_written(command, damage, metadata, capsys):
    DAMAGES[damage](metadata)
    before = metadata.read_bytes(), metadata.stat().st_mtime_ns
    status = main.run(["pool", command, str(metadata)])
    _, err = capsys.readouterr()
    assert (metadata.read_bytes(), metadata.stat().st_mtime_ns) == before
    assert status == DAMAGED
    message, hint = err.splitlines()
    assert message.startswith("devmapper: metadata ")
    assert hint.startswith("hint: ")


def test_damage_is_listed_for_people_and_for_programs(metadata, capsys):
    flip(metadata, 0)
    assert main.run(["pool", "check", str(metadata)]) == DAMAGED
    listed = capsys.readouterr().out.splitlines()
    assert main.run(["--json", "pool", "check", str(metadata)]) == DAMAGED
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["clean"] is False
    assert [each["message"] for each in found["damages"]] == listed
    assert json.loads(err)["exit_code"] == DAMAGED


def test_a_file_that_must_not_be_read_needs_root(for_all):
    for_all.chmod(0o600)
    done = as_nobody("pool", "check", for_all)
    if os.stat(for_all).st_uid == os.geteuid() != 0:
        assert done.returncode == 0  # it is the user's own
        return
    assert done.returncode == 3
    assert done.stderr.splitlines() == [
        f"devmapper: {str(for_all)!r}: Permission denied",
        "hint: run the command with sudo",
    ]


@pytest.mark.parametrize(("name", "reason"), [("missing", "No such file"), (".", "neither a file")])
def test_what_is_no_metadata_file(name, reason, tmp_path, capsys):
    assert main.run(["pool", "check", str(tmp_path / name)]) == 1
    assert reason in capsys.readouterr().err


def test_a_dump_that_fails_leaves_no_file(metadata, tmp_path, capsys):
    target = tmp_path / "pool.xml"
    assert main.run(["pool", "dump", str(metadata), "-o", str(target)]) == 0
    whole = target.read_text()
    assert whole.endswith("</superblock>\n")
    flip(metadata, 0)
    assert main.run(["pool", "dump", str(metadata), "-o", str(target)]) == DAMAGED
    assert target.read_text() == whole
    assert sorted(os.listdir(tmp_path)) == ["metadata", "pool.xml"]


# Documents


def test_man_pages_are_up_to_date():
    """`python tools/manpages.py` writes them."""
    tool = runpy.run_path(str(DOCS.parent / "tools" / "manpages.py"))
    written = {path.name: path.read_text() for path in (DOCS / "man").glob("*.md")}
    assert written == tool["pages"]()


def test_every_exit_code_is_documented():
    listed = re.findall(r"^\| (\d+) \|", (DOCS / "cli.md").read_text(), re.MULTILINE)
    codes = {kind.exit_code for kind in every_error_class()}
    assert {int(code) for code in listed} == codes | {0, 1, border.INTERNAL_ERROR}


def test_every_command_and_option_is_documented():
    text = (DOCS / "cli.md").read_text()
    command = typer.main.get_command(main.app)
    for parameter in command.params:
        if "--show-completion" in parameter.opts:
            continue
        assert any(f"`{option}" in text or f"{option}`" in text for option in parameter.opts)
    for name in commands():
        assert f"`{name}" in text or name == "pool dump"


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", "docs/cli.md", "docs/tutorial.md"]
)
def test_links_lead_somewhere(document):
    path = DOCS.parent / document
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_needs_check_is_cleared_only_when_asked_and_sound(metadata, capsys):
    def asks() -> bool:
        with closing(FileDevice.open(metadata, read_only=True)) as device:
            return read_superblock(device).needs_check

    with closing(FileDevice.open(metadata)) as device:
        PoolMetadata.open(device).set_needs_check(needs_check=True)
    assert main.run(["pool", "check", str(metadata)]) == 0
    assert asks()
    with device_lock(metadata):
        assert main.run(["pool", "check", str(metadata), "--clear-needs-check"]) == 12
    assert asks()
    capsys.readouterr()
    assert main.run(["pool", "check", str(metadata), "--clear-needs-check"]) == 0
    assert capsys.readouterr().out.endswith("needs_check is cleared\n")
    assert not asks()


def test_needs_check_stays_where_there_is_damage(metadata, capsys):
    with closing(FileDevice.open(metadata)) as device:
        PoolMetadata.open(device).set_needs_check(needs_check=True)
        root = read_superblock(device).data_mapping_root
    flip(metadata, root)
    before = metadata.read_bytes()
    assert main.run(["pool", "check", str(metadata), "--clear-needs-check"]) == 30
    assert metadata.read_bytes() == before
