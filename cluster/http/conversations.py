"""/v1/conversations: what was said, kept by name, and looked after.

Owns: these routes and the bodies of their requests. Knows nothing of how conversations are kept and of sessions.
"""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Path
from pydantic import BaseModel, Field, RootModel
from starlette.requests import Request
from starlette.responses import Response

from phi_cluster.cluster.http.auth import tenant_of
from phi_cluster.cluster.http.body import read_object
from phi_cluster.cluster.http.edge import Edge
from phi_cluster.cluster.http.errors import to_json
from phi_cluster.cluster.http.item_schemas import MAX_ADDED_ITEMS, ItemList, Metadata, NewItem, SomeItem
from phi_cluster.cluster.http.openapi import answer_docs, body_docs
from phi_cluster.cluster.http.paging import PAGE_PARAMETERS, item_list, page_of, query_of
from phi_cluster.cluster.http.strict_model import StrictModel, validated
from phi_cluster.cluster.response_api import Conversation, ItemPage

ConversationId = Annotated[str, Path(description="as the conversation has it: conv_ and 32 hexadecimal digits")]
ItemId = Annotated[str, Path(description="as the item has it: msg_, fc_ or fco_ and hexadecimal digits")]


class NewConversation(StrictModel):
    """POST /v1/conversations."""

    items: list[NewItem] = Field(default_factory=list, max_length=MAX_ADDED_ITEMS)
    metadata: Metadata = Field(default_factory=dict)


class ConversationUpdate(StrictModel):
    """POST /v1/conversations/{conversation_id}: all metadata are replaced."""

    metadata: Metadata


class NewItems(StrictModel):
    """POST /v1/conversations/{conversation_id}/items."""

    items: list[NewItem] = Field(min_length=1, max_length=MAX_ADDED_ITEMS)


class AnyItemObject(RootModel[SomeItem]):
    """An item, by its type."""


class ConversationObject(BaseModel):
    id: str
    object: Literal["conversation"]
    created_at: int
    metadata: dict[str, str]


class ConversationDeleted(BaseModel):
    id: str
    object: Literal["conversation.deleted"]
    deleted: Literal[True]


def conversations_router(edge: Edge) -> APIRouter:
    """The endpoints, over `edge`. A key sees only its own conversations."""
    router = APIRouter(prefix="/v1/conversations", tags=["conversations"])
    conversations, settings = edge.conversations, edge.settings

    def tenant(request: Request) -> str:
        query_of(request, ())
        return tenant_of(request)

    @router.post("", **body_docs(NewConversation, ConversationObject))
    async def create_conversation(request: Request) -> Response:
        """A new conversation, empty or with messages."""
        new = validated(NewConversation, await read_object(request, settings, may_be_empty=True))
        items = [item.as_item() for item in new.items]
        return _described(await conversations.create(tenant(request), items, new.metadata))

    @router.get("/{conversation_id}", **answer_docs(ConversationObject, 400, 404))
    async def get_conversation(request: Request, conversation_id: ConversationId) -> Response:
        """Its name, age and metadata."""
        return _described(await conversations.get(tenant(request), conversation_id))

    @router.post("/{conversation_id}", **body_docs(ConversationUpdate, ConversationObject, 404))
    async def update_conversation(request: Request, conversation_id: ConversationId) -> Response:
        """Replaces its metadata."""
        update = validated(ConversationUpdate, await read_object(request, settings))
        return _described(await conversations.update(tenant(request), conversation_id, update.metadata))

    @router.delete("/{conversation_id}", **answer_docs(ConversationDeleted, 400, 404))
    async def delete_conversation(request: Request, conversation_id: ConversationId) -> Response:
        """Forgets its items and its session. Its responses stay until they are deleted, or expire."""
        await conversations.delete(tenant(request), conversation_id)
        return _json({"id": conversation_id, "object": "conversation.deleted", "deleted": True})

    @router.post("/{conversation_id}/items", **body_docs(NewItems, ItemList, 404))
    async def create_items(request: Request, conversation_id: ConversationId) -> Response:
        """Adds messages at its end."""
        new = validated(NewItems, await read_object(request, settings))
        items = [item.as_item() for item in new.items]
        await conversations.add_items(tenant(request), conversation_id, items)
        return Response(item_list(ItemPage(items, has_more=False)), media_type="application/json")

    @router.get("/{conversation_id}/items", **answer_docs(ItemList, 400, 404, parameters=PAGE_PARAMETERS))
    async def list_items(request: Request, conversation_id: ConversationId) -> Response:
        """Its messages, the last one first if nothing else is asked for."""
        page = page_of(request)
        found = await conversations.items(tenant_of(request), conversation_id, page)
        return Response(item_list(found), media_type="application/json")

    @router.get("/{conversation_id}/items/{item_id}", **answer_docs(AnyItemObject, 400, 404))
    async def get_item(request: Request, conversation_id: ConversationId, item_id: ItemId) -> Response:
        """One message."""
        return _json(await conversations.item(tenant(request), conversation_id, item_id))

    @router.delete("/{conversation_id}/items/{item_id}", **answer_docs(ConversationObject, 400, 404))
    async def delete_item(request: Request, conversation_id: ConversationId, item_id: ItemId) -> Response:
        """Forgets one message; later responses are made without it."""
        return _described(await conversations.delete_item(tenant(request), conversation_id, item_id))

    return router


def _described(conversation: Conversation) -> Response:
    return _json(
        {
            "id": conversation.id,
            "object": "conversation",
            "created_at": int(conversation.created_at),
            "metadata": conversation.metadata,
        }
    )


def _json(value: dict[str, object]) -> Response:
    return Response(to_json(value), media_type="application/json")
