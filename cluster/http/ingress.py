"""The layer around Serve's own handling of a request: what clients may not tell it, and what it may not add.

Owns: the headers that cross this border, and Serve's own errors as OpenAI's. Knows nothing of our app, but that it
serves all paths and answers errors as JSON. Serve imports `middlewares` by its path, in every process of its that
listens (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH); what HAProxy says on its own does not come by here.
"""

from __future__ import annotations

import os

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phi_cluster.cluster.errors import PhiError, Unavailable
from phi_cluster.cluster.http.caller import REQUEST_ID_HEADER
from phi_cluster.cluster.http.errors import error_response, internal_error
from phi_cluster.cluster.http.no_replica import NoReplica

# With these a client would switch Serve's handling of disconnects and time limits off.
_SWITCHES = (b"x-request-disconnect-disabled", b"x-request-timeout-seconds")


# In the environment of Serve's processes, see ray_environment.py.
FALLBACK_PORT_VARIABLE = "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"
MAY_SLEEP_VARIABLE = "PHI_CLUSTER_MAY_SLEEP"


def middlewares() -> list[Middleware]:
    """For Serve: outermost last."""
    port = int(os.environ.get(FALLBACK_PORT_VARIABLE) or 0)
    return [Middleware(Ingress), Middleware(NoReplica, port=port, may_sleep=os.environ.get(MAY_SLEEP_VARIABLE) == "1")]


class Ingress:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        replaced = False

        async def send_ours(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                given = headers.getlist(REQUEST_ID_HEADER)
                if len(given) > 1:
                    # Serve has added its own behind ours.
                    headers[REQUEST_ID_HEADER] = given[0]
                if message["status"] >= 400 and not headers.get("content-type", "").startswith("application/json"):
                    replaced = True
                    await error_response(_told(message["status"]))(scope, receive, send)
            if not replaced:
                await send(message)

        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in _SWITCHES]
        await self._app({**scope, "headers": headers}, receive, send_ours)


def _told(status: int) -> PhiError:
    """What a client is told instead of an error of Serve's own."""
    if status in (404, 408, 502, 503, 504):
        # A proxy that has just been started knows no routes yet: there is nothing wrong with the request.
        return Unavailable("no replica can be reached just now; try again", retry_after=1)
    return internal_error()
