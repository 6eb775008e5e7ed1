"""The compiled draw: the tokens of sampler.py's numpy code, ties and edges by hand, distributions, bad rows."""

from __future__ import annotations

import math
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from phi_cluster.model.ops import library
from phi_cluster.model.sampler import _GOLDEN, _MASK, ROW, DrawRows, SamplingError, SamplingRequest, sample, uniform
from phi_cluster.model.sampling_params import SamplingParams

INF = float("inf")
NAN = float("nan")


def available() -> list[str]:
    """The instruction sets that this CPU and the compiled library have."""
    found = []
    for isa in ("amx", "avx512_vnni", "avx512", "avx2", "plain"):
        with suppress(library.OpsUnavailable):
            found.append(library.load(isa).isa)
    return found


NONE = pytest.param("", marks=pytest.mark.skip(reason=f"no kernels: {library.problem()}"))


@pytest.fixture(params=available() or [NONE])
def draw(request: pytest.FixtureRequest) -> DrawRows:
    return partial(library.sample, library.load(request.param))


def request(position: int = 0, **params: Any) -> SamplingRequest:
    return SamplingRequest(SamplingParams(**{"seed": 3, "max_tokens": 9, **params}), position)


def tokens(draw: DrawRows, logits: Any, count: int, **params: Any) -> set[int]:
    """All that comes at positions 0 ... count-1."""
    rows = torch.as_tensor(logits, dtype=torch.float32).expand(count, -1)
    return set(sample(rows, [request(p, **params) for p in range(count)], draw))


def seed_for(u: float) -> int:
    """The seed with uniform(seed, 0) == u: splitmix64 run backwards."""

    def unmix(z: int) -> int:
        for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
            x = z
            for _ in range(64 // shift):
                x = z ^ (x >> shift)
            z = x * pow(factor, -1, 2**64) & _MASK
        return z

    start = (unmix(int(u * 2**53) << 11) - _GOLDEN) & _MASK
    return (unmix(start) - _GOLDEN) & _MASK


# Against numpy


def random_rows(rng: np.random.Generator, count: int, vocab: int) -> np.ndarray:
    """Peaked, flat, tied and masked rows in turn."""
    rows = rng.standard_normal((count, vocab)) * 3
    rows[1::8] *= 0.003
    rows[2::8] = np.round(rows[2::8])
    rows[3::8] *= 7
    rows[4::8][rng.random(rows[4::8].shape) < 0.8] = -np.inf
    rows[5::8] = 0
    # Neighbours among the floats.
    rows[6::8] = 8 + np.round(rows[6::8]) * 2.0**-20
    # Clustered: all that is likely in one block.
    rows[7::8, vocab // 2 : vocab // 2 + 100] += 12
    rows[:, rng.integers(vocab)] = 1
    return rows.astype(np.float32)


def random_params(rng: np.random.Generator, vocab: int) -> dict[str, Any]:
    params: dict[str, Any] = {"temperature": float(rng.choice([0, 1e-4, 0.3, 0.7, 1, 1, 1, 1.5, 30, 1e300]))}
    if rng.random() < 0.4:
        params["top_k"] = int(rng.choice([1, 2, 20, 50, vocab // 3 + 1, max(vocab - 1, 1), vocab, vocab + 5, 10**12]))
    if rng.random() < 0.6:
        params["top_p"] = float(rng.choice([1e-9, 0.1, 0.5, 0.9, 0.95, 0.999, 1 - 1e-9]))
    if rng.random() < 0.3:
        params["min_p"] = float(rng.choice([1e-40, 1e-4, 0.05, 0.5]))
    return {**params, "seed": int(rng.integers(-(2**63), 2**63))}


@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 100, 255, 256, 257, 1003, 4999, 32064])
def test_the_same_tokens_as_numpy(draw: DrawRows, vocab: int) -> None:
    count = min(240, 16 + 2**20 // vocab)
    rng = np.random.default_rng(vocab)
    rows = torch.from_numpy(random_rows(rng, count, vocab))
    requests = [request(int(rng.integers(10**6)), **random_params(rng, vocab)) for _ in range(count)]
    assert sample(rows, requests, draw) == sample(rows, requests)


@pytest.mark.parametrize("k", [1, 2, 3, 19, 20, 60, 61, 300, 319, 320, 500, 4998, 4999])
def test_exactly_the_top_k(draw: DrawRows, k: int) -> None:
    """The random number 0 brings the first that is kept, the largest number the last."""
    rng = np.random.default_rng(k)
    for round_to in (0, 8):
        row = rng.standard_normal(5000).round(round_to).astype(np.float32)
        kept = np.sort(np.argsort(-row, kind="stable")[:k])
        ends = [request(seed=seed_for(u), top_k=k) for u in (0.0, 1 - 2**-53)]
        assert sample(torch.from_numpy(row).expand(2, -1), ends, draw) == [kept[0], kept[-1]]


# By hand


def test_the_random_number_is_the_samplers(draw: DrawRows) -> None:
    """With 4096 equal weights the token shows the number's first 12 bits."""
    zeros = torch.zeros(1, 4096)
    for u in (0.0, 2**-53, 0.25 - 2**-53, 0.25, 0.5, 0.7, 1 - 2**-53):
        assert uniform(seed_for(u), 0) == u
        assert sample(zeros, [request(seed=seed_for(u))], draw) == [int(u * 4096)]
        assert sample(zeros, [request(seed=seed_for(u), top_p=1 - 1e-15)], draw) == [int(u * 4096)]
    for seed, position in ((-1, 5), (2**64 - 1, 5), (-(2**63), 2**40), (0, 0)):
        wanted = int(uniform(seed, position) * 4096)
        assert sample(zeros, [request(position, seed=seed)], draw) == [wanted]


def test_masked_tokens_are_never_drawn(draw: DrawRows) -> None:
    row = np.full(1000, -INF, np.float32)
    row[[300, 301, 700]] = 1
    for u, token in ((0.0, 300), (0.34, 301), (1 - 2**-53, 700)):
        for params in ({}, {"top_p": 0.9999}, {"top_k": 3}, {"top_k": 900}, {"min_p": 0.5}):
            assert sample(torch.from_numpy(row)[None], [request(seed=seed_for(u), **params)], draw) == [token]


def test_greedy_takes_the_first_of_equals(draw: DrawRows) -> None:
    for size in (3, 64, 1000, 5000):
        row = np.zeros(size, np.float32)
        row[size // 3 :] = 5
        assert tokens(draw, row, 1, temperature=0) == {size // 3}
        assert tokens(draw, row, 20, top_k=1) == {size // 3}
        assert tokens(draw, row, 20, top_p=1e-12) == {size // 3}
        assert tokens(draw, row, 200, min_p=1.0) <= set(range(size // 3, size))
    assert tokens(draw, [-1.0, -0.0, 0.0], 1, temperature=0) == {1}
    assert tokens(draw, [-INF, -3e38, -INF], 1, temperature=0) == {1}


def test_lower_ids_come_first_at_the_edges(draw: DrawRows) -> None:
    assert tokens(draw, [1.0, 2.0, 2.0, 0.0, 2.0], 300, top_k=2) == {1, 2}
    assert tokens(draw, [0.0] * 10, 300, top_p=0.45) == {0, 1, 2, 3, 4}
    assert tokens(draw, [0.0] * 1000, 500, top_p=0.002) == {0, 1}
    assert tokens(draw, [-9.0] * 500 + [0.0] * 500, 500, top_k=3) == {500, 501, 502}


def test_top_p_counts_what_top_k_and_min_p_have_left(draw: DrawRows) -> None:
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    assert tokens(draw, logits, 300, top_k=2, top_p=0.55) == {0}
    assert tokens(draw, logits, 300, min_p=0.7, top_p=0.55) == {0}
    assert tokens(draw, logits, 300, top_p=0.55) == {0, 1}
    assert tokens(draw, logits, 300, min_p=0.4) == {0, 1, 2}


def test_rankings_are_by_logit_where_weights_are_equal(draw: DrawRows) -> None:
    row = np.zeros(1000, np.float32)
    row[700], row[800], row[900] = 100, 2e-8, 1e-8
    assert tokens(draw, row, 300, top_k=2, temperature=50) == {700, 800}
    assert tokens(draw, row, 300, top_k=3, temperature=50) == {700, 800, 900}


def test_extreme_numbers(draw: DrawRows) -> None:
    assert tokens(draw, [3e38, -3e38], 20, temperature=0.1) == {0}
    assert tokens(draw, [3e38, -3e38], 20, temperature=1e300, top_k=1) == {0}
    assert tokens(draw, [1e30, -1e30, 0.0], 100, temperature=1e300, top_p=0.999) == {0, 1, 2}
    assert tokens(draw, [1e-45, 0.0, -1e-45] * 100, 100, top_k=1) == {0}
    assert tokens(draw, [-3e-45, -1e-45, 1e-45] * 100, 300, top_k=102) <= {*range(2, 300, 3), 1, 4}
    assert tokens(draw, [5.0], 3, top_p=0.5) == {0}


# Distribution


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.1}],
)
def test_distribution_is_the_softmax(draw: DrawRows, params: dict[str, Any]) -> None:
    logits = np.random.default_rng(1).standard_normal(40) * 1.5
    expected = np.exp(logits / params.get("temperature", 1.0))
    expected /= expected.sum()
    order = np.argsort(-expected)
    expected[order[params.get("top_k", 40) :]] = 0
    before = np.cumsum(expected[order]) - expected[order]
    expected[order[before >= params.get("top_p", 2.0)]] = 0
    expected[expected < params.get("min_p", 0.0) * expected.max()] = 0
    expected /= expected.sum()
    count = 8000
    rows = torch.from_numpy(logits).float().expand(count, -1)
    drawn = sample(rows, [request(p, **params) for p in range(count)], draw)
    counts = np.bincount(drawn, minlength=40)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - count * expected)[possible] ** 2 / (count * expected[possible])).sum()
    freedom = int(possible.sum()) - 1
    assert freedom > 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


# Independence and errors


def test_what_lies_around_a_row_does_not_matter(draw: DrawRows) -> None:
    rng = np.random.default_rng(9)
    rows = random_rows(rng, 24, 1003)
    requests = [request(int(rng.integers(10**6)), **random_params(rng, 1003)) for _ in range(24)]
    alone = [sample(torch.from_numpy(rows[i : i + 1].copy()), requests[i : i + 1], draw)[0] for i in range(24)]
    for before, behind in ((0, 0), (1, 4), (3, 40)):
        wide = torch.full((24, before + 1003 + behind), NAN)
        inner = wide[:, before : before + 1003]
        inner.copy_(torch.from_numpy(rows))
        assert sample(inner, requests, draw) == alone
        assert sample(inner.flip(0), requests[::-1], draw)[::-1] == alone
        assert torch.equal(inner, torch.from_numpy(rows))
    columns = torch.from_numpy(np.asfortranarray(rows))
    assert sample(columns, requests, draw) == alone


@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_k": 5}, {"top_p": 0.9}])
@pytest.mark.parametrize("vocab", [1, 5, 16, 300, 1024])
def test_bad_rows_are_named(draw: DrawRows, vocab: int, params: dict[str, Any]) -> None:
    good = np.random.default_rng(vocab).standard_normal(vocab).astype(np.float32)
    for place in {0, vocab // 2, vocab - 1}:
        for value, status, why in ((NAN, 1, "nan"), (-NAN, 1, "nan"), (INF, 2, "inf")):
            logits = np.stack([good, good, good])
            logits[1, place] = value
            with pytest.raises(SamplingError, match=why) as caught:
                sample(torch.from_numpy(logits), [request(**params)] * 3, draw)
            assert list(caught.value.rows) == [1]
            assert statuses(draw, logits) == [0, status, 0]
    logits = np.stack([good, np.full_like(good, -INF)])
    with pytest.raises(SamplingError, match="masked"):
        sample(torch.from_numpy(logits), [request(**params)] * 2, draw)
    assert statuses(draw, logits) == [0, 3]
    if vocab > 1:
        # NaN counts before infinity, as in numpy.
        logits[1, :2] = INF, NAN
        assert statuses(draw, logits) == [0, 1]


def statuses(draw: DrawRows, logits: np.ndarray) -> list[int]:
    rows = np.zeros(len(logits), ROW)
    rows["logits"] = [row.ctypes.data for row in logits]
    rows["temperature"], rows["top_p"], rows["vocab"] = 1, 1, logits.shape[1]
    draw(rows)
    assert ((rows["token"] == -1) == (rows["status"] != 0)).all()
    result: list[int] = rows["status"].tolist()
    return result
