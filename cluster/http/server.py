"""The HTTP edge as one ASGI app.

Owns: which routes there are, /health and /ready. Knows nothing of Ray, torch, and of how turns are run: all
of that is injected.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, FastAPI
from pydantic import BaseModel
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from phi_cluster.cluster.errors import Unavailable
from phi_cluster.cluster.http.caller import (
    DETAILS_HEADER,
    REQUEST_ID_HEADER,
    RESUME_HEADER,
    SESSION_HEADER,
    TRACE_HEADER,
)
from phi_cluster.cluster.http.chat import chat_router
from phi_cluster.cluster.http.chat_schemas import ChatCompletionChunk, ChatRequest
from phi_cluster.cluster.http.cluster import cluster_router
from phi_cluster.cluster.http.completion_schemas import CompletionRequest
from phi_cluster.cluster.http.completions import completions_router
from phi_cluster.cluster.http.conversations import (
    ConversationUpdate,
    NewConversation,
    NewItems,
    conversations_router,
)
from phi_cluster.cluster.http.door import Door
from phi_cluster.cluster.http.edge import Edge, EdgeSettings
from phi_cluster.cluster.http.engines import engines_router
from phi_cluster.cluster.http.errors import OPEN_PATHS, install_error_handling, to_json
from phi_cluster.cluster.http.models import models_router
from phi_cluster.cluster.http.openapi import error_docs, install_openapi
from phi_cluster.cluster.http.rates import RATE_HEADERS
from phi_cluster.cluster.http.response_schemas import ResponseEvent, ResponseRequest
from phi_cluster.cluster.http.responses import responses_router
from phi_cluster.cluster.http.sessions import sessions_router
from phi_cluster.cluster.http.tokenize import DetokenizeRequest, TokenizeRequest, tokenize_router
from phi_cluster.cluster.http.ui import ui_router
from phi_cluster.cluster.http.usage import usage_router
from phi_cluster.cluster.response_api import Conversations, Responses
from phi_cluster.cluster.session_api import SessionAdmin
from phi_cluster.cluster.turn_api import (
    Clock,
    EngineAdmin,
    Health,
    Keys,
    RequestObserver,
    Tokens,
    TurnRunner,
    UsageBook,
)
from phi_cluster.cluster.watch_api import Watch

API_VERSION = "1"
_OWN_HEADERS = (DETAILS_HEADER, RESUME_HEADER, REQUEST_ID_HEADER, TRACE_HEADER)


def build_app(
    settings: EdgeSettings,
    turns: TurnRunner,
    tokens: Tokens,
    responses: Responses,
    conversations: Conversations,
    sessions: SessionAdmin,
    engines: EngineAdmin,
    health: Health,
    observer: RequestObserver,
    watch: Watch,
    clock: Clock = time,
    keys: Keys | None = None,
    usage: UsageBook | None = None,
    inside: Sequence[Middleware] = (),
) -> FastAPI:
    """A new app over these objects; several may live in one process. Without `keys` everybody may come in. `inside`:
    what is between the door and the routes, the first one innermost."""
    edge = Edge(
        settings, turns, tokens, responses, conversations, sessions, engines, health, observer, watch, clock, usage
    )
    app = FastAPI(
        title="phi-cluster",
        version=API_VERSION,
        description="OpenAI-compatible serving where every conversation owns its KV cache",
        # The interactive pages would load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    for router in (
        chat_router(edge),
        completions_router(edge),
        responses_router(edge),
        conversations_router(edge),
        models_router(edge),
        tokenize_router(edge),
        sessions_router(edge),
        engines_router(edge),
        usage_router(edge),
        cluster_router(edge),
        ui_router(),
        _health_router(edge),
    ):
        app.include_router(router)
    # The first is the innermost.
    for one in inside:
        app.add_middleware(one.cls, *one.args, **one.kwargs)
    app.add_middleware(Door, keys, settings, observer.on_error)
    if settings.cors_origins:
        _allow_origins(app, settings)
    install_error_handling(app, observer.on_error)
    requests: list[type[BaseModel]] = [
        ChatRequest,
        CompletionRequest,
        ResponseRequest,
        NewConversation,
        ConversationUpdate,
        NewItems,
        TokenizeRequest,
        DetokenizeRequest,
    ]
    install_openapi(app, requests, [ChatCompletionChunk, ResponseEvent], OPEN_PATHS)
    return app


def _allow_origins(app: FastAPI, settings: EdgeSettings) -> None:
    """Outside of the door: a browser asks whether it may ask without the key."""
    app.add_middleware(
        CORSMiddleware,
        allow_origins=settings.cors_origins,
        allow_methods=("GET", "POST", "DELETE"),
        allow_headers=("authorization", "content-type", *_OWN_HEADERS, *settings.session_headers),
        expose_headers=(REQUEST_ID_HEADER, SESSION_HEADER, "retry-after", *RATE_HEADERS),
    )


def _health_router(edge: Edge) -> APIRouter:
    router = APIRouter(tags=["health"])
    docs: dict[str, Any] = {"response_model": None, "responses": error_docs(503)}

    @router.get("/health", **docs)
    @router.head("/health", include_in_schema=False)
    async def live() -> Response:
        """200 while this process is worth keeping."""
        if not edge.health.live():
            raise Unavailable("This replica is not alive and should be replaced", retry_after=1.0)
        return Response(to_json({"status": "ok"}), media_type="application/json")

    @router.get("/ready", **docs)
    @router.head("/ready", include_in_schema=False)
    async def ready() -> Response:
        """200 while requests are served; 503 with the reason while they are not."""
        is_ready, reason = edge.health.ready()
        if not is_ready:
            raise Unavailable(reason, retry_after=1.0)
        return Response(to_json({"status": "ready"}), media_type="application/json")

    return router
