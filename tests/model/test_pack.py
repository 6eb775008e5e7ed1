"""Packing in a process of its own: what it prints, writes and returns."""

from __future__ import annotations

import errno
import json
import os

import numpy as np
import pytest
import torch

from phi_cluster.model import pack
from phi_cluster.model.flat_weights import WeightIndex, pack_weights


@pytest.fixture(autouse=True)
def _torch_threads():
    """The command's process ends; this one goes on."""
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_weights_index_and_progress(checkpoint, tmp_path, capsys, dtype):
    tiny = checkpoint("tied")
    weights, index = tmp_path / "weights", tmp_path / "index"
    assert pack.main([str(tiny.folder), dtype, str(weights), str(index)]) == 0
    expected, expected_index = pack_weights(tiny.folder, tiny.config, dtype)
    assert np.array_equal(np.fromfile(weights, np.uint8), expected)
    assert WeightIndex.from_dict(json.loads(index.read_text())) == expected_index
    told = [tuple(map(int, line.split())) for line in capsys.readouterr().out.splitlines()]
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] > 0
    assert sorted(tmp_path.iterdir()) == [index, weights]


def test_what_cannot_be_packed_is_one_line(tiny_folder, tmp_path, capsys, monkeypatch):
    weights, index = tmp_path / "weights", tmp_path / "index"

    def error(dtype: str = "int8") -> str:
        assert pack.main([str(tiny_folder), dtype, str(weights), str(index)]) == 1
        out, err = capsys.readouterr()
        assert (out, err.count("\n"), err[:7]) == ("", 1, "error: ")
        assert not index.exists()
        return err

    assert "dtype is int3: float32, bfloat16, int8, int4 are expected" in error("int3")

    def full(descriptor, offset, length):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        assert error() == f"error: cannot pack {tiny_folder} into {weights}: No space left on device\n"
    (tiny_folder / "model.safetensors").unlink()
    assert "holds no weights" in error()
