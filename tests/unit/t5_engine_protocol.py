"""The control socket's messages: values and errors come out as they went in."""

import errno
import json
import os
import socket
import threading
from pathlib import Path

import pytest

from devmapper import errors
from devmapper.engine.embedded import protocol
from devmapper.engine.embedded.operations import OPS, Operations
from devmapper.engine.embedded.records import ExportedDevice
from devmapper.engine.port import (
    Activation,
    NbdExport,
    PoolMode,
    PoolStatus,
    PoolTable,
    ThinStatus,
)
from devmapper.errors import EngineError, Space
from devmapper.units import Bytes, ThinId, TransactionId

TABLE = PoolTable(Path("/m"), Path("/d e/ü"), Bytes(1 << 40), Bytes(65536), read_only=True)
STATUS = PoolStatus(
    TransactionId(7), 1, 2, 3, 4, Bytes(65536), None, PoolMode.READ_ONLY,
    needs_check=True, error_if_no_space=False, discard_passdown=True, low_water_reached=False,
)  # fmt: skip
VALUES = [
    (PoolTable, TABLE),
    (PoolStatus, STATUS),
    (PoolStatus, STATUS._replace(held_metadata_root=9)),
    (ThinStatus, ThinStatus(ThinId(1), 2, None, TransactionId(3), 4, 5)),
    (list[ThinId], [ThinId(1), ThinId(2)]),
    (
        list[ExportedDevice],
        [ExportedDevice("a", ThinId(1), Bytes(512), Activation.LEAVING, 1)],
    ),
    (
        ExportedDevice,
        ExportedDevice(
            "a",
            ThinId(1),
            Bytes(512),
            Activation.ACTIVE,
            1,
            NbdExport(Path("/s"), read_only=True, clients=("process 1 over NBD",)),
        ),
    ),
    (Path, Path("/x")),
    (type(None), None),
]
ERRORS: list[Exception] = [
    errors.DevmapperError("plain", hint="a hint"),
    errors.UsageError("bad"),
    errors.EnvironmentLacking("no FUSE", hint="load it"),
    errors.GraphLocked(Path("/var/lib/x"), "process 1"),
    errors.LayerError("l", "something"),
    errors.LayerNotFound("l"),
    errors.LayerExists("l"),
    errors.LayerBusy("l", ["mounted at '/mnt'"]),
    errors.ArchiveError("member", "why"),
    errors.PoolError("p"),
    errors.PoolNotFound("p"),
    errors.PoolBusy(Path("/m"), "process 1"),
    errors.PoolFull(Space.METADATA, free=1, needed=2),
    errors.PoolUnusable("ro", "why"),
    errors.ThinIdError(3, "text"),
    errors.ThinIdExists(3),
    errors.ThinIdMissing(3),
    errors.ThinIdsExhausted(),
    errors.ThinBusy("d", ["one", "two"]),
    errors.PoolMismatch("text"),
    errors.TransactionConflict(1, 2),
    errors.IntegrityError("text"),
    errors.ChecksumError(1, "node", want=2, got=3),
    errors.FormatError(1, "magic", want=2, got="x"),
    errors.RecordCorrupt(Path("/r"), "why"),
    errors.ToolError(["a", "b"], 3, "oops"),
    errors.EngineError("gone"),
]


@pytest.mark.parametrize(("kind", "value"), VALUES)
def test_values_come_out_as_they_went_in(kind, value):
    received = json.loads(json.dumps(protocol.pack(value)))
    again = protocol.unpack(kind, received)
    assert again == value
    assert type(again) is type(value)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_come_out_as_they_went_in(error):
    again = protocol.unpack_error(json.loads(json.dumps(protocol.pack_error(error))))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)
    assert {key: type(item) for key, item in vars(again).items()} == {
        key: type(item) for key, item in vars(error).items()
    }


def test_every_class_of_the_tree_is_known():
    tree = {
        item
        for item in vars(errors).values()
        if isinstance(item, type) and issubclass(item, errors.DevmapperError)
    }
    for kind in tree:
        error = kind.__new__(kind, "text")
        error.hint = "a hint"
        again = protocol.unpack_error(protocol.pack_error(error))
        assert type(again) is kind
        assert vars(again) == {"hint": "a hint"}


def test_what_an_older_version_does_not_say_has_its_default():
    packed = protocol.pack(ExportedDevice("a", ThinId(1), Bytes(512), Activation.ACTIVE, 1))
    assert isinstance(packed, dict)
    del packed["nbd"]
    assert protocol.unpack(ExportedDevice, packed).nbd is None
    del packed["open_count"]
    with pytest.raises(EngineError, match="lacks open_count"):
        protocol.unpack(ExportedDevice, packed)


def test_a_descriptor_travels_and_is_closed_afterwards(tmp_path):
    here, there = socket.socketpair()
    with here, there, (tmp_path / "file").open("w+b") as file:
        protocol.send(here, {"op": "x"}, descriptor=file.fileno())
        protocol.send(here, {"op": "y"})
        with protocol.received(there) as (message, descriptor):
            assert message == {"op": "x"}
            assert descriptor is not None
            os.write(descriptor, b"through the socket")
            assert not os.get_inheritable(descriptor)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
        with protocol.received(there) as (message, descriptor):
            assert (message, descriptor) == ({"op": "y"}, None)
        file.seek(0)
        assert file.read() == b"through the socket"
        here.close()
        with pytest.raises(protocol.Disconnected), protocol.received(there):
            pass


def test_an_oserror_keeps_errno_and_file():
    packed = protocol.pack_error(OSError(errno.ENOSPC, "no space", "/dev/x"))
    again = protocol.unpack_error(json.loads(json.dumps(packed)))
    assert isinstance(again, OSError)
    assert (again.errno, again.strerror, again.filename) == (errno.ENOSPC, "no space", "/dev/x")
    missing = protocol.unpack_error(protocol.pack_error(FileNotFoundError(errno.ENOENT, "no")))
    assert isinstance(missing, FileNotFoundError)


def test_a_defect_becomes_an_engine_error():
    again = protocol.unpack_error(protocol.pack_error(KeyError("x")))
    assert isinstance(again, EngineError)
    assert "KeyError" in str(again)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (ThinId, "1"),
        (ThinId, True),
        (bool, 1),
        (str, None),
        (Path, 3),
        (list[ThinId], {"a": 1}),
        (list[ThinId], ["a"]),
        (PoolMode, "unheard of"),
        (PoolTable, {"metadata_device": "/m"}),
        (PoolTable, []),
        (type(None), 0),
    ],
)
def test_a_value_of_another_type_is_refused(kind, value):
    with pytest.raises(EngineError):
        protocol.unpack(kind, value)


def test_messages_travel_whole():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        message = {"value": list(range(300_000))}
        sender = threading.Thread(target=protocol.send, args=(ours, message))
        sender.start()
        assert protocol.receive(theirs) == message
        sender.join()


@pytest.mark.parametrize(
    "raw",
    [b"\xff\xff\xff\xff", b"\0\0\0\x02no", b"\0\0\0\x02[]", b"\0\0\0\x09{}"],
    ids=["too long", "no JSON", "no object", "cut short"],
)
def test_a_broken_message_is_refused(raw):
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            ours.sendall(raw)
        with pytest.raises(EngineError):
            protocol.receive(theirs)


def test_operations_check_their_arguments():
    public = {name for name in vars(Operations) if not name.startswith("_")}
    assert public - {"call"} == OPS
    operations = Operations.__new__(Operations)
    for op, args in (
        ("call", {}),
        ("__init__", {}),
        ("nothing", {}),
        ("create_thin", {}),
        ("create_thin", {"thin_id": "1"}),
        ("create_thin", {"thin_id": 1, "more": 2}),
    ):
        with pytest.raises(EngineError):
            operations.call(op, args)
