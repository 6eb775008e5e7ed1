"""Log probabilities against torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from phi_cluster.model.logprobs import token_logprobs


def test_they_are_the_log_softmax() -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)) * 8
    expected = logits.double().log_softmax(-1)
    ids = [3, 0, 299, 7, 150]
    for row, (logprob, top, values) in enumerate(token_logprobs(logits.numpy(), ids, 20)):
        assert logprob == pytest.approx(float(expected[row, ids[row]]), abs=1e-12)
        best = expected[row].topk(20)
        assert top == best.indices.tolist()
        assert values == pytest.approx(best.values.tolist(), abs=1e-12)


def test_of_equals_the_lower_id_comes_first() -> None:
    [(logprob, top, values)] = token_logprobs(np.array([[1, 2, 2, 0, 2]], np.float32), [3], 2)
    assert top == [1, 2]
    assert values[0] == values[1] > logprob


def test_a_row_does_not_depend_on_others() -> None:
    logits = np.random.default_rng(0).normal(0, 5, (9, 4099)).astype(np.float32)
    together = token_logprobs(logits, list(range(9)), 5)
    assert together == [token_logprobs(logits[i : i + 1], [i], 5)[0] for i in range(9)]


def test_none_of_the_likeliest_and_more_than_there_are() -> None:
    row = np.array([[0.0, 1.0]], np.float32)
    assert token_logprobs(row, [0], 0)[0][1:] == ([], [])
    assert token_logprobs(row, [0], 20)[0][1] == [1, 0]


def test_huge_logits_do_not_overflow() -> None:
    [(logprob, _, _)] = token_logprobs(np.array([[1e38, -3e38]], np.float32), [1], 0)
    assert np.isfinite(logprob)
