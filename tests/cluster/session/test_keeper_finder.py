"""The keeper is looked for when it is not known, or was wrong; not for every call."""

from __future__ import annotations

import pytest

from phi_cluster.cluster.session.keeper_finder import KeeperFinder


class Names:
    """Handles by name, and the names that were asked for."""

    def __init__(self, **handles: str):
        self.handles = handles
        self.asked: list[str] = []

    def __call__(self, name: str) -> str:
        self.asked.append(name)
        if name not in self.handles:
            raise ValueError(name)
        return self.handles[name]


def test_it_is_looked_for_once() -> None:
    names = Names(one="first")
    find = KeeperFinder(names, ["one", "two"])
    assert [find(), find(), find()] == ["first"] * 3
    assert names.asked == ["one"]


def test_one_that_does_not_answer_is_looked_for_again() -> None:
    names = Names(one="first")
    find = KeeperFinder(names, ["one", "two"])
    assert find() == "first"
    find.lost()
    names.handles["one"] = "started again"
    assert find() == "started again"
    find.lost()
    names.handles = {"two": "successor"}
    assert find() == "successor"
    # The right place is remembered, too.
    find.lost()
    assert find() == "successor"
    assert names.asked == ["one", "one", "one", "two", "two"]


def test_one_that_is_not_in_charge_has_a_successor_under_the_other_name() -> None:
    find = KeeperFinder(Names(one="first", two="second"), ["one", "two"])
    assert find() == "first"
    find.moved()
    assert find() == "second"
    find.moved()
    assert find() == "first"


def test_where_there_is_nobody_all_places_are_asked_each_time() -> None:
    names = Names()
    find = KeeperFinder(names, ["one", "two"])
    for _ in range(2):
        with pytest.raises(ValueError, match="no keeper"):
            find()
    assert names.asked == ["one", "two"] * 2
