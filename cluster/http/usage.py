"""GET /v1/usage: what the holder of a key has used, and what all have, for an admin.

Owns: this route. Knows nothing of how it is counted.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from phi_cluster.cluster.errors import NotFound
from phi_cluster.cluster.http.auth import ADMIN_SCOPE, identity_of
from phi_cluster.cluster.http.edge import Edge
from phi_cluster.cluster.http.errors import to_json
from phi_cluster.cluster.http.openapi import error_docs


class UsageLimits(BaseModel):
    """Null: no limit."""

    requests_per_minute: int | None
    tokens_per_minute: int | None
    concurrent_turns: int | None
    sessions: int | None
    kv_bytes: int | None


class KeyUsage(BaseModel):
    """Totals `since` then (seconds since 1970), and what is used now. `refused`: requests beyond the key's limits."""

    object: Literal["usage"]
    name: str
    since: float
    requests: int
    refused: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    turns_running: int
    sessions: int
    kv_cache_bytes: int
    limits: UsageLimits


class UsageList(BaseModel):
    object: Literal["list"]
    data: list[KeyUsage]


def usage_router(edge: Edge) -> APIRouter:
    """The endpoint, over `edge`."""
    router = APIRouter(tags=["usage"])
    documented: dict[int | str, dict[str, Any]] = {200: {"model": UsageList}, **error_docs(404, 503)}

    @router.get("/v1/usage", response_model=None, responses=documented)
    async def get_usage(request: Request) -> Response:
        """The caller's own; with scope admin everybody's."""
        if edge.usage is None:
            raise NotFound("Usage is counted for the holders of keys, and none are set up (server.keys)")
        caller = identity_of(request)
        found = await edge.usage.usage(None if caller.has(ADMIN_SCOPE) else caller.tenant)
        body = {"object": "list", "data": [{"object": "usage", **one} for one in found]}
        return Response(to_json(body), media_type="application/json")

    return router
