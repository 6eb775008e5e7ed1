"""Every error that may reach a user, with its HTTP status and OpenAI-style type.

Owns: the error classes. Knows nothing of HTTP frameworks, Ray or torch: the edge turns these into responses,
the command line into one sentence. All of them pickle, because they cross process borders.
"""

from __future__ import annotations

from typing import Any


class PhiError(Exception):
    """An error with a message for its reader. `status` is the HTTP status it becomes at the edge.

    `told` is what a client reads instead of the message, where that is for whoever runs the server: it may name files,
    processes, or what another program said.
    """

    status = 500
    type = "server_error"
    code: str | None = None
    told: str | None = None

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after: float | None = None
    ):
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.param, self.code, self.retry_after)

    @property
    def message_told(self) -> str:
        """What a client reads."""
        return self.message if self.told is None else self.told

    def body(self) -> dict[str, Any]:
        """The OpenAI error object, `{"error": {message, type, param, code}}`."""
        return {"error": {"message": self.message_told, "type": self.type, "param": self.param, "code": self.code}}


def _rebuild(
    cls: type[PhiError], message: str, param: str | None, code: str | None, retry_after: float | None
) -> PhiError:
    return cls(message, param=param, code=code, retry_after=retry_after)


class InvalidRequest(PhiError):
    """The request is wrong; the message names the field and the remedy."""

    status = 400
    type = "invalid_request_error"


class Unauthorized(PhiError):
    """No API key, or none that is valid here."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class Forbidden(PhiError):
    """The caller is known, or does not matter, and may not do this."""

    status = 403
    type = "invalid_request_error"
    code = "missing_scope"


class ContextOverflow(InvalidRequest):
    """Prompt and requested completion do not fit into the model's context."""

    code = "context_length_exceeded"


class NotFound(PhiError):
    """No such model, session or route."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class SessionBusy(PhiError):
    """Another turn of the session is running and did not end within the time allowed for waiting."""

    status = 409
    type = "conflict_error"
    code = "session_busy"


class RequestTimeout(PhiError):
    """The request's body did not come within the time allowed."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class SessionExists(PhiError):
    """There is a session of this name already."""

    status = 409
    type = "conflict_error"
    code = "session_exists"


class BodyTooLarge(PhiError):
    """The request body is larger than the configured limit."""

    status = 413
    type = "invalid_request_error"
    code = "body_too_large"


class Overloaded(PhiError):
    """No room (KV memory, queue): try again after `retry_after` seconds."""

    status = 429
    type = "overloaded_error"
    code = "overloaded"


class GaveWay(Overloaded):
    """A turn that holds memory and wants more must let others go first: it gives all of it back and begins again."""


class KeeperMoved(PhiError):
    """Asked of a keeper that is not in charge (any more, or yet): nothing has happened, ask the other one."""

    status = 503
    type = "server_error"
    code = "keeper_moved"


class LimitReached(PhiError):
    """The key's own limit, not the server's: try again after `retry_after` seconds (None: waiting alone does not help).

    `rates` is what is left of the key's rates: see turn_api.Rates.
    """

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        rates: dict[str, tuple[int, int, float]] | None = None,
    ):
        super().__init__(message, param=param, code=code, retry_after=retry_after)
        self.rates = rates or {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_limit, (self.message, self.param, self.code, self.retry_after, self.rates)


def _rebuild_limit(
    message: str,
    param: str | None,
    code: str | None,
    retry_after: float | None,
    rates: dict[str, tuple[int, int, float]],
) -> LimitReached:
    return LimitReached(message, param=param, code=code, retry_after=retry_after, rates=rates)


class Unavailable(PhiError):
    """A part of the server is not up right now: try again after `retry_after` seconds."""

    status = 503
    type = "unavailable_error"
    code = "unavailable"


class ReplyGone(PhiError):
    """An interrupted reply cannot be read on: the conversation has gone on without it, or it cannot be had again."""

    status = 409
    type = "conflict_error"
    code = "reply_gone"


class ReadElsewhere(PhiError):
    """The reply is being read on by a later connection of the same request."""

    status = 409
    type = "conflict_error"
    code = "read_elsewhere"


class PoisonousRequest(PhiError):
    """Engines have died on this request: it is not tried again."""

    status = 422
    type = "invalid_request_error"
    code = "poisonous_request"


class StaleEpoch(PhiError):
    """A writer whose turn was taken over by a later one tried to commit (one writer per session)."""

    status = 409
    type = "conflict_error"
    code = "stale_epoch"


class StartError(PhiError):
    """The server cannot start; the message is one sentence that says why and what to do."""
