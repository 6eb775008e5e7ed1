"""What a conversation has said so far: its rendered text, its token ids, and where the two agree.

Owns: splicing. A later prompt that repeats the text up to a boundary takes over the ids up to there as they
were generated, since encoding a reply again often gives other ids. Knows nothing of tokenizers, storage or
segments.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

from phi_cluster.cluster.messages import CommitTurn


@dataclass(frozen=True)
class Match:
    """The first `num_kept_chars` characters of a prompt are the first `num_kept_tokens` stored ids."""

    num_kept_chars: int
    num_kept_tokens: int


@dataclass(frozen=True)
class _Piece:
    """Text from the boundary before to its own; `chars` and `tokens` count from the beginning. The last piece
    of a transcript may end where text and ids do not agree (`tokens` is None): prompts cannot be spliced
    there."""

    text: str
    chars: int
    tokens: int | None


class Transcript:
    """Text and ids of the committed turns. The text may hold BREAK characters: here they are ordinary ones.

    The text is kept in pieces between boundaries, so that matching, appending and truncating cost no more
    than the characters they are about.
    """

    def __init__(self) -> None:
        self.token_ids: array[int] = array("i")
        # Where the last turn's reply begins: its first boundary is the end of its prompt.
        self.last_prompt_chars = 0
        self._pieces: list[_Piece] = []

    @classmethod
    def replay(cls, turns: Iterable[CommitTurn]) -> Transcript:
        """The transcript that these turns, in order, leave. Raises ValueError if they cannot follow each
        other."""
        transcript = cls()
        for turn in turns:
            transcript.apply(turn)
        return transcript

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_chars(self) -> int:
        return self._pieces[-1].chars if self._pieces else 0

    @property
    def text(self) -> str:
        """The whole text (joined anew at every call)."""
        return "".join(piece.text for piece in self._pieces)

    @property
    def boundaries(self) -> list[tuple[int, int]]:
        """(chars, tokens), ascending, at which text and ids agree. The beginning (0, 0) is one too, not
        listed."""
        return [(piece.chars, piece.tokens) for piece in self._pieces if piece.tokens is not None]

    def match(self, prompt: str, max_tokens: int | None = None) -> Match:
        """The last boundary (of at most `max_tokens` tokens) up to which the stored text begins `prompt`."""
        best = Match(0, 0)
        position = 0
        for piece in self._pieces:
            if piece.tokens is None or (max_tokens is not None and piece.tokens > max_tokens):
                break
            if not prompt.startswith(piece.text, position):
                break
            position = piece.chars
            best = Match(piece.chars, piece.tokens)
        return best

    def check(self, turn: CommitTurn) -> None:
        """Raises ValueError, naming the number, if the turn cannot follow what is stored. Changes nothing."""
        if len(turn.token_ids) % 4:
            raise ValueError(f"token_ids has {len(turn.token_ids)} bytes: a multiple of 4 is expected")
        if not 0 <= turn.num_kept_tokens <= self.num_tokens:
            raise ValueError(f"num_kept_tokens is {turn.num_kept_tokens}: {self.num_tokens} are stored")
        # Tokens may be kept beyond the boundary's (the tail agreed with the prompt), never fewer than its.
        at_boundary = next((tokens for chars, tokens in self._kept(turn) if chars == turn.num_kept_chars), None)
        if at_boundary is None:
            raise ValueError(f"num_kept_chars is {turn.num_kept_chars}: no boundary keeps so many")
        num_chars = turn.num_kept_chars + len(turn.text)
        num_tokens = turn.num_kept_tokens + len(turn.token_ids) // 4
        previous = (turn.num_kept_chars, at_boundary)
        for chars, tokens in turn.boundaries:
            if not (previous[0] <= chars <= num_chars and previous[1] <= tokens <= num_tokens):
                end = (num_chars, num_tokens)
                raise ValueError(f"boundary {(chars, tokens)} is not between {previous} and {end}")
            previous = (chars, tokens)

    def apply(self, turn: CommitTurn) -> None:
        """Truncate to what the turn keeps, then append its ids and text. Raises ValueError as `check` does,
        with nothing changed."""
        self.check(turn)
        del self.token_ids[turn.num_kept_tokens :]
        self.token_ids.frombytes(turn.token_ids)
        while self._pieces and not _is_kept(self._pieces[-1], turn):
            self._pieces.pop()
        start = position = turn.num_kept_chars
        self.last_prompt_chars = turn.boundaries[0][0] if turn.boundaries else start + len(turn.text)
        for chars, tokens in turn.boundaries:
            self._append(turn.text[position - start : chars - start], chars, tokens)
            position = chars
        if position < start + len(turn.text):
            self._append(turn.text[position - start :], start + len(turn.text), None)

    def _append(self, text: str, chars: int, tokens: int | None) -> None:
        if not self._pieces or (self._pieces[-1].chars, self._pieces[-1].tokens) != (chars, tokens):
            self._pieces.append(_Piece(text, chars, tokens))

    def _kept(self, turn: CommitTurn) -> Iterable[tuple[int, int]]:
        """The boundaries that the turn leaves in place, from the last backwards, and the beginning."""
        for piece in reversed(self._pieces):
            if piece.tokens is not None and piece.chars <= turn.num_kept_chars:
                if piece.chars < turn.num_kept_chars:
                    break
                if piece.tokens <= turn.num_kept_tokens:
                    yield piece.chars, piece.tokens
        yield 0, 0


def _is_kept(piece: _Piece, turn: CommitTurn) -> bool:
    return piece.tokens is not None and piece.chars <= turn.num_kept_chars and piece.tokens <= turn.num_kept_tokens
