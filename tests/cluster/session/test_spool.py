"""Files between processes: nameless, private, found only by their token, and gone with whoever has them open."""

from __future__ import annotations

import dataclasses
import errno
import os

import pytest

from phi_cluster.cluster.errors import Overloaded
from phi_cluster.cluster.session import spool
from phi_cluster.cluster.session.hibernation_store import StorageFull
from phi_cluster.cluster.session.spool import SpoolFile, SpoolRef, open_spooled
from phi_cluster.cluster.session.uploads import Uploads

LONG = bytes(range(256)) * 8192


async def pieces(data, length=70_000):
    for start in range(0, len(data), length):
        yield data[start : start + length]


def whole(received):
    with open_spooled(received) as file:
        return file.read()


def test_another_process_reads_it_and_nobody_finds_it(tmp_path, kit):
    file = SpoolFile(tmp_path)
    file.write(LONG)
    assert os.listdir(tmp_path) == []
    assert os.fstat(file.file.fileno()).st_mode & 0o777 == 0o600
    ref = file.ref
    assert (ref.pid, ref.nbytes) == (os.getpid(), len(LONG))
    code = "import sys; print(len(open(f'/proc/{sys.argv[1]}/fd/{sys.argv[2]}', 'rb').read()))"
    with kit.python_child(code, str(ref.pid), str(ref.fd)) as (_, words):
        assert words == [str(len(LONG) + 16)]
    opened = open_spooled(ref)
    file.close()
    # Whoever has it open has it all.
    assert opened.read() == LONG
    opened.close()
    with pytest.raises(OSError, match="No such file"):
        open_spooled(ref)


def test_another_file_at_its_place_is_never_taken_for_it(tmp_path):
    mine, other = SpoolFile(tmp_path), SpoolFile(tmp_path)
    with pytest.raises(OSError, match="another file"):
        open_spooled(dataclasses.replace(mine.ref, fd=other.ref.fd))
    mine.close()
    other.close()


def test_where_nameless_files_cannot_be_made_a_name_goes_at_once(tmp_path, monkeypatch):
    really = os.open

    def refusing(path, flags, *mode, **options):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not here")
        return really(path, flags, *mode, **options)

    monkeypatch.setattr(spool.os, "open", refusing)
    file = SpoolFile(tmp_path)
    file.write(b"content")
    assert os.listdir(tmp_path) == []
    assert os.pread(file.file.fileno(), 100, 16) == b"content"
    file.close()


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**20 + 1, len(LONG)])
async def test_an_upload_is_received_whole_and_long_ones_on_the_disk(tmp_path, length):
    async with Uploads(tmp_path).received(pieces(LONG[:length])) as received:
        assert isinstance(received, bytes) == (length <= 2**20)
        assert (received if isinstance(received, bytes) else whole(received)) == LONG[:length]
    if isinstance(received, SpoolRef):
        with pytest.raises(OSError, match=r"No such file|another file|not permitted"):
            open_spooled(received)


async def test_only_so_many_come_at_once(tmp_path):
    uploads = Uploads(tmp_path)
    received = [uploads.received(pieces(LONG)) for _ in range(4)]
    refs = [await one.__aenter__() for one in received]
    with pytest.raises(Overloaded):
        await uploads.received(pieces(LONG)).__aenter__()
    # Short ones need no file.
    async with uploads.received(pieces(b"short")) as short:
        assert short == b"short"
    await received[0].__aexit__(None, None, None)
    async with uploads.received(pieces(LONG)) as again:
        assert whole(again) == whole(refs[1]) == LONG
    for one in received[1:]:
        await one.__aexit__(None, None, None)


async def test_what_breaks_leaves_nothing(tmp_path, kit):
    def num_open():
        return len(os.listdir("/proc/self/fd"))

    async def broken():
        async for piece in pieces(LONG):
            yield piece
        raise ConnectionError("the client left")

    uploads = Uploads(tmp_path)
    before = num_open()
    for _ in range(6):
        with pytest.raises(ConnectionError):
            await uploads.received(broken()).__aenter__()
    assert num_open() == before


async def test_a_full_disk_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(spool, "_RESERVE_NBYTES", 2**60)
    uploads = Uploads(tmp_path)
    with pytest.raises(StorageFull):
        await uploads.received(pieces(LONG)).__aenter__()
    with pytest.raises(StorageFull):
        await Uploads(tmp_path / "nowhere").received(pieces(LONG)).__aenter__()
    async with uploads.received(pieces(b"short")) as short:
        assert short == b"short"
