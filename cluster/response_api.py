"""What the HTTP edge asks about responses and conversations, as shapes and protocols.

Owns: a response as it is asked for, as it stands and as it is read, and the protocols of whoever makes responses and
keeps conversations. A leaf: the edge calls these, the room `responses` implements them. Knows nothing of HTTP, of
OpenAI's JSON (but that of items), of SQLite and of how a turn runs.

An item is a JSON-able dict as OpenAI's. Messages have `type` ("message"), `id`, `role` (user, assistant, system or
developer), `status`, and `content`, a list of parts with `type` (`input_text`, of an assistant `output_text`) and
`text`. Calls ("function_call") have `call_id`, `name` and `arguments` (JSON text), what came of them
("function_call_output") `call_id` and `output` (text).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from phi_cluster.cluster.errors import PhiError
from phi_cluster.cluster.response_items import Item, output_items
from phi_cluster.cluster.turn_api import Rates, ReplyPiece, ToolUse, WantedFormat

# What stands, and what is still to come.
ResponseStatus: TypeAlias = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
OPEN = ("queued", "in_progress")


@dataclass(frozen=True)
class NewResponse:
    """A response that is asked for. `request_id` is the request's, 32 hex digits; the response is named by it.

    `settings` are what the response will be described by (OpenAI's fields, JSON-able); `sampling`, `stop`,
    `wanted_format`, `tool_use` and `truncate` are as in `TurnRequest`. `input` has items with ids, and perhaps
    references to items that are kept, with `type` ("item_reference") and `id` only. At most one of
    `previous_response_id` and `conversation_id` is given. `store` False: nothing of it is kept; then it is not in the
    background.
    """

    tenant: str
    request_id: str
    input: list[Item] = field(repr=False)
    settings: dict[str, Any] = field(repr=False)
    sampling: dict[str, Any] = field(repr=False)
    stop: tuple[str, ...] = field(default=(), repr=False)
    wanted_format: WantedFormat | None = None
    tool_use: ToolUse | None = None
    truncate: bool = False
    background: bool = False
    store: bool = True
    previous_response_id: str | None = None
    conversation_id: str | None = None
    # As in `TurnRequest`; for whoever makes it first, and not kept.
    traceparent: str | None = None

    @property
    def id(self) -> str:
        return f"resp_{self.request_id}"


@dataclass(frozen=True)
class ResponseUsage:
    """Counts of tokens."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int


@dataclass(frozen=True)
class ResponseFault:
    """Why a response failed. `kind` is one of OpenAI's codes of a response's errors."""

    kind: str
    message: str


@dataclass(frozen=True)
class Response:
    """A response as it stands. `pieces` are its reply, as `TextDelta.pieces`; times are wall clock in seconds.

    `usage` is known once it is over; `fault` says why it failed.
    """

    asked: NewResponse
    created_at: float
    status: ResponseStatus
    pieces: tuple[ReplyPiece, ...] = field(default=(), repr=False)
    usage: ResponseUsage | None = None
    fault: ResponseFault | None = None
    ended_at: float | None = None

    @property
    def id(self) -> str:
        return self.asked.id

    @property
    def is_over(self) -> bool:
        return self.status not in OPEN

    def output(self, *, with_logprobs: bool = True) -> list[Item]:
        """The assistant's message and calls: of a response that failed, or was cancelled, if it said a word.
        `with_logprobs`: as far as the response was asked for them."""
        if not self.is_over or (not self.pieces and self.status in ("failed", "cancelled")):
            return []
        status = "completed" if self.status == "completed" else "incomplete"
        return output_items(self.asked.request_id, self.pieces, status, with_logprobs=with_logprobs)


# What comes while a response is read: more of its pieces, and at last how it stands when it is over.
ReadingEvent: TypeAlias = "tuple[ReplyPiece, ...] | Response"


class Reading(Protocol):
    """A response that somebody reads."""

    @property
    def response(self) -> Response:
        """As it stood when the reading began."""
        ...

    @property
    def error(self) -> PhiError | None:
        """What made it fail, if that happened while it was read here."""
        ...

    @property
    def rates(self) -> Rates | None:
        """What its key may still use, as of its start; None if that was elsewhere, or nothing is limited."""
        ...

    def events(self) -> AsyncGenerator[ReadingEvent, None]:
        """All pieces from the first one on, then the response once it is over. Raises PhiError, also `NotFound` if it
        is deleted meanwhile."""
        ...

    def leave(self) -> None:
        """Nobody reads on. A response in the foreground ends with that if it was created with this reading."""
        ...


@dataclass(frozen=True)
class Page:
    """What part of a list is asked for: at most `limit` behind the one named `after`."""

    limit: int = 20
    after: str | None = None
    ascending: bool = False


@dataclass(frozen=True)
class ItemPage:
    items: list[Item] = field(repr=False)
    has_more: bool


class Responses(Protocol):
    """Makes and keeps a tenant's responses. All raise `NotFound` for what is not this tenant's, or not there."""

    async def create(self, new: NewResponse) -> Reading:
        """Returns once its turn has started, or, in the background, once it is stored. Raises PhiError; then nothing is
        left of it."""
        ...

    async def get(self, tenant: str, response_id: str) -> Response: ...

    async def read(self, tenant: str, response_id: str) -> Reading: ...

    async def cancel(self, tenant: str, response_id: str) -> Response:
        """Ends it, if it is not over. Raises `InvalidRequest` if it is not in the background."""
        ...

    async def delete(self, tenant: str, response_id: str) -> None:
        """Leaves no byte of it, also where later responses go on from it: those go on without it."""
        ...

    async def input_items(self, tenant: str, response_id: str, page: Page) -> ItemPage: ...


@dataclass(frozen=True)
class Conversation:
    """`created_at` is wall clock in seconds."""

    id: str
    created_at: float
    metadata: dict[str, str] = field(repr=False)


class Conversations(Protocol):
    """Keeps a tenant's conversations. All raise `NotFound` for what is not this tenant's, or not there."""

    async def create(self, tenant: str, items: list[Item], metadata: dict[str, str]) -> Conversation: ...

    async def get(self, tenant: str, conversation_id: str) -> Conversation: ...

    async def update(self, tenant: str, conversation_id: str, metadata: dict[str, str]) -> Conversation: ...

    async def delete(self, tenant: str, conversation_id: str) -> None:
        """With its items and its session."""
        ...

    async def add_items(self, tenant: str, conversation_id: str, items: list[Item]) -> None: ...

    async def items(self, tenant: str, conversation_id: str, page: Page) -> ItemPage: ...

    async def item(self, tenant: str, conversation_id: str, item_id: str) -> Item: ...

    async def delete_item(self, tenant: str, conversation_id: str, item_id: str) -> Conversation: ...
