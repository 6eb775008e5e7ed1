"""What the memory of responses and conversations does, whatever it is made of.

Owns: the protocols of both stores and of the sessions behind them, what a response begins with, and how one that is
being made is owned. Knows nothing of SQLite, of turns and of HTTP.

A response that is not over belongs to the process that makes it, under a claim; whoever takes it over from a dead
process makes a claim of its own, and the former one is worth nothing any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

from phi_cluster.cluster.errors import SessionBusy
from phi_cluster.cluster.messages import ProcessId
from phi_cluster.cluster.response_api import Conversation, Item, ItemPage, NewResponse, Page, Response
from phi_cluster.cluster.turn_api import ReplyPiece

# What becomes of a piece of work in the store's eyes: it goes on, somebody wants it ended, or it is another's by now.
Verdict: TypeAlias = Literal["goes on", "to be cancelled", "lost"]


class StillRunning(SessionBusy):
    """What a response is to follow is not over yet."""

    code = "conversation_locked"


@dataclass(frozen=True)
class Branch:
    """A new session begins like another one: with its first `num_turns` turns."""

    session_id: str
    num_turns: int


@dataclass(frozen=True)
class Begun:
    """A response of which `response` is there so far. `context` is what was said before, oldest first; `branch` is
    given if its session is a new one that begins like another."""

    response: Response
    session_id: str
    claim: str
    context: list[Item] = field(repr=False)
    branch: Branch | None = None


@dataclass(frozen=True)
class Progress:
    """More of a response's pieces, from the one numbered `first` on. `has_started`: it is not queued any more."""

    tenant: str
    response_id: str
    claim: str
    has_started: bool
    first: int
    pieces: tuple[ReplyPiece, ...] = field(repr=False)


@dataclass(frozen=True)
class Unfinished:
    tenant: str
    response_id: str
    owner: ProcessId
    claim: str


class ResponseStore(Protocol):
    """All methods block and are called by one thread. They raise `NotFound` for what the tenant does not have, and the
    errors of session/journal.py for what the disk does."""

    def begin(self, new: NewResponse, now: float, owner: ProcessId, claim: str) -> Begun:
        """Raises StillRunning."""
        ...

    def save(self, progress: Sequence[Progress]) -> list[Verdict]:
        """Keeps all of it at once."""
        ...

    def end(self, response: Response, claim: str) -> bool:
        """The response is over; in a conversation, what was said becomes a part of it. False: it is another's by
        now."""
        ...

    def drop(self, tenant: str, response_id: str, claim: str) -> None:
        """Nothing came of it."""
        ...

    def find(self, tenant: str, response_id: str, after: int = 0) -> Response:
        """With its pieces from the one numbered `after` on, without its input."""
        ...

    def wish_cancelled(self, tenant: str, response_id: str) -> None: ...

    def unfinished(self) -> list[Unfinished]: ...

    def take(self, unfinished: Unfinished, owner: ProcessId, claim: str) -> Begun | None:
        """None: another was quicker, or it is over."""
        ...

    def delete(self, tenant: str, response_id: str) -> None: ...

    def expire(self, before: float) -> bool:
        """Deletes what was made before, and what no response made since goes on from: a part of it at a time. True:
        there may be more."""
        ...

    def input_items(self, tenant: str, response_id: str, page: Page) -> ItemPage: ...

    def doomed_sessions(self) -> list[tuple[str, str]]:
        """Tenants and names of sessions that hold what was deleted."""
        ...

    def spare(self, tenant: str, session_id: str) -> None:
        """The session is gone."""
        ...

    def clean(self) -> None:
        """Leaves no byte of what was deleted in the file and its log, if something was."""
        ...


class ConversationStore(Protocol):
    """As ResponseStore."""

    def create(self, tenant: str, conversation: Conversation, items: Sequence[Item]) -> None: ...

    def find(self, tenant: str, conversation_id: str) -> Conversation: ...

    def update(self, tenant: str, conversation_id: str, metadata: dict[str, str], now: float) -> Conversation: ...

    def delete(self, tenant: str, conversation_id: str) -> None: ...

    def add_items(self, tenant: str, conversation_id: str, items: Sequence[Item], now: float) -> None: ...

    def items(self, tenant: str, conversation_id: str, page: Page) -> ItemPage: ...

    def item(self, tenant: str, conversation_id: str, item_id: str) -> Item: ...

    def delete_item(self, tenant: str, conversation_id: str, item_id: str) -> Conversation: ...


class SessionKeeping(Protocol):
    """What is asked of sessions besides turns."""

    async def delete(self, tenant: str, session_id: str) -> None:
        """Raises NotFound, SessionBusy."""
        ...

    async def branch(self, tenant: str, origin: Branch, session_id: str) -> None:
        """A new session is about to have its first turn, and will begin with `origin`'s: it gets a copy of their
        memory. Raises PhiError where that cannot be had; it is computed then."""
        ...
