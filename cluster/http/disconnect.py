"""A client that leaves: what is done for it ends.

Owns: the watch for a disconnect beside the work on a response, and the time in which a whole one is taken. Knows
nothing of what the work is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send


async def until_disconnect(
    receive: Receive,
    work: Coroutine[Any, Any, None],
    *beside: Coroutine[Any, Any, None],
    until: Coroutine[Any, Any, None] | None = None,
) -> None:
    """Runs `work` with `beside` until it is done, the client has left, or `until` is done; nothing of it runs on after
    that."""
    main = asyncio.ensure_future(work)
    ends = [asyncio.ensure_future(_disconnected(receive))]
    if until is not None:
        ends.append(asyncio.ensure_future(until))
    helpers = [asyncio.ensure_future(one) for one in beside]
    try:
        await asyncio.wait({main, *ends}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        # Also when this task itself is cancelled, because the server stops.
        tasks = [main, *ends, *helpers]
        for task in tasks:
            task.cancel()
        # Not gather: a second cancellation from outside must not disturb how the turn puts itself away.
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.result()


async def send_in_time(response: Response, scope: Scope, receive: Receive, send: Send, seconds: float) -> None:
    """Sends a whole response. Raises ClientDisconnect if it is not taken in time: who does not read is as good as
    gone."""
    try:
        await asyncio.wait_for(response(scope, receive, send), seconds)
    except asyncio.TimeoutError:
        raise ClientDisconnect from None


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
