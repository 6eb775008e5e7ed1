"""A client that holds one conversation, as OpenAI's clients do: it sends the whole history with every turn.

Owns: what a client does when its connection breaks (it reads on where it was, or asks again), and what it goes on with
after it left. Knows nothing of faults and of what ought to come, but for the text at which its script has it leave.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.history import Attempt, Expected, History
from tests.chaos.scripts import Script, Turn
from tests.chaos.streams import Address, Answer, Stream, ask

# What a client may be told when another one has asked for the same turn of the same session.
OVERTAKEN = ("reply_gone", "stale_epoch")


@dataclass(frozen=True)
class Patience:
    """In seconds. `attempt`: for a response's end; `repairs`: while nothing can be reached or connections break."""

    attempt: float = 90.0
    repairs: float = 60.0
    again: float = 0.25


@dataclass
class Conversation:
    """Where a conversation is. `acknowledged` are the turns whose end its client has seen; `said` all that it knows of
    it, in order. `failed`: a turn did not end as it ought to, and the rest makes no sense."""

    session: str | None
    script: Script
    messages: list[dict[str, str]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    turn: int = 0
    acknowledged: list[int] = field(default_factory=list)
    failed: bool = False

    @property
    def over(self) -> bool:
        return self.failed or self.turn == len(self.script.turns)

    def leave_early(self, expected: Expected) -> None:
        """The last reply is what a client has of it that leaves where the script says, if it says so."""
        cut = cut_text(self.script.turns[expected.turn], expected)
        if cut is not None:
            self.messages[-1] = {"role": "assistant", "content": cut}

    @property
    def headers(self) -> dict[str, str]:
        named = {} if self.session is None else {"x-session-id": self.session}
        return named if self.script.key is None else named | {"authorization": f"Bearer {self.script.key}"}


class Talkers:
    """All clients of a run. `open_streams` are the attempts that are being read."""

    def __init__(self, address: Address, history: History, patience: Patience | None = None):
        self._address = address
        self._history = history
        self._patience = patience or Patience()
        self._expected: dict[tuple[str, int], Expected] = {}
        self.open_streams: set[Stream] = set()

    def expect(self, expected: list[Expected]) -> None:
        """From now on scripted cuts happen: where they are to happen is known by the text."""
        self._expected = {(one.script, one.turn): one for one in expected}

    def last_of(self, talk: Conversation, turn: int) -> Attempt:
        """The latest attempt at one of its turns."""
        return next(a for a in reversed(self._history.attempts) if (a.session, a.turn) == (talk.session, turn))

    async def say_next(self, talk: Conversation) -> None:
        """The conversation's next turn, to whatever end it comes."""
        turn = talk.script.turns[talk.turn]
        talk.messages.append({"role": "user", "content": turn.content})
        talk.said.append(turn.content)
        expected = self._expected.get((talk.script.name, talk.turn))
        cut = None if expected is None else cut_text(turn, expected)
        lanes = 2 if turn.twice and expected is not None else 1
        ends = await asyncio.gather(*(self._turn(talk, turn, lane, cut) for lane in range(lanes)))
        if not all(ends):
            talk.failed = True
            return
        reply = cut if cut is not None else ends[0]
        assert reply is not None
        if cut is None:
            talk.acknowledged.append(talk.turn)
        talk.messages.append({"role": "assistant", "content": reply})
        talk.said.append(reply)
        talk.turn += 1

    async def forget(self, talk: Conversation) -> list[Answer]:
        """Deletes its session; patient, as with a turn. All answers, the last of which counts."""
        deadline = time.monotonic() + self._patience.repairs
        answers = []
        while True:
            answer = await ask(self._address, "DELETE", f"/v1/sessions/{talk.session}", talk.headers)
            answers.append(answer)
            if (answer.status in (200, 404) and answer.is_ours) or time.monotonic() > deadline:
                return answers
            await asyncio.sleep(self._patience.again)

    async def _turn(self, talk: Conversation, turn: Turn, lane: int, cut: str | None) -> str | None:
        """The reply, or what was seen of it at `cut`; None if the turn failed."""
        body = self._body(talk, turn)
        seen = Seen()
        broken_since: float | None = None
        while True:
            attempt = Attempt(
                talk.session or "",
                talk.script.name,
                talk.turn,
                time.monotonic(),
                lane=lane,
                resumed=seen.request_id,
                resume_from=seen.position,
            )
            seen.begin(attempt)
            await self._read(attempt, body, talk.headers | seen.headers, _leave_at(seen.text, cut, turn.cut_how))
            seen.add(attempt)
            if attempt.ending == "done":
                return seen.text
            if attempt.cut_by == "script":
                return cut
            if turn.twice and attempt.error_code in OVERTAKEN:
                # The other one, who asks for the same, has put its reply in the place of this one.
                seen = Seen()
            elif not _may_ask_again(attempt):
                return None
            now = time.monotonic()
            if attempt.events or broken_since is None:
                broken_since = now
            if now - broken_since > self._patience.repairs:
                return None
            await asyncio.sleep(self._patience.again)

    async def _read(
        self, attempt: Attempt, body: dict[str, Any], headers: dict[str, str], on_text: Callable[[Stream], None] | None
    ) -> None:
        stream = Stream(attempt, on_text)
        self._history.attempts.append(attempt)
        self.open_streams.add(stream)
        try:
            await stream.run(self._address, body, headers, self._patience.attempt)
        finally:
            self.open_streams.discard(stream)

    def _body(self, talk: Conversation, turn: Turn) -> dict[str, Any]:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        return {"messages": list(talk.messages), **turn.fields, **options}


class Seen:
    """What a client has seen of a reply, over all its attempts at it."""

    def __init__(self) -> None:
        self.text = ""
        self.position: int | None = None
        self.event_id: str | None = None
        self.request_id: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        if self.request_id is None:
            return {}
        return {"x-request-id": self.request_id, "x-resume-from": str(self.event_id)}

    def begin(self, attempt: Attempt) -> None:
        if attempt.resumed is None:
            self.text = ""

    def add(self, attempt: Attempt) -> None:
        self.text += attempt.text
        told = [event for event in attempt.events if event.position is not None]
        if told:
            # Read on under the first response's id.
            self.request_id = self.request_id or attempt.request_id
            self.position, self.event_id = told[-1].position, told[-1].event_id


def cut_text(turn: Turn, expected: Expected) -> str | None:
    """What a client has seen that leaves after `turn.cut_at` tokens; None if it does not leave."""
    if turn.cut_at is None:
        return None
    # Some tokens bring no text of their own: the last position before.
    position = max((p for p in expected.prefixes if abs(p) <= turn.cut_at), key=abs, default=0)
    seen = expected.prefixes.get(position, "")
    # Whether a reply that begins with a space is encoded as it was generated depends on what is stored before it.
    return seen if seen[:1].isalnum() and len(seen) < len(expected.text) else None


def _leave_at(before: str, cut: str | None, how: str) -> Callable[[Stream], None] | None:
    if cut is None:
        return None
    length = len(cut)

    def look(stream: Stream) -> None:
        if len(before + stream.attempt.text) >= length:
            stream.cut(how, "script")

    return look


def _may_ask_again(attempt: Attempt) -> bool:
    """The way to the server broke, or was not there: whatever else went wrong is an answer."""
    if attempt.ending in ("broken", "cut"):
        return True
    # A proxy that finds nobody behind it has answers of its own.
    return attempt.ending == "refused" and (not attempt.errors or attempt.status == 503)
