"""GGUF files become the networks they were made of, and what is no Phi-3 is refused by name."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Phi3ForCausalLM

from phi_cluster.model.config import Phi3Config, UnsupportedModel
from phi_cluster.model.gguf_checkpoint import convert_gguf, undo_permutation
from phi_cluster.model.gguf_file import GGUFError, GGUFFile
from phi_cluster.model.safetensors_writer import to_bfloat16_bits, write_safetensors

tiny = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_gguf.py"))))


def permute(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's convert_hf_to_gguf.py does to q and k."""
    rows, columns = weights.shape
    return weights.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def converted(path: Path, folder: Path) -> Path:
    folder.mkdir()
    convert_gguf(path, folder)
    return folder


def refusal(path: Path, tmp_path: Path) -> str:
    """The message with which conversion is refused."""
    folder = tmp_path / "refused"
    folder.mkdir(exist_ok=True)
    with pytest.raises((UnsupportedModel, GGUFError)) as caught:
        convert_gguf(path, folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def llama_as_gguf(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    weights = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    weights["output.weight"] = state["lm_head.weight"]
    for layer in range(tiny.LAYERS):
        for ours, theirs in names.items():
            value = state[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                value = permute(value, tiny.HEADS if theirs == "attn_q" else tiny.KV_HEADS)
            weights[f"blk.{layer}.{theirs}.weight"] = np.ascontiguousarray(value)
    return weights


def test_llama_file_computes_what_llama_computed(tmp_path: Path) -> None:
    torch.manual_seed(1)
    reference = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tiny.VOCAB,
            hidden_size=tiny.HIDDEN,
            intermediate_size=tiny.INNER,
            num_hidden_layers=tiny.LAYERS,
            num_attention_heads=tiny.HEADS,
            num_key_value_heads=tiny.KV_HEADS,
            max_position_embeddings=128,
            rms_norm_eps=1e-5,
            initializer_range=0.2,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        )
    ).eval()
    path = tiny.write(
        tmp_path / "llama.gguf", weights=llama_as_gguf(reference), metadata={"llama.rope.freq_base": 500.0}
    )
    folder = converted(path, tmp_path / "hf")
    model = Phi3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    token_ids = torch.randint(0, tiny.VOCAB, (2, 40))
    with torch.inference_mode():
        expected, actual = reference(token_ids).logits, model(token_ids).logits
    assert expected.std() > 0.1
    assert torch.allclose(actual, expected, atol=1e-4)
    assert not model.config.tie_word_embeddings


def test_phi3_file_keeps_its_fused_tensors(tmp_path: Path) -> None:
    weights = tiny.tensors("phi3")
    folder = converted(tiny.write(tmp_path / "phi3.gguf", architecture="phi3"), tmp_path / "hf")
    stored = load_file(folder / "model.safetensors")
    for layer in range(tiny.LAYERS):
        for ours, theirs in (("self_attn.qkv_proj", "attn_qkv"), ("mlp.gate_up_proj", "ffn_up")):
            expected = weights[f"blk.{layer}.{theirs}.weight"]
            assert np.array_equal(stored[f"model.layers.{layer}.{ours}.weight"], expected)
    assert "lm_head.weight" not in stored
    assert Phi3Config.from_folder(folder).tie_word_embeddings


def test_longrope_and_window_come_from_the_file(tmp_path: Path) -> None:
    pairs = tiny.HEAD_DIM // 4
    weights = tiny.tensors("phi3")
    weights["rope_factors_short.weight"] = np.linspace(1, 1.5, pairs, dtype=np.float32)
    weights["rope_factors_long.weight"] = np.linspace(2, 9.3, pairs, dtype=np.float32)
    metadata = {
        "phi3.context_length": 4096,
        "phi3.rope.scaling.original_context_length": 256,
        "phi3.rope.scaling.attn_factor": float(np.sqrt(1 + np.log(16) / np.log(256))),
        "phi3.rope.dimension_count": tiny.HEAD_DIM // 2,
        "phi3.attention.sliding_window": 33,
    }
    path = tiny.write(tmp_path / "long.gguf", architecture="phi3", weights=weights, metadata=metadata)
    config = Phi3Config.from_folder(converted(path, tmp_path / "hf"))
    assert config.rope_scaling is not None
    # Hugging Face's own attention factor need not be written down.
    assert set(config.rope_scaling) == {"rope_type", "short_factor", "long_factor"}
    assert config.rope_scaling["long_factor"][-1] == 9.3
    assert (config.original_max_position_embeddings, config.max_position_embeddings) == (256, 4096)
    assert config.partial_rotary_factor == 0.5
    assert config.sliding_window == 33


def test_an_unusual_attention_factor_is_kept(tmp_path: Path) -> None:
    weights = tiny.tensors("phi3")
    for name in ("rope_factors_short.weight", "rope_factors_long.weight"):
        weights[name] = np.ones(tiny.HEAD_DIM // 2, np.float32)
    path = tiny.write(
        tmp_path / "x.gguf",
        architecture="phi3",
        weights=weights,
        metadata={"phi3.rope.scaling.attn_factor": 1.25, "phi3.rope.scaling.original_context_length": 64},
    )
    config = Phi3Config.from_folder(converted(path, tmp_path / "hf"))
    assert config.rope_scaling is not None
    assert config.rope_scaling["attention_factor"] == 1.25


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F16", "BF16"])
def test_quantised_values_are_dequantised(tmp_path: Path, kind: str) -> None:
    quantisation = GGMLQuantizationType[kind]
    path = tiny.write(tmp_path / "q.gguf", kind=quantisation)
    folder = converted(path, tmp_path / "hf")
    down = tiny.tensors()["blk.1.ffn_down.weight"]
    expected = dequantize(quantize(down, quantisation), quantisation)
    stored = load_file(folder / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert np.array_equal(stored, expected)
    assert kind in json.loads((folder / "conversion.json").read_text())["source_dtypes"]


def test_permutation_is_undone() -> None:
    rows = np.random.default_rng(0).normal(size=(tiny.HIDDEN, 5)).astype(np.float32)
    permuted = permute(rows, tiny.HEADS)
    assert not np.array_equal(permuted, rows)
    assert np.array_equal(undo_permutation(permuted, tiny.HEADS), rows)


def test_the_folder_is_what_transformers_expects(tmp_path: Path) -> None:
    folder = converted(tiny.write(tmp_path / "m.gguf"), tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert chat == "<|im_start|>user\nx<|im_end|>\n"
    # The digits of a number are single tokens although there is a merge for 12.
    assert tokenizer.tokenize(" the 12") == ["Ġthe", "Ġ", "1", "2"]
    assert Phi3Config.from_folder(folder).eos_token_id == (2, 0)


def test_large_models_are_stored_as_bfloat16(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m.gguf")
    (tmp_path / "hf").mkdir()
    convert_gguf(path, tmp_path / "hf", largest_float32=1000)
    stored = load_torch_file(tmp_path / "hf" / "model.safetensors")
    expected = torch.from_numpy(tiny.tensors()["token_embd.weight"]).to(torch.bfloat16)
    assert torch.equal(stored["model.embed_tokens.weight"], expected)
    assert Phi3Config.from_folder(tmp_path / "hf").torch_dtype == "bfloat16"


def test_progress_is_told(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    (tmp_path / "hf").mkdir()
    convert_gguf(tiny.write(tmp_path / "m.gguf"), tmp_path / "hf", lambda *event: seen.append(event))
    assert seen[0] == (0, 14)
    assert seen[-1] == (14, 14)
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"general.architecture": "mamba"}, "general.architecture is 'mamba'"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn'"),
        ({"llama.rope.scaling.factor": 4.0}, "llama.rope.scaling.factor is 4.0"),
        ({"llama.attention.key_length": 32}, "llama.attention.key_length is 32"),
        ({"llama.attention.head_count": 7}, "llama.attention.head_count is 7"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count is 8"),
        ({"llama.block_count": None}, "no llama.block_count"),
        ({"llama.block_count": 3}, "no tensor blk.2.attn_norm.weight"),
        ({"llama.block_count": 1}, "tensor blk.1."),
        ({"llama.feed_forward_length": 32}, "expected is [32, 64]"),
        ({"tokenizer.ggml.pre": "martian"}, "tokenizer.ggml.pre is 'martian'"),
        ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre is None"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        ({"tokenizer.ggml.eos_token_id": 9999}, "tokenizer.ggml.eos_token_id is 9999"),
        ({"tokenizer.ggml.merges": None}, "no tokenizer.ggml.merges"),
        ({"tokenizer.ggml.tokens": None}, "no tokenizer.ggml.tokens"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, metadata: dict[str, Any], named: str) -> None:
    architecture = metadata.pop("general.architecture", "llama")
    path = tiny.write(tmp_path / "m.gguf", architecture=architecture, metadata=metadata, weights=tiny.tensors())
    assert named in refusal(path, tmp_path)


@pytest.mark.parametrize("name", ["rope_freqs.weight", "blk.0.attn_q.bias"])
def test_a_tensor_without_a_place_is_named(tmp_path: Path, name: str) -> None:
    weights = tiny.tensors() | {name: np.ones(8, np.float32)}
    assert name in refusal(tiny.write(tmp_path / "m.gguf", weights=weights), tmp_path)


def test_quantisation_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    weights = tiny.tensors() | {"blk.0.ffn_norm.weight": np.ones(tiny.HIDDEN, np.int32)}
    assert "blk.0.ffn_norm.weight has quantisation I32" in refusal(
        tiny.write(tmp_path / "m.gguf", weights=weights), tmp_path
    )


def test_a_file_cut_anywhere_is_called_truncated(tmp_path: Path) -> None:
    whole = tiny.write(tmp_path / "m.gguf").read_bytes()
    with GGUFFile(tmp_path / "m.gguf") as file:
        first = min(tensor.offset for tensor in file.tensors.values())
    cut = tmp_path / "cut.gguf"
    for length in [*range(5, first, 97), first + 1, len(whole) - 4096]:
        cut.write_bytes(whole[:length])
        assert "truncated" in refusal(cut, tmp_path), length


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04 something else entirely", "not a GGUF file"),
        (b"GGUF\x09\0\0\0" + b"\0" * 64, "GGUF version is 9"),
        (b"GGUF\0\0\0\x03" + b"\0" * 64, "big-endian"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 64, "truncated"),
        (b"GGUF\x03\0\0\0" + b"\0" * 16, "general.architecture is None"),
    ],
)
def test_what_is_no_gguf_file_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    assert said in refusal(path, tmp_path)


def test_rows_come_in_bounded_pieces(tmp_path: Path) -> None:
    big = np.arange(5_000_000, dtype=np.float32).reshape(-1, 50)
    path = tiny.write(tmp_path / "big.gguf", weights={"big": big})
    with GGUFFile(path) as file:
        pieces = list(file.rows("big", multiple=20))
    assert len(pieces) > 1
    assert all(piece.nbytes <= 16 << 20 and len(piece) % 20 == 0 for piece in pieces)
    assert np.array_equal(np.concatenate(pieces), big)


def test_bfloat16_is_rounded_as_torch_rounds(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    values = random.integers(0, 1 << 32, 100_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate(
        [values, np.array([0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, 1e-45, 1.00390625], np.float32)]
    )
    expected = torch.from_numpy(values).to(torch.bfloat16)
    write_safetensors(tmp_path / "x.safetensors", {"x": values.shape}, "bfloat16", [values[:7], values[7:]], {})
    stored = load_torch_file(tmp_path / "x.safetensors")["x"]
    assert torch.equal(torch.isnan(stored), torch.isnan(expected))
    finite = ~torch.isnan(expected)
    assert torch.equal(stored[finite].view(torch.int16), expected[finite].view(torch.int16))
    assert to_bfloat16_bits(np.full(1, np.nan, np.float32))[0] == 0x7FC0


def test_a_writer_that_gets_too_little_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="need 16 bytes, 12 came"):
        write_safetensors(tmp_path / "x", {"x": (2, 2)}, "float32", [np.zeros(3, np.float32)], {})
