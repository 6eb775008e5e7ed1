"""A node's conversations as one replica sees them.

Owns: `ConversationKeeper` (implements response_api.Conversations): making them, and that what is deleted goes from the
sessions too. Knows nothing of SQLite, of responses and of HTTP.
"""

from __future__ import annotations

import uuid

from phi_cluster.cluster.response_api import Conversation, Item, ItemPage, Page
from phi_cluster.cluster.responses.forgetting import Forgetter
from phi_cluster.cluster.responses.store import ConversationStore
from phi_cluster.cluster.responses.store_thread import StoreThread
from phi_cluster.cluster.turn_api import Clock


class ConversationKeeper:
    """For one event loop."""

    def __init__(self, store: ConversationStore, clock: Clock, thread: StoreThread, forgetter: Forgetter):
        self._store = store
        self._clock = clock
        self._thread = thread
        self._forgetter = forgetter

    async def create(self, tenant: str, items: list[Item], metadata: dict[str, str]) -> Conversation:
        """See response_api.Conversations, here and below."""
        conversation = Conversation(f"conv_{uuid.uuid4().hex}", float(self._clock.time()), metadata)
        await self._thread.call(self._store.create, tenant, conversation, items)
        return conversation

    async def get(self, tenant: str, conversation_id: str) -> Conversation:
        return await self._thread.call(self._store.find, tenant, conversation_id)

    async def update(self, tenant: str, conversation_id: str, metadata: dict[str, str]) -> Conversation:
        return await self._thread.call(self._store.update, tenant, conversation_id, metadata, float(self._clock.time()))

    async def delete(self, tenant: str, conversation_id: str) -> None:
        await self._thread.call(self._store.delete, tenant, conversation_id)
        await self._forgetter.forget(tenant)

    async def add_items(self, tenant: str, conversation_id: str, items: list[Item]) -> None:
        await self._thread.call(self._store.add_items, tenant, conversation_id, items, float(self._clock.time()))

    async def items(self, tenant: str, conversation_id: str, page: Page) -> ItemPage:
        return await self._thread.call(self._store.items, tenant, conversation_id, page)

    async def item(self, tenant: str, conversation_id: str, item_id: str) -> Item:
        return await self._thread.call(self._store.item, tenant, conversation_id, item_id)

    async def delete_item(self, tenant: str, conversation_id: str, item_id: str) -> Conversation:
        conversation = await self._thread.call(self._store.delete_item, tenant, conversation_id, item_id)
        await self._forgetter.forget(tenant)
        return conversation
