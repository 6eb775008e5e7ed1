"""Angles, bit for bit those of transformers, and the switch between LongRoPE's regimes."""

from __future__ import annotations

import math

import pytest
import torch

from phi_cluster.model.rope import Rope


@pytest.mark.parametrize("variant", ["gqa", "partial", "longrope", "longrope_factor_given", "longrope_factors_given"])
@pytest.mark.parametrize("num_tokens", [24, 25])
def test_cos_and_sin_are_those_of_transformers(checkpoint, variant, num_tokens):
    tiny = checkpoint(variant)
    positions = torch.arange(num_tokens)
    reference = tiny.reference.model.rotary_emb(torch.zeros(1, dtype=torch.float32), position_ids=positions[None])
    rope = Rope(tiny.config)
    ours = rope.cos_sin(positions, rope.regime_for(num_tokens))
    for mine, theirs in zip(ours, reference, strict=True):
        assert mine.shape == (num_tokens, tiny.config.rotary_dim)
        assert torch.equal(mine, theirs[0])


def test_plain_angles_by_hand(checkpoint):
    # theta 500, 16 dimensions: pair 3 turns by 500^(-6/16) a position.
    cos, sin = Rope(checkpoint("gqa").config).cos_sin(torch.tensor([5]), "short")
    assert cos[0, 3].item() == pytest.approx(math.cos(5 * 500 ** (-6 / 16)), abs=1e-6)
    assert sin[0, 11].item() == pytest.approx(math.sin(5 * 500 ** (-6 / 16)), abs=1e-6)


def test_long_begins_one_token_beyond_the_original_length(checkpoint):
    rope = Rope(checkpoint("longrope").config)
    assert [rope.regime_for(n) for n in (0, 1, 24, 25, 100)] == ["short", "short", "short", "long", "long"]


def test_without_longrope_there_is_one_regime(checkpoint):
    rope = Rope(checkpoint("gqa").config)
    assert rope.regime_for(10**6) == "short"
    assert torch.equal(rope.inv_freq["short"], rope.inv_freq["long"])


def test_attention_factors(checkpoint):
    def stretched(by):
        return math.sqrt(1 + math.log(by) / math.log(24))

    assert Rope(checkpoint("gqa").config).attention_factor == 1.0
    assert Rope(checkpoint("longrope").config).attention_factor == stretched(128 / 24)
    assert Rope(checkpoint("longrope_factor_given").config).attention_factor == stretched(7)
    assert Rope(checkpoint("longrope_factors_given").config).attention_factor == 1.3
