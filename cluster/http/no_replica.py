"""/health and /ready where there is no replica that could answer them.

Owns: these answers, in Serve's fallback proxy, whom HAProxy asks while there is none. All other requests wait there for
a replica, which is what wakes one; a probe must not. Knows nothing of why there is none.
"""

from __future__ import annotations

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from phi_cluster.cluster.errors import Unavailable
from phi_cluster.cluster.http.errors import OPEN_PATHS, error_response


class NoReplica:
    """ASGI middleware, in every process of Serve that listens. `port`: the fallback proxy's. `may_sleep`: where no
    replica is up, one comes with the first request (config.replicas is 0)."""

    def __init__(self, app: ASGIApp, port: int, may_sleep: bool) -> None:
        self._app = app
        self._port = port
        self._may_sleep = may_sleep

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in OPEN_PATHS or not self._is_fallback(scope):
            await self._app(scope, receive, send)
        elif scope["path"] == "/health" or self._may_sleep:
            await JSONResponse({"status": "asleep" if self._may_sleep else "ok"})(scope, receive, send)
        else:
            await error_response(Unavailable("no replica is up yet", retry_after=1))(scope, receive, send)

    def _is_fallback(self, scope: Scope) -> bool:
        server = scope.get("server")
        return server is not None and server[1] == self._port
