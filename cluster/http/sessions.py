"""/v1/sessions: a tenant's conversations, seen and looked after by name.

Owns: these routes and what their parameters may be. Knows nothing of actors, segments and journals.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import Response

from phi_cluster.cluster.errors import InvalidRequest
from phi_cluster.cluster.http.auth import tenant_of
from phi_cluster.cluster.http.body import read_import, read_object
from phi_cluster.cluster.http.caller import SESSION_ID_PATTERN, SESSION_ID_RULE, check_session_id
from phi_cluster.cluster.http.edge import Edge
from phi_cluster.cluster.http.errors import to_json
from phi_cluster.cluster.http.file_response import FileResponse
from phi_cluster.cluster.http.openapi import error_docs
from phi_cluster.cluster.http.paging import flag_of, parameters_of
from phi_cluster.cluster.http.session_query import (
    OF_A_TENANT,
    PAGE_OF_SESSIONS,
    owner_of,
    session_query,
)
from phi_cluster.cluster.session_api import ImportLimits

SessionId = Annotated[str, Path(description=SESSION_ID_RULE, json_schema_extra={"pattern": SESSION_ID_PATTERN})]


class SessionStats(BaseModel):
    """Sizes in bytes, times in seconds. Null: there is no such thing at the moment."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["session"]
    state: str
    num_tokens: int
    kv_cache_bytes: int
    disk_bytes: int = 0
    process_bytes: int | None = None
    turns: int
    age_seconds: float
    idle_seconds: float | None
    activation: int
    recycles: int
    holder: str | None = None
    node_id: str | None = None
    actor_pid: int | None = None
    engine_pid: int | None = None
    tenant: str | None = None


class SessionTotals(BaseModel):
    """Of all that the query finds, not of the page alone."""

    sessions: int
    by_state: dict[str, int]
    kv_cache_bytes: int
    disk_bytes: int


class SessionList(BaseModel):
    object: Literal["list"]
    data: list[SessionStats]
    has_more: bool
    first_id: str | None
    last_id: str | None
    totals: SessionTotals


class SpokenMessage(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str


class SpokenMessages(BaseModel):
    object: Literal["list"]
    data: list[SpokenMessage]


class SessionDeleted(BaseModel):
    id: str
    object: Literal["session.deleted"]
    deleted: Literal[True]


def sessions_router(edge: Edge) -> APIRouter:
    """The endpoints, over `edge`. A key sees only its own sessions; an admin may look after all,
    but not read them."""
    router = APIRouter(prefix="/v1/sessions", tags=["sessions"])
    sessions = edge.sessions

    @router.get("", response_model=None, openapi_extra=PAGE_OF_SESSIONS, responses=_docs(SessionList, 400, 403))
    async def list_sessions(request: Request) -> Response:
        """Sessions in order of their ids, or sorted, or found by state, node or a part of their id; `after` the
        `last_id` of a page comes the next page. `tenant`: those of another key, by its name, or `*`: of all; wants the
        scope admin."""
        query = session_query(request)
        page = await sessions.browse(query)
        found = [_described(one) for one in page.sessions]
        return _json(
            {
                "object": "list",
                "data": found,
                "has_more": page.has_more,
                "first_id": found[0]["id"] if found else None,
                "last_id": page.last,
                "totals": page.totals,
            }
        )

    @router.post(
        "/import", response_model=None, openapi_extra=_IMPORT, responses=_docs(SessionStats, 400, 409, 413, 507)
    )
    async def import_session(request: Request) -> Response:
        """A session of what an export gave, under the id in the query, or one that is made. A KV cache in it is taken
        if this server has written it, or one that shares its `export.key`; else it is computed anew."""
        new_id, tenant = _import_id(request), tenant_of(request)
        limits = ImportLimits(edge.settings.vocab_size, edge.settings.max_body_bytes)
        data = read_import(request, edge.settings)
        return _json(_described(await sessions.import_session(tenant, new_id, data, limits)))

    @router.get(
        "/{session_id}/export",
        response_class=Response,
        openapi_extra=_WITH_CACHE,
        responses=_EXPORT | error_docs(400, 404, 409, 500, 503, 507),
    )
    async def export_session(request: Request, session_id: SessionId) -> Response:
        """The session's turns as a file that `import` takes; with `kv=true` its KV cache too, as much of it as
        `server.max_import` would let in again."""
        check_session_id(session_id, "session_id")
        with_cache = flag_of(parameters_of(request, ("kv",)), "kv")
        cache_up_to = edge.settings.max_import_bytes if with_cache else None
        download = await sessions.export(tenant_of(request), session_id, cache_up_to)
        return FileResponse(download, edge.settings.write_seconds)

    @router.get(
        "/{session_id}", response_model=None, openapi_extra=OF_A_TENANT, responses=_docs(SessionStats, 400, 404)
    )
    async def get_session(request: Request, session_id: SessionId) -> Response:
        """One session's state."""
        check_session_id(session_id, "session_id")
        return _json(_described(await sessions.get(owner_of(request), session_id)))

    @router.get("/{session_id}/messages", response_model=None, responses=_docs(SpokenMessages, 400, 404))
    async def get_messages(request: Request, session_id: SessionId) -> Response:
        """What was said, as messages that go on from there if they are sent again with one more. Only to the session's
        own tenant; 400 if it was not said in messages."""
        check_session_id(session_id, "session_id")
        return _json({"object": "list", "data": await sessions.messages(tenant_of(request), session_id)})

    @router.delete(
        "/{session_id}", response_model=None, openapi_extra=OF_A_TENANT, responses=_docs(SessionDeleted, 400, 404, 409)
    )
    async def delete_session(request: Request, session_id: SessionId) -> Response:
        """Forget the session, its KV cache and its journal."""
        check_session_id(session_id, "session_id")
        await sessions.delete(owner_of(request), session_id)
        return _json({"id": session_id, "object": "session.deleted", "deleted": True})

    @router.post(
        "/{session_id}/clear",
        response_model=None,
        openapi_extra=OF_A_TENANT,
        responses=_docs(SessionStats, 400, 404, 409),
    )
    async def clear_session(request: Request, session_id: SessionId) -> Response:
        """Forget the conversation and its KV cache; the session stays."""
        await _check_action(request, session_id, edge)
        return _json(_described(await sessions.clear(owner_of(request), session_id)))

    @router.post(
        "/{session_id}/fork",
        response_model=None,
        openapi_extra=_FORK_BODY | OF_A_TENANT,
        responses=_docs(SessionStats, 400, 404, 409),
    )
    async def fork_session(request: Request, session_id: SessionId) -> Response:
        """A new session with the same conversation, and a copy of its KV cache."""
        check_session_id(session_id, "session_id")
        new_id, turn = _fork_of(await read_object(request, edge.settings, may_be_empty=True))
        return _json(_described(await sessions.fork(owner_of(request), session_id, new_id, turn)))

    @router.post(
        "/{session_id}/hibernate",
        response_model=None,
        openapi_extra=OF_A_TENANT,
        responses=_docs(SessionStats, 400, 404, 409, 507),
    )
    async def hibernate_session(request: Request, session_id: SessionId) -> Response:
        """Give the session's memory back and keep its KV cache on the disk; the next turn wakes it."""
        await _check_action(request, session_id, edge)
        return _json(_described(await sessions.hibernate(owner_of(request), session_id)))

    @router.post(
        "/{session_id}/recycle",
        response_model=None,
        openapi_extra=OF_A_TENANT,
        responses=_docs(SessionStats, 400, 404, 409),
    )
    async def recycle_session(request: Request, session_id: SessionId) -> Response:
        """Renew the session's actor; memory and conversation stay."""
        await _check_action(request, session_id, edge)
        return _json(_described(await sessions.recycle(owner_of(request), session_id)))

    return router


def _docs(answer: type[BaseModel], *errors: int) -> dict[int | str, dict[str, Any]]:
    return {200: {"model": answer}, **error_docs(*errors, 500, 503)}


def _json(value: Mapping[str, Any]) -> Response:
    return Response(to_json(value), media_type="application/json")


def _described(session: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": session["id"], "object": "session", **session}


async def _check_action(request: Request, session_id: str, edge: Edge) -> None:
    """The actions take no parameters; `{}` is what clients send that cannot send nothing."""
    check_session_id(session_id, "session_id")
    given = await read_object(request, edge.settings, may_be_empty=True)
    if given:
        param = next(iter(given))[:64]
        raise InvalidRequest(f"{param} is not a field here: send no body, or {{}}", param=param)


_BINARY: dict[str, Any] = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_EXPORT: dict[int | str, dict[str, Any]] = {200: {"content": _BINARY}}
_WITH_CACHE: dict[str, Any] = {
    "parameters": [{"name": "kv", "in": "query", "required": False, "schema": {"type": "boolean", "default": False}}]
}
_IMPORT: dict[str, Any] = {
    "parameters": [{"name": "id", "in": "query", "required": False, "schema": {"type": "string"}}],
    "requestBody": {"required": True, "content": _BINARY},
}


def _import_id(request: Request) -> str | None:
    """Raises `InvalidRequest` naming a parameter that is wrong, unknown or repeated."""
    new_id = parameters_of(request, ("id",)).get("id")
    return None if new_id is None else check_session_id(new_id, "id")


_FORK_BODY: dict[str, Any] = {
    "requestBody": {
        "required": False,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "id": {
                            "type": "string",
                            "description": f"the new session's; unset: one is made. {SESSION_ID_RULE}",
                        },
                        "turn": {
                            "type": "integer",
                            "minimum": 1,
                            "description": "the new session ends after so many of the turns that there are; unset: all",
                        },
                    },
                }
            }
        },
    }
}


def _fork_of(given: Mapping[str, Any]) -> tuple[str | None, int | None]:
    """`id` and `turn`. Raises `InvalidRequest` naming the field that is wrong or unknown."""
    for name in given:
        if name not in ("id", "turn"):
            raise InvalidRequest(f"{name[:64]} is not a field here: there are id and turn", param=name[:64])
    new_id, turn = given.get("id"), given.get("turn")
    if new_id is not None:
        if not isinstance(new_id, str):
            raise InvalidRequest(f"id must be a string: {SESSION_ID_RULE}", param="id")
        check_session_id(new_id, "id")
    if turn is not None and (type(turn) is not int or not 1 <= turn <= 2**31):
        raise InvalidRequest("turn must be an integer of at least 1", param="turn")
    return new_id, turn
