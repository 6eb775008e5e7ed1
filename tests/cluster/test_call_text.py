"""A call reads the same as it was generated and as a client sends it back."""

from __future__ import annotations

import json

import pytest

from phi_cluster.cluster.call_reader import CallReader
from phi_cluster.cluster.call_text import canonical, written_reply
from phi_cluster.model.tool_format import HERMES, OURS, PHI4


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ('{"a": 1, "b": 2}', '{"b":2,"a":1}'),
        ('{"a": {"y": [1, 2], "x": null}}', '{\n "a": {"x": null, "y": [1,2]}}'),
        ('{"a": 1.0}', '{"a": 1}'),
        ('{"a": 1e2}', '{"a": 100}'),
        ('{"a": "\\u00e9\\/"}', '{"a": "é/"}'),
        ('{"a": 0.1}', '{"a": 0.10}'),
        ("{}", " "),
        ("{}", ""),
    ],
)
def test_the_same_value_is_the_same_text(one: str, other: str) -> None:
    assert canonical(one) == canonical(other)
    assert json.loads(canonical(one)) == json.loads(one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ('{"a": 1}', '{"a": "1"}'),
        ('{"a": 1}', '{"a": true}'),
        ('{"a": [1, 2]}', '{"a": [2, 1]}'),
        ('{"a": 9007199254740993}', '{"a": 9007199254740992}'),
        ('{"a": 1.5}', '{"a": 1}'),
    ],
)
def test_other_values_are_other_text(one: str, other: str) -> None:
    assert canonical(one) != canonical(other)


@pytest.mark.parametrize("broken", ['{"a": "b', "NaN", '{"a": 1e999}', "[" * 100_000, "9" * 5000, "not JSON"])
def test_what_is_no_json_stays(broken: str) -> None:
    assert canonical(broken) == broken


@pytest.mark.parametrize("tool_format", [HERMES, PHI4, OURS])
def test_what_is_written_is_read_again(tool_format: object) -> None:
    calls = [("f", '{"b": 1, "a": "é"}'), ("g", "{}")]
    text = written_reply("Hm.\n", calls, tool_format, str)  # type: ignore[arg-type]
    reader = CallReader(tool_format)  # type: ignore[arg-type]
    reader.push(text)
    assert (reader.content, reader.is_whole) == ("Hm.\n", True)
    assert [(name, json.loads(arguments)) for name, arguments in reader.calls] == [
        (name, json.loads(arguments)) for name, arguments in calls
    ]
    assert written_reply(reader.content, reader.calls, tool_format, str) == text  # type: ignore[arg-type]


def test_text_without_calls_is_text() -> None:
    assert written_reply("a<b", [], HERMES, lambda text: text.replace("<", "|")) == "a|b"
