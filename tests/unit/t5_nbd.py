"""NBD on a real pool and real sockets: the protocol's document, and what no client should send."""

import errno
import os
import random
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from devmapper.engine.embedded import nbd_socket
from devmapper.engine.embedded.device import ThinDevice
from devmapper.engine.embedded.nbd_service import NbdService
from devmapper.engine.embedded.pool import EmbeddedPool
from devmapper.errors import EnvironmentLacking, UsageError
from devmapper.units import MIB
from tests.support import nbd_client as nbd
from tests.support.nbd_client import NbdClient
from tests.support.pools import (
    BLOCK,
    ONE,
    SIZE,
    TWO,
    Background,
    assert_clean,
    fill,
    make_table,
    read,
    used,
    write,
)
from tests.support.waiting import wait_for

EPERM, EINVAL, ENOSPC = 1, 22, 28  # as the protocol numbers them


class Served:
    """A thin device of a pool on files, and its service."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.table = make_table(folder)
        self.pool = EmbeddedPool.open(self.table, no_space_timeout=30)
        self.pool.create_thin(ONE)
        self.device = self.pool.open_device(ONE, SIZE)
        self.path = folder / "socket"
        self.service = self.serve("socket", self.device)

    def serve(self, name: str, device: ThinDevice, *, read_only: bool = False) -> NbdService:
        path = self.folder / name
        with nbd_socket.listening(path) as listener:
            copy = socket.socket(fileno=os.dup(listener.fileno()))
            copy.settimeout(None)
            service = NbdService("device-1", device, copy, path, read_only=read_only)
            service.start()
        return service


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    rig = Served(tmp_path)
    yield rig
    rig.service.close()
    rig.pool.close()
    assert_clean(rig.table)


@pytest.fixture
def client(served: Served) -> Iterator[NbdClient]:
    with NbdClient.ready(served.path) as one:
        yield one


def clients(rig: Served) -> int:
    return len(rig.service.status().clients)


class TestHandshake:
    def test_go_tells_size_flags_name_and_block_sizes(self, served):
        with NbdClient(served.path) as client:
            assert client.handshake_flags == 3
            told = client.go(b"device-1", nbd.INFO_BLOCK_SIZE, nbd.INFO_NAME)
            assert client.size == SIZE
            # HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES, CAN_MULTI_CONN
            assert client.flags == 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 8
            assert told[nbd.INFO_NAME] == b"device-1"
            sizes = struct.unpack(">III", told[nbd.INFO_BLOCK_SIZE])
            assert sizes == (512, BLOCK, 32 * MIB)

    def test_info_leaves_the_handshake_open(self, served):
        with NbdClient(served.path) as client:
            assert client.answers(nbd.INFO, nbd.info_data(b""))[-1].kind == nbd.ACK
            assert clients(served) == 0
            client.go()
            assert clients(served) == 1

    def test_the_old_way_with_and_without_padding(self, served):
        for flags, padding in ((3, 0), (1, 124)):
            with NbdClient(served.path, flags=flags) as client:
                client.option(nbd.EXPORT_NAME)
                size, _ = struct.unpack(">QH", client.receive(10))
                assert size == SIZE
                assert client.receive(padding) == bytes(padding)
                assert client.read(0, 512) == bytes(512)

    def test_list_and_abort(self, served):
        with NbdClient(served.path) as client:
            listed, end = client.answers(nbd.LIST)
            assert listed.data == struct.pack(">I", 8) + b"device-1"
            assert end.kind == nbd.ACK
            assert client.answers(nbd.LIST, b"x")[0].kind == nbd.ERR_INVALID
            assert client.answers(nbd.ABORT)[0].kind == nbd.ACK
            assert client.has_ended()

    @pytest.mark.parametrize("option", [nbd.STARTTLS, 4, 11, 0xFFFFFFFF])
    def test_what_is_not_spoken_here(self, served, option):
        with NbdClient(served.path) as client:
            assert client.answers(option, b"whatever")[0].kind == nbd.ERR_UNSUP
            client.go()
            assert client.read(0, 512) == bytes(512)

    def test_an_unknown_name(self, served):
        with NbdClient(served.path) as client:
            wrong = nbd.info_data(b"other")
            assert client.answers(nbd.GO, wrong)[0].kind == nbd.ERR_UNKNOWN
            client.go()
        with NbdClient(served.path) as client:
            client.option(nbd.EXPORT_NAME, b"other")
            assert client.has_ended()

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\0\0",
            struct.pack(">I", 100) + b"short",
            struct.pack(">I", 0xFFFFFFFF),
            struct.pack(">IH", 0, 3),
            struct.pack(">IHH", 0, 0, 1),
            struct.pack(">I", 5000) + bytes(5000) + struct.pack(">H", 0),
        ],
    )
    def test_info_whose_data_are_not_what_they_say(self, served, data):
        with NbdClient(served.path) as client:
            assert client.answers(nbd.GO, data)[0].kind == nbd.ERR_INVALID
            client.go()

    @pytest.mark.parametrize(
        "sent",
        [
            struct.pack(">QII", 0xBAD, nbd.GO, 0),
            struct.pack(">QII", nbd.IHAVEOPT, nbd.GO, 0xFFFFFFFF),
            struct.pack(">QII", nbd.IHAVEOPT, 99, 70_000),
            b"GET / HTTP/1.1\r\n\r\n",
        ],
    )
    def test_what_is_no_option_ends_the_connection(self, served, sent):
        with NbdClient(served.path) as client:
            client.send(sent)
            assert client.has_ended()
        with NbdClient.ready(served.path) as other:
            assert other.read(0, 512) == bytes(512)

    def test_unknown_client_flags_end_it(self, served):
        with NbdClient(served.path, flags=0x10) as client:
            assert client.has_ended()

    def test_who_says_nothing_is_no_client_and_is_put_out(self, served):
        from devmapper.engine.embedded import nbd_handshake

        here, there = socket.socketpair()
        with here, there:
            offer = served.service._disk.offer()
            begin = time.monotonic()
            with pytest.raises(TimeoutError):
                nbd_handshake.agree(there, offer, admit=lambda: True, seconds=0.2)
            assert time.monotonic() - begin < 5
        with NbdClient(served.path):
            assert clients(served) == 0

    def test_a_thousand_options_of_noise(self, served):
        noise = random.Random(7)
        for _ in range(50):
            with NbdClient(served.path) as client:
                for _ in range(20):
                    client.option(noise.choice([3, 6, 7, 8, 9, 10, 77]), noise.randbytes(9))
        wait_for(lambda: not served.service._connections)
        with NbdClient.ready(served.path) as client:
            assert client.read(0, 512) == bytes(512)


class TestTransmission:
    def test_what_is_written_is_read_and_in_the_device(self, served, client):
        data = os.urandom(3 * BLOCK)
        client.write(BLOCK // 2, data)
        assert client.read(BLOCK // 2, len(data)) == data
        assert read(served.device, BLOCK // 2, len(data)) == data
        assert client.call(nbd.FLUSH) == 0

    def test_any_bytes_for_who_never_asked_for_block_sizes(self, served, client):
        client.write(0, b"x" * 4096)
        client.write(777, b"abc")
        client.write(511, b"yz")
        assert client.read(510, 4) == b"xyzx"
        assert client.read(776, 5) == b"xabcx"
        assert client.read(SIZE - 3, 3) == bytes(3)

    def test_no_length_at_all(self, client):
        for command in (nbd.READ, nbd.WRITE, nbd.TRIM, nbd.WRITE_ZEROES):
            assert client.call(command, 512, 0) == 0

    def test_trim_gives_blocks_back_and_reads_as_zeros(self, served, client):
        client.write(0, b"x" * (4 * BLOCK))
        assert client.call(nbd.TRIM, BLOCK - 100, 2 * BLOCK) == 0
        assert client.read(BLOCK, BLOCK) == bytes(BLOCK)
        assert client.read(BLOCK - 512, 512) == b"x" * 512
        assert used(served.pool) == 3
        assert client.call(nbd.TRIM, 1, 10) == 0  # no whole sector: a hint, not taken
        assert client.read(0, 512) == b"x" * 512

    @pytest.mark.parametrize("flags", [0, nbd.NO_HOLE, nbd.FUA, nbd.FUA | nbd.NO_HOLE])
    def test_write_zeroes_of_any_alignment(self, served, client, flags):
        chance = random.Random(flags)
        model = bytearray(b"x" * (4 * BLOCK))
        client.write(0, bytes(model))
        for _ in range(30):
            offset = chance.randrange(len(model))
            length = chance.randrange(len(model) - offset + 1)
            if chance.random() < 0.5:
                length = min(length, 700)
            assert client.call(nbd.WRITE_ZEROES, offset, length, flags=flags) == 0
            model[offset : offset + length] = bytes(length)
            assert client.read(0, len(model)) == model
            client.write(offset, b"y" * length)
            model[offset : offset + length] = b"y" * length
        client.write(0, b"x" * (4 * BLOCK))
        assert client.call(nbd.WRITE_ZEROES, 0, 4 * BLOCK, flags=flags) == 0
        assert used(served.pool) == (4 if flags & nbd.NO_HOLE else 0)

    def test_zeros_where_the_pool_ignores_discards(self, tmp_path):
        table = make_table(tmp_path, ignore_discard=True)
        with EmbeddedPool.open(table) as pool:
            pool.create_thin(ONE)
            with pool.open_device(ONE, SIZE) as device:
                write(device, 0, b"x" * BLOCK)
                from devmapper.engine.embedded.nbd_disk import NbdDisk

                disk = NbdDisk("one", device, read_only=False)
                assert disk.perform(nbd.TRIM, 0, 0, BLOCK, memoryview(b"")) == 0
                assert read(device, 0, 512) == b"x" * 512
                assert disk.perform(nbd.WRITE_ZEROES, 0, 0, BLOCK, memoryview(b"")) == 0
                assert read(device, 0, BLOCK) == bytes(BLOCK)

    def test_replies_come_when_they_are_ready(self, served, client):
        """A write that waits keeps neither reads nor the client's other requests."""
        client.write(0, b"x" * BLOCK)
        served.device.traffic.hold()
        try:
            waiting = client.ask(nbd.WRITE, 0, 512, b"n" * 512)
            bad = client.ask(99)
            assert client.reply() == (EINVAL, bad)
        finally:
            served.device.traffic.let_go()
        assert client.reply() == (0, waiting)

    def test_more_at_once_than_there_are_workers(self, client):
        cookies = {client.ask(nbd.WRITE, n * 512, 512, bytes([n]) * 512) for n in range(200)}
        while cookies:
            error, cookie = client.reply()
            assert error == 0
            cookies.remove(cookie)
        assert client.read(0, 200 * 512) == b"".join(bytes([n]) * 512 for n in range(200))

    def test_disconnecting_ends_what_was_asked_for_first(self, served, client):
        served.device.traffic.hold()
        client.ask(nbd.WRITE, 0, 512, b"d" * 512)
        client.ask(nbd.DISC)
        time.sleep(0.1)
        assert clients(served) == 1  # its write is still to come
        served.device.traffic.let_go()
        wait_for(lambda: clients(served) == 0)
        assert read(served.device, 0, 512) == b"d" * 512

    def test_long_requests_one_after_the_other(self, client):
        data = os.urandom(3 * MIB)
        for _ in range(6):  # more than may be under way at once
            client.write(0, data)
            assert client.read(0, len(data)) == data

    def test_fua_is_a_flush(self, served, client, monkeypatch):
        commits: list[None] = []
        run = served.pool._core.commits.run

        def counted() -> None:
            commits.append(None)
            run()

        monkeypatch.setattr(served.pool._core.commits, "run", counted)
        client.write(0, b"f" * 512)
        assert not commits
        client.write(0, b"f" * 512, flags=nbd.FUA)
        assert len(commits) == 1
        assert client.call(nbd.TRIM, 0, BLOCK, flags=nbd.FUA) == 0
        assert client.call(nbd.WRITE_ZEROES, 0, 512, flags=nbd.FUA) == 0
        assert client.call(nbd.FLUSH) == 0
        assert len(commits) == 4


@pytest.fixture
def structured(served: Served) -> Iterator[NbdClient]:
    """A client of structured replies that may ask what is mapped."""
    with NbdClient(served.path) as one:
        assert one.answers(nbd.STRUCTURED_REPLY)[0].kind == nbd.ACK
        wanted = nbd.contexts_data(b"", b"base:allocation", b"qemu:other")
        chosen, end = one.answers(nbd.SET_META_CONTEXT, wanted)
        assert chosen.data == struct.pack(">I", 1) + b"base:allocation"
        assert end.kind == nbd.ACK
        one.go()
        yield one


class TestStructuredReplies:
    def test_reads_are_one_chunk(self, structured):
        structured.write(512, b"s" * 1024)
        for flags in (0, nbd.DF):
            cookie = structured.ask(nbd.READ, 512, 1024, flags=flags)
            content = struct.pack(">Q", 512) + b"s" * 1024
            assert structured.chunk() == (nbd.OFFSET_DATA, cookie, content)
        cookie = structured.ask(nbd.READ, 777, 3)
        assert structured.chunk() == (nbd.OFFSET_DATA, cookie, struct.pack(">Q", 777) + b"sss")
        cookie = structured.ask(nbd.READ, 0, 0)
        assert structured.chunk() == (nbd.NO_CHUNK, cookie, b"")
        assert structured.flags & 1 << 7

    def test_errors_of_reads_are_chunks(self, structured):
        for offset, length in ((SIZE, 512), (0, 2**32 - 1)):
            structured.ask(nbd.READ, offset, length)
            assert structured.error_chunk() == EINVAL
        assert structured.call(nbd.WRITE, SIZE, 512, b"x" * 512) == ENOSPC

    def test_what_is_mapped(self, served, structured):
        assert structured.extents(0, SIZE) == [(SIZE, 3)]
        structured.write(BLOCK, b"x" * 512)
        structured.write(2 * BLOCK, b"x" * BLOCK)
        structured.write(5 * BLOCK, b"x" * 512)
        assert structured.extents(0, 8 * BLOCK) == [
            (BLOCK, 3), (2 * BLOCK, 0), (2 * BLOCK, 3), (BLOCK, 0), (2 * BLOCK, 3),
        ]  # fmt: skip
        assert structured.extents(BLOCK + 100, BLOCK) == [(BLOCK, 0)]
        assert structured.extents(0, 8 * BLOCK, flags=nbd.REQ_ONE) == [(BLOCK, 3)]
        served.pool.create_snap(TWO, ONE)
        assert structured.extents(BLOCK, BLOCK) == [(BLOCK, 0)]
        assert structured.call(nbd.TRIM, BLOCK, BLOCK) == 0
        assert structured.extents(BLOCK, BLOCK) == [(BLOCK, 3)]

    def test_status_of_what_is_not_there(self, structured):
        for offset, length in ((SIZE, 512), (SIZE - 512, 1024), (0, 0)):
            structured.ask(nbd.BLOCK_STATUS, offset, length)
            assert structured.error_chunk() == EINVAL

    def test_who_has_not_asked_gets_simple_replies(self, client):
        assert client.call(nbd.READ, 0, 512, flags=nbd.DF) == EINVAL
        assert client.call(nbd.BLOCK_STATUS, 0, 512) == EINVAL
        assert client.read(0, 512) == bytes(512)

    def test_contexts_are_listed_and_need_structured_replies(self, served):
        data = nbd.contexts_data(b"")
        with NbdClient(served.path) as client:
            for option in (nbd.LIST_META_CONTEXT, nbd.SET_META_CONTEXT):
                assert client.answers(option, data)[-1].kind == nbd.ERR_INVALID
            assert client.answers(nbd.STRUCTURED_REPLY, b"x")[0].kind == nbd.ERR_INVALID
            client.answers(nbd.STRUCTURED_REPLY)
            for queries, count in (((), 1), ((b"base:",), 1), ((b"qemu:",), 0)):
                found = client.answers(nbd.LIST_META_CONTEXT, nbd.contexts_data(b"", *queries))
                assert len(found) == count + 1
            other = nbd.contexts_data(b"other")
            assert client.answers(nbd.LIST_META_CONTEXT, other)[0].kind == nbd.ERR_UNKNOWN
            assert len(client.answers(nbd.SET_META_CONTEXT, data)) == 1
            client.go()
            client.ask(nbd.BLOCK_STATUS, 0, 512)
            assert client.error_chunk() == EINVAL

    def test_a_choice_is_for_one_name(self, served):
        with NbdClient(served.path) as client:
            client.answers(nbd.STRUCTURED_REPLY)
            wanted = nbd.contexts_data(b"device-1", b"base:allocation")
            assert len(client.answers(nbd.SET_META_CONTEXT, wanted)) == 2
            client.go(b"")
            client.ask(nbd.BLOCK_STATUS, 0, 512)
            assert client.error_chunk() == EINVAL

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            struct.pack(">I", 9),
            struct.pack(">II", 0, 1),
            struct.pack(">II", 0, 0xFFFFFFFF),
            struct.pack(">III", 0, 1, 0xFFFFFFFF),
            struct.pack(">II", 0, 0) + b"x",
        ],
    )
    def test_contexts_whose_data_are_not_what_they_say(self, served, data):
        with NbdClient(served.path) as client:
            client.answers(nbd.STRUCTURED_REPLY)
            assert client.answers(nbd.SET_META_CONTEXT, data)[0].kind == nbd.ERR_INVALID
            client.go()


class TestHostile:
    def test_a_wrong_magic_ends_the_connection_only(self, served, client):
        client.ask(nbd.READ, 0, 512, magic=0x25609514)
        assert client.has_ended()
        with NbdClient.ready(served.path) as other:
            assert other.read(0, 512) == bytes(512)

    @pytest.mark.parametrize(
        ("command", "offset", "length", "error"),
        [
            (nbd.READ, SIZE, 512, EINVAL),
            (nbd.READ, SIZE - 512, 1024, EINVAL),
            (nbd.READ, 2**64 - 512, 512, EINVAL),
            (nbd.READ, 2**64 - 512, 1024, EINVAL),
            (nbd.READ, 0, 32 * MIB + 512, EINVAL),
            (nbd.READ, 0, 2**32 - 1, EINVAL),
            (nbd.WRITE, SIZE, 512, ENOSPC),
            (nbd.WRITE, SIZE - 512, 1024, ENOSPC),
            (nbd.WRITE, 2**64 - 1, 512, ENOSPC),
            (nbd.TRIM, SIZE, 512, EINVAL),
            (nbd.TRIM, 0, 2**32 - 1, EINVAL),
            (nbd.WRITE_ZEROES, 512, SIZE, ENOSPC),
            (nbd.CACHE, 0, 512, EINVAL),
            (nbd.BLOCK_STATUS, 0, 512, EINVAL),
            (0xFFFF, 0, 512, EINVAL),
        ],
    )
    def test_what_cannot_be_is_an_error_and_no_more(
        self, served, client, command, offset, length, error
    ):
        data = b"h" * length if command == nbd.WRITE else b""
        assert client.call(command, offset, length, data) == error
        assert used(served.pool) == 0
        assert client.read(SIZE - 512, 512) == bytes(512)

    @pytest.mark.parametrize("flags", [nbd.NO_HOLE, 4, 16, 0x8000])
    def test_unknown_flags(self, client, flags):
        assert client.call(nbd.WRITE, 0, 512, b"f" * 512, flags=flags) == EINVAL
        assert client.call(nbd.READ, 0, 512, flags=flags) == EINVAL
        assert client.read(0, 512) == bytes(512)

    def test_a_write_too_long_to_skip(self, served, client):
        client.ask(nbd.WRITE, 0, 2**32 - 512)
        assert client.has_ended()
        wait_for(lambda: clients(served) == 0)

    def test_one_that_goes_amid_its_data_has_written_nothing(self, served, client):
        client.ask(nbd.WRITE, 0, 2 * MIB, b"h" * MIB)
        client.close()
        wait_for(lambda: clients(served) == 0)
        assert used(served.pool) == 0
        for _ in range(10):  # and what it borrowed is back
            with NbdClient.ready(served.path) as other:
                other.ask(nbd.WRITE, 0, 2 * MIB, b"h")
        with NbdClient.ready(served.path) as other:
            other.write(0, b"w" * 2 * MIB)

    def test_one_that_goes_before_its_replies(self, served):
        for _ in range(10):
            with NbdClient.ready(served.path) as client:
                for n in range(50):
                    client.ask(nbd.READ, n * BLOCK % SIZE, BLOCK)
        wait_for(lambda: clients(served) == 0)

    def test_one_that_takes_no_replies_keeps_only_itself(self, served, client):
        with NbdClient.ready(served.path) as deaf:
            for _ in range(20):
                deaf.ask(nbd.READ, 0, MIB)
            client.write(0, b"w" * 512)
            assert client.read(0, 512) == b"w" * 512
            served.service.close()  # ends it all the same
        wait_for(lambda: clients(served) == 0)

    def test_a_crowd_is_not_let_in(self, served):
        crowd: list[NbdClient] = []
        with suppress(nbd.Ended, ConnectionError):
            while len(crowd) < 40:
                crowd.append(NbdClient.ready(served.path))
        assert len(crowd) == 16
        for one in crowd:
            assert one.read(0, 512) == bytes(512)
            one.close()
        wait_for(lambda: clients(served) == 0)

    def test_noise(self, served):
        noise = random.Random(3)
        for _ in range(100):
            with NbdClient.ready(served.path) as client, suppress(ConnectionError):
                client.send(struct.pack(">I", 0x25609513) + noise.randbytes(200))
        wait_for(lambda: clients(served) == 0)
        with NbdClient.ready(served.path) as client:
            client.write(0, b"s" * 512)


class TestService:
    def test_several_clients_see_one_disk(self, served):
        with NbdClient.ready(served.path) as one, NbdClient.ready(served.path) as two:
            one.write(0, b"1" * 512)
            assert two.read(0, 512) == b"1" * 512
            two.write(512, b"2" * 512)
            assert one.call(nbd.FLUSH) == 0
            assert one.read(0, 1024) == b"1" * 512 + b"2" * 512
            assert clients(served) == 2
            (first, _) = served.service.status().clients
            assert str(os.getpid()) in first

    def test_read_only(self, served):
        write(served.device, 0, b"r" * 512)
        service = served.serve("read-only", served.device, read_only=True)
        with NbdClient.ready(served.folder / "read-only") as client:
            assert client.flags & 2
            assert client.read(0, 512) == b"r" * 512
            assert client.call(nbd.WRITE, 0, 512, b"w" * 512) == EPERM
            assert client.call(nbd.TRIM, 0, 512) == EPERM
            assert client.call(nbd.WRITE_ZEROES, 0, 512) == EPERM
            assert client.call(nbd.FLUSH) == 0
            assert client.read(0, 512) == b"r" * 512
        service.close()

    def test_a_client_keeps_it_open(self, served, client):
        assert not served.service.close_if_idle()
        assert client.read(0, 512) == bytes(512)
        client.ask(nbd.DISC)
        wait_for(served.service.close_if_idle)
        with pytest.raises(ConnectionRefusedError):
            NbdClient(served.path)

    def test_who_has_closed_is_gone_once_it_is_asked(self, served):
        client = NbdClient.ready(served.path)
        stamp = b"w" * MIB
        for number in range(4):  # left in its socket for the service to find
            client.ask(nbd.WRITE, number * len(stamp), len(stamp), stamp)
        client.close()
        served.service.settle(60)
        assert served.service.status().clients == ()
        assert served.service.close_if_idle()
        assert read(served.device, 0, 4 * len(stamp)) == 4 * stamp

    def test_who_stays_is_not_waited_for(self, served, client):
        NbdClient.ready(served.path).close()
        served.service.settle(60)
        assert clients(served) == 1
        assert client.read(0, 512) == bytes(512)

    def test_who_has_closed_counts_while_its_write_waits_for_space(self, served):
        other, _ = fill(served.pool, TWO)
        client = NbdClient.ready(served.path)
        client.ask(nbd.WRITE, 0, 512, b"n" * 512)
        client.close()
        served.service.settle(0.2)
        assert clients(served) == 1
        served.service.settle(3600)  # nobody waits for it again
        other.discard(0, BLOCK)
        wait_for(lambda: clients(served) == 0)
        assert read(served.device, 0, 512) == b"n" * 512
        other.close()

    def test_a_handshake_under_way_does_not_keep_it(self, served):
        with NbdClient(served.path) as client:
            assert served.service.close_if_idle()
            assert client.has_ended()

    def test_new_clients_are_refused_while_it_is_leaving(self, served, client):
        served.service.admit(new=False)
        with NbdClient(served.path) as other:
            assert other.answers(nbd.GO, nbd.info_data(b""))[-1].kind == nbd.ERR_SHUTDOWN
        assert client.read(0, 512) == bytes(512)
        served.service.admit(new=True)
        NbdClient.ready(served.path).close()

    def test_a_snapshot_amid_writes_is_of_one_moment(self, served, client):
        """Each write is the number of the one before it, plus one, in two places far apart."""
        stop: list[None] = []
        written = [0]

        def run() -> None:
            while not stop:
                written[0] += 1
                stamp = struct.pack(">Q", written[0]) * 64
                client.write(0, stamp)
                client.write(8 * BLOCK, stamp)

        writer = Background(run)
        try:
            for number in range(10, 20):
                wait_for(lambda: written[0] > 0)
                served.pool.create_snap(number, ONE)
                with served.pool.open_device(number, SIZE) as snap:
                    (first,) = struct.unpack(">Q", read(snap, 0, 512)[:8])
                    (second,) = struct.unpack(">Q", read(snap, 8 * BLOCK, 512)[:8])
                    assert first - second in (0, 1)
                    before = read(snap, 0, 512)
                    time.sleep(0.01)
                    assert read(snap, 0, 512) == before
        finally:
            stop.append(None)
            writer.result()

    def test_a_full_pool_answers_when_there_is_room(self, served, client):
        other, _ = fill(served.pool, TWO)
        cookie = client.ask(nbd.WRITE, 0, 512, b"n" * 512)
        assert client.read(0, 512) == bytes(512)
        other.discard(0, BLOCK)
        assert client.reply() == (0, cookie)
        assert client.read(0, 512) == b"n" * 512
        other.close()


class TestSocket:
    def test_mode_and_replacement_of_a_stale_one(self, tmp_path):
        path = tmp_path / "s"
        with nbd_socket.listening(path):
            assert path.stat().st_mode & 0o777 == 0o600
            with pytest.raises(UsageError, match="somebody listens"), nbd_socket.listening(path):
                pass
            nbd_socket.remove(path)
            assert path.exists()
        with nbd_socket.listening(path):  # nobody listens on what is there
            pass
        nbd_socket.remove(path)
        assert not path.exists()

    def test_nothing_is_left_after_an_error(self, tmp_path):
        with pytest.raises(RuntimeError), nbd_socket.listening(tmp_path / "s"):
            raise RuntimeError
        assert list(tmp_path.iterdir()) == []

    def test_other_files_and_links_are_left_alone(self, tmp_path):
        file = tmp_path / "file"
        file.write_text("mine")
        link = tmp_path / "link"
        link.symlink_to(tmp_path / "elsewhere")
        for path in (file, link, tmp_path):
            with pytest.raises(UsageError, match="no socket"), nbd_socket.listening(path):
                pass
        assert file.read_text() == "mine"
        assert not (tmp_path / "elsewhere").exists()

    def test_a_folder_that_is_not_there(self, tmp_path):
        missing = tmp_path / "no" / "s"
        with pytest.raises(EnvironmentLacking), nbd_socket.listening(missing):
            pass

    def test_names_that_no_socket_can_have(self):
        for name in ("/" + "x" * 107, "/tmp/a\0b", "/"):
            with pytest.raises(UsageError):
                nbd_socket.check_path(Path(name))
        assert nbd_socket.check_path(Path("/" + "x" * 106)) == Path("/" + "x" * 106)


def test_errors_have_the_protocols_numbers():
    from devmapper.engine.embedded.nbd_format import error_number

    numbers = {errno.EROFS: 1, errno.EIO: 5, errno.ENOSPC: 28, errno.EDQUOT: 28, errno.ENXIO: 5}
    assert {code: error_number(code) for code in numbers} == numbers
    assert error_number(None) == 5
