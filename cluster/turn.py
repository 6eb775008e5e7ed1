"""One turn, from text to commit. The way of a request is read here.

    render -> begin_turn (who holds the session, what of the prompt is stored) -> encode what is new
    -> reserve KV memory -> add the sequence to the engine -> text, piece by piece -> released -> commit -> finished

Owns: that order. What a turn leaves is turn_record.py's. Knows nothing of HTTP, Ray, torch or steps.

A turn that is cut short (the client left, an error) is committed with the tokens that came until then: what a client
has seen is part of the conversation.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from phi_cluster.cluster.engine_client import EngineClient, EngineFailed, EngineHandle, SequenceStream
from phi_cluster.cluster.errors import ContextOverflow, InvalidRequest, Overloaded, PhiError
from phi_cluster.cluster.messages import AddSequence, BeginTurn, ProcessId, SessionKey, TurnGrant
from phi_cluster.cluster.turn_api import FinishReason, TextDelta, TurnEvent, TurnFinished, TurnRequest, TurnStarted
from phi_cluster.cluster.turn_record import Recorder, Reply, TurnRecord
from phi_cluster.model.tokenizer import Detokenizer, StopStrings, TemplateError, Tokenizer

# Prompts given as ids are "rendered" as digits behind this noncharacter, so that they match only their like.
_IDS_MARK = "\ufdd1"
_REMEMBERED_SESSIONS = 4096


class Sessions(Recorder, Protocol):
    """Where sessions are; implemented by `session.directory`."""

    async def begin_turn(self, request: BeginTurn) -> TurnGrant: ...

    async def reserve(self, key: SessionKey, num_tokens: int) -> None:
        """Leases KV memory for the session to hold `num_tokens`. Raises Overloaded."""
        ...


@dataclass(frozen=True)
class TurnLimits:
    """`lease_tokens`: KV memory is leased for so many tokens ahead of the reply."""

    max_model_len: int
    max_turns: int
    turn_wait: float
    lease_tokens: int = 512


class Turns:
    """Runs turns (implements turn_api.TurnRunner). All methods belong to one event loop."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        sessions: Sessions,
        engines: EngineClient,
        limits: TurnLimits,
        process: ProcessId,
    ):
        self._tokenizer = tokenizer
        self._sessions = sessions
        self._engines = engines
        self._limits = limits
        self._process = process
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
        text = self._render(request)
        await self._engines.wait_ready()
        engine = self._engines.engine
        begin = BeginTurn(
            key=SessionKey(request.tenant, request.session_id or "", ephemeral=request.session_id is None),
            request_id=request.request_id,
            text=text,
            wait_seconds=self._limits.turn_wait,
            writers=(self._process,) if engine is None else (self._process, engine.process),
        )
        grant = await self._sessions.begin_turn(begin)
        reply = Reply(text, 0)
        commit = TurnRecord(self._sessions, self._tokenizer, grant, request, reply)
        stream: SequenceStream | None = None
        try:
            stream = await self._add(request, grant, commit, text)
            async with aclosing(self._stream(request, grant, stream, reply)) as events:
                async for event in events:
                    yield event
            await commit.make()
        except BaseException:
            # The client left or something failed: whatever it is, the session is given back, in the background,
            # because an await here may be cancelled too.
            self._end_later(stream, commit)
            raise
        yield TurnFinished(
            finish_reason=_finish_reason(reply),
            num_prompt_tokens=reply.num_prompt_tokens,
            num_cached_tokens=reply.num_cached_tokens,
            num_completion_tokens=len(reply.token_ids),
            engine_replaced=self._was_replaced(grant.key.digest, engine),
        )

    def _render(self, request: TurnRequest) -> str:
        if request.messages is not None:
            try:
                return self._tokenizer.render_chat(
                    request.messages,
                    add_generation_prompt=request.add_generation_prompt,
                    continue_final_message=request.continue_final_message,
                )
            except TemplateError as error:
                raise InvalidRequest(str(error), param="messages") from None
        assert request.prompt is not None
        if isinstance(request.prompt, str):
            return self._tokenizer.sanitize(request.prompt)
        return _IDS_MARK + "".join(f"{token_id} " for token_id in request.prompt)

    def _encode(self, request: TurnRequest, grant: TurnGrant, text: str) -> tuple[int, int, list[int]]:
        """Returns (num_kept_tokens, num_kept_chars, new ids).

        Only chats are spliced at what is stored: their boundaries are whole messages. A raw prompt is encoded
        anew, since BPE may merge across a boundary; the engine still finds the ids that agree.
        """
        if request.messages is not None:
            tail = self._tokenizer.encode(text[grant.num_kept_chars :], previous_id=grant.last_kept_id)
            return grant.num_kept_tokens, grant.num_kept_chars, tail
        if isinstance(request.prompt, str):
            return 0, 0, self._tokenizer.encode_prompt(request.prompt)
        assert request.prompt is not None
        return 0, 0, list(request.prompt)

    async def _add(self, request: TurnRequest, grant: TurnGrant, commit: TurnRecord, text: str) -> SequenceStream:
        # Encoding a long text takes milliseconds per thousand tokens: off the event loop.
        num_kept, kept_chars, new_ids = await asyncio.to_thread(self._encode, request, grant, text)
        num_prompt = num_kept + len(new_ids)
        max_tokens = request.sampling["max_tokens"]
        room = self._limits.max_model_len - num_prompt
        too_many = (1 if max_tokens is None else max(max_tokens, 1)) - room
        if too_many > 0:
            raise ContextOverflow(
                f"the model's context holds {self._limits.max_model_len} tokens; the prompt has {num_prompt} and "
                f"{'at least 1' if max_tokens is None else max_tokens} more were asked for: {too_many} too many. "
                "Shorten the messages or lower max_tokens.",
                param="messages" if request.messages is not None else "prompt",
            )
        if num_prompt == 0:
            raise InvalidRequest("the prompt is empty; give at least one token", param="prompt")
        max_tokens = room if max_tokens is None else max_tokens
        sampling = self._sampling(request, max_tokens)
        covered = num_prompt + min(max_tokens, self._limits.lease_tokens)
        await self._sessions.reserve(grant.key, covered)
        add = AddSequence(
            sequence_id=self._engines.next_sequence_id(),
            segment=grant.segment,
            epoch=grant.epoch,
            num_kept_tokens=num_kept,
            token_ids=new_ids,
            sampling=sampling,
            max_num_tokens=covered,
            num_prompt_tokens=num_prompt,
        )
        stream = await self._engines.add(add)
        # Only now is there anything to record: a turn that was refused room leaves the session as it was.
        commit.num_kept_tokens, commit.num_kept_chars, commit.prompt_ids = num_kept, kept_chars, new_ids
        commit.reply.num_prompt_tokens = num_prompt
        commit.sampling = sampling
        return stream

    def _sampling(self, request: TurnRequest, max_tokens: int) -> dict[str, Any]:
        """The sampling parameters as model/sampling_params.py reads them, with a seed for sure."""
        seed = request.sampling["seed"]
        # The engine knows one list of stop ids: with ignore_eos the model's own end tokens are not on it.
        ends = () if request.sampling["ignore_eos"] else self._tokenizer.eos_token_ids
        stops = (*request.sampling["stop_token_ids"], *ends)
        return request.sampling | {
            "seed": secrets.randbits(63) if seed is None else seed,
            "max_tokens": max_tokens,
            "ignore_eos": False,
            "stop_token_ids": list(dict.fromkeys(stops)),
            "logit_bias": [[token_id, bias] for token_id, bias in request.sampling["logit_bias"].items()],
        }

    async def _stream(
        self, request: TurnRequest, grant: TurnGrant, stream: SequenceStream, reply: Reply
    ) -> AsyncGenerator[TurnEvent, None]:
        """Turns the engine's tokens into text until the sequence is released."""
        detokenizer: Detokenizer = self._tokenizer.detokenizer()
        lease = _Lease(self._sessions, self._engines, grant.key, stream, self._limits)
        stops = StopStrings(list(request.stop))
        started = stopped = False
        async for output in stream:
            if output.finish_reason == "error":
                raise EngineFailed(f"the engine gave the request up: {output.error}")
            if output.finish_reason == "abort" and lease.refusal is not None:
                raise lease.refusal
            lease.follow(reply.num_prompt_tokens + len(stream.received))
            if not started:
                started = True
                reply.num_cached_tokens = output.num_cached_tokens or 0
                if stream.engine_deaths:
                    # What an engine computed before it died was no cache when the turn began.
                    reply.num_cached_tokens = min(reply.num_cached_tokens, grant.num_computed_tokens)
                yield TurnStarted(reply.num_prompt_tokens, reply.num_cached_tokens)
            if stopped:
                # What the step in flight brought after a stop string is nobody's.
                continue
            # One by one: of several tokens in a step, those behind a stop string do not count.
            text, taken = "", 0
            while taken < len(output.token_ids) and not stopped:
                piece, stopped = stops.push(detokenizer.push([output.token_ids[taken]]))
                text += piece
                taken += 1
            reply.token_ids += output.token_ids[:taken]
            if stopped:
                reply.finish_reason = "stop_string"
                self._engines.abort(stream)
            elif output.finish_reason is not None:
                reply.finish_reason = output.finish_reason
                last, hit = stops.push(detokenizer.flush())
                text += last if hit else last + stops.flush()
                if hit:
                    reply.finish_reason = "stop_string"
            reply.text += text
            if text or taken:
                yield TextDelta(text, taken)

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


def _finish_reason(reply: Reply) -> FinishReason:
    return "length" if reply.finish_reason == "length" else "stop"


class _Lease:
    """The KV memory of a growing reply: leased a piece at a time, ahead of the tokens."""

    def __init__(
        self, sessions: Sessions, engines: EngineClient, key: SessionKey, stream: SequenceStream, limits: TurnLimits
    ):
        self._sessions = sessions
        self._engines = engines
        self._key = key
        self._stream = stream
        self._piece = limits.lease_tokens
        self._limit = min(stream.add.num_prompt_tokens + stream.add.sampling["max_tokens"], limits.max_model_len)
        self._growing: asyncio.Task[None] | None = None
        self.refusal: Exception | None = None

    def follow(self, num_tokens: int) -> None:
        """The sequence has so many tokens: asks for more memory before it has to pause."""
        covered = self._stream.add.max_num_tokens
        if self._growing is None and covered < self._limit and num_tokens + self._piece // 4 >= covered:
            self._growing = asyncio.get_running_loop().create_task(self._grow(min(covered + self._piece, self._limit)))

    async def _grow(self, covered: int) -> None:
        try:
            await self._sessions.reserve(self._key, covered)
            self._engines.extend(self._stream, covered)
        except Exception as error:
            # Whatever it is: without more memory the sequence would pause for ever.
            self.refusal = error
            self._engines.abort(self._stream)
        finally:
            self._growing = None
