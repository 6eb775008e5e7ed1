"""KV caches on a device (a GPU): the ids lie in the session's segment, keys and values in the engine's device memory.

Owns: the device's caches between turns, each private to one segment. Unlike on the CPU they die with the engine: the
next one computes them again from the ids. Knows nothing of sessions, Ray or scheduling.

This path has not run on a GPU; the tests run it on the CPU.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import torch

from phi_cluster.cluster.engine.segment_kv import SegmentKV, count_agreeing
from phi_cluster.cluster.messages import SegmentRef
from phi_cluster.cluster.session.segment_layout import SegmentLayout
from phi_cluster.model.kv_cache import KVCache
from phi_cluster.model.kv_layout import KVCacheLayout


@dataclass
class DeviceCache:
    """The keys and values of `num_computed_tokens` tokens. Between turns `token_ids` says of which: the segment may be
    cleared or trimmed meanwhile."""

    cache: KVCache
    num_computed_tokens: int = 0
    long_rope: bool = False
    token_ids: list[int] = field(default_factory=list)


class DeviceCaches:
    """At most `max_idle` caches are kept between turns; the one used longest ago goes first."""

    def __init__(self, layout: KVCacheLayout, dtype: torch.dtype, device: str, max_idle: int):
        self.layout = layout
        self.dtype = dtype
        self._device = device
        self._max_idle = max_idle
        self._idle: OrderedDict[bytes, DeviceCache] = OrderedDict()

    def borrow(self, nonce: bytes) -> DeviceCache:
        """The segment's cache, or an empty one. Nobody else can have it until it is given back."""
        return self._idle.pop(nonce, None) or DeviceCache(KVCache(self.layout, self.dtype, device=self._device))

    def give_back(self, nonce: bytes, cache: DeviceCache) -> None:
        self._idle[nonce] = cache
        while len(self._idle) > self._max_idle:
            self._idle.popitem(last=False)


class DeviceKV(SegmentKV):
    """As SegmentKV, with keys and values on the device. The segment's own count of computed tokens stays 0: it holds
    no keys and values."""

    def __init__(self, ref: SegmentRef, layout: SegmentLayout, fingerprint: str, caches: DeviceCaches, epoch: int):
        """Raises SegmentGone or SegmentMismatch."""
        super().__init__(ref, layout, fingerprint, caches.dtype, epoch)
        self._caches = caches
        self._on_device = caches.borrow(ref.nonce)
        self._nonce = ref.nonce
        self.cache = self._on_device.cache
        self._segment.set_num_computed_tokens(0)
        self._on_device.num_computed_tokens = count_agreeing(self._on_device.token_ids, self.token_ids())

    @property
    def num_lasting_tokens(self) -> int:
        return 0

    @property
    def num_computed_tokens(self) -> int:
        return self._on_device.num_computed_tokens

    @property
    def long_rope(self) -> bool:
        return self._on_device.long_rope

    @long_rope.setter
    def long_rope(self, value: bool) -> None:
        if value != self._on_device.long_rope:
            self._on_device.num_computed_tokens = 0
            self._on_device.long_rope = value

    def trim(self, num_tokens: int) -> None:
        self._on_device.num_computed_tokens = min(self._on_device.num_computed_tokens, num_tokens)
        super().trim(num_tokens)

    def set_computed(self, num_tokens: int) -> None:
        self._on_device.num_computed_tokens = num_tokens

    def clear(self) -> None:
        self._on_device.num_computed_tokens = 0

    def close(self) -> None:
        if not self._closed:
            self._on_device.token_ids = self._segment.token_ids(0, self._on_device.num_computed_tokens)
            self._caches.give_back(self._nonce, self._on_device)
        super().close()
