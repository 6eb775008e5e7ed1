"""Errors as responses: OpenAI's error object for everything that goes wrong, and nothing about our insides.

Owns: the error response, the exception handlers, and the outermost layer of the app that gives every request
an id and turns what nobody expected into a bare 500. Knows nothing of what the routes do.
"""

from __future__ import annotations

import json
import logging
import math
import uuid
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phi_cluster.cluster.errors import BodyTooLarge, LimitReached, PhiError, RequestTimeout, Unauthorized
from phi_cluster.cluster.http.caller import REQUEST_ID_HEADER
from phi_cluster.cluster.http.elsewhere import reason_for_absence
from phi_cluster.cluster.http.rates import rate_headers

logger = logging.getLogger(__name__)

# Whoever watches over the server has no key, and may come under any name; what it is told is no failure.
OPEN_PATHS = frozenset({"/health", "/ready"})

OnError: TypeAlias = Callable[[int, str | None], None]

_CODES = {404: "not_found", 405: "method_not_allowed", 415: "unsupported_media_type"}


def to_json(value: Any) -> bytes:
    """Compact UTF-8 JSON. A lone surrogate, which no UTF-8 can carry, becomes a question mark."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def internal_error() -> PhiError:
    """What a client is told about an exception that nobody expected: its traceback is in the server's log."""
    return PhiError("The server failed to process this request; the response's x-request-id is in its log")


def error_response(error: PhiError, headers: Mapping[str, str] | None = None) -> Response:
    """The response that `error` becomes while no other has been started."""
    response = Response(to_json(error.body()), error.status, headers, media_type="application/json")
    if error.retry_after is not None:
        response.headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, LimitReached):
        response.headers.update(rate_headers(error.rates))
    if isinstance(error, Unauthorized):
        response.headers["www-authenticate"] = "Bearer"
    if isinstance(error, BodyTooLarge | RequestTimeout):
        # The rest of the body is not read, so the connection cannot be used again.
        response.headers["connection"] = "close"
    return response


def install_error_handling(app: FastAPI, on_error: OnError) -> None:
    """Every response of `app` gets a request id, every error becomes an error object; `on_error` gets its status and
    code."""

    async def on_phi_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, PhiError)
        if request.scope["path"] not in OPEN_PATHS:
            on_error(error.status, error.code)
        log_for_operator(error, request.state.request_id)
        return error_response(error)

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        on_error(error.status_code, _CODES.get(error.status_code))
        return _http_error_response(request, error)

    app.add_exception_handler(PhiError, on_phi_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_middleware(RequestEnvelope, on_error)


def log_for_operator(error: PhiError, request_id: str) -> None:
    """What the client is not told goes to the log."""
    if error.told is not None:
        logger.error("request %s: %s", request_id, error.message)


def told_of(error: Exception, request_id: str) -> PhiError:
    """What the client is told about `error`; what nobody expected goes to the log instead."""
    if isinstance(error, PhiError):
        log_for_operator(error, request_id)
        return error
    logger.error("request %s failed unexpectedly", request_id, exc_info=error)
    return internal_error()


def _http_error_response(request: Request, error: HTTPException) -> Response:
    # Not request.url, which is put together from the client's Host header.
    path = request.scope["path"]
    where = f"{request.method} {path[:200]}"
    code = _CODES.get(error.status_code)
    if error.status_code == 404 and (reason := reason_for_absence(path)):
        code = "unsupported_endpoint"
        message = f"{where} is not served here: {reason}. There are {', '.join(_collections(request.app))}"
    elif error.status_code == 404:
        message = f"There is nothing at {where}"
    elif error.status_code == 405:
        message = f"The method does not fit: {where}; allowed: {(error.headers or {}).get('allow', 'others')}"
    else:
        message = error.detail
    body = {
        "error": {
            "message": message,
            "type": "invalid_request_error" if error.status_code < 500 else "server_error",
            "param": None,
            "code": code,
        }
    }
    return Response(to_json(body), error.status_code, error.headers, media_type="application/json")


def _collections(app: FastAPI) -> list[str]:
    """What can be asked for without naming one thing."""
    return sorted(path for path in app.openapi()["paths"] if path.startswith("/v1/") and "{" not in path)


class RequestEnvelope:
    """ASGI middleware: `request.state.request_id`, the response's x-request-id, and the last resort.

    Inside of it `send` raises `ClientDisconnect` if the client is known to be gone.
    """

    def __init__(self, app: ASGIApp, on_error: OnError) -> None:
        self.app = app
        self._on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # A copy: the server may hand the same state to every request of a connection.
        state = {**scope.get("state", {}), "request_id": uuid.uuid4().hex}
        scope = {**scope, "state": state}
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = state["request_id"]
            try:
                await send(message)
            except OSError as error:
                # How servers say (some of them) that nobody is listening any more.
                raise ClientDisconnect from error

        try:
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            # It left before its request or the response was complete: there is nobody to answer.
            return
        except Exception:
            logger.exception("request %s failed unexpectedly", state["request_id"])
            told = internal_error()
            self._on_error(told.status, told.code)
            if not started:
                await error_response(told)(scope, receive, send_with_id)
