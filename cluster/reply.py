"""A reply as it grows: tokens go in, final text comes out.

Owns: the reply's ids and text, where a stop string cut it, and the positions by which a client reads on. Knows nothing
of engines, sessions or HTTP; how text and calls are told apart is call_reader.py's.

The same tokens give the same pieces in any grouping, so a position means the same text whenever it is computed.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence

from phi_cluster.cluster.call_reader import ReplyReader, TextReader
from phi_cluster.cluster.errors import ReplyGone
from phi_cluster.cluster.turn_api import BEGINNING, CallPiece, Position, ReplyPiece, TextPiece, TokenLogprob, piece_text
from phi_cluster.model.tokenizer import Detokenizer, StopStrings


class Reply:
    """`reader` has all that has come out, also what the client had before, up to `given`.

    `prompt_text` is what it answers; `finish_reason` is the engine's, or "stop_string"; counts are in tokens.
    """

    def __init__(
        self,
        prompt_text: str,
        detokenizer: Detokenizer,
        stops: Sequence[str] = (),
        *,
        given: Position = BEGINNING,
        is_known: bool = False,
        reader: ReplyReader | None = None,
        logprobs: Sequence[TokenLogprob | None] | None = None,
    ):
        """`is_known`: the tokens up to `given` are for sure the ones that the client got. `reader`: None for text.
        `logprobs`, if pieces are to tell them: each token's, None for one without text; the caller adds to it before a
        token is pushed."""
        self.prompt_text = prompt_text
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.token_ids: list[int] = []
        self.reader: ReplyReader = reader or TextReader()
        self.finish_reason = "abort"
        self._count = 0
        self._checksum = 0
        self._detokenizer = detokenizer
        self._stops = StopStrings(list(stops))
        self._given = given
        self._is_known = is_known
        self._fresh: list[ReplyPiece] = []
        self._logprobs = logprobs
        # So many tokens belong to pieces that have come out.
        self._num_told = 0

    @property
    def text(self) -> str:
        """All text that has come out."""
        return self.reader.content

    @property
    def position(self) -> Position:
        return Position(self._count, self._checksum)

    def answer(self, kept_checksum: int, prompt_ids: Sequence[int]) -> None:
        """The prompt is these ids, behind those of `kept_checksum`."""
        self._checksum = _add(kept_checksum, prompt_ids)

    @property
    def is_cut(self) -> bool:
        """Whether a stop string has ended it."""
        return self.finish_reason == "stop_string"

    def take_pieces(self) -> tuple[ReplyPiece, ...]:
        """The pieces of text and calls that are new to the client since this was asked last."""
        pieces = tuple(self._fresh)
        self._fresh.clear()
        return pieces

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes tokens in, up to a stop string; returns the text that the client has not got yet. Raises ReplyGone if
        these are not the tokens that it got."""
        fresh = ""
        # One by one: of several tokens in a step, those behind a stop string do not count.
        for token_id in token_ids:
            if self.is_cut:
                break
            self.token_ids.append(token_id)
            self._checksum = _add(self._checksum, (token_id,))
            piece, is_cut = self._stops.push(self._detokenizer.push([token_id]))
            if is_cut:
                self.finish_reason = "stop_string"
            pieces = self.reader.push(piece)
            fresh += self._take(pieces + self.reader.flush() if is_cut else pieces)
        return fresh

    def end(self, finish_reason: str) -> str:
        """There are no more tokens: returns what was held back. Raises ReplyGone if the client got more."""
        self.finish_reason = finish_reason
        piece, is_cut = self._stops.push(self._detokenizer.flush())
        if is_cut:
            self.finish_reason = "stop_string"
        else:
            piece += self._stops.flush()
        pieces = self.reader.push(piece) + self.reader.flush()
        fresh = self._take(pieces) if pieces else ""
        if self._count < self._given.count:
            raise _other()
        return fresh

    def _take(self, pieces: list[ReplyPiece]) -> str:
        self._count += 1
        is_other = self._count == self._given.count and self._checksum != self._given.checksum
        if is_other and not self._is_known:
            raise _other()
        if pieces and self._logprobs is not None:
            pieces = self._with_logprobs(pieces, self._logprobs)
        if self._count <= self._given.count:
            return ""
        self._fresh += pieces
        return "".join(map(piece_text, pieces))

    def _with_logprobs(self, pieces: list[ReplyPiece], logprobs: Sequence[TokenLogprob | None]) -> list[ReplyPiece]:
        """All tokens since the last pieces belong to the first text among these; a call's are not told."""
        end = len(self.token_ids)
        untold = tuple(one for one in logprobs[self._num_told : end] if one is not None)
        self._num_told = end
        told: list[ReplyPiece] = []
        for piece in pieces:
            if not isinstance(piece, CallPiece):
                piece, untold = TextPiece(piece_text(piece), untold), ()
            told.append(piece)
        return told


def _add(checksum: int, token_ids: Sequence[int]) -> int:
    return zlib.crc32(array("i", token_ids).tobytes(), checksum)


def _other() -> ReplyGone:
    return ReplyGone(
        "the interrupted reply is lost, and computed again it is another one; send the request without x-resume-from"
    )
