"""A turn as an HTTP response: streamed or whole, and ended at once when the client leaves.

Owns: the way from `TurnEvent`s to what is sent, the watch for a disconnect, and that every request ends in
exactly one terminal event. Knows nothing of the two endpoints' JSON (a `ReplyFormat` does) and of how a turn
runs.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
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
from phi_cluster.cluster.http.rates import rate_headers
from phi_cluster.cluster.observation import Observation
from phi_cluster.cluster.turn_api import (
    CallPiece,
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


class TurnResponse(Response):
    """Runs `request` when it is called as an ASGI app. `include_usage` is for streams only."""

    def __init__(
        self,
        edge: Edge,
        caller: Caller,
        request: TurnRequest,
        reply_format: ReplyFormat,
        *,
        stream: bool,
        include_usage: bool,
    ) -> None:
        super().__init__()
        self._edge = edge
        self._caller = caller
        self._request = request
        self._format = reply_format
        self._stream = stream
        self._include_usage = include_usage
        self._extra_headers = {SESSION_HEADER: caller.session_id} if caller.session_id is not None else {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        observation = Observation(self._edge.observer, self._format.endpoint, self._edge.clock)
        try:
            if self._stream:
                stream = EventStream(scope, receive, send, self._extra_headers)
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
            finished = None
            # Of tokens whose text has not come out yet.
            logprobs: list[TokenLogprob] = []
            async with aclosing(self._events(observation)) as events:
                async for event in events:
                    if isinstance(event, TextDelta):
                        logprobs += event.logprobs
                        if event.text or event.calls:
                            delta = self._format.delta(event.text, self._told_of(logprobs), event.calls)
                            await stream.write(delta, event.position)
                            logprobs = []
                    elif isinstance(event, TurnStarted):
                        stream.add_headers(self._extra_headers)
                        opening = self._format.opening()
                        if opening is not None:
                            await stream.write(opening)
                    else:
                        finished = event
            assert finished is not None
            if logprobs:
                await stream.write(self._format.delta("", logprobs))
            chunks = [self._format.closing(finished.finish_reason)]
            if self._include_usage:
                chunks.append(self._format.usage_chunk(usage_of(finished)))
            self._add_details(chunks[-1], finished, observation)
            observation.finish(finished.finish_reason)
            await stream.end(*chunks)
        except ClientDisconnect:
            raise
        except Exception as error:
            await stream.fail(self._told(error, observation))

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send, observation: Observation) -> None:
        try:
            texts: list[str] = []
            logprobs: list[TokenLogprob] = []
            calls: list[CallPiece] = []
            finished = None
            async with aclosing(self._events(observation)) as events:
                async for event in events:
                    if isinstance(event, TextDelta):
                        texts.append(event.text)
                        logprobs += event.logprobs
                        calls += event.calls
                    elif isinstance(event, TurnFinished):
                        finished = event
            assert finished is not None
            told = self._told_of(logprobs)
            body = self._format.whole("".join(texts), told, finished.finish_reason, usage_of(finished), calls)
            self._add_details(body, finished, observation)
            response = Response(to_json(body), 200, self._extra_headers, media_type="application/json")
            observation.finish(finished.finish_reason)
        except Exception as error:
            response = error_response(self._told(error, observation), self._extra_headers)
        await send_in_time(response, scope, receive, send, self._edge.settings.write_seconds)

    async def _events(self, observation: Observation) -> AsyncGenerator[TurnEvent, None]:
        """The runner's events, observed, and checked: the last one is `TurnFinished`."""
        finished = False
        async with aclosing(self._edge.turns.run(self._request)) as events:
            async for event in events:
                observation.see(event)
                if isinstance(event, TurnStarted):
                    self._extra_headers.update(rate_headers(event.rates))
                finished = isinstance(event, TurnFinished)
                yield event
        if not finished:
            raise RuntimeError("the turn ended without TurnFinished")

    def _told_of(self, logprobs: list[TokenLogprob]) -> list[TokenLogprob] | None:
        return None if self._request.sampling.get("logprobs") is None else logprobs

    def _told(self, error: Exception, observation: Observation) -> PhiError:
        told = told_of(error, self._request.request_id)
        observation.fail(told)
        return told

    def _add_details(self, body: dict[str, Any], finished: TurnFinished, observation: Observation) -> None:
        if self._caller.wants_details:
            ttft = observation.ttft
            body["phi"] = {
                "ttft_ms": None if ttft is None else round(ttft * 1000, 3),
                "engine_replaced": finished.engine_replaced,
            }


def usage_of(finished: TurnFinished) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": finished.num_prompt_tokens,
        "completion_tokens": finished.num_completion_tokens,
        "total_tokens": finished.num_prompt_tokens + finished.num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": finished.num_cached_tokens},
    }
