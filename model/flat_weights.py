"""A network's weights as one flat buffer and an index, so that many processes can map a single copy.

Owns: the packing, the views, and protecting the buffer from writes. Knows nothing of who publishes the
buffer or maps it, or of what the tensors are for.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phi_cluster.model.checkpoint import expected_tensors, iter_tensors
from phi_cluster.model.config import Phi3Config, model_fingerprint

ALIGNMENT = 64
# Only whole pages can be protected, and a mapping need not begin on one: with a page of nothing at both ends,
# every byte of every tensor lies in pages that are wholly the buffer's.
_MARGIN = mmap.PAGESIZE
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class WeightEntry:
    """Where a tensor lies: `offset` in bytes from the buffer's beginning, a multiple of ALIGNMENT."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * _DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class WeightIndex:
    """What a flat buffer of `nbytes` bytes holds. `fingerprint` is `model_fingerprint` of the folder it
    came from.
    """

    entries: tuple[WeightEntry, ...]
    nbytes: int
    dtype: str
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> WeightIndex:
        """The inverse of `to_dict`, also after a round trip through JSON."""
        entries = tuple(
            WeightEntry(entry["name"], entry["dtype"], tuple(entry["shape"]), entry["offset"])
            for entry in fields["entries"]
        )
        return cls(entries, fields["nbytes"], fields["dtype"], fields["fingerprint"])


def pack_weights(
    folder: str | Path,
    config: Phi3Config,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[NDArray[np.uint8], WeightIndex]:
    """The folder's weights converted to `dtype` (float32 or bfloat16): a uint8 [nbytes] buffer, and its
    index.

    Peak memory is the buffer and one tensor. `progress` is told (bytes done, bytes in all) after each
    tensor. A tied head is stored once, as the embedding. Raises CheckpointError (before the buffer is made)
    and ValueError.
    """
    name_of_dtype = str(dtype).removeprefix("torch.")
    if name_of_dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype}: torch.float32 or torch.bfloat16 are expected")
    tensors = iter_tensors(folder, config)
    entries: dict[str, WeightEntry] = {}
    end = _MARGIN
    for name, shape in expected_tensors(config).items():
        entries[name] = WeightEntry(name, name_of_dtype, shape, offset=-(-end // ALIGNMENT) * ALIGNMENT)
        end = entries[name].offset + entries[name].nbytes
    index = WeightIndex(tuple(entries.values()), end + _MARGIN, name_of_dtype, model_fingerprint(folder))
    # An anonymous mapping: zeros, and on a page, which numpy does not promise.
    buffer = np.frombuffer(mmap.mmap(-1, index.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=np.uint8)
    views = view_weights(buffer, index)
    done, total = 0, sum(entry.nbytes for entry in index.entries)
    for name, tensor in tensors:
        views[name].copy_(tensor)
        done += entries[name].nbytes
        if progress is not None:
            progress(done, total)
    return buffer, index


def view_weights(buffer: NDArray[np.uint8], index: WeightIndex) -> dict[str, Tensor]:
    """Name -> tensor for each entry, zero-copy: views that keep `buffer` alive. The buffer may be read-
    only; then writing to a tensor is undefined (after `protect_read_only`: a fault). Raises ValueError if
    the sizes differ.
    """
    if buffer.dtype != np.uint8 or buffer.ndim != 1 or buffer.nbytes != index.nbytes:
        raise ValueError(f"the weights' buffer is {buffer.dtype} {list(buffer.shape)}, its index says [{index.nbytes}]")
    with warnings.catch_warnings():
        # torch has no read-only tensors and says so; we mean it.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        flat = torch.from_numpy(buffer)
    return {
        entry.name: flat[entry.offset : entry.offset + entry.nbytes].view(_DTYPES[entry.dtype]).view(entry.shape)
        for entry in index.entries
    }


def protect_read_only(buffer: NDArray[np.uint8]) -> None:
    """Make every page that lies wholly in `buffer` read-only for this process: a write there is a SIGSEGV.

    That covers all tensors of a packed buffer, wherever it is mapped. Cannot be undone here; the pages stay
    protected as long as they are mapped. Raises OSError.
    """
    address = buffer.ctypes.data
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + buffer.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end <= begin:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    prot_read = 1
    if libc.mprotect(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), prot_read) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"mprotect of the weights: {os.strerror(number)}")
