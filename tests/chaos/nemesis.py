"""The nemesis: a schedule of faults, made from a seed before anything runs, and whoever carries it out.

Owns: which faults there are, when they come, and doing them to processes and to clients' connections. Knows nothing of
what the faults may lead to (checker.py does).
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

from tests.chaos.history import Attempt, Fault, History
from tests.chaos.streams import Address, Stream, ask
from tests.chaos.talker import Talkers
from tests.chaos.victims import HAPROXY, Census, Victim

# A request on which two engines died in a row without a token is failed: engines live at least so long.
ENGINE_LIFE_SECONDS = 2.5
# What hangs is known by its silence and killed, engines after 3 s, session actors and the keeper later:
# it is waited for so long.
HANG_SECONDS = 20.0
MASS = 200
# What was struck before may be under repair: it is waited for so often, half a second each time.
_LOOKS = 30


@dataclass(frozen=True)
class Plan:
    """One fault to come. `after` seconds behind the one before; `hold`: how long a process stays stopped; `number`
    chooses among several possible victims."""

    kind: str
    target: str
    after: float
    hold: float = 0.0
    number: int = 0


# Each fault once, with the seconds that it is given before the next one. Connections break with the last group only.
_DECK: tuple[Plan, ...] = (
    Plan("kill", "engine", 4.0),
    Plan("kill", "engine", 4.0),
    Plan("stop", "engine", 6.0, hold=HANG_SECONDS),
    Plan("stop", "engine", 3.0, hold=1.0),
    Plan("kill", "standby engine", 3.0),
    Plan("stop", "standby engine", 4.0, hold=HANG_SECONDS),
    Plan("kill", "session actor", 3.0),
    Plan("kill", "session actor", 3.0),
    Plan("stop", "session actor", 3.0, hold=2.0),
    Plan("stop", "session actor", 4.0, hold=HANG_SECONDS),
    Plan("kill", "keeper", 4.0),
    Plan("stop", "keeper", 3.0, hold=2.0),
    Plan("stop", "keeper", 6.0, hold=HANG_SECONDS),
    Plan("kill", "controller", 2.0),
    Plan("stop", "controller", 2.0, hold=2.0),
    Plan("kill", "weight store", 2.0),
    Plan("stop", "weight store", 2.0, hold=2.0),
    Plan("kill", "Serve controller", 4.0),
    Plan("stop", "Serve controller", 3.0, hold=2.0),
    Plan("stop", "replica", 3.0, hold=2.0),
    Plan("stop", HAPROXY, 3.0, hold=2.0),
    Plan("recycle", "session", 2.0),
    Plan("cut fin", "client", 2.0),
    Plan("cut rst", "client", 2.0),
    Plan("mass disconnect", "client", 6.0),
    Plan("kill", "replica", 12.0),
    Plan("kill", HAPROXY, 7.0),
    Plan("kill", "proxy", 7.0),
    Plan("stop", "proxy", 6.0, hold=2.0),
)
KINDS = tuple(dict.fromkeys((plan.kind, plan.target) for plan in _DECK))


def make_schedule(seed: int, seconds: float) -> list[Plan]:
    """Faults for so long: every one of the deck, in an order of its own, again and again; the last round may be short.
    If not even one round fits, it comes faster."""
    chance = random.Random(f"nemesis {seed}")
    whole = sum(plan.after for plan in _DECK)
    pace = min(1.0, seconds / whole)
    plans: list[Plan] = []
    left = seconds
    while True:
        deck = list(_DECK)
        chance.shuffle(deck)
        for card in deck:
            # A moment earlier or later, so that faults meet turns at all their stages.
            after = card.after * pace * chance.uniform(0.7, 1.2 if pace == 1.0 else 1.0)
            if after > left:
                return plans
            left -= after
            plans.append(Plan(card.kind, card.target, after, card.hold, chance.randrange(1 << 16)))
        if pace < 1.0:
            return plans


class Nemesis:
    """Carries a schedule out against one server. Processes that it stopped go on again, whatever happens."""

    def __init__(
        self, address: Address, census: Census, talkers: Talkers, history: History, log: Callable[[str], None]
    ):
        self._address = address
        self._census = census
        self._talkers = talkers
        self._history = history
        self._log = log
        self._background: set[asyncio.Task[None]] = set()
        self._engines = asyncio.Lock()
        self._engine_died_at = 0.0

    async def carry_out(self, schedule: Iterable[Plan]) -> None:
        """Returns when all that was stopped goes on again, or is dead, and what was begun is deleted."""
        try:
            for plan in schedule:
                await asyncio.sleep(plan.after / 2)
                await self._do(plan)
                await asyncio.sleep(plan.after / 2)
        finally:
            if self._background:
                await asyncio.wait(self._background)

    async def _do(self, plan: Plan) -> None:
        if plan.target in ("engine", "standby engine", "session", "client"):
            await self._until_ready()
        fault = Fault(time.monotonic(), plan.kind, plan.target)
        if plan.kind in ("kill", "stop"):
            await self._strike(plan, fault)
        elif plan.kind == "mass disconnect":
            fault.count = await self._mass_disconnect(fault)
        elif plan.kind == "recycle":
            await self._recycle(plan, fault)
        else:
            fault.count = self._cut(plan, fault)
        self._log(f"{fault.kind} {fault.target} {fault.pid or ''} {fault.skipped or fault.note}")

    async def _until_ready(self) -> None:
        for _ in range(_LOOKS):
            if (await ask(self._address, "GET", "/ready", timeout=3.0)).status == 200:
                return
            await asyncio.sleep(0.5)

    # Processes.

    async def _strike(self, plan: Plan, fault: Fault) -> None:
        if plan.target in ("engine", "standby engine", "replica"):
            # A replica takes its engines along. The lock is kept until the one before is dead for long enough.
            await self._engines.acquire()
            await asyncio.sleep(max(self._engine_died_at + ENGINE_LIFE_SECONDS - time.monotonic(), 0))
        try:
            victim = await self._choose(plan)
            for _ in range(_LOOKS):
                if victim is not None:
                    break
                await asyncio.sleep(0.5)
                victim = await self._choose(plan)
            fault.at = time.monotonic()
            self._history.faults.append(fault)
            number = signal.SIGKILL if plan.kind == "kill" else signal.SIGSTOP
            if victim is None or not victim.send(number):
                fault.skipped = "there is none now"
                self._release(plan)
                return
        except BaseException:
            self._release(plan)
            raise
        fault.pid = victim.pid
        self._in_background(self._hold(plan, fault, victim))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _hold(self, plan: Plan, fault: Fault, victim: Victim) -> None:
        """Until the victim is dead, or has been stopped for long enough."""
        try:
            until = time.monotonic() + (plan.hold if plan.kind == "stop" else 10.0)
            while victim.lives and time.monotonic() < until:  # noqa: ASYNC110 -- a process tells nobody
                await asyncio.sleep(0.02)
            if victim.lives:
                victim.send(signal.SIGCONT)
                fault.over = time.monotonic()
            else:
                fault.died = time.monotonic()
        finally:
            victim.send(signal.SIGCONT)
            self._release(plan, died=fault.died)

    def _release(self, plan: Plan, died: float | None = None) -> None:
        if plan.target in ("engine", "standby engine", "replica"):
            if died is not None:
                self._engine_died_at = time.monotonic()
            self._engines.release()

    async def _choose(self, plan: Plan) -> Victim | None:
        role = "engine" if plan.target == "standby engine" else plan.target
        serving = await self._serving_engine() if role == "engine" else 0
        found = [one for one in await asyncio.to_thread(self._census.take) if one.role == role and one.settled]
        if plan.target == "engine":
            found = [one for one in found if one.pid == serving]
        elif plan.target == "standby engine":
            found = [one for one in found if one.pid != serving] if serving else []
        return found[plan.number % len(found)] if found else None

    async def _serving_engine(self) -> int:
        """0 if nobody says."""
        for session in await self._sessions(1):
            return session["engine_pid"] or 0
        return 0

    async def _sessions(self, limit: int) -> list[dict[str, Any]]:
        answer = await ask(self._address, "GET", f"/v1/sessions?limit={limit}", timeout=5.0)
        return json.loads(answer.body)["data"] if answer.status == 200 else []

    # Clients, and what they may ask for.

    def _cut(self, plan: Plan, fault: Fault) -> int:
        self._history.faults.append(fault)
        running = sorted(self._talkers.open_streams, key=lambda stream: stream.attempt.began)
        chosen = random.Random(plan.number).sample(running, (len(running) + 1) // 2)
        for stream in chosen:
            stream.cut(plan.kind.removeprefix("cut "), "nemesis")
        if not chosen:
            fault.skipped = "no stream is open"
        return len(chosen)

    async def _recycle(self, plan: Plan, fault: Fault) -> None:
        sessions = await self._sessions(20)
        fault.at = time.monotonic()
        self._history.faults.append(fault)
        if not sessions:
            fault.skipped = "no session is there"
            return
        name = sessions[plan.number % len(sessions)]["id"]
        # Whether it can be done now (it may be in a turn, or deleted) is not what is looked at.
        await ask(self._address, "POST", f"/v1/sessions/{name}/recycle", timeout=5.0)

    async def _mass_disconnect(self, fault: Fault) -> int:
        """As many new conversations at once, all of which leave before they are served."""
        name = uuid.uuid4().hex[:8]
        streams = [Stream(Attempt(f"mass-{name}-{n}", "mass", 0, time.monotonic())) for n in range(MASS)]
        running = [
            asyncio.create_task(
                stream.run(
                    self._address,
                    {"messages": [{"role": "user", "content": "Count."}], "max_tokens": 200, "stream": True},
                    {"x-session-id": stream.attempt.session},
                    60.0,
                )
            )
            for stream in streams
        ]
        self._history.faults.append(fault)
        await asyncio.sleep(2.0)
        for number, stream in enumerate(streams):
            stream.cut("rst" if number % 2 else "fin", "nemesis")
        await asyncio.wait(running, timeout=10.0)
        for task in running:
            task.cancel()
        cut = [stream for stream in streams if stream.attempt.cut_by]
        errors = sorted({stream.attempt.why for stream in streams if stream.attempt.ending == "refused"})
        fault.note = "" if len(cut) == MASS else f"{MASS - len(cut)} were over before: {errors[:2]}"
        if not cut:
            fault.skipped = fault.note
        self._in_background(self._forget([stream.attempt.session for stream in streams]))
        return len(cut)

    async def _forget(self, sessions: list[str]) -> None:
        """Deletes sessions that may exist or not. Some are in their last step, and some not begun yet."""
        for _ in range(20):
            await asyncio.sleep(1.0)
            left: list[str] = []
            for start in range(0, len(sessions), 10):
                some = sessions[start : start + 10]
                answers = await asyncio.gather(
                    *(ask(self._address, "DELETE", f"/v1/sessions/{name}", timeout=40.0) for name in some)
                )
                left += [
                    name
                    for name, answer in zip(some, answers, strict=True)
                    if answer.status != 404 or not answer.is_ours
                ]
            if not left:
                return
            sessions = left
