"""The bug this project began with: a KV cache that outlived a generation, so that the next one failed with a shape
mismatch (a short prompt happened to work twice, a longer one did not). In its four forms, on a real network and real
segments: every generation equals that of a fresh model with fresh memory."""

from __future__ import annotations

import time

import pytest
import torch

from phi_cluster.cluster.engine.engine import Engine, EngineLimits
from phi_cluster.cluster.engine.model_runner import ModelRunner
from phi_cluster.cluster.engine.segment_kv import SegmentKV, splice
from phi_cluster.cluster.engine.sequence import Sequence
from phi_cluster.cluster.session.segment import Segment
from phi_cluster.cluster.session.segment_layout import SegmentLayout
from phi_cluster.model.checkpoint import expected_tensors
from phi_cluster.model.config import Phi3Config
from phi_cluster.model.kv_layout import KVCacheLayout
from phi_cluster.model.phi3 import Phi3ForCausalLM
from phi_cluster.model.sampling_params import SamplingParams

CONFIG = Phi3Config.from_dict(
    {
        "architectures": ["Phi3ForCausalLM"],
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
        "bos_token_id": 1,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
)
LAYOUT = SegmentLayout(KVCacheLayout.for_config(CONFIG, 256, 4))
SHORT = [11, 12]
LONG = [(7 * i + 3) % 90 + 2 for i in range(103)]


def make_engine() -> Engine:
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: torch.ones(shape) if "norm" in name else torch.randn(shape, generator=generator) * 0.2
        for name, shape in expected_tensors(CONFIG).items()
    }
    model = Phi3ForCausalLM(CONFIG, weights, torch.float32)
    return Engine(EngineLimits(8, 32, 256), ModelRunner(model, CONFIG), time.monotonic)


def generate(engine: Engine, requests: list[tuple[Segment, list[int]]]) -> list[list[int]]:
    """Replies of 12 tokens, all at once; each prompt is the whole conversation in its segment."""
    replies: dict[int, list[int]] = {}
    for number, (segment, prompt) in enumerate(requests):
        kv = SegmentKV(segment.ref, LAYOUT, "test", torch.float32, segment.epoch)
        params = SamplingParams(temperature=0.0, seed=0, max_tokens=12)
        ids = splice(kv, 0, prompt)
        engine.add(Sequence(number, kv, ids, len(prompt), params, max_num_tokens=256))
        replies[number] = []
    for _ in range(200):
        for output in engine.step():
            assert output.error is None
            replies[output.sequence_id] += output.token_ids
        if not engine.has_work:
            return list(replies.values())
    raise AssertionError("the engine did not finish")


def fresh(prompt: list[int]) -> list[int]:
    """What a new model with new memory says."""
    return generate(make_engine(), [(Segment.create(LAYOUT, "test"), prompt)])[0]


@pytest.mark.parametrize(
    "prompts",
    [(SHORT, SHORT), (LONG, LONG), (LONG, SHORT), (SHORT, LONG, SHORT)],
    ids=["short", "long", "mixed", "back"],
)
@pytest.mark.parametrize("memory", ["one session, cleared", "one session, not cleared", "a session each"])
def test_one_after_the_other(prompts: tuple[list[int], ...], memory: str) -> None:
    engine, segment = make_engine(), Segment.create(LAYOUT, "test")
    for prompt in prompts:
        if memory == "one session, cleared":
            segment.clear()
        elif memory == "a session each":
            segment = Segment.create(LAYOUT, "test")
        assert generate(engine, [(segment, prompt)]) == [fresh(prompt)]


def test_eight_at_once() -> None:
    prompts = [SHORT, LONG, LONG[:50], SHORT[:1], LONG[5:], [5] * 30, LONG[::-1], SHORT]
    together = generate(make_engine(), [(Segment.create(LAYOUT, "test"), prompt) for prompt in prompts])
    assert together == [fresh(prompt) for prompt in prompts]
