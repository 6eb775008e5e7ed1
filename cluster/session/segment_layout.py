"""Where header, token ids, keys and values lie in a session's KV segment, and how much memory they take.

Owns: offsets and sizes of the parts. Knows nothing of the bytes in them; the KV area's inside is
`model/kv_layout.py`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from phi_cluster.cluster.session.memfd import PAGE_NBYTES
from phi_cluster.model.kv_layout import KVCacheLayout

# Token ids are int32.
ID_NBYTES = 4


@dataclass(frozen=True)
class SegmentLayout:
    """Where things lie in the file. Sizes and offsets in bytes; everything starts on a page."""

    kv: KVCacheLayout

    @property
    def max_model_len(self) -> int:
        return self.kv.max_model_len

    @property
    def ids_offset(self) -> int:
        return PAGE_NBYTES

    @property
    def ids_nbytes(self) -> int:
        return page_ceil(self.max_model_len * ID_NBYTES)

    @property
    def kv_offset(self) -> int:
        return self.ids_offset + self.ids_nbytes

    @cached_property
    def nbytes(self) -> int:
        """Size of the file: virtual, pages exist once written."""
        return self.kv_offset + self.kv.nbytes

    def nbytes_used(self, num_tokens: int, num_computed_tokens: int | None = None) -> int:
        """Memory (whole pages) of a segment that holds `num_tokens` tokens, all of them computed unless told otherwise:
        what a lease must cover."""
        num_computed = num_tokens if num_computed_tokens is None else num_computed_tokens
        return PAGE_NBYTES + page_ceil(num_tokens * ID_NBYTES) + self.kv.nbytes_used(num_computed)

    def nbytes_shared(self, num_tokens: int) -> int:
        """What a segment does not hold itself whose first `num_tokens` tokens have their keys and values in another one
        (see shared_rows.py): the whole pages of these."""
        return sum(length for _, length in self.kv.whole_page_ranges(num_tokens))

    def used_ranges(self, num_tokens: int, num_computed_tokens: int) -> list[tuple[int, int]]:
        """(offset, length) of exactly the bytes of so many ids, and of the keys and values of so many tokens."""
        ids = [(self.ids_offset, num_tokens * ID_NBYTES)] if num_tokens else []
        kv = self.kv.used_ranges(num_computed_tokens)
        return ids + [(self.kv_offset + offset, length) for offset, length in kv]

    def identity(self, fingerprint: str) -> bytes:
        """32 bytes that two segments share only if model and layout are the same."""
        kv = self.kv
        shape = (kv.num_layers, kv.num_kv_heads, kv.head_dim, kv.max_model_len, kv.itemsize, kv.scale_nbytes)
        return hashlib.blake2b(repr((shape, fingerprint)).encode(), digest_size=32).digest()


def page_ceil(nbytes: int) -> int:
    """`nbytes` rounded up to whole pages."""
    return -(-nbytes // PAGE_NBYTES) * PAGE_NBYTES
