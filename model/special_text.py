"""Keeps users' text from turning into special tokens, without changing a character of it.

Owns: the mark BREAK, at which a text is cut before it is encoded, and where it is put. Knows nothing of
vocabularies beyond the list of literals it is given, or of templates.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

# Unicode noncharacters, "for internal use": no real text has them, and whatever a user sends is replaced.
BREAK = "\ufdd0"
_END = "\ufdd1"
_REPLACEMENT = "\ufffd"
# Half of a UTF-16 pair: JSON can spell it, UTF-8 cannot.
_SURROGATE = re.compile("[\ud800-\udfff]")


class Rendered(str):
    """Text that is rendered already: its marks and literals are meant."""


class SpecialText:
    """Breaks a set of literals (what special tokens look like as text) wherever users write them."""

    def __init__(self, literals: Iterable[str]) -> None:
        known = sorted({literal for literal in literals if literal}, key=lambda text: (-len(text), text))
        # Cutting a literal of one character in two is not possible, so it is replaced.
        self._short = [literal for literal in known if len(literal) == 1]
        self._long = [literal for literal in known if len(literal) > 1]
        # A lookahead finds overlapping literals too. Each occurrence is cut behind its first character.
        self._starts = (
            re.compile("(?=" + "|".join(map(re.escape, self._long)) + ").", re.DOTALL) if self._long else None
        )
        self._prefixes = {literal[:n] for literal in self._long for n in range(1, len(literal))}
        self._reach = max(map(len, self._long), default=1) - 1

    def sanitize(self, text: str) -> str:
        """`text` with a BREAK inside each literal. Without the BREAKs it is `text` again (except that
        noncharacters which are ours, and lone surrogates, become U+FFFD)."""
        text = _SURROGATE.sub(_REPLACEMENT, text)
        for char in (BREAK, _END, *self._short):
            if char in text:
                text = text.replace(char, _REPLACEMENT)
        return self._starts.sub(lambda match: match[0] + BREAK, text) if self._starts else text

    def mark(self, value: Any) -> Any:
        """A copy of plain JSON data in which all strings (keys too) are sanitized, and their ends are marked
        where what follows could complete a literal. Text made of it must go through `settle`. Raises
        TypeError for anything that is not plain data: a template could call its methods."""
        if isinstance(value, Rendered):
            return str(value)
        if isinstance(value, str):
            text = self.sanitize(str(value))
            ends = (text[-n:] for n in range(1, min(self._reach, len(text)) + 1))
            return text + _END if any(end in self._prefixes for end in ends) else text
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, dict):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mark(item) for item in value]
        raise TypeError(f"plain data is expected, not {type(value).__name__}")

    def settle(self, text: str) -> str:
        """Puts a BREAK at each marked end across which a literal lies now, and removes the other marks."""
        if _END not in text:
            return text
        first, *rest = text.split(_END)
        settled = first
        for part in rest:
            tail, head = settled[-self._reach :], part[: self._reach]
            joined = tail + head
            crosses = any(
                joined.find(literal, max(len(tail) - len(literal) + 1, 0), len(tail) + len(literal) - 1) >= 0
                for literal in self._long
            )
            settled += (BREAK if crosses else "") + part
        return settled
