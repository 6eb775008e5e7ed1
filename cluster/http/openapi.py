"""The OpenAPI document of endpoints that read their bodies themselves.

Owns: how request and response models get into the document. Knows nothing of the endpoints' work.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from phi_cluster.cluster.http.caller import (
    DETAILS_HEADER,
    POSITION_PATTERN,
    REQUEST_ID_HEADER,
    REQUEST_ID_PATTERN,
    RESUME_HEADER,
    SESSION_HEADER,
    SESSION_ID_PATTERN,
    SESSION_ID_RULE,
    TRACE_HEADER,
)
from phi_cluster.cluster.http.schemas import ErrorBody

_REF = "#/components/schemas/{model}"
_ERROR_RESPONSE = {
    status: {
        "description": description,
        "content": {"application/json": {"schema": {"$ref": _REF.format(model=ErrorBody.__name__)}}},
    }
    for status, description in (
        (400, "Something is wrong with the headers"),
        (401, "No valid API key"),
        (403, "Not for this key, or not from this page"),
        (500, "The server failed"),
    )
}


def error_docs(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that may answer with errors of these statuses."""
    return {status: {"model": ErrorBody} for status in statuses}


def _header(name: str, description: str, pattern: str | None = None) -> dict[str, Any]:
    return {
        "name": name,
        "in": "header",
        "required": False,
        "description": description,
        "schema": {"type": "string"} | ({} if pattern is None else {"pattern": pattern}),
    }


TRACE_PARAMETER = _header(TRACE_HEADER, "a trace (W3C Trace Context) that this request is a part of")


def generation_docs(request: type[BaseModel], whole: type[BaseModel], chunk: type[BaseModel]) -> dict[str, Any]:
    """Keyword arguments of a route that takes `request` and answers with `whole` or a stream of `chunk`s."""
    stream = {"schema": {"$ref": _REF.format(model=chunk.__name__)}}
    headers = [
        _header(SESSION_HEADER, f"the conversation to continue: {SESSION_ID_RULE}", SESSION_ID_PATTERN),
        _header(DETAILS_HEADER, "1: add serving details as the field `phi`"),
        _header(
            RESUME_HEADER,
            "read an interrupted reply on behind this position, the id of the last event that came; 0: all of it. With "
            f"{REQUEST_ID_HEADER} as the interrupted response had it, and the same body",
            POSITION_PATTERN,
        ),
        TRACE_PARAMETER,
        _header(REQUEST_ID_HEADER, f"with {RESUME_HEADER} only: the interrupted response's", REQUEST_ID_PATTERN),
    ]
    return {
        "response_model": None,
        "responses": {
            200: {"model": whole, "content": {"text/event-stream": stream}},
            **error_docs(400, 404, 408, 409, 413, 415, 422, 429, 500, 503),
        },
        "openapi_extra": {
            "parameters": headers,
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": {"$ref": _REF.format(model=request.__name__)}}},
            },
        },
    }


def answer_docs(
    answer: type[BaseModel], *errors: int, parameters: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Keyword arguments of a route without a body that answers with `answer`."""
    return {
        "response_model": None,
        "responses": {200: {"model": answer}, **error_docs(*errors, 500, 503)},
        "openapi_extra": {"parameters": parameters or []},
    }


def body_docs(request: type[BaseModel] | None, answer: type[BaseModel], *errors: int) -> dict[str, Any]:
    """As `answer_docs`, of a route that takes a `request` (None: nothing, or an empty object)."""
    docs = answer_docs(answer, 400, *errors, 413, 415)
    schema = {"type": "object"} if request is None else {"$ref": _REF.format(model=request.__name__)}
    docs["openapi_extra"]["requestBody"] = {
        "required": request is not None,
        "content": {"application/json": {"schema": schema}},
    }
    return docs


def stream_docs(
    request: type[BaseModel] | None,
    whole: type[BaseModel],
    event: type[BaseModel],
    parameters: list[dict[str, Any]] | None = None,
    errors: tuple[int, ...] = (404, 409, 422, 429),
) -> dict[str, Any]:
    """As `body_docs` (without a request: as `answer_docs`), of a route that may also answer with a stream of events."""
    docs = answer_docs(whole, 400, *errors) if request is None else body_docs(request, whole, *errors)
    stream = {"schema": {"$ref": _REF.format(model=event.__name__)}}
    docs["responses"][200] = {"model": whole, "content": {"text/event-stream": stream}}
    docs["openapi_extra"]["parameters"] = parameters or []
    return docs


def install_openapi(
    app: FastAPI, requests: list[type[BaseModel]], chunks: list[type[BaseModel]], open_paths: frozenset[str]
) -> None:
    """Makes `app.openapi()` define the models that routes only refer to, and what is true of all of them but
    `open_paths`: what the door answers."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            _, definitions = models_json_schema(
                [
                    *((model, "validation") for model in requests),
                    *((model, "serialization") for model in chunks),
                ],
                ref_template=_REF,
            )
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    _complete(operation, path in open_paths)
            document.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            components = document["components"].setdefault("schemas", {})
            for name, schema in definitions["$defs"].items():
                components.setdefault(name, schema)
            for unused in ("HTTPValidationError", "ValidationError"):
                components.pop(unused, None)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(operation: dict[str, Any], is_open: bool) -> None:
    responses = operation["responses"]
    # What FastAPI says of every route with a parameter. Where we answer so, the route has said it in its own words.
    if "HTTPValidationError" in str(responses.get("422")):
        del responses["422"]
    errors = [500] if is_open else [400, 401, 403, 500]
    for status in errors:
        responses.setdefault(str(status), _ERROR_RESPONSE[status])
    if not is_open:
        # A server without keys asks for none.
        operation["security"] = [{"key": []}, {}]
