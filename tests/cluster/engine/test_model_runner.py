"""ModelRunner: what the network gets, who is due tokens, which drafts count, and ids that do not exist."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from phi_cluster.cluster.engine.model_runner import Drawn, ModelRunner
from phi_cluster.cluster.engine.scheduler import ScheduledSequence as Scheduled


def runner(lab: Any, model: Any) -> ModelRunner:
    return ModelRunner(model, SimpleNamespace(vocab_size=lab.vocab_size))


def test_only_who_is_computed_to_the_end_gets_a_token(lab: Any) -> None:
    model = lab.Model()
    first, second = lab.sequence(1, [1, 2, 3, 4]), lab.sequence(2, [5, 6])
    outcomes = runner(lab, model).run([Scheduled(first, 3), Scheduled(second, 2)])
    assert outcomes[1] == Drawn([])
    assert [type(token_id) for token_id in outcomes[2].token_ids] == [int]
    assert model.steps == [[(0, 3), (0, 2)]]
    assert model.wanted == [[0, 1]]
    assert first.kv.cache.rows == {0: (1, False), 1: (2, False), 2: (3, False)}
    # Nothing but rows is written.
    assert first.kv.calls == second.kv.calls == []


def test_the_token_is_drawn_from_the_right_row(lab: Any) -> None:
    sequences = [lab.sequence(i, [i, i + 1, i + 2], seed=i) for i in range(6)]
    together = runner(lab, lab.Model()).run([Scheduled(s, 2 if i % 2 else 3) for i, s in enumerate(sequences)])
    for i, sequence in enumerate(sequences):
        assert len(together[i].token_ids) == (0 if i % 2 else 1)
        if i % 2 == 0:
            alone = lab.sequence(i, [i, i + 1, i + 2], seed=i)
            assert runner(lab, lab.Model()).run([Scheduled(alone, 3)]) == {i: together[i]}
        assert len(sequence.kv.cache.rows) == (2 if i % 2 else 3)


def test_a_step_without_any_finished_prefill(lab: Any) -> None:
    model = lab.Model()
    assert runner(lab, model).run([Scheduled(lab.sequence(1, [1, 2, 3]), 2)]) == {1: Drawn([])}
    assert model.wanted == [[0]]


def test_nan_fails_its_own_sequence_only(lab: Any) -> None:
    model = lab.Model()

    def bend(row: torch.Tensor, token_ids: list[int]) -> None:
        if token_ids[0] == 13:
            row[7] = float("nan")

    model.bend = bend
    sequences = [lab.sequence(i, [first, 2]) for i, first in enumerate((1, 13, 3, 13))]
    outcomes = runner(lab, model).run([Scheduled(s, 2) for s in sequences])
    for i in (1, 3):
        assert isinstance(outcomes[i], RuntimeError)
        assert "nan" in str(outcomes[i])
    clean = runner(lab, lab.Model()).run([Scheduled(lab.sequence(i, [first, 2]), 2) for i, first in ((0, 1), (2, 3))])
    assert {0: outcomes[0], 2: outcomes[2]} == clean


# Drafts


PENALTIES = {"presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.4}
CHOICES: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    {"temperature": 0, **PENALTIES},
    {"temperature": 1.0, **PENALTIES},
    {"stop_token_ids": tuple(range(0, 40, 3)), "min_tokens": 3},
    {"temperature": 0, "logit_bias": {5: 6.0, 7: -100.0}},
]


def one_by_one(lab: Any, params: dict[str, Any], num: int) -> list[int]:
    """What an engine says to the prompt of these tests, without drafts."""
    return lab.alone(lab.Model(), lab.sequence(1, [4, 8, 15], max_tokens=num, ignore_eos=True, **params)).token_ids


@pytest.mark.parametrize("params", CHOICES)
@pytest.mark.parametrize("wrong_at", [0, 1, 2, 3, None])
def test_drafts_are_taken_as_far_as_they_are_right(lab: Any, params: dict[str, Any], wrong_at: int | None) -> None:
    reply = one_by_one(lab, params, 4)
    drafts = reply[:3]
    if wrong_at is not None and wrong_at < 3:
        drafts[wrong_at] = (drafts[wrong_at] + 1) % 40
    model = lab.Model()
    subject = runner(lab, model)
    sequence = lab.sequence(1, [4, 8, 15], **params)
    outcome = subject.run([Scheduled(sequence, 3, tuple(drafts))])[1]
    assert outcome == Drawn(reply[: 4 if wrong_at is None else wrong_at + 1])
    assert model.steps == [[(0, 6)]]
    assert model.wanted == [[4]]
    # Nothing is counted before the engine has taken it in.
    assert sequence.token_ids == sequence.kv.token_ids == [4, 8, 15]
    assert subject.run([Scheduled(sequence, 3)])[1] == Drawn(reply[:1])


def test_drafts_of_some_beside_others(lab: Any) -> None:
    """Chunks with and without drafts, with and without penalties, in one call of the sampler."""
    scheduled, expected = [], {}
    for i, params in enumerate(CHOICES):
        reply = one_by_one(lab, params, 3)
        sequence = lab.sequence(i, [4, 8, 15], **params)
        drafts = (reply[0], (reply[1] + 1) % 40) if i % 2 else ()
        scheduled += [Scheduled(sequence, 3, drafts), Scheduled(lab.sequence(10 + i, [i, 3, 4]), 2)]
        expected |= {i: Drawn(reply[: 2 if i % 2 else 1]), 10 + i: Drawn([])}
    assert runner(lab, lab.Model()).run(scheduled) == expected


@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize("wrong_at", [0, 1, None])
def test_nan_counts_only_where_it_would_have_been_met(lab: Any, row: int, wrong_at: int | None) -> None:
    reply = one_by_one(lab, {}, 3)
    drafts = reply[:2]
    if wrong_at is not None:
        drafts[wrong_at] = (drafts[wrong_at] + 1) % 40
    model = lab.Model()

    def bend(logits: torch.Tensor, token_ids: list[int]) -> None:
        if len(token_ids) == 3 + row and token_ids[0] == 4:
            logits[7] = float("nan")

    model.bend = bend
    other = lab.sequence(2, [1, 2])
    outcomes = runner(lab, model).run([Scheduled(lab.sequence(1, [4, 8, 15]), 3, tuple(drafts)), Scheduled(other, 2)])
    if row == 0:
        assert isinstance(outcomes[1], RuntimeError)
    else:
        # The tokens before it; the next step meets it again.
        assert outcomes[1] == Drawn(reply[: min(row, 3 if wrong_at is None else wrong_at + 1)])
    assert outcomes[2] == runner(lab, lab.Model()).run([Scheduled(lab.sequence(2, [1, 2]), 2)])[2]


# Ids


@pytest.mark.parametrize(
    ("token_ids", "params", "message"),
    [
        ([1, 40, 2], {}, "token id 40 "),
        ([1, -1], {}, "token id -1 "),
        ([10**12], {}, "token id 1000000000000 "),
        ([1], {"logit_bias": {3: 1.0, 55: 1.0}}, "logit_bias: token id 55 "),
    ],
)
def test_ids_beyond_the_logits_are_refused(
    lab: Any, token_ids: list[int], params: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        runner(lab, lab.Model()).check(lab.sequence(1, token_ids, **params))


def test_all_ids_of_the_logits_are_accepted(lab: Any) -> None:
    # A stop token that the network does not have can never be drawn: that is no error.
    sequence = lab.sequence(1, range(40), logit_bias={0: 1.0, 39: 1.0}, stop_token_ids=(1000,))
    runner(lab, lab.Model()).check(sequence)


def test_logits_of_a_wrong_shape_are_an_error(lab: Any) -> None:
    subject = ModelRunner(lab.Model(), SimpleNamespace(vocab_size=lab.vocab_size + 1))
    with pytest.raises(RuntimeError, match="shape"):
        subject.run([Scheduled(lab.sequence(1, [1, 2]), 2)])


def test_the_regime_comes_from_the_model(lab: Any) -> None:
    subject = runner(lab, lab.Model(long_from=5))
    assert [subject.long_rope_for(n) for n in (1, 4, 5, 6)] == [False, False, True, True]
