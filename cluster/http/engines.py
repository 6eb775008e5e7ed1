"""/v1/engines: what an operator asks of the engines.

Owns: these routes. Knows nothing of how engines are renewed.
"""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from phi_cluster.cluster.http.auth import ENGINES_SCOPE, require
from phi_cluster.cluster.http.edge import Edge
from phi_cluster.cluster.http.errors import to_json
from phi_cluster.cluster.http.openapi import error_docs


class EnginesRecycling(BaseModel):
    object: Literal["engines.recycling"]
    engines: int


def engines_router(edge: Edge) -> APIRouter:
    """The endpoints, over `edge`."""
    router = APIRouter(prefix="/v1/engines", tags=["engines"])

    @router.post("/recycle", status_code=202, response_model=EnginesRecycling, responses=error_docs(403, 503))
    async def recycle(request: Request) -> Response:
        """All engines are renewed, one after the other; running streams go on. Wants the scope admin."""
        require(request, ENGINES_SCOPE)
        body = {"object": "engines.recycling", "engines": await edge.engines.recycle_engines()}
        return Response(to_json(body), 202, media_type="application/json")

    return router
