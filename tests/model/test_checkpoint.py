"""Reading safetensors folders, and the one sentence for each way in which they are broken."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from phi_cluster.model.checkpoint import CheckpointError, check_checkpoint, expected_tensors, iter_tensors
from phi_cluster.model.config import Phi3Config

INDEX = "model.safetensors.index.json"


def config_of(folder: Path) -> Phi3Config:
    return Phi3Config.from_folder(folder)


def assert_refused(folder: Path, message: str) -> None:
    config = config_of(folder)
    # Before the first tensor is asked for.
    with pytest.raises(CheckpointError, match=message) as refusal:
        iter_tensors(folder, config)
    assert "\n" not in str(refusal.value)


def rewrite(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("variant", ["gqa", "mha", "tied", "partial", "longrope"])
def test_expected_tensors_are_what_transformers_saves(checkpoint, variant):
    tiny = checkpoint(variant)
    saved = load_file(tiny.folder / "model.safetensors")
    assert expected_tensors(tiny.config) == {name: tuple(tensor.shape) for name, tensor in saved.items()}


def test_a_single_file_and_shards_hold_the_same(checkpoint, sharded_folder):
    tiny = checkpoint("gqa")
    single = dict(iter_tensors(tiny.folder, tiny.config))
    sharded = dict(iter_tensors(sharded_folder, tiny.config))
    assert len(list(sharded_folder.glob("*.safetensors"))) > 2
    assert len(check_checkpoint(sharded_folder, tiny.config)) > 2
    assert single.keys() == sharded.keys() == expected_tensors(tiny.config).keys()
    assert all(torch.equal(single[name], sharded[name]) for name in single)
    assert torch.equal(single["model.norm.weight"], tiny.reference.model.norm.weight)


def test_no_weights_at_all(tiny_folder):
    (tiny_folder / "model.safetensors").unlink()
    assert_refused(tiny_folder, "holds no weights: model.safetensors or")
    (tiny_folder / "pytorch_model.bin").write_bytes(b"x")
    assert_refused(tiny_folder, r"holds weights as \.bin only")


def test_missing_shard(sharded_folder):
    shard = sorted(sharded_folder.glob("*.safetensors"))[1]
    shard.unlink()
    assert_refused(sharded_folder, f"lacks the file {shard.name}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is broken: JSONDecodeError"),
        ("[]", "is broken: TypeError"),
        ("{}", "is broken: KeyError 'weight_map'"),
        ('{"weight_map": 3}', "is broken: AttributeError"),
        ('{"weight_map": {"a": []}}', "is broken: TypeError"),
        ('{"weight_map": {}}', "names no files"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "names .*, which is not in its folder"),
        ('{"weight_map": {"a": 3}}', "names the file 3"),
        (b"\xff\xfe".decode("latin1"), "is broken"),
    ],
)
def test_broken_index(sharded_folder, text, message):
    (sharded_folder / INDEX).write_text(text)
    assert_refused(sharded_folder, re.escape(INDEX) + " " + message)


def test_missing_tensor(tiny_folder):
    rewrite(tiny_folder, lambda tensors: tensors.pop("model.layers.1.mlp.down_proj.weight"))
    assert_refused(tiny_folder, r"lack model\.layers\.1\.mlp\.down_proj\.weight$")
    rewrite(tiny_folder, lambda tensors: tensors.pop("model.norm.weight"))
    assert_refused(tiny_folder, r"lack model\.layers\.1\.mlp\.down_proj\.weight and 1 more tensors$")


def test_an_index_that_forgets_a_shard_lacks_its_tensors(sharded_folder):
    index = json.loads((sharded_folder / INDEX).read_text())
    dropped = index["weight_map"]["model.norm.weight"]
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != dropped}
    (sharded_folder / INDEX).write_text(json.dumps(index))
    assert_refused(sharded_folder, "the weights in .* lack ")


def test_an_unexpected_tensor(tiny_folder):
    rewrite(tiny_folder, lambda tensors: tensors.update({"model.layers.0.self_attn.qkv_proj.bias": torch.ones(3)}))
    assert_refused(tiny_folder, r"holds the tensor model\.layers\.0\.self_attn\.qkv_proj\.bias, which the network")


def test_tensors_that_are_computed_anyway_are_ignored(checkpoint, tiny_folder):
    rewrite(
        tiny_folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)})
    )
    assert "rotary_emb" not in "".join(dict(iter_tensors(tiny_folder, config_of(tiny_folder))))


def test_a_tied_head_that_is_stored_all_the_same_is_ignored(checkpoint, tmp_path):
    tiny = checkpoint("tied")
    tensors = load_file(tiny.folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert "lm_head.weight" not in dict(iter_tensors(tmp_path, tiny.config))


def test_one_tensor_in_two_shards(sharded_folder):
    first, second, *_ = sorted(sharded_folder.glob("*.safetensors"))
    save_file(load_file(first) | load_file(second), second)
    assert_refused(sharded_folder, "both hold the tensor")


def test_wrong_shape(tiny_folder):
    rewrite(tiny_folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(65)}))
    assert_refused(tiny_folder, r"model\.norm\.weight in model\.safetensors has shape \[65\], but .* for \[64\]")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_unsupported_dtype(tiny_folder, dtype):
    rewrite(tiny_folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64).to(dtype)}))
    assert_refused(tiny_folder, r"model\.norm\.weight in model\.safetensors has dtype \w+: supported are F32")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_it_is(tiny_folder, dtype):
    rewrite(tiny_folder, lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    assert {tensor.dtype for _, tensor in iter_tensors(tiny_folder, config_of(tiny_folder))} == {dtype}


@pytest.mark.parametrize("kept", [0.99, 0.5])
def test_truncated_file(tiny_folder, kept):
    path = tiny_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    assert_refused(tiny_folder, r"model\.safetensors is truncated")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"version https://git-lfs.github.com/spec/v1\n", bytes(500)])
def test_not_safetensors(tiny_folder, content):
    (tiny_folder / "model.safetensors").write_bytes(content)
    assert_refused(tiny_folder, r"model\.safetensors is not a safetensors file")


def test_a_file_that_is_cut_within_its_header(tiny_folder):
    path = tiny_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assert_refused(tiny_folder, r"model\.safetensors is (truncated|not a safetensors file)")
