"""One attempt at a turn, in the memory that its session has now: from the grant to the last token.

Owns: what is taken over of a reply that exists already, the sequence in the engine, and the way from its outputs to
text. Knows nothing of admission, of what follows a lost memory, of HTTP, Ray or torch.
"""

from __future__ import annotations

import asyncio
import uuid
from array import array
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import NoReturn, Protocol

from phi_cluster.cluster.call_reader import CallReader
from phi_cluster.cluster.engine_client import EngineClient, EngineFailed
from phi_cluster.cluster.errors import GaveWay, InvalidRequest, Overloaded, PoisonousRequest, ReadElsewhere
from phi_cluster.cluster.frames import AddSequence, SequenceOutput, TokenLogprobs
from phi_cluster.cluster.messages import BeginTurn, ProcessId, SegmentRef, SessionKey, SharedRows, TurnGrant
from phi_cluster.cluster.prompt import PromptReader
from phi_cluster.cluster.reply import Reply
from phi_cluster.cluster.sequence_stream import SequenceStream
from phi_cluster.cluster.sequence_trace import SequenceTrace
from phi_cluster.cluster.shared_prompt import SharedPrompt
from phi_cluster.cluster.span import Attributes, spanning
from phi_cluster.cluster.stretches import tell_stretches
from phi_cluster.cluster.turn_api import Position, TextDelta, TokenChoice, TokenLogprob, TurnRequest, TurnStarted
from phi_cluster.cluster.turn_lease import Lessor, TurnLease
from phi_cluster.cluster.turn_record import Recorder, TurnRecord
from phi_cluster.cluster.wanted_format import format_param
from phi_cluster.model.sampling_params import SamplingParams
from phi_cluster.model.tokenizer import Tokenizer


class Sessions(Recorder, Lessor, Protocol):
    """Where sessions are; implemented by `session.directory`."""

    async def begin_turn(self, request: BeginTurn) -> TurnGrant: ...

    async def give_way(self, key: SessionKey) -> None:
        """The session, whose turn has been ended, gives the memory of its keys and values back."""
        ...

    async def lay_prompt(self, grant: TurnGrant, source: SegmentRef, num_tokens: int) -> None:
        """The new session that the turn began in gets the first tokens of another one's memory, as far as they are to
        be had. Memory for them is leased."""
        ...


class Poison(Protocol):
    """The requests on which engines have died."""

    def holds(self, request: TurnRequest) -> bool: ...

    def add(self, request: TurnRequest) -> None: ...


@dataclass(frozen=True)
class TurnLimits:
    """`lease_tokens`: KV memory is leased for so many tokens ahead of the reply. `regime_tokens`: sequences of more
    tokens have other keys and values (LongRoPE); None: all have the same. `shares_prompts`: whether pages of one
    session's memory can be seen in another's."""

    max_model_len: int
    max_turns: int
    turn_wait: float
    lease_tokens: int = 512
    regime_tokens: int | None = None
    shares_prompts: bool = True


@dataclass(frozen=True)
class Surroundings:
    """What all turns of a replica use. `process` is the replica's."""

    tokenizer: Tokenizer
    prompts: PromptReader
    sessions: Sessions
    engines: EngineClient
    limits: TurnLimits
    process: ProcessId
    poison: Poison


class MemoryLost(Exception):
    """Whoever held the session's memory is gone, and no engine has it mapped: the turn has to begin again."""


class MemoryYielded(Exception):
    """Others need the memory to go on, and have it: the turn has to begin again, and waits for room."""


@dataclass
class Carried:
    """What of a turn outlives the memory in which it began. `token_ids` are the reply's, None before there are any to
    speak of; the client has all text up to `given`, and `started` if it was told so.

    `logprobs`: of each token of the reply that was generated so far, if they are asked for (see Reply).

    `shares`: others will answer the same prompt. `shared`: this is one of those others; it leaves nothing, and its
    prompt is computed already."""

    key: SessionKey
    given: Position
    token_ids: list[int] | None = None
    started: TurnStarted | None = None
    logprobs: list[TokenLogprob | None] = field(default_factory=list, repr=False)
    shares: SharedPrompt | None = None
    shared: SharedPrompt | None = None


class TurnAttempt:
    """`enter`, `start`, then `events`; whatever happens after `enter`, the turn is to be ended with `record`.

    `carried` outlives it. `stream` is the engine's sequence, once there is one; None also if the reply is there as a
    whole.
    """

    record: TurnRecord
    reply: Reply
    grant: TurnGrant

    def __init__(self, around: Surroundings, request: TurnRequest, text: str, carried: Carried):
        """`text` is the rendered prompt."""
        self._around = around
        self._request = request
        self._text = text
        self.carried = carried
        self._fresh = ""
        self._prompt_ids: list[int] = []
        self._prompt_logprobs: list[TokenLogprobs] | None = None
        # Of a prompt that another reply has computed, and whether that one wants them back.
        self._rows: SharedRows | None = None
        self._lets_go = False
        # Whether its client knows how it ended.
        self.is_told = False
        self.stream: SequenceStream | None = None
        self._trace: SequenceTrace | None = None

    async def enter(self) -> None:
        """Waits for the session's turn. Raises what `Sessions.begin_turn` raises."""
        around, request, carried = self._around, self._request, self.carried
        engine = around.engines.engine
        begin = BeginTurn(
            key=carried.key,
            request_id=request.request_id,
            text=self._text,
            wait_seconds=around.limits.turn_wait,
            writers=(around.process,) if engine is None else (around.process, engine.process),
            resume=request.resume_from is not None and carried.token_ids is None,
            claim=uuid.uuid4().hex,
            cache_hint=request.cache_hint,
            wants_ids=carried.shares is not None,
        )
        with spanning(request.span, "session.begin_turn") as span:
            self.grant = await around.sessions.begin_turn(begin)
            tell_stretches(span, self.grant.stretches)
            span.note(
                {
                    "phi.session.pid": self.grant.holder_pid,
                    "phi.session.turns": self.grant.turns,
                    "phi.session.num_tokens": self.grant.num_tokens,
                    # Fewer than there are: the engine computes the others again.
                    "phi.session.num_computed_tokens": self.grant.num_computed_tokens,
                }
            )
        self.reply = Reply(
            self._text,
            around.tokenizer.detokenizer(),
            request.stop,
            given=carried.given,
            is_known=carried.token_ids is not None,
            reader=None if request.tool_use is None else CallReader(around.tokenizer.tool_format),
            logprobs=carried.logprobs if self._wants_logprobs else None,
        )
        self.record = TurnRecord(around.sessions, around.tokenizer, self.grant, request, self.reply)

    async def start(self) -> None:
        """Takes over what there is of the reply and has an engine go on with it, if it is not over. Raises
        MemoryYielded and PhiError."""
        around, request, grant, reply = self._around, self._request, self.grant, self.reply
        # Off the event loop: a long text takes a while.
        with spanning(request.span, "prompt.encode"):
            num_kept, kept_chars, new_ids = await asyncio.to_thread(around.prompts.encode, request, grant, self._text)
        num_prompt = num_kept + len(new_ids)
        sampling = around.prompts.sampling(request, around.prompts.max_tokens(request, num_prompt))
        so_far = self.carried.token_ids
        if so_far is None:
            # Nobody has kept its log probabilities: with them it is generated again, and comes out the same.
            so_far = [] if self._wants_logprobs else _left_of_reply(grant, num_kept, new_ids)
        # As many as there are tokens: those behind a stop string are nobody's.
        del self.carried.logprobs[len(so_far) :]
        reply.answer(grant.kept_checksum if num_kept else 0, new_ids)
        self._fresh = reply.push(so_far)
        over = None
        if so_far and not reply.is_cut:
            over = SamplingParams.from_dict(sampling).finish_reason(len(so_far), so_far[-1])
        if over is not None:
            self._fresh += reply.end(over)
        elif not reply.is_cut:
            ahead = min(sampling["max_tokens"] - len(so_far), around.limits.lease_tokens)
            shared = self.carried.shared
            rows = None if shared is None else await shared.rows()
            add = AddSequence(
                sequence_id=around.engines.next_sequence_id(),
                segment=grant.segment,
                epoch=grant.epoch,
                num_kept_tokens=num_kept,
                token_ids=new_ids + so_far,
                sampling=sampling,
                max_num_tokens=num_prompt + len(so_far) + ahead,
                num_prompt_tokens=num_prompt,
                request_id=request.request_id,
                shared=rows,
            )
            try:
                with spanning(request.span, "kv.reserve", {"phi.kv.num_tokens": add.max_num_tokens}):
                    num_shared = 0 if rows is None else rows.num_tokens
                    await around.sessions.reserve(grant.key, add.max_num_tokens, num_shared)
            except Overloaded as refusal:
                # Who was told to give way comes again, and so does a reply that has begun: it is not cut off.
                if isinstance(refusal, GaveWay) or self.carried.started is not None:
                    await self._yield_memory(so_far)
                raise
            if shared is not None and rows is not None:
                if not shared.use(self, rows, self._let_go):
                    await self._yield_memory(so_far)
                self._rows = rows
            elif shared is not None and shared.copied_from is not None:
                await around.sessions.lay_prompt(grant, shared.copied_from, num_prompt)
            self.stream = await around.engines.add(add)
            if self._lets_go:
                around.engines.abort(self.stream)
            self.stream.watcher = self._trace = self._trace_of(add)
        reply.num_prompt_tokens = num_prompt
        self._prompt_ids = array("i", grant.kept_ids or b"").tolist()[:num_kept] + new_ids
        if self.carried.shared is None:
            # Only now is there anything to record: a turn that was refused room leaves the session as it was.
            record = self.record
            record.num_kept_tokens, record.num_kept_chars, record.prompt_ids = num_kept, kept_chars, new_ids
            record.sampling = sampling

    async def events(self) -> AsyncGenerator[TurnStarted | TextDelta, None]:
        """Text until the reply is over and the sequence released. Raises MemoryLost and MemoryYielded, with all of the
        reply carried, and PhiError."""
        stream, trace = self.stream, self._trace
        if stream is None or trace is None:
            if self.carried.shares is not None:
                # There is nothing more of this reply to compute, and so no prompt.
                await self.carried.shares.take_back(for_good=True)
            for event in self._begin(self.grant.num_computed_tokens):
                yield event
            return
        around, request, reply = self._around, self._request, self.reply
        limits = around.limits
        limit = min(reply.num_prompt_tokens + stream.add.sampling["max_tokens"], limits.max_model_len)
        lease = TurnLease(around.sessions, around.engines, self.grant.key, stream, limit, limits.lease_tokens)
        num_there = reply.num_prompt_tokens + len(reply.token_ids)
        has_begun = False
        with trace:
            async for output in stream:
                if output.finish_reason == "gone":
                    if self.carried.shared is not None and self._rows is not None:
                        self.carried.shared.lose(self._rows)
                    await self._drop(reply.token_ids)
                    raise MemoryLost
                if output.finish_reason == "error":
                    self._give_up(stream, output.error)
                if output.finish_reason == "bad_grammar":
                    param = format_param(request)
                    raise InvalidRequest(f"{param} cannot be followed: {output.error}", param=param)
                if output.finish_reason == "abort" and not reply.is_cut:
                    if isinstance(lease.refusal, GaveWay) or self._lets_go:
                        await self._yield_memory(reply.token_ids)
                    raise lease.refusal or ReadElsewhere("this reply is being read on by a later connection")
                lease.follow(num_there + len(stream.received))
                if not has_begun:
                    has_begun = True
                    self._share(limit)
                    self._prompt_logprobs = output.prompt_logprobs
                    num_cached = output.num_cached_tokens or 0
                    if stream.was_moved or request.resume_from is not None:
                        # What an engine computed before it died was no cache when the turn began.
                        num_cached = min(num_cached, self.grant.num_computed_tokens)
                    for event in self._begin(num_cached):
                        yield event
                if request.sampling["max_tokens"] == 0:
                    # Only the prompt was asked for: what was drawn is nobody's.
                    if output.finish_reason is not None:
                        reply.end("length")
                    continue
                if reply.is_cut:
                    # What the step in flight brought after a stop string is nobody's.
                    continue
                before = len(reply.token_ids)
                logprobs = self._logprobs(output)
                self.carried.logprobs += logprobs
                text = reply.push(output.token_ids)
                taken = len(reply.token_ids) - before
                if text or taken:
                    pieces = reply.take_pieces()
                    told = tuple(one for one in logprobs[:taken] if one is not None)
                    yield TextDelta(text, taken, reply.position, pieces, told)
                if reply.is_cut:
                    around.engines.abort(stream)
                elif output.finish_reason is not None:
                    text = reply.end(output.finish_reason)
                    pieces = reply.take_pieces()
                    if pieces:
                        yield TextDelta(text, 0, reply.position, pieces)

    def _trace_of(self, add: AddSequence) -> SequenceTrace:
        """Of the sequence that was just added."""
        engine = self._around.engines.engine
        told: Attributes = {
            "phi.engine.pid": 0 if engine is None else engine.process.pid,
            "phi.sequence.num_tokens": add.num_kept_tokens + len(add.token_ids),
        }
        return SequenceTrace(self._request.span, told)

    @property
    def _wants_logprobs(self) -> bool:
        return self._request.sampling.get("logprobs") is not None

    def _logprobs(self, output: SequenceOutput) -> list[TokenLogprob | None]:
        """Of each token of an output, None for one that has no text; empty if nobody asked for them."""
        return [
            None if self._around.tokenizer.is_special(token_id) else self._token_logprob(token_id, found)
            for token_id, found in zip(output.token_ids, output.logprobs or (), strict=False)
        ]

    def _echo_logprobs(self) -> tuple[TokenLogprob, ...]:
        """Of all of the prompt's tokens, so that clients can count them; what the tokenizer put before or behind a text
        has no text in it."""
        if not self._wants_logprobs:
            return ()
        first, *others = self._prompt_ids
        tokenizer = self._around.tokenizer
        told = [TokenLogprob(tokenizer.token_bytes(first), None, ())]
        told += map(self._token_logprob, others, self._prompt_logprobs or ())
        if isinstance(self._request.prompt, str):
            hidden = map(tokenizer.is_special, self._prompt_ids)
            told = [one._replace(token=b"") if hide else one for one, hide in zip(told, hidden, strict=True)]
        return tuple(told)

    def _token_logprob(self, token_id: int, found: TokenLogprobs) -> TokenLogprob:
        def choice(token_id: int, logprob: float) -> TokenChoice:
            return TokenChoice(self._around.tokenizer.token_bytes(token_id), logprob)

        return TokenLogprob(*choice(token_id, found.logprob), tuple(map(choice, found.top_ids, found.top_logprobs)))

    def _share(self, limit: int) -> None:
        """The prompt is computed: others may answer it, with `limit` tokens in all."""
        if (shared := self.carried.shares) is not None:
            num_prompt, limits = len(self._prompt_ids), self._around.limits
            regime = limits.regime_tokens
            # Each computes the prompt's last token itself: what it draws follows from that.
            rows = SharedRows(self.grant.segment, self.grant.epoch, num_prompt - 1)
            stays = limits.shares_prompts and (regime is None or limit <= regime or num_prompt > regime)
            shared.lend(self._request, self._prompt_ids, rows, stays=stays)

    def _let_go(self) -> None:
        """The memory of the prompt is wanted back: this reply goes on when it is there again."""
        self._lets_go = True
        if self.stream is not None:
            self._around.engines.abort(self.stream)

    def leave(self) -> None:
        """No engine has its sequence any more. Idempotent."""
        if self.carried.shared is not None:
            self.carried.shared.leave(self)

    def _begin(self, num_cached: int) -> list[TurnStarted | TextDelta]:
        """What is told first: once that the turn has started, and the text that was there already."""
        carried, reply = self.carried, self.reply
        told: list[TurnStarted | TextDelta] = []
        if carried.started is None:
            carried.started = TurnStarted(reply.num_prompt_tokens, min(num_cached, reply.num_prompt_tokens))
            if self._request.echo:
                carried.started = replace(
                    carried.started,
                    echo=self._around.prompts.echoed(self._request, self._prompt_ids),
                    echo_logprobs=self._echo_logprobs(),
                )
            told.append(carried.started)
        reply.num_cached_tokens = carried.started.num_cached_tokens
        pieces = reply.take_pieces()
        if pieces:
            told.append(TextDelta(self._fresh, 0, reply.position, pieces))
        return told

    async def _yield_memory(self, token_ids: list[int]) -> NoReturn:
        """Ends the turn here, and what of its reply there is goes on when there is room. Raises MemoryYielded."""
        await self._drop(token_ids or self.carried.token_ids)
        await self._around.sessions.give_way(self.grant.key)
        raise MemoryYielded

    async def _drop(self, token_ids: list[int] | None) -> None:
        """The turn ends here and is to begin again, with so much of its reply."""
        carried = self.carried
        if carried.shares is not None:
            # It lies in this turn's memory.
            await carried.shares.take_back()
        await self.record.drop()
        carried.token_ids = token_ids
        carried.key = self.grant.key
        if carried.shared is not None:
            # Nobody will look for it, and what the last one asked for is not this one's.
            carried.key = SessionKey(self.grant.key.tenant, uuid.uuid4().hex, ephemeral=True)

    def _give_up(self, stream: SequenceStream, error: str | None) -> NoReturn:
        """Raises what the client is told of a sequence that no engine carries on."""
        if not stream.is_poisonous:
            raise EngineFailed(f"the engine gave the request up: {error}")
        with suppress(OSError):
            # What the client asked for, of whatever reply to it.
            shared = self.carried.shared
            self._around.poison.add((shared and shared.request) or self._request)
        raise poisonous()


def poisonous() -> PoisonousRequest:
    """What whoever sends such a request is told."""
    return PoisonousRequest(
        "engines died when they computed this request, so it is not tried again; please report it with the server's log"
    )


def _left_of_reply(grant: TurnGrant, num_kept: int, new_ids: list[int]) -> list[int]:
    """The ids of an interrupted reply that its session still has."""
    if grant.resumed_ids is not None:
        left = array("i", grant.resumed_ids).tolist()
        prompt = new_ids[grant.num_kept_tokens - num_kept :]
        if left[: len(prompt)] == prompt:
            return left[len(prompt) :]
    return []
