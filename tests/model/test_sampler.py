"""The sampler: distributions against a plain softmax, processors by hand, and independence of everything else."""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from phi_cluster.model.sampler import (
    _PACKED_ROW,
    ROW,
    SamplingError,
    SamplingRequest,
    _inverse_cdf,
    _mix,
    _process,
    _top_p,
    sample,
    uniform,
)
from phi_cluster.model.sampling_params import SamplingParams

INF = float("inf")
NAN = float("nan")


def request(
    position: int = 0,
    num_generated: int = 0,
    prompt_ids: tuple[int, ...] = (),
    generated: tuple[int, ...] = (),
    **params: Any,
) -> SamplingRequest:
    return SamplingRequest(
        params=SamplingParams(**{"seed": 3, "max_tokens": 100, **params}),
        position=position,
        num_generated=num_generated or len(generated),
        prompt_ids=tuple(sorted(set(prompt_ids))),
        generated_counts={i: generated.count(i) for i in generated},
    )


def one(logits: list[float] | np.ndarray | torch.Tensor, **arguments: Any) -> int:
    return sample(torch.as_tensor(logits, dtype=torch.float32)[None], [request(**arguments)])[0]


def draw_many(logits: list[float], count: int, **params: Any) -> np.ndarray:
    """How often each token comes at positions 0 ... count-1."""
    rows = torch.tensor(logits).repeat(count, 1)
    tokens = sample(rows, [request(position=p, **params) for p in range(count)])
    return np.bincount(tokens, minlength=len(logits))


def random_logits(seed: int, *shape: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


# Random numbers


def test_mix_is_splitmix64() -> None:
    # The published outputs of splitmix64 started at 1234567.
    golden = 0x9E3779B97F4A7C15
    outputs = [_mix((1234567 + n * golden) % 2**64) for n in (1, 2, 3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_uniform_is_uniform_over_positions_and_over_seeds() -> None:
    for numbers in ([uniform(5, p) for p in range(20_000)], [uniform(s, 5) for s in range(20_000)]):
        assert all(0 <= u < 1 for u in numbers)
        counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
        chi_square = ((counts - 200) ** 2 / 200).sum()
        assert 50 < chi_square < 160  # 99 degrees of freedom: mean 99, deviation 14


def test_neighbouring_seeds_and_positions_are_unrelated() -> None:
    grid = np.array([[uniform(s, p) for p in range(100)] for s in range(100)])
    assert len(np.unique(grid)) == grid.size
    for lag in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1]), (grid[1:, 1:], grid[:-1, :-1])):
        assert abs(np.corrcoef(lag[0].ravel(), lag[1].ravel())[0, 1]) < 0.03


def test_every_seed_that_params_allow_works() -> None:
    numbers = [uniform(s, 0) for s in (-(2**63), -1, 0, 1, 2**63 - 1, 2**64 - 2)]
    assert len(set(numbers)) == 6
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)


# The draw


@pytest.mark.parametrize(
    ("temperature", "params"),
    [
        (1.0, {}),
        (0.5, {}),
        (2.0, {"seed": 77}),
        (1.0, {"top_k": 6}),
        (1.0, {"top_p": 0.8}),
        (1.0, {"min_p": 0.1}),
    ],
)
def test_distribution_is_the_softmax(temperature: float, params: dict[str, Any]) -> None:
    logits = random_logits(1, 40, scale=1.5)
    expected = torch.softmax(logits.double() / temperature, 0).numpy()
    order = np.argsort(-expected)
    if "top_k" in params:
        expected[order[params["top_k"] :]] = 0
    if "top_p" in params:
        before = np.cumsum(expected[order]) - expected[order]
        expected[order[before >= params["top_p"]]] = 0
    if "min_p" in params:
        expected[expected < params["min_p"] * expected.max()] = 0
    expected /= expected.sum()
    count = 8000
    counts = draw_many(logits.tolist(), count, temperature=temperature, **params)
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    assert 1 < possible.sum() <= 40
    chi_square = ((counts - count * expected)[possible] ** 2 / (count * expected[possible])).sum()
    freedom = int(possible.sum()) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_distribution_over_a_large_vocabulary() -> None:
    # 3000 tokens in ten bands of equal probability, so that every block of the running sum is hit.
    counts = draw_many([0.0] * 3000, 6000)
    bands = counts.reshape(10, 300).sum(1)
    assert ((bands - 600) ** 2 / 600).sum() < 9 + 4 * math.sqrt(18)


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 1000])
def test_inverse_cdf_agrees_with_a_plain_loop(size: int) -> None:
    weights = np.random.default_rng(size).random(size).astype(np.float32)
    weights[::3] = 0
    weights[size // 2] = 1
    total = math.fsum(weights.tolist())
    for u in [0.0, 1e-300, *np.linspace(0, 1, 301)[1:-1], 1 - 2**-53]:
        index = _inverse_cdf(weights, float(u))
        assert weights[index] > 0
        below = math.fsum(weights[:index].tolist())
        assert below <= u * total * (1 + 1e-12)
        assert below + float(weights[index]) >= u * total * (1 - 1e-12)


def test_impossible_tokens_are_never_drawn() -> None:
    counts = draw_many([-INF, 0.0, -INF, 0.0, -INF], 500)
    assert counts.tolist()[::2] == [0, 0, 0]
    assert counts.sum() == 500


def test_extreme_temperatures() -> None:
    assert {one([1.0, 1.001, 0.0], temperature=1e-4, position=p) for p in range(50)} == {1}
    assert one([1.0, 2.0, 2.0], temperature=1e-300) == 1
    counts = draw_many([50.0, 0.0, -50.0, -INF], 3000, temperature=1e300)
    assert counts[3] == 0
    assert (abs(counts[:3] - 1000) < 120).all()
    assert one([3e38, -3e38], temperature=0.1) == 0


# Greedy


def test_greedy_takes_the_largest_and_of_equals_the_first() -> None:
    logits = random_logits(2, 8, 1000)
    tokens = sample(logits, [request(temperature=0) for _ in range(8)])
    assert tokens == [row.index(max(row)) for row in logits.tolist()]
    for size in (3, 64, 1000):
        ties = torch.zeros(1, size)
        ties[0, size // 3 :] = 5
        assert sample(ties, [request(temperature=0)]) == [size // 3]


def test_top_k_1_is_greedy_ties_included() -> None:
    logits = random_logits(3, 20, 500).round()  # rounded: many ties
    greedy = sample(logits, [request(temperature=0)] * 20)
    assert sample(logits, [request(top_k=1, temperature=1.5, position=p) for p in range(20)]) == greedy


def test_a_tiny_top_p_and_a_min_p_of_1_are_greedy() -> None:
    logits = random_logits(4, 20, 500)
    greedy = sample(logits, [request(temperature=0)] * 20)
    assert sample(logits, [request(top_p=1e-12, position=p) for p in range(20)]) == greedy
    assert sample(logits, [request(min_p=1.0, position=p) for p in range(20)]) == greedy


# Truncation


def test_top_k_keeps_exactly_k() -> None:
    assert set(np.flatnonzero(draw_many([1.0, 2.0, 2.0, 0.0, 2.0], 600, top_k=2))) == {1, 2}
    assert set(np.flatnonzero(draw_many([1.0, 1.5, 1.2], 600, top_k=3))) == {0, 1, 2}
    assert set(np.flatnonzero(draw_many([1.0, 1.5, 1.2], 600, top_k=10**9))) == {0, 1, 2}


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    logits = [math.log(p) for p in (0.1, 0.5, 0.3, 0.1)]
    for top_p, kept in ((0.45, {1}), (0.6, {1, 2}), (0.85, {0, 1, 2}), (0.95, {0, 1, 2, 3})):
        assert set(np.flatnonzero(draw_many(logits, 600, top_p=top_p))) == kept


def test_top_p_without_a_full_sort_equals_top_p_with_one() -> None:
    for seed in range(30):
        scale = (0.01, 1.0, 3.0, 10.0)[seed % 4]
        values = random_logits(seed, 2000, scale=scale).numpy()
        weights = np.exp(values - values.max())
        for top_p in (1e-6, 0.1, 0.5, 0.9, 0.999, 1 - 1e-9):
            order = np.argsort(-values, kind="stable")
            reached = np.cumsum(weights[order], dtype=np.float64)
            limit = top_p * float(weights.sum(dtype=np.float64))
            naive = order[np.concatenate(([True], reached[:-1] < limit))]
            assert _top_p(values, weights, top_p).tolist() == sorted(naive.tolist())


def test_top_p_counts_what_top_k_and_min_p_have_left() -> None:
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    # Of the first two, 0.4 / 0.7 = 0.57 is already above 0.55; of all four 0.4 is not.
    assert set(np.flatnonzero(draw_many(logits, 400, top_k=2, top_p=0.55))) == {0}
    assert set(np.flatnonzero(draw_many(logits, 400, min_p=0.7, top_p=0.55))) == {0}
    assert set(np.flatnonzero(draw_many(logits, 400, top_p=0.55))) == {0, 1}


def test_min_p_is_relative_to_the_most_probable_and_follows_temperature() -> None:
    logits = [math.log(p) for p in (0.6, 0.3, 0.08, 0.02)]
    assert set(np.flatnonzero(draw_many(logits, 800, min_p=0.1))) == {0, 1, 2}
    assert set(np.flatnonzero(draw_many(logits, 800, min_p=0.2))) == {0, 1}
    assert set(np.flatnonzero(draw_many(logits, 800, min_p=0.2, temperature=4.0))) == {0, 1, 2, 3}


# Processors


def test_logit_bias_forces_and_forbids() -> None:
    logits = random_logits(5, 1000)
    assert {one(logits, logit_bias={17: 100.0}, position=p) for p in range(50)} == {17}
    best = one(logits, temperature=0)
    assert one(logits, temperature=0, logit_bias={best: -100.0}) == int(logits.argsort(descending=True)[1])


def test_min_tokens_masks_the_stop_tokens_until_reached() -> None:
    logits = [0.0, 5.0, 4.0, 1.0]
    arguments: dict[str, Any] = {"temperature": 0, "min_tokens": 3, "stop_token_ids": (1, 2, 9)}
    assert one(logits, num_generated=2, **arguments) == 3
    assert one(logits, num_generated=3, **arguments) == 1
    # A bias does not lift the mask.
    assert one(logits, num_generated=2, logit_bias={1: 100.0}, **arguments) == 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # Penalty 2 over prompt and reply: positive logits are halved, negative doubled.
        ({"repetition_penalty": 2.0, "prompt_ids": (0, 3, 3), "generated": (1,)}, [2.0, 1.5, 2.0, -2.0]),
        ({"repetition_penalty": 0.5, "prompt_ids": (2,)}, [4.0, 3.0, 4.0, -1.0]),
        # Presence and frequency: the reply alone counts, the prompt does not.
        ({"presence_penalty": 1.5, "prompt_ids": (1,), "generated": (0, 0, 3)}, [2.5, 3.0, 2.0, -2.5]),
        ({"frequency_penalty": 0.5, "prompt_ids": (1,), "generated": (0, 0, 3)}, [3.0, 3.0, 2.0, -1.5]),
        ({"frequency_penalty": -1.0, "generated": (2, 2, 2)}, [4.0, 3.0, 5.0, -1.0]),
        # Repetition first, then the subtractions.
        (
            {
                "repetition_penalty": 2.0,
                "frequency_penalty": 0.5,
                "presence_penalty": 1.0,
                "generated": (0, 0),
            },
            [0.0, 3.0, 2.0, -1.0],
        ),
        # Bias before penalties: (4 - 2) / 2.
        ({"repetition_penalty": 2.0, "logit_bias": {0: -2.0}, "prompt_ids": (0,)}, [1.0, 3.0, 2.0, -1.0]),
    ],
)
def test_penalties_by_hand(arguments: dict[str, Any], expected: list[float]) -> None:
    row = np.array([4.0, 3.0, 2.0, -1.0], np.float32)
    assert _process(row, request(**arguments)).tolist() == expected
    assert row.tolist() == [4.0, 3.0, 2.0, -1.0]
    assert one(row, temperature=0, **arguments) == expected.index(max(expected))


def test_prompt_ids_may_be_an_array() -> None:
    made = SamplingRequest(
        SamplingParams(seed=1, max_tokens=9, temperature=0, repetition_penalty=2.0), 0, 0, np.array([0])
    )
    assert sample(torch.tensor([[4.0, 3.0]]), [made]) == [1]


# Independence


def mixed_requests(count: int) -> list[SamplingRequest]:
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 1.3, "top_p": 0.9},
        {"min_p": 0.05, "top_p": 0.95, "top_k": 100},
        {"repetition_penalty": 1.3, "prompt_ids": (1, 2, 3), "generated": (4, 4, 5)},
        {"temperature": 0, "frequency_penalty": 0.5, "generated": (7, 8)},
        {"logit_bias": {3: 5.0}, "min_tokens": 4, "stop_token_ids": (3,)},
    ]
    return [request(position=i, **{"seed": i % 5, **kinds[i % len(kinds)]}) for i in range(count)]


def test_the_same_token_alone_and_in_any_batch() -> None:
    vocabulary = 1003  # no multiple of any vector width
    logits = random_logits(6, 24, vocabulary)
    requests = mixed_requests(24)
    together = sample(logits, requests)
    assert together == [sample(logits[i : i + 1], requests[i : i + 1])[0] for i in range(24)]
    backwards = sample(logits.flip(0), requests[::-1])
    assert backwards[::-1] == together
    assert sample(logits, requests) == together
    # Neither the place in memory nor the strides matter.
    wide = torch.zeros(24, vocabulary + 5)
    wide[:, 3:-2] = logits
    assert sample(wide[:, 3:-2], requests) == together


def test_logits_are_not_changed_and_may_be_inference_tensors() -> None:
    with torch.inference_mode():
        logits = random_logits(7, 16, 200)
    before = logits.clone()
    tokens = sample(logits, mixed_requests(16))
    assert torch.equal(logits, before)
    assert sample(before.double(), mixed_requests(16)) == tokens


def test_seed_and_position_matter() -> None:
    logits = [0.0] * 1000
    assert len({one(logits, seed=s) for s in range(50)}) > 40
    assert len({one(logits, position=p) for p in range(50)}) > 40


# What cannot be sampled


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize(
    ("row", "why"),
    [
        ([0.0, NAN, 9.0], "nan"),
        ([NAN, NAN, NAN], "nan"),
        ([0.0, INF, 1.0], "inf"),
        ([-INF, -INF, -INF], "masked"),
        ([-INF, NAN, 0.0], "nan"),
    ],
)
def test_a_bad_row_is_named_and_only_it(row: list[float], why: str, temperature: float) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], row, [0.0, 1.0, 2.0]])
    with pytest.raises(SamplingError, match=why) as caught:
        sample(logits, [request(temperature=temperature)] * 3)
    assert list(caught.value.rows) == [1]


def test_a_mask_over_everything_is_an_error() -> None:
    with pytest.raises(SamplingError, match="masked"):
        one([1.0, 2.0], min_tokens=1, stop_token_ids=(0, 1))


def test_a_penalty_beyond_float32_is_an_error_of_its_row() -> None:
    with pytest.raises(SamplingError, match="inf"):
        one([1.0, 2.0], repetition_penalty=1e-300, prompt_ids=(0,))


# A draw that is made elsewhere


def draw_in_numpy(rows: np.ndarray) -> None:
    """Reads what `rows` say, as the compiled kernel does, and draws with numpy."""
    assert rows.dtype == ROW
    assert rows.flags.c_contiguous
    for row in rows:
        numbers = (ctypes.c_float * int(row["vocab"])).from_address(int(row["logits"]))
        params = SamplingParams(
            seed=int(row["seed"]),
            max_tokens=1,
            temperature=float(row["temperature"]),
            top_p=float(row["top_p"]),
            top_k=int(row["top_k"]),
            min_p=float(row["min_p"]),
        )
        logits = torch.from_numpy(np.array(numbers))[None]
        try:
            row["token"] = sample(logits, [SamplingRequest(params, int(row["position"]))])[0]
        except SamplingError as error:
            row["status"] = [word in str(error) for word in ("row", "nan", "inf", "masked")].index(True, 1)


def test_a_row_is_56_bytes_as_in_c() -> None:
    offsets = [ROW.fields[name][1] for name in ROW.names or ()] if ROW.fields else []
    assert offsets == [0, 8, 16, 24, 32, 36, 40, 44, 48, 52]
    assert ROW.itemsize == _PACKED_ROW.size == 56


def test_the_same_tokens_with_a_draw_made_elsewhere() -> None:
    logits = random_logits(8, 32, 1003)
    requests = [
        *mixed_requests(29),
        request(seed=-7, temperature=1e300, top_k=10**12),
        request(seed=2**64 - 1, temperature=1e-6),
        request(temperature=1, top_p=1),
    ]
    expected = sample(logits, requests)
    assert sample(logits, requests, draw_in_numpy) == expected
    assert sample(logits.double(), requests, draw_in_numpy) == expected
    wide = torch.zeros(32, 1010)
    wide[:, 3:-4] = logits
    assert sample(wide[:, 3:-4], requests, draw_in_numpy) == expected
    assert sample(logits.t().contiguous().t(), requests, draw_in_numpy) == expected
    assert sample(torch.zeros(0, 4), [], draw_in_numpy) == []


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_bad_rows_are_named_with_a_draw_made_elsewhere(temperature: float) -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, NAN], [INF, 0.0], [-INF, -INF], [1.0, 2.0]])
    messages = []
    for draw in (None, draw_in_numpy):
        with pytest.raises(SamplingError) as caught:
            sample(logits, [request(temperature=temperature)] * 5, draw)
        messages.append(caught.value.rows)
    assert list(messages[0]) == [1, 2, 3]
    assert messages[0] == messages[1]


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        sample(torch.zeros(2, 4), [request()])
    with pytest.raises(ValueError, match="do not fit"):
        sample(torch.zeros(4), [request()])
    assert sample(torch.zeros(0, 4), []) == []


# What a grammar leaves.


def bits(size: int, *ids: int) -> np.ndarray:
    mask = np.zeros(-(-size // 32), np.uint32)
    for i in ids:
        mask[i // 32] |= np.uint32(1 << i % 32)
    return mask


@pytest.mark.parametrize("size", [5, 32, 33, 100])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_only_what_is_allowed_is_chosen(size: int, temperature: float) -> None:
    logits = random_logits(size, 1, size)
    allowed = {0, size // 2, size - 1}
    ask = [replace(request(position=p, temperature=temperature), allowed=bits(size, *allowed)) for p in range(200)]
    drawn = sample(logits.repeat(200, 1), ask)
    assert set(drawn) == ({max(allowed, key=lambda i: float(logits[0, i]))} if temperature == 0 else allowed)


def test_where_everything_is_allowed_nothing_changes() -> None:
    logits = random_logits(4, 1, 70)
    everything = bits(70, *range(70))
    for position in range(50):
        asked = request(position=position, repetition_penalty=1.3, generated=(3, 4))
        assert sample(logits, [asked]) == sample(logits, [replace(asked, allowed=everything)])


def test_where_nothing_is_allowed_the_row_fails_alone() -> None:
    asks = [request(), replace(request(), allowed=bits(40))]
    with pytest.raises(SamplingError) as caught:
        sample(random_logits(1, 2, 40), asks)
    assert caught.value.rows == {1: "every token is masked"}
