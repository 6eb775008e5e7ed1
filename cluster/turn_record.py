"""What a turn leaves: the text and ids that are appended to the conversation, and where the two agree.

Owns: a turn's record in the journal. Knows nothing of engines, HTTP or Ray.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from array import array
from contextlib import suppress
from typing import Any, Protocol

from phi_cluster.cluster.call_text import written_reply
from phi_cluster.cluster.messages import CommitTurn, SessionKey, Stretch, TurnGrant
from phi_cluster.cluster.reply import Reply
from phi_cluster.cluster.span import spanning
from phi_cluster.cluster.stretches import tell_stretches
from phi_cluster.cluster.turn_api import TurnRequest
from phi_cluster.model.tokenizer import Tokenizer


class Recorder(Protocol):
    """Whoever has the session's journal."""

    async def commit(self, commit: CommitTurn) -> Stretch | None:
        """When it was recorded; None: it was already, or nobody says."""
        ...

    async def abandon(self, key: SessionKey, epoch: int) -> None:
        """Ends a turn that leaves nothing."""
        ...


class TurnRecord:
    """What the turn will leave in the journal; `make` writes it once."""

    def __init__(self, sessions: Recorder, tokenizer: Tokenizer, grant: TurnGrant, request: TurnRequest, reply: Reply):
        self._sessions = sessions
        self._tokenizer = tokenizer
        self._grant = grant
        self._request = request
        self._made = False
        self.reply = reply
        self.num_kept_tokens = grant.num_kept_tokens
        self.num_kept_chars = grant.num_kept_chars
        self.prompt_ids: list[int] | None = None
        self.sampling: dict[str, Any] = {}

    async def make(self) -> None:
        """Idempotent. Raises PhiError."""
        if self._made:
            return
        self._made = True
        await asyncio.shield(self._record())

    async def drop(self) -> None:
        """The turn leaves nothing here. Raises PhiError."""
        self.prompt_ids = None
        await self.make()

    async def _record(self) -> None:
        grant = self._grant
        if self.prompt_ids is None:
            # Nothing came of it (a refused prompt): the session stays as it was.
            await self._sessions.abandon(grant.key, grant.epoch)
            return
        try:
            with spanning(self._request.span, "session.commit") as span:
                recorded = await self._sessions.commit(self._message())
                tell_stretches(span, () if recorded is None else (recorded,))
        except BaseException:
            # The turn is over all the same: its session must not stay busy. What is told is why it was not recorded.
            with suppress(Exception):
                await self._sessions.abandon(grant.key, grant.epoch)
            raise

    def _message(self) -> CommitTurn:
        grant, reply = self._grant, self.reply
        assert self.prompt_ids is not None
        num_prompt = reply.num_prompt_tokens
        appended, boundaries = self._reply_text(len(reply.prompt_text), num_prompt)
        return CommitTurn(
            key=grant.key,
            epoch=grant.epoch,
            request_id=self._request.request_id,
            num_kept_tokens=self.num_kept_tokens,
            num_kept_chars=self.num_kept_chars,
            token_ids=array("i", self.prompt_ids + reply.token_ids).tobytes(),
            text=reply.prompt_text[self.num_kept_chars :] + appended,
            boundaries=((len(reply.prompt_text), num_prompt), *boundaries),
            num_prompt_tokens=num_prompt,
            num_cached_tokens=reply.num_cached_tokens,
            num_completion_tokens=len(reply.token_ids),
            finish_reason=reply.finish_reason,
            sampling=_without_grammar(self.sampling),
            committed_at=time.time(),
        )

    def _reply_text(self, chars: int, tokens: int) -> tuple[str, tuple[tuple[int, int], ...]]:
        """The reply as the template will render it, and where its text and ids agree.

        A reply cut by a stop string or an abort, or in the middle of a call, has no such place: its last tokens' text
        was not given out. Later prompts are then matched id by id.
        """
        reply = self.reply
        if isinstance(self._request.prompt, list):
            text = "".join(f"{token_id} " for token_id in reply.token_ids)
            return text, ((chars + len(text), tokens + len(reply.token_ids)),)
        reader, tokenizer = reply.reader, self._tokenizer
        text = written_reply(reader.content, reader.calls, tokenizer.tool_format, tokenizer.sanitize)
        if reply.finish_reason not in ("stop", "length") or not reply.token_ids or not reader.is_whole:
            return text, ()
        end = (chars + len(text), tokens + len(reply.token_ids))
        last = reply.token_ids[-1]
        if reply.finish_reason == "stop" and self._tokenizer.is_special(last):
            marker = self._tokenizer.token_text(last)
            return text + marker, ((end[0], end[1] - 1), (end[0] + len(marker), end[1]))
        return text, (end,)


def _without_grammar(sampling: dict[str, Any]) -> dict[str, Any]:
    """A grammar may be larger than the turn: its digest says as much."""
    grammar = sampling.get("grammar")
    if grammar is None:
        return sampling
    return sampling | {"grammar": "blake2b:" + hashlib.blake2b(grammar.encode(), digest_size=16).hexdigest()}
