"""Engine: one behaviour a test, on a fake network and fake memory. Random traffic is in test_engine_traffic.py."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch


def choose(*token_ids: int) -> Any:
    """A `bend` that makes the network say these tokens, one after another, in every sequence (prompts of 3)."""

    def bend(row: torch.Tensor, tokens: list[int]) -> None:
        row[token_ids[(len(tokens) - 3) % len(token_ids)]] = 1000.0

    return bend


# The founding bug: two generations on one model, short and long, one after the other and at once.


@pytest.mark.parametrize("lengths", [(5, 5), (103, 103), (103, 5), (5, 103)])
def test_independent_generations_one_after_the_other(lab: Any, lengths: tuple[int, ...]) -> None:
    model = lab.Model()
    engine = lab.engine(model)
    for i, length in enumerate(lengths):
        prompt = [n % 40 for n in range(length)]
        engine.add(lab.sequence(i, prompt, seed=4))
        reply = lab.drain(engine)[i]
        assert reply.token_ids == lab.alone(lab.Model(), lab.sequence(0, prompt, seed=4)).token_ids
        assert reply.num_cached_tokens == 0


def test_eight_at_once_equal_alone(lab: Any) -> None:
    engine = lab.engine(max_num_batched_tokens=13)
    prompts = [[(7 * i + n) % 40 for n in range(5 + 12 * i)] for i in range(8)]
    for i, prompt in enumerate(prompts):
        engine.add(lab.sequence(i, prompt, seed=i))
    replies = lab.drain(engine)
    for i, prompt in enumerate(prompts):
        assert replies[i].token_ids == lab.alone(lab.Model(), lab.sequence(i, prompt, seed=i)).token_ids
        assert replies[i].released


# Writing


def test_the_order_of_writing(lab: Any) -> None:
    sequence = lab.sequence(1, [1, 2, 3], max_tokens=2)
    engine = lab.engine(lab.Model(), max_num_batched_tokens=2)
    engine.add(sequence)
    reply = lab.drain(engine)[1]
    first, second = reply.token_ids
    assert sequence.kv.calls == [
        ("set_computed", 2),
        ("set_computed", 3),
        ("append_tokens", [first]),
        ("set_computed", 4),
        ("append_tokens", [second]),
        ("close", None),
    ]
    assert sequence.kv.token_ids == [1, 2, 3, first, second]


def test_a_fully_cached_prompt_computes_its_last_token_again(lab: Any) -> None:
    kv = lab.KV([1, 2, 3])
    engine = lab.engine()
    engine.add(lab.sequence(1, kv=kv))
    lab.drain(engine)
    again = kv.reopen()
    again.trim(3)
    assert again.num_computed_tokens == 3
    model = lab.Model()
    engine = lab.engine(model)
    engine.add(lab.sequence(2, kv=again))
    assert again.num_computed_tokens == 2  # does not count while it is written
    reply = lab.drain(engine)[2]
    assert reply.num_cached_tokens == 2
    assert model.steps[0] == [(2, 1)]
    assert reply.token_ids == lab.alone(lab.Model(), lab.sequence(1, [1, 2, 3])).token_ids


def test_a_later_turn_computes_only_what_is_new(lab: Any) -> None:
    kv = lab.KV([1, 2, 3])
    engine = lab.engine()
    engine.add(lab.sequence(1, kv=kv))
    first = lab.drain(engine)[1]
    kv = kv.reopen()
    kv.append_tokens([5, 6])
    history = list(kv.token_ids)
    model = lab.Model()
    engine = lab.engine(model)
    engine.add(lab.sequence(2, kv=kv))
    reply = lab.drain(engine)[2]
    # The last token of the first reply has no row yet.
    assert reply.num_cached_tokens == 3 + len(first.token_ids) - 1
    assert model.steps[0] == [(reply.num_cached_tokens, 3)]
    assert reply.token_ids == lab.alone(lab.Model(), lab.sequence(2, history)).token_ids


def test_trimmed_equals_never_extended(lab: Any) -> None:
    kv = lab.KV([1, 2, 3, 4, 5, 6])
    engine = lab.engine()
    engine.add(lab.sequence(1, kv=kv))
    lab.drain(engine)
    kv = kv.reopen()
    kv.trim(4)
    kv.append_tokens([9, 9])
    engine.add(lab.sequence(2, kv=kv))
    reply = lab.drain(engine)[2]
    assert reply.num_cached_tokens == 4
    assert reply.token_ids == lab.alone(lab.Model(), lab.sequence(2, [1, 2, 3, 4, 9, 9])).token_ids


# Finishing


def test_the_stop_token_is_delivered_and_counted(lab: Any) -> None:
    model = lab.Model()
    model.bend = choose(5, 6, 7, 8)
    engine = lab.engine(model)
    sequence = lab.sequence(1, [1, 2, 3], stop_token_ids=(7, 8))
    engine.add(sequence)
    reply = lab.drain(engine)[1]
    assert (reply.token_ids, reply.finish_reason) == ([5, 6, 7], "stop")
    assert sequence.kv.token_ids == [1, 2, 3, 5, 6, 7]


def test_ignore_eos_goes_on_to_the_limit(lab: Any) -> None:
    model = lab.Model()
    model.bend = choose(7)
    engine = lab.engine(model)
    engine.add(lab.sequence(1, [1, 2, 3], stop_token_ids=(7,), ignore_eos=True, max_tokens=4))
    reply = lab.drain(engine)[1]
    assert (reply.token_ids, reply.finish_reason) == ([7, 7, 7, 7], "length")


def test_min_tokens_holds_the_stop_token_back(lab: Any) -> None:
    model = lab.Model()
    model.bend = choose(7)
    engine = lab.engine(model)
    engine.add(lab.sequence(1, [1, 2, 3], stop_token_ids=(7,), min_tokens=3))
    reply = lab.drain(engine)[1]
    assert 7 not in reply.token_ids[:3]
    assert reply.token_ids[3:] == [7]
    assert reply.finish_reason == "stop"


def test_max_model_len_is_never_exceeded(lab: Any) -> None:
    engine = lab.engine(max_model_len=6)
    sequence = lab.sequence(1, [1, 2, 3], max_tokens=100)
    engine.add(sequence)
    reply = lab.drain(engine)[1]
    assert (len(reply.token_ids), reply.finish_reason) == (3, "length")
    assert sequence.kv.num_tokens == 6


def test_a_prompt_that_fills_the_context_gets_nothing(lab: Any) -> None:
    model = lab.Model()
    engine = lab.engine(model, max_model_len=3)
    engine.add(lab.sequence(1, [1, 2, 3]))
    reply = lab.drain(engine)[1]
    assert (reply.token_ids, reply.finish_reason) == ([], "length")
    assert model.steps == []


# Leases


def test_at_the_end_of_its_lease_a_sequence_pauses_and_goes_on_as_if_it_had_not(lab: Any) -> None:
    engine = lab.engine()
    sequence = lab.sequence(1, [1, 2, 3], max_num_tokens=5)
    engine.add(sequence)
    replies: dict[int, Any] = {}
    for lease in (6, 6, 20):
        while engine.has_work:
            lab.collect(engine.step(), replies)
        assert sequence.kv.num_tokens == sequence.max_num_tokens
        assert replies[1].finish_reason is None
        assert engine.step() == []
        assert engine.num_running == 1
        engine.extend(1, lease)
    while engine.has_work:
        lab.collect(engine.step(), replies)
    assert replies[1].finish_reason == "length"
    assert replies[1].token_ids == lab.alone(lab.Model(), lab.sequence(1, [1, 2, 3])).token_ids


def test_a_lease_that_ends_with_the_reply_does_not_pause(lab: Any) -> None:
    engine = lab.engine()
    engine.add(lab.sequence(1, [1, 2, 3], max_tokens=4, max_num_tokens=7))
    assert lab.drain(engine)[1].finish_reason == "length"


def test_a_lease_never_shrinks_and_strangers_are_ignored(lab: Any) -> None:
    engine = lab.engine()
    sequence = lab.sequence(1, [1, 2, 3], max_num_tokens=50)
    engine.add(sequence)
    engine.extend(1, 4)
    engine.extend(99, 4)
    assert sequence.max_num_tokens == 50


def test_a_paused_sequence_can_be_aborted(lab: Any) -> None:
    engine = lab.engine()
    engine.add(lab.sequence(1, [1, 2, 3], max_num_tokens=4))
    replies = lab.drain(engine)
    engine.abort(1)
    assert engine.has_work
    lab.collect(engine.step(), replies)
    assert replies[1].finish_reason == "abort"
    assert replies[1].released


# Taking over in the middle of a reply


@pytest.mark.parametrize("cached", [0, 2, 99])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"presence_penalty": 2.0, "frequency_penalty": 1.0},
        {"repetition_penalty": 1.8, "top_p": 0.9},
        {"stop_token_ids": tuple(range(0, 40, 2)), "min_tokens": 6},
        {"temperature": 0, "frequency_penalty": 2.0},
    ],
)
def test_a_reply_taken_over_anywhere_goes_on_exactly(lab: Any, params: dict[str, Any], cached: int) -> None:
    prompt = [3, 1, 4]
    whole = lab.alone(lab.Model(), lab.sequence(1, prompt, max_tokens=12, **params))
    assert len(whole.token_ids) > 6
    for taken in range(len(whole.token_ids) + 1):
        kv = lab.KV(prompt + whole.token_ids[:taken])
        for position in range(min(cached, kv.num_tokens)):
            kv.cache.write(position, kv.token_ids[position], False)
            kv.num_computed_tokens = position + 1
        engine = lab.engine(max_num_batched_tokens=4)
        engine.add(lab.sequence(1, kv=kv, num_prompt_tokens=3, max_tokens=12, **params))
        reply = lab.drain(engine)[1]
        assert whole.token_ids[:taken] + reply.token_ids == whole.token_ids
        assert reply.finish_reason == whole.finish_reason
        # A reply that was over already is finished without a step.
        assert (engine.step_count == 0) == (taken == len(whole.token_ids))


# Aborting


def test_abort_while_waiting_running_and_prefilling(lab: Any) -> None:
    engine = lab.engine(max_num_seqs=2, max_num_batched_tokens=4)
    sequences = [lab.sequence(i, [1] * length) for i, length in enumerate((2, 50, 3))]
    for sequence in sequences:
        engine.add(sequence)
    replies: dict[int, Any] = {}
    for _ in range(3):
        lab.collect(engine.step(), replies)
    assert (engine.num_running, engine.num_waiting) == (2, 1)
    tokens_before = len(replies[0].token_ids)
    for i in range(3):
        engine.abort(i)
        engine.abort(i)
    assert all(s.kv.cache.closed for s in sequences)
    assert engine.has_work
    steps = engine.step_count
    lab.collect(engine.step(), replies)
    assert engine.step_count == steps  # nothing was left to compute
    assert [replies[i].finish_reason for i in range(3)] == ["abort"] * 3
    assert all(replies[i].released for i in range(3))
    assert len(replies[0].token_ids) == tokens_before
    assert not engine.has_work
    assert engine.step() == []


def test_abort_of_the_unknown_and_of_the_finished_is_ignored(lab: Any) -> None:
    engine = lab.engine()
    engine.abort(5)
    engine.add(lab.sequence(1, [1, 2]))
    lab.drain(engine)
    engine.abort(1)
    assert not engine.has_work


def test_the_memory_is_closed_before_the_release_is_told(lab: Any) -> None:
    model = lab.Model()
    engine = lab.engine(model)
    sequences = {i: lab.sequence(i, [1, 2, 3 + i], max_tokens=3 + i) for i in range(4)}
    for sequence in sequences.values():
        engine.add(sequence)
    while engine.has_work:
        for output in engine.step():
            assert output.released == sequences[output.sequence_id].kv.cache.closed


# Preemption


def test_preemption_changes_no_token(lab: Any) -> None:
    model = lab.Model()
    engine = lab.engine(model, max_kv_bytes=900)
    prompts = {i: [(i + n) % 40 for n in range(10)] for i in range(3)}
    for i, prompt in prompts.items():
        engine.add(lab.sequence(i, prompt, max_tokens=60, seed=i))
    told: list[int] = []

    def step() -> Any:
        outputs = type(engine).step(engine)
        told.extend(engine.last_preempted)
        return outputs

    engine.step = step
    replies = lab.drain(engine)
    assert engine.num_preemptions == len(told) >= 1
    assert set(told) <= prompts.keys()
    for i, prompt in prompts.items():
        assert len(replies[i].token_ids) == 60
        expected = lab.alone(lab.Model(), lab.sequence(i, prompt, max_tokens=60, seed=i))
        assert replies[i].token_ids == expected.token_ids


def test_what_cannot_fit_even_alone_ends_with_an_error(lab: Any) -> None:
    engine = lab.engine(max_kv_bytes=200)
    engine.add(lab.sequence(1, [1] * 21))
    engine.add(lab.sequence(2, [1] * 18, max_tokens=10))
    replies = lab.drain(engine)
    assert replies[1].finish_reason == "error"
    assert replies[1].error == "21 tokens need 210 bytes of KV cache, the engine has 200"
    # It was given what there was room for.
    assert len(replies[2].token_ids) == 3
    assert replies[2].finish_reason == "error"
    assert all(r.released for r in replies.values())


# LongRoPE


def test_crossing_the_boundary_drops_the_cache_and_goes_on_in_the_other_regime(lab: Any) -> None:
    model = lab.Model(long_from=12)
    engine = lab.engine(model, max_num_batched_tokens=5)
    kv = lab.KV([1] * 9)
    engine.add(lab.sequence(1, kv=kv, max_tokens=6))
    reply = lab.drain(engine)[1]
    assert kv.long_rope
    assert [c for c, _ in kv.calls].count("clear") == 1
    assert model.steps == [[(0, 5)], [(5, 4)], [(9, 1)], [(10, 1)], [(0, 5)], [(5, 5)], [(10, 2)], [(12, 1)], [(13, 1)]]
    # Whoever takes the reply over behind the boundary draws the same tokens.
    later = lab.sequence(1, [1] * 9 + reply.token_ids[:4], num_prompt_tokens=9, max_tokens=6)
    assert lab.alone(lab.Model(long_from=12), later).token_ids == reply.token_ids[4:]


def test_trimming_back_drops_the_cache_too(lab: Any) -> None:
    model = lab.Model(long_from=12)
    engine = lab.engine(model)
    kv = lab.KV([1] * 14)
    engine.add(lab.sequence(1, kv=kv, max_tokens=2))
    lab.drain(engine)
    kv = kv.reopen()
    kv.trim(6)
    engine.add(lab.sequence(2, kv=kv, max_tokens=3))
    reply = lab.drain(engine)[2]
    assert not kv.long_rope
    assert reply.num_cached_tokens == 0
    expected = lab.alone(lab.Model(), lab.sequence(2, [1] * 6, max_tokens=3))
    assert reply.token_ids == expected.token_ids


# Errors


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.CRITICAL)
    return caplog


@pytest.mark.usefixtures("quiet")
def test_a_failing_step_ends_only_the_culprit(lab: Any) -> None:
    model = lab.Model()

    def before(chunks: Any) -> None:
        for chunk in chunks:
            if 13 in chunk.token_ids.tolist() and len(chunk.token_ids) == 5:
                raise RuntimeError("a kernel does not like 13")

    model.before = before
    engine = lab.engine(model)
    prompts = [[1, 2, 3], [9, 9, 13, 9, 9], [4, 5, 6]]
    for i, prompt in enumerate(prompts):
        engine.add(lab.sequence(i, prompt))
    replies = lab.drain(engine)
    assert (replies[1].finish_reason, replies[1].error) == ("error", "RuntimeError: a kernel does not like 13")
    assert replies[1].released
    for i in (0, 2):
        assert replies[i].token_ids == lab.alone(lab.Model(), lab.sequence(i, prompts[i])).token_ids
        assert replies[i].finish_reason == "length"


@pytest.mark.usefixtures("quiet")
def test_a_step_that_fails_only_as_a_batch_harms_nobody(lab: Any) -> None:
    model = lab.Model()

    def before(chunks: Any) -> None:
        if len(chunks) > 1:
            raise MemoryError

    model.before = before
    engine = lab.engine(model)
    for i in range(3):
        engine.add(lab.sequence(i, [i, 1, 2]))
    replies = lab.drain(engine)
    for i in range(3):
        assert replies[i].token_ids == lab.alone(lab.Model(), lab.sequence(i, [i, 1, 2])).token_ids


@pytest.mark.usefixtures("quiet")
def test_nan_logits_end_their_sequence(lab: Any) -> None:
    model = lab.Model()

    def bend(row: torch.Tensor, token_ids: list[int]) -> None:
        if token_ids[0] == 13 and len(token_ids) > 5:
            row.fill_(float("nan"))

    model.bend = bend
    engine = lab.engine(model)
    engine.add(lab.sequence(1, [13, 1, 2]))
    engine.add(lab.sequence(2, [4, 1, 2]))
    replies = lab.drain(engine)
    assert len(replies[1].token_ids) == 3
    assert replies[1].finish_reason == "error"
    assert "nan" in replies[1].error
    assert replies[2].token_ids == lab.alone(lab.Model(), lab.sequence(2, [4, 1, 2])).token_ids


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("broken", ["set_computed", "append_tokens", "clear", "long_rope", "close"])
def test_broken_memory_ends_its_sequence_only(lab: Any, broken: str) -> None:
    engine = lab.engine(lab.Model(long_from=6))
    bad, good = lab.sequence(1, [1, 2, 3]), lab.sequence(2, [4, 5, 6])
    bad.kv.broken.add(broken)
    engine.add(bad)
    engine.add(good)
    replies = lab.drain(engine)
    assert replies[1].released
    if broken == "close":
        assert replies[1].finish_reason == "length"
    else:
        assert (replies[1].finish_reason, replies[1].error) == ("error", f"OSError: {broken} is broken")
        assert bad.kv.cache.closed
    assert replies[2].finish_reason == "length"
    assert len(replies[2].token_ids) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token_ids": [1, 77]}, "77"),
        ({"token_ids": [1] * 1001}, "max_model_len 1000"),
        ({"token_ids": [1], "logit_bias": {40: 1.0}}, "40"),
        ({"token_ids": [1], "sequence_id": 5}, "in use"),
    ],
)
def test_add_refuses_and_closes(lab: Any, arguments: dict[str, Any], message: str) -> None:
    engine = lab.engine()
    engine.add(lab.sequence(5, [1, 2]))
    refused = lab.sequence(**{"sequence_id": 1, **arguments})
    with pytest.raises(ValueError, match=message):
        engine.add(refused)
    assert refused.kv.cache.closed
    assert set(lab.drain(engine)) == {5}


def test_an_id_is_in_use_until_its_release_is_told(lab: Any) -> None:
    engine = lab.engine()
    engine.add(lab.sequence(1, [1, 2]))
    engine.abort(1)
    with pytest.raises(ValueError, match="in use"):
        engine.add(lab.sequence(1, [1, 2]))
    engine.step()
    engine.add(lab.sequence(1, [1, 2]))
    reply = lab.drain(engine)[1]
    assert reply.num_cached_tokens == 0


# Counters


def test_counters_and_the_injected_clock(lab: Any) -> None:
    now = 100.0
    engine = lab.engine(max_num_seqs=1, clock=lambda: now)
    assert (engine.step_count, engine.last_step_at, engine.has_work) == (0, None, False)
    engine.step()
    assert (engine.step_count, engine.last_step_at) == (0, None)
    engine.add(lab.sequence(1, [1, 2], max_tokens=2))
    engine.add(lab.sequence(2, [1, 2], max_tokens=1))
    engine.step()
    assert (engine.num_running, engine.num_waiting, engine.step_count) == (1, 1, 1)
    assert engine.last_step_at == 100.0
    now = 101.0
    while engine.has_work:
        engine.step()
    assert (engine.num_running, engine.num_waiting, engine.step_count) == (0, 0, 3)
    assert engine.last_step_at == 101.0


def test_what_a_step_computed_and_how_long_sequences_waited_for_their_first(lab: Any) -> None:
    now = 100.0
    engine = lab.engine(max_num_seqs=2, clock=lambda: now)
    assert (engine.last_work, engine.queue_seconds) == (None, 0.0)
    engine.add(lab.sequence(1, [1, 2, 3], max_tokens=2))
    engine.add(lab.sequence(2, [1, 2], max_tokens=2))
    now = 103.0
    # One that waits behind them.
    engine.add(lab.sequence(3, [1], max_tokens=1))
    assert engine.queue_seconds == 3.0
    outputs = engine.step()
    assert engine.last_work == (2, 5, 0.0)
    assert [output.queue_seconds for output in outputs] == [3.0, 3.0]
    now = 104.5
    assert engine.queue_seconds == 1.5
    outputs = engine.step()
    assert engine.last_work == (2, 2, 0.0)
    # Each is told once.
    assert [output.queue_seconds for output in outputs] == [None, None]
    assert [output.queue_seconds for output in engine.step()] == [1.5]
    assert engine.queue_seconds == 0.0
    engine.step()
    assert engine.last_work is None


def test_who_leaves_the_queue_uncomputed_has_not_waited(lab: Any) -> None:
    now = 100.0
    engine = lab.engine(max_num_seqs=1, clock=lambda: now)
    engine.add(lab.sequence(1, [1, 2], max_tokens=9))
    engine.step()
    engine.add(lab.sequence(2, [1, 2], max_tokens=9))
    now = 105.0
    assert engine.queue_seconds == 5.0
    engine.abort(2)
    assert engine.queue_seconds == 0.0
    [aborted] = [output for output in engine.step() if output.sequence_id == 2]
    assert (aborted.finish_reason, aborted.queue_seconds) == ("abort", None)
