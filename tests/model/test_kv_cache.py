"""Views on a KV area: where they lie, and what is refused."""

from __future__ import annotations

import ctypes
import mmap
import resource

import pytest
import torch

from phi_cluster.model.kv_cache import KVCache
from phi_cluster.model.kv_layout import KVCacheLayout

LAYOUT = KVCacheLayout(num_layers=2, num_kv_heads=3, head_dim=8, max_model_len=50, itemsize=2)
INT8 = KVCacheLayout(num_layers=2, num_kv_heads=3, head_dim=8, max_model_len=50, itemsize=1, scale_nbytes=4)


def test_rows_lie_where_the_layout_says():
    buffer = bytearray(LAYOUT.nbytes)
    cache = KVCache(LAYOUT, torch.bfloat16, buffer)
    for layer in range(2):
        for which, views in enumerate((cache.keys, cache.values)):
            assert views[layer].shape == (50, 3, 8)
            views[layer][7] = 1.5
            row = LAYOUT.region_offset(layer, which) + 7 * LAYOUT.row_nbytes
            expected = torch.full((24,), 1.5, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
            assert bytes(buffer[row : row + LAYOUT.row_nbytes]) == expected
            buffer[row : row + LAYOUT.row_nbytes] = bytes(LAYOUT.row_nbytes)
    assert not any(buffer)


def test_rows_of_int8_are_bytes_with_scales_between_them():
    buffer = bytearray(INT8.nbytes)
    cache = KVCache(INT8, torch.int8, buffer)
    assert (cache.rows.dtype, tuple(cache.rows.shape)) == (torch.uint8, (4, 50, 36))
    assert not hasattr(cache, "keys")
    assert not hasattr(cache, "values")
    cache.rows[3, 7] = torch.arange(36, dtype=torch.uint8)
    row = INT8.region_offset(1, 1) + 7 * INT8.row_nbytes
    assert buffer[row : row + 36] == bytes(range(36))
    assert not any(buffer[:row])
    cache.clear()
    assert not any(buffer)
    assert KVCache(INT8, torch.int8).rows.eq(0).all()


@pytest.mark.parametrize(("layout", "dtype"), [(LAYOUT, torch.bfloat16), (INT8, torch.int8)])
def test_the_address_is_where_the_area_begins(layout, dtype):
    segment = mmap.mmap(-1, mmap.PAGESIZE + layout.nbytes)
    cache = KVCache(layout, dtype, memoryview(segment)[mmap.PAGESIZE :])
    ctypes.memset(cache.address + layout.region_offset(1, 0), 0x40, layout.row_nbytes)
    assert cache.rows[2, 0].view(torch.uint8).eq(0x40).all()
    begin = mmap.PAGESIZE + layout.region_offset(1, 0)
    assert segment[begin : begin + layout.row_nbytes] == b"@" * layout.row_nbytes
    assert KVCache(layout, dtype).address % mmap.PAGESIZE == 0


def test_a_part_of_a_buffer_may_be_used():
    segment = mmap.mmap(-1, mmap.PAGESIZE + LAYOUT.nbytes)
    cache = KVCache(LAYOUT, torch.bfloat16, memoryview(segment)[mmap.PAGESIZE :])
    cache.keys[0][0] = 1
    assert not any(segment[: mmap.PAGESIZE])
    assert any(segment[mmap.PAGESIZE : mmap.PAGESIZE + LAYOUT.row_nbytes])


def test_two_caches_on_one_buffer_see_each_other_and_private_ones_do_not():
    buffer = bytearray(LAYOUT.nbytes)
    first, second = (KVCache(LAYOUT, torch.bfloat16, buffer) for _ in range(2))
    first.values[1][3] = 2
    assert second.values[1][3].eq(2).all()
    one, other = (KVCache(LAYOUT, torch.bfloat16) for _ in range(2))
    one.values[1][3] = 2
    assert other.values[1][3].eq(0).all()


def test_private_memory_costs_nothing_before_it_is_written():
    layout = KVCacheLayout(num_layers=32, num_kv_heads=8, head_dim=128, max_model_len=32768, itemsize=4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cache = KVCache(layout, torch.float32)
    cache.rows[:, 0] = 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert layout.nbytes == 8 << 30
    assert grown < 256 << 20


def test_clear_leaves_zeros():
    cache = KVCache(LAYOUT, torch.bfloat16)
    cache.rows.fill_(3)
    cache.clear()
    assert cache.rows.eq(0).all()


@pytest.mark.parametrize(
    ("buffer", "dtype", "message"),
    [
        (bytes(LAYOUT.nbytes), torch.bfloat16, "read-only"),
        (bytearray(LAYOUT.nbytes - 1), torch.bfloat16, f"has {LAYOUT.nbytes - 1} bytes"),
        (None, torch.float32, "torch.float32 has 4 bytes"),
    ],
)
def test_what_does_not_fit_is_refused(buffer, dtype, message):
    with pytest.raises(ValueError, match=message):
        KVCache(LAYOUT, dtype, buffer)


def test_scales_and_int8_go_together():
    with pytest.raises(ValueError, match=r"scales of 0 bytes, which does not fit torch\.int8"):
        KVCache(KVCacheLayout(2, 3, 8, 50, 1), torch.int8)
    with pytest.raises(ValueError, match=r"scales of 4 bytes, which does not fit torch\.uint8"):
        KVCache(INT8, torch.uint8)


def test_a_device_has_no_host_buffer():
    with pytest.raises(ValueError, match="on meta cannot lie in a buffer"):
        KVCache(LAYOUT, torch.bfloat16, bytearray(LAYOUT.nbytes), device="meta")
    assert KVCache(LAYOUT, torch.bfloat16, device="meta").rows.device.type == "meta"
