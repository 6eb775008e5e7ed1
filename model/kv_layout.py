"""Where keys and values lie within a session's KV area: arithmetic on offsets, nothing else.

Owns: the layout that the session's memory and the network's views must agree on. Knows nothing of torch, of
who holds the bytes, or of what stands in front of the area.
"""

from __future__ import annotations

from dataclasses import dataclass

from phi_cluster.model.config import Phi3Config

PAGE_NBYTES = 4096


@dataclass(frozen=True)
class KVCacheLayout:
    """Layer after layer, K and then V: each a region of `max_model_len` contiguous rows, one for each token. A
    row is, for each of `num_kv_heads`, a scale of `scale_nbytes` bytes (4: float32; 0: none) and `head_dim` numbers
    of `itemsize` bytes. Each region begins on a page, so that pages beyond a length can be given back.

    Offsets are bytes from the beginning of the KV area, which its owner places on a page.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int
    itemsize: int
    scale_nbytes: int = 0

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim", "max_model_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 1 is expected")
        if self.itemsize not in (1, 2, 4):
            raise ValueError(f"itemsize is {self.itemsize}: 1, 2 or 4 bytes are expected")
        if self.scale_nbytes not in (0, 4):
            raise ValueError(f"scale_nbytes is {self.scale_nbytes}: 0 or 4 bytes are expected")

    @classmethod
    def for_config(cls, config: Phi3Config, max_model_len: int, itemsize: int, scale_nbytes: int = 0) -> KVCacheLayout:
        """The layout for a network's keys and values of `itemsize` bytes a number (and a scale a head)."""
        return cls(
            num_layers=config.num_hidden_layers,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            max_model_len=max_model_len,
            itemsize=itemsize,
            scale_nbytes=scale_nbytes,
        )

    @property
    def row_nbytes(self) -> int:
        """Bytes of one token's keys (or values) in one layer."""
        return self.num_kv_heads * (self.scale_nbytes + self.head_dim * self.itemsize)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return self.num_regions * self.row_nbytes

    @property
    def num_regions(self) -> int:
        """Regions in the area: K and V of every layer."""
        return 2 * self.num_layers

    @property
    def region_nbytes(self) -> int:
        """Bytes from one region to the next: whole pages."""
        return _page_ceil(self.max_model_len * self.row_nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole area. Virtual: pages that were never written to cost nothing."""
        return self.num_regions * self.region_nbytes

    def region_offset(self, layer: int, which: int) -> int:
        """Where a layer's keys (`which` 0) or values (1) begin."""
        if not 0 <= layer < self.num_layers or which not in (0, 1):
            raise IndexError(f"no region {which} in layer {layer} of {self.num_layers}")
        return (2 * layer + which) * self.region_nbytes

    def used_ranges(self, num_tokens: int) -> list[tuple[int, int]]:
        """(offset, length) of exactly the bytes that `num_tokens` tokens fill, in order."""
        self._check(num_tokens)
        used = num_tokens * self.row_nbytes
        return _merge([(i * self.region_nbytes, used) for i in range(self.num_regions)])

    def tail_ranges(self, num_tokens: int) -> list[tuple[int, int]]:
        """(offset, length) of the whole pages that hold nothing of the first `num_tokens` tokens."""
        self._check(num_tokens)
        used = _page_ceil(num_tokens * self.row_nbytes)
        return _merge([(i * self.region_nbytes + used, self.region_nbytes - used) for i in range(self.num_regions)])

    def whole_page_ranges(self, num_tokens: int) -> list[tuple[int, int]]:
        """(offset, length) of the whole pages that hold nothing but the first `num_tokens` tokens."""
        self._check(num_tokens)
        whole = _page_floor(num_tokens * self.row_nbytes)
        return _merge([(i * self.region_nbytes, whole) for i in range(self.num_regions)])

    def partial_page_ranges(self, num_tokens: int) -> list[tuple[int, int]]:
        """(offset, length) of exactly the bytes of the first `num_tokens` tokens that are not in those pages."""
        self._check(num_tokens)
        used = num_tokens * self.row_nbytes
        whole = _page_floor(used)
        return _merge([(i * self.region_nbytes + whole, used - whole) for i in range(self.num_regions)])

    def nbytes_used(self, num_tokens: int) -> int:
        """Physical bytes (whole pages) of the area once `num_tokens` tokens are stored."""
        self._check(num_tokens)
        return self.num_regions * _page_ceil(num_tokens * self.row_nbytes)

    def _check(self, num_tokens: int) -> None:
        if not 0 <= num_tokens <= self.max_model_len:
            raise ValueError(f"num_tokens is {num_tokens}: 0 to max_model_len {self.max_model_len} are possible")


def _page_ceil(nbytes: int) -> int:
    return -(-nbytes // PAGE_NBYTES) * PAGE_NBYTES


def _page_floor(nbytes: int) -> int:
    return nbytes // PAGE_NBYTES * PAGE_NBYTES


def _merge(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Drop empty ranges and join those that touch."""
    merged: list[tuple[int, int]] = []
    for offset, length in ranges:
        if merged and sum(merged[-1]) == offset:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        elif length:
            merged.append((offset, length))
    return merged
