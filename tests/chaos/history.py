"""What happened in a run: every request as its client saw it, every fault, and what was looked at beside them.

Owns: these records, and writing and reading them as JSON lines. Knows nothing of how they come about and of what they
ought to be. All moments are seconds of one monotonic clock.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# How an attempt may end: `done` ([DONE] came), `error` (an error event, then [DONE]), `refused` (another status than
# 200, or no connection), `broken` (the connection ended before the response did), `cut` (by this client), `late`.
ENDINGS = ("open", "done", "error", "refused", "broken", "cut", "late")


@dataclass
class Event:
    """A piece of a reply's text; `position` counts the reply's tokens up to its end, if the server says."""

    at: float
    text: str
    position: int | None = None
    # All of the id line, by which a client reads on.
    event_id: str | None = None


@dataclass
class Attempt:
    """One HTTP request for a turn. A turn whose connection breaks takes several; `lane` tells two clients apart that
    ask for the same turn at once. `resumed` is the request id that it reads on, from position `resume_from`."""

    session: str
    script: str
    turn: int
    began: float
    lane: int = 0
    resumed: str | None = None
    resume_from: int | None = None
    ended: float = 0.0
    ending: str = "open"
    cut_by: str | None = None
    status: int | None = None
    request_id: str | None = None
    events: list[Event] = field(default_factory=list)
    # Closing chunks, error events, [DONE]s, and data behind [DONE].
    closings: int = 0
    errors: list[dict[str, Any]] = field(default_factory=list)
    dones: int = 0
    strays: int = 0
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    # Why it was refused or broken, in the words of whoever noticed.
    why: str = ""

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)

    @property
    def error_code(self) -> str | None:
        return self.errors[0].get("code") if self.errors else None


@dataclass
class Fault:
    """What the nemesis did. `over` is when it undid it (a stopped process goes on), `died` when the process was gone.
    `skipped` says why nothing was done, `note` what else there is to say."""

    at: float
    kind: str
    target: str
    pid: int = 0
    over: float | None = None
    died: float | None = None
    count: int = 1
    skipped: str = ""
    note: str = ""


@dataclass
class Death:
    """A process of the server that was there at one look and not at the next."""

    at: float
    role: str
    pid: int


@dataclass
class Ready:
    """An answer of /ready: its status, 0 for none."""

    at: float
    status: int


@dataclass
class JournalRow:
    """A committed turn as the journal has it."""

    epoch: int
    request_id: str
    num_kept_tokens: int
    num_kept_chars: int
    num_new_tokens: int
    text: str
    num_completion_tokens: int
    finish_reason: str


@dataclass
class JournalCopy:
    """A session's journal when it was looked at. `turns` of its script were acknowledged by then; `said` is what the
    client knows of the conversation, in order."""

    at: float
    session: str
    script: str
    epoch: int
    rows: list[JournalRow]
    said: list[str]
    acknowledged: list[int]
    after_kill: bool = False
    error: str = ""


@dataclass
class Expected:
    """What an undisturbed run of a turn brought. `prefixes` are the reply's text at each position that was told."""

    script: str
    turn: int
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    canary: str
    prefixes: dict[int, str] = field(default_factory=dict)


@dataclass
class Note:
    """What a part of the run found by itself: a leak, a session that could not be deleted."""

    at: float
    promise: str
    what: str


@dataclass
class History:
    """All of it. `sees_positions`: the server tells positions, so clients read on."""

    began: float = 0.0
    ended: float = 0.0
    sees_positions: bool = False
    attempts: list[Attempt] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    deaths: list[Death] = field(default_factory=list)
    ready: list[Ready] = field(default_factory=list)
    journals: list[JournalCopy] = field(default_factory=list)
    expected: list[Expected] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def write(self, path: Path) -> None:
        with path.open("w") as file:
            head = {"began": self.began, "ended": self.ended, "sees_positions": self.sees_positions}
            file.write(json.dumps({"record": "run", **head}) + "\n")
            for name, kind in _KINDS.items():
                for record in getattr(self, name):
                    file.write(json.dumps({"record": kind.__name__, **asdict(record)}) + "\n")

    @classmethod
    def read(cls, path: Path) -> History:
        history = cls()
        lists = {kind.__name__: (kind, getattr(history, name)) for name, kind in _KINDS.items()}
        for line in path.read_text().splitlines():
            fields = json.loads(line)
            what = fields.pop("record")
            if what == "run":
                for name, value in fields.items():
                    setattr(history, name, value)
                continue
            if what == "Attempt":
                fields["events"] = [Event(**event) for event in fields["events"]]
            elif what == "JournalCopy":
                fields["rows"] = [JournalRow(**row) for row in fields["rows"]]
            elif what == "Expected":
                fields["prefixes"] = {int(position): text for position, text in fields["prefixes"].items()}
            kind, records = lists[what]
            records.append(kind(**fields))
        return history


_KINDS: dict[str, type[Any]] = {
    "attempts": Attempt,
    "faults": Fault,
    "deaths": Death,
    "ready": Ready,
    "journals": JournalCopy,
    "expected": Expected,
    "notes": Note,
}
