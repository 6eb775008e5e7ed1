"""One run: what undisturbed clients hear, then faults under load, then quiet, then the end of everything at once.

Owns: the order of these, and who talks when. Knows nothing of which faults there are and of what they may do.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tests.chaos.history import Expected, History, Note
from tests.chaos.journals import copy_journal, key_of
from tests.chaos.nemesis import Nemesis, Plan
from tests.chaos.resources import Alive, Resources, count, leaks
from tests.chaos.scripts import Script
from tests.chaos.streams import Address, ask
from tests.chaos.talker import Conversation, Patience, Talkers
from tests.chaos.victims import Census
from tests.chaos.watcher import Watcher

CONCURRENT = 6
QUIET_SECONDS = 30.0
_SETTLE_SECONDS = 30.0


class ServerLike(Protocol):
    """tests/conftest.py's Server, as far as it is needed here."""

    port: int
    state_dir: Path

    @property
    def runtime_dir(self) -> Path: ...


@dataclass
class Run:
    """A run against servers that follow each other on one state directory: `server` is the one of now."""

    server: ServerLike
    seed: int
    scripts: list[Script]
    log: Callable[[str], None]
    history: History = field(default_factory=History)
    # Conversations that go on with the next server.
    open: list[Conversation] = field(default_factory=list)
    patience: Patience = field(default_factory=Patience)
    _sessions: int = 0

    def __post_init__(self) -> None:
        self.history.began = time.monotonic()

    async def learn(self) -> None:
        """What an undisturbed run of each conversation brings."""
        scripts, begin = iter(self.scripts), time.monotonic()
        talkers = self._talkers(History())

        async def work() -> None:
            for script in scripts:
                talk = self._conversation(script)
                while not talk.over:
                    await self._learn_turn(talkers, talk)
                await talkers.forget(talk)

        await asyncio.gather(*(work() for _ in range(CONCURRENT)))
        self.history.sees_positions = all(p >= 0 for one in self.history.expected for p in one.prefixes)
        num_tokens = sum(one.completion_tokens for one in self.history.expected)
        positions = "" if self.history.sees_positions else ", the server tells no positions"
        self.log(
            f"learnt {len(self.history.expected)} turns, {num_tokens} tokens in "
            f"{time.monotonic() - begin:.1f} s{positions}"
        )

    async def disturb(self, schedule: Sequence[Plan]) -> None:
        """Faults under load, then quiet, and the count of what is left."""
        census = Census(self.server.runtime_dir)
        before = await self._settled(census)
        talkers = self._talkers(self.history)
        talkers.expect(self.history.expected)
        watching = asyncio.create_task(Watcher(self._address, census, self.history).run())
        stopping = asyncio.Event()
        working = [asyncio.create_task(self._work(n, talkers, stopping)) for n in range(CONCURRENT)]
        try:
            await Nemesis(self._address, census, talkers, self.history, self._log_at).carry_out(schedule)
            stopping.set()
            await asyncio.gather(*working)
            self._log_at("quiet")
            await asyncio.sleep(QUIET_SECONDS)
            self.history.ended = time.monotonic()
            await self._count_leaks(census, before)
        finally:
            for task in (watching, *working):
                task.cancel()
            await asyncio.wait([watching, *working])
        for task in (watching, *working):
            if not task.cancelled():
                task.result()

    def killed(self) -> None:
        """The server was killed, all of it: what is on the disk is what there is."""
        for talk in self.open:
            self.history.journals.append(copy_journal(self.server.state_dir, talk, after_kill=True))

    async def go_on(self) -> None:
        """What was left open goes on to its end with the server of now, which does what it did before it was killed."""
        talkers = self._talkers(self.history)
        talkers.expect(self.history.expected)
        talks, self.open = self.open, []
        await asyncio.gather(*(self._finish(talkers, talk) for talk in talks))
        self.history.ended = time.monotonic()

    # Inside.

    @property
    def _address(self) -> Address:
        return Address("127.0.0.1", self.server.port)

    def _log_at(self, text: str) -> None:
        self.log(f"{time.monotonic() - self.history.began:7.1f} s  {text}")

    def _talkers(self, history: History) -> Talkers:
        return Talkers(self._address, history, self.patience)

    def _conversation(self, script: Script) -> Conversation:
        self._sessions += 1
        return Conversation(f"chaos-{self.seed}-{self._sessions}-{script.name}", script)

    async def _learn_turn(self, talkers: Talkers, talk: Conversation) -> None:
        number = talk.turn
        await talkers.say_next(talk)
        attempt = talkers.last_of(talk, number)
        if talk.failed:
            raise AssertionError(
                f"undisturbed, {talk.session} turn {number}: {attempt.ending} {attempt.why} {attempt.errors}"
            )
        prefixes, text = {}, ""
        for index, event in enumerate(attempt.events):
            text += event.text
            # A server that tells no positions: pieces are counted instead, and marked as that.
            prefixes[event.position if event.position is not None else -(index + 1)] = text
        assert attempt.finish_reason is not None
        assert attempt.prompt_tokens is not None
        assert attempt.completion_tokens is not None
        expected = Expected(
            talk.script.name,
            number,
            text,
            attempt.finish_reason,
            attempt.prompt_tokens,
            attempt.completion_tokens,
            talk.script.canary,
            prefixes,
        )
        self.history.expected.append(expected)
        talk.leave_early(expected)

    async def _work(self, number: int, talkers: Talkers, stopping: asyncio.Event) -> None:
        """One client: conversations of its own, one after the other, until it is to stop; the last one stays open."""
        scripts = self.scripts[number::CONCURRENT]
        left = [talk for talk in self.open if talk.script in scripts]
        done = 0
        while not stopping.is_set():
            if left:
                talk = left.pop()
            else:
                talk = self._conversation(scripts[done % len(scripts)])
                done += 1
                self.open.append(talk)
            while not talk.over and not stopping.is_set():
                await talkers.say_next(talk)
            if talk.over and not stopping.is_set():
                self.open.remove(talk)
                await self._end(talkers, talk)

    async def _finish(self, talkers: Talkers, talk: Conversation) -> None:
        while not talk.over:
            await talkers.say_next(talk)
        await self._end(talkers, talk)

    async def _end(self, talkers: Talkers, talk: Conversation) -> None:
        self.history.journals.append(await asyncio.to_thread(copy_journal, self.server.state_dir, talk))
        answer = (await talkers.forget(talk))[-1]
        if answer.status not in (200, 404):
            why = f"{talk.session} cannot be deleted: {answer.status} {answer.body[:200]!r}"
            self.history.notes.append(Note(time.monotonic(), "C6", why))

    async def _settled(self, census: Census) -> Resources:
        """What the server holds when nothing happens."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        before: Resources | None = None
        while True:
            now = await asyncio.to_thread(count, census, self.server.runtime_dir, self.server.state_dir)
            if now == before or time.monotonic() > deadline:
                return now
            before = now
            await asyncio.sleep(3.0)

    async def _count_leaks(self, census: Census, before: Resources) -> None:
        alive = await self._alive()
        after = await asyncio.to_thread(count, census, self.server.runtime_dir, self.server.state_dir)
        for what, found in (("before", before), ("after", after)):
            self._log_at(f"{what}: {found.processes}, {found.segments} segments, descriptors {found.descriptors}")
        for leak in leaks(before, after, alive):
            self.history.notes.append(Note(time.monotonic(), "C6", f"{QUIET_SECONDS:g} s after quiet: {leak}"))

    async def _alive(self) -> Alive:
        """What the open conversations hold by right. Sessions that nobody knows are a leak."""
        alive = Alive()
        ours = {talk.session: talk for talk in self.open}
        keys = dict.fromkeys(script.key for script in self.scripts)
        for key in keys:
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            answer = await ask(self._address, "GET", "/v1/sessions?limit=1000", headers, timeout=30.0)
            found: list[dict[str, Any]] = []
            with contextlib.suppress(ValueError, KeyError):
                found = json.loads(answer.body)["data"]
            for session in found:
                talk = ours.get(session["id"])
                if talk is None:
                    why = f"{QUIET_SECONDS:g} s after quiet: session {session['id']} ({session['state']})"
                    self.history.notes.append(Note(time.monotonic(), "C6", why))
                    continue
                alive.journals.add(key_of(talk).digest)
                alive.caches += session["holder"] is not None
                alive.actors += session["holder"] == "actor"
        return alive
