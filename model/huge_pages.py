"""Shared memory in huge pages: what is read from end to end at each step, as weights are, is read up to twice as fast
where each 2 MiB need one entry of the page tables instead of 512.

Owns: a second mapping of the same memory that huge pages fit into, and having the kernel gather its pages. Neither
needs privileges, and neither has to succeed: then small pages serve. Knows nothing of weights and of who shares them.

Linux keeps shared memory in small pages unless it is told otherwise. Since 6.1 a process may tell it for pages that are
there already (MADV_COLLAPSE, see madvise(2)), whatever the machine's settings. Every process that has mapped them at an
address that fits then finds the huge ones.
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_HUGE = 2 * 2**20
_MADV_COLLAPSE = 25
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2
# At once: whoever uses the memory meanwhile waits for a piece, not for all of it.
_PIECE = 16 * _HUGE


def mapped_for_huge_pages(buffer: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8, as long: the same shared memory at an address that huge pages fit. It keeps `buffer` alive and stays
    mapped as long as the process lives; `buffer` itself where that cannot be had (private memory, another system)."""
    address, nbytes = buffer.ctypes.data, buffer.nbytes
    begin = address // mmap.PAGESIZE * mmap.PAGESIZE
    end = -(-(address + nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
    offset = _shared_offset(begin, end)
    if nbytes < _HUGE or offset is None or (begin - offset) % _HUGE == 0:
        return buffer
    libc = _libc()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    room = libc.mmap(None, end - begin + _HUGE, 0, flags, -1, 0)
    if room == _FAILED:
        return buffer
    target = room + (offset - room) % _HUGE
    # An old size of 0: another mapping of the same pages.
    if libc.mremap(begin, 0, end - begin, _MREMAP_MAYMOVE | _MREMAP_FIXED, ctypes.c_void_p(target)) != target:
        libc.munmap(room, end - begin + _HUGE)
        return buffer
    memory = (ctypes.c_uint8 * nbytes).from_address(target + address - begin)
    # Kept alive by whoever keeps the result.
    memory.source = buffer  # type: ignore[attr-defined]
    return np.ctypeslib.as_array(memory)


def gather_pages(buffer: NDArray[np.uint8]) -> int:
    """Has the kernel put what was mapped for huge pages into such; the bytes that are in some now. Takes about a second
    for each 200 MB, and returns at the first piece that the kernel has no room for, or if it cannot."""
    address = buffer.ctypes.data
    begin, end = -(-address // _HUGE) * _HUGE, (address + buffer.nbytes) // _HUGE * _HUGE
    done = 0
    for at in range(begin, end, _PIECE):
        nbytes = min(_PIECE, end - at)
        if _libc().madvise(at, nbytes, _MADV_COLLAPSE) != 0:
            break
        done += nbytes
    return done


_FAILED = ctypes.c_void_p(-1).value


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def _shared_offset(begin: int, end: int) -> int | None:
    """Where in its file `begin` lies, if all of [begin, end) lies in one mapping that is shared; see proc(5)."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        where, access, offset, *_ = line.split()
        first, last = (int(number, 16) for number in where.split("-"))
        if first <= begin and end <= last:
            return int(offset, 16) + begin - first if access.endswith("s") else None
    return None
