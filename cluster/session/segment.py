"""A session's KV segment: header, token ids, keys and values in one shared memory file, mapped by whoever
works on it.

Owns: the bytes before the keys and values, the order of writing, and giving pages back. Knows nothing of
networks, turns, journals or who is allowed to write; never imports torch.

Layout: a header page, then int32 token ids `[max_model_len]` rounded up to pages, then the KV area of
`model/kv_layout.py`. Header fields are aligned native 8-byte integers, each written by one store.

Order of writing, so that a writer may die between any two stores: KV rows, `num_computed_tokens`, token ids,
`num_tokens`; lowering goes the other way round, pages last. So `num_computed_tokens <= num_tokens` always
holds and both only ever count what is complete. (A reader in another process learns of a change by a message,
which orders memory; a native writer on a weakly ordered CPU must use release stores.)

Only whoever holds the session's turn may write; nothing here can check that.
"""

from __future__ import annotations

import mmap
import os
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from phi_cluster.cluster.messages import ProcessId, SegmentRef
from phi_cluster.cluster.session import memfd
from phi_cluster.cluster.session.memfd import SegmentGone, SegmentMismatch
from phi_cluster.cluster.session.segment_layout import ID_NBYTES, SegmentLayout, page_ceil

__all__ = ["Segment", "SegmentGone", "SegmentLayout", "SegmentMismatch", "SegmentStat", "peek"]

MAGIC = b"phiKVseg"
VERSION = 4

# Offsets in the header: magic 8, version 8, nonce 16, identity 32, then the fields.
_HEAD = struct.Struct("=8sq16s32s")
_IDENTITY_OFFSET = 32
FIELDS_OFFSET = 64
_EPOCH, _FLAGS, _SEED, _NUM_COMPUTED_TOKENS, _NUM_TOKENS, _WRITER_PID, _WRITER_START_TICKS = range(7)
_COMMITTER_PID, _COMMITTER_START_TICKS, _REQUEST, _, _CLAIM, _, _LOWERINGS, _PINNED, _SHARED = range(7, 16)
_FIELDS = struct.Struct("=16q")
_NAME = struct.Struct("=2q")
_FLAG_LONG_ROPE = 1
_FLAG_SEED = 2


@dataclass(frozen=True)
class SegmentStat:
    """A segment's counters, read without mapping it."""

    epoch: int
    long_rope: bool
    num_computed_tokens: int
    num_tokens: int
    nbytes_resident: int


class Segment:
    """One mapping of a session's memory. `create` makes the memory; `open` maps what another process holds.

    Each has a descriptor of its own, so `ref` of either can be opened by others, and the memory lives until
    the last descriptor and mapping are gone.

    Attributes: `layout`; `nonce`, 16 random bytes that name this memory; `kv_buffer`, the KV area as a
    writable memoryview of bytes (build tensors on it, never on a copy).
    """

    # Not ours to close before `__init__` is through.
    _fd = -1
    # Whether the rows are mapped that lie in another segment.
    _sees_shared_rows = False

    def __init__(self, fd: int, layout: SegmentLayout, nonce: bytes):
        """Takes `fd` over unless it raises. Use `create` or `open`."""
        self.layout = layout
        self.nonce = nonce
        mapping = mmap.mmap(fd, layout.nbytes)
        # A crash of any process that maps a conversation must not write it to disk.
        mapping.madvise(mmap.MADV_DONTDUMP)
        view = memoryview(mapping)
        self._fields = view[FIELDS_OFFSET : FIELDS_OFFSET + _FIELDS.size].cast("q")
        self._ids = view[layout.ids_offset : layout.ids_offset + layout.max_model_len * ID_NBYTES].cast("i")
        self.kv_buffer = view[layout.kv_offset :]
        self._view = view
        self._mapping = mapping
        self._fd = fd

    @classmethod
    def create(cls, layout: SegmentLayout, fingerprint: str) -> Segment:
        """New, empty memory: one page. Raises OSError if the kernel refuses."""
        fd = memfd.create("phi-kv", layout.nbytes)
        try:
            nonce = os.urandom(16)
            os.pwrite(fd, _HEAD.pack(MAGIC, VERSION, nonce, layout.identity(fingerprint)), 0)
            return cls(fd, layout, nonce)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def open(cls, ref: SegmentRef, layout: SegmentLayout, fingerprint: str) -> Segment:
        """Map the memory that `ref` names. Raises SegmentGone (OSError) if it is not to be had any more and
        SegmentMismatch (ValueError) if anything else is found there."""
        fd = memfd.open_foreign(ref.pid, ref.fd, writable=True)
        try:
            identity, _ = _read_header(fd, ref.nonce)
            if identity != layout.identity(fingerprint):
                raise SegmentMismatch("the KV segment belongs to another model or layout")
            if os.fstat(fd).st_size != layout.nbytes:
                raise SegmentMismatch("the KV segment has another size")
            return cls(fd, layout, ref.nonce)
        except BaseException:
            os.close(fd)
            raise

    @property
    def ref(self) -> SegmentRef:
        """How another process of this user opens this memory, for as long as this object is open."""
        if self._fd < 0:
            raise ValueError("the KV segment is closed")
        return SegmentRef(os.getpid(), self._fd, self.nonce)

    @property
    def identity(self) -> bytes:
        """32 bytes that only segments of the same model and layout share."""
        return os.pread(self._fd, 32, _IDENTITY_OFFSET)

    @property
    def nbytes_resident(self) -> int:
        """Bytes of memory that the session's segment has, exactly (`st_blocks * 512`)."""
        return memfd.nbytes_resident(self._fd)

    # Header fields.

    @property
    def num_tokens(self) -> int:
        return self._fields[_NUM_TOKENS]

    @property
    def num_computed_tokens(self) -> int:
        """How many tokens, from the first, have their keys and values stored: none, if some of these lie in another
        segment that this object does not see."""
        if self._fields[_SHARED] and not self._sees_shared_rows:
            return 0
        return self._fields[_NUM_COMPUTED_TOKENS]

    @property
    def num_shared_tokens(self) -> int:
        """The keys and values of so many tokens, from the first, lie in another segment (see shared_rows.py)."""
        return self._fields[_SHARED]

    @property
    def num_pinned_tokens(self) -> int:
        """Those of so many tokens are used by other segments: they stay until the turn ends."""
        return self._fields[_PINNED]

    @property
    def num_lasting_tokens(self) -> int:
        """Those of so many tokens can neither be given back nor be written: they are shared, either way."""
        return max(self._fields[_PINNED], self._fields[_SHARED])

    @property
    def epoch(self) -> int:
        """The epoch of the turn that last borrowed the segment (to look at; commits are checked in the
        journal)."""
        return self._fields[_EPOCH]

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._fields[_EPOCH] = value

    @property
    def long_rope(self) -> bool:
        """Which rotary regime the stored keys were computed with."""
        return bool(self._fields[_FLAGS] & _FLAG_LONG_ROPE)

    @long_rope.setter
    def long_rope(self, value: bool) -> None:
        if value != self.long_rope:
            # Keys of one regime are wrong in the other: nothing counts as computed from here on.
            self._lower(0)
            self._fields[_FLAGS] ^= _FLAG_LONG_ROPE

    @property
    def seed(self) -> int | None:
        """The sampling seed of the turn, a signed 64-bit number."""
        return self._fields[_SEED] if self._fields[_FLAGS] & _FLAG_SEED else None

    @seed.setter
    def seed(self, value: int | None) -> None:
        if value is None:
            self._fields[_FLAGS] &= ~_FLAG_SEED
        else:
            self._fields[_SEED] = value
            self._fields[_FLAGS] |= _FLAG_SEED

    @property
    def writer(self) -> ProcessId | None:
        """The process that borrows the segment now, as it entered itself: while it lives, nobody else may."""
        return self._process(_WRITER_PID, _WRITER_START_TICKS)

    @writer.setter
    def writer(self, value: ProcessId | None) -> None:
        self._set_process(_WRITER_PID, _WRITER_START_TICKS, value)

    @property
    def committer(self) -> ProcessId | None:
        """Whoever will commit the turn that is under way (of `epoch`): a session's successor learns of it here."""
        return self._process(_COMMITTER_PID, _COMMITTER_START_TICKS)

    @committer.setter
    def committer(self, value: ProcessId | None) -> None:
        self._set_process(_COMMITTER_PID, _COMMITTER_START_TICKS, value)

    @property
    def request(self) -> bytes | None:
        """16 bytes that name the request whose turn is under way, or was and ended without a word."""
        return self._name(_REQUEST)

    @request.setter
    def request(self, value: bytes | None) -> None:
        self._set_name(_REQUEST, value)

    @property
    def claim(self) -> bytes | None:
        """16 bytes that name the attempt with which that turn began."""
        return self._name(_CLAIM)

    @claim.setter
    def claim(self, value: bytes | None) -> None:
        self._set_name(_CLAIM, value)

    def _name(self, field: int) -> bytes | None:
        value = _NAME.pack(self._fields[field], self._fields[field + 1])
        return value if any(value) else None

    def _set_name(self, field: int, value: bytes | None) -> None:
        self._fields[field], self._fields[field + 1] = _NAME.unpack(value or bytes(_NAME.size))

    def _process(self, pid_field: int, ticks_field: int) -> ProcessId | None:
        pid = self._fields[pid_field]
        return ProcessId(pid, self._fields[ticks_field]) if pid else None

    def _set_process(self, pid_field: int, ticks_field: int, value: ProcessId | None) -> None:
        if value is not None:
            self._fields[ticks_field] = value.start_ticks
        self._fields[pid_field] = 0 if value is None else value.pid

    # Tokens.

    def token_ids(self, start: int = 0, stop: int | None = None) -> list[int]:
        """Stored ids of positions [start, stop), at most `num_tokens`."""
        return self._slice(start, stop).tolist()

    def token_bytes(self, start: int = 0, stop: int | None = None) -> bytes:
        """The same as little-endian int32 bytes."""
        return self._slice(start, stop).tobytes()

    def append_tokens(self, token_ids: Sequence[int]) -> None:
        """Store ids behind the last. Raises ValueError if they do not fit, OverflowError beyond int32."""
        start = self.num_tokens
        stop = start + len(token_ids)
        if stop > self.layout.max_model_len:
            raise ValueError(f"{stop} tokens do not fit into a segment of {self.layout.max_model_len}")
        if not isinstance(token_ids, array) or token_ids.typecode != "i":
            token_ids = array("i", token_ids)
        self._ids[start:stop] = token_ids
        self._fields[_NUM_TOKENS] = stop

    def set_num_computed_tokens(self, num_tokens: int) -> None:
        """Keys and values of the first `num_tokens` tokens are stored now. Raises ValueError beyond
        `num_tokens`."""
        if not 0 <= num_tokens <= self.num_tokens:
            raise ValueError(f"{num_tokens} computed tokens, {self.num_tokens} are stored")
        self._check_shared(num_tokens)
        self._fields[_NUM_COMPUTED_TOKENS] = num_tokens

    def count_matching(self, token_ids: array[int]) -> int:
        """How many stored ids, from the first, equal the given int32 ids."""
        low, high = 0, min(self.num_tokens, len(token_ids))
        if self._ids[:high].tobytes() == token_ids[:high].tobytes():
            return high
        while high - low > 1:
            middle = (low + high) // 2
            if self._ids[low:middle].tobytes() == token_ids[low:middle].tobytes():
                low = middle
            else:
                high = middle
        return low

    def copy_from(self, source: Segment, num_tokens: int) -> None:
        """Hold, as new memory, the first `num_tokens` tokens of another segment of this layout, with as many keys and
        values as it has of them, and its regime. The source may grow meanwhile. Blocks (other threads run on).

        Raises ValueError if there are fewer tokens, this segment holds some, or the source lost some meanwhile (this
        one is empty then), OSError if there is no memory.
        """
        lowerings = source._fields[_LOWERINGS]
        if self.num_tokens or not 0 <= num_tokens <= source.num_tokens:
            raise ValueError(f"cannot copy {num_tokens} of {source.num_tokens} tokens over {self.num_tokens}")
        num_computed, long_rope = min(num_tokens, source.num_computed_tokens), source.long_rope
        for offset, length in self.layout.used_ranges(num_tokens, num_computed):
            # Read, not copied from mapping to mapping: that would hold all other threads up.
            memfd.read_into(source._fd, self._view[offset : offset + length], offset)
        if source._fields[_LOWERINGS] != lowerings:
            # Counted before anything goes: what was read may be from before and after.
            self.trim(0)
            raise ValueError("the source gave tokens back while it was copied")
        self.set_counts(num_tokens, num_computed, long_rope=long_rope)

    def read_bytes(self, offset: int, into: memoryview) -> None:
        """Bytes of the file, for whoever stores it elsewhere. Blocks (other threads run on)."""
        memfd.read_into(self._fd, into, offset)

    def write_bytes(self, offset: int, data: memoryview) -> None:
        """The other way round; they count once `set_counts` says so."""
        memfd.write_from(self._fd, data, offset)

    def set_counts(self, num_tokens: int, num_computed_tokens: int, *, long_rope: bool) -> None:
        """So many tokens have been written with `write_bytes`."""
        self.long_rope = long_rope
        self._fields[_NUM_TOKENS] = num_tokens
        self._fields[_NUM_COMPUTED_TOKENS] = num_computed_tokens

    # Giving memory back.

    def trim(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens and give whole pages behind them back. Raises ValueError if
        there are fewer, or some of the others are shared."""
        if not 0 <= num_tokens <= self.num_tokens:
            raise ValueError(f"cannot trim {self.num_tokens} tokens to {num_tokens}")
        self._lower(min(self.num_computed_tokens, num_tokens))
        self._fields[_NUM_TOKENS] = num_tokens
        layout = self.layout
        used = page_ceil(num_tokens * ID_NBYTES)
        if used < layout.ids_nbytes:
            self._punch(layout.ids_offset + used, layout.ids_nbytes - used)
        for offset, length in layout.kv.tail_ranges(num_tokens):
            self._punch(layout.kv_offset + offset, length)

    def drop_kv(self) -> None:
        """Give all keys and values back but those that are shared, and keep the ids: the others are computed again."""
        kept = self.num_lasting_tokens
        self._lower(min(kept, self.num_computed_tokens))
        for offset, length in self.layout.kv.tail_ranges(kept):
            self._punch(self.layout.kv_offset + offset, length)

    def clear(self) -> None:
        """Forget everything but the nonce: as new, one page, all zeros behind the header."""
        self.trim(0)
        self._fields[_FLAGS] = self._fields[_SEED] = self._fields[_EPOCH] = 0

    def close(self) -> None:
        """Let go; idempotent. The descriptor is closed now. The mapping goes with the last view of it: a
        tensor built on `kv_buffer` stays valid for as long as it lives.

        That is why nothing is unmapped by force here: torch keeps the memoryview but does not lock it, so
        `mmap.close()` would pull the memory away from under a living tensor instead of refusing.
        """
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._fields = self._ids = self._view = self.kv_buffer = memoryview(b"")
            del self._mapping

    def __del__(self) -> None:
        # A holder that was dropped after an error must not keep a conversation's memory.
        self.close()

    # Sharing.

    def pin(self, num_tokens: int) -> None:
        """Other segments use the keys and values of so many tokens: from here on they stay. By whoever writes in the
        turn that is under way, which must not end before they do without."""
        self._fields[_PINNED] = max(self._fields[_PINNED], num_tokens)

    def map_shared(self, source: Segment, num_tokens: int) -> None:
        """The keys and values of the first `num_tokens` tokens lie in another segment of this layout, as far as they
        are whole pages: this object sees them there from now on, to read. Raises OSError; it is to be closed then."""
        for offset, length in self.layout.kv.whole_page_ranges(num_tokens):
            start = self.layout.kv_offset + offset
            memfd.map_over(self._view[start : start + length], source._fd, start)
            # What is mapped anew is dumped again.
            self._mapping.madvise(mmap.MADV_DONTDUMP, start, length)
        self._fields[_SHARED] = num_tokens
        self._sees_shared_rows = True

    def unshare(self) -> None:
        """The turn is over: nobody uses anything of this segment any more, and it has nothing that lies elsewhere."""
        if self._fields[_SHARED]:
            self._fields[_NUM_COMPUTED_TOKENS] = 0
            self._fields[_SHARED] = 0
        if self._fields[_PINNED]:
            self._fields[_PINNED] = 0

    def _check_shared(self, num_computed: int) -> None:
        if num_computed < min(self.num_lasting_tokens, self.num_computed_tokens):
            raise ValueError(f"{self.num_lasting_tokens} computed tokens are shared with other sequences")

    def _lower(self, num_computed: int) -> None:
        """Rows behind so many are about to go: whoever copies them has to see it. Raises ValueError if some of them are
        shared."""
        self._check_shared(num_computed)
        if num_computed < self.num_computed_tokens:
            self._fields[_LOWERINGS] += 1
        self._fields[_NUM_COMPUTED_TOKENS] = num_computed

    def _punch(self, offset: int, length: int) -> None:
        memfd.punch(self._fd, offset, length)

    def _slice(self, start: int, stop: int | None) -> memoryview:
        # Never beyond num_tokens: reading a hole through a shared mapping would allocate its page.
        count = self.num_tokens
        stop = count if stop is None else stop
        if not 0 <= start <= stop <= count:
            raise ValueError(f"no tokens [{start}, {stop}) among {count}")
        return self._ids[start:stop]


def peek(ref: SegmentRef) -> SegmentStat:
    """Counters and memory of the segment that `ref` names, without mapping it. Raises as `Segment.open`
    does."""
    fd = memfd.open_foreign(ref.pid, ref.fd, writable=False)
    try:
        _, fields = _read_header(fd, ref.nonce)
        resident = memfd.nbytes_resident(fd)
    finally:
        os.close(fd)
    return SegmentStat(
        epoch=fields[_EPOCH],
        long_rope=bool(fields[_FLAGS] & _FLAG_LONG_ROPE),
        num_computed_tokens=fields[_NUM_COMPUTED_TOKENS],
        num_tokens=fields[_NUM_TOKENS],
        nbytes_resident=resident,
    )


def _read_header(fd: int, nonce: bytes) -> tuple[bytes, tuple[int, ...]]:
    """Identity and fields, once magic, version and nonce are right. Raises SegmentMismatch."""
    header = os.pread(fd, FIELDS_OFFSET + _FIELDS.size, 0)
    if len(header) != FIELDS_OFFSET + _FIELDS.size or header[: len(MAGIC)] != MAGIC:
        raise SegmentMismatch("the memory file is not a KV segment")
    _, version, stored_nonce, identity = _HEAD.unpack_from(header)
    if version != VERSION:
        raise SegmentMismatch(f"the KV segment has layout version {version}, this program {VERSION}")
    if stored_nonce != nonce:
        raise SegmentMismatch("the descriptor holds another KV segment by now")
    return identity, _FIELDS.unpack_from(header, FIELDS_OFFSET)
