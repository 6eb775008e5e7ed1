"""Tiny networks with random int8 or int4 weights, without a checkpoint.

A dtype here is that of the weights, or, as "int8_int8", also that of what meets int8 weights (else int16).
"""

from __future__ import annotations

from typing import Any

import torch

from phi_cluster.model.checkpoint import expected_tensors
from phi_cluster.model.config import Phi3Config
from phi_cluster.model.kv_cache import KVCache
from phi_cluster.model.kv_layout import KVCacheLayout
from phi_cluster.model.ops import library
from phi_cluster.model.quantize import quantize_int4, quantize_int8
from phi_cluster.model.quantized_phi3 import QuantizedPhi3ForCausalLM

VOCAB_SIZE = 131


def config(**changes: Any) -> Phi3Config:
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rope_theta": 500.0,
    }
    return Phi3Config(**(fields | changes))


def activations(dtype: str) -> str:
    return dtype.partition("_")[2] or "int16"


def weights(of: Phi3Config, dtype: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Packed as flat_weights.py does it; logits differ as much as a real network's."""
    generator = torch.Generator().manual_seed(seed)
    packed = {}
    shapes = expected_tensors(of) | {"lm_head.weight": (of.vocab_size, of.hidden_size)}
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            packed[name] = 1 + 0.3 * weight
        elif name == "model.embed_tokens.weight":
            packed[name] = (0.15 * weight).bfloat16()
        else:
            quantize = quantize_int4 if dtype.startswith("int4") and name != "lm_head.weight" else quantize_int8
            packed[name], packed[name.replace(".weight", ".scale")] = quantize(0.15 * weight)
    return packed


def layout(of: Phi3Config, kv_cache_dtype: str, max_model_len: int) -> KVCacheLayout:
    return KVCacheLayout.for_config(of, max_model_len, *{"bfloat16": (2, 0), "int8": (1, 4)}[kv_cache_dtype])


def network(
    of: Phi3Config,
    packed: dict[str, torch.Tensor],
    kv_cache_dtype: str = "bfloat16",
    max_model_len: int = 128,
    isa: str | None = None,
    num_threads: int = 1,
    activation_dtype: str = "int16",
) -> QuantizedPhi3ForCausalLM:
    kv_layout = layout(of, kv_cache_dtype, max_model_len)
    return QuantizedPhi3ForCausalLM(
        of, packed, kv_layout, kv_cache_dtype, activation_dtype, library.load(isa), num_threads
    )


def new_cache(of: Phi3Config, kv_cache_dtype: str = "bfloat16", max_model_len: int = 128) -> KVCache:
    """Of NaNs: nothing of rows that were never written may reach a result."""
    cache = KVCache(layout(of, kv_cache_dtype, max_model_len), getattr(torch, kv_cache_dtype))
    cache.rows.view(torch.uint8).fill_(0xFF)
    return cache


def available() -> list[str]:
    """The instruction sets of this CPU, best first."""
    order = ("amx", "avx512_vnni", "avx512", "avx2", "plain")
    return [] if library.problem() else [isa for isa in order if library.load("").c.phi_isa(isa.encode())]
