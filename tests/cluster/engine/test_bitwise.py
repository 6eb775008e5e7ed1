"""The engine on a real (tiny) network with the compiled kernels: a conversation's tokens, and the bytes of its keys and
values, are those that it gets alone, whatever traffic it is in.

Alone: in an engine of its own, one thread, its prompt in one piece, without speculation. In traffic: arrivals, aborts,
budgets that cut prompts, batch mates, memory that is short, drafts, a longer regime, leases that grow, any number of
threads. All from a seeded generator.
"""

from __future__ import annotations

import random
import runpy
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from phi_cluster.cluster.engine.engine import Engine, EngineLimits
from phi_cluster.cluster.engine.model_runner import ModelRunner
from phi_cluster.cluster.engine.sequence import Sequence
from phi_cluster.cluster.engine.settings import Speculation
from phi_cluster.model.config import Phi3Config
from phi_cluster.model.ops import library
from phi_cluster.model.quantized_phi3 import QuantizedPhi3ForCausalLM
from phi_cluster.model.sampling_params import SamplingParams

tiny = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "model" / "random_network.py")))

pytestmark = pytest.mark.skipif(library.problem() is not None, reason=f"no kernels: {library.problem()}")

MAX_MODEL_LEN = 128
NUM_SEQUENCES = 32
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [1.5 + 0.7 * i for i in range(8)],
}


@dataclass(frozen=True)
class Subject:
    """A network's kind. Sequences that grow beyond 40 tokens are computed anew in the long regime."""

    config: Phi3Config
    weights: dict[str, torch.Tensor]
    activations: str
    kv_cache_dtype: str

    def network(self, num_threads: int) -> QuantizedPhi3ForCausalLM:
        made: QuantizedPhi3ForCausalLM = tiny.network(
            self.config,
            self.weights,
            self.kv_cache_dtype,
            MAX_MODEL_LEN,
            num_threads=num_threads,
            activation_dtype=self.activations,
        )
        return made

    @property
    def bytes_per_token(self) -> int:
        layout = tiny.layout(self.config, self.kv_cache_dtype, MAX_MODEL_LEN)
        return int(layout.bytes_per_token)


def subject(dtype: str, kv_cache_dtype: str, **changes: Any) -> Subject:
    config = tiny.config(original_max_position_embeddings=40, rope_scaling=LONGROPE, **changes)
    return Subject(config, tiny.weights(config, dtype), tiny.activations(dtype), kv_cache_dtype)


class MemoryKV:
    """A SequenceKV in this process's memory. What it gives back becomes NaNs."""

    num_lasting_tokens = 0

    def __init__(self, of: Subject, token_ids: list[int]):
        self.cache = tiny.new_cache(of.config, of.kv_cache_dtype, MAX_MODEL_LEN)
        self.bytes_per_token = of.bytes_per_token
        self.long_rope = False
        self.token_ids = list(token_ids)
        self.num_computed_tokens = 0
        self.closed = False

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def trim(self, num_tokens: int) -> None:
        raise NotImplementedError

    def append_tokens(self, token_ids: list[int]) -> None:
        assert not self.closed
        self.token_ids += token_ids

    def set_computed(self, num_tokens: int) -> None:
        assert not self.closed
        assert num_tokens <= self.num_tokens
        self.num_computed_tokens = num_tokens

    def clear(self) -> None:
        assert not self.closed
        self.num_computed_tokens = 0
        self.cache.rows.view(torch.uint8).fill_(0xFF)

    def close(self) -> None:
        self.closed = True

    def stored(self, num_tokens: int) -> torch.Tensor:
        """uint8 [regions, bytes]: the rows of the first tokens."""
        return self.cache.rows[:, :num_tokens].contiguous().view(torch.uint8).flatten(1)


@dataclass(frozen=True)
class Conversation:
    """What is asked, and what it gets alone."""

    prompt: list[int]
    params: SamplingParams
    reply: list[int]
    finish_reason: str
    kv: MemoryKV


def random_params(rng: random.Random) -> SamplingParams:
    """Greedy and sampled. Logits are bent so that some replies repeat themselves and others do not."""
    fields: dict[str, Any] = {
        "seed": rng.randrange(2**32),
        "max_tokens": rng.choice([1, 5, 20, 40]),
        "temperature": rng.choice([0.0, 0.0, 0.7, 1.0]),
        "top_p": rng.choice([1.0, 0.9]),
        "top_k": rng.choice([0, 0, 20]),
        "stop_token_ids": tuple(rng.sample(range(tiny.VOCAB_SIZE), 2)),
    }
    if rng.random() < 0.3:
        fields |= {"presence_penalty": 0.5, "repetition_penalty": 1.2}
    if rng.random() < 0.5:
        fields |= {"logit_bias": dict.fromkeys(rng.sample(range(tiny.VOCAB_SIZE), 3), 5.0)}
    return SamplingParams(**fields)


def random_prompt(rng: random.Random) -> list[int]:
    if rng.random() < 0.4:
        piece = [rng.randrange(tiny.VOCAB_SIZE) for _ in range(rng.randint(1, 4))]
        return (piece * 40)[: rng.randint(2, 60)]
    return [rng.randrange(tiny.VOCAB_SIZE) for _ in range(rng.choice([1, 3, 20, rng.randint(30, 80)]))]


def alone(of: Subject, network: QuantizedPhi3ForCausalLM, prompt: list[int], params: SamplingParams) -> Conversation:
    runner = ModelRunner(network, of.config, network.draw)
    engine = Engine(EngineLimits(1, 10_000, MAX_MODEL_LEN), runner, lambda: 0.0)
    kv = MemoryKV(of, prompt)
    engine.add(Sequence(0, kv, prompt, len(prompt), params, MAX_MODEL_LEN))
    reply: list[int] = []
    while True:
        [output] = engine.step()
        reply += output.token_ids
        if output.finish_reason is not None:
            return Conversation(prompt, params, reply, output.finish_reason, kv)


class Traffic:
    """One engine under random load."""

    def __init__(self, of: Subject, rng: random.Random, conversations: list[Conversation], speculates: bool):
        self.of = of
        self.rng = rng
        self.network = of.network(rng.choice([1, 2, 3]))
        self.conversations = conversations
        # One conversation always fits, all of them never.
        max_kv_bytes = of.bytes_per_token * rng.randint(MAX_MODEL_LEN, 4 * MAX_MODEL_LEN)
        limits = EngineLimits(
            rng.choice([3, 8, 32]),
            rng.choice([5, 32, 200]),
            MAX_MODEL_LEN,
            rng.choice([max_kv_bytes, max_kv_bytes, None]),
        )
        speculation = Speculation(rng.choice([2, 4, 16]), 1, 3) if speculates else None
        runner = ModelRunner(self.network, of.config, self.network.draw)
        self.engine = Engine(limits, runner, lambda: 0.0, speculation)
        self.sequences: dict[int, Sequence] = {}
        self.replies: dict[int, list[int]] = {}
        self.reasons: dict[int, str] = {}
        self.aborted: set[int] = set()

    def run(self) -> None:
        """All conversations, in random order of arrival; then each is compared."""
        waiting = self.rng.sample(range(len(self.conversations)), len(self.conversations))
        steps = 0
        while waiting or self.live:
            while waiting and (self.rng.random() < 0.4 or not self.live):
                self.arrive(waiting.pop())
            if self.rng.random() < 0.02:
                self.abort()
            self.extend()
            for output in self.engine.step():
                self.replies[output.sequence_id] += output.token_ids
                if output.finish_reason is not None:
                    assert output.error is None
                    self.reasons[output.sequence_id] = output.finish_reason
            steps += 1
            assert steps < 20_000, "something starves"
        for i, conversation in enumerate(self.conversations):
            self.compare(i, conversation)
        self.network.close()

    @property
    def live(self) -> list[int]:
        return [i for i in self.sequences if i not in self.reasons]

    def arrive(self, i: int) -> None:
        one = self.conversations[i]
        # Sometimes the reply is taken over in its middle: its tokens are there, its keys and values are not.
        taken = self.rng.choice([0, 0, 0, self.rng.randint(0, len(one.reply) - 1)])
        token_ids = one.prompt + one.reply[:taken]
        room = self.rng.choice([MAX_MODEL_LEN, len(token_ids) + self.rng.randint(1, 9)])
        sequence = Sequence(i, MemoryKV(self.of, token_ids), token_ids, len(one.prompt), one.params, room)
        self.sequences[i], self.replies[i] = sequence, one.reply[:taken]
        self.engine.add(sequence)

    def abort(self) -> None:
        if self.live:
            i = self.rng.choice(self.live)
            self.aborted.add(i)
            self.engine.abort(i)

    def extend(self) -> None:
        for i in self.live:
            sequence = self.sequences[i]
            if sequence.is_paused and (self.rng.random() < 0.3 or not self.engine.has_work):
                self.engine.extend(i, min(sequence.max_num_tokens + self.rng.randint(1, 20), MAX_MODEL_LEN))

    def compare(self, i: int, one: Conversation) -> None:
        sequence, reply, reason = self.sequences[i], self.replies[i], self.reasons[i]
        if reason == "abort":
            assert i in self.aborted
            assert reply == one.reply[: len(reply)]
        else:
            assert (reply, reason) == (one.reply, one.finish_reason)
        kv = sequence.kv
        assert isinstance(kv, MemoryKV)
        assert kv.token_ids == one.prompt + reply
        if kv.long_rope == one.kv.long_rope:
            n = kv.num_computed_tokens
            assert torch.equal(kv.stored(n), one.kv.stored(n))
        else:
            # It was aborted before it grew so long.
            assert reason == "abort"


@dataclass
class Seen:
    """What the cases below have met, all together: they are worth something only if it is everything."""

    preemptions: int = 0
    accepted: int = 0
    rejected: int = 0
    aborts: int = 0
    long: int = 0
    short: int = 0

    def take(self, traffic: Traffic) -> None:
        engine = traffic.engine
        self.preemptions += engine.num_preemptions
        self.accepted += engine.num_accepted_tokens
        self.rejected += engine.num_draft_tokens - engine.num_accepted_tokens
        self.aborts += list(traffic.reasons.values()).count("abort")
        for sequence in traffic.sequences.values():
            self.long += sequence.long_rope
            self.short += not sequence.long_rope


CASES = [
    ("int8", "bfloat16", {}),
    ("int8", "int8", {}),
    ("int8_int8", "bfloat16", {}),
    ("int4", "bfloat16", {"num_key_value_heads": 4, "sliding_window": 23}),
    ("int4", "int8", {"num_key_value_heads": 1}),
]


@pytest.mark.parametrize(("dtype", "kv_cache_dtype", "changes"), CASES)
def test_replies_are_those_that_each_gets_alone(dtype: str, kv_cache_dtype: str, changes: dict[str, Any]) -> None:
    of = subject(dtype, kv_cache_dtype, **changes)
    rng = random.Random(f"{dtype} {kv_cache_dtype}")
    network = of.network(1)
    conversations = [alone(of, network, random_prompt(rng), random_params(rng)) for _ in range(NUM_SEQUENCES)]
    network.close()
    assert {one.finish_reason for one in conversations} == {"stop", "length"}
    seen = Seen()
    for speculates in (False, True, True):
        for _ in range(3):
            traffic = Traffic(of, rng, conversations, speculates)
            traffic.run()
            assert speculates or traffic.engine.num_draft_tokens == 0
            seen.take(traffic)
    assert min(seen.preemptions, seen.accepted, seen.rejected, seen.aborts, seen.long, seen.short) > 0, seen


def test_a_conversation_is_the_same_after_every_turn() -> None:
    """Turn after turn on what is stored, against the whole conversation computed at once."""
    of = subject("int8", "int8")
    rng = random.Random(7)
    network = of.network(2)
    params = replace(random_params(rng), max_tokens=6, ignore_eos=True, temperature=0.8)
    stored = MemoryKV(of, [])
    for turn in range(8):
        stored.append_tokens([rng.randrange(tiny.VOCAB_SIZE) for _ in range(rng.randint(1, 9))])
        prompt = list(stored.token_ids)
        fresh = alone(of, network, prompt, replace(params, seed=turn))
        engine = Engine(EngineLimits(4, 7, MAX_MODEL_LEN), ModelRunner(network, of.config, network.draw), lambda: 0.0)
        sequence = Sequence(turn, stored, prompt, len(prompt), replace(params, seed=turn), MAX_MODEL_LEN)
        assert (sequence.num_computed_tokens > 0) == (turn > 0)
        engine.add(sequence)
        reply: list[int] = []
        while engine.has_work:
            for output in engine.step():
                reply += output.token_ids
        assert reply == fresh.reply
        stored.closed = False
        assert stored.long_rope == fresh.kv.long_rope
        assert torch.equal(stored.stored(stored.num_computed_tokens), fresh.kv.stored(stored.num_computed_tokens))
    assert stored.long_rope
    network.close()
