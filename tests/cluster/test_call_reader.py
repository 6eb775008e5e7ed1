"""A reply in pieces becomes text and calls, the same however it was cut."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import pytest

from phi_cluster.cluster.call_reader import CallReader, TextReader
from phi_cluster.cluster.turn_api import CallPiece, ReplyPiece
from phi_cluster.model.tool_format import HERMES, OURS, PHI4, ToolFormat

FORMATS = [HERMES, PHI4, OURS]
ARGUMENTS = [
    "{}",
    '{"city": "Rome"}',
    '{"a": {"b": [1, {"c": "}"}]}, "d": "\\"}\\\\"}',
    '{"text": "</tool_call>\\n<tool_call>]<|/tool_call|>{\\"name\\": \\"x\\""}',
    '{"é": "wörld \\u00e9"}',
]


def spelled(tool_format: ToolFormat, content: str, calls: Sequence[tuple[str, str]]) -> str:
    written = [f'{{"name": "{name}", "arguments": {arguments}}}' for name, arguments in calls]
    return content + (tool_format.opening + tool_format.between.join(written) + tool_format.closing if calls else "")


def read(reader: CallReader | TextReader, pieces: Sequence[str]) -> list[ReplyPiece]:
    found = [piece for text in pieces for piece in reader.push(text)]
    return found + reader.flush()


def joined(pieces: Sequence[ReplyPiece]) -> tuple[str, list[tuple[int, str, str]]]:
    """The text, and each call: number, name and arguments."""
    calls: list[tuple[int, str, str]] = []
    for piece in pieces:
        if isinstance(piece, CallPiece):
            if piece.name is not None:
                assert piece.arguments == ""
                calls.append((piece.number, piece.name, ""))
            else:
                assert piece.arguments
                number, name, arguments = calls[-1]
                assert number == piece.number
                calls[-1] = (number, name, arguments + piece.arguments)
        else:
            assert piece
    return "".join(piece for piece in pieces if isinstance(piece, str)), calls


@pytest.mark.parametrize("tool_format", FORMATS)
@pytest.mark.parametrize("content", ["", "Let me see.\n", "<tool_call", "a < b", "<|tool_call|> <tool_call> \n"])
def test_every_cut_gives_the_same(tool_format: ToolFormat, content: str) -> None:
    for calls in ([], [("f", ARGUMENTS[2])], [("get_x-1", ARGUMENTS[3]), ("f", "{}"), ("g" * 64, ARGUMENTS[4])]):
        text = spelled(tool_format, content, calls)
        expected = (content, [(number, *call) for number, call in enumerate(calls)])
        for at in range(len(text) + 1):
            reader = CallReader(tool_format)
            assert joined(read(reader, [text[:at], text[at:]])) == expected
            assert (reader.content, reader.calls, reader.is_whole) == (content, calls, True)
        reader = CallReader(tool_format)
        assert joined(read(reader, list(text))) == expected
        assert (reader.content, reader.calls, reader.is_whole) == (content, calls, True)


@pytest.mark.parametrize("tool_format", FORMATS)
def test_any_text_at_all_is_read_the_same_in_any_pieces(tool_format: ToolFormat) -> None:
    """Also what no grammar allows: nothing raises, and no cut matters."""
    rng = random.Random(7)
    parts = [tool_format.opening, tool_format.between, tool_format.closing, '{"name": "', '", "arguments": ', "}", "{}"]
    parts += ["f", "x y", "\n", "<", '"', "\\", '{"a": "b"}', "[", "]"]
    for _ in range(300):
        text = "".join(rng.choices(parts, k=rng.randrange(1, 14)))
        whole = CallReader(tool_format)
        expected = joined(read(whole, [text]))
        cuts = sorted(rng.sample(range(len(text) + 1), k=min(len(text), rng.randrange(1, 9))))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        reader = CallReader(tool_format)
        assert joined(read(reader, pieces)) == expected
        assert (reader.content, reader.calls, reader.is_whole) == (whole.content, whole.calls, whole.is_whole)


@pytest.mark.parametrize("tool_format", FORMATS)
def test_a_reply_that_is_cut_off_says_what_has_come(tool_format: ToolFormat) -> None:
    calls = [("first", ARGUMENTS[1]), ("second", ARGUMENTS[2])]
    text = spelled(tool_format, "Now:", calls)
    for end in range(len(text)):
        reader = CallReader(tool_format)
        content, found = joined(read(reader, [text[:end]]))
        assert text.startswith(content)
        assert len(found) <= 2
        for (number, name, arguments), (expected_name, expected) in zip(found, calls, strict=False):
            assert name == expected_name
            assert expected.startswith(arguments)
            assert number == 0 or found[0][2] == calls[0][1]
        # Text that might have become calls is text after all; a call without its name is nothing.
        assert content == text[:end] if end < 4 + len(tool_format.opening) else content == "Now:"
        if reader.is_whole:
            assert not found or spelled(tool_format, "Now:", calls[: len(found)]) == text[:end]
            json.dumps([json.loads(arguments) for _, _, arguments in found])


def test_text_goes_on_at_once_unless_a_call_may_begin() -> None:
    reader = CallReader(HERMES)
    assert reader.push("Hello") == ["Hello"]
    assert reader.push(" <tool") == [" "]
    assert reader.push("box>") == ["<toolbox>"]
    assert reader.push("<tool_call>\n") == []
    assert reader.push('{"name": "f') == []
    assert reader.push('oo", "arguments": {"a') == [CallPiece(0, "foo", ""), CallPiece(0, None, '{"a')]
    assert reader.push('": 1}') == [CallPiece(0, None, '": 1}')]


def test_without_tools_all_is_text() -> None:
    reader = TextReader()
    text = spelled(HERMES, "", [("f", "{}")])
    assert joined(read(reader, list(text))) == (text, [])
    assert (reader.content, list(reader.calls), reader.is_whole) == (text, [], True)
