"""Sequence: where it begins, when it is over, and what the sampler is told."""

from __future__ import annotations

from typing import Any

import pytest


def test_the_last_token_is_always_computed(lab: Any) -> None:
    kv = lab.KV([1, 2, 3])
    for computed, expected in ((0, 0), (1, 1), (2, 2), (3, 2)):
        kv.num_computed_tokens = computed
        sequence = lab.sequence(1, kv=kv)
        assert sequence.num_computed_tokens == expected
        assert sequence.num_cached_tokens == expected


def test_cached_tokens_are_prompt_tokens(lab: Any) -> None:
    kv = lab.KV([1, 2, 3, 4, 5])
    kv.num_computed_tokens = 4
    assert lab.sequence(1, kv=kv, num_prompt_tokens=2).num_cached_tokens == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_prompt_tokens": 0}, "num_prompt_tokens"),
        ({"num_prompt_tokens": 4}, "num_prompt_tokens"),
        ({"max_num_tokens": 2}, "max_num_tokens 2"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(lab: Any, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lab.sequence(1, [1, 2, 3], **arguments)


def test_an_empty_sequence_is_refused(lab: Any) -> None:
    with pytest.raises(ValueError, match="num_prompt_tokens"):
        lab.sequence(1, [])


def test_the_memory_must_hold_the_same_number_of_tokens(lab: Any) -> None:
    sequence = lab.sequence(1, [1, 2, 3])
    with pytest.raises(ValueError, match="holds 3 tokens, the sequence has 2"):
        type(sequence)(1, sequence.kv, [1, 2], 2, sequence.params, 10)


@pytest.mark.parametrize(
    ("reply", "params", "expected"),
    [
        ([], {"stop_token_ids": (3,)}, None),  # 3 ends the prompt, not the reply
        ([5], {"stop_token_ids": (5, 6)}, "stop"),
        ([5, 7], {"stop_token_ids": (5,)}, None),
        ([5], {"stop_token_ids": (5,), "ignore_eos": True}, None),
        ([7, 5], {"stop_token_ids": (5,), "min_tokens": 2}, None),
        ([7, 7, 5], {"stop_token_ids": (5,), "min_tokens": 2}, "stop"),
        ([7, 7], {"max_tokens": 2}, "length"),
        ([7], {"max_tokens": 2}, None),
        ([7, 5], {"max_tokens": 2, "stop_token_ids": (5,)}, "stop"),  # stop goes first
        ([7] * 7, {"max_tokens": 50}, "length"),  # max_model_len 10
    ],
)
def test_finish_reason(lab: Any, reply: list[int], params: dict[str, Any], expected: str | None) -> None:
    sequence = lab.sequence(1, [1, 2, 3, *reply], num_prompt_tokens=3, **params)
    assert sequence.finish_reason(max_model_len=10) == expected
    # The same if the tokens came one by one.
    grown = lab.sequence(1, [1, 2, 3], **params)
    for token_id in reply:
        grown.append(token_id)
    assert grown.finish_reason(max_model_len=10) == expected


def test_the_sampler_is_told_position_and_counts(lab: Any) -> None:
    sequence = lab.sequence(1, [4, 4, 2, 9, 9], num_prompt_tokens=3, presence_penalty=1.0)
    for _ in range(2):
        request = sequence.sampling_request()
        assert request.position == sequence.num_tokens
        assert request.num_generated == sequence.num_tokens - 3
        assert list(request.prompt_ids) == [2, 4]
        assert dict(request.generated_counts) == {9: sequence.token_ids[3:].count(9)}
        sequence.append(9)


def test_drafts_are_taken_as_if_they_had_been_drawn(lab: Any) -> None:
    for params in ({"presence_penalty": 1.0}, {}):
        sequence = lab.sequence(1, [4, 4, 2, 9], num_prompt_tokens=3, **params)
        ahead = sequence.sampling_request((9, 7))
        assert dict(sequence.sampling_request().generated_counts) == ({9: 1} if params else {})
        for token_id in (9, 7):
            sequence.append(token_id)
        later = sequence.sampling_request()
        assert (ahead.position, ahead.num_generated) == (later.position, later.num_generated) == (6, 3)
        assert list(ahead.prompt_ids) == list(later.prompt_ids)
        assert dict(ahead.generated_counts) == dict(later.generated_counts) == ({9: 2, 7: 1} if params else {})


def test_without_penalties_nothing_is_counted(lab: Any) -> None:
    request = lab.sequence(1, [4, 4, 2, 9], num_prompt_tokens=3).sampling_request()
    assert (request.position, request.num_generated) == (4, 1)
    assert not request.prompt_ids
    assert not request.generated_counts


def test_a_lease_that_is_full_pauses(lab: Any) -> None:
    sequence = lab.sequence(1, [1, 2, 3], max_num_tokens=4)
    assert not sequence.is_paused
    sequence.append(5)
    assert sequence.is_paused
