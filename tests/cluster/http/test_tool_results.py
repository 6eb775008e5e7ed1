"""Results belong to calls."""

from __future__ import annotations

from typing import Any

import pytest

from phi_cluster.cluster.http.tool_results import first_orphan

USER = {"role": "user", "content": "x"}


def calls(*ids: str) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": one, "name": "f", "arguments": ""} for one in ids],
    }


def result(call_id: str) -> dict[str, Any]:
    return {"role": "tool", "content": "", "tool_call_id": call_id}


@pytest.mark.parametrize(
    ("messages", "orphan"),
    [
        ([], None),
        ([USER, calls("a", "b"), result("b"), result("a"), USER], None),
        ([USER, calls("a", "b"), result("a"), USER], None),
        ([USER, calls("a"), result("a"), calls("a"), result("a")], None),
        ([USER, result("a")], 1),
        ([USER, calls("a"), result("a"), result("a")], 3),
        ([USER, calls("a"), result("b")], 2),
        ([USER, calls("a"), USER, result("a")], 3),
        ([USER, calls("a"), calls("b"), result("a")], 3),
    ],
)
def test_a_result_answers_a_call_before_it_once(messages: list[dict[str, Any]], orphan: int | None) -> None:
    assert first_orphan(messages) == orphan
