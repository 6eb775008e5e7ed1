"""Turns token ids into text as they come, never showing half a character.

Owns: the decoders of byte-level and SentencePiece vocabularies, re-stated so that they can go on piece by
piece. Knows nothing of how text is encoded. All pieces together are what `tokenizers` decodes from all ids at
once.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from phi_cluster.model.byte_level import BYTE_OF_CHAR

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Detokenizer(Protocol):
    """The text of one reply, in order."""

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete; special tokens and unknown ids have none."""
        ...

    def flush(self) -> str:
        """The end has come: the rest, incomplete characters as U+FFFD."""
        ...


class Decoding:
    """What the `decoder` of a tokenizer.json says. Raises ValueError for one that we do not know, naming it.

    `piece` gives a token as it is spelled in the vocabulary, or None if the id has no text (unknown or
    special).
    """

    def __init__(self, decoder: Mapping[str, Any] | None, piece: Callable[[int], str | None]) -> None:
        self._piece = piece
        self._replacements: list[tuple[str, str]] = []
        self._byte_fallback = False
        self._num_stripped = 0
        self._strip = ""
        self._byte_level = decoder is not None and decoder.get("type") == "ByteLevel"
        if not self._byte_level:
            self._read_sequence(decoder or {})

    def _read_sequence(self, decoder: Mapping[str, Any]) -> None:
        steps = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
        fused = False
        for step in steps:
            kind = step.get("type")
            if kind == "ByteLevel" and len(steps) == 1:
                self._byte_level = True
            elif kind == "Replace" and "String" in step["pattern"] and not (fused or self._byte_fallback):
                self._replacements.append((step["pattern"]["String"], step["content"]))
            elif kind == "ByteFallback" and not fused:
                self._byte_fallback = True
            elif kind == "Fuse":
                fused = True
            elif kind == "Strip" and fused and step["stop"] == 0 and not self._num_stripped:
                self._strip, self._num_stripped = step["content"], step["start"]
            else:
                raise ValueError(f"tokenizer.json: decoder step {kind!r} is not supported at this place")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for in the middle of a text."""
        spelled = self._piece(token_id)
        if spelled is None:
            return b""
        if self._byte_level:
            return byte_level_bytes(spelled)
        spelled = self.replaced(spelled)
        return spelled.encode() if (byte := self.fallback_byte(spelled)) is None else bytes([byte])

    def detokenizer(self, middle: bool) -> Detokenizer:
        """`middle`: the ids go on in the middle of a text, so their first space is not the one that
        SentencePiece puts in front of every text."""
        if self._byte_level:
            return _ByteLevelDetokenizer(self._piece)
        return _SentencePieceDetokenizer(self, self._piece, self._strip, 0 if middle else self._num_stripped)

    def replaced(self, spelled: str) -> str:
        """The token with the vocabulary's stand-ins (for a space) resolved."""
        for pattern, content in self._replacements:
            spelled = spelled.replace(pattern, content)
        return spelled

    def fallback_byte(self, spelled: str) -> int | None:
        """The byte of a token such as <0xE2>, None for others."""
        match = _BYTE_TOKEN.fullmatch(spelled) if self._byte_fallback else None
        return int(match[1], 16) if match else None


def byte_level_bytes(spelled: str) -> bytes:
    """A byte-level token's bytes; a token that is not spelled in bytes (an added one) stands for itself."""
    values = [BYTE_OF_CHAR.get(char) for char in spelled]
    return spelled.encode() if None in values else bytes(value for value in values if value is not None)


class _ByteLevelDetokenizer:
    def __init__(self, piece: Callable[[int], str | None]) -> None:
        self._piece = piece
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        pieces = (piece for token_id in ids if (piece := self._piece(token_id)) is not None)
        return self._decoder.decode(b"".join(map(byte_level_bytes, pieces)))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _SentencePieceDetokenizer:
    def __init__(self, decoding: Decoding, piece: Callable[[int], str | None], strip: str, num_stripped: int) -> None:
        self._decoding = decoding
        self._piece = piece
        self._strip = strip
        self._num_stripped = num_stripped
        # Byte tokens in a row. `tokenizers` reads the whole run as UTF-8 or, if that fails, shows U+FFFD for
        # each byte, so nothing of it is certain before it ends.
        self._run = bytearray()

    def push(self, ids: Iterable[int]) -> str:
        text = ""
        for token_id in ids:
            spelled = self._piece(token_id)
            if spelled is None:
                continue
            spelled = self._decoding.replaced(spelled)
            byte = self._decoding.fallback_byte(spelled)
            if byte is not None:
                self._run.append(byte)
            else:
                text += self._end_run() + spelled
        return self._stripped(text)

    def flush(self) -> str:
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _stripped(self, text: str) -> str:
        while text and self._num_stripped:
            if not text.startswith(self._strip):
                self._num_stripped = 0
            else:
                self._num_stripped -= 1
                text = text.removeprefix(self._strip)
        return text
