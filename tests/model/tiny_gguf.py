"""Writes small GGUF files with the `gguf` package's own writer. Loaded by path, because test files cannot
import each other.

Owns: a two-layer network's shapes under llama.cpp's names, and two tiny vocabularies.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from phi_cluster.model.byte_level import BYTE_OF_CHAR

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2
HEAD_DIM = HIDDEN // HEADS
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MERGES = ("Ġ t", "h e", "Ġt he", "1 2")
BYTE_TOKENS = [*SPECIALS, *BYTE_OF_CHAR, *(merge.replace(" ", "") for merge in MERGES)]
# A few rows more than there are tokens, as real embeddings have.
VOCAB = 288


def byte_level_vocabulary(pre: str = "smollm") -> dict[str, Any]:
    """Metadata of a byte-level BPE vocabulary."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": BYTE_TOKENS,
        "tokenizer.ggml.token_type": [3] * len(SPECIALS) + [1] * (len(BYTE_TOKENS) - len(SPECIALS)),
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def sentencepiece_vocabulary() -> dict[str, Any]:
    """Metadata of a SentencePiece BPE vocabulary with a token for each byte."""
    words = ["▁", "t", "h", "e", "s", ">", "</", "s>", "th", "he", "▁t", "the", "▁the"]
    tokens = ["<unk>", "<s>", "</s>", "<|end|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [2, 3, 3, 3, *[6] * 256]
    scores = [0.0] * len(tokens) + [-float(i) for i in range(len(words))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens + words,
        "tokenizer.ggml.token_type": kinds + [1] * len(words),
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def network(architecture: str = "llama") -> dict[str, Any]:
    """Metadata of the network."""
    fields = {
        "context_length": 128,
        "embedding_length": HIDDEN,
        "feed_forward_length": INNER,
        "block_count": LAYERS,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
    }
    return {f"{architecture}.{name}": value for name, value in fields.items()}


def tensors(architecture: str = "llama", seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights under llama.cpp's names, without output.weight (tied)."""
    random = np.random.default_rng(seed)
    q, kv = HIDDEN, KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        if architecture == "llama":
            fused = {"attn_q": (q, HIDDEN), "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN)}
            fused |= {"ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN)}
        else:
            fused = {"attn_qkv": (q + 2 * kv, HIDDEN), "ffn_up": (2 * INNER, HIDDEN)}
        both = {"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "attn_output": (HIDDEN, q), "ffn_down": (HIDDEN, INNER)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in (fused | both).items()}
    return {name: random.normal(0, 0.05, shape).astype(np.float32) for name, shape in shapes.items()}


def write(
    path: Path,
    *,
    architecture: str = "llama",
    weights: Mapping[str, np.ndarray] | None = None,
    metadata: Mapping[str, Any] | None = None,
    vocabulary: Mapping[str, Any] | None = None,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
) -> Path:
    """A whole file; matrices are quantised to `kind`. A value of None in `metadata` leaves that key out."""
    writer = GGUFWriter(path, architecture)
    values = network(architecture) | dict(vocabulary or byte_level_vocabulary()) | dict(metadata or {})
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, array in (tensors(architecture) if weights is None else weights).items():
        if array.ndim > 1 and kind != GGMLQuantizationType.F32:
            writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
