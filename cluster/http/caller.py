"""What the headers of a request say: tenant, session, and whether our own details are wanted.

Owns: the names of the headers (those that name a session can be configured) and what a session id may look like. Knows
nothing of bodies and of sessions' existence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from starlette.requests import Request

from phi_cluster.cluster.errors import InvalidRequest
from phi_cluster.cluster.http.auth import tenant_of
from phi_cluster.cluster.turn_api import Position

SESSION_HEADER = "x-session-id"
REQUEST_ID_HEADER = "x-request-id"
DETAILS_HEADER = "x-phi-details"
RESUME_HEADER = "x-resume-from"
TRACE_HEADER = "traceparent"

SESSION_ID_RULE = "1 to 128 of the characters A-Z a-z 0-9 . _ : -, and neither . nor .. alone"
# As JSON schemas have them.
SESSION_ID_PATTERN = r"^(?!\.{1,2}$)[A-Za-z0-9._:-]{1,128}$"
REQUEST_ID_PATTERN = "^[0-9a-f]{32}$"
POSITION_PATTERN = "^(0|[0-9]{1,9}-[0-9a-f]{8})$"
_REQUEST_ID = re.compile(r"[0-9a-f]{32}", re.ASCII)
_POSITION = re.compile(r"([0-9]{1,9})-([0-9a-f]{8})", re.ASCII)
_SESSION_ID = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._:-]{1,128}", re.ASCII)


@dataclass(frozen=True)
class Caller:
    """`request_id` is made by us; a client's own x-request-id is looked at only with x-resume-from (`resume_from`):
    then it is the one that we gave the request whose reply was interrupted. `traceparent` (W3C) is taken as it
    comes: what is none begins a trace of its own."""

    tenant: str
    session_id: str | None
    request_id: str
    wants_details: bool
    resume_from: Position | None = None
    traceparent: str | None = None


def caller_of(request: Request) -> Caller:
    """Raises `InvalidRequest` naming the header that is wrong."""
    name, session_id = _session_id(request)
    resume_from = _resume_from(request)
    return Caller(
        tenant=tenant_of(request),
        session_id=None if session_id is None else check_session_id(session_id, name),
        request_id=request.state.request_id,
        wants_details=request.headers.get(DETAILS_HEADER) == "1",
        resume_from=resume_from,
        traceparent=request.headers.get(TRACE_HEADER),
    )


def _session_id(request: Request) -> tuple[str, str | None]:
    """The session's id and the header that names it; clients that send several must mean one session."""
    given = {name: _only(request, name) for name in request.state.session_headers}
    named = {name: value for name, value in given.items() if value is not None}
    if len(set(named.values())) > 1:
        names = " and ".join(named)
        raise InvalidRequest(f"{names} name different sessions: send one of them", param=next(iter(named)))
    return next(iter(named.items()), (SESSION_HEADER, None))


def check_resumable(caller: Caller, num_logprobs: int | None) -> None:
    """Raises `InvalidRequest` for a reply that is read on with log probabilities: those of its first part are gone."""
    if caller.resume_from is not None and num_logprobs is not None:
        raise InvalidRequest(
            f"{RESUME_HEADER}: a reply with log probabilities cannot be read on; send the request anew",
            param=RESUME_HEADER,
        )


def _resume_from(request: Request) -> Position | None:
    """The position to read on from. The request then goes on under the id that it had."""
    position = _only(request, RESUME_HEADER)
    if position is None:
        return None
    parts = _POSITION.fullmatch("0-00000000" if position == "0" else position)
    if parts is None:
        raise InvalidRequest(
            f"{RESUME_HEADER}: the id of the last event that came is expected, or 0", param=RESUME_HEADER
        )
    request_id = _only(request, REQUEST_ID_HEADER)
    if request_id is None or not _REQUEST_ID.fullmatch(request_id):
        raise InvalidRequest(
            f"{REQUEST_ID_HEADER}: with {RESUME_HEADER} the x-request-id of the interrupted response is expected, "
            "32 hexadecimal digits",
            param=REQUEST_ID_HEADER,
        )
    request.state.request_id = request_id
    return Position(int(parts[1]), int(parts[2], 16))


def _only(request: Request, name: str) -> str | None:
    values = request.headers.getlist(name)
    if len(values) > 1:
        raise InvalidRequest(f"{name}: send this header once", param=name)
    return values[0] if values else None


def check_session_id(session_id: str, param: str) -> str:
    """The id itself if it is a legal one; raises `InvalidRequest` naming `param`."""
    if not _SESSION_ID.fullmatch(session_id):
        raise InvalidRequest(f"{param}: a session id is {SESSION_ID_RULE}", param=param)
    return session_id
