"""What the HTTP edge asks of the rooms below it, as shapes and protocols.

Owns: the request for one turn, the events of its run, and the protocols of whoever runs turns, knows the server's
health and counts requests (sessions: session_api.py). A leaf (but for span.py): the edge calls these, `turn` and
`replica` implement them, tests fake them. Knows nothing of HTTP, Ray, torch, the tokenizer or the engine.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from phi_cluster.cluster.span import UNTRACED, Span

FinishReason: TypeAlias = Literal["stop", "length", "tool_calls"]
# How a request ended, for counting: as its turn did, or the client left, or it failed.
Outcome: TypeAlias = Literal["stop", "length", "tool_calls", "abort", "error"]
Endpoint: TypeAlias = Literal["chat", "completions", "responses"]
# What a key may still use, by what is counted ("requests", "tokens"): the limit a minute, what is left of it, and the
# seconds until all of it is there again.
Rates: TypeAlias = dict[str, tuple[int, int, float]]


@dataclass(frozen=True)
class Position:
    """A place in a reply: `count` tokens of it are said there (what is held back until the end stands one further);
    `checksum` is the CRC-32 of all ids up to there, the prompt's included, as int32. So a reply that is computed again
    is known to be the same."""

    count: int
    checksum: int

    def __str__(self) -> str:
        return f"{self.count}-{self.checksum:08x}"


BEGINNING = Position(0, 0)


@dataclass(frozen=True)
class WantedFormat:
    """What a reply has to look like, and the field that said so. `value` is a JSON schema (dict), a regular expression,
    a grammar (str) or a list of choices, by `kind`; None for any JSON object."""

    param: str
    kind: Literal["json_schema", "json_object", "regex", "choice", "grammar"]
    value: Any = field(default=None, repr=False)


@dataclass(frozen=True)
class Tool:
    """A function that a reply may ask its client to call. `parameters` is the JSON schema of its arguments (None: there
    are none); `param` is the field that has it."""

    name: str
    param: str
    parameters: dict[str, Any] | None = field(default=None, repr=False)
    description: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class ToolUse:
    """The tools that a prompt tells of, which of them (by name) the reply may call, whether it has to call one, and
    whether it may make several calls."""

    tools: tuple[Tool, ...]
    callable: tuple[str, ...]
    is_required: bool = False
    is_parallel: bool = True


class CallPiece(NamedTuple):
    """A part of a call, `number` in its reply (from 0): with its `name` it begins, then come `arguments` (JSON text, in
    pieces)."""

    number: int
    name: str | None
    arguments: str


def call_id(request_id: str, number: int) -> str:
    """What a call is answered under: at most 40 characters, as OpenAI's. The same whenever the reply is made."""
    return f"call_{request_id}{number:02x}"


@dataclass(frozen=True)
class TurnRequest:
    """One turn, validated as far as that is possible without a tokenizer.

    Exactly one of `messages` and `prompt` is given. `messages` have a `role` (system, user or assistant), a
    `content` (str) and perhaps a `name`: content parts are joined and `developer` has become `system`. An assistant's
    may have `tool_calls`, a list of dicts with `id`, `name` and `arguments` (JSON text); a `tool`'s have the
    `tool_call_id` of one of the calls before them. `prompt` is text or token ids, every id below the vocabulary's size.

    `sampling` always has these keys, each within its documented range: temperature, top_p, top_k (0 is off),
    min_p, repetition_penalty, presence_penalty, frequency_penalty, seed (int | None: choose one; signed, 64
    bits), max_tokens (int | None: as many as the context has room for; at most max_model_len), min_tokens,
    ignore_eos, logit_bias (dict[int, float]) and stop_token_ids (tuple[int, ...]); ids are below the
    vocabulary's size. `logprobs` (how many of the likeliest tokens to tell) may be there; None means the same as its
    absence.

    `echo`: the prompt (no messages) is told too, with its tokens' log probabilities if those are asked for, and
    `max_tokens` may be 0. Not with `resume_from`.

    `tenant` is derived from the client's key; two tenants share nothing. `session_id` None: an unnamed
    session. `request_id` is ours, never the client's: also with `resume_from`, which means that this request came
    before, was interrupted, and is to be read on behind that position of its reply (see `TextDelta.position`).

    `num_choices`: so many replies, each by a seed of its own, of which the first is the turn, and just what it would be
    alone; the others leave nothing in the session. Not with `resume_from` and `truncate`.

    `truncate`: where the messages do not fit, the oldest turns are left out instead of refusing the request.
    """

    tenant: str
    session_id: str | None
    request_id: str
    sampling: dict[str, Any] = field(repr=False)
    messages: list[dict[str, Any]] | None = field(default=None, repr=False)
    prompt: str | list[int] | None = field(default=None, repr=False)
    stop: tuple[str, ...] = field(default=(), repr=False)
    wanted_format: WantedFormat | None = None
    # With a JSON format beside them, a reply is either calls or text of that format.
    tool_use: ToolUse | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    resume_from: Position | None = None
    truncate: bool = False
    num_choices: int = 1
    echo: bool = False
    # Of an unnamed session: of two conversations that the request continues equally, the one that had this hint before
    # is meant.
    cache_hint: str | None = field(default=None, repr=False)
    # What the client sent as W3C `traceparent`; and where the turn's parts are measured.
    traceparent: str | None = None
    span: Span = field(default=UNTRACED, repr=False, compare=False)


class TokenChoice(NamedTuple):
    """A token, as the bytes of its text, and its log probability (natural logarithm)."""

    token: bytes
    logprob: float


class TokenLogprob(NamedTuple):
    """A token, and the likeliest in its place, in descending order. None: it is the prompt's first."""

    token: bytes
    logprob: float | None
    top: tuple[TokenChoice, ...]


class TextPiece(NamedTuple):
    """A part of a reply's text, with its tokens where their log probabilities were asked for: those that have no text
    are not told, and one that has only a part of a character is told with the piece that completes it."""

    text: str
    logprobs: tuple[TokenLogprob, ...]


ReplyPiece: TypeAlias = "str | TextPiece | CallPiece"


def piece_text(piece: ReplyPiece) -> str:
    """What of the piece is text; empty for a call's."""
    if isinstance(piece, CallPiece):
        return ""
    return piece if isinstance(piece, str) else piece.text


@dataclass(frozen=True)
class TurnStarted:
    """The first event, once: the turn is admitted and its prompt is known to fit. `echo`: the prompt, if it was asked
    for; `echo_logprobs`: of all its tokens. `choice`: the first that it is the prompt of, where there are several."""

    num_prompt_tokens: int
    num_cached_tokens: int
    # Where keys have limits.
    rates: Rates | None = None
    echo: str | None = field(default=None, repr=False)
    echo_logprobs: tuple[TokenLogprob, ...] = field(default=(), repr=False)
    choice: int = 0


@dataclass(frozen=True)
class TextDelta:
    """Text that is final, and how many new tokens this event stands for. `text` may be empty (held back). `choice`: in
    which of several replies.

    `position` is where in the reply the text ends. `logprobs`, if they were asked for, are the new tokens', without
    those that have no text. `pieces` are the parts of `text` and then of calls, none of them empty: the same reply has
    the same pieces, however its tokens come together in events (`TextPiece`s, if log probabilities were asked for).
    """

    text: str = field(repr=False)
    num_tokens: int
    position: Position
    pieces: tuple[ReplyPiece, ...] = field(default=(), repr=False)
    logprobs: tuple[TokenLogprob, ...] = field(default=(), repr=False)
    choice: int = 0

    @property
    def calls(self) -> tuple[CallPiece, ...]:
        """The parts of calls among the pieces."""
        return tuple(piece for piece in self.pieces if isinstance(piece, CallPiece))


@dataclass(frozen=True)
class ChoiceFinished:
    """One of several replies is over (of one alone, `TurnFinished` says it)."""

    choice: int
    finish_reason: FinishReason


@dataclass(frozen=True)
class TurnFinished:
    """The last event, once, after the turn has been committed. The counts are the turn's totals: the prompt counts once
    for several replies. `finish_reason` is the first one's."""

    finish_reason: FinishReason
    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int
    engine_replaced: bool = False


TurnEvent: TypeAlias = TurnStarted | TextDelta | ChoiceFinished | TurnFinished


class TurnRunner(Protocol):
    """Runs turns."""

    def run(self, request: TurnRequest) -> AsyncGenerator[TurnEvent, None]:
        """An async generator: `TurnStarted`, any number of `TextDelta`, `TurnFinished`; of several replies, the deltas
        come in any order, and each reply's are followed by a `ChoiceFinished`.

        Raises `PhiError`; before the first event it becomes the response's HTTP status, later an error event.
        A client that leaves is seen as `asyncio.CancelledError` at an await or as `GeneratorExit` at a yield
        (never both): a `finally` that aborts the sequence serves both. What may not be torn in the middle (a
        commit) wants `asyncio.shield`.
        """
        ...


class Tokens(Protocol):
    """The model's tokenizer, to look at."""

    async def of_prompt(self, request: TurnRequest, *, add_special_tokens: bool) -> list[int]:
        """The ids of the prompt of such a turn; `add_special_tokens`: with what the tokenizer puts around a text.
        Raises `InvalidRequest` if the template refuses it."""
        ...

    async def names(self, token_ids: Sequence[int]) -> list[str]:
        """Each token as the tokenizer's file writes it. Ids are of the vocabulary."""
        ...

    async def text(self, token_ids: Sequence[int]) -> str:
        """What the ids say, special tokens by their names."""
        ...


@dataclass(frozen=True)
class Identity:
    """Who is asking. `scopes` say what is allowed beyond the tenant's own conversations: "admin" all of it, "engines"
    looking after the engines."""

    tenant: str
    scopes: frozenset[str] = frozenset()

    def has(self, scope: str) -> bool:
        return scope in self.scopes or "admin" in self.scopes


class Keys(Protocol):
    """Knows the API keys."""

    def identify(self, key: str) -> Identity:
        """Takes as long for a wrong key as for a right one. Raises `Unauthorized`."""
        ...


class UsageBook(Protocol):
    """What the holders of keys have used. Raises `Unavailable`."""

    async def usage(self, tenant: str | None) -> Sequence[dict[str, Any]]:
        """One JSON-able dict a tenant, in order of their names; None: of all."""
        ...


class EngineAdmin(Protocol):
    """Looks after the engines of all replicas. Raises `Unavailable`."""

    async def recycle_engines(self) -> int:
        """Has them renewed, one after the other, between two steps; returns how many."""
        ...


class Health(Protocol):
    """Neither method may block: they answer from what is known already."""

    def live(self) -> bool:
        """False: this process should be replaced."""
        ...

    def ready(self) -> tuple[bool, str]:
        """Whether requests can be served now, and in one sentence why not (a user reads it)."""
        ...


class RequestObserver(Protocol):
    """Counts requests. Each `on_start` is followed by exactly one `on_finish`. All times are in seconds."""

    def on_start(self, endpoint: Endpoint) -> None: ...

    def on_first_token(self, endpoint: Endpoint, seconds: float) -> None:
        """`seconds` since `on_start`."""
        ...

    def on_token(self, endpoint: Endpoint, num_tokens: int, seconds: float) -> None:
        """Every later event with tokens: how many, and the time since the event with tokens before it."""
        ...

    def on_finish(
        self,
        endpoint: Endpoint,
        outcome: Outcome,
        seconds: float,
        num_prompt_tokens: int,
        num_cached_tokens: int,
        num_completion_tokens: int,
    ) -> None:
        """`seconds` since `on_start`. Counts are as far as known: zeros if the turn never started."""
        ...

    def on_error(self, status: int, code: str | None) -> None:
        """A request was refused or failed, with this HTTP status (also in mid-stream, where no status is sent any
        more) and code, whether it had been started or not."""
        ...


class Clock(Protocol):
    """The standard library's `time` module is one."""

    def time(self) -> float:
        """Wall clock, seconds since 1970."""
        ...

    def monotonic(self) -> float:
        """Seconds since some fixed moment; never goes back."""
        ...
