"""The door of the edge: who comes in, before any route is looked for.

Owns: what is asked of Host and Origin, and the answer to whoever stays outside.
Knows nothing of the routes and of what a caller may do inside. Decides by the path as the server received it and by
headers, never by a URL that was put together from a Host header.

While no keys are set up the server is on loopback, where every page in a user's browser can reach it: requests for
hosts that are not this one (a name that was pointed here) and from pages of others are turned away. The live page's own
files want no key, but are under this rule too.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from phi_cluster.cluster.errors import Forbidden, InvalidRequest, PhiError
from phi_cluster.cluster.http.auth import identify
from phi_cluster.cluster.http.edge import EdgeSettings
from phi_cluster.cluster.http.errors import OPEN_PATHS, OnError, error_response
from phi_cluster.cluster.http.ui import is_page
from phi_cluster.cluster.turn_api import Keys


class Door:
    """ASGI middleware: `request.state.identity` and `request.state.session_headers` for all that is inside of it."""

    def __init__(self, app: ASGIApp, keys: Keys | None, settings: EdgeSettings, on_error: OnError) -> None:
        self._app = app
        self._on_error = on_error
        self._keys = keys
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["state"]["session_headers"] = self._settings.session_headers
            if scope["path"] not in OPEN_PATHS:
                headers = Headers(scope=scope)
                try:
                    if self._keys is None:
                        self._check_neighbourhood(headers)
                    if not is_page(scope["path"]):
                        scope["state"]["identity"] = identify(headers, self._keys)
                except PhiError as error:
                    self._on_error(error.status, error.code)
                    # The rest of the request is not read, so the connection cannot be used again.
                    await error_response(error, {"connection": "close"})(scope, receive, send)
                    return
        await self._app(scope, receive, send)

    def _check_neighbourhood(self, headers: Headers) -> None:
        """Raises `Forbidden` and `InvalidRequest`."""
        hosts = headers.getlist("host")
        if len(hosts) > 1:
            raise InvalidRequest("Host: send this header once", param="host")
        host = hosts[0] if hosts else ""
        allowed = self._settings.allowed_hosts
        if host and allowed and _name_of(host) not in allowed:
            raise Forbidden(
                "Host: this server does not answer under that name; name it in server.allowed_hosts, or set up keys "
                "(server.keys)",
                param="host",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is None or origin in self._settings.cors_origins or "*" in self._settings.cors_origins:
            return
        if not host or origin.partition("://")[2].lower() != host.lower():
            raise Forbidden(
                "Origin: pages of other sites may not ask this server; name them in server.cors_origins",
                param="origin",
                code="origin_not_allowed",
            )


def _name_of(host: str) -> str:
    """`Host` without its port, in lower case; an IPv6 address without its brackets."""
    name, colon, port = host.rpartition(":")
    if not colon or not port.isdecimal():
        name = host
    return name.strip("[]").lower()
