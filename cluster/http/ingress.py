"""The layer around Serve's own handling of a request: what clients may not tell it, and what it may not add.

Owns: the headers that cross this border. Knows nothing of our app. Serve imports `middlewares` by its path, in every
process that listens (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH).
"""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phi_cluster.cluster.http.caller import REQUEST_ID_HEADER

CALLBACK_PATH = f"{__name__}.middlewares"

# With these a client would switch Serve's handling of disconnects and time limits off.
_SWITCHES = (b"x-request-disconnect-disabled", b"x-request-timeout-seconds")


def middlewares() -> list[Middleware]:
    """For Serve: outermost last."""
    return [Middleware(Ingress)]


class Ingress:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_one_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                given = headers.getlist(REQUEST_ID_HEADER)
                if len(given) > 1:
                    # Serve has added its own behind ours.
                    headers[REQUEST_ID_HEADER] = given[0]
            await send(message)

        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in _SWITCHES]
        await self._app({**scope, "headers": headers}, receive, send_one_id)
