"""One turn, from text to commit. The way of a request is read here.

    render -> begin_turn (who holds the session, what of the prompt is stored) -> encode what is new
    -> reserve KV memory -> add the sequence to the engine -> text, piece by piece -> released -> commit -> finished

Owns: that order. What a turn leaves is turn_record.py's. Knows nothing of HTTP, Ray, torch or steps.

A turn that is cut short (the client left, an error) is committed with the tokens that came until then: what a client
has seen is part of the conversation. A request that comes again to read on goes the same way, with the reply so far
behind its prompt: what is still there of it is not computed again, and what is not comes out the same.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from array import array
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import NoReturn, Protocol

from phi_cluster.cluster.engine_client import EngineClient, EngineFailed, EngineHandle, SequenceStream
from phi_cluster.cluster.errors import (
    Overloaded,
    PhiError,
    PoisonousRequest,
    ReadElsewhere,
    Unavailable,
)
from phi_cluster.cluster.messages import AddSequence, BeginTurn, ProcessId, SessionKey, TurnGrant
from phi_cluster.cluster.prompt import PromptReader
from phi_cluster.cluster.reply import Reply
from phi_cluster.cluster.turn_api import (
    BEGINNING,
    FinishReason,
    Position,
    TextDelta,
    TurnEvent,
    TurnFinished,
    TurnRequest,
    TurnStarted,
)
from phi_cluster.cluster.turn_lease import Lessor, TurnLease
from phi_cluster.cluster.turn_record import Recorder, TurnRecord
from phi_cluster.model.sampling_params import SamplingParams
from phi_cluster.model.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_REMEMBERED_SESSIONS = 4096
# A turn may begin in so many: session and engine must die together for each.
_MAX_MEMORIES = 4


class Sessions(Recorder, Lessor, Protocol):
    """Where sessions are; implemented by `session.directory`."""

    async def begin_turn(self, request: BeginTurn) -> TurnGrant: ...


class Poison(Protocol):
    """The requests on which engines have died."""

    def holds(self, request: TurnRequest) -> bool: ...

    def add(self, request: TurnRequest) -> None: ...


@dataclass(frozen=True)
class TurnLimits:
    """`lease_tokens`: KV memory is leased for so many tokens ahead of the reply."""

    max_model_len: int
    max_turns: int
    turn_wait: float
    lease_tokens: int = 512


class MemoryLost(Exception):
    """Whoever held the session's memory is gone, and no engine has it mapped."""


@dataclass
class _Carried:
    """What of a turn outlives the memory in which it began. `token_ids` are the reply's, None before there are any to
    speak of; the client has all text up to `given`, and `started` if it was told so."""

    key: SessionKey
    given: Position
    token_ids: list[int] | None = None
    started: TurnStarted | None = None


class Turns:
    """Runs turns (implements turn_api.TurnRunner). All methods belong to one event loop."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        sessions: Sessions,
        engines: EngineClient,
        limits: TurnLimits,
        process: ProcessId,
        poison: Poison,
    ):
        self._tokenizer = tokenizer
        self._prompts = PromptReader(tokenizer, limits.max_model_len)
        self._sessions = sessions
        self._engines = engines
        self._limits = limits
        self._process = process
        self._poison = poison
        # By tenant and request.
        self._live: dict[tuple[str, str], SequenceStream] = {}
        self._running = 0
        self._endings: set[asyncio.Task[None]] = set()
        # Which engine served a session last, to tell a user that it was replaced.
        self._served_by: OrderedDict[str, int] = OrderedDict()

    @property
    def num_running(self) -> int:
        """Turns that have not ended yet, also those whose client has left."""
        return self._running + len(self._endings)

    async def run(self, request: TurnRequest) -> AsyncGenerator[TurnEvent, None]:
        """See turn_api.TurnRunner.run."""
        if self._running >= self._limits.max_turns:
            raise Overloaded("too many requests are waiting; try again", retry_after=1)
        self._running += 1
        try:
            # Closed with this one, not when it is collected: a turn that has left has begun to end.
            async with aclosing(self._run(request)) as events:
                async for event in events:
                    yield event
        finally:
            self._running -= 1

    async def _run(self, request: TurnRequest) -> AsyncGenerator[TurnEvent, None]:
        text = self._prompts.render(request)
        if self._poison.holds(request):
            raise _poisonous()
        await self._engines.wait_ready()
        who = (request.tenant, request.request_id)
        if request.resume_from is not None and who in self._live:
            # Its client came back before its first connection was seen to be gone.
            self._engines.abort(self._live[who])
        carried = _Carried(_key_of(request), given=request.resume_from or BEGINNING)
        for _ in range(_MAX_MEMORIES):
            try:
                async with aclosing(self._attempt(request, text, carried)) as events:
                    async for event in events:
                        yield event
                        if isinstance(event, TextDelta):
                            carried.given = event.position
                return
            except MemoryLost:
                logger.warning("a session's memory was lost in the middle of a turn, which goes on in another one")
        raise Unavailable("the session's memory was lost several times; try again", retry_after=2)

    async def _attempt(self, request: TurnRequest, text: str, carried: _Carried) -> AsyncGenerator[TurnEvent, None]:
        """The turn, in the memory that the session has now. Raises MemoryLost, with all of the reply in `carried`."""
        who = (request.tenant, request.request_id)
        engine = self._engines.engine
        begin = BeginTurn(
            key=carried.key,
            request_id=request.request_id,
            text=text,
            wait_seconds=self._limits.turn_wait,
            writers=(self._process,) if engine is None else (self._process, engine.process),
            resume=request.resume_from is not None and carried.token_ids is None,
            claim=uuid.uuid4().hex,
        )
        grant = await self._sessions.begin_turn(begin)
        is_known = carried.token_ids is not None
        reply = Reply(text, self._tokenizer.detokenizer(), request.stop, given=carried.given, is_known=is_known)
        commit = TurnRecord(self._sessions, self._tokenizer, grant, request, reply)
        stream: SequenceStream | None = None
        try:
            stream, fresh = await self._begin(request, grant, commit, text, carried)
            if stream is None:
                yield TurnStarted(reply.num_prompt_tokens, reply.num_cached_tokens)
                yield TextDelta(fresh, 0, reply.position)
            else:
                self._live[who] = stream
                async with aclosing(self._stream(request, grant, stream, commit, fresh, carried)) as events:
                    async for event in events:
                        yield event
            await commit.make()
        except MemoryLost:
            carried.key, carried.token_ids = grant.key, reply.token_ids
            raise
        except BaseException:
            # The client left or something failed: whatever it is, the session is given back, in the background,
            # because an await here may be cancelled too.
            self._end_later(stream, commit)
            raise
        finally:
            if stream is not None and self._live.get(who) is stream:
                del self._live[who]
        yield TurnFinished(
            finish_reason=_finish_reason(reply),
            num_prompt_tokens=reply.num_prompt_tokens,
            num_cached_tokens=reply.num_cached_tokens,
            num_completion_tokens=len(reply.token_ids),
            engine_replaced=self._was_replaced(grant.key.digest, engine),
        )

    async def _begin(
        self, request: TurnRequest, grant: TurnGrant, commit: TurnRecord, text: str, carried: _Carried
    ) -> tuple[SequenceStream | None, str]:
        """The engine's sequence (None if the reply is there as a whole), and what the client has not got yet of the
        reply so far."""
        # Off the event loop: a long text takes a while.
        num_kept, kept_chars, new_ids = await asyncio.to_thread(self._prompts.encode, request, grant, text)
        num_prompt = num_kept + len(new_ids)
        sampling = self._prompts.sampling(request, self._prompts.max_tokens(request, num_prompt))
        reply = commit.reply
        so_far = carried.token_ids
        if so_far is None:
            so_far = self._so_far(grant, num_kept, new_ids)
        reply.answer(grant.kept_checksum if num_kept else 0, new_ids)
        fresh = reply.push(so_far)
        over = None
        if so_far and not reply.is_cut:
            params = SamplingParams.from_dict(sampling)
            over = params.finish_reason(len(so_far), so_far[-1])
        stream = None
        if over is not None:
            fresh += reply.end(over)
        elif not reply.is_cut:
            num_tokens = num_prompt + len(so_far)
            add = AddSequence(
                sequence_id=self._engines.next_sequence_id(),
                segment=grant.segment,
                epoch=grant.epoch,
                num_kept_tokens=num_kept,
                token_ids=new_ids + so_far,
                sampling=sampling,
                max_num_tokens=num_tokens + min(sampling["max_tokens"] - len(so_far), self._limits.lease_tokens),
                num_prompt_tokens=num_prompt,
            )
            await self._sessions.reserve(grant.key, add.max_num_tokens)
            stream = await self._engines.add(add)
        # Only now is there anything to record: a turn that was refused room leaves the session as it was.
        commit.num_kept_tokens, commit.num_kept_chars, commit.prompt_ids = num_kept, kept_chars, new_ids
        commit.sampling = sampling
        reply.num_prompt_tokens = num_prompt
        if stream is None:
            reply.num_cached_tokens = min(grant.num_computed_tokens, num_prompt)
        return stream, fresh

    def _so_far(self, grant: TurnGrant, num_kept: int, new_ids: list[int]) -> list[int]:
        """The ids of the reply that are there already."""
        if grant.resumed_ids is not None:
            left = array("i", grant.resumed_ids).tolist()
            prompt = new_ids[grant.num_kept_tokens - num_kept :]
            if left[: len(prompt)] == prompt:
                return left[len(prompt) :]
        return []

    async def _stream(
        self,
        request: TurnRequest,
        grant: TurnGrant,
        stream: SequenceStream,
        commit: TurnRecord,
        fresh: str,
        carried: _Carried,
    ) -> AsyncGenerator[TurnEvent, None]:
        """Turns the engine's tokens into text until the sequence is released. `fresh`: text that is there already."""
        reply = commit.reply
        limit = min(reply.num_prompt_tokens + stream.add.sampling["max_tokens"], self._limits.max_model_len)
        lease = TurnLease(self._sessions, self._engines, grant.key, stream, limit, self._limits.lease_tokens)
        num_given = reply.num_prompt_tokens + len(reply.token_ids)
        started = False
        async for output in stream:
            if output.finish_reason == "gone":
                await commit.drop()
                raise MemoryLost
            if output.finish_reason == "error":
                self._give_up(request, stream, output.error)
            if output.finish_reason == "abort" and not reply.is_cut:
                raise lease.refusal or ReadElsewhere("this reply is being read on by a later connection")
            lease.follow(num_given + len(stream.received))
            if not started:
                started = True
                reply.num_cached_tokens = output.num_cached_tokens or 0
                if stream.was_moved or request.resume_from is not None:
                    # What an engine computed before it died was no cache when the turn began.
                    reply.num_cached_tokens = min(reply.num_cached_tokens, grant.num_computed_tokens)
                if carried.started is None:
                    carried.started = TurnStarted(reply.num_prompt_tokens, reply.num_cached_tokens)
                    yield carried.started
                reply.num_cached_tokens = carried.started.num_cached_tokens
                if fresh:
                    yield TextDelta(fresh, 0, reply.position)
            if reply.is_cut:
                # What the step in flight brought after a stop string is nobody's.
                continue
            before = len(reply.token_ids)
            text = reply.push(output.token_ids)
            taken = len(reply.token_ids) - before
            if text or taken:
                yield TextDelta(text, taken, reply.position)
            if reply.is_cut:
                self._engines.abort(stream)
            elif output.finish_reason is not None:
                text = reply.end(output.finish_reason)
                if text:
                    yield TextDelta(text, 0, reply.position)

    def _give_up(self, request: TurnRequest, stream: SequenceStream, error: str | None) -> NoReturn:
        """Raises what the client is told of a sequence that no engine carries on."""
        if not stream.is_poisonous:
            raise EngineFailed(f"the engine gave the request up: {error}")
        with suppress(OSError):
            self._poison.add(request)
        raise _poisonous()

    def _end_later(self, stream: SequenceStream | None, commit: TurnRecord) -> None:
        task = asyncio.get_running_loop().create_task(self._end(stream, commit))
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)

    async def _end(self, stream: SequenceStream | None, commit: TurnRecord) -> None:
        """Aborts, waits until nobody writes any more, commits what there is."""
        if stream is not None:
            self._engines.abort(stream)
            if not stream.released:
                async for _ in stream:
                    pass
            # Whatever the client was not given is not part of the conversation.
            commit.reply.finish_reason = "abort"
        with suppress(PhiError):
            await commit.make()

    def _was_replaced(self, digest: str, at_begin: EngineHandle | None) -> bool:
        """Whether another engine than the session's last one, or the one its turn began with, serves it now."""
        now = self._engines.engine
        pid = 0 if now is None else now.process.pid
        before = self._served_by.pop(digest, 0 if at_begin is None else at_begin.process.pid)
        self._served_by[digest] = pid
        if len(self._served_by) > _REMEMBERED_SESSIONS:
            self._served_by.popitem(last=False)
        return before != pid


def _key_of(request: TurnRequest) -> SessionKey:
    return SessionKey(request.tenant, request.session_id or "", ephemeral=request.session_id is None)


def _poisonous() -> PoisonousRequest:
    return PoisonousRequest(
        "engines died when they computed this request, so it is not tried again; please report it with the server's log"
    )


def _finish_reason(reply: Reply) -> FinishReason:
    return "length" if reply.finish_reason == "length" else "stop"
