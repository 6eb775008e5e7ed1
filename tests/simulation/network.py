"""Actor calls between processes: late, out of order, to the dead, and carried out without an answer; and sockets.

Owns: when a call or a frame arrives, if at all. Knows nothing of what is called.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayTaskError

from tests.simulation.loop import Loop, Process


class ActorHandle:
    """As Ray's: `handle.method.remote(...)`, carried out by the process that the actor has then."""

    def __init__(self, network: Network, process: Process):
        self._network = network
        self.process_ = process

    def __getattr__(self, method: str) -> _Method:
        found = _Method(self._network, self, method)
        self.__dict__[method] = found
        return found


class _Method:
    def __init__(self, network: Network, handle: ActorHandle, method: str):
        self._network = network
        self._handle = handle
        self._method = method

    def remote(self, *args: Any) -> asyncio.Future[Any]:
        return self._network.call(self._handle.process_, self._method, args)


@dataclass(eq=False)
class Call:
    caller: Process | None
    target: Process
    method: str
    args: tuple[Any, ...]
    future: asyncio.Future[Any]
    fate: str


class Network:
    """`fate(target, method)` decides what becomes of a call: "", "lost" (it never arrives), "unanswered" (it is carried
    out), or a death: "before" and "after" (the target's), "caller" (when the answer is due). `answered` sees every
    answer as it is given."""

    def __init__(
        self,
        loop: Loop,
        rng: Random,
        fate: Callable[[Process, str], str],
        kill: Callable[[Process], None],
        answered: Callable[[Call, Any], None],
        log: Callable[..., None],
    ):
        self._loop = loop
        self._rng = rng
        self._fate = fate
        self._kill = kill
        self._answered = answered
        self._log = log

    def delay(self) -> float:
        """Mostly a fraction of a millisecond, now and then much more: that is what changes the order."""
        x = self._rng.random()
        return 0.0002 + x * 0.001 if x < 0.9 else x * x * 0.05

    def call(self, target: Process, method: str, args: tuple[Any, ...]) -> asyncio.Future[Any]:
        caller = self._loop.current
        call = Call(caller, target, method, args, self._loop.create_future(), self._fate(target, method))
        if caller is not None and not caller.alive:
            return call.future
        if call.fate:
            self._log("fault", call.fate, method, target)
        target.calls[call] = None
        if call.fate == "lost":
            self._fail(call, ActorUnavailableError("lost on the way", None))
        else:
            self._loop.at(self._loop.now + self.delay(), None, self._deliver, call)
        return call.future

    def died(self, process: Process) -> None:
        """Whoever waits for its answers is told."""
        for call in list(process.calls):
            self._fail(call, ActorDiedError())

    def _deliver(self, call: Call) -> None:
        target = call.target
        if call.fate == "before" and target.alive:
            self._kill(target)
            return
        if not target.alive:
            self._fail(call, ActorDiedError())
            return
        wait = max(target.up_at, target.stalled_until)
        if wait > self._loop.now:
            self._loop.at(wait, None, self._deliver, call)
            return
        self._loop.start(target, self._carry_out(call))

    async def _carry_out(self, call: Call) -> None:
        error: BaseException | None = None
        answer = None
        try:
            answer = await getattr(call.target.instance, call.method)(*call.args)
        except Exception as raised:
            error = as_task_error(raised)
        if not call.target.alive:
            return
        if error is None:
            self._answered(call, answer)
        self._log("answer", call.method, call.target, "->", call.caller, type(answer if error is None else error))
        if call.fate == "after":
            self._kill(call.target)
        elif call.fate == "caller" and call.caller is not None and call.caller.alive:
            self._kill(call.caller)
        elif call.fate == "unanswered":
            self._fail(call, ActorUnavailableError("the answer is lost", None))
        else:
            call.target.calls.pop(call, None)
            self._loop.at(self._loop.now + self.delay(), call.caller, self._resolve, call, answer, error)

    def _fail(self, call: Call, error: RayActorError) -> None:
        call.target.calls.pop(call, None)
        when = self._loop.now + 0.005 + self.delay()
        self._loop.at(when, call.caller, self._resolve, call, None, error)

    def _resolve(self, call: Call, answer: Any, error: BaseException | None) -> None:
        if call.future.done():
            return
        if error is None:
            call.future.set_result(answer)
        else:
            call.future.set_exception(error)


class Channel:
    """One direction of a socket: in order, and what was sent arrives although its sender died."""

    def __init__(self, loop: Loop, network: Network, receiver: Process | None, deliver: Callable[[Any], None]):
        self._loop = loop
        self._network = network
        self._receiver = receiver
        self._deliver = deliver
        self._last = 0.0

    def send(self, item: Any, late: float = 0.0) -> None:
        self._last = max(self._last, self._loop.now + late + self._network.delay())
        self._loop.at(self._last, self._receiver, self._deliver, item)


_CLASSES: dict[type, type] = {}


def as_task_error(cause: Exception) -> Exception:
    """An error as Ray raises it at the caller's: of its own class and of RayTaskError."""
    kind = type(cause)
    if kind not in _CLASSES:
        namespace = {"__init__": lambda self, cause: None, "__str__": lambda self: str(self.cause)}
        _CLASSES[kind] = type(f"RayTaskError({kind.__name__})", (RayTaskError, kind), namespace)
    error: Any = _CLASSES[kind].__new__(_CLASSES[kind])
    error.__dict__.update(getattr(cause, "__dict__", {}))
    error.cause = cause
    return error
