"""ModelRunner: what the network gets, who is due a token, and ids that do not exist."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from phi_cluster.cluster.engine.model_runner import ModelRunner


def runner(lab: Any, model: Any) -> ModelRunner:
    return ModelRunner(model, SimpleNamespace(vocab_size=lab.vocab_size))


def test_only_who_is_computed_to_the_end_gets_a_token(lab: Any) -> None:
    model = lab.Model()
    first, second = lab.sequence(1, [1, 2, 3, 4]), lab.sequence(2, [5, 6])
    outcomes = runner(lab, model).run([(first, 3), (second, 2)])
    assert outcomes[1] is None
    assert isinstance(outcomes[2], int)
    assert model.steps == [[(0, 3), (0, 2)]]
    assert first.kv.cache.rows == {0: (1, False), 1: (2, False), 2: (3, False)}
    # Nothing but rows is written.
    assert first.kv.calls == second.kv.calls == []


def test_the_token_is_drawn_from_the_right_row(lab: Any) -> None:
    sequences = [lab.sequence(i, [i, i + 1, i + 2], seed=i) for i in range(6)]
    together = runner(lab, lab.Model()).run([(s, 2 if i % 2 else 3) for i, s in enumerate(sequences)])
    for i, sequence in enumerate(sequences):
        assert (together[i] is None) == bool(i % 2)
        if i % 2 == 0:
            alone = lab.sequence(i, [i, i + 1, i + 2], seed=i)
            assert runner(lab, lab.Model()).run([(alone, 3)]) == {i: together[i]}
        assert len(sequence.kv.cache.rows) == (2 if i % 2 else 3)


def test_a_step_without_any_finished_prefill(lab: Any) -> None:
    assert runner(lab, lab.Model()).run([(lab.sequence(1, [1, 2, 3]), 2)]) == {1: None}


def test_nan_fails_its_own_sequence_only(lab: Any) -> None:
    model = lab.Model()

    def bend(row: torch.Tensor, token_ids: list[int]) -> None:
        if token_ids[0] == 13:
            row[7] = float("nan")

    model.bend = bend
    sequences = [lab.sequence(i, [first, 2]) for i, first in enumerate((1, 13, 3, 13))]
    outcomes = runner(lab, model).run([(s, 2) for s in sequences])
    for i in (1, 3):
        assert isinstance(outcomes[i], RuntimeError)
        assert "nan" in str(outcomes[i])
    clean = runner(lab, lab.Model()).run([(lab.sequence(i, [first, 2]), 2) for i, first in ((0, 1), (2, 3))])
    assert {0: outcomes[0], 2: outcomes[2]} == clean


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
        subject.run([(lab.sequence(1, [1, 2]), 2)])


def test_the_regime_comes_from_the_model(lab: Any) -> None:
    subject = runner(lab, lab.Model(long_from=5))
    assert [subject.long_rope_for(n) for n in (1, 4, 5, 6)] == [False, False, True, True]
