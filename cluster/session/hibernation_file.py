"""The file of a hibernated session: the used part of its KV segment, checked or encrypted piece by piece.

Owns: the format, and proving that what is read is what was written, for this session, model and layout. Knows nothing
of where files lie, of journals, or of when a session sleeps.

Format, version 1: 8 bytes magic, 4 bytes length of the header (little-endian), the header (msgpack), then pieces of one
length (the last one shorter), each followed by 16 bytes. The pieces are the segment's used ranges, in order,
without gaps. Without a key, the 16 bytes are BLAKE2b over the piece, keyed with the header's hash and the piece's
number; with one, pieces are AES-256-GCM with the header as associated data, and the 16 bytes are its tag. So a changed
header, a piece of another file and a piece at another place are all noticed. Where files come from strangers the
header's hash is keyed too, with a secret: then nobody else can make one. Ids and text are never in the header.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any, Protocol

import msgpack

from phi_cluster.cluster.session.segment import Segment
from phi_cluster.cluster.session.segment_layout import SegmentLayout

MAGIC = b"phiKVhib"
VERSION = 1
PIECE_NBYTES = 2**20
MAX_PIECE_NBYTES = 2**24
TAG_NBYTES = 16
_HEADER_LENGTH = struct.Struct("<I")
# What stands in front of the header.
START_NBYTES = len(MAGIC) + _HEADER_LENGTH.size
# Far beyond any that is written.
_MAX_HEADER_NBYTES = 4096


class BinaryFile(Protocol):
    """Unbuffered, or in memory: `io.FileIO` or `io.BytesIO`. Both may do less than they are asked for."""

    def readinto(self, buffer: memoryview, /) -> int | None: ...

    def write(self, data: memoryview, /) -> int | None: ...


class BadHibernation(ValueError):
    """The file is not what it should be: torn, damaged, foreign, or of another key. What it holds is computed anew."""


@dataclass(frozen=True)
class Mark:
    """Which state of the journal the memory belongs to: if a turn has begun since, it is stale."""

    epoch: int
    turns: int


@dataclass(frozen=True)
class HibernationHeader:
    """`identity` is the segment's (model, dtype and layout); `nonce` 8 random bytes that no two files share."""

    digest: str
    identity: bytes
    mark: Mark
    num_tokens: int
    num_computed_tokens: int
    long_rope: bool
    is_encrypted: bool
    nonce: bytes
    piece_nbytes: int

    def pack(self) -> bytes:
        values = (*astuple(self)[:2], self.mark.epoch, self.mark.turns, *astuple(self)[3:])
        return bytes(msgpack.packb((VERSION, *values)))

    @classmethod
    def unpack(cls, packed: bytes) -> HibernationHeader:
        """Raises BadHibernation."""
        try:
            version, digest, identity, epoch, turns, *rest = msgpack.unpackb(packed)
            if version != VERSION:
                raise BadHibernation(f"the file has version {version}, this program {VERSION}")
            header = cls(digest, identity, Mark(epoch, turns), *rest)
        except BadHibernation:
            raise
        except Exception:
            raise BadHibernation("the header cannot be read") from None
        kinds = (str, bytes, Mark, int, int, bool, bool, bytes, int)
        values = [getattr(header, name) for name in cls.__dataclass_fields__]
        if any(type(value) is not kind for value, kind in zip(values, kinds, strict=True)):
            raise BadHibernation("the header holds something else")
        return header


class PieceCipher:
    """What stands behind each piece, and, with a `key` of 32 bytes, the encryption of the piece itself. `secret`, at
    most 64 bytes: who does not know it makes no checksum that is right.

    Raises ImportError if there is a key and no `cryptography` package.
    """

    def __init__(self, key: bytes | None, secret: bytes = b""):
        self._secret = secret
        self._aes: Any = None
        if key is not None:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM

            self._aes = AESGCM(key)

    @property
    def is_encrypted(self) -> bool:
        return self._aes is not None

    def seal(self, header: bytes, nonce: bytes, number: int, piece: memoryview) -> tuple[Any, bytes]:
        """The bytes to write for a piece, and its tag."""
        if self._aes is None:
            return piece, self._checksum(header, number, piece)
        sealed = self._aes.encrypt(nonce + number.to_bytes(4, "big"), piece, header)
        return memoryview(sealed)[:-TAG_NBYTES], sealed[-TAG_NBYTES:]

    def open(self, header: bytes, nonce: bytes, number: int, sealed: memoryview) -> Any:
        """The piece. Raises BadHibernation."""
        if self._aes is not None:
            try:
                return self._aes.decrypt(nonce + number.to_bytes(4, "big"), sealed, header)
            except Exception:
                # InvalidTag, which says nothing more.
                raise BadHibernation(f"piece {number} is damaged, or the key is another") from None
        piece = sealed[:-TAG_NBYTES]
        if not hmac.compare_digest(self._checksum(header, number, piece), sealed[-TAG_NBYTES:]):
            raise BadHibernation(f"piece {number} is damaged")
        return piece

    def _checksum(self, header: bytes, number: int, piece: memoryview) -> bytes:
        key = hashlib.blake2b(header, digest_size=32, key=self._secret).digest()
        person = number.to_bytes(16, "big")
        return hashlib.blake2b(piece, digest_size=TAG_NBYTES, key=key, person=person).digest()


def payload_nbytes(layout: SegmentLayout, header: HibernationHeader) -> int:
    """The used ranges of a segment, joined."""
    return sum(length for _, length in layout.used_ranges(header.num_tokens, header.num_computed_tokens))


def check_header(header: HibernationHeader, layout: SegmentLayout, identity: bytes, digest: str) -> None:
    """Whether what it is about is this session's, and can be. Raises BadHibernation."""
    if header.digest != digest:
        raise BadHibernation("it belongs to another session")
    if header.identity != identity:
        raise BadHibernation("it belongs to another model or layout")
    if not 0 <= header.num_computed_tokens <= header.num_tokens <= layout.max_model_len:
        raise BadHibernation("its numbers of tokens cannot be")
    if not 1 <= header.piece_nbytes <= MAX_PIECE_NBYTES:
        raise BadHibernation("its pieces cannot be")


def check_kept(header: HibernationHeader, mark: Mark, cipher: PieceCipher) -> None:
    """Whether it is of this state of the journal, and can be read. Raises BadHibernation."""
    if header.mark != mark:
        raise BadHibernation("it is stale: the conversation has gone on")
    if header.is_encrypted != cipher.is_encrypted:
        raise BadHibernation("it is encrypted" if header.is_encrypted else "it is not encrypted")


def file_nbytes(segment: Segment, num_tokens: int, num_computed_tokens: int | None = None) -> int:
    """About how long a file of so many of the segment's tokens is (its header taken for the longest)."""
    num_computed = _num_computed(segment, num_tokens, num_computed_tokens)
    payload = sum(length for _, length in segment.layout.used_ranges(num_tokens, num_computed))
    return _MAX_HEADER_NBYTES + payload + (payload // PIECE_NBYTES + 1) * TAG_NBYTES


def write_file(
    file: BinaryFile,
    segment: Segment,
    num_tokens: int,
    digest: str,
    mark: Mark,
    cipher: PieceCipher,
    piece_nbytes: int = PIECE_NBYTES,
    num_computed_tokens: int | None = None,
) -> int:
    """Write the segment's first `num_tokens` tokens, and keys and values of the first `num_computed_tokens` of them
    (None: of all that have some); returns how many bytes. Nobody may write to the segment meanwhile. Not synced. Raises
    OSError."""
    header = HibernationHeader(
        digest=digest,
        identity=segment.identity,
        mark=mark,
        num_tokens=num_tokens,
        num_computed_tokens=_num_computed(segment, num_tokens, num_computed_tokens),
        long_rope=segment.long_rope,
        is_encrypted=cipher.is_encrypted,
        nonce=os.urandom(8),
        piece_nbytes=piece_nbytes,
    )
    packed = header.pack()
    written = _write(file, memoryview(MAGIC + _HEADER_LENGTH.pack(len(packed)) + packed))
    buffer = memoryview(bytearray(piece_nbytes))
    for number, piece in enumerate(_pieces(segment, header, buffer)):
        sealed, tag = cipher.seal(packed, header.nonce, number, piece)
        written += _write(file, sealed) + _write(file, memoryview(tag))
    return written


def read_header(file: BinaryFile) -> tuple[HibernationHeader, bytes]:
    """The header, checked as far as it can be by itself, and its bytes. Raises BadHibernation and OSError."""
    start = _read(file, START_NBYTES)
    if start[: len(MAGIC)] != MAGIC:
        raise BadHibernation("it is another kind of file")
    (length,) = _HEADER_LENGTH.unpack_from(start, len(MAGIC))
    if length > _MAX_HEADER_NBYTES:
        raise BadHibernation("the header is too long")
    packed = bytes(_read(file, length))
    return HibernationHeader.unpack(packed), packed


def read_file(file: BinaryFile, segment: Segment, digest: str, mark: Mark, cipher: PieceCipher) -> None:
    """Fill a new segment from the file. Raises BadHibernation and OSError: the segment must be thrown away then."""
    header, packed = read_header(file)
    check_header(header, segment.layout, segment.identity, digest)
    check_kept(header, mark, cipher)
    ranges = segment.layout.used_ranges(header.num_tokens, header.num_computed_tokens)
    total = sum(length for _, length in ranges)
    number = 0
    pending = iter(ranges)
    offset = left = 0
    while total:
        piece_nbytes = min(header.piece_nbytes, total)
        piece = memoryview(cipher.open(packed, header.nonce, number, _read(file, piece_nbytes + TAG_NBYTES)))
        number, total = number + 1, total - piece_nbytes
        while len(piece):
            if not left:
                offset, left = next(pending)
            count = min(left, len(piece))
            segment.write_bytes(offset, piece[:count])
            offset, left, piece = offset + count, left - count, piece[count:]
    if file.readinto(memoryview(bytearray(1))):
        raise BadHibernation("it goes on behind its end")
    segment.set_counts(header.num_tokens, header.num_computed_tokens, long_rope=header.long_rope)


def _pieces(segment: Segment, header: HibernationHeader, buffer: memoryview) -> Iterator[memoryview]:
    """The used ranges, joined, in pieces that are good until the next one."""
    filled = 0
    for offset, length in segment.layout.used_ranges(header.num_tokens, header.num_computed_tokens):
        while length:
            count = min(length, len(buffer) - filled)
            segment.read_bytes(offset, buffer[filled : filled + count])
            filled, offset, length = filled + count, offset + count, length - count
            if filled == len(buffer):
                yield buffer
                filled = 0
    if filled:
        yield buffer[:filled]


def _num_computed(segment: Segment, num_tokens: int, wanted: int | None) -> int:
    most = min(num_tokens, segment.num_computed_tokens)
    return most if wanted is None else min(wanted, most)


def _write(file: BinaryFile, data: memoryview) -> int:
    total = len(data)
    while len(data):
        data = data[file.write(data) or 0 :]
    return total


def _read(file: BinaryFile, nbytes: int) -> memoryview:
    """Exactly so many bytes. Raises BadHibernation at the file's end."""
    buffer = memoryview(bytearray(nbytes))
    filled = 0
    while filled < nbytes:
        count = file.readinto(buffer[filled:])
        if not count:
            raise BadHibernation("it ends too early")
        filled += count
    return buffer
