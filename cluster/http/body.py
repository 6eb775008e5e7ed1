"""Reading a request's body: bounded, and as strict JSON.

Owns: the limits of size and time, the media type, and what counts as JSON (no NaN, no broken UTF-8, no lone surrogates,
a bounded depth; of a name that comes twice in an object the last one counts, as for most readers: nothing in a body
decides who is asking). Knows nothing of the fields in it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import Request

from phi_cluster.cluster.errors import BodyTooLarge, InvalidRequest, RequestTimeout
from phi_cluster.cluster.http.edge import EdgeSettings

# A long body that comes slower is given up.
_LEAST_BYTES_A_SECOND = 2**17


async def read_object(request: Request, settings: EdgeSettings, *, may_be_empty: bool = False) -> dict[str, Any]:
    """The body, which must be a JSON object; `{}` also for no body at all where that is allowed.

    Numbers too large for a float come out as infinity: fields must refuse that (`StrictModel` does).
    Raises `BodyTooLarge` before the body is read to its end, `RequestTimeout` if it does not come, `InvalidRequest` if
    it is not JSON, and `HTTPException` 415 on another media type.
    """
    raw = await read_bytes(request, settings)
    if may_be_empty and not raw:
        return {}
    _check_media_type(request)
    try:
        # The parser's own limit on nesting is 200 levels, on integers 4300 digits.
        given = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}") from None
    if not isinstance(given, dict):
        raise InvalidRequest("The body must be a JSON object, such as {...}")
    return given


async def read_import(request: Request, settings: EdgeSettings) -> AsyncIterator[bytes]:
    """The body of an import as it comes, a piece at a time. It may take `body_seconds`, and longer the more there is of
    it. Raises `BodyTooLarge` and `RequestTimeout`."""
    loop, size = asyncio.get_running_loop(), 0
    begin = loop.time()
    pieces = _read_up_to(request, settings.max_import_bytes)
    while True:
        seconds = settings.body_seconds + size / _LEAST_BYTES_A_SECOND
        try:
            piece = await asyncio.wait_for(anext(pieces, None), max(begin + seconds - loop.time(), 0.0))
        except asyncio.TimeoutError:
            raise RequestTimeout(f"{size} bytes of the body came within {seconds:g} s: that is too slow") from None
        if piece is None:
            return
        size += len(piece)
        yield piece


async def read_bytes(request: Request, settings: EdgeSettings) -> bytes:
    """The body as it came. Raises `BodyTooLarge` as soon as it is known to be too large, and `RequestTimeout`."""

    async def read() -> bytes:
        return b"".join([piece async for piece in _read_up_to(request, settings.max_body_bytes)])

    try:
        return await asyncio.wait_for(read(), settings.body_seconds)
    except asyncio.TimeoutError:
        raise RequestTimeout(f"The body did not come within {settings.body_seconds:g} s") from None


async def _read_up_to(request: Request, max_bytes: int) -> AsyncIterator[bytes]:
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > max_bytes):
        raise _too_large(max_bytes)
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size > max_bytes:
            raise _too_large(max_bytes)
        yield piece


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body is larger than the {max_bytes} bytes this server accepts")


def _check_media_type(request: Request) -> None:
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise HTTPException(415, "Content-Encoding: compressed bodies are not supported, send plain JSON")
    media_type, *parameters = request.headers.get("content-type", "").lower().split(";")
    media_type = media_type.strip()
    if media_type and media_type != "application/json" and not media_type.endswith("+json"):
        raise HTTPException(415, "Content-Type: must be application/json (curl: -H 'Content-Type: application/json')")
    for parameter in parameters:
        name, _, value = parameter.strip().partition("=")
        if name == "charset" and value.strip("\"' ") not in ("utf-8", "utf8", "us-ascii"):
            raise HTTPException(415, "Content-Type: the charset must be utf-8")
