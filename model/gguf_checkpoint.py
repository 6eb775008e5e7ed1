"""Turns a GGUF file into an ordinary Hugging Face folder of a `Phi3ForCausalLM`.

Owns: which tensors of a `llama` or `phi3` file make which Phi-3 weights, and the folder's files. Knows
nothing of where the file came from or where the folder is kept; the container is gguf_file's business, text
gguf_tokenizer's.

A Llama layer is a Phi-3 layer with q, k, v and gate, up not yet fused: concatenating their rows makes it one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phi_cluster.model.config import Phi3Config, UnsupportedModel
from phi_cluster.model.gguf_config import gguf_config
from phi_cluster.model.gguf_file import GGUFFile
from phi_cluster.model.gguf_tokenizer import TokenizerFiles, gguf_tokenizer
from phi_cluster.model.safetensors_writer import write_safetensors

# Up to this size float32 is stored: it holds every value that dequantising gives, and costs little.
_FLOAT32_NBYTES = 1 << 30
# Tensors that the config is made of, not the weights.
_CONFIG_TENSORS = ("rope_factors_short.weight", "rope_factors_long.weight")


@dataclass(frozen=True)
class _Part:
    """Rows that a weight takes from one GGUF tensor; `num_heads` is set where llama.cpp permuted them."""

    source: str
    num_rows: int
    num_heads: int | None = None


@dataclass(frozen=True)
class _Weight:
    name: str
    shape: tuple[int, ...]
    parts: tuple[_Part, ...]


def convert_gguf(
    path: Path,
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    largest_float32: int = _FLOAT32_NBYTES,
) -> None:
    """Writes config.json, generation_config.json, model.safetensors, the tokenizer's files and
    conversion.json into the existing `folder`. `progress` gets weights done and in all.

    Weights are float32 if that takes at most `largest_float32` bytes, else bfloat16 (what Phi-3's were
    trained in, half the disk and reading time; the rounding is far below that of any quantised source).
    Memory does not grow with the model. Raises GGUFError (broken file) or UnsupportedModel (whole, but not
    servable), each one sentence.
    """
    with GGUFFile(path) as file:
        fields = gguf_config(file)
        config = Phi3Config.from_dict(fields)
        weights = _plan(file, config)
        _check(file, weights)
        num_parameters = sum(int(np.prod(weight.shape, dtype=np.int64)) for weight in weights)
        dtype = "float32" if 4 * num_parameters <= largest_float32 else "bfloat16"
        text = gguf_tokenizer(file, config.vocab_size)
        write_safetensors(
            folder / "model.safetensors",
            {weight.name: weight.shape for weight in weights},
            dtype,
            _pieces(file, weights, progress),
            {"format": "pt"},
        )
        kinds = sorted({tensor.kind.name for tensor in file.tensors.values()})
    _write_text(folder, text, fields | {"torch_dtype": dtype})
    _write_json(
        folder / "conversion.json",
        {"source": path.name, "source_dtypes": kinds, "dtype": dtype, "num_parameters": num_parameters},
    )


def _plan(file: GGUFFile, config: Phi3Config) -> list[_Weight]:
    """Every Phi-3 weight, in the order in which the network uses them."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows = config.num_attention_heads * config.head_dim
    kv_rows = config.num_key_value_heads * config.head_dim
    is_llama = file.metadata["general.architecture"] == "llama"

    def whole(name: str, source: str, *shape: int) -> _Weight:
        return _Weight(name, shape, (_Part(source, shape[0]),))

    weights = [whole("model.embed_tokens.weight", "token_embd.weight", config.vocab_size, hidden)]
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        if f"{theirs}attn_qkv.weight" in file.tensors:
            qkv: tuple[_Part, ...] = (_Part(f"{theirs}attn_qkv.weight", q_rows + 2 * kv_rows),)
        else:
            qkv = (
                _Part(f"{theirs}attn_q.weight", q_rows, config.num_attention_heads if is_llama else None),
                _Part(f"{theirs}attn_k.weight", kv_rows, config.num_key_value_heads if is_llama else None),
                _Part(f"{theirs}attn_v.weight", kv_rows),
            )
        if is_llama:
            gate_up: tuple[_Part, ...] = (
                _Part(f"{theirs}ffn_gate.weight", inner),
                _Part(f"{theirs}ffn_up.weight", inner),
            )
        else:
            gate_up = (_Part(f"{theirs}ffn_up.weight", 2 * inner),)
        weights += [
            whole(f"{ours}input_layernorm.weight", f"{theirs}attn_norm.weight", hidden),
            _Weight(f"{ours}self_attn.qkv_proj.weight", (q_rows + 2 * kv_rows, hidden), qkv),
            whole(f"{ours}self_attn.o_proj.weight", f"{theirs}attn_output.weight", hidden, q_rows),
            whole(f"{ours}post_attention_layernorm.weight", f"{theirs}ffn_norm.weight", hidden),
            _Weight(f"{ours}mlp.gate_up_proj.weight", (2 * inner, hidden), gate_up),
            whole(f"{ours}mlp.down_proj.weight", f"{theirs}ffn_down.weight", hidden, inner),
        ]
    weights.append(whole("model.norm.weight", "output_norm.weight", hidden))
    if not config.tie_word_embeddings:
        weights.append(whole("lm_head.weight", "output.weight", config.vocab_size, hidden))
    return weights


def _check(file: GGUFFile, weights: list[_Weight]) -> None:
    """Each planned tensor is there with the right shape, and there is none that the plan would drop."""
    expected = {part.source: (part.num_rows, *weight.shape[1:]) for weight in weights for part in weight.parts}
    for name, shape in expected.items():
        if name not in file.tensors:
            raise UnsupportedModel(f"{file.path}: there is no tensor {name}")
        if file.tensors[name].shape != shape:
            raise UnsupportedModel(
                f"{file.path}: tensor {name} has shape {list(file.tensors[name].shape)}, expected is {list(shape)}"
            )
    for name in file.tensors:
        if name not in expected and name not in _CONFIG_TENSORS:
            raise UnsupportedModel(f"{file.path}: tensor {name} has no place in a Phi-3 network")


def _pieces(file: GGUFFile, weights: list[_Weight], progress: Callable[[int, int], None]) -> Iterator[np.ndarray]:
    for done, weight in enumerate(weights):
        progress(done, len(weights))
        for part in weight.parts:
            if part.num_heads is None:
                yield from file.rows(part.source)
            else:
                head_dim = part.num_rows // part.num_heads
                for rows in file.rows(part.source, multiple=head_dim):
                    yield undo_permutation(rows, len(rows) // head_dim)
    progress(len(weights), len(weights))


def undo_permutation(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows [num_heads * head_dim, hidden] of q or k as Hugging Face orders them.

    llama.cpp rotates neighbouring dimensions (2i, 2i + 1), Hugging Face (i, i + head_dim / 2), so llama.cpp's
    convert_hf_to_gguf.py (`permute`) interleaves the two halves of every head; this is the way back.
    """
    return rows.reshape(num_heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def _write_text(folder: Path, text: TokenizerFiles, config: dict[str, Any]) -> None:
    ids = {
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_ids[0] if text.eos_token_ids else None,
    }
    ids["pad_token_id"] = ids["eos_token_id"] if text.pad_token_id is None else text.pad_token_id
    _write_json(folder / "tokenizer.json", text.tokenizer)
    _write_json(folder / "tokenizer_config.json", text.tokenizer_config)
    _write_json(folder / "config.json", config | ids)
    _write_json(folder / "generation_config.json", ids | {"eos_token_id": list(text.eos_token_ids)})


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
