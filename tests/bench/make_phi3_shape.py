"""Makes a network of Phi-3-mini's shape (3.8 billion parameters) with random weights, to measure speed with.

    python tests/bench/make_phi3_shape.py FOLDER                          # safetensors, 7.6 GB
    python tests/bench/make_phi3_shape.py FOLDER --gguf Q8_0 Q4_0         # FOLDER/phi3-shape.Q8_0.gguf, ...

Owns: the shape, the random numbers and both containers; the tokenizer is the built-in model's, cut to as many tokens as
Phi-3-mini has. What the network says makes no sense, but takes as long.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from phi_cluster.cluster.config import Config
from phi_cluster.model.checkpoint import expected_tensors
from phi_cluster.model.config import Phi3Config
from phi_cluster.model.hub import resolve_model
from phi_cluster.model.safetensors_writer import write_safetensors

CONFIG: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_DEVIATION = 0.02
# Random numbers are drawn once; every tensor is a row of pieces of them.
_BLOCK = 1 << 22
_PIECE = 1 << 20


class RandomWeights:
    """Numbers for tensors in order: each time other pieces of one block of normally distributed numbers."""

    def __init__(self, seed: int = 0):
        self._random = np.random.default_rng(seed)
        self.block = self._random.standard_normal(_BLOCK, dtype=np.float32) * np.float32(_DEVIATION)

    def pieces(self, name: str, count: int) -> Iterator[np.ndarray]:
        """float32 arrays with `count` numbers in all; ones for norms."""
        if "norm" in name:
            yield np.ones(count, dtype=np.float32)
            return
        for done in range(0, count, _PIECE):
            # Multiples of 32, the length of quantised groups.
            start = int(self._random.integers(0, (_BLOCK - _PIECE) // 32)) * 32
            yield self.block[start : start + min(_PIECE, count - done)]


def write_folder(folder: Path, config: dict[str, Any], tokenizer_from: Path) -> None:
    """Fills `folder` with config.json, model.safetensors (bfloat16) and the tokenizer of another folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    settings = (tokenizer_from / "tokenizer_config.json").read_text()
    (folder / "tokenizer_config.json").write_text(settings)
    tokenizer = json.loads((tokenizer_from / "tokenizer.json").read_text())
    cut_tokenizer(tokenizer, config["vocab_size"])
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    shapes = expected_tensors(Phi3Config.from_dict(config))
    weights = RandomWeights()
    pieces = (piece for name, shape in shapes.items() for piece in weights.pieces(name, prod(shape)))
    write_safetensors(folder / "model.safetensors", shapes, "bfloat16", pieces, {"format": "pt"})


def cut_tokenizer(tokenizer: dict[str, Any], vocab_size: int) -> None:
    """Leaves a byte-level BPE tokenizer.json its first `vocab_size` tokens and the merges that make them."""
    model = tokenizer["model"]
    model["vocab"] = {token: id_ for token, id_ in model["vocab"].items() if id_ < vocab_size}
    model["merges"] = [merge for merge in model["merges"] if "".join(merge) in model["vocab"]]


def write_gguf(path: Path, config: dict[str, Any], type_name: str) -> None:
    """The same shape for llama.cpp, all matrices as `type_name` (Q8_0, Q4_0), without a tokenizer."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    type_ = GGMLQuantizationType[type_name]
    writer = GGUFWriter(path, "phi3")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_tokenizer_model("no_vocab")
    shapes = expected_tensors(Phi3Config.from_dict(config))
    for name, shape in shapes.items():
        kind = GGMLQuantizationType.F32 if len(shape) == 1 else type_
        # Bytes of a quantised row stand in for its numbers.
        stored = shape if len(shape) == 1 else quants.quant_shape_to_byte_shape(shape, type_)
        dtype = np.dtype(np.float32 if len(shape) == 1 else np.uint8)
        writer.add_tensor_info(gguf_name(name), stored, dtype, prod(stored) * dtype.itemsize, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    weights = RandomWeights()
    block = quants.quantize(weights.block, type_)
    nbytes = len(block) * 32 // _BLOCK
    for shape in shapes.values():
        if len(shape) == 1:
            writer.write_tensor_data(np.ones(shape, dtype=np.float32))
        else:
            groups = prod(shape) // 32
            writer.write_tensor_data(np.resize(block, groups * nbytes).view(np.uint8))
    writer.close()


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.down_proj.weight` -> `blk.3.ffn_down.weight`."""
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    stem = name.removesuffix(".weight")
    if stem in names:
        return f"{names[stem]}.weight"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{names[part]}.weight"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--gguf", nargs="+", metavar="TYPE", help="write .gguf files instead")
    parser.add_argument("--cache-dir", type=Path, help="as in the server's configuration")
    parsed = parser.parse_args()
    config = CONFIG | {"num_hidden_layers": parsed.layers}
    if parsed.gguf:
        parsed.folder.mkdir(parents=True, exist_ok=True)
        for type_name in parsed.gguf:
            write_gguf(parsed.folder / f"phi3-shape.{type_name}.gguf", config, type_name)
        return
    cache_dir = parsed.cache_dir or Config().cache_path
    write_folder(parsed.folder, config, resolve_model("smollm2", cache_dir))


if __name__ == "__main__":
    main()
