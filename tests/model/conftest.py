"""Tiny random checkpoints, written by transformers itself, with the network they came from as the
reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Phi3Config as HFConfig
from transformers import Phi3ForCausalLM as HFModel

from phi_cluster.model.config import Phi3Config

VOCAB_SIZE = 131
ROTARY_PAIRS = 8
SHORT_FACTOR = [1.0 + 0.05 * i for i in range(ROTARY_PAIRS)]
LONG_FACTOR = [1.5 + 0.7 * i for i in range(ROTARY_PAIRS)]
LONGROPE = {
    "max_position_embeddings": 128,
    "original_max_position_embeddings": 24,
    "rope_scaling": {"type": "longrope", "short_factor": SHORT_FACTOR, "long_factor": LONG_FACTOR},
}

# What differs from a network with 4 heads of 16, 2 of them for keys and values, and 2 layers.
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "longrope": LONGROPE,
    "longrope_factors_given": LONGROPE
    | {"rope_scaling": LONGROPE["rope_scaling"] | {"attention_factor": 1.3, "factor": 7.0}},
    "longrope_factor_given": LONGROPE | {"rope_scaling": LONGROPE["rope_scaling"] | {"factor": 7.0}},
    "longrope_mscale": LONGROPE
    | {"rope_scaling": LONGROPE["rope_scaling"] | {"short_mscale": 1.2, "long_mscale": 1.4}},
    "partial": {"partial_rotary_factor": 0.75},
    "window": {"sliding_window": 9},
    "window_mha": {"sliding_window": 9, "num_key_value_heads": 4},
    # Nothing is a multiple of 16.
    "odd": {"hidden_size": 40, "intermediate_size": 56},
}


@dataclass(frozen=True)
class TinyCheckpoint:
    """A Hugging Face folder, and transformers' network (float32) that was saved there."""

    folder: Path
    reference: HFModel
    config: Phi3Config

    def reference_logits(self, token_ids: torch.Tensor) -> torch.Tensor:
        """float32 [n, vocab]: transformers' logits after each token of a sequence, computed without a
        cache.
        """
        with torch.inference_mode():
            return self.reference(input_ids=token_ids[None], use_cache=False).logits[0].float()


def make_reference(seed: int = 0, **changes: Any) -> HFModel:
    """transformers' network with random weights large enough that logits differ by more than a few 1e-4."""
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rope_theta": 500.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.15,
    }
    torch.manual_seed(seed)
    model = HFModel(HFConfig(**(fields | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyCheckpoint]:
    """`checkpoint(variant)`: the checkpoint of one of VARIANTS, made once."""
    made: dict[str, TinyCheckpoint] = {}

    def get(variant: str) -> TinyCheckpoint:
        if variant not in made:
            folder = tmp_path_factory.mktemp(variant)
            reference = make_reference(**VARIANTS[variant])
            reference.save_pretrained(folder)
            made[variant] = TinyCheckpoint(folder, reference, Phi3Config.from_folder(folder))
        return made[variant]

    return get


@pytest.fixture
def tiny_folder(checkpoint: Callable[[str], TinyCheckpoint], tmp_path: Path) -> Path:
    """A copy of the "gqa" checkpoint that a test may break."""
    return _copy(checkpoint("gqa").folder, tmp_path / "gqa")


@pytest.fixture
def sharded_folder(checkpoint: Callable[[str], TinyCheckpoint], tmp_path: Path) -> Path:
    """The "gqa" checkpoint in several shards with an index, which a test may break."""
    folder = tmp_path / "sharded"
    checkpoint("gqa").reference.save_pretrained(folder, max_shard_size="100KB")
    return folder


def _copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target
