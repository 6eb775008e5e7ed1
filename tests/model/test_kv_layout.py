"""Offsets of keys and values, checked against a map of the area drawn byte by byte."""

from __future__ import annotations

import pytest

from phi_cluster.model.config import Phi3Config
from phi_cluster.model.kv_layout import PAGE_NBYTES, KVCacheLayout

# A row of 3 * 64 * 2 = 384 bytes; 100 rows are 9.4 pages, so that regions end within one.
LAYOUT = KVCacheLayout(num_layers=3, num_kv_heads=3, head_dim=64, max_model_len=100, itemsize=2)


def used_bytes(num_tokens: int) -> set[int]:
    return {
        LAYOUT.region_offset(layer, which) + i
        for layer in range(3)
        for which in (0, 1)
        for i in range(num_tokens * 384)
    }


def covered(ranges: list[tuple[int, int]]) -> set[int]:
    return {i for offset, length in ranges for i in range(offset, offset + length)}


def test_sizes():
    assert LAYOUT.row_nbytes == 384
    assert LAYOUT.bytes_per_token == 2 * 3 * 384
    assert LAYOUT.region_nbytes == 10 * PAGE_NBYTES
    assert LAYOUT.nbytes == 6 * LAYOUT.region_nbytes


def test_regions_begin_on_pages_and_do_not_overlap():
    offsets = [LAYOUT.region_offset(layer, which) for layer in range(3) for which in (0, 1)]
    assert offsets == [i * 10 * PAGE_NBYTES for i in range(6)]
    assert offsets[-1] + LAYOUT.region_nbytes == LAYOUT.nbytes


@pytest.mark.parametrize("num_tokens", [0, 1, 10, 11, 32, 99, 100])
def test_ranges_cover_what_they_should(num_tokens):
    used = used_bytes(num_tokens)
    assert covered(LAYOUT.used_ranges(num_tokens)) == used
    tail = LAYOUT.tail_ranges(num_tokens)
    assert all(offset % PAGE_NBYTES == 0 and length % PAGE_NBYTES == 0 for offset, length in tail)
    pages_in_use = {byte // PAGE_NBYTES for byte in used}
    all_pages = set(range(LAYOUT.nbytes // PAGE_NBYTES))
    assert {byte // PAGE_NBYTES for byte in covered(tail)} == all_pages - pages_in_use
    assert LAYOUT.nbytes_used(num_tokens) == len(pages_in_use) * PAGE_NBYTES


def test_ranges_that_touch_are_one():
    assert LAYOUT.tail_ranges(0) == [(0, LAYOUT.nbytes)]
    assert LAYOUT.used_ranges(0) == []
    assert LAYOUT.tail_ranges(100) == []
    whole_pages = KVCacheLayout(num_layers=2, num_kv_heads=1, head_dim=64, max_model_len=64, itemsize=4)
    assert whole_pages.used_ranges(64) == [(0, whole_pages.nbytes)]


def test_a_scale_a_head_is_part_of_a_row():
    int8 = KVCacheLayout(num_layers=3, num_kv_heads=3, head_dim=64, max_model_len=100, itemsize=1, scale_nbytes=4)
    assert int8.row_nbytes == 3 * (4 + 64)
    assert int8.bytes_per_token == 2 * 3 * 204
    # 100 rows of 204 bytes are 4.98 pages.
    assert int8.region_nbytes == 5 * PAGE_NBYTES
    assert int8.used_ranges(7) == [(i * 5 * PAGE_NBYTES, 7 * 204) for i in range(6)]
    assert int8.nbytes_used(21) == 6 * 2 * PAGE_NBYTES
    assert int8.tail_ranges(21) == [((5 * i + 2) * PAGE_NBYTES, 3 * PAGE_NBYTES) for i in range(6)]


@pytest.mark.parametrize("num_tokens", [-1, 101])
def test_lengths_outside_the_area_are_refused(num_tokens):
    for method in (LAYOUT.used_ranges, LAYOUT.tail_ranges, LAYOUT.nbytes_used):
        with pytest.raises(ValueError, match=f"num_tokens is {num_tokens}"):
            method(num_tokens)


@pytest.mark.parametrize(("layer", "which"), [(-1, 0), (3, 0), (0, 2), (0, -1)])
def test_regions_that_do_not_exist_are_refused(layer, which):
    with pytest.raises(IndexError):
        LAYOUT.region_offset(layer, which)


@pytest.mark.parametrize("field", ["num_layers", "num_kv_heads", "head_dim", "max_model_len", "itemsize"])
def test_empty_layouts_are_refused(field):
    fields = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8, "max_model_len": 8, "itemsize": 2}
    with pytest.raises(ValueError, match=f"{field} is 0"):
        KVCacheLayout(**(fields | {field: 0}))
    with pytest.raises(ValueError, match="scale_nbytes is 2"):
        KVCacheLayout(**(fields | {"scale_nbytes": 2}))


def test_for_config():
    config = Phi3Config(
        vocab_size=10,
        hidden_size=64,
        intermediate_size=8,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=64,
        original_max_position_embeddings=64,
    )
    assert KVCacheLayout.for_config(config, 32, 4) == KVCacheLayout(5, 2, 8, 32, 4, 0)
    assert KVCacheLayout.for_config(config, 32, 1, 4) == KVCacheLayout(5, 2, 8, 32, 1, 4)


@pytest.mark.parametrize("num_tokens", [0, 1, 31, 32, 33, 70, 100])
def test_whole_and_partial_pages_are_all_that_is_used(num_tokens):
    # 128 bytes a row: 32 rows are a page.
    layout = KVCacheLayout(num_layers=2, num_kv_heads=2, head_dim=32, max_model_len=100, itemsize=2)
    whole, partial = layout.whole_page_ranges(num_tokens), layout.partial_page_ranges(num_tokens)
    assert all(offset % PAGE_NBYTES == 0 == length % PAGE_NBYTES for offset, length in whole)
    assert all(0 < length < PAGE_NBYTES for _, length in partial)
    of = {at for offset, length in [*whole, *partial] for at in range(offset, offset + length)}
    assert of == {at for offset, length in layout.used_ranges(num_tokens) for at in range(offset, offset + length)}
    assert sum(length for _, length in [*whole, *partial]) == len(of)
