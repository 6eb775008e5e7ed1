"""/v1/cluster and /v1/events: what whoever watches over the cluster asks.

Owns: these routes, and the stream of events. Knows nothing of how the state is found and of what an event is about.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from phi_cluster.cluster.errors import InvalidRequest, Unavailable
from phi_cluster.cluster.http.auth import ADMIN_SCOPE, ENGINES_SCOPE, identity_of, require
from phi_cluster.cluster.http.disconnect import until_disconnect
from phi_cluster.cluster.http.edge import Edge
from phi_cluster.cluster.http.errors import to_json, told_of
from phi_cluster.cluster.http.event_stream import EventStream
from phi_cluster.cluster.http.openapi import answer_docs
from phi_cluster.cluster.http.paging import flag_of, limit_of, parameters_of

_DEFAULT_EVENTS, _MAX_EVENTS = 100, 1000
_LAST_EVENT_ID = "last-event-id"
# A stream ends after so long; its client comes back with the number of the last event. So none keeps a replica that is
# to be replaced.
_STREAM_SECONDS = 300.0
_WAIT_SECONDS = 10.0


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class ClusterState(_Open):
    """Sizes in bytes, times in seconds; null where nothing happened. `last_minute` and each of `history`: tokens and
    requests a second, and percentiles of `ttft_seconds`, `inter_token_seconds`, `e2e_seconds`."""

    object: Literal["cluster"]
    time: float
    nodes: list[dict[str, Any]]
    replicas: list[dict[str, Any]]
    controller: dict[str, Any]
    weights_bytes: int
    requests_running: int
    requests_waiting: int
    last_minute: dict[str, Any]
    history: list[dict[str, Any]]


class ClusterEvent(BaseModel):
    """`number` rises; `id` stays the same if the controller, which gives the numbers, is replaced. `tenant` and
    `session_id` are null where the session is another tenant's."""

    object: Literal["event"]
    number: int
    id: str
    time: float
    kind: str
    text: str
    count: int
    reason: str | None
    seconds: float | None
    node_id: str
    tenant: str | None
    session_id: str | None


class EventList(BaseModel):
    """`last`: ask for the events `after` it next."""

    object: Literal["list"]
    data: list[ClusterEvent]
    has_more: bool
    last: int


# What JavaScript can count to.
_LAST_NUMBER = 2**53 - 1
_NUMBER = {"type": "integer", "minimum": 0, "maximum": _LAST_NUMBER}
_PARAMETERS: list[dict[str, Any]] = [
    {
        "name": "limit",
        "in": "query",
        "required": False,
        "schema": {"type": "integer", "minimum": 1, "maximum": _MAX_EVENTS, "default": _DEFAULT_EVENTS},
    },
    {
        "name": "after",
        "in": "query",
        "required": False,
        "description": "events behind the one with this number; without it the last ones",
        "schema": _NUMBER,
    },
    {"name": "stream", "in": "query", "required": False, "schema": {"type": "boolean", "default": False}},
    {
        "name": _LAST_EVENT_ID,
        "in": "header",
        "required": False,
        "description": "of a stream: as `after`, which wins",
        "schema": {"type": "string", "pattern": "^[0-9]{1,16}$"},
    },
]


def cluster_router(edge: Edge) -> APIRouter:
    """The endpoints, over `edge`. They want the scope admin where there are keys."""
    router = APIRouter(tags=["cluster"])

    @router.get("/v1/cluster", **answer_docs(ClusterState, 400, 403))
    async def get_cluster(request: Request) -> Response:
        """Nodes, replicas and engines, their memory, and how fast they have been lately."""
        require(request, ENGINES_SCOPE)
        parameters_of(request, ())
        return Response(to_json(await edge.watch.cluster()), media_type="application/json")

    @router.get("/v1/events", **_event_docs())
    async def get_events(request: Request) -> Response:
        """What happened to the cluster: the last events, those behind a number, or, as a stream, those to come."""
        require(request, ENGINES_SCOPE)
        given = parameters_of(request, ("limit", "after", "stream"))
        limit, after = limit_of(given, _DEFAULT_EVENTS, _MAX_EVENTS), _number(given.get("after"), "after")
        tenant = None if identity_of(request).has(ADMIN_SCOPE) else identity_of(request).tenant
        last_seen = _number(request.headers.get(_LAST_EVENT_ID), _LAST_EVENT_ID)
        if flag_of(given, "stream"):
            return _Events(edge, last_seen if after is None else after, tenant)
        page = await edge.watch.events(after, limit, tenant, 0.0)
        body = {"object": "list", "data": page.events, "has_more": page.has_more, "last": page.last}
        return Response(to_json(body), media_type="application/json")

    return router


def _event_docs() -> dict[str, Any]:
    docs = answer_docs(EventList, 400, 403, parameters=_PARAMETERS)
    data = {"type": "string", "description": "a ClusterEvent as JSON; [DONE] is the last one's"}
    sent = {"type": "object", "required": ["data"], "properties": {"id": {"type": "string"}, "data": data}}
    docs["responses"][200] = {"model": EventList, "content": {"text/event-stream": {"schema": sent}}}
    return docs


def _number(text: str | None, param: str) -> int | None:
    """Raises InvalidRequest."""
    if text is None:
        return None
    # No more digits than fit: int() of a million of them takes seconds.
    if not re.fullmatch("[0-9]{1,16}", text, re.ASCII) or int(text) > _LAST_NUMBER:
        raise InvalidRequest(f"{param}: the number of an event is expected", param=param)
    return int(text)


class _Events(Response):
    """Events from `after` on (None: those to come), each with its number as its id."""

    def __init__(self, edge: Edge, after: int | None, tenant: str | None) -> None:
        super().__init__()
        self._edge = edge
        self._after = after
        self._tenant = tenant

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = EventStream(scope, receive, send, {})
        settings = self._edge.settings
        await until_disconnect(
            receive,
            self._send(stream),
            stream.keep_alive(settings.keep_alive_seconds),
            until=stream.stuck(settings.write_seconds),
        )

    async def _send(self, stream: EventStream) -> None:
        watch, clock = self._edge.watch, self._edge.clock
        until = clock.monotonic() + _STREAM_SECONDS
        try:
            after = self._after
            if after is None:
                after = (await watch.events(None, 1, self._tenant, 0.0)).last
            while clock.monotonic() < until:
                page = await watch.events(after, _MAX_EVENTS, self._tenant, _WAIT_SECONDS)
                for event in page.events:
                    await stream.write(event, event["number"])
                after = page.last
                if page.is_ending and not page.has_more:
                    break
            await stream.end()
        except ClientDisconnect:
            raise
        except Unavailable as error:
            await stream.fail(error)
        except Exception as error:
            await stream.fail(told_of(error, "for events"))
