"""A prompt's keys and values in one segment, used by the sequences of others: several replies, one prompt.

Owns: what of a borrowing segment lies where, and when its lender may be believed. Knows nothing of replies, engines or
leases.

Whole pages of the prompt are mapped from the lender's file, to be read only; of the pages that the prompt fills in part
the borrower has copies. The lender's rows are pinned in its header: whoever writes in its turn cannot give them back,
nor compute them in another rotary regime, and its turn does not end before the borrowers let go (shared_prompt.py).
"""

from __future__ import annotations

import errno

from phi_cluster.cluster.messages import SharedRows
from phi_cluster.cluster.session.segment import Segment, SegmentGone


def see_rows(segment: Segment, lender: Segment, rows: SharedRows) -> None:
    """`segment`, which is new or has had these rows before, sees those of them that lie in the lender. What of its own
    is computed behind them counts again. For whoever writes in the turns of both.

    Raises SegmentGone if they are not there (any more), and OSError; `segment` is to be closed then.
    """
    _check(lender, rows)
    if segment.num_shared_tokens not in (0, rows.num_tokens):
        raise SegmentGone(errno.ESTALE, "the segment shares another prompt")
    lender.pin(rows.num_tokens)
    # Whoever lets a later turn begin raises the epoch, and then looks at what there is.
    _check(lender, rows)
    segment.map_shared(lender, rows.num_tokens)


def fill_rows(segment: Segment, lender: Segment, rows: SharedRows) -> None:
    """Once `segment` has the prompt's ids, the rows count as computed. Raises SegmentGone if the lender's ids are
    others."""
    num_tokens = rows.num_tokens
    if segment.num_tokens < num_tokens or segment.token_bytes(0, num_tokens) != lender.token_bytes(0, num_tokens):
        raise SegmentGone(errno.ESTALE, "the prompt that is shared is another one")
    if segment.num_computed_tokens >= num_tokens:
        return
    kv_offset = segment.layout.kv_offset
    for offset, length in segment.layout.kv.partial_page_ranges(num_tokens):
        lender.read_bytes(kv_offset + offset, segment.kv_buffer[offset : offset + length])
    segment.long_rope = lender.long_rope
    segment.set_num_computed_tokens(num_tokens)


def _check(lender: Segment, rows: SharedRows) -> None:
    if lender.epoch != rows.epoch or lender.num_computed_tokens < rows.num_tokens:
        raise SegmentGone(errno.ESTALE, "the prompt that is shared is not there any more")
