"""What the headers of a request say: tenant, session, and whether our own details are wanted.

Owns: the names of the headers and what a session id may look like. Knows nothing of bodies and of sessions'
existence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from starlette.requests import Request

from phi_cluster.cluster.errors import InvalidRequest
from phi_cluster.cluster.http.auth import tenant_of

SESSION_HEADER = "x-session-id"
REQUEST_ID_HEADER = "x-request-id"
DETAILS_HEADER = "x-phi-details"

SESSION_ID_RULE = "1 to 128 of the characters A-Z a-z 0-9 . _ : -, and neither . nor .. alone"
_SESSION_ID = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._:-]{1,128}", re.ASCII)


@dataclass(frozen=True)
class Caller:
    """`request_id` is made by us; a client's own x-request-id is never looked at."""

    tenant: str
    session_id: str | None
    request_id: str
    wants_details: bool


def caller_of(request: Request) -> Caller:
    """Raises `InvalidRequest` naming the header that is wrong."""
    session_ids = request.headers.getlist(SESSION_HEADER)
    if len(session_ids) > 1:
        raise InvalidRequest(f"{SESSION_HEADER}: send this header once", param=SESSION_HEADER)
    session_id = check_session_id(session_ids[0], SESSION_HEADER) if session_ids else None
    return Caller(
        tenant=tenant_of(request.headers),
        session_id=session_id,
        request_id=request.state.request_id,
        wants_details=request.headers.get(DETAILS_HEADER) == "1",
    )


def check_session_id(session_id: str, param: str) -> str:
    """The id itself if it is a legal one; raises `InvalidRequest` naming `param`."""
    if not _SESSION_ID.fullmatch(session_id):
        raise InvalidRequest(f"{param}: a session id is {SESSION_ID_RULE}", param=param)
    return session_id
