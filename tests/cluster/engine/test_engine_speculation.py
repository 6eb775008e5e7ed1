"""Engine with n-gram speculation: every reply and every byte that counts is what it is without, in fewer steps where a
text repeats itself. Random traffic is in test_engine_traffic.py."""

from __future__ import annotations

import itertools
import logging
import random
from typing import Any

import pytest
import torch

from phi_cluster.cluster.engine.engine import Engine, EngineLimits
from phi_cluster.cluster.engine.model_runner import Drawn, ModelRunner
from phi_cluster.cluster.engine.segment_kv import SegmentKV, splice
from phi_cluster.cluster.engine.sequence import Sequence
from phi_cluster.cluster.engine.settings import Speculation
from phi_cluster.cluster.session.segment import Segment
from phi_cluster.cluster.session.segment_layout import SegmentLayout
from phi_cluster.model.checkpoint import expected_tensors
from phi_cluster.model.config import Phi3Config
from phi_cluster.model.kv_layout import KVCacheLayout
from phi_cluster.model.phi3 import Phi3ForCausalLM
from phi_cluster.model.sampling_params import SamplingParams

SPECULATION = Speculation(num_tokens=4, min_match=2, max_match=4)


def say(reply: list[int], num_prompt_tokens: int) -> Any:
    """A `bend` that makes the network say this, whoever asks."""

    def bend(row: torch.Tensor, token_ids: list[int]) -> None:
        row[reply[len(token_ids) - num_prompt_tokens]] += 1000.0

    return bend


def both(lab: Any, bend: Any, token_ids: list[int], long_from: int | None = None, **params: Any) -> tuple[Any, Any]:
    """(engine, sequence, reply) without speculation and with it."""
    made = []
    for speculation in (None, SPECULATION):
        model = lab.Model(long_from)
        model.bend = bend
        engine = lab.engine(model, speculation=speculation)
        sequence = lab.sequence(1, token_ids, **params)
        engine.add(sequence)
        made.append((engine, sequence, lab.drain(engine)[1]))
    (_, plain, expected), (_, speculated, reply) = made
    assert (reply.token_ids, reply.finish_reason, reply.num_cached_tokens) == (
        expected.token_ids,
        expected.finish_reason,
        expected.num_cached_tokens,
    )
    assert speculated.kv.token_ids == plain.kv.token_ids == token_ids + reply.token_ids
    computed = plain.kv.num_computed_tokens
    assert speculated.kv.num_computed_tokens == computed
    assert speculated.kv.long_rope == plain.kv.long_rope
    for position in range(computed):
        assert speculated.kv.cache.rows[position] == plain.kv.cache.rows[position]
    return made[0], made[1]


# The same reply


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 10},
        {"temperature": 1.0, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 0, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"temperature": 0.9, "repetition_penalty": 1.2, "frequency_penalty": -0.5},
        {"temperature": 0.5, "logit_bias": {3: 5.0, 10: -5.0}},
        {"temperature": 0.7, "stop_token_ids": (2, 31)},
        {"temperature": 0.7, "stop_token_ids": (2, 3, 8), "min_tokens": 25},
        {"temperature": 0.7, "stop_token_ids": (2, 3, 8), "min_tokens": 25, "ignore_eos": True},
        {"temperature": 0.7, "presence_penalty": 1.0, "stop_token_ids": (2,), "min_tokens": 9},
    ],
)
def test_the_reply_is_the_same(lab: Any, params: dict[str, Any]) -> None:
    accepted = 0
    for seed in range(8):
        prompt = [(seed + 3 * n) % 7 for n in range(3 + seed)]
        long_from = 30 if seed % 2 else None
        _, (engine, _, _) = both(lab, lab.repeating, prompt, long_from, seed=seed, max_tokens=40, **params)
        accepted += engine.num_accepted_tokens
    assert accepted > 4


@pytest.mark.parametrize("max_tokens", range(1, 14))
def test_a_text_that_repeats_itself_takes_fewer_steps_and_ends_exactly(lab: Any, max_tokens: int) -> None:
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2]
    bend = say([3, 4, 5, 6, 7, 8] + [1, 2, 3, 4, 5, 6, 7, 8] * 5, len(prompt))
    (plain, _, _), (engine, sequence, _) = both(lab, bend, prompt, max_tokens=max_tokens)
    assert plain.step_count == max_tokens
    # The first step computes the prompt; each later one brings four drafts and one more.
    assert engine.step_count == 1 + -(-(max_tokens - 1) // 5)
    assert engine.num_draft_tokens == engine.num_accepted_tokens == max_tokens - engine.step_count
    assert sequence.kv.num_computed_tokens == sequence.num_tokens - 1


def test_the_order_of_writing(lab: Any) -> None:
    """Each row counts before the token behind it is stored, and no guess is ever stored."""
    prompt = [1, 2, 3, 4, 5, 1, 2]
    # After 3 the guess 4, 5, 1, 2 is right twice.
    _, (_, sequence, _) = both(lab, say([3, 4, 5, 9, 9], 7), prompt, max_tokens=5)
    assert sequence.kv.calls == [
        ("set_computed", 7),
        ("append_tokens", [3]),
        ("set_computed", 8),
        ("append_tokens", [4]),
        ("set_computed", 9),
        ("append_tokens", [5]),
        ("set_computed", 10),
        ("append_tokens", [9]),
        ("set_computed", 11),
        ("append_tokens", [9]),
        ("close", None),
    ]


def test_counters(lab: Any) -> None:
    prompt = [1, 2, 3, 4, 5, 1, 2]
    _, (engine, _, _) = both(lab, say([3, 4, 5, 9, 9, 9], 7), prompt, max_tokens=6)
    # Guessed are 4, 5, 1, 2 (of which two come), nothing behind the first 9, and 9 behind the second does not fit.
    assert (engine.num_draft_tokens, engine.num_accepted_tokens, engine.step_count) == (4, 2, 4)
    (plain, _, _), _ = both(lab, say([3, 4, 5, 9, 9, 9], 7), prompt, max_tokens=6)
    assert (plain.num_draft_tokens, plain.num_accepted_tokens) == (0, 0)


# Ends


@pytest.mark.parametrize("stop", [3, 4, 5, 6, 7, 8])
def test_a_stop_token_is_the_last(lab: Any, stop: int) -> None:
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2]
    bend = say([3, 4, 5, 6, 7, 8] * 5, len(prompt))
    _, (_, _, reply) = both(lab, bend, prompt, max_tokens=20, stop_token_ids=(stop,))
    assert (reply.token_ids[-1], reply.finish_reason) == (stop, "stop")
    assert len(reply.token_ids) == stop - 2


def test_a_runner_that_goes_on_behind_a_stop_token_is_not_followed(lab: Any) -> None:
    engine = lab.engine(speculation=SPECULATION)
    sequence = lab.sequence(1, [1, 2, 3, 4, 5, 1, 2], stop_token_ids=(30,))
    engine._runner.run = lambda scheduled: {1: Drawn([30, 31])}  # type: ignore[method-assign]
    engine._scheduler._propose = lambda sequence: [30]  # type: ignore[method-assign]
    sequence.num_computed_tokens = sequence.kv.num_computed_tokens = 6
    for position, token_id in enumerate(sequence.token_ids):
        sequence.kv.cache.write(position, token_id, False)
    engine.add(sequence)
    reply = lab.drain(engine)[1]
    assert (reply.token_ids, reply.finish_reason) == ([30], "stop")
    assert sequence.kv.token_ids[7:] == [30]
    assert sequence.kv.num_computed_tokens == 7


def test_max_model_len_is_never_exceeded(lab: Any) -> None:
    prompt = [1, 2] * 5
    for max_model_len in range(11, 20):
        model = lab.Model()
        model.bend = say([1, 2] * 10, 10)
        engine = lab.engine(model, max_model_len=max_model_len, speculation=SPECULATION)
        sequence = lab.sequence(1, prompt, max_tokens=50)
        engine.add(sequence)
        reply = lab.drain(engine)[1]
        assert (len(reply.token_ids), reply.finish_reason) == (max_model_len - 10, "length")
        assert max(start + num for step in model.steps for start, num in step) == max_model_len - 1


# Leases, aborts, preemption


def test_a_lease_is_never_passed_and_pauses_change_nothing(lab: Any) -> None:
    prompt = [1, 2, 3] * 3
    model = lab.Model()
    model.bend = lab.repeating
    expected = lab.alone(model, lab.sequence(1, prompt, max_tokens=40))
    model = lab.Model()
    model.bend = lab.repeating
    engine = lab.engine(model, speculation=SPECULATION)
    sequence = lab.sequence(1, prompt, max_tokens=40, max_num_tokens=10)
    engine.add(sequence)
    replies: dict[int, Any] = {}
    for lease in (10, 12, 13, 17, 24, 25, 40, 60):
        while engine.has_work:
            lab.collect(engine.step(), replies)
            assert max(sequence.kv.cache.rows) < sequence.max_num_tokens
        engine.extend(1, lease)
    lab.collect(engine.step(), replies)
    while engine.has_work:
        lab.collect(engine.step(), replies)
    assert replies[1].token_ids == expected.token_ids
    assert engine.num_accepted_tokens >= 3


def test_an_abort_keeps_what_was_told(lab: Any) -> None:
    for steps in range(1, 8):
        model = lab.Model()
        model.bend = lab.repeating
        engine = lab.engine(model, speculation=SPECULATION)
        sequence = lab.sequence(1, [1, 2, 3] * 3, max_tokens=100)
        engine.add(sequence)
        replies: dict[int, Any] = {}
        for _ in range(steps):
            lab.collect(engine.step(), replies)
        engine.abort(1)
        lab.collect(engine.step(), replies)
        assert replies[1].finish_reason == "abort"
        assert sequence.kv.token_ids == [1, 2, 3] * 3 + replies[1].token_ids
        assert sequence.kv.num_computed_tokens == sequence.kv.num_tokens - 1


def test_preemption_changes_no_token(lab: Any) -> None:
    model = lab.Model()
    model.bend = lab.repeating
    engine = lab.engine(model, max_kv_bytes=900, speculation=SPECULATION)
    prompts = {i: [(i + n) % 40 for n in range(10)] for i in range(3)}
    for i, prompt in prompts.items():
        engine.add(lab.sequence(i, prompt, max_tokens=60, seed=i))
    replies = lab.drain(engine)
    assert engine.num_preemptions >= 1
    assert engine.num_accepted_tokens >= 10
    for i, prompt in prompts.items():
        model = lab.Model()
        model.bend = lab.repeating
        assert replies[i].token_ids == lab.alone(model, lab.sequence(i, prompt, max_tokens=60, seed=i)).token_ids


def test_others_are_not_kept_waiting(lab: Any) -> None:
    """A prompt gets as many tokens a step beside sequences that guess as beside sequences that do not."""
    steps = []
    for speculation in (None, SPECULATION):
        model = lab.Model()
        model.bend = say([1, 2] * 50, 10)
        engine = lab.engine(model, max_num_batched_tokens=8, speculation=speculation)
        for i in range(3):
            engine.add(lab.sequence(i, [1, 2] * 5, max_tokens=60))
        for _ in range(8):
            engine.step()
        model.bend = lambda row, token_ids: None
        engine.add(lab.sequence(9, [5] * 50, max_tokens=1))
        for step in range(100):
            if any(output.sequence_id == 9 for output in engine.step()):
                steps.append(step)
                break
    assert steps[0] == steps[1] == 9


# Errors


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.CRITICAL)
    return caplog


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("at", range(8, 16))
def test_nan_ends_a_reply_where_it_does_without_drafts(lab: Any, at: int) -> None:
    prompt = [1, 2, 3, 4, 1, 2]

    def bend(row: torch.Tensor, token_ids: list[int]) -> None:
        say([3, 4, 1, 2] * 5, 6)(row, token_ids)
        if len(token_ids) == at:
            row[5] = float("nan")

    _, (_, _, reply) = both(lab, bend, prompt, max_tokens=15)
    assert (len(reply.token_ids), reply.finish_reason) == (at - 6, "error")


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("alone", [True, False])
def test_a_step_that_fails_because_of_a_guess_is_repeated_without(lab: Any, alone: bool) -> None:
    model = lab.Model()
    model.bend = lab.repeating

    def before(chunks: Any) -> None:
        if any(chunk.num_logits > 1 for chunk in chunks):
            raise RuntimeError("a kernel does not like guesses")

    model.before = before
    engine = lab.engine(model, speculation=SPECULATION)
    prompts = [[1, 2, 3] * 3] if alone else [[1, 2, 3] * 3, [4, 5, 6]]
    for i, prompt in enumerate(prompts):
        engine.add(lab.sequence(i, prompt, max_tokens=20))
    replies = lab.drain(engine)
    assert engine.num_draft_tokens > 0
    assert engine.num_accepted_tokens == 0
    for i, prompt in enumerate(prompts):
        model = lab.Model()
        model.bend = lab.repeating
        assert replies[i].token_ids == lab.alone(model, lab.sequence(i, prompt, max_tokens=20)).token_ids


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("broken", ["set_computed", "append_tokens"])
@pytest.mark.parametrize("call", range(1, 8))
def test_memory_that_breaks_in_the_middle_of_a_step(lab: Any, broken: str, call: int) -> None:
    """What was stored before is told with the error."""
    model = lab.Model()
    model.bend = say([3, 4, 1, 2] * 5, 6)
    engine = lab.engine(model, speculation=SPECULATION)
    bad, good = lab.sequence(1, [1, 2, 3, 4, 1, 2]), lab.sequence(2, [1, 2, 3, 4, 1, 2])
    write = getattr(bad.kv, broken)
    calls = itertools.count(1)

    def breaking(argument: Any) -> None:
        if next(calls) == call:
            raise OSError("broken")
        write(argument)

    setattr(bad.kv, broken, breaking)
    engine.add(bad)
    engine.add(good)
    replies = lab.drain(engine)
    assert (replies[1].finish_reason, replies[1].error, replies[1].released) == ("error", "OSError: broken", True)
    assert replies[1].token_ids == ([3, 4, 1, 2] * 5)[: call - 1] == bad.kv.token_ids[6:]
    assert (len(replies[2].token_ids), replies[2].finish_reason) == (8, "length")


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("outcome", [None, [], [9, 9], [3, 4, 1, 2, 3, 4]])
def test_a_runner_that_draws_what_it_may_not_is_an_error(lab: Any, outcome: list[int] | None) -> None:
    model = lab.Model()
    model.bend = say([3, 4, 1, 2] * 5, 6)
    engine = lab.engine(model, speculation=SPECULATION)
    sequence = lab.sequence(1, [1, 2, 3, 4, 1, 2])
    engine.add(sequence)
    engine.step()
    engine._runner.run = lambda scheduled: {} if outcome is None else {1: Drawn(outcome)}  # type: ignore[method-assign]
    [output] = engine.step()
    assert output.finish_reason == "error"
    assert "the runner drew" in output.error
    assert sequence.kv.token_ids == [1, 2, 3, 4, 1, 2, 3]


# A real network on real segments


CONFIG = Phi3Config.from_dict(
    {
        "architectures": ["Phi3ForCausalLM"],
        "vocab_size": 61,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 100,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        "tie_word_embeddings": False,
        "eos_token_id": 1,
        "bos_token_id": 1,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
)
LAYOUT = SegmentLayout(KVCacheLayout.for_config(CONFIG, 256, 4))


def generate(speculation: Speculation | None, prompts: list[list[int]]) -> tuple[Engine, list[Segment]]:
    """The engine, and the segments after greedy replies of 80 tokens."""
    generator = torch.Generator().manual_seed(3)
    weights = {
        name: torch.ones(shape) if "norm" in name else torch.randn(shape, generator=generator) * 0.2
        for name, shape in expected_tensors(CONFIG).items()
    }
    model = Phi3ForCausalLM(CONFIG, weights, torch.float32)
    engine = Engine(EngineLimits(8, 64, 256), ModelRunner(model, CONFIG), lambda: 0.0, speculation)
    segments = []
    for number, prompt in enumerate(prompts):
        segment = Segment.create(LAYOUT, "test")
        kv = SegmentKV(segment.ref, LAYOUT, "test", torch.float32, segment.epoch)
        params = SamplingParams(temperature=0.0, seed=0, max_tokens=80)
        engine.add(Sequence(number, kv, splice(kv, 0, prompt), len(prompt), params, max_num_tokens=256))
        segments.append(segment)
    while engine.has_work:
        assert not [output.error for output in engine.step() if output.error]
    return engine, segments


def test_a_real_network_says_the_same() -> None:
    rng = random.Random(1)
    # One crosses LongRoPE's boundary in its reply.
    prompts = [[rng.randrange(61) for _ in range(length)] for length in (2, 9, 40, 70)]
    plain, expected = generate(None, prompts)
    engine, segments = generate(Speculation(num_tokens=4, min_match=1, max_match=4), prompts)
    for one, other in zip(segments, expected, strict=True):
        assert one.token_ids() == other.token_ids()
        assert one.num_computed_tokens == other.num_computed_tokens == one.num_tokens - 1
        assert one.long_rope == other.long_rope
        # Rows that count differ by rounding at most: torch's matrix products depend on the number of rows.
        for offset, length in LAYOUT.kv.used_ranges(one.num_computed_tokens):
            ours, theirs = (
                torch.frombuffer(bytearray(segment.kv_buffer[offset : offset + length]), dtype=torch.float32)
                for segment in (one, other)
            )
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert [segment.long_rope for segment in segments] == [False, False, True, True]
    assert engine.num_accepted_tokens > 20
    assert engine.step_count < plain.step_count
