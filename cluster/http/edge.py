"""What the edge is built from: its settings and the objects injected into it.

Owns: `EdgeSettings` and `Edge`. Knows nothing of routes and of what the injected objects do.
"""

from __future__ import annotations

from dataclasses import dataclass

from phi_cluster.cluster.response_api import Conversations, Responses
from phi_cluster.cluster.session_api import SessionAdmin
from phi_cluster.cluster.turn_api import (
    Clock,
    EngineAdmin,
    Health,
    RequestObserver,
    Tokens,
    TurnRunner,
    UsageBook,
)
from phi_cluster.cluster.watch_api import Watch


@dataclass(frozen=True)
class EdgeSettings:
    """What the edge must know about the model and about its own limits."""

    # The first is the name in responses, the others are aliases; at least one.
    served_model_names: tuple[str, ...]
    # Tokens, prompt and reply together.
    max_model_len: int
    # Token ids are 0 ... vocab_size - 1.
    vocab_size: int
    max_body_bytes: int = 8 * 2**20
    # Of a session that is imported with its KV cache, and so of one that is exported.
    max_import_bytes: int = 2 * 2**30
    # The most replies to one prompt.
    max_choices: int = 16
    # Seconds of silence after which a stream gets a comment line.
    keep_alive_seconds: float = 10.0
    # A request's body must have come within so many seconds, and a client must take what is sent to it within so many.
    body_seconds: float = 30.0
    write_seconds: float = 60.0
    # Headers that name a session, in lower case; whichever of them comes.
    session_headers: tuple[str, ...] = ("x-session-id",)
    # Origins of pages whose scripts may ask; "*" is any.
    cors_origins: tuple[str, ...] = ()
    # While no keys are set up: the names (of Host headers) under which this server answers; empty: any.
    allowed_hosts: tuple[str, ...] = ()
    # Names model, weights and build in responses (OpenAI's `system_fingerprint`).
    system_fingerprint: str | None = None

    def __post_init__(self) -> None:
        if not self.served_model_names or not all(self.served_model_names):
            raise ValueError("served_model_names: at least one name, none of them empty")
        for name in (
            "max_model_len",
            "vocab_size",
            "max_body_bytes",
            "max_import_bytes",
            "max_choices",
            "keep_alive_seconds",
            "body_seconds",
            "write_seconds",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: must be positive, not {getattr(self, name)}")


@dataclass(frozen=True)
class Edge:
    """Everything a route may use. Built once by `build_app`; there is no other state."""

    settings: EdgeSettings
    turns: TurnRunner
    tokens: Tokens
    responses: Responses
    conversations: Conversations
    sessions: SessionAdmin
    engines: EngineAdmin
    health: Health
    observer: RequestObserver
    watch: Watch
    clock: Clock
    # None while no keys are set up.
    usage: UsageBook | None = None
