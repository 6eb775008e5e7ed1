"""Shared memory in huge pages, by a real kernel; where it has none of them, small pages serve as before."""

from __future__ import annotations

import gc
import mmap
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from phi_cluster.model.flat_weights import protect_read_only
from phi_cluster.model.huge_pages import gather_pages, mapped_for_huge_pages

MIB = 2**20


def shared(nbytes: int, flags: int = mmap.MAP_SHARED) -> NDArray[np.uint8]:
    """Memory that begins in the middle of a page, as an object in a store does."""
    memory = np.frombuffer(mmap.mmap(-1, nbytes + 3 * mmap.PAGESIZE, flags | mmap.MAP_ANONYMOUS), np.uint8)
    return memory[mmap.PAGESIZE + 64 :][:nbytes]


def huge_nbytes(buffer: NDArray[np.uint8]) -> int:
    """Bytes of huge pages in the mapping that the buffer lies in."""
    nbytes, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if " " in name or "-" in name:
            first, last = (int(number, 16) for number in line.split()[0].split("-"))
            inside = first <= buffer.ctypes.data < last
        elif inside and name == "ShmemPmdMapped":
            nbytes += int(value.split()[0]) * 1024
    return nbytes


def test_it_is_the_same_memory_in_huge_pages():
    source = shared(9 * MIB)
    source[:] = np.arange(len(source), dtype=np.uint32).astype(np.uint8)
    expected = source.copy()
    mapped = mapped_for_huge_pages(source)
    assert (mapped == expected).all()
    source[12345] ^= 255
    assert mapped[12345] == source[12345]
    source[12345] ^= 255
    gathered = gather_pages(mapped)
    if not gathered:
        pytest.skip("this kernel gathers no pages")
    assert gathered >= 4 * MIB
    assert huge_nbytes(mapped) == gathered
    # Another process, or mapping, finds them too.
    protect_read_only(mapped)
    del source
    gc.collect()
    assert (mapped == expected).all()


@pytest.mark.parametrize("nbytes", [100, MIB])
def test_little_memory_stays_where_it_is(nbytes):
    source = shared(nbytes)
    assert mapped_for_huge_pages(source) is source
    assert gather_pages(source) == 0


def test_private_memory_stays_where_it_is():
    source = shared(9 * MIB, mmap.MAP_PRIVATE)
    assert mapped_for_huge_pages(source) is source
    whole = np.zeros(9 * MIB, np.uint8)
    assert mapped_for_huge_pages(whole) is whole
