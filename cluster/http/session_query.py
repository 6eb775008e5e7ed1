"""Whose sessions, and which of them: the query of /v1/sessions.

Owns: its parameters, and that only an admin may name another tenant. Knows nothing of how sessions are found.
"""

from __future__ import annotations

import re
from typing import Any

from starlette.requests import Request

from phi_cluster.cluster.errors import InvalidRequest
from phi_cluster.cluster.http.auth import ADMIN_SCOPE, require, tenant_of
from phi_cluster.cluster.http.caller import SESSION_ID_PATTERN, check_session_id
from phi_cluster.cluster.http.paging import limit_of, parameters_of
from phi_cluster.cluster.session_api import SESSION_SORTS, SESSION_STATES, SessionQuery, SessionSort

_DEFAULT_LIMIT, _MAX_LIMIT = 100, 1000
# Where a session of any tenant is meant.
_EVERYBODY = "*"
_TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_SEARCH = re.compile(r"[A-Za-z0-9._:-]{1,128}", re.ASCII)
_NODE = re.compile(r"[0-9a-f]{1,64}", re.ASCII)


def _parameter(name: str, description: str = "", **schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "description": description, "schema": schema}


_OWNER = _parameter(
    "tenant",
    "whose session, by the name of the key; wants the scope admin",
    type="string",
    pattern=f"^{_TENANT.pattern}$",
)
# Of a route that is about one session.
OF_A_TENANT: dict[str, Any] = {"parameters": [_OWNER]}
PAGE_OF_SESSIONS: dict[str, Any] = {
    "parameters": [
        _parameter("limit", type="integer", minimum=1, maximum=_MAX_LIMIT, default=_DEFAULT_LIMIT),
        _parameter(
            "after",
            "the `last_id` of the page before: an id, with `tenant=*` TENANT/ID",
            type="string",
            pattern=SESSION_ID_PATTERN,
        ),
        _parameter("sort", type="string", enum=list(SESSION_SORTS), default="id"),
        _parameter("order", "by default ids ascend and all else descends", type="string", enum=["asc", "desc"]),
        _parameter("state", type="string", enum=list(SESSION_STATES)),
        _parameter("node", "in the memory of the node whose id begins so", type="string", pattern=f"^{_NODE.pattern}$"),
        _parameter(
            "search", "ids that have this in them, whatever the case", type="string", pattern=f"^{_SEARCH.pattern}$"
        ),
        _parameter(
            "tenant",
            "of the key with this name, or `*`: of all; wants the scope admin",
            type="string",
            pattern=rf"^(\*|{_TENANT.pattern})$",
        ),
    ]
}


def owner_of(request: Request) -> str:
    """The tenant of the one session that a request is about: the caller's own, or the one that an admin names. Raises
    `InvalidRequest` and `Forbidden`."""
    tenant = parameters_of(request, ("tenant",)).get("tenant")
    if tenant is None:
        return tenant_of(request)
    require(request, ADMIN_SCOPE)
    return _matching(tenant, _TENANT, "tenant", "the name of a key")


def session_query(request: Request) -> SessionQuery:
    """Raises `InvalidRequest` naming a parameter that is wrong, unknown or repeated, and `Forbidden`."""
    given = parameters_of(request, ("limit", "after", "sort", "order", "state", "node", "search", "tenant"))
    tenant = given.get("tenant")
    if tenant is not None:
        require(request, ADMIN_SCOPE)
        if tenant != _EVERYBODY:
            _matching(tenant, _TENANT, "tenant", "the name of a key, or *")
    sort: SessionSort = _one_of(given, "sort", SESSION_SORTS) or "id"
    order = _one_of(given, "order", ("asc", "desc"))
    return SessionQuery(
        tenant=None if tenant == _EVERYBODY else tenant or tenant_of(request),
        limit=limit_of(given, _DEFAULT_LIMIT, _MAX_LIMIT),
        after=_after(given.get("after"), of_all=tenant == _EVERYBODY),
        sort=sort,
        is_descending=sort != "id" if order is None else order == "desc",
        state=_one_of(given, "state", SESSION_STATES),
        node_id=_optional(given, "node", _NODE, "the beginning of a node's id: hexadecimal digits"),
        search=_optional(given, "search", _SEARCH, "a part of a session's id"),
    )


def _after(after: str | None, *, of_all: bool) -> str | None:
    if after is None:
        return None
    tenant, slash, session_id = after.rpartition("/")
    if of_all != bool(slash):
        raise InvalidRequest("after: the last_id of the page before is expected", param="after")
    if of_all:
        _matching(tenant, _TENANT, "after", "the last_id of the page before")
    check_session_id(session_id, "after")
    return after


def _one_of(given: dict[str, str], name: str, choices: tuple[Any, ...]) -> Any:
    value = given.get(name)
    if value is not None and value not in choices:
        raise InvalidRequest(f"{name} must be one of {', '.join(choices)}", param=name)
    return value


def _optional(given: dict[str, str], name: str, pattern: re.Pattern[str], what: str) -> str | None:
    value = given.get(name)
    return None if value is None else _matching(value, pattern, name, what)


def _matching(value: str, pattern: re.Pattern[str], name: str, what: str) -> str:
    if not pattern.fullmatch(value):
        raise InvalidRequest(f"{name} must be {what}", param=name)
    return value
