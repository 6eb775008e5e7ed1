"""/ui: the live page, as files that any browser shows.

Owns: which files there are, and the headers that keep the page from loading or running anything else. The files know
nothing that is secret: what they show, they ask of /v1 with the key that a user gives them. Knows nothing of sessions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

UI_PATH = "/ui"
_FOLDER = Path(__file__).parent.parent / "ui"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    # Nothing but our own files; no code out of text, whatever a conversation says.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


def is_page(path: str) -> bool:
    """Whether this is the page or a file of it: open to whoever may reach the server."""
    return path == UI_PATH or path.startswith(f"{UI_PATH}/")


def ui_router() -> APIRouter:
    """The page. It is read once."""
    router = APIRouter(include_in_schema=False)
    for file in sorted(_FOLDER.iterdir()):
        if file.suffix in _TYPES:
            paths = (UI_PATH, f"{UI_PATH}/") if file.name == "index.html" else (f"{UI_PATH}/{file.name}",)
            serve = _server_of(file.read_bytes(), _TYPES[file.suffix])
            for path in paths:
                router.add_api_route(path, serve, methods=["GET", "HEAD"], response_model=None)
    return router


def _server_of(content: bytes, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    headers = {**_HEADERS, "etag": tag}

    async def serve(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(None, 304, headers)
        return Response(content, 200, headers, media_type=media_type)

    return serve
