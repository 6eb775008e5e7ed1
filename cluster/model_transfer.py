"""The model's way to another node: small files at once, packed weights in pieces, checked and then renamed into place.

Owns: what travels and where it lies there. Knows nothing of Ray: who asks the other node is given.
"""

from __future__ import annotations

import os
import zlib
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from phi_cluster.cluster.errors import StartError

# What a folder holds besides weights: more than this is not a tokenizer or a configuration.
_LARGEST_FILE_NBYTES = 64 * 2**20
PIECE_NBYTES = 32 * 2**20
# On their way at once: one is written while the next one comes.
_PIECES_IN_FLIGHT = 2


class Source(Protocol):
    """The other node. `ask` begins to fetch a piece, `get` waits for it."""

    def ask(self, of_index: bool, offset: int, nbytes: int) -> Any: ...

    def get(self, asked: Any) -> tuple[Any, int]:
        """The piece (a buffer) and its CRC-32."""
        ...


def small_files(folder: Path) -> dict[str, bytes]:
    """By name: configuration, tokenizer, chat template."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix != ".safetensors" and path.stat().st_size <= _LARGEST_FILE_NBYTES
    }


def received_folder(cache_path: Path, fingerprint: str) -> Path:
    """Where such files of a model lie on a node that got them from another one."""
    return cache_path / "received" / fingerprint


def store_files(files: dict[str, bytes], folder: Path) -> None:
    """All of them or none. Raises StartError for a name that leads elsewhere."""
    if folder.is_dir():
        return
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    aside.mkdir(parents=True)
    for name, data in files.items():
        if Path(name).name != name:
            raise StartError(f"the head sent a file named {name!r}")
        (aside / name).write_bytes(data)
    try:
        aside.rename(folder)
    except OSError:
        # Another process was quicker.
        for path in aside.iterdir():
            path.unlink()
        aside.rmdir()


def fetch_packed(
    source: Source,
    sizes: tuple[int, int],
    paths: tuple[Path, Path],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """The packed weights and their index, as files of `paths`; each appears whole or not at all. Raises StartError if
    a piece does not come as it was sent."""
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    # Whoever finds the weights takes the index for granted.
    for of_index in (True, False):
        path, size = paths[of_index], sizes[of_index]
        aside = path.with_suffix(f"{path.suffix}.{os.getpid()}.partial")
        try:
            with aside.open("wb") as file:
                for piece in _pieces(source, of_index, size):
                    file.write(piece)
                    progress(file.tell(), size)
            aside.rename(path)
        finally:
            aside.unlink(missing_ok=True)


def _pieces(source: Source, of_index: bool, size: int) -> Any:
    asked: deque[tuple[Any, int]] = deque()
    offset = 0
    while offset < size or asked:
        while offset < size and len(asked) < _PIECES_IN_FLIGHT:
            nbytes = min(PIECE_NBYTES, size - offset)
            asked.append((source.ask(of_index, offset, nbytes), nbytes))
            offset += nbytes
        first, nbytes = asked.popleft()
        piece, checksum = source.get(first)
        if len(piece) != nbytes or zlib.crc32(piece) != checksum:
            raise StartError("the model's weights were damaged on their way from another node")
        yield piece
