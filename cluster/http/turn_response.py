"""A turn as an HTTP response: streamed or whole, and ended at once when the client leaves.

Owns: the way from `TurnEvent`s to what is sent, the watch for a disconnect, and that every request ends in
exactly one terminal event. Knows nothing of the two endpoints' JSON (a `ReplyFormat` does) and of how a turn
runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from phi_cluster.cluster.errors import PhiError
from phi_cluster.cluster.http.caller import SESSION_HEADER, Caller
from phi_cluster.cluster.http.disconnect import send_in_time, until_disconnect
from phi_cluster.cluster.http.edge import Edge
from phi_cluster.cluster.http.errors import error_response, to_json, told_of
from phi_cluster.cluster.http.event_stream import EventStream
from phi_cluster.cluster.http.prompts import run_all
from phi_cluster.cluster.http.rates import rate_headers
from phi_cluster.cluster.http.running_usage import RunningUsage, usage_of
from phi_cluster.cluster.observation import Observation
from phi_cluster.cluster.turn_api import (
    CallPiece,
    ChoiceFinished,
    Endpoint,
    FinishReason,
    TextDelta,
    TokenLogprob,
    TurnEvent,
    TurnFinished,
    TurnRequest,
    TurnStarted,
)


class ReplyFormat(Protocol):
    """One endpoint's JSON for one reply."""

    @property
    def endpoint(self) -> Endpoint: ...

    def of_choice(self, index: int) -> ReplyFormat:
        """The same for another of several replies."""
        ...

    def opening(self) -> dict[str, Any] | None:
        """The chunk before all text, if there is one."""
        ...

    def delta(
        self, text: str, logprobs: Sequence[TokenLogprob] | None, calls: Sequence[CallPiece] = ()
    ) -> dict[str, Any]:
        """`logprobs` of the tokens that are new with this text; None: nobody asked for them. `calls` come behind it."""
        ...

    def closing(self, finish_reason: FinishReason) -> dict[str, Any]: ...

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The chunk without choices behind the closing one."""
        ...

    def whole(
        self,
        text: str,
        logprobs: Sequence[TokenLogprob] | None,
        finish_reason: FinishReason,
        usage: dict[str, Any],
        calls: Sequence[CallPiece] = (),
    ) -> dict[str, Any]: ...


@dataclass
class SaidChoice:
    """One whole reply, and the prompt if it is told too."""

    text: str = ""
    echo: str = ""
    echo_logprobs: list[TokenLogprob] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    calls: list[CallPiece] = field(default_factory=list)
    finish_reason: FinishReason = "stop"


class TurnResponse(Response):
    """Runs `requests`, one for each prompt, when it is called as an ASGI app. `include_usage` (in a chunk of its own),
    `continuous_usage` (in all others) and `data_only` (see EventStream) are for streams only, `pick`, which says what
    is told of all that was said, for whole replies only."""

    def __init__(
        self,
        edge: Edge,
        caller: Caller,
        requests: Sequence[TurnRequest],
        reply_format: ReplyFormat,
        *,
        stream: bool,
        include_usage: bool,
        continuous_usage: bool = False,
        data_only: bool = False,
        pick: Callable[[Sequence[SaidChoice]], Sequence[SaidChoice]] | None = None,
    ) -> None:
        super().__init__()
        self._edge = edge
        self._caller = caller
        self._requests = requests
        self._format = reply_format
        num_choices = sum(request.num_choices for request in requests)
        self._is_several = num_choices > 1
        self._formats = [reply_format.of_choice(index) for index in range(num_choices)]
        self._pick = pick
        self._stream = stream
        self._include_usage = include_usage
        self._data_only = data_only
        self._usage = RunningUsage(requests[0].num_choices) if continuous_usage else None
        self._extra_headers = {SESSION_HEADER: caller.session_id} if caller.session_id is not None else {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        observation = Observation(self._edge.observer, self._format.endpoint, self._edge.clock, self._caller.request_id)
        try:
            if self._stream:
                stream = EventStream(scope, receive, send, self._extra_headers, data_only=self._data_only)
                await until_disconnect(
                    receive,
                    self._send_stream(stream, observation),
                    stream.keep_alive(self._edge.settings.keep_alive_seconds),
                    # Who does not read is as good as gone: neither the turn nor what it brought waits for him.
                    until=stream.stuck(self._edge.settings.write_seconds),
                )
            else:
                await until_disconnect(receive, self._send_whole(scope, receive, send, observation))
        finally:
            # Whoever has not finished by now was cancelled: the client left, or the server stops.
            observation.finish("abort")

    async def _send_stream(self, stream: EventStream, observation: Observation) -> None:
        try:
            finished, told_openings = None, False
            # Of one choice's tokens, whose text has not come out yet.
            logprobs: dict[int, list[TokenLogprob]] = defaultdict(list)
            async with aclosing(self._events(observation)) as events:
                async for event in events:
                    if self._usage is not None:
                        self._usage.see(event)
                    if isinstance(event, TextDelta):
                        choice = event.choice
                        logprobs[choice] += event.logprobs
                        if event.text or event.calls:
                            told = self._told_of(logprobs.pop(choice))
                            [delta] = self._counted([self._formats[choice].delta(event.text, told, event.calls)])
                            await stream.write(delta, self._position(event))
                    elif isinstance(event, TurnStarted):
                        stream.add_headers(self._extra_headers)
                        openings, told_openings = [] if told_openings else self._openings(), True
                        await stream.write_all(self._counted([*openings, *self._echoes(event)]))
                    elif isinstance(event, ChoiceFinished):
                        await stream.write_all(
                            self._counted(self._closing(event.choice, event.finish_reason, logprobs))
                        )
                    else:
                        finished = event
            assert finished is not None
            chunks = [] if self._is_several else self._counted(self._closing(0, finished.finish_reason, logprobs))
            if self._include_usage:
                chunks.append(self._format.usage_chunk(usage_of(finished)))
            if chunks:
                self._add_details(chunks[-1], finished, observation)
            observation.finish(finished.finish_reason)
            await stream.end(*chunks)
        except ClientDisconnect:
            raise
        except Exception as error:
            await stream.fail(self._told(error, observation))

    def _counted(self, chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """With the usage so far of the choice that each tells of, if that was asked for."""
        if self._usage is None:
            return chunks
        return [{**chunk, "usage": self._usage.of(chunk["choices"][0]["index"])} for chunk in chunks]

    def _openings(self) -> list[dict[str, Any]]:
        return [opening for form in self._formats if (opening := form.opening()) is not None]

    def _echoes(self, started: TurnStarted) -> list[dict[str, Any]]:
        """The prompt, told for each of its choices."""
        if started.echo is None:
            return []
        told = self._told_of(list(started.echo_logprobs))
        return [form.delta(started.echo, told) for form in self._formats_of(started)]

    def _formats_of(self, started: TurnStarted) -> list[ReplyFormat]:
        """Those of a prompt's choices."""
        return self._formats[started.choice : started.choice + self._requests[0].num_choices]

    def _closing(
        self, choice: int, finish_reason: FinishReason, logprobs: dict[int, list[TokenLogprob]]
    ) -> list[dict[str, Any]]:
        """The last chunks of a choice."""
        form, rest = self._formats[choice], logprobs.pop(choice, [])
        return [*([form.delta("", self._told_of(rest))] if rest else []), form.closing(finish_reason)]

    def _position(self, event: TextDelta) -> object:
        """Where a client may read on. Not in several replies."""
        return None if self._is_several else event.position

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send, observation: Observation) -> None:
        try:
            said = [SaidChoice() for _ in self._formats]
            finished = None
            async with aclosing(self._events(observation)) as events:
                async for event in events:
                    if isinstance(event, TextDelta):
                        said[event.choice].text += event.text
                        said[event.choice].logprobs += event.logprobs
                        said[event.choice].calls += event.calls
                    elif isinstance(event, ChoiceFinished):
                        said[event.choice].finish_reason = event.finish_reason
                    elif isinstance(event, TurnStarted):
                        for one in said[event.choice : event.choice + self._requests[0].num_choices]:
                            one.echo, one.echo_logprobs = event.echo or "", list(event.echo_logprobs)
                    else:
                        finished = event
            assert finished is not None
            if not self._is_several:
                said[0].finish_reason = finished.finish_reason
            body = self._body(said if self._pick is None else self._pick(said), usage_of(finished))
            self._add_details(body, finished, observation)
            response = Response(to_json(body), 200, self._extra_headers, media_type="application/json")
            observation.finish(finished.finish_reason)
        except Exception as error:
            response = error_response(self._told(error, observation), self._extra_headers)
        await send_in_time(response, scope, receive, send, self._edge.settings.write_seconds)

    def _body(self, said: Sequence[SaidChoice], usage: dict[str, Any]) -> dict[str, Any]:
        """One choice's body with the choices of all."""
        bodies = [
            form.whole(
                one.echo + one.text,
                self._told_of([*one.echo_logprobs, *one.logprobs]),
                one.finish_reason,
                usage,
                one.calls,
            )
            for form, one in zip(self._formats, said, strict=False)
        ]
        return {**bodies[0], "choices": [choice for body in bodies for choice in body["choices"]]}

    async def _events(self, observation: Observation) -> AsyncGenerator[TurnEvent, None]:
        """The runner's events, observed, and checked: the last one is `TurnFinished`."""
        finished = False
        async with aclosing(run_all(self._edge.turns, self._requests)) as events:
            async for event in events:
                observation.see(event)
                if isinstance(event, TurnStarted):
                    self._extra_headers.update(rate_headers(event.rates))
                finished = isinstance(event, TurnFinished)
                yield event
        if not finished:
            raise RuntimeError("the turn ended without TurnFinished")

    def _told_of(self, logprobs: list[TokenLogprob]) -> list[TokenLogprob] | None:
        return None if self._requests[0].sampling.get("logprobs") is None else logprobs

    def _told(self, error: Exception, observation: Observation) -> PhiError:
        told = told_of(error, self._caller.request_id)
        observation.fail(told)
        return told

    def _add_details(self, body: dict[str, Any], finished: TurnFinished, observation: Observation) -> None:
        if self._caller.wants_details:
            ttft = observation.ttft
            body["phi"] = {
                "ttft_ms": None if ttft is None else round(ttft * 1000, 3),
                "engine_replaced": finished.engine_replaced,
            }
