"""Reads a GGUF file: its metadata, and its tensors' rows as float32.

Owns: the GGUF container format (version 2 and 3, little-endian), from the public specification; formats of
quantised blocks come from the `gguf` package. Knows nothing of what the tensors mean or of where the file
came from.

The `gguf` package's own reader keeps several numpy views for each of a vocabulary's hundred thousand strings,
and fails on a truncated file with whatever error numpy has; hence this one.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from phi_cluster.model.config import UnsupportedModel

# Value types of metadata: struct format of one value, by type number.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
# Rows are dequantised in pieces of about this many float32 bytes, so that memory does not grow with the
# model.
_CHUNK_NBYTES = 16 << 20


class GGUFError(ValueError):
    """The file is not a readable GGUF file; the message is one sentence that names the file."""


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of the file. `shape` is in numpy's order (rows first), `offset` counts from the file's
    start."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    nbytes: int


class GGUFFile:
    """An open GGUF file. `metadata` maps keys to numbers, strings, booleans or lists; `tensors` maps names.

    Use it as a context manager. Raises GGUFError where the file is broken and UnsupportedModel where it is
    whole but uses a version, an endianness or a tensor type that cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self.path.open("rb") as file:
            try:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError as error:  # an empty file cannot be mapped
                raise GGUFError(f"{self.path} is empty, not a GGUF file") from error
        try:
            self.metadata, self.tensors = self._read_header()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmaps the file."""
        self._data.close()

    def rows(self, name: str, multiple: int = 1) -> Iterator[np.ndarray]:
        """The tensor as float32, [n, columns] at a time ([n] if it has one dimension); n is a multiple of
        `multiple`, which must divide the number of rows."""
        tensor = self.tensors[name]
        num_rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
        row_nbytes = tensor.nbytes // num_rows
        row_size = int(np.prod(tensor.shape)) // num_rows
        step = max(_CHUNK_NBYTES // (4 * row_size) // multiple, 1) * multiple
        for first in range(0, num_rows, step):
            count = min(step, num_rows - first)
            # A copy: numpy must not hold on to the mapping, which is closed before the arrays die.
            raw = self._data[tensor.offset + first * row_nbytes : tensor.offset + (first + count) * row_nbytes]
            values = dequantize(np.frombuffer(raw, np.uint8).reshape(count, row_nbytes), tensor.kind)
            yield values.reshape(count, *tensor.shape[1:]) if len(tensor.shape) > 1 else values.reshape(-1)

    def tensor(self, name: str) -> np.ndarray:
        """The whole tensor as float32; for small ones."""
        return np.concatenate(list(self.rows(name)))

    def _read_header(self) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
        reader = _Reader(self.path, self._data)
        if self._data[:4] != b"GGUF":
            raise GGUFError(f"{self.path} is not a GGUF file: it does not begin with GGUF")
        reader.offset = 4
        version = reader.number("I")
        if version not in (2, 3):
            big_endian = version & 0xFFFF == 0
            raise UnsupportedModel(
                f"{self.path}: the GGUF version is {version}, supported are 2 and 3"
                + (" (it seems to be a big-endian file)" if big_endian else "")
            )
        num_tensors, num_keys = reader.number("Q"), reader.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = reader.string()
            metadata[key] = reader.value(reader.number("I"))
        infos = [reader.tensor_info() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise GGUFError(f"{self.path} is broken: general.alignment is {alignment!r}")
        start = -(-reader.offset // alignment) * alignment
        tensors = {name: self._locate(name, shape, kind, start + offset) for name, shape, kind, offset in infos}
        return metadata, tensors

    def _locate(self, name: str, shape: tuple[int, ...], kind_number: int, offset: int) -> GGUFTensor:
        try:
            kind = GGMLQuantizationType(kind_number)
        except ValueError:
            raise UnsupportedModel(
                f"{self.path}: tensor {name} has quantisation type {kind_number}, which the gguf package does not know"
            ) from None
        block_size, type_size = GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block_size or 0 in shape:
            raise GGUFError(f"{self.path} is broken: tensor {name} of type {kind.name} has shape {list(shape)}")
        size = 1
        for length in shape:
            size *= length
        nbytes = size // block_size * type_size
        if offset + nbytes > len(self._data):
            raise GGUFError(
                f"{self.path} is truncated: tensor {name} ends at byte {offset + nbytes}, the file at {len(self._data)}"
            )
        _require_dequantisable(self.path, name, kind)
        return GGUFTensor(name, shape, kind, offset, nbytes)


def _require_dequantisable(path: Path, name: str, kind: GGMLQuantizationType) -> None:
    block_size, type_size = GGML_QUANT_SIZES[kind]
    try:
        values = dequantize(np.zeros((1, type_size), np.uint8), kind)
    except NotImplementedError:
        values = np.zeros(0)
    if values.size != block_size:
        raise UnsupportedModel(
            f"{path}: tensor {name} has quantisation {kind.name}, which the gguf package cannot dequantise"
        )


class _Reader:
    """Takes values off the header, one after another, and never reads past the file's end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.offset = 0
        self._data = data

    def take(self, nbytes: int) -> bytes:
        end = self.offset + nbytes
        if end > len(self._data):
            raise GGUFError(f"{self.path} is truncated: its header goes on after byte {len(self._data)}, where it ends")
        taken = self._data[self.offset : end]
        self.offset = end
        return taken

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        # As llama.cpp does with a broken vocabulary entry: keep going, the bytes are nobody's words.
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            element, count = self.number("I"), self.number("Q")
            if element in _SCALARS:
                code = _SCALARS[element]
                packed = self.take(count * struct.calcsize("<" + code))
                return np.frombuffer(packed, np.dtype(code).newbyteorder("<")).tolist()
            if element == _STRING:
                return [self.string() for _ in range(count)]
            kind = element
        raise GGUFError(f"{self.path} is broken: its metadata holds a value of unknown type {kind}")

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        num_dims = self.number("I")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise GGUFError(f"{self.path} is broken: tensor {name} has {num_dims} dimensions")
        # The file counts the fastest dimension first, numpy last.
        shape = tuple(self.number("Q") for _ in range(num_dims))[::-1]
        return name, shape, self.number("I"), self.number("Q")
