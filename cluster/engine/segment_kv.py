"""A session's KV segment as the engine sees it: lengths, ids, and a KV cache to compute on (implements SequenceKV).

Owns: the mapping for the length of one sequence, and the writer's mark in the header. Knows nothing of sessions,
Ray or scheduling.
"""

from __future__ import annotations

import errno

import torch

from phi_cluster.cluster.messages import SegmentRef, SharedRows
from phi_cluster.cluster.processes import process_id
from phi_cluster.cluster.session.segment import Segment, SegmentGone, SegmentMismatch
from phi_cluster.cluster.session.segment_layout import SegmentLayout
from phi_cluster.cluster.session.shared_rows import fill_rows, see_rows
from phi_cluster.model.kv_cache import KVCache


class SegmentKV:
    """Keys and values lie in the segment itself, shared with whoever maps it."""

    # What maps the memory: tests record its stores.
    _segment_class = Segment

    def __init__(
        self,
        ref: SegmentRef,
        layout: SegmentLayout,
        fingerprint: str,
        dtype: torch.dtype,
        epoch: int,
        shared: SharedRows | None = None,
    ):
        """`shared`: where the first of its keys and values lie, if not here. Raises SegmentGone or SegmentMismatch,
        also if the segment has been lent to a later turn than `epoch`."""
        self._segment = self._segment_class.open(ref, layout, fingerprint)
        self._me = process_id()
        if self._segment.epoch == epoch:
            self._segment.writer = self._me
            # Who takes a session over raises the epoch, then looks for a writer: one of us two sees the other.
            if self._segment.epoch != epoch:
                self._leave()
        if self._segment.epoch != epoch:
            self._segment.close()
            raise SegmentMismatch("the segment has been lent to a later turn")
        self._lender: Segment | None = None
        self._shared = shared
        if shared is not None:
            try:
                self._lender = self._lender_of(shared, layout, fingerprint)
                see_rows(self._segment, self._lender, shared)
            except BaseException:
                self._leave()
                self._segment.close()
                if self._lender is not None:
                    self._lender.close()
                raise
        self.cache: KVCache | None = KVCache(layout.kv, dtype, self._segment.kv_buffer)
        self._closed = False
        self.bytes_per_token = layout.kv.bytes_per_token

    def _lender_of(self, shared: SharedRows, layout: SegmentLayout, fingerprint: str) -> Segment:
        try:
            return self._segment_class.open(shared.segment, layout, fingerprint)
        except SegmentMismatch as error:
            # Of the lender there is nothing to be had: not what is wrong with the segment itself.
            raise SegmentGone(errno.ESTALE, str(error)) from None

    def _leave(self) -> None:
        if self._segment.writer == self._me:
            self._segment.writer = None

    @property
    def num_tokens(self) -> int:
        return self._segment.num_tokens

    @property
    def num_computed_tokens(self) -> int:
        return self._segment.num_computed_tokens

    @property
    def long_rope(self) -> bool:
        return self._segment.long_rope

    @long_rope.setter
    def long_rope(self, value: bool) -> None:
        self._segment.long_rope = value

    @property
    def num_lasting_tokens(self) -> int:
        return self._segment.num_lasting_tokens

    def fill_shared(self) -> None:
        """The segment has its ids: what lies elsewhere of its keys and values counts. Raises SegmentGone."""
        if self._lender is not None and self._shared is not None:
            fill_rows(self._segment, self._lender, self._shared)
            # Its pages stay mapped.
            self._lender.close()
            self._lender = None

    def token_ids(self) -> list[int]:
        return self._segment.token_ids()

    def trim(self, num_tokens: int) -> None:
        self._segment.trim(num_tokens)

    def append_tokens(self, token_ids: list[int]) -> None:
        self._segment.append_tokens(token_ids)

    def set_computed(self, num_tokens: int) -> None:
        self._segment.set_num_computed_tokens(num_tokens)

    def clear(self) -> None:
        self._segment.drop_kv()

    def close(self) -> None:
        """After this nothing writes into the segment any more: the views are gone before the mapping is."""
        self.cache = None
        if not self._closed:
            self._closed = True
            self._leave()
        self._segment.close()
        if self._lender is not None:
            self._lender.close()


def splice(kv: SegmentKV, num_kept_tokens: int, token_ids: list[int]) -> list[int]:
    """Makes the segment hold its first `num_kept_tokens` ids and then `token_ids`; returns all of them.

    Where stored ids go on agreeing with the new ones, they stay, with their keys and values. Raises ValueError, and
    SegmentGone if keys and values that should lie elsewhere are of other ids.
    """
    stored = kv.token_ids()
    if not 0 <= num_kept_tokens <= len(stored):
        raise ValueError(f"{num_kept_tokens} tokens are to be kept, the segment holds {len(stored)}")
    agreeing = count_agreeing(stored[num_kept_tokens:], token_ids)
    kv.trim(num_kept_tokens + agreeing)
    kv.append_tokens(token_ids[agreeing:])
    kv.fill_shared()
    return stored[:num_kept_tokens] + token_ids


def count_agreeing(some: list[int], others: list[int]) -> int:
    """Length of the common beginning."""
    for i, (one, other) in enumerate(zip(some, others, strict=False)):
        if one != other:
            return i
    return min(len(some), len(others))
