"""The model's tokenizer for those who only want to see tokens.

Owns: the way from a request's prompt to ids, and back (implements turn_api.Tokens); in threads, because a long text
takes a while. Knows nothing of sessions, engines or HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from phi_cluster.cluster.prompt import PromptReader
from phi_cluster.cluster.turn_api import TurnRequest
from phi_cluster.model.tokenizer import Tokenizer


class Tokenization:
    """See turn_api.Tokens."""

    def __init__(self, tokenizer: Tokenizer, max_model_len: int):
        self._tokenizer = tokenizer
        self._prompts = PromptReader(tokenizer, max_model_len)

    async def of_prompt(self, request: TurnRequest, *, add_special_tokens: bool) -> list[int]:
        return await asyncio.to_thread(self._encode, request, add_special_tokens)

    async def names(self, token_ids: Sequence[int]) -> list[str]:
        return await asyncio.to_thread(lambda: [self._tokenizer.token_name(token_id) for token_id in token_ids])

    async def text(self, token_ids: Sequence[int]) -> str:
        return await asyncio.to_thread(self._tokenizer.decode, token_ids, with_special=True)

    def _encode(self, request: TurnRequest, add_special_tokens: bool) -> list[int]:
        token_ids = self._tokenizer.encode(self._prompts.render(request))
        return self._tokenizer.surrounded(token_ids) if add_special_tokens else token_ids
