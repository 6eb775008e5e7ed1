"""A reply as it grows: tokens go in, final text comes out.

Owns: the reply's ids and text, where a stop string cut it, and the positions by which a client reads on. Knows nothing
of engines, sessions or HTTP.

A position counts the reply's tokens up to a piece of text; text that was held back until the end stands one further.
The same tokens give the same pieces in any grouping, so a position means the same text whenever it is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

from phi_cluster.model.tokenizer import Detokenizer, StopStrings


class Reply:
    """`text` is all that has come out, also what the client had before (`given`, a position).

    `prompt_text` is what it answers; `finish_reason` is the engine's, or "stop_string"; counts are in tokens.
    """

    def __init__(self, prompt_text: str, detokenizer: Detokenizer, stops: Sequence[str] = (), *, given: int = 0):
        self.prompt_text = prompt_text
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason = "abort"
        self.position = 0
        self._detokenizer = detokenizer
        self._stops = StopStrings(list(stops))
        self._given = given

    @property
    def is_cut(self) -> bool:
        """Whether a stop string has ended it."""
        return self.finish_reason == "stop_string"

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes tokens in, up to a stop string; returns the text that the client has not got yet."""
        fresh = ""
        # One by one: of several tokens in a step, those behind a stop string do not count.
        for token_id in token_ids:
            if self.is_cut:
                break
            self.token_ids.append(token_id)
            piece, is_cut = self._stops.push(self._detokenizer.push([token_id]))
            if is_cut:
                self.finish_reason = "stop_string"
            fresh += self._take(piece)
        return fresh

    def end(self, finish_reason: str) -> str:
        """There are no more tokens: returns what was held back."""
        self.finish_reason = finish_reason
        piece, is_cut = self._stops.push(self._detokenizer.flush())
        if is_cut:
            self.finish_reason = "stop_string"
        else:
            piece += self._stops.flush()
        return self._take(piece) if piece else ""

    def _take(self, piece: str) -> str:
        self.position += 1
        self.text += piece
        return piece if self.position > self._given else ""
