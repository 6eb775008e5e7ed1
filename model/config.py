"""What network a checkpoint holds: the checked fields of its config.json, and a fingerprint of the folder.

Owns: `Phi3Config`, the list of what we refuse to serve, and `model_fingerprint`. Knows nothing of torch, of
how the network computes, or of where folders come from.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any


class UnsupportedModel(ValueError):
    """The model cannot be served; the message is one sentence that names the field and its value."""


# Fields that change the network's arithmetic in ways we do not compute: (field, values that mean "not used").
_UNUSED_FIELDS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("quantization_config", (None,)),
    ("attention_bias", (None, False)),
    ("mlp_bias", (None, False)),
    ("lm_head_bias", (None, False)),
    ("layer_types", (None,)),
    ("full_attn_mod", (None, 1)),
    ("interpolate_factor", (None, 1)),
    ("num_local_experts", (None,)),
)
_DTYPES = ("float32", "float16", "bfloat16")
# Far above any real network, low enough that a corrupt number is caught before memory is asked for.
_LARGEST = 1 << 27
# How a weight file is sampled for the fingerprint.
_NUM_SAMPLES = 16
_SAMPLE_NBYTES = 64 << 10
_LARGEST_HEADER = 64 << 20


@dataclass(frozen=True)
class Phi3Config:
    """A `Phi3ForCausalLM`'s config, with Hugging Face's field names letter for letter.

    `rope_scaling` is None (plain RoPE) or a dict with `rope_type` "longrope", `short_factor` and
    `long_factor` (each `rotary_dim / 2` numbers) and possibly `factor` and `attention_factor`. Raises
    UnsupportedModel when built from values that are absurd, inconsistent or not supported.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    original_max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    partial_rotary_factor: float = 1.0
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    torch_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "original_max_position_embeddings",
        ):
            _require_count(name, getattr(self, name))
        if self.sliding_window is not None:
            _require_count("sliding_window", self.sliding_window)
        for name in ("rms_norm_eps", "rope_theta", "partial_rotary_factor"):
            _require_positive(name, getattr(self, name))
        if not isinstance(self.tie_word_embeddings, bool):
            raise _refusal("tie_word_embeddings", self.tie_word_embeddings, "true or false is expected")
        if self.torch_dtype not in _DTYPES:
            raise _refusal("torch_dtype", self.torch_dtype, f"supported are {', '.join(_DTYPES)}")
        if self.hidden_size % self.num_attention_heads:
            raise _refusal(
                "hidden_size",
                self.hidden_size,
                f"not divisible by num_attention_heads {self.num_attention_heads}",
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise _refusal(
                "num_key_value_heads",
                self.num_key_value_heads,
                f"it does not divide num_attention_heads {self.num_attention_heads}",
            )
        if self.partial_rotary_factor > 1.0:
            raise _refusal("partial_rotary_factor", self.partial_rotary_factor, "at most 1 is possible")
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise _refusal(
                "partial_rotary_factor",
                self.partial_rotary_factor,
                f"it rotates {self.rotary_dim} of head_dim {self.head_dim}, not an even number above 0",
            )
        if self.rope_scaling is not None:
            self._check_longrope(self.rope_scaling)

    def _check_longrope(self, scaling: Mapping[str, Any]) -> None:
        if scaling.get("rope_type") != "longrope":
            raise _refusal("rope_scaling.rope_type", scaling.get("rope_type"), "supported are default and longrope")
        for name in ("short_factor", "long_factor"):
            factors = scaling.get(name)
            if not isinstance(factors, (list, tuple)) or len(factors) != self.rotary_dim // 2:
                held = f"{len(factors)} numbers" if isinstance(factors, (list, tuple)) else repr(factors)
                raise UnsupportedModel(
                    f"rope_scaling.{name} holds {held}: {self.rotary_dim // 2} (rotary_dim / 2) are expected"
                )
            for factor in factors:
                _require_positive(f"rope_scaling.{name}", factor)
        for name in ("factor", "attention_factor"):
            if scaling.get(name) is not None:
                _require_positive(f"rope_scaling.{name}", scaling[name])
        # The logarithm of it divides (see rope.py).
        if self.original_max_position_embeddings < 2:
            raise _refusal(
                "original_max_position_embeddings",
                self.original_max_position_embeddings,
                "longrope needs more",
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """How many leading dimensions of a head are rotated; the rest pass through."""
        return int(self.head_dim * self.partial_rotary_factor)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Phi3Config:
        """The config in a parsed config.json.

        Understands both spellings of the rotary fields: `rope_theta`, `rope_scaling`, `partial_rotary_factor`
        side by side, and the newer `rope_parameters` that holds all three. End token ids outside the
        vocabulary are left out: they can never be generated. Raises UnsupportedModel.
        """
        if not isinstance(fields, Mapping):
            raise UnsupportedModel(f"config.json holds {type(fields).__name__}, not an object")
        if fields.get("architectures") != ["Phi3ForCausalLM"]:
            raise _refusal("architectures", fields.get("architectures"), "only ['Phi3ForCausalLM'] is supported")
        if fields.get("model_type", "phi3") != "phi3":
            raise _refusal("model_type", fields["model_type"], "only phi3 is supported")
        if fields.get("hidden_act", "silu") != "silu":
            raise _refusal("hidden_act", fields["hidden_act"], "only silu is supported")
        for name, unused in _UNUSED_FIELDS:
            if fields.get(name) not in unused:
                value = fields[name]
                if isinstance(value, Mapping):  # a quantisation's whole description is too long for a sentence
                    value = value.get("quant_method", "set")
                raise _refusal(name, value, "not supported")

        num_attention_heads = _required(fields, "num_attention_heads")
        num_key_value_heads = fields.get("num_key_value_heads")
        if num_key_value_heads is None:
            num_key_value_heads = num_attention_heads
        vocab_size = _required(fields, "vocab_size")
        max_position_embeddings = _required(fields, "max_position_embeddings")
        rope = _rope_fields(fields)
        config = cls(
            vocab_size=vocab_size,
            hidden_size=_required(fields, "hidden_size"),
            intermediate_size=_required(fields, "intermediate_size"),
            num_hidden_layers=_required(fields, "num_hidden_layers"),
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            max_position_embeddings=max_position_embeddings,
            original_max_position_embeddings=_original_length(fields, rope, max_position_embeddings),
            rms_norm_eps=_required(fields, "rms_norm_eps"),
            rope_theta=rope["rope_theta"],
            rope_scaling=_rope_scaling(rope),
            partial_rotary_factor=rope["partial_rotary_factor"],
            sliding_window=fields.get("sliding_window"),
            tie_word_embeddings=fields.get("tie_word_embeddings", False),
            bos_token_id=next(iter(_token_ids("bos_token_id", fields.get("bos_token_id"), vocab_size)), None),
            eos_token_id=_token_ids("eos_token_id", fields.get("eos_token_id"), vocab_size),
            torch_dtype=_dtype_name(fields),
        )
        head_dim = fields.get("head_dim")
        if head_dim is not None and head_dim != config.head_dim:
            raise _refusal(
                "head_dim",
                head_dim,
                f"only hidden_size / num_attention_heads = {config.head_dim} is supported",
            )
        return config

    @classmethod
    def from_folder(cls, folder: str | Path) -> Phi3Config:
        """The config of a Hugging Face folder, with the end tokens of generation_config.json added.

        Raises UnsupportedModel, also when config.json is missing or broken.
        """
        fields = _read_json(Path(folder) / "config.json")
        config = cls.from_dict(fields)
        generation_path = Path(folder) / "generation_config.json"
        if not generation_path.exists():
            return config
        more = _token_ids("eos_token_id", _read_json(generation_path).get("eos_token_id"), config.vocab_size)
        return replace(config, eos_token_id=tuple(dict.fromkeys(config.eos_token_id + more)))


def model_fingerprint(folder: str | Path) -> str:
    """32 hex digits that name the network in a folder: equal for copies, different for another network.

    Covers the network's config (not its special tokens, which leave keys and values as they are), and of
    every *.safetensors file its name, size, header and 64 KiB at each of 17 places spread over it: about 1
    MiB a file is read, never all of it, so a change of a few numbers in a big file may go unseen. Raises
    UnsupportedModel.
    """
    folder = Path(folder)
    network = asdict(replace(Phi3Config.from_folder(folder), bos_token_id=None, eos_token_id=()))
    digest = hashlib.blake2b(json.dumps(network, sort_keys=True).encode(), digest_size=16)
    weight_files = sorted(folder.glob("*.safetensors"))
    if not weight_files:
        raise UnsupportedModel(f"{folder} holds no .safetensors files")
    for path in weight_files:
        size = path.stat().st_size
        digest.update(f"\n{path.name} {size}\n".encode())
        with path.open("rb") as file:
            # A header gives its own length in 8 bytes; a broken file's is not believed.
            header_nbytes = 8 + int.from_bytes(file.read(8), "little")
            for offset in [
                0,
                *(size * i // _NUM_SAMPLES for i in range(1, _NUM_SAMPLES)),
                size - _SAMPLE_NBYTES,
            ]:
                file.seek(max(offset, 0))
                digest.update(file.read(_SAMPLE_NBYTES))
            file.seek(0)
            digest.update(file.read(min(header_nbytes, size, _LARGEST_HEADER)))
    return digest.hexdigest()


def _refusal(field: str, value: Any, why: str) -> UnsupportedModel:
    text = repr(value)
    return UnsupportedModel(f"{field} is {text if len(text) <= 80 else text[:77] + '...'}: {why}")


def _require_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST:
        raise _refusal(name, value, f"a whole number from 1 to {_LARGEST} is expected")


def _require_positive(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not (math.isfinite(value) and value > 0):
        raise _refusal(name, value, "a positive number is expected")


def _required(fields: Mapping[str, Any], name: str) -> Any:
    if fields.get(name) is None:
        raise UnsupportedModel(f"config.json has no {name}")
    return fields[name]


def _rope_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Both spellings as one dict: the scaling's fields, `rope_type`, `rope_theta` and
    `partial_rotary_factor`.
    """
    rope: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        given = fields.get(name)
        if given is None:
            continue
        if not isinstance(given, Mapping):
            raise _refusal(name, given, "an object is expected")
        rope.update(given)
    for name, default in (("rope_theta", 10000.0), ("partial_rotary_factor", 1.0)):
        if rope.get(name) is None:
            rope[name] = default if fields.get(name) is None else fields[name]
    rope_type = rope.get("rope_type") or rope.pop("type", None) or "default"
    if rope_type not in ("default", "longrope", "su"):
        raise _refusal("rope_scaling.type", rope_type, "supported are default, longrope and su")
    rope["rope_type"] = "longrope" if rope_type == "su" else rope_type
    return rope


def _rope_scaling(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    """What longrope computes with. transformers reads nothing else of it either (no `short_mscale`)."""
    if rope["rope_type"] == "default":
        return None
    kept = ("rope_type", "short_factor", "long_factor", "factor", "attention_factor")
    return {name: rope[name] for name in kept if rope.get(name) is not None}


def _original_length(fields: Mapping[str, Any], rope: Mapping[str, Any], max_position_embeddings: Any) -> Any:
    name = "original_max_position_embeddings"
    outside, inside = fields.get(name), rope.get(name)
    if outside is not None and inside is not None and outside != inside:
        raise _refusal(name, outside, f"the rotary fields say {inside!r}")
    if outside is not None or inside is not None:
        return inside if outside is None else outside
    if rope["rope_type"] != "default":
        raise UnsupportedModel(f"config.json has no {name}, which longrope needs")
    return max_position_embeddings


def _token_ids(name: str, value: Any, vocab_size: Any) -> tuple[int, ...]:
    ids = [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
    for token_id in ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise _refusal(name, value, "token ids are expected")
    return tuple(i for i in ids if not isinstance(vocab_size, int) or i < vocab_size)


def _dtype_name(fields: Mapping[str, Any]) -> str:
    value = fields.get("dtype") or fields.get("torch_dtype") or "float32"
    return str(value).removeprefix("torch.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UnsupportedModel(f"there is no {path.name} in {path.parent}") from None
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{path} cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise UnsupportedModel(f"{path} holds {type(fields).__name__}, not an object")
    return fields
