"""Errors cross process borders, and come out as they went in."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Iterator

import pytest

from phi_cluster.cluster import errors
from phi_cluster.cluster.engine_client import EngineFailed
from phi_cluster.cluster.errors import ContextOverflow, LimitReached, Overloaded, PhiError
from phi_cluster.cluster.session.journal import JournalCorrupt, JournalFull


def _error_classes() -> Iterator[type[PhiError]]:
    for value in vars(errors).values():
        if inspect.isclass(value) and issubclass(value, PhiError):
            yield value
    yield from (EngineFailed, JournalCorrupt, JournalFull)


ERROR_CLASSES = list(_error_classes())


@pytest.mark.parametrize("cls", ERROR_CLASSES)
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_all_of_an_error_survives_pickling(cls: type[PhiError], protocol: int) -> None:
    error = cls("what and why", param="messages", code="a_code", retry_after=2.5)
    copy = pickle.loads(pickle.dumps(error, protocol))
    assert type(copy) is cls
    assert str(copy) == "what and why"
    assert vars(copy) == vars(error)
    assert (copy.status, copy.type) == (error.status, error.type)


@pytest.mark.parametrize("cls", ERROR_CLASSES)
def test_every_error_has_a_status_and_a_type(cls: type[PhiError]) -> None:
    assert 400 <= cls.status < 600
    assert cls.type.endswith("_error")
    assert inspect.getdoc(cls)


def test_what_is_for_the_operator_is_not_told() -> None:
    error = JournalCorrupt("the journal /var/lib/x/session.db cannot be read")
    assert "/var" not in str(error.body())
    assert error.body()["error"]["code"] == "journal_corrupt"
    assert "/var" in str(pickle.loads(pickle.dumps(error)))


def test_a_limits_rates_survive_pickling() -> None:
    error = LimitReached("enough", code="c", retry_after=1.5, rates={"requests": (5, 0, 12.0)})
    copy = pickle.loads(pickle.dumps(error))
    assert vars(copy) == vars(error)
    assert copy.rates == {"requests": (5, 0, 12.0)}


def test_a_class_has_its_code_unless_another_is_given() -> None:
    assert ContextOverflow("x").body() == {
        "error": {
            "message": "x",
            "type": "invalid_request_error",
            "param": None,
            "code": "context_length_exceeded",
        }
    }
    assert Overloaded("x", code="other", param="p").body()["error"] == {
        "message": "x",
        "type": "overloaded_error",
        "param": "p",
        "code": "other",
    }
    assert Overloaded("y").code == "overloaded"
    assert pickle.loads(pickle.dumps(Overloaded("y"))).code == "overloaded"
