"""/v1/responses: made, read, ended and deleted by name.

Owns: these routes and what their parameters may be. Knows nothing of how responses are made and kept.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Path
from starlette.requests import Request
from starlette.responses import Response

from phi_cluster.cluster.errors import ContextOverflow, InvalidRequest
from phi_cluster.cluster.http.auth import tenant_of
from phi_cluster.cluster.http.body import read_object
from phi_cluster.cluster.http.caller import RESUME_HEADER, SESSION_HEADER, Caller, caller_of
from phi_cluster.cluster.http.edge import Edge
from phi_cluster.cluster.http.errors import to_json
from phi_cluster.cluster.http.item_schemas import ItemList
from phi_cluster.cluster.http.models import check_model
from phi_cluster.cluster.http.openapi import TRACE_PARAMETER, answer_docs, body_docs, stream_docs
from phi_cluster.cluster.http.paging import PAGE_PARAMETERS, flag_of, item_list, page_of, query_of
from phi_cluster.cluster.http.response_format import response_json
from phi_cluster.cluster.http.response_schemas import (
    INCLUDES,
    ResponseDeleted,
    ResponseEvent,
    ResponseObject,
    ResponseRequest,
    new_response,
)
from phi_cluster.cluster.http.response_sending import ResponseStream, WholeResponse
from phi_cluster.cluster.http.schemas import sampling_of
from phi_cluster.cluster.http.strict_model import validated

ResponseId = Annotated[str, Path(description="as the response has it: resp_ and 32 hexadecimal digits")]

_READ_PARAMETERS = [
    {"name": "stream", "in": "query", "required": False, "schema": {"type": "boolean", "default": False}},
    {
        "name": "starting_after",
        "in": "query",
        "required": False,
        "description": "with stream: the sequence_number of the last event that came",
        "schema": {"type": "integer", "minimum": 0},
    },
    {
        "name": "include",
        "in": "query",
        "required": False,
        "description": "accepted, without effect: a response that was asked for them has its log probabilities",
        "schema": {"type": "array", "items": {"type": "string", "enum": list(INCLUDES)}},
    },
    {
        "name": "include_obfuscation",
        "in": "query",
        "required": False,
        "description": "accepted, without effect",
        "schema": {"type": "boolean"},
    },
]


def responses_router(edge: Edge) -> APIRouter:
    """The endpoints, over `edge`. A key sees only its own responses."""
    router = APIRouter(prefix="/v1/responses", tags=["responses"])
    responses, settings = edge.responses, edge.settings

    def tenant(request: Request, known: tuple[str, ...] = ()) -> str:
        query_of(request, known)
        return tenant_of(request)

    @router.post("", **stream_docs(ResponseRequest, ResponseObject, ResponseEvent, [TRACE_PARAMETER]))
    async def create_response(request: Request) -> Response:
        """The model's next message."""
        caller = _checked_caller(request)
        fields = validated(ResponseRequest, await read_object(request, settings))
        check_model(fields.model, settings)
        if fields.max_output_tokens is not None and fields.max_output_tokens > settings.max_model_len:
            raise ContextOverflow(
                f"max_output_tokens must be at most {settings.max_model_len}, the model's context length in tokens, "
                f"not {fields.max_output_tokens}",
                param="max_output_tokens",
            )
        new = new_response(fields, settings, sampling_of(fields, settings), caller)
        create = partial(responses.create, new)
        if fields.stream:
            return ResponseStream(create, settings)
        return WholeResponse(create, settings)

    @router.get(
        "/{response_id}", **stream_docs(None, ResponseObject, ResponseEvent, parameters=_READ_PARAMETERS, errors=(404,))
    )
    async def get_response(request: Request, response_id: ResponseId) -> Response:
        """As it stands; with `stream`, its events from the beginning, or behind `starting_after`."""
        given = query_of(request, ("stream", "starting_after", "include_obfuscation"), INCLUDES)
        flag_of(given, "include_obfuscation")
        owner = tenant_of(request)
        if flag_of(given, "stream"):
            return ResponseStream(
                partial(responses.read, owner, response_id),
                settings,
                starting_after=_starting_after(given),
            )
        if "starting_after" in given:
            raise InvalidRequest("starting_after is only allowed with stream=true", param="starting_after")
        return _json(response_json(await responses.get(owner, response_id)))

    @router.post("/{response_id}/cancel", **body_docs(None, ResponseObject, 404))
    async def cancel_response(request: Request, response_id: ResponseId) -> Response:
        """Ends a response in the background, with what has been said."""
        if await read_object(request, settings, may_be_empty=True):
            raise InvalidRequest("this takes no fields: send no body, or {}")
        return _json(response_json(await responses.cancel(tenant(request), response_id)))

    @router.delete("/{response_id}", **answer_docs(ResponseDeleted, 400, 404))
    async def delete_response(request: Request, response_id: ResponseId) -> Response:
        """Leaves nothing of it; one that is being made ends. Responses that go on from it lose what was said in it."""
        await responses.delete(tenant(request), response_id)
        return _json({"id": response_id, "object": "response", "deleted": True})

    @router.get("/{response_id}/input_items", **answer_docs(ItemList, 400, 404, parameters=PAGE_PARAMETERS))
    async def list_input_items(request: Request, response_id: ResponseId) -> Response:
        """The messages that were its input, without those of responses before it."""
        page = page_of(request)
        found = await responses.input_items(tenant_of(request), response_id, page)
        return Response(item_list(found), media_type="application/json")

    return router


def _checked_caller(request: Request) -> Caller:
    caller = caller_of(request)
    # Other headers that may name a session are sent by clients that do so everywhere.
    if SESSION_HEADER in request.headers:
        raise InvalidRequest(
            f"{SESSION_HEADER}: a response's session is that of its conversation, or of previous_response_id: leave "
            "the header out",
            param=SESSION_HEADER,
        )
    if caller.resume_from is not None:
        raise InvalidRequest(
            f"{RESUME_HEADER}: responses are read on by GET /v1/responses/ID?stream=true&starting_after=N",
            param=RESUME_HEADER,
        )
    return caller


def _starting_after(given: dict[str, str]) -> int:
    number = given.get("starting_after")
    if number is None:
        return -1
    if not re.fullmatch("[0-9]{1,9}", number, re.ASCII):
        raise InvalidRequest("starting_after must be an event's sequence_number", param="starting_after")
    return int(number)


def _json(value: dict[str, object]) -> Response:
    return Response(to_json(value), media_type="application/json")
