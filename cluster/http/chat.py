"""POST /v1/chat/completions.

Owns: the way from a chat request to a `TurnRequest`, and the JSON of its replies. Knows nothing of templates,
tokens and engines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from phi_cluster.cluster.http.body import read_object
from phi_cluster.cluster.http.caller import Caller, caller_of, check_resumable
from phi_cluster.cluster.http.chat_schemas import ChatCompletion, ChatCompletionChunk, ChatRequest
from phi_cluster.cluster.http.edge import Edge
from phi_cluster.cluster.http.logprob_format import chat_logprobs
from phi_cluster.cluster.http.models import check_model
from phi_cluster.cluster.http.openapi import generation_docs
from phi_cluster.cluster.http.schemas import check_choices, sampling_of
from phi_cluster.cluster.http.strict_model import validated
from phi_cluster.cluster.http.tool_format import call_deltas, whole_calls
from phi_cluster.cluster.http.turn_response import TurnResponse
from phi_cluster.cluster.turn_api import CallPiece, Endpoint, FinishReason, TokenLogprob, TurnRequest, call_id


def chat_router(edge: Edge) -> APIRouter:
    """The endpoint, over `edge`."""
    router = APIRouter()
    settings = edge.settings

    @router.post(
        "/v1/chat/completions",
        tags=["chat"],
        **generation_docs(ChatRequest, ChatCompletion, ChatCompletionChunk),
    )
    async def create_chat_completion(request: Request) -> Response:
        """The assistant's next message."""
        caller = caller_of(request)
        chat = validated(ChatRequest, await read_object(request, settings))
        check_model(chat.model, settings)
        check_resumable(caller, chat.num_logprobs)
        check_choices(chat, caller, settings)
        turn = TurnRequest(
            tenant=caller.tenant,
            session_id=caller.session_id,
            request_id=caller.request_id,
            resume_from=caller.resume_from,
            sampling=sampling_of(chat, settings),
            messages=chat.turn_messages,
            stop=tuple(chat.stop),
            wanted_format=chat.wanted_format,
            tool_use=chat.tool_use,
            add_generation_prompt=chat.add_generation_prompt and not chat.continue_final_message,
            continue_final_message=chat.continue_final_message,
            cache_hint=chat.prompt_cache_key,
            num_choices=chat.num_choices,
            traceparent=caller.traceparent,
        )
        reply = ChatReply.begin(caller, edge)
        return TurnResponse(
            edge,
            caller,
            [turn],
            reply,
            stream=chat.stream,
            include_usage=chat.include_usage,
            continuous_usage=chat.continuous_usage,
            data_only=chat.data_only,
        )

    return router


@dataclass(frozen=True)
class ChatReply:
    """A `ReplyFormat`: OpenAI's chat.completion and its chunks."""

    id: str
    request_id: str
    created: int
    model: str
    system_fingerprint: str | None
    index: int = 0
    endpoint: Endpoint = "chat"

    @classmethod
    def begin(cls, caller: Caller, edge: Edge) -> ChatReply:
        settings = edge.settings
        return cls(
            id=f"chatcmpl-{caller.request_id}",
            request_id=caller.request_id,
            created=int(edge.clock.time()),
            model=settings.served_model_names[0],
            system_fingerprint=settings.system_fingerprint,
        )

    def of_choice(self, index: int) -> ChatReply:
        return replace(self, index=index)

    def opening(self) -> dict[str, Any]:
        return self._chunk([self._choice({"role": "assistant", "content": ""}, None)])

    def delta(
        self, text: str, logprobs: Sequence[TokenLogprob] | None, calls: Sequence[CallPiece] = ()
    ) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": text} if text or not calls else {}
        if calls:
            delta["tool_calls"] = call_deltas(calls, self._call_id)
        return self._chunk([self._choice(delta, None, logprobs)])

    def closing(self, finish_reason: FinishReason) -> dict[str, Any]:
        return self._chunk([self._choice({}, finish_reason)])

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._chunk([]), "usage": usage}

    def whole(
        self,
        text: str,
        logprobs: Sequence[TokenLogprob] | None,
        finish_reason: FinishReason,
        usage: dict[str, Any],
        calls: Sequence[CallPiece] = (),
    ) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message["content"] = text or None
            message["tool_calls"] = whole_calls(calls, self._call_id)
        choice = {
            "index": self.index,
            "message": message,
            "logprobs": None if logprobs is None else chat_logprobs(logprobs),
            "finish_reason": finish_reason,
        }
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage}

    def _call_id(self, call: CallPiece) -> str:
        if self.index == 0:
            return call_id(self.request_id, call.number)
        # A name as long as a request's.
        name = hashlib.blake2b(f"{self.request_id} choice {self.index}".encode(), digest_size=16).hexdigest()
        return call_id(name, call.number)

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk"), "choices": choices}

    def _choice(
        self,
        delta: dict[str, Any],
        finish_reason: FinishReason | None,
        logprobs: Sequence[TokenLogprob] | None = None,
    ) -> dict[str, Any]:
        told = None if logprobs is None else chat_logprobs(logprobs)
        return {"index": self.index, "delta": delta, "logprobs": told, "finish_reason": finish_reason}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }
