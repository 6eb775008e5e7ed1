"""A client that leaves: what is done for it ends.

Owns: the watch for a disconnect beside the work on a response. Knows nothing of what the work is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.types import Receive


async def until_disconnect(
    receive: Receive, work: Coroutine[Any, Any, None], *beside: Coroutine[Any, Any, None]
) -> None:
    """Runs `work` with `beside` until it is done or the client has left; nothing of it runs on after that."""
    main = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    helpers = [asyncio.ensure_future(one) for one in beside]
    try:
        await asyncio.wait({main, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        # Also when this task itself is cancelled, because the server stops.
        tasks = [main, gone, *helpers]
        for task in tasks:
            task.cancel()
        # Not gather: a second cancellation from outside must not disturb how the turn puts itself away.
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
