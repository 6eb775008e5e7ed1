"""Writes a safetensors file piece by piece, so that a model larger than memory can be converted.

Owns: the safetensors container (8-byte header length, JSON header, tensors back to back) and rounding to
bfloat16. Knows nothing of where values come from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

_ITEMSIZES = {"float32": 4, "bfloat16": 2}
_CODES = {"float32": "F32", "bfloat16": "BF16"}


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    pieces: Iterable[np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Writes tensors of `dtype` ("float32" or "bfloat16") in the order of `shapes`; flushed to disk on
    return.

    `pieces` are float32 arrays whose values, one after another in row order, are those of all tensors. Raises
    ValueError if there are more or fewer of them than the shapes say.
    """
    itemsize = _ITEMSIZES[dtype]
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    packed = json.dumps(header, separators=(",", ":")).encode()
    packed += b" " * (-len(packed) % 8)  # tensors begin at a multiple of 8
    written = 0
    with path.open("wb") as file:
        file.write(len(packed).to_bytes(8, "little") + packed)
        for piece in pieces:
            stored = to_bfloat16_bits(piece) if dtype == "bfloat16" else np.ascontiguousarray(piece, "<f4")
            file.write(stored.data)
            written += stored.nbytes
        file.flush()
        os.fsync(file.fileno())
    if written != end:
        raise ValueError(f"{path}: the tensors' shapes need {end} bytes, {written} came")


def to_bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 values as the bits (uint16, same shape) of the nearest bfloat16, ties to even; NaN stays
    NaN."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
    # Adding could carry a NaN's bits away into infinity or past it.
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype("<u2")
