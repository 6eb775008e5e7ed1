"""The one thread in which a replica uses its store, so that no disk keeps the event loop waiting.

Owns: the thread. Knows nothing of what is called in it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class StoreThread:
    """Calls go one after the other, in their order."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="responses")

    async def call(self, method: Callable[..., T], *arguments: Any) -> T:
        """What the method returns or raises. A call that nobody waits for any more is made all the same."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, method, *arguments)

    def close(self) -> None:
        """Waits for the call under way."""
        self._pool.shutdown()
