"""Engine under random traffic: whatever else happens, each sequence's reply is the one it gets alone, a token a step.

Arrivals, aborts, leases that grow, budgets that are too small, long prompts, warm caches, replies taken over in their
middle, LongRoPE's boundary, drafts and steps that fail: all from a seeded generator, so every case is repeatable.
"""

from __future__ import annotations

import logging
import random
from typing import Any

import pytest

from phi_cluster.cluster.engine.settings import Speculation


class Traffic:
    """One random engine, its sequences, and what must hold after every forward pass."""

    def __init__(self, lab: Any, seed: int, speculates: bool = False):
        self.lab = lab
        self.rng = rng = random.Random(seed)
        self.long_from = rng.choice([None, rng.randint(8, 60)])
        self.max_num_seqs = rng.randint(1, 8)
        self.max_num_batched_tokens = rng.randint(1, 40)
        self.max_model_len = rng.choice([1000, 1000, 70])
        # Half of the time memory is what is short: many replies that grow long, and room for one or two of them.
        self.tight = rng.random() < 0.5
        self.max_kv_bytes = lab.bytes_per_token * rng.randint(90, 150) if self.tight else None
        self.fails = rng.random() < 0.3
        self.speculation = None
        # What the network says: anything, or what often comes again.
        self.bend: Any = lambda row, token_ids: None
        if speculates:
            min_match = rng.randint(1, 3)
            self.speculation = Speculation(rng.choice([1, 3, 4, 16]), min_match, rng.randint(min_match, 4))
            self.bend = lab.repeating
        self.live: dict[int, Any] = {}
        self.expected: dict[int, Any] = {}
        self.prompts: dict[int, list[int]] = {}
        self.aborted: set[int] = set()
        self.replies: dict[int, Any] = {}
        self.model = self._model()
        self.engine = lab.engine(
            self.model,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            max_kv_bytes=self.max_kv_bytes,
            speculation=self.speculation,
        )

    def _model(self) -> Any:
        traffic = self

        class CheckedModel(self.lab.Model):  # type: ignore[name-defined]
            def forward(self, chunks: Any) -> Any:
                if traffic.fails and len(chunks) > 1 and traffic.rng.random() < 0.1:
                    # In the middle: some rows are written already.
                    super().forward(chunks[:1])
                    raise RuntimeError("a step failed")
                logits = super().forward(chunks)
                traffic.check_budgets(self.steps[-1])
                return logits

        model = CheckedModel(self.long_from)
        model.bend = self.bend
        return model

    def check_budgets(self, chunks: list[tuple[int, int]]) -> None:
        assert 1 <= len(chunks) <= self.max_num_seqs
        assert sum(num for _, num in chunks) <= self.max_num_batched_tokens
        if self.max_kv_bytes is not None:
            # What is released belongs to its session again, and is charged to that.
            rows = sum(len(s.kv.cache.rows) for s in self.live.values() if not s.kv.cache.closed)
            assert rows * self.lab.bytes_per_token <= self.max_kv_bytes

    def arrive(self, sequence_id: int) -> None:
        rng = self.rng
        max_tokens = rng.randint(60, 100) if self.tight else rng.randint(1, 40)
        params = {
            "seed": rng.randint(0, 9),
            "max_tokens": max_tokens,
            "temperature": rng.choice([0, 0.7, 1.0]),
            "stop_token_ids": tuple(rng.sample(range(40), 0 if self.tight else 2)),
            "presence_penalty": rng.choice([0.0, 1.0]),
            "repetition_penalty": rng.choice([1.0, 1.3]),
            "top_p": rng.choice([1.0, 0.9]),
        }
        params["min_tokens"] = rng.randint(0, max_tokens) if rng.random() < 0.2 else 0
        prompt = [rng.randrange(40) for _ in range(rng.choice([1, 3, 5, 69] if self.tight else [1, 3, 10, 45, 69]))]
        self.prompts[sequence_id] = prompt
        self.expected[sequence_id] = expected = self._alone(prompt, params)
        taken = rng.choice([0, 0, rng.randint(0, len(expected.token_ids))])
        kv = self.lab.KV(prompt + expected.token_ids[:taken])
        if self.max_kv_bytes is None and rng.random() < 0.4:
            # A warm cache, perhaps of the wrong regime. (Bytes are counted only of what the engine has filled.)
            kv = self.lab.KV(kv.token_ids, long_rope=self.long_from is not None and rng.random() < 0.5)
            for position in range(rng.randint(0, kv.num_tokens)):
                kv.cache.write(position, kv.token_ids[position], kv.long_rope)
                kv.num_computed_tokens = position + 1
        sequence = self.lab.sequence(
            sequence_id,
            kv=kv,
            num_prompt_tokens=len(prompt),
            max_num_tokens=rng.choice([10_000, kv.num_tokens + rng.randint(0, 5)]),
            **params,
        )
        self.live[sequence_id] = sequence
        reply = self.replies[sequence_id] = type(expected)()
        reply.token_ids += expected.token_ids[:taken]
        self.engine.add(sequence)

    def _alone(self, prompt: list[int], params: dict[str, Any]) -> Any:
        model = self.lab.Model(self.long_from)
        model.bend = self.bend
        engine = self.lab.engine(model, max_num_batched_tokens=10_000, max_model_len=self.max_model_len)
        engine.add(self.lab.sequence(0, prompt, **params))
        return self.lab.drain(engine)[0]

    def step(self) -> None:
        had_work = self.engine.has_work
        outputs = self.engine.step()
        assert had_work or not outputs
        self.lab.collect(outputs, self.replies)
        for output in outputs:
            self.check_memory(output.sequence_id)
            if output.released:
                assert self.live.pop(output.sequence_id).kv.cache.closed

    def check_memory(self, sequence_id: int) -> None:
        """It holds what has been told, and never a token that was only guessed."""
        sequence, reply = self.live[sequence_id], self.replies[sequence_id]
        kv = sequence.kv
        assert kv.token_ids == sequence.token_ids == self.prompts[sequence_id] + reply.token_ids
        assert kv.num_tokens <= min(sequence.max_num_tokens, self.max_model_len)
        assert kv.num_computed_tokens < kv.num_tokens
        # Rows of guesses lie within the lease too.
        assert max(kv.cache.rows, default=0) < sequence.max_num_tokens

    def abort_one(self) -> None:
        if self.live:
            sequence_id = self.rng.choice(list(self.live))
            self.aborted.add(sequence_id)
            self.engine.abort(sequence_id)

    def extend_all(self) -> None:
        for sequence_id, sequence in self.live.items():
            if sequence.is_paused:
                self.engine.extend(sequence_id, sequence.max_num_tokens + self.rng.randint(1, 20))

    def check_reply(self, sequence_id: int) -> None:
        reply, expected = self.replies[sequence_id], self.expected[sequence_id]
        assert reply.released
        got = len(reply.token_ids)
        assert reply.token_ids == expected.token_ids[:got]
        if reply.finish_reason == "error":
            # Only for want of memory, and no earlier than there is none.
            assert self.max_kv_bytes is not None
            assert "bytes of KV cache" in reply.error
            num_tokens = len(self.prompts[sequence_id]) + got
            assert num_tokens * self.lab.bytes_per_token > self.max_kv_bytes
        elif reply.finish_reason == "abort":
            assert sequence_id in self.aborted
        else:
            assert (got, reply.finish_reason) == (len(expected.token_ids), expected.finish_reason)


@pytest.mark.parametrize("speculates", [False, True], ids=["", "speculating"])
@pytest.mark.parametrize("seed", range(25))
def test_random_traffic(lab: Any, seed: int, speculates: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    traffic = Traffic(lab, seed, speculates)
    arrivals = 0
    steps = 0
    while arrivals < 15 or traffic.live:
        if arrivals < 15 and traffic.rng.random() < 0.4:
            traffic.arrive(arrivals)
            arrivals += 1
        if traffic.rng.random() < 0.03:
            traffic.abort_one()
        if traffic.rng.random() < 0.3 or not traffic.engine.has_work:
            traffic.extend_all()
        traffic.step()
        steps += 1
        # Alone, one after another, a token a step and everything twice, they would take about this long.
        assert steps < 15 * 2 * (69 + 100 + 100), "something starves"
    assert (traffic.engine.num_running, traffic.engine.num_waiting) == (0, 0)
    assert not traffic.engine.has_work
    for sequence_id in range(15):
        traffic.check_reply(sequence_id)


@pytest.mark.parametrize("speculates", [False, True], ids=["", "speculating"])
def test_the_traffic_meets_what_it_is_meant_to_meet(
    lab: Any, speculates: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The cases above are worth something only if preemption, regime changes, right and wrong drafts and errors do
    occur in them."""
    caplog.set_level(logging.CRITICAL)
    preemptions = regime_changes = chunks = failures = accepted = rejected = 0
    finished: set[str | None] = set()
    for seed in range(16):
        traffic = Traffic(lab, seed, speculates)
        sequences = []
        for i in range(15):
            traffic.arrive(i)
            sequences += [traffic.live[i]]
        traffic.abort_one()
        while traffic.live:
            traffic.extend_all()
            traffic.step()
        preemptions += traffic.engine.num_preemptions
        regime_changes += sum(name == "long_rope" for s in sequences for name, _ in s.kv.calls)
        chunks += sum(start > 0 and num > 1 for step in traffic.model.steps for start, num in step)
        failures += len(traffic.model.steps) - traffic.engine.step_count
        finished |= {reply.finish_reason for reply in traffic.replies.values()}
        accepted += traffic.engine.num_accepted_tokens
        rejected += traffic.engine.num_draft_tokens - traffic.engine.num_accepted_tokens
    assert (min(accepted, rejected) >= 500) if speculates else (accepted == rejected == 0)
    assert min(preemptions, regime_changes, chunks, failures) >= 10
    assert finished == {"stop", "length", "abort", "error"}


def test_everybody_gets_through_a_long_crowd(lab: Any) -> None:
    """Long prompts and short ones come without end: the latest to finish has waited no longer than its share."""
    rng = random.Random(5)
    engine = lab.engine(max_num_seqs=4, max_num_batched_tokens=16, max_kv_bytes=2000)
    arrived: dict[int, int] = {}
    waited: list[int] = []
    work = 0
    for step in range(1500):
        if step % 8 == 0:
            length = rng.choice([2, 8, 100])
            engine.add(lab.sequence(step, [rng.randrange(40) for _ in range(length)], max_tokens=8))
            arrived[step] = step
            work += length + 8
        for output in engine.step():
            if output.released:
                assert output.finish_reason == "length"
                waited.append(step - arrived.pop(output.sequence_id))
    assert work < 1500 * 16 * 0.8  # the engine is busy, not overrun
    assert max(waited) < 80
    assert len(arrived) < 10
