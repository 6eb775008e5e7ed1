"""A model arrives on another node as it was, or not at all."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from phi_cluster.cluster.errors import StartError
from phi_cluster.cluster.model_transfer import PIECE_NBYTES, fetch_packed, received_folder, small_files, store_files

WEIGHTS = np.random.default_rng(0).integers(0, 256, 2 * PIECE_NBYTES + 12_345, np.uint8)
INDEX = np.frombuffer(b'{"nbytes": 1}', np.uint8)
SIZES = len(WEIGHTS), len(INDEX)


class Elsewhere:
    """Another node. `spoil` changes pieces on their way."""

    def __init__(self, spoil: Callable[[np.ndarray], np.ndarray] = lambda piece: piece):
        self._spoil = spoil
        self.asked: list[tuple[bool, int, int]] = []
        self.waiting = 0
        self.most_waiting = 0

    def ask(self, of_index: bool, offset: int, nbytes: int) -> tuple[bool, int, int]:
        self.waiting += 1
        self.most_waiting = max(self.most_waiting, self.waiting)
        self.asked.append((of_index, offset, nbytes))
        return self.asked[-1]

    def get(self, asked: tuple[bool, int, int]) -> tuple[memoryview, int]:
        self.waiting -= 1
        of_index, offset, nbytes = asked
        piece = (WEIGHTS, INDEX)[of_index][offset : offset + nbytes]
        return self._spoil(piece.copy()).data, zlib.crc32(piece.tobytes())


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "packed" / "w.bin", tmp_path / "packed" / "w.json"


def test_packed_weights_come_in_pieces_of_which_few_are_on_their_way(paths: tuple[Path, Path]) -> None:
    source, told = Elsewhere(), []
    fetch_packed(source, SIZES, paths, lambda done, total: told.append((done, total)))
    assert paths[0].read_bytes() == WEIGHTS.tobytes()
    assert paths[1].read_bytes() == INDEX.tobytes()
    assert [nbytes for of_index, _, nbytes in source.asked if not of_index] == [PIECE_NBYTES, PIECE_NBYTES, 12_345]
    assert source.most_waiting == 2
    assert told[-1] == (len(WEIGHTS), len(WEIGHTS))


def flipped(piece: np.ndarray) -> np.ndarray:
    piece[len(piece) // 2] ^= 4
    return piece


@pytest.mark.parametrize("spoil", [flipped, lambda piece: piece[:-1]], ids=["flipped", "short"])
def test_a_piece_that_is_not_what_was_sent_leaves_nothing(
    paths: tuple[Path, Path], spoil: Callable[[np.ndarray], np.ndarray]
) -> None:
    with pytest.raises(StartError, match="damaged on their way"):
        fetch_packed(Elsewhere(spoil), SIZES, paths)
    assert list(paths[0].parent.iterdir()) == []


def test_a_folder_comes_without_its_weights(tmp_path: Path) -> None:
    there, here = tmp_path / "there", received_folder(tmp_path / "cache", "f" * 32)
    there.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (there / name).write_text(name)
    (there / "folder").mkdir()
    store_files(small_files(there), here)
    assert {path.name: path.read_text() for path in here.iterdir()} == {
        "config.json": "config.json",
        "tokenizer.json": "tokenizer.json",
    }
    # Again, by another process: what is there stays.
    store_files({"config.json": b"other"}, here)
    assert (here / "config.json").read_text() == "config.json"
    assert [path.name for path in here.parent.iterdir()] == [here.name]


def test_no_file_is_stored_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"named '\.\./outside'"):
        store_files({"../outside": b""}, tmp_path / "cache" / "model")
    assert not (tmp_path / "cache" / "model").exists()
    assert not (tmp_path / "cache" / "outside").exists()
