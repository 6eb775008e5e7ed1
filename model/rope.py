"""Rotary position embedding: which angle each position and dimension is turned by.

Owns: the frequencies, plain and LongRoPE. Knows nothing of attention, caches, or when a sequence must be
computed again because it changed its regime.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from phi_cluster.model.config import Phi3Config

RopeRegime = Literal["short", "long"]


class Rope:
    """The angles of one network.

    Plain RoPE (Su et al. 2021, arXiv:2104.09864): dimension pair i turns by `position / theta^(2i/d)`.
    LongRoPE (Ding et al. 2024, arXiv:2402.13753) divides each frequency by a searched factor, one set for
    sequences up to `original_max_position_embeddings` (short), another beyond (long), and scales cos and
    sin by one attention factor. The arithmetic, float32 throughout, follows transformers' so closely that
    the angles are the same bits.
    """

    def __init__(self, config: Phi3Config, device: torch.device | str = "cpu"):
        self.original_max_position_embeddings = config.original_max_position_embeddings
        self.has_regimes = config.rope_scaling is not None
        exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.int64).float() / config.rotary_dim
        base = config.rope_theta**exponents
        scaling = config.rope_scaling
        if scaling is None:
            self.attention_factor = 1.0
            short = long = 1.0 / base
        else:
            self.attention_factor = _attention_factor(config)
            short = 1.0 / (torch.tensor(scaling["short_factor"], dtype=torch.float32) * base)
            long = 1.0 / (torch.tensor(scaling["long_factor"], dtype=torch.float32) * base)
        self.inv_freq: dict[RopeRegime, torch.Tensor] = {"short": short.to(device), "long": long.to(device)}

    def regime_for(self, num_tokens: int) -> RopeRegime:
        """The regime of a sequence of `num_tokens` tokens in all. Without LongRoPE always "short"."""
        return "long" if self.has_regimes and num_tokens > self.original_max_position_embeddings else "short"

    def cos_sin(self, positions: torch.Tensor, regime: RopeRegime) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, float32 [n, rotary_dim] (both halves the same angles), for int64 `positions` [n]."""
        angles = positions[:, None].float() * self.inv_freq[regime]
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.attention_factor, angles.sin() * self.attention_factor


def _attention_factor(config: Phi3Config) -> float:
    """The factor given, else LongRoPE's sqrt(1 + ln(scale) / ln(original length)), 1 if nothing is
    stretched.
    """
    assert config.rope_scaling is not None
    given = config.rope_scaling.get("attention_factor")
    if given is not None:
        return float(given)
    scale = config.rope_scaling.get("factor")
    if scale is None:
        scale = config.max_position_embeddings / config.original_max_position_embeddings
    if scale <= 1.0:
        return 1.0
    return math.sqrt(1 + math.log(scale) / math.log(config.original_max_position_embeddings))
