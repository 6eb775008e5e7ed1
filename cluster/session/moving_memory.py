"""A session's memory on its way to another node: numbered pieces with checksums, out of a segment (or a hibernated
file) and into a segment.

Owns: what a piece is, and proving that each is of this very move, session, model, layout and state of the journal.
Header and checksums are those of hibernated files (hibernation_file.py), unencrypted: on the wire it is for the network
to keep things secret. Knows nothing of who sends, or of how.
"""

from __future__ import annotations

import os
import pickle
from bisect import bisect_right
from itertools import accumulate
from typing import Any, Protocol

from phi_cluster.cluster.session.hibernation_file import (
    TAG_NBYTES,
    BadHibernation,
    HibernationHeader,
    Mark,
    PieceCipher,
    check_header,
    payload_nbytes,
)
from phi_cluster.cluster.session.segment import Segment

# Two of them are on their way at the same time. Asking for one takes some milliseconds, so they are large; and a small
# session has several all the same.
PIECE_NBYTES = 16 * 2**20
_LEAST_NBYTES = 2**20
_LEAST_PIECES = 8


class Piece:
    """Bytes that Ray puts into its object store as they are, and maps where they arrive, without a copy."""

    def __init__(self, data: Any):
        self.data = memoryview(data)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Piece, (pickle.PickleBuffer(self.data),)


class Payload(Protocol):
    """The used ranges of a segment, joined. Several threads may read."""

    def read_into(self, start: int, into: memoryview) -> None:
        """So many bytes from `start` on. Blocks. Raises BadHibernation and OSError."""
        ...

    def close(self) -> None:
        """Idempotent."""
        ...


class _Ranges:
    """Where the bytes of the joined ranges lie in the segment."""

    def __init__(self, ranges: list[tuple[int, int]]):
        self._ranges = ranges
        self._ends = list(accumulate(length for _, length in ranges))

    def within(self, start: int, count: int) -> list[tuple[int, int]]:
        """(offset, length) of `count` bytes from `start` on, in order."""
        found = []
        place = bisect_right(self._ends, start)
        while count:
            offset, length = self._ranges[place]
            skip = start - (self._ends[place] - length)
            some = min(length - skip, count)
            found.append((offset + skip, some))
            start, count, place = start + some, count - some, place + 1
        return found


class SegmentPayload:
    """Of a segment, which is taken over and whose counts nobody lowers meanwhile (if somebody does, what is read is of
    no use)."""

    def __init__(self, segment: Segment, num_tokens: int, num_computed_tokens: int):
        self.segment = segment
        self._ranges = _Ranges(segment.layout.used_ranges(num_tokens, num_computed_tokens))

    def read_into(self, start: int, into: memoryview) -> None:
        for offset, length in self._ranges.within(start, len(into)):
            self.segment.read_bytes(offset, into[:length])
            into = into[length:]

    def close(self) -> None:
        self.segment.close()


def piece_nbytes(nbytes: int) -> int:
    """The length of the pieces of so many bytes."""
    return min(max(nbytes // _LEAST_PIECES, _LEAST_NBYTES), PIECE_NBYTES)


def segment_header(segment: Segment, num_tokens: int, digest: str, mark: Mark) -> HibernationHeader:
    """For a segment's first `num_tokens` tokens, which all have keys and values."""
    nbytes = sum(length for _, length in segment.layout.used_ranges(num_tokens, num_tokens))
    return HibernationHeader(
        digest=digest,
        identity=segment.identity,
        mark=mark,
        num_tokens=num_tokens,
        num_computed_tokens=num_tokens,
        long_rope=segment.long_rope,
        is_encrypted=False,
        nonce=os.urandom(8),
        piece_nbytes=piece_nbytes(nbytes),
    )


class OutgoingMemory:
    """Pieces of a payload of `nbytes`. Attributes: `packed`, the header that they belong to; `num_pieces`."""

    def __init__(self, payload: Payload, header: HibernationHeader, nbytes: int):
        self._payload = payload
        self._header = header
        self._nbytes = nbytes
        self._cipher = PieceCipher(None)
        self.packed = header.pack()
        self.num_pieces = -(-nbytes // header.piece_nbytes)

    def piece(self, number: int) -> bytearray:
        """A piece and its checksum. Blocks; may be called by several threads. Raises IndexError, BadHibernation and
        OSError."""
        if not 0 <= number < self.num_pieces:
            raise IndexError(f"no piece {number} of {self.num_pieces}")
        start = number * self._header.piece_nbytes
        length = min(self._header.piece_nbytes, self._nbytes - start)
        sealed = bytearray(length + TAG_NBYTES)
        piece = memoryview(sealed)[:length]
        self._payload.read_into(start, piece)
        sealed[length:] = self._cipher.seal(self.packed, self._header.nonce, number, piece)[1]
        return sealed

    def close(self) -> None:
        self._payload.close()


class IncomingMemory:
    """Fills a new segment with the pieces of the header `packed`, in any order and by several threads. Raises
    BadHibernation if it is not about this session, model and layout."""

    def __init__(self, packed: bytes, segment: Segment, digest: str):
        self.header = HibernationHeader.unpack(packed)
        check_header(self.header, segment.layout, segment.identity, digest)
        if self.header.is_encrypted:
            raise BadHibernation("it is encrypted")
        self._packed = packed
        self._segment = segment
        self._cipher = PieceCipher(None)
        self.nbytes = payload_nbytes(segment.layout, self.header)
        self.num_pieces = -(-self.nbytes // self.header.piece_nbytes)
        counts = (self.header.num_tokens, self.header.num_computed_tokens)
        self._ranges = _Ranges(segment.layout.used_ranges(*counts))
        self._missing = set(range(self.num_pieces))

    def write(self, number: int, sealed: memoryview) -> None:
        """Blocks. Raises BadHibernation and OSError: the segment must be thrown away then."""
        start = number * self.header.piece_nbytes
        length = min(self.header.piece_nbytes, self.nbytes - start)
        if not 0 <= number < self.num_pieces or len(sealed) != length + TAG_NBYTES:
            raise BadHibernation(f"piece {number} has another length")
        piece = self._cipher.open(self._packed, self.header.nonce, number, sealed)
        for offset, count in self._ranges.within(start, length):
            self._segment.write_bytes(offset, piece[:count])
            piece = piece[count:]
        self._missing.discard(number)

    def finish(self) -> None:
        """All has come: the segment's counts say so. Raises BadHibernation if something has not."""
        if self._missing:
            raise BadHibernation(f"{len(self._missing)} pieces are missing")
        header = self.header
        self._segment.set_counts(header.num_tokens, header.num_computed_tokens, long_rope=header.long_rope)
