"""An engine dies between any two writes into a session's memory; the next one goes on, and every token comes once.

Real segments and a small real network. A death is an exception that nothing catches: what was written stays, what was
not written never is, and nobody hears what the step would have brought.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from phi_cluster.cluster.engine.engine import Engine, EngineLimits
from phi_cluster.cluster.engine.model_runner import ModelRunner
from phi_cluster.cluster.engine.segment_kv import SegmentKV, splice
from phi_cluster.cluster.engine.sequence import Sequence
from phi_cluster.cluster.engine.settings import Speculation
from phi_cluster.cluster.frames import SequenceOutput
from phi_cluster.cluster.session.segment import Segment
from phi_cluster.cluster.session.segment_layout import SegmentLayout
from phi_cluster.model.checkpoint import expected_tensors
from phi_cluster.model.config import Phi3Config
from phi_cluster.model.kv_layout import KVCacheLayout
from phi_cluster.model.phi3 import Phi3ForCausalLM
from phi_cluster.model.sampling_params import SamplingParams

FINGERPRINT = "test"
# What it repeats can be guessed.
PROMPT = [5, 9, 2, 7, 5, 9, 2, 7, 5, 9, 2]
NUM_TOKENS = 14
CONFIG = Phi3Config.from_dict(
    {
        "architectures": ["Phi3ForCausalLM"],
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "eos_token_id": 1,
        "bos_token_id": 1,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
)
LAYOUT = SegmentLayout(KVCacheLayout.for_config(CONFIG, 64, 4))


class Died(BaseException):
    """The process is gone."""


class Life:
    """So many writes are left to an engine (None: as many as it likes)."""

    def __init__(self, writes: int | None = None):
        self._left = writes
        self.written = 0

    def write(self) -> None:
        if self.written == self._left:
            raise Died
        self.written += 1


class MortalKV(SegmentKV):
    """Each write is one of its engine's life."""

    def __init__(self, segment: Segment, life: Life):
        super().__init__(segment.ref, LAYOUT, FINGERPRINT, torch.float32, segment.epoch)
        self._life = life

    def trim(self, num_tokens: int) -> None:
        self._life.write()
        super().trim(num_tokens)

    def append_tokens(self, token_ids: list[int]) -> None:
        self._life.write()
        super().append_tokens(token_ids)

    def set_computed(self, num_tokens: int) -> None:
        self._life.write()
        super().set_computed(num_tokens)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Thousands of tiny steps: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    generator = torch.Generator().manual_seed(7)
    weights = {
        name: torch.ones(shape) if "norm" in name else torch.randn(shape, generator=generator) * 0.3
        for name, shape in expected_tensors(CONFIG).items()
    }
    return ModelRunner(Phi3ForCausalLM(CONFIG, weights, torch.float32), CONFIG)


KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.9, "top_p": 0.9},
    "penalties": {"temperature": 0.7, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.2},
    "min_tokens": {"temperature": 1.2, "min_tokens": 8, "stop_token_ids": (3, 4, 6)},
    "logit_bias": {"temperature": 0.0, "logit_bias": {11: 3.0, 12: 2.5}},
    # Two tokens in random order: many guesses are right, and many are not.
    "repeating": {"temperature": 4.0, "logit_bias": {11: 60.0, 12: 60.0}},
}


class Client:
    """What the replica knows of one sequence."""

    def __init__(self, runner: ModelRunner, params: SamplingParams, speculation: Speculation):
        self._runner = runner
        self._params = params
        self._speculation = speculation
        self.segment = Segment.create(LAYOUT, FINGERPRINT)
        self.received: list[int] = []
        self.outputs: list[SequenceOutput] = []

    def run(self, life: Life, unheard: int = 0) -> bool:
        """One engine until the end of the sequence (True), or until it dies; what its last `unheard` steps brought
        before is not heard either."""
        engine = Engine(EngineLimits(4, 4, 64), self._runner, time.monotonic, self._speculation)
        heard: list[SequenceOutput] = []
        try:
            kv = MortalKV(self.segment, life)
            token_ids = splice(kv, 0, PROMPT + self.received)
            engine.add(Sequence(1, kv, token_ids, len(PROMPT), self._params, 64))
            while not (heard and heard[-1].released):
                heard += engine.step()
        except Died:
            del heard[len(heard) - min(unheard, len(heard)) :]
        self.outputs += heard
        for output in heard:
            self.received += output.token_ids
        return bool(heard) and heard[-1].released


@pytest.fixture(params=[0, 3], ids=["one by one", "with guesses"])
def speculation(request: pytest.FixtureRequest) -> Speculation:
    return Speculation(num_tokens=request.param, min_match=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unheard", [0, 1, 2])
def test_whenever_an_engine_dies_the_next_one_goes_on_where_it_was_heard(
    kind: str, unheard: int, speculation: Speculation, runner: ModelRunner
) -> None:
    params = SamplingParams(seed=5, max_tokens=NUM_TOKENS, **KINDS[kind])
    undisturbed = Client(runner, params, speculation)
    life = Life()
    assert undisturbed.run(life)
    assert len(undisturbed.received) > 3
    for writes in range(life.written):
        client = Client(runner, params, speculation)
        assert not client.run(Life(writes), unheard)
        assert client.run(Life())
        assert client.received == undisturbed.received, f"died after {writes} writes"
        assert client.outputs[-1].finish_reason == undisturbed.outputs[-1].finish_reason
        assert sum(output.finish_reason is not None for output in client.outputs) == 1
        assert client.segment.token_ids() == PROMPT + client.received
        assert client.segment.num_computed_tokens == undisturbed.segment.num_computed_tokens


def test_many_deaths_in_a_row(speculation: Speculation, runner: ModelRunner) -> None:
    params = SamplingParams(seed=5, max_tokens=NUM_TOKENS, **KINDS["sampled"])
    undisturbed, client = Client(runner, params, speculation), Client(runner, params, speculation)
    assert undisturbed.run(Life())
    engines = 1
    while not client.run(Life(5 + engines % 4), unheard=engines % 2):
        engines += 1
        assert engines < 200
    assert engines > 5
    assert client.received == undisturbed.received


def test_guesses_were_made(runner: ModelRunner) -> None:
    """The tests above are about steps of several tokens too."""
    params = SamplingParams(seed=5, max_tokens=NUM_TOKENS, **KINDS["repeating"])
    client = Client(runner, params, Speculation(num_tokens=3, min_match=1))
    assert client.run(Life())
    assert {len(output.token_ids) for output in client.outputs} - {1}
    assert set(client.received) == {11, 12}
