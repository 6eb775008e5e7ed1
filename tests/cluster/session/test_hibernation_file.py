"""The file of a hibernated session: what comes back is what went in, and anything else is refused."""

from __future__ import annotations

import io
import os

import pytest

from phi_cluster.cluster.session.hibernation_file import (
    BadHibernation,
    Mark,
    PieceCipher,
    file_nbytes,
    read_file,
    read_header,
    write_file,
)
from phi_cluster.cluster.session.segment import Segment

MARK = Mark(12, 3)
KEY = bytes(range(32))


@pytest.fixture(params=[None, KEY], ids=["plain", "encrypted"])
def cipher(request):
    return PieceCipher(request.param)


@pytest.fixture
def segment(layout, kit):
    segment = Segment.create(layout, kit.fingerprint)
    segment.append_tokens(range(1000, 1100))
    for start in range(0, 90, 10):
        kit.write_kv(segment, start, start + 10, start + 1)
    segment.set_num_computed_tokens(90)
    yield segment
    segment.close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "memory.kv"


def write(path, segment, cipher, num_tokens=90, digest="a" * 32, piece_nbytes=2**20):
    fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_TRUNC)
    try:
        return write_file(io.FileIO(fd, "w", closefd=False), segment, num_tokens, digest, MARK, cipher, piece_nbytes)
    finally:
        os.close(fd)


def read(path, layout, kit, cipher, digest="a" * 32, mark=MARK, fingerprint=None):
    """The memory behind the header's page, and the counts."""
    segment = Segment.create(layout, fingerprint or kit.fingerprint)
    fd = os.open(path, os.O_RDONLY)
    try:
        read_file(io.FileIO(fd, closefd=False), segment, digest, mark, cipher)
        counts = (segment.num_tokens, segment.num_computed_tokens, segment.long_rope)
        return os.pread(segment._fd, layout.nbytes, 4096), counts, segment.nbytes_resident
    finally:
        os.close(fd)
        segment.close()


@pytest.mark.parametrize("piece_nbytes", [2**20, 4096, 1000])
@pytest.mark.parametrize("num_tokens", [90, 100, 33, 1])
def test_what_goes_in_comes_out(path, segment, layout, kit, cipher, num_tokens, piece_nbytes):
    segment.long_rope = True
    segment.set_num_computed_tokens(90)
    written = write(path, segment, cipher, num_tokens, piece_nbytes=piece_nbytes)
    assert written == path.stat().st_size
    if piece_nbytes == 2**20:
        assert written <= file_nbytes(segment, num_tokens)
    memory, counts, nbytes = read(path, layout, kit, cipher)
    computed = min(num_tokens, 90)
    assert counts == (num_tokens, computed, True)
    assert nbytes == layout.nbytes_used(num_tokens, computed)
    expected = Segment.create(layout, kit.fingerprint)
    expected.copy_from(segment, num_tokens)
    assert memory == os.pread(expected._fd, layout.nbytes, 4096)
    expected.close()


def test_nothing_of_an_encrypted_memory_shows(path, segment, layout):
    segment.kv_buffer[:26] = b"the secret is a long word."
    write(path, segment, PieceCipher(None))
    assert b"the secret is" in path.read_bytes()
    write(path, segment, PieceCipher(KEY))
    stored = path.read_bytes()
    assert b"the secret is" not in stored
    assert segment.token_bytes(0, 8) not in stored


def test_no_two_files_are_encrypted_alike(path, segment):
    cipher = PieceCipher(KEY)
    write(path, segment, cipher)
    first = path.read_bytes()
    write(path, segment, cipher)
    assert first[-1000:] != path.read_bytes()[-1000:]


@pytest.mark.parametrize("piece_nbytes", [2**20, 1000])
def test_every_cut_is_noticed(path, segment, layout, kit, cipher, piece_nbytes):
    write(path, segment, cipher, piece_nbytes=piece_nbytes)
    whole = path.read_bytes()
    for length in (0, 5, 11, 12, 40, 200, len(whole) // 2, len(whole) - 17, len(whole) - 16, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(BadHibernation):
            read(path, layout, kit, cipher)
    path.write_bytes(whole + b"\0")
    with pytest.raises(BadHibernation, match="goes on"):
        read(path, layout, kit, cipher)


def test_every_flipped_bit_is_noticed(path, segment, layout, kit, cipher):
    write(path, segment, cipher)
    whole = path.read_bytes()
    places = [*range(0, 200), *range(200, len(whole), 997), len(whole) - 1]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(BadHibernation):
            read(path, layout, kit, cipher)


def test_pieces_cannot_change_places(path, segment, layout, kit, cipher):
    write(path, segment, cipher, piece_nbytes=1024)
    whole = bytearray(path.read_bytes())
    first = len(whole) - 5 * 1040
    whole[first : first + 1040], whole[first + 1040 : first + 2080] = (
        whole[first + 1040 : first + 2080],
        whole[first : first + 1040],
    )
    path.write_bytes(whole)
    with pytest.raises(BadHibernation, match="piece"):
        read(path, layout, kit, cipher)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"digest": "b" * 32}, "another session"),
        ({"mark": Mark(13, 3)}, "stale"),
        ({"mark": Mark(12, 4)}, "stale"),
        ({"fingerprint": "model-2"}, "another model"),
    ],
)
def test_what_is_foreign_or_stale_is_refused(path, segment, layout, kit, cipher, change, what):
    write(path, segment, cipher)
    with pytest.raises(BadHibernation, match=what):
        read(path, layout, kit, cipher, **change)


@pytest.mark.parametrize(
    ("written_with", "read_with", "what"),
    [(None, KEY, "not encrypted"), (KEY, None, "it is encrypted"), (KEY, bytes(32), "key is another")],
)
def test_another_key_is_refused(path, segment, layout, kit, written_with, read_with, what):
    write(path, segment, PieceCipher(written_with))
    with pytest.raises(BadHibernation, match=what):
        read(path, layout, kit, PieceCipher(read_with))


@pytest.mark.parametrize("start", [b"", b"SQLite format 3\0" * 9, b"phiKVhib\xff\xff\xff\xff" + b"x" * 99])
def test_other_files_are_refused(path, start):
    path.write_bytes(start)
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(BadHibernation):
        read_header(io.FileIO(fd, closefd=False))
    os.close(fd)
