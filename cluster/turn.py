"""One turn, from text to commit. The way of a request is read here.

    render -> begin_turn (who holds the session, what of the prompt is stored) -> encode what is new
    -> reserve KV memory -> add the sequence to the engine -> text, piece by piece -> released -> commit -> finished

Owns: admission, and what comes of a turn however it ends. An attempt at it, in one memory, is turn_attempt.py's, what
it leaves turn_record.py's. Knows nothing of HTTP, Ray, torch or steps.

A turn that is cut short (the client left, an error) is committed with the tokens that came until then: what a client
has seen is part of the conversation. A request that comes again to read on goes the same way, with the reply so far
behind its prompt: what is still there of it is not computed again, and what is not comes out the same.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import replace

from phi_cluster.cluster.choices import several
from phi_cluster.cluster.engine_client import EngineClient, EngineHandle
from phi_cluster.cluster.errors import ContextOverflow, Overloaded, PhiError, Unavailable
from phi_cluster.cluster.messages import ProcessId, SessionKey
from phi_cluster.cluster.prompt import PromptReader
from phi_cluster.cluster.reply import Reply
from phi_cluster.cluster.sequence_stream import SequenceStream
from phi_cluster.cluster.shared_prompt import SharedPrompt
from phi_cluster.cluster.span import spanning
from phi_cluster.cluster.turn_api import (
    BEGINNING,
    ChoiceFinished,
    FinishReason,
    TextDelta,
    TurnEvent,
    TurnFinished,
    TurnRequest,
    TurnStarted,
)
from phi_cluster.cluster.turn_attempt import (
    Carried,
    MemoryLost,
    MemoryYielded,
    Poison,
    Sessions,
    Surroundings,
    TurnAttempt,
    TurnLimits,
    poisonous,
)
from phi_cluster.cluster.wanted_format import grammar_of
from phi_cluster.model.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_REMEMBERED_SESSIONS = 4096
# A turn may begin in so many: session and engine must die together for each.
_MAX_MEMORIES = 4
# Each time it has come on by what it had leased.
_MAX_YIELDS = 64


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
        prompts = PromptReader(tokenizer, limits.max_model_len)
        self._around = Surroundings(tokenizer, prompts, sessions, engines, limits, process, poison)
        # By tenant and request.
        self._live: dict[tuple[str, str], SequenceStream] = {}
        self._running = 0
        # Since when the turns wait that have not started yet, the first one first.
        self._waiting: dict[object, float] = {}
        self._endings: set[asyncio.Task[None]] = set()
        # Which engine served a session last, to tell a user that it was replaced.
        self._served_by: OrderedDict[str, int] = OrderedDict()

    @property
    def num_running(self) -> int:
        """Turns that have not ended yet, also those whose client has left."""
        return self._running + len(self._endings)

    @property
    def num_open(self) -> int:
        """Turns whose client is still there."""
        return self._running

    def oldest_wait(self) -> float:
        """Seconds for which the first of the turns that have not started has waited; 0 if there is none."""
        return time.monotonic() - next(iter(self._waiting.values())) if self._waiting else 0.0

    def check_room(self, num_choices: int = 1) -> None:
        """Raises Overloaded if a turn more, or one of so many replies, would be refused. Costs nothing: who is refused
        should know it at once."""
        if self._running + num_choices > self._around.limits.max_turns:
            raise Overloaded("too many requests are waiting; try again", retry_after=1)

    async def run(self, request: TurnRequest) -> AsyncGenerator[TurnEvent, None]:
        """See turn_api.TurnRunner.run."""
        num_choices = request.num_choices
        self.check_room(num_choices)
        self._running += num_choices
        run = self._run(request) if num_choices == 1 else several(request, self._run, self._run_other)
        this = object()
        self._waiting[this] = time.monotonic()
        try:
            # Closed with this one, not when it is collected: a turn that has left has begun to end.
            async with aclosing(run) as events:
                async for event in events:
                    if isinstance(event, TurnStarted):
                        self._waiting.pop(this, None)
                    yield event
        finally:
            self._waiting.pop(this, None)
            self._running -= num_choices

    async def _run(self, request: TurnRequest, shares: SharedPrompt | None = None) -> AsyncGenerator[TurnEvent, None]:
        """`shares`: others will answer the same prompt."""
        prompts = self._around.prompts
        if request.truncate:
            request = await asyncio.to_thread(prompts.truncated, request)
        while True:
            try:
                async with aclosing(self._run_as_it_is(request, shares)) as events:
                    async for event in events:
                        yield event
                return
            except ContextOverflow:
                # Stored ids may be more than those that the same text is encoded to.
                shorter = prompts.without_oldest(request) if request.truncate else request
                if shorter.messages == request.messages:
                    raise
                request = shorter

    async def _run_as_it_is(self, request: TurnRequest, shares: SharedPrompt | None) -> AsyncGenerator[TurnEvent, None]:
        text = self._around.prompts.render(request)
        grammar = await grammar_of(request, self._around.tokenizer.tool_format)
        if grammar is not None:
            request = replace(request, sampling=request.sampling | {"grammar": grammar})
        if self._around.poison.holds(request):
            raise poisonous()
        engines = self._around.engines
        with spanning(request.span, "engine.wait_ready"):
            await engines.wait_ready()
        if request.resume_from is not None and (live := self._live.get(_name_of(request))):
            # Its client came back before its first connection was seen to be gone.
            engines.abort(live)
        key = SessionKey(request.tenant, request.session_id or "", ephemeral=request.session_id is None)
        carried = Carried(key, given=request.resume_from or BEGINNING, shares=shares)
        async with aclosing(self._carry_on(request, text, carried)) as events:
            async for event in events:
                yield event

    async def _run_other(self, request: TurnRequest, shared: SharedPrompt) -> AsyncGenerator[TurnEvent, None]:
        """One more reply to a prompt that is computed, in memory of its own; nothing of it stays. `request` has the
        prompt as ids."""
        key = SessionKey(request.tenant, uuid.uuid4().hex, ephemeral=True)
        carried = Carried(key, given=BEGINNING, started=shared.started, shared=shared)
        text = self._around.prompts.render(request)
        async with aclosing(self._carry_on(request, text, carried)) as events:
            async for event in events:
                yield event

    async def _carry_on(self, request: TurnRequest, text: str, carried: Carried) -> AsyncGenerator[TurnEvent, None]:
        """From one memory to the next, if it has to be."""
        num_lost = num_yielded = 0
        while num_lost < _MAX_MEMORIES and num_yielded < _MAX_YIELDS:
            try:
                async with aclosing(self._attempt(request, text, carried)) as events:
                    async for event in events:
                        yield event
                        # Who reads on has text that is still to be computed again.
                        if isinstance(event, TextDelta) and event.position.count > carried.given.count:
                            carried.given = event.position
                return
            except MemoryLost:
                num_lost += 1
                request.span.event("session.memory_lost")
                logger.warning("a session's memory was lost in the middle of a turn, which goes on in another one")
            except MemoryYielded:
                num_yielded += 1
                request.span.event("session.memory_yielded")
        if num_yielded == _MAX_YIELDS:
            raise Overloaded("there is too little KV memory for all that is asked at once; try again", retry_after=10)
        raise Unavailable("the session's memory was lost several times; try again", retry_after=2)

    async def _attempt(self, request: TurnRequest, text: str, carried: Carried) -> AsyncGenerator[TurnEvent, None]:
        """The turn, in the memory that the session has now. Raises MemoryLost, with all of the reply in `carried`."""
        attempt = TurnAttempt(self._around, request, text, carried)
        engine, name = self._around.engines.engine, _name_of(request)
        await attempt.enter()
        try:
            await attempt.start()
            if attempt.stream is not None:
                self._live[name] = attempt.stream
            async with aclosing(attempt.events()) as events:
                async for event in events:
                    yield event
            if carried.shares is not None:
                yield ChoiceFinished(0, _finish_reason(attempt.reply))
                attempt.is_told = True
                await self._outwait(attempt, carried.shares)
            await attempt.record.make()
            attempt.leave()
        except (MemoryLost, MemoryYielded):
            attempt.leave()
            raise
        except BaseException:
            # The client left or something failed: whatever it is, the session is given back, in the background,
            # because an await here may be cancelled too.
            self._end_later(attempt)
            raise
        finally:
            if attempt.stream is not None and self._live.get(name) is attempt.stream:
                del self._live[name]
        reply = attempt.reply
        yield TurnFinished(
            finish_reason=_finish_reason(reply),
            num_prompt_tokens=reply.num_prompt_tokens,
            num_cached_tokens=reply.num_cached_tokens,
            num_completion_tokens=len(reply.token_ids),
            engine_replaced=carried.shared is None and self._was_replaced(attempt.grant.key.digest, engine),
        )

    async def _outwait(self, attempt: TurnAttempt, shares: SharedPrompt) -> None:
        """The turn is not over before the others have answered its prompt, which lies in its memory."""
        with suppress(PhiError):
            # Else those who wait for memory would wait for what this one will not need.
            await self._around.sessions.settle_early(attempt.grant.key)
        await shares.wait_answered()

    def _end_later(self, attempt: TurnAttempt) -> None:
        task = asyncio.get_running_loop().create_task(self._end(attempt))
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)

    async def _end(self, attempt: TurnAttempt) -> None:
        """Aborts, waits until nobody writes any more, records what there is."""
        stream = attempt.stream
        if stream is not None and not attempt.is_told:
            self._around.engines.abort(stream)
            if not stream.released:
                async for _ in stream:
                    pass
            # Whatever the client was not given is not part of the conversation.
            attempt.reply.finish_reason = "abort"
        attempt.leave()
        if attempt.carried.shares is not None:
            await attempt.carried.shares.take_back(for_good=True)
        with suppress(PhiError):
            await attempt.record.make()

    def _was_replaced(self, digest: str, at_begin: EngineHandle | None) -> bool:
        """Whether another engine than the session's last one, or the one its turn began with, serves it now."""
        now = self._around.engines.engine
        pid = 0 if now is None else now.process.pid
        before = self._served_by.pop(digest, 0 if at_begin is None else at_begin.process.pid)
        self._served_by[digest] = pid
        if len(self._served_by) > _REMEMBERED_SESSIONS:
            self._served_by.popitem(last=False)
        return before != pid


def _finish_reason(reply: Reply) -> FinishReason:
    if reply.finish_reason == "length":
        return "length"
    return "tool_calls" if reply.reader.calls else "stop"


def _name_of(request: TurnRequest) -> tuple[str, str]:
    return request.tenant, request.request_id
