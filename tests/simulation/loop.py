"""An event loop whose clock is a number, shared by processes that can be killed or stalled between any two callbacks.

Owns: fake time, the order of callbacks, and what a death means: nothing of a dead process runs any more, not even its
`finally`. Knows nothing of networks, sessions or faults.
"""

from __future__ import annotations

import asyncio
import heapq
import sys
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from phi_cluster.cluster.messages import ProcessId

# So many callbacks without a step of the clock, or in all, are a livelock.
_MAX_AT_ONCE = 20_000
_MAX_CALLBACKS = 400_000


class Violation(AssertionError):
    """Something happened that must not, ever."""


class Process:
    """`instance` is what its actor calls go to, `fds` the memory that it has open."""

    def __init__(self, kind: str, pid: int, up_at: float = 0.0):
        self.kind = kind
        self.identity = ProcessId(pid, 1)
        self.alive = True
        self.up_at = up_at
        self.stalled_until = 0.0
        self.instance: Any = None
        self.fds: dict[int, Any] = {}
        self.num_fds = 0
        self.calls: dict[Any, None] = {}
        self.at_death: list[Callable[[], None]] = []

    def __repr__(self) -> str:
        return f"{self.kind}-{self.identity.pid % 10_000}"


class Handle:
    """Of a callback (asyncio's, without a context: nothing here uses one)."""

    __slots__ = ("args", "callback", "process")

    def __init__(self, process: Process | None, callback: Any, args: Any):
        self.process = process
        self.callback = callback
        self.args = args

    def cancel(self) -> None:
        self.callback = None

    def cancelled(self) -> bool:
        return self.callback is None


class Loop(asyncio.AbstractEventLoop):
    """What a callback schedules belongs to its own process, `current` (None: the world's, which cannot die)."""

    def __init__(self) -> None:
        self.now = 0.0
        self.current: Process | None = None
        self.violation: Violation | None = None
        self.num_callbacks = 0
        self._number = 0
        self._ready: deque[Handle] = deque()
        self._timers: list[tuple[float, int, Handle]] = []
        # All that there ever were: one that is frozen must not be collected, which would run its `finally`.
        self._tasks: list[asyncio.Task[Any]] = []
        self._is_over = False

    # What asyncio asks.

    def time(self) -> float:
        return self.now

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return self._is_over

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> Any:
        handle = Handle(self.current, callback, args)
        if not self._is_over:
            self._ready.append(handle)
        return handle

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> Any:
        return self.at(when, self.current, callback, *args)

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> Any:
        return self.at(self.now + delay, self.current, callback, *args)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: Any = None, context: Any = None) -> Any:
        if self._is_over:
            coro.close()
            return self.create_future()
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name="")
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        self._tasks.append(task)
        return task

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:
        """A thread's work takes no time here, but comes back later."""
        future = self.create_future()

        def work() -> None:
            if not future.done():
                try:
                    future.set_result(func(*args))
                except Exception as error:
                    future.set_exception(error)

        self.call_later(0.001, work)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        pass

    # What the simulation asks.

    def at(self, when: float, process: Process | None, callback: Any, *args: Any) -> Handle:
        """Calls back then, as part of a process."""
        self._number += 1
        handle = Handle(process, callback, args)
        if not self._is_over:
            heapq.heappush(self._timers, (when if when > self.now else self.now, self._number, handle))
        return handle

    def start(self, process: Process | None, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task of that process."""
        before, self.current = self.current, process
        try:
            return self.create_task(coro)
        finally:
            self.current = before

    def fail(self, what: str) -> None:
        """Also from within code that catches exceptions."""
        self.violation = self.violation or Violation(what)

    def run(self, coro: Coroutine[Any, Any, Any]) -> None:
        """Until this is done. Raises what it raises, and Violation."""
        asyncio._set_running_loop(self)
        hooks = sys.get_asyncgen_hooks()
        # A generator that is dropped is left as it is: its process is dead, or the run is over.
        sys.set_asyncgen_hooks(finalizer=lambda generator: None)
        try:
            main = self.start(None, coro)
            while not main.done():
                self._run_until_idle(main)
                if not main.done():
                    self._step_clock()
            main.result()
        finally:
            self.current = None
            self._close()
            sys.set_asyncgen_hooks(*hooks)
            asyncio._set_running_loop(None)

    def _run_until_idle(self, main: asyncio.Task[Any]) -> None:
        ready, at_once = self._ready, 0
        while ready:
            handle = ready.popleft()
            callback, process = handle.callback, handle.process
            if callback is None:
                continue
            if process is not None:
                if not process.alive:
                    continue
                if process.stalled_until > self.now:
                    self.at(process.stalled_until, process, callback, *handle.args)
                    continue
            self.current = process
            callback(*handle.args)
            at_once += 1
            if self.violation is not None:
                raise self.violation
            if main.done():
                return
            if at_once > _MAX_AT_ONCE:
                raise Violation(f"a livelock: {callback}")
        self.current = None
        self.num_callbacks += at_once
        if self.num_callbacks > _MAX_CALLBACKS:
            raise Violation(f"no end after {self.num_callbacks} callbacks")

    def _step_clock(self) -> None:
        timers, ready = self._timers, self._ready
        while timers and timers[0][2].callback is None:
            heapq.heappop(timers)
        if not timers:
            raise Violation("a deadlock: nothing is left to do, and somebody waits")
        self.now = now = timers[0][0]
        while timers and timers[0][0] <= now:
            ready.append(heapq.heappop(timers)[2])

    def _close(self) -> None:
        """Ends what still waits, without letting it do anything."""
        self._is_over = True
        self._ready.clear()
        self._timers.clear()
        for task in self._tasks:
            if not task.done():
                coro: Any = task.get_coro()
                for _ in range(9):
                    try:
                        coro.close()
                        break
                    except BaseException:
                        continue
            elif not task.cancelled():
                task.exception()
        self._tasks.clear()
