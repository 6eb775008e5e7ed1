"""A network's weights as one flat buffer and an index, so that many processes can map a single copy.

Owns: which of a checkpoint's tensors is stored how, the packing, the views, and protecting the buffer from writes.
Knows nothing of who publishes the buffer or maps it, or of the order of numbers within a quantised tensor.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import warnings
from collections import defaultdict
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
from phi_cluster.model.quantize import int4_shapes, int8_shapes, quantize_int4, quantize_int8

ALIGNMENT = 64
# Only whole pages can be protected, and a mapping need not begin on one: with a page of nothing at both ends,
# every byte of every tensor lies in pages that are wholly the buffer's.
_MARGIN = mmap.PAGESIZE
# Of a whole buffer.
PACKED_DTYPES = ("float32", "bfloat16", "int8", "int4")
# Of a tensor in it.
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "uint8": torch.uint8,
}
_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"


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
    """What a flat buffer of `nbytes` bytes holds. `dtype` is one of PACKED_DTYPES; `fingerprint` is
    `model_fingerprint` of the folder it came from.
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


@dataclass(frozen=True)
class _Stored:
    """A tensor of the checkpoint (`source`) as it is stored: as `dtype` (one of PACKED_DTYPES) under `name`."""

    source: str
    name: str
    dtype: str


def pack_weights(
    folder: str | Path,
    config: Phi3Config,
    dtype: torch.dtype | str,
    progress: Callable[[int, int], None] | None = None,
    path: Path | None = None,
    num_threads: int = 1,
) -> tuple[NDArray[np.uint8], WeightIndex]:
    """The folder's weights as `dtype` (one of PACKED_DTYPES): a uint8 [nbytes] buffer, and its index.

    float32 and bfloat16: every tensor under its own name; a tied head is stored once, as the embedding. int8 and
    int4: each linear weight as quantize.py packs it, `<name>.weight` and `<name>.scale`; lm_head always, also if
    it is tied, and always int8; the embedding bfloat16, the norms float32.

    The buffer is private memory, or the file `path` (replaced; on disk when this returns): then the process needs
    memory of its own for pieces of a tensor only. `progress` is told (bytes done, bytes in all) after each tensor;
    `num_threads` quantise. Raises CheckpointError (before the buffer is made), ValueError, and OSError where the
    file cannot be made or the disk is full.
    """
    name_of_dtype = str(dtype).removeprefix("torch.")
    if name_of_dtype not in PACKED_DTYPES:
        raise ValueError(f"dtype is {dtype}: {', '.join(PACKED_DTYPES)} are expected")
    tensors = iter_tensors(folder, config)
    plan = _plan(config, name_of_dtype)
    entries = _entries(config, plan)
    index = WeightIndex(
        entries, entries[-1].offset + entries[-1].nbytes + _MARGIN, name_of_dtype, model_fingerprint(folder)
    )
    mapping = _map(path, index.nbytes)
    buffer = np.frombuffer(mapping, dtype=np.uint8)
    views = view_weights(buffer, index)
    stored_of = defaultdict(list)
    for stored in plan:
        stored_of[stored.source].append(stored)
    done, total = 0, sum(entry.nbytes for entry in index.entries)
    for name, tensor in tensors:
        for stored in stored_of[name]:
            weight = views[f"{stored.name}.weight"]
            done += weight.nbytes
            if stored.dtype in ("int8", "int4"):
                scale = views[f"{stored.name}.scale"]
                done += scale.nbytes
                quantize = quantize_int8 if stored.dtype == "int8" else quantize_int4
                quantize(tensor, name, (weight, scale), num_threads)
            else:
                weight.copy_(tensor)
        if progress is not None:
            progress(done, total)
    if path is not None:
        mapping.flush()
    return buffer, index


def _plan(config: Phi3Config, dtype: str) -> list[_Stored]:
    """Everything that is stored, in order."""
    plan = []
    for source, shape in expected_tensors(config).items():
        name = source.removesuffix(".weight")
        stored_as = dtype
        if dtype in ("int8", "int4"):
            if len(shape) == 1:
                stored_as = "float32"
            elif name == _EMBEDDING:
                stored_as = "bfloat16"
            elif name == _HEAD:
                stored_as = "int8"
        plan.append(_Stored(source, name, stored_as))
    if dtype in ("int8", "int4") and config.tie_word_embeddings:
        plan.append(_Stored(f"{_EMBEDDING}.weight", _HEAD, "int8"))
    return plan


def _entries(config: Phi3Config, plan: list[_Stored]) -> tuple[WeightEntry, ...]:
    shapes = expected_tensors(config)
    entries: list[WeightEntry] = []
    end = _MARGIN

    def add(name: str, dtype: str, shape: tuple[int, ...]) -> None:
        nonlocal end
        entries.append(WeightEntry(name, dtype, shape, offset=-(-end // ALIGNMENT) * ALIGNMENT))
        end = entries[-1].offset + entries[-1].nbytes

    for stored in plan:
        shape = shapes[stored.source]
        if stored.dtype in ("int8", "int4"):
            packed, scale = int8_shapes(*shape) if stored.dtype == "int8" else int4_shapes(*shape)
            add(f"{stored.name}.weight", "int8" if stored.dtype == "int8" else "uint8", packed)
            add(f"{stored.name}.scale", "float32" if stored.dtype == "int8" else "float16", scale)
        else:
            add(f"{stored.name}.weight", stored.dtype, shape)
    return tuple(entries)


def _map(path: Path | None, nbytes: int) -> mmap.mmap:
    """Zeros, and on a page (which numpy does not promise): of private memory, or of a new file."""
    if path is None:
        return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with path.open("wb+") as file:
        # Not a file with holes: a write into one that finds the disk full would end the process by a signal.
        os.posix_fallocate(file.fileno(), 0, nbytes)
        return mmap.mmap(file.fileno(), nbytes)


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
