"""The tree of errors: documented, worded, and carrying an exit code."""

import inspect
from pathlib import Path

from devmapper import errors

CLASSES = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, errors.DevmapperError)
]


def test_every_class_stands_in_the_drawing():
    drawing = errors.__doc__ or ""
    shown = set(CLASSES) - {errors.ThinIdError}
    assert [cls.__name__ for cls in shown if cls.__name__ not in drawing] == []


def test_the_drawn_exit_codes_are_the_real_ones():
    for line in (errors.__doc__ or "").splitlines():
        words = line.replace("│", " ").replace("├──", " ").replace("└──", " ").split()
        if len(words) >= 2 and words[1].isdigit():
            assert getattr(errors, words[0]).exit_code == int(words[1]), words[0]


def test_builtin_bases_are_kept():
    assert issubclass(errors.LayerNotFound, LookupError)
    assert issubclass(errors.UsageError, ValueError)


def test_messages_name_the_object():
    assert "'web'" in str(errors.LayerBusy("web", ["bash (pid 7)"]))
    assert "bash (pid 7)" in str(errors.LayerBusy("web", ["bash (pid 7)"]))
    assert "block 7" in str(errors.ChecksumError(7, "node", want=1, got=2))
    assert "/x/y" in str(errors.RecordCorrupt(Path("/x/y"), "not JSON"))
    assert "mkfs.ext4 /dev/x" in str(errors.ToolError(["mkfs.ext4", "/dev/x"], 1, "no space"))
