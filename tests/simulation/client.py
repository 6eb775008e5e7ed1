"""Clients: conversations that go on over whatever happens, and an administrator.

Owns: what is asked, and the checks of what comes back. Knows nothing of how the cluster is built.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Any

from phi_cluster.cluster.errors import Overloaded, PhiError
from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.session.recycler import RecycleReason
from phi_cluster.cluster.session_api import SessionQuery
from phi_cluster.cluster.turn_api import TextDelta, TurnFinished, TurnRequest, TurnStarted
from tests.simulation import language
from tests.simulation.replica import Connection, Left, Reset
from tests.simulation.watch import Asked

if TYPE_CHECKING:
    from tests.simulation.world import World

# Waiting for a turn, for memory, for an engine, and the directory's patience with a keeper.
REQUEST_SECONDS = 100.0


class Conversation:
    """One client with its own alphabet. `shares`: others write into its session as well."""

    def __init__(self, world: World, rng: Random, owner: int, tenant: str, session_id: str | None, shares: bool):
        self._world = world
        self._rng = rng
        self._owner = owner
        self._shares = shares
        self.key = SessionKey(tenant, session_id or "", ephemeral=session_id is None)
        self._messages: list[dict[str, str]] = []
        # After how many messages the conversation's ids are known, and these.
        self._marks: list[tuple[int, list[int]]] = []
        self._resets = 0

    def fork(self, session_id: str, *, begins_anew: bool) -> Conversation:
        """Its client knows what this one knows now, or nothing."""
        fork = Conversation(self._world, self._rng, self._owner, self.key.tenant, session_id, self._shares)
        if not begins_anew:
            fork._messages = list(self._messages)
            # What a session held before it was cleared or deleted says nothing.
            fork._marks = [] if self._world.resets[self.key.digest] else list(self._marks)
        return fork

    async def run(self, num_turns: int) -> None:
        rng = self._rng
        for _ in range(num_turns):
            await asyncio.sleep(rng.choice((0.0, 0.0, 0.02, 0.1, 0.3, 1.5)))
            if self._messages and rng.random() < 0.1:
                del self._messages[-2:]
                self._marks = [mark for mark in self._marks if mark[0] <= len(self._messages)]
            await self.turn(leaves=rng.random() < self._world.faults.leave_rate)

    async def turn(self, *, leaves: bool = False) -> Asked:
        rng, world = self._rng, self._world
        text = "".join(rng.choices(language.alphabet(self._owner), k=rng.randint(1, 5)))
        messages = [*self._messages, {"role": "user", "content": text}]
        request = TurnRequest(
            tenant=self.key.tenant,
            session_id=None if self.key.ephemeral else self.key.session_id,
            request_id=f"r{len(world.watch.asked)}",
            sampling={
                "seed": rng.randrange(1 << 40),
                "max_tokens": rng.choice((2, 6, 14)),
                "ignore_eos": False,
                "stop_token_ids": (),
                "logit_bias": {},
            },
            messages=messages,
        )
        asked = Asked(
            request.request_id,
            self._owner,
            self.key,
            language.Tokenizer().render_chat(messages),
            request.sampling["seed"],
            request.sampling["max_tokens"],
            world.loop.now,
            resets=world.resets[self.key.digest],
        )
        world.watch.asked[asked.request_id] = asked
        if asked.resets != self._resets:
            self._resets, self._marks = asked.resets, []
        if self._marks and not self._shares and not self.key.ephemeral:
            asked.begins = self._marks[-1][1]
        world.log("ask", asked.request_id, self.key.session_id or "-", "leaves" if leaves else "")
        said = await self._ask(request, asked, rng.random() * 0.4 if leaves else None)
        while asked.outcome in ("left", "reset") and rng.random() < 0.5:
            await asyncio.sleep(rng.choice((0.0, 0.02, 0.3, 1.5)))
            world.log("reads on", asked.request_id, asked.position)
            again = replace(request, resume_from=asked.position)
            said = await self._ask(again, asked, rng.random() * 0.4 if rng.random() < 0.3 else None, said)
        world.log("end", asked.request_id, asked.outcome)
        asked.ended, asked.resets_at_end = world.loop.now, world.resets[self.key.digest]
        if asked.outcome == "finished":
            self._messages = [*messages, {"role": "assistant", "content": said}]
            if asked.resets == asked.resets_at_end and asked.prompt_ids is not None:
                self._marks.append((len(self._messages), asked.prompt_ids + asked.reply))
        elif said and rng.random() < 0.4:
            # It takes what it has seen as the reply.
            self._messages = [*messages, {"role": "assistant", "content": said}]
        return asked

    async def _ask(self, request: TurnRequest, asked: Asked, patience: float | None, said: str = "") -> str:
        """The text that came, behind what it has `said` before. Exactly one end is an outcome."""
        asked.num_connections += 1
        world = self._world
        connection = Connection(world, self._rng.choice(world.replicas), request)
        loop = world.loop
        overdue = loop.at(
            loop.now + REQUEST_SECONDS, None, loop.fail, f"{asked.request_id}: no end within {REQUEST_SECONDS:g} s"
        )
        if patience is not None:
            loop.at(loop.now + patience, None, connection.events.put_nowait, Left())
        num_tokens, started = 0, False
        while True:
            event = await connection.events.get()
            if isinstance(event, TurnStarted):
                if started:
                    loop.fail(f"{asked.request_id}: it started twice")
                started = True
            elif isinstance(event, TextDelta):
                if event.text:
                    if event.position.count <= asked.position.count:
                        loop.fail(f"{asked.request_id}: position {event.position} comes again")
                    asked.position = event.position
                said += event.text
                num_tokens += event.num_tokens
            else:
                break
        overdue.cancel()
        if asked.prompt_ids is None:
            if said:
                loop.fail(f"{asked.request_id}: text that no engine computed")
        elif not asked.has_changed and not language.visible(asked.reply).startswith(said):
            loop.fail(f"{asked.request_id}: other text than the network's")
        if isinstance(event, TurnFinished):
            asked.outcome = "finished"
            reply = asked.reply
            if asked.num_connections > 1:
                # Of those that were there already it is not told.
                num_tokens = len(reply)
            whole = (language.visible(reply), len(reply), len(reply))
            if whole != (said, num_tokens, event.num_completion_tokens) and not asked.has_changed:
                loop.fail(f"{asked.request_id}: tokens are missing at the end")
        elif isinstance(event, Left):
            asked.outcome = "left"
            connection.leave()
        elif isinstance(event, Reset):
            asked.outcome = "reset"
        else:
            asked.outcome = "no room" if isinstance(event, Overloaded) else f"{type(event).__name__}: {event}"
            if not isinstance(event, PhiError):
                loop.fail(f"{asked.request_id}: an error that is no PhiError: {event!r}")
        if asked.is_other and asked.outcome == "finished":
            loop.fail(f"{asked.request_id}: another reply was passed off as the same")
        loop.start(None, self._expect_silence(connection, asked, asked.outcome))
        return said

    async def _expect_silence(self, connection: Connection, asked: Asked, outcome: str) -> None:
        event = await connection.events.get()
        if outcome != "left" and not isinstance(event, (Reset, Left)):
            self._world.loop.fail(f"{asked.request_id}: {event!r} after its end")


class Administrator:
    """Does things to sessions at any moment. Errors are answers, too."""

    def __init__(self, world: World, rng: Random, conversations: list[Conversation]):
        self._world = world
        self._rng = rng
        self._conversations = conversations
        self._forks: list[asyncio.Task[None]] = []

    async def run(self, num_deeds: int) -> None:
        for _ in range(num_deeds):
            await asyncio.sleep(self._rng.random() * 1.5)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._do(), REQUEST_SECONDS)
        await asyncio.gather(*self._forks)

    async def _do(self) -> None:
        rng, world = self._rng, self._world
        conversation = rng.choice(self._conversations)
        key = conversation.key
        deed = rng.choice(
            (
                "recycle",
                "recycle",
                "get",
                "list",
                "fork",
                "fork",
                "hibernate",
                "put_to_sleep",
                world.bold_deed,
                world.bold_deed,
            )
        )
        world.log("admin", deed, key.session_id)
        replica = rng.choice(world.replicas)
        reason = rng.choice((RecycleReason.REQUESTED, RecycleReason.IDLE, RecycleReason.MAX_AGE))
        if deed in ("clear", "delete"):
            world.resets[key.digest] += 1
        turn = rng.choice((None, None, 1))
        fork = conversation.fork(f"{key.session_id}-{world.loop.num_callbacks}", begins_anew=turn is not None)
        done = world.loop.create_future()
        replica.process.at_death.append(lambda: done.done() or done.set_result(None))

        async def ask() -> None:
            """In the replica."""
            answer: Any = None
            try:
                if deed == "list":
                    answer = await replica.directory.browse(SessionQuery(key.tenant, 10))
                elif deed == "fork":
                    answer = await replica.directory.fork(key.tenant, key.session_id, fork.key.session_id, turn)
                elif deed == "put_to_sleep":
                    answer = await replica.directory._calls.keeper("put_to_sleep", key)
                elif deed == "recycle":
                    answer = await replica.directory._calls.keeper("recycle", key, reason)
                else:
                    answer = await getattr(replica.directory, deed)(key.tenant, key.session_id)
            except PhiError as error:
                answer = error
            except Exception as error:
                answer = error
                if not isinstance(error, world.task_errors):
                    world.loop.fail(f"{deed}: {error!r}")
            world.log("admin", deed, "done", type(answer))
            if deed == "fork" and isinstance(answer, dict):
                self._forks.append(world.loop.start(None, fork.run(rng.choice((1, 2)))))
            world.loop.at(world.loop.now, None, lambda: done.done() or done.set_result(None))

        if replica.process.alive:
            world.loop.start(replica.process, ask())
            await done
        if deed in ("clear", "delete"):
            # It may also have happened just now.
            world.resets[key.digest] += 1
