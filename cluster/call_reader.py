"""Takes a reply apart as it comes: text, and calls of tools.

Owns: how the text of a reply, in any pieces, becomes pieces of text and of calls. Knows nothing of tokens, grammars and
prompts.

The reply follows the grammar of model/tool_grammar.py. Text that does not is no error: what stands behind the last
call is text again. All pieces together are the same however the text was cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Protocol

from phi_cluster.cluster.turn_api import CallPiece, ReplyPiece
from phi_cluster.model.stop_strings import overlap
from phi_cluster.model.tool_format import CALL_CLOSING, CALL_MIDDLE, CALL_OPENING, ToolFormat

_NAME = re.compile("[a-zA-Z0-9_-]{1,64}", re.ASCII)


class ReplyReader(Protocol):
    """`content` and `calls` (name and arguments of each) are all that has come out."""

    @property
    def content(self) -> str: ...

    @property
    def calls(self) -> Sequence[tuple[str, str]]: ...

    @property
    def is_whole(self) -> bool:
        """Whether no call is broken off."""
        ...

    def push(self, text: str) -> list[ReplyPiece]:
        """What this text completes; none of the pieces is empty."""
        ...

    def flush(self) -> list[ReplyPiece]:
        """The end has come: text that was held back."""
        ...


class TextReader:
    """Of a reply without calls."""

    calls: Sequence[tuple[str, str]] = ()
    is_whole = True

    def __init__(self) -> None:
        self.content = ""

    def push(self, text: str) -> list[ReplyPiece]:
        """See ReplyReader, here and below."""
        self.content += text
        return [text] if text else []

    def flush(self) -> list[ReplyPiece]:
        return []


class CallReader:
    """Of a reply that may call tools."""

    def __init__(self, tool_format: ToolFormat):
        self._opening = tool_format.opening
        self._next_call = CALL_CLOSING + tool_format.between
        self._no_more = CALL_CLOSING + tool_format.closing
        self._calls: list[list[str]] = []
        # What has come of something that must come as a whole.
        self._held = ""
        self._arguments = _ObjectEnd()
        # Takes text, returns pieces and what is left for the next one.
        self._read: Callable[[str], tuple[list[ReplyPiece], str]] = self._read_content
        self.content = ""

    @property
    def calls(self) -> Sequence[tuple[str, str]]:
        """See ReplyReader, here and below."""
        return [(name, arguments) for name, arguments in self._calls]

    @property
    def is_whole(self) -> bool:
        # Behind the last call another one might have come.
        return self._read in (self._read_content, self._read_rest) or self._held == self._no_more

    def push(self, text: str) -> list[ReplyPiece]:
        pieces: list[ReplyPiece] = []
        while text:
            fresh, text = self._read(text)
            pieces += fresh
        return pieces

    def flush(self) -> list[ReplyPiece]:
        # A call whose name has not come is none.
        return self._said(self._held) if self._read == self._read_content else []

    def _said(self, text: str) -> list[ReplyPiece]:
        self.content += text
        return [text] if text else []

    def _read_content(self, text: str) -> tuple[list[ReplyPiece], str]:
        text = self._held + text
        at = text.find(self._opening)
        if at >= 0:
            self._held, self._read = "", self._read_name
            return self._said(text[:at]), text[at + len(self._opening) :]
        free = len(text) - overlap(text, self._opening)
        self._held = text[free:]
        return self._said(text[:free]), ""

    def _read_name(self, text: str) -> tuple[list[ReplyPiece], str]:
        self._held += text
        name, is_open = _name_in(self._held)
        if name is not None:
            left = self._held[len(CALL_OPENING) + len(name) + len(CALL_MIDDLE) :]
            self._held, self._read = "", self._read_arguments
            self._arguments = _ObjectEnd()
            self._calls.append([name, ""])
            return [CallPiece(len(self._calls) - 1, name, "")], left
        return ([], "") if is_open else self._give_up()

    def _read_arguments(self, text: str) -> tuple[list[ReplyPiece], str]:
        length = self._arguments.find(text)
        if self._arguments.is_over:
            self._read = self._read_end
        self._calls[-1][1] += text[:length]
        return [CallPiece(len(self._calls) - 1, None, text[:length])], text[length:]

    def _read_end(self, text: str) -> tuple[list[ReplyPiece], str]:
        self._held += text
        if self._held.startswith(self._next_call):
            left, self._held, self._read = self._held[len(self._next_call) :], "", self._read_name
            return [], left
        if self._next_call.startswith(self._held) or self._no_more.startswith(self._held):
            return [], ""
        if self._held.startswith(self._no_more):
            self._held = self._held[len(self._no_more) :]
        return self._give_up()

    def _read_rest(self, text: str) -> tuple[list[ReplyPiece], str]:
        return self._said(text), ""

    def _give_up(self) -> tuple[list[ReplyPiece], str]:
        left, self._held, self._read = self._held, "", self._read_rest
        return [], left


def _name_in(text: str) -> tuple[str | None, bool]:
    """The name in the beginning of a call, once it is there as a whole; and whether it may still come."""
    if len(text) <= len(CALL_OPENING) or not text.startswith(CALL_OPENING):
        return None, CALL_OPENING.startswith(text)
    name, quote, behind = text[len(CALL_OPENING) :].partition(CALL_MIDDLE[0])
    middle = quote + behind
    if not _NAME.fullmatch(name):
        return None, False
    if middle.startswith(CALL_MIDDLE):
        return name, True
    return None, CALL_MIDDLE.startswith(middle)


class _ObjectEnd:
    """Finds where a JSON object ends in text that comes in pieces."""

    def __init__(self) -> None:
        self.is_over = False
        self._depth = 0
        self._in_string = self._is_escaped = False

    def find(self, text: str) -> int:
        """How many of these characters belong to it."""
        for at, char in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped = char == "\\"
                self._in_string = char != '"'
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self.is_over = True
                    return at + 1
        return len(text)
