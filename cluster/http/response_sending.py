"""A response on its way to a client: as events, or whole, and told when the client leaves.

Owns: the way from a `Reading` to what is sent. Knows nothing of the JSON (response_format.py) and of how a response is
made.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response as HTTPResponse
from starlette.types import Receive, Scope, Send

from phi_cluster.cluster.errors import PhiError
from phi_cluster.cluster.http.disconnect import send_in_time, until_disconnect
from phi_cluster.cluster.http.edge import EdgeSettings
from phi_cluster.cluster.http.errors import error_response, to_json, told_of
from phi_cluster.cluster.http.event_stream import EventStream
from phi_cluster.cluster.http.rates import rate_headers
from phi_cluster.cluster.http.response_format import ResponseEvents, response_json
from phi_cluster.cluster.response_api import Reading, Response


class ResponseStream(HTTPResponse):
    """The events of what `open_reading` gives, behind the one numbered `starting_after`."""

    def __init__(
        self, open_reading: Callable[[], Awaitable[Reading]], settings: EdgeSettings, *, starting_after: int = -1
    ) -> None:
        super().__init__()
        self._open_reading = open_reading
        self._settings = settings
        self._starting_after = starting_after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = EventStream(scope, receive, send, {}, is_typed=True)
        await until_disconnect(
            receive,
            self._send(stream),
            stream.keep_alive(self._settings.keep_alive_seconds),
            until=stream.stuck(self._settings.write_seconds),
        )

    async def _send(self, stream: EventStream) -> None:
        reading: Reading | None = None
        events: ResponseEvents | None = None
        try:
            reading = await self._open_reading()
            events = ResponseEvents(reading.response)
            stream.add_headers(rate_headers(reading.rates))
            await self._write(stream, events.opening())
            async with aclosing(reading.events()) as coming:
                async for one in coming:
                    if isinstance(one, Response):
                        await stream.end(*self._wanted(events.closing(one)))
                    else:
                        await self._write(stream, events.said(one))
        except ClientDisconnect:
            raise
        except Exception as error:
            told = _told(error, reading)
            if stream.has_started and events is not None:
                await stream.end(events.error(told.message_told, told.code, told.param))
            else:
                await stream.fail(told)
        finally:
            if reading is not None:
                reading.leave()

    async def _write(self, stream: EventStream, events: Iterable[dict[str, Any]]) -> None:
        for event in self._wanted(events):
            await stream.write(event)

    def _wanted(self, events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        return [event for event in events if event["sequence_number"] > self._starting_after]


class WholeResponse(HTTPResponse):
    """What `open_reading` gives, when it is over; one in the background at once."""

    def __init__(self, open_reading: Callable[[], Awaitable[Reading]], settings: EdgeSettings) -> None:
        super().__init__()
        self._open_reading = open_reading
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await until_disconnect(receive, self._send(scope, receive, send))

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        reading: Reading | None = None
        try:
            reading = await self._open_reading()
            response = reading.response
            if not response.asked.background:
                async with aclosing(reading.events()) as coming:
                    async for one in coming:
                        if isinstance(one, Response):
                            response = one
                if reading.error is not None:
                    # As in chats: who waits for all of it gets an error and not half of it.
                    raise reading.error
            headers = rate_headers(reading.rates)
            answer = HTTPResponse(to_json(response_json(response)), 200, headers, media_type="application/json")
        except Exception as error:
            answer = error_response(_told(error, reading))
        finally:
            if reading is not None:
                reading.leave()
        await send_in_time(answer, scope, receive, send, self._settings.write_seconds)


def _told(error: Exception, reading: Reading | None) -> PhiError:
    return told_of(error, "for a response" if reading is None else reading.response.id)
