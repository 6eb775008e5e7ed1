"""The flat buffer: what is in it, that views copy nothing, and that protected pages cannot be written."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from phi_cluster.model.checkpoint import CheckpointError, expected_tensors, iter_tensors
from phi_cluster.model.config import Phi3Config, model_fingerprint
from phi_cluster.model.flat_weights import (
    ALIGNMENT,
    WeightIndex,
    pack_weights,
    protect_read_only,
    view_weights,
)
from phi_cluster.model.kv_cache import KVCache
from phi_cluster.model.kv_layout import KVCacheLayout
from phi_cluster.model.phi3 import Phi3ForCausalLM, SequenceChunk
from phi_cluster.model.quantize import quantize_int4, quantize_int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_hold_the_checkpoints_numbers(checkpoint, dtype):
    tiny = checkpoint("gqa")
    buffer, index = pack_weights(tiny.folder, tiny.config, dtype)
    views = view_weights(buffer, index)
    original = dict(iter_tensors(tiny.folder, tiny.config))
    assert views.keys() == original.keys()
    for name, view in views.items():
        assert view.dtype == dtype
        assert torch.equal(view, original[name].to(dtype))
    assert index.dtype == str(dtype).removeprefix("torch.")
    assert index.fingerprint == model_fingerprint(tiny.folder)


def test_shards_pack_to_the_same_bytes(checkpoint, sharded_folder):
    tiny = checkpoint("gqa")
    single, single_index = pack_weights(tiny.folder, tiny.config, torch.float32)
    sharded, sharded_index = pack_weights(sharded_folder, tiny.config, torch.float32)
    assert np.array_equal(single, sharded)
    assert single_index.entries == sharded_index.entries


def test_views_are_aligned_and_copy_nothing(checkpoint):
    tiny = checkpoint("gqa")
    buffer, index = pack_weights(tiny.folder, tiny.config, torch.bfloat16)
    end = 0
    for name, view in view_weights(buffer, index).items():
        entry = next(entry for entry in index.entries if entry.name == name)
        assert view.data_ptr() == buffer.ctypes.data + entry.offset
        assert view.data_ptr() % ALIGNMENT == 0
        assert entry.offset >= end
        end = entry.offset + entry.nbytes
    assert end <= index.nbytes


def test_views_keep_the_buffer_alive(checkpoint):
    tiny = checkpoint("gqa")
    views = view_weights(*pack_weights(tiny.folder, tiny.config, torch.float32))
    assert torch.equal(views["model.norm.weight"], tiny.reference.model.norm.weight)


def test_a_read_only_buffer_is_viewed_without_a_warning(checkpoint):
    # Warnings are errors here.
    tiny = checkpoint("gqa")
    buffer, index = pack_weights(tiny.folder, tiny.config, torch.float32)
    buffer.flags.writeable = False
    assert len(view_weights(buffer, index)) == len(index.entries)


def test_a_tied_head_is_stored_once(checkpoint):
    tied, untied = (checkpoint(variant) for variant in ("tied", "gqa"))
    _, tied_index = pack_weights(tied.folder, tied.config, torch.float32)
    _, untied_index = pack_weights(untied.folder, untied.config, torch.float32)
    names = [entry.name for entry in tied_index.entries]
    assert "lm_head.weight" not in names
    assert [entry.name for entry in untied_index.entries] == [*names, "lm_head.weight"]
    head_nbytes = 131 * 64 * 4
    assert 0 <= untied_index.nbytes - tied_index.nbytes - head_nbytes < ALIGNMENT


LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("variant", ["gqa", "tied"])
def test_quantised_weights_are_the_checkpoints_and_the_head_is_always_there(checkpoint, variant, dtype):
    tiny = checkpoint(variant)
    buffer, index = pack_weights(tiny.folder, tiny.config, dtype)
    views = view_weights(buffer, index)
    original = dict(iter_tensors(tiny.folder, tiny.config))
    expected = {"model.embed_tokens.weight": original["model.embed_tokens.weight"].bfloat16()}
    for name, tensor in original.items():
        base = name.removesuffix(".weight")
        if "norm" in name:
            expected[name] = tensor.float()
        elif base.endswith(LINEARS):
            quantise = quantize_int8 if dtype == "int8" else quantize_int4
            expected[f"{base}.weight"], expected[f"{base}.scale"] = quantise(tensor)
    head = original["model.embed_tokens.weight" if variant == "tied" else "lm_head.weight"]
    expected["lm_head.weight"], expected["lm_head.scale"] = quantize_int8(head)
    assert views.keys() == expected.keys()
    for name, view in views.items():
        assert view.dtype == expected[name].dtype
        assert torch.equal(view, expected[name]), name
        assert view.data_ptr() % ALIGNMENT == 0
    assert index.dtype == dtype


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
def test_a_file_holds_the_same_bytes(checkpoint, tmp_path, dtype):
    tiny = checkpoint("tied")
    expected, expected_index = pack_weights(tiny.folder, tiny.config, dtype)
    path = tmp_path / "weights"
    # What an interrupted packing left.
    path.write_bytes(b"x" * 10)
    buffer, index = pack_weights(tiny.folder, tiny.config, dtype, path=path, num_threads=2)
    assert index == expected_index
    assert path.read_bytes() == expected.tobytes() == buffer.tobytes()


def test_a_full_disk_is_an_error_before_anything_is_written(checkpoint, tmp_path, monkeypatch):
    def full(descriptor, offset, length):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    tiny = checkpoint("gqa")
    with pytest.raises(OSError, match="No space left"):
        pack_weights(tiny.folder, tiny.config, "int4", path=tmp_path / "weights")


def test_packing_into_a_file_takes_little_memory_of_its_own(tmp_path):
    """Neither the buffer nor a tensor: 17 million numbers in the largest one, read and written as pages of files."""
    config = Phi3Config(
        vocab_size=16384,
        hidden_size=1024,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=64,
        original_max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    save_file(
        {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in expected_tensors(config).items()},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps(asdict(config) | {"architectures": ["Phi3ForCausalLM"]}))
    grown = []
    before = private_bytes()
    pack_weights(
        tmp_path,
        config,
        "int4",
        lambda done, total: grown.append((total, private_bytes() - before)),
        tmp_path / "weights",
    )
    assert grown[-1][0] > 48 << 20
    assert max(private for _, private in grown) < 24 << 20


def private_bytes() -> int:
    [line] = [one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("RssAnon")]
    return int(line.split()[1]) << 10


@pytest.mark.parametrize("dtype", ["float32", "int4"])
def test_the_index_survives_json(checkpoint, dtype):
    tiny = checkpoint("gqa")
    _, index = pack_weights(tiny.folder, tiny.config, dtype)
    assert WeightIndex.from_dict(json.loads(json.dumps(index.to_dict()))) == index


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_progress_ends_at_the_total(checkpoint, dtype):
    tiny = checkpoint("tied")
    told: list[tuple[int, int]] = []
    _, index = pack_weights(tiny.folder, tiny.config, dtype, lambda done, total: told.append((done, total)))
    total = sum(entry.nbytes for entry in index.entries)
    assert len(told) == len(expected_tensors(tiny.config))
    assert told == sorted(told)
    assert told[-1] == (total, total)


def test_a_network_over_protected_weights_computes_the_same(checkpoint):
    tiny = checkpoint("tied")
    buffer, index = pack_weights(tiny.folder, tiny.config, torch.float32)
    protect_read_only(buffer)
    model = Phi3ForCausalLM(tiny.config, view_weights(buffer, index), torch.float32)
    ids = torch.arange(3, 20)
    cache = KVCache(KVCacheLayout.for_config(tiny.config, 32, 4), torch.float32)
    logits = model.forward_all(SequenceChunk(ids, 0, cache))
    assert (logits - tiny.reference_logits(ids)).abs().max() < 1e-4


WRITE = """
import resource, sys, torch
from phi_cluster.model.config import Phi3Config
from phi_cluster.model.flat_weights import pack_weights, protect_read_only, view_weights
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
folder, name, place, shift = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
packed, index = pack_weights(folder, Phi3Config.from_folder(folder), torch.float32)
import numpy as np
# A mapping that begins anywhere on a page, as an object store's may.
room = np.empty(index.nbytes + 8192, np.uint8)
begin = -room.ctypes.data % 4096 + shift
buffer = room[begin : begin + index.nbytes]
buffer[:] = packed
views = view_weights(buffer, index)
protect_read_only(buffer)
assert float(views[name].flatten()[place]) != 42
print("protected", flush=True)
views[name].flatten()[place] = 42
print("written", flush=True)
"""


@pytest.mark.parametrize(
    ("name", "place", "shift"),
    [("model.embed_tokens.weight", 0, 64), ("lm_head.weight", -1, 64), ("model.norm.weight", 5, 0)],
    ids=["first byte", "last byte", "middle"],
)
def test_a_write_to_protected_weights_faults(checkpoint, name, place, shift):
    command = [sys.executable, "-c", WRITE, str(checkpoint("gqa").folder), name, str(place), str(shift)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.stdout == "protected\n"
    assert result.returncode == -signal.SIGSEGV


def test_a_buffer_without_a_whole_page_is_left_alone():
    small = np.zeros(100, np.uint8)
    protect_read_only(small)
    small[:] = 1
    assert small.all()


def test_broken_checkpoints_and_wrong_sizes_are_refused(checkpoint, tiny_folder):
    tiny = checkpoint("gqa")
    buffer, index = pack_weights(tiny.folder, tiny.config, torch.float32)
    with pytest.raises(ValueError, match="the weights' buffer is uint8"):
        view_weights(buffer[:-1], index)
    with pytest.raises(ValueError, match="the weights' buffer is int8"):
        view_weights(buffer.view(np.int8), index)
    with pytest.raises(ValueError, match=r"dtype is torch\.float16"):
        pack_weights(tiny.folder, tiny.config, torch.float16)
    tensors = dict(iter_tensors(tiny_folder, tiny.config))
    tensors["model.layers.1.mlp.down_proj.weight"][3, 3] = float("nan")
    save_file(tensors, tiny_folder / "model.safetensors")
    for dtype in ("int8", "int4"):
        with pytest.raises(
            ValueError, match=r"model\.layers\.1\.mlp\.down_proj\.weight holds numbers that are not finite"
        ):
            pack_weights(tiny_folder, tiny.config, dtype)
    (tiny_folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        pack_weights(tiny_folder, tiny.config, torch.float32)
