"""The network's stand-in: a tokenizer of characters, and the one token that follows given ids.

Owns: the pure function that every reply is checked against. A generated id is often another than its text would be
encoded to, so only stored ids continue a conversation. Each conversation has characters of its own: a foreign one
betrays a leak. Knows nothing of processes, segments or faults.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from phi_cluster.model.tool_format import OURS

USER, ASSISTANT, END = 1, 2, 3
_VARIANT = 0x20000
_FIRST = 0x4000
_BLOCK = 0x40
_MASK = (1 << 48) - 1


def alphabet(owner: int) -> list[str]:
    """The characters that only this conversation uses."""
    return [chr(_FIRST + owner * _BLOCK + i) for i in range(_BLOCK)]


def is_of(owner: int, token_id: int) -> bool:
    plain = token_id & ~_VARIANT
    return plain <= END or (plain - _FIRST) // _BLOCK == owner


def row(before: int, token_id: int) -> int:
    """A token's keys and values: a number that depends on all tokens up to it."""
    return ((before * 1_000_003) ^ (token_id * 2_654_435_761) ^ 0x5BD1E995) & _MASK


def draw(last_row: int, token_ids: Sequence[int], seed: int) -> int:
    """The token behind `token_ids`, whose last one has this row."""
    x = row(row(last_row, seed), len(token_ids)) >> 7
    if x % 9 == 0:
        return END
    last = next(token_id for token_id in reversed(token_ids) if token_id > END)
    plain = last & ~_VARIANT
    return plain - (plain - _FIRST) % _BLOCK + (x >> 8) % _BLOCK + (_VARIANT if x & 8 else 0)


def reply(prompt_ids: Sequence[int], seed: int, max_tokens: int) -> list[int]:
    """The whole reply, computed at one go."""
    token_ids = list(prompt_ids)
    last = 0
    for token_id in token_ids:
        last = row(last, token_id)
    while len(token_ids) - len(prompt_ids) < max_tokens:
        token_ids.append(draw(last, token_ids, seed))
        if token_ids[-1] == END:
            break
        last = row(last, token_ids[-1])
    return token_ids[len(prompt_ids) :]


def text_of(token_ids: Iterable[int]) -> str:
    return "".join(chr(token_id & ~_VARIANT) for token_id in token_ids)


def visible(token_ids: Iterable[int]) -> str:
    return "".join(chr(token_id & ~_VARIANT) for token_id in token_ids if token_id > END)


class Tokenizer:
    """One character a token (what turn.py and turn_record.py use of model/tokenizer.py's)."""

    eos_token_ids = (END,)
    tool_format = OURS

    def render_chat(self, messages: list[dict[str, Any]], **options: Any) -> str:
        parts = [f"{chr(USER if m['role'] == 'user' else ASSISTANT)}{m['content']}{chr(END)}" for m in messages]
        return "".join(parts) + chr(ASSISTANT)

    def sanitize(self, text: str) -> str:
        return text

    def encode(self, rendered: str, previous_id: int | None = None) -> list[int]:
        return [ord(char) for char in rendered]

    encode_prompt = encode

    def detokenizer(self) -> Detokenizer:
        return Detokenizer()

    def is_special(self, token_id: int) -> bool:
        return token_id <= END

    def token_text(self, token_id: int) -> str:
        return chr(token_id & ~_VARIANT)


class Detokenizer:
    def push(self, token_ids: Sequence[int]) -> str:
        return visible(token_ids)

    def flush(self) -> str:
        return ""
