"""SamplingParams: every field's limits, and the way over the wire and back."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import msgpack
import pytest

from phi_cluster.model.sampling_params import SamplingParams


def params(**overrides: Any) -> SamplingParams:
    return SamplingParams(**{"seed": 7, "max_tokens": 16, **overrides})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", None),
        ("seed", 1.0),
        ("seed", True),
        ("seed", 2**64),
        ("seed", -(2**63) - 1),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 3.5),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("temperature", True),
        pytest.param("temperature", 10**400, id="temperature-integer beyond any float"),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("top_k", -1),
        ("top_k", True),
        ("top_k", 2.0),
        ("min_p", -0.01),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("presence_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("frequency_penalty", float("nan")),
        ("frequency_penalty", 3),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("ignore_eos", 1),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", ("2",)),
        ("stop_token_ids", 5),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"5": 1.0}),
        ("logit_bias", {5: 100.5}),
        ("logit_bias", {5: float("nan")}),
        ("logit_bias", [5]),
    ],
)
def test_out_of_range_is_refused_naming_the_field(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name}"):
        params(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 0),
        ("seed", -(2**63)),
        ("seed", 2**64 - 1),
        ("temperature", 0),
        ("temperature", 50.0),
        ("top_p", 1e-9),
        ("top_k", 10**9),
        ("min_p", 1.0),
        ("repetition_penalty", 0.5),
        ("presence_penalty", -2),
        ("frequency_penalty", 2.0),
        ("min_tokens", 16),
        ("logit_bias", {0: -100, 5: 100.0}),
    ],
)
def test_the_limits_themselves_are_allowed(name: str, value: object) -> None:
    assert getattr(params(**{name: value}), name) == value


def test_round_trip_through_msgpack_and_json() -> None:
    full = params(
        seed=2**64 - 1,
        temperature=0.7,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        repetition_penalty=1.1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        min_tokens=3,
        ignore_eos=True,
        stop_token_ids=(2, 32007),
        logit_bias={5: -100.0, 7: 2.5},
    )
    assert SamplingParams.from_dict(msgpack.unpackb(msgpack.packb(full.to_dict()))) == full
    assert SamplingParams.from_dict(json.loads(json.dumps(full.to_dict()))) == full
    assert SamplingParams.from_dict({"seed": 7, "max_tokens": 16}) == params()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": 1, "max_tokens": 1, "topp": 0.5}, "topp"),
        ({"max_tokens": 1}, "seed is missing"),
        ({"seed": 1}, "max_tokens is missing"),
        ({"seed": 1, "max_tokens": 1, "logit_bias": [5]}, "logit_bias"),
        ({"seed": 1, "max_tokens": 1, "logit_bias": 5}, "logit_bias"),
        ({"seed": 1, "max_tokens": 1, "stop_token_ids": 5}, "stop_token_ids"),
    ],
)
def test_from_dict_refuses_what_it_does_not_know(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams.from_dict(values)


def test_the_callers_containers_are_copied() -> None:
    bias, stops = {5: 1.0}, [2]
    made = params(logit_bias=bias, stop_token_ids=stops)
    bias[5] = 9.0
    stops.append(3)
    assert made.logit_bias == {5: 1.0}
    assert made.stop_token_ids == (2,)


def test_what_needs_randomness_and_what_needs_counts() -> None:
    assert params(temperature=0).is_greedy
    assert params(temperature=1e-30).is_greedy
    assert not params(temperature=0.01).is_greedy
    assert not params().has_penalties
    assert params(repetition_penalty=1.1).has_penalties
    assert params(presence_penalty=0.1).has_penalties
    assert params(frequency_penalty=-0.1).has_penalties


def test_torch_is_not_imported() -> None:
    code = "import sys, phi_cluster.model.sampling_params; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
