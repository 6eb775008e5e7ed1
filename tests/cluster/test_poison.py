"""What is remembered of requests on which engines died, and what counts as the same request."""

import dataclasses
import stat

from phi_cluster.cluster.poison import PoisonList
from phi_cluster.cluster.turn_api import Position, TurnRequest

REQUEST = TurnRequest(
    tenant="tenant",
    session_id="one",
    request_id="first",
    sampling={"temperature": 0.5, "seed": None, "logit_bias": {7: 1.0, 3: -1.0}, "stop_token_ids": (1, 2)},
    messages=[{"role": "user", "content": "Hi"}],
    stop=("x",),
)


def test_the_same_request_by_any_way(tmp_path):
    poison = PoisonList(tmp_path / "poison")
    assert not poison.holds(REQUEST)
    poison.add(REQUEST)
    poison.add(REQUEST)
    again = dataclasses.replace(
        REQUEST,
        session_id=None,
        request_id="second",
        resume_from=Position(4, 5),
        sampling={"seed": None, "stop_token_ids": (1, 2), "logit_bias": {3: -1.0, 7: 1.0}, "temperature": 0.5},
    )
    # Also by another process, or one that comes later.
    assert PoisonList(tmp_path / "poison").holds(again)


def test_another_request(tmp_path):
    poison = PoisonList(tmp_path)
    poison.add(REQUEST)
    for changes in (
        {"tenant": "other"},
        {"messages": [{"role": "user", "content": "Hi!"}]},
        {"messages": None, "prompt": "Hi"},
        {"stop": ()},
        {"sampling": REQUEST.sampling | {"temperature": 0.6}},
    ):
        assert not poison.holds(dataclasses.replace(REQUEST, **changes))


def test_nobody_else_can_look(tmp_path):
    poison = PoisonList(tmp_path / "poison")
    poison.add(REQUEST)
    [file] = (tmp_path / "poison").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert file.stat().st_size == 0
