"""What network a GGUF file holds, as the fields of a Hugging Face config.json for `Phi3ForCausalLM`.

Owns: the mapping from GGUF metadata keys to config fields for the architectures `llama` and `phi3`, and the
refusal of what such a file may hold that is not a Phi-3. Knows nothing of weights' values or of text.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from phi_cluster.model.config import UnsupportedModel
from phi_cluster.model.gguf_file import GGUFFile

ARCHITECTURES = ("llama", "phi3")
_SHORT, _LONG = "rope_factors_short.weight", "rope_factors_long.weight"
# Metadata of the same architecture name that changes the arithmetic: (key without the architecture, values
# that mean "not used").
_UNUSED_KEYS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("expert_count", (0,)),
    ("use_parallel_residual", (True, False)),
    ("attention.clamp_kqv", (0.0,)),
    ("attention.max_alibi_bias", (0.0,)),
    ("attention.scale", ()),
    ("logit_scale", (1.0,)),
    ("embedding_scale", (1.0,)),
    ("residual_scale", (1.0,)),
    ("attn_logit_softcapping", ()),
    ("final_logit_softcapping", ()),
)


def gguf_config(file: GGUFFile) -> dict[str, Any]:
    """The config.json fields (without torch_dtype and token ids). Raises UnsupportedModel naming key and
    value."""
    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{file.path}: general.architecture is {architecture!r}, supported are {' and '.join(ARCHITECTURES)}"
        )
    for key, unused in _UNUSED_KEYS:
        value = metadata.get(f"{architecture}.{key}")
        if value is not None and value not in unused:
            raise UnsupportedModel(f"{file.path}: {architecture}.{key} is {value!r}, which is not supported")

    def required(key: str) -> Any:
        if f"{architecture}.{key}" not in metadata:
            raise UnsupportedModel(f"{file.path}: the metadata has no {architecture}.{key}")
        return metadata[f"{architecture}.{key}"]

    def optional(key: str, default: Any) -> Any:
        return metadata.get(f"{architecture}.{key}", default)

    hidden_size, num_heads = required("embedding_length"), required("attention.head_count")
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        if isinstance(value := optional(key, 0), list):
            raise UnsupportedModel(f"{file.path}: {architecture}.{key} is {value!r}, one number is expected")
    if num_heads < 1 or hidden_size % num_heads:
        raise UnsupportedModel(
            f"{file.path}: {architecture}.attention.head_count is {num_heads!r}, "
            f"it must divide {architecture}.embedding_length {hidden_size}"
        )
    head_dim = hidden_size // num_heads
    for key in ("attention.key_length", "attention.value_length"):
        if optional(key, head_dim) != head_dim:
            raise UnsupportedModel(f"{file.path}: {architecture}.{key} is {optional(key, None)!r}, not {head_dim}")
    rotary_dim = optional("rope.dimension_count", head_dim)
    if architecture == "llama" and rotary_dim != head_dim:
        raise UnsupportedModel(f"{file.path}: llama.rope.dimension_count is {rotary_dim!r}, not {head_dim}")
    if "rope_freqs.weight" in file.tensors:
        raise UnsupportedModel(
            f"{file.path}: tensor rope_freqs.weight is present (Llama 3's rope scaling), which is not supported"
        )
    context = required("context_length")
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "vocab_size": _num_rows(file, "token_embd.weight"),
        "hidden_size": hidden_size,
        "intermediate_size": required("feed_forward_length"),
        "num_hidden_layers": required("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": optional("attention.head_count_kv", num_heads),
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "original_max_position_embeddings": optional("rope.scaling.original_context_length", context),
        "rms_norm_eps": _shortest(required("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(optional("rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(file, architecture, context),
        "partial_rotary_factor": rotary_dim / head_dim,
        # llama.cpp writes 0 where the network has no window.
        "sliding_window": optional("attention.sliding_window", 0) or None,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "use_cache": True,
    }


def _rope_scaling(file: GGUFFile, architecture: str, context: int) -> dict[str, Any] | None:
    """longrope from the factor tensors; anything else but plain RoPE is refused."""
    metadata = file.metadata
    kind = metadata.get(f"{architecture}.rope.scaling.type", "none")
    has_factors = _SHORT in file.tensors and _LONG in file.tensors
    # Conversions of longrope models name the type "longrope", or not at all.
    if kind not in ("none", "longrope") or (kind == "longrope" and not has_factors):
        raise UnsupportedModel(f"{file.path}: {architecture}.rope.scaling.type is {kind!r}, which is not supported")
    factor = metadata.get(f"{architecture}.rope.scaling.factor", 1.0)
    if not has_factors:
        if factor not in (0.0, 1.0):
            raise UnsupportedModel(f"{file.path}: {architecture}.rope.scaling.factor is {factor!r}, not supported")
        return None
    scaling: dict[str, Any] = {
        "type": "longrope",
        "short_factor": [_shortest(x) for x in file.tensor(_SHORT)],
        "long_factor": [_shortest(x) for x in file.tensor(_LONG)],
    }
    original = metadata.get(f"{architecture}.rope.scaling.original_context_length", context)
    attention = metadata.get(f"{architecture}.rope.scaling.attn_factor")
    if attention is not None:
        # Hugging Face's own value where the file agrees with it up to float32; only a different one is
        # written down.
        usual = math.sqrt(1 + math.log(context / original) / math.log(original)) if context > original > 1 else 1.0
        if not math.isclose(attention, usual, rel_tol=1e-5):
            scaling["attention_factor"] = _shortest(attention)
    return scaling


def _num_rows(file: GGUFFile, name: str) -> int:
    if name not in file.tensors:
        raise UnsupportedModel(f"{file.path}: there is no tensor {name}")
    return file.tensors[name].shape[0]


def _shortest(value: float) -> float:
    """The decimal number that was meant: 1e-05 for the float32 9.999999747378752e-06."""
    return float(str(np.float32(value)))
