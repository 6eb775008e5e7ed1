"""POST /tokenize and /detokenize, as vLLM's.

Owns: their bodies, and the check that ids are tokens. Knows nothing of how the tokenizer works.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from fastapi import APIRouter
from pydantic import BaseModel, BeforeValidator, Field, model_validator
from starlette.requests import Request
from starlette.responses import Response

from phi_cluster.cluster.http.auth import tenant_of
from phi_cluster.cluster.http.body import read_object
from phi_cluster.cluster.http.chat_schemas import MAX_MESSAGES, ChatMessage
from phi_cluster.cluster.http.edge import Edge
from phi_cluster.cluster.http.errors import to_json
from phi_cluster.cluster.http.models import check_model
from phi_cluster.cluster.http.openapi import body_docs
from phi_cluster.cluster.http.schemas import check_token_ids
from phi_cluster.cluster.http.strict_model import StrictModel, refusal, validated
from phi_cluster.cluster.http.tool_schemas import MAX_TOOLS, ChatTool, tool_use_of
from phi_cluster.cluster.turn_api import ToolUse, TurnRequest


class TokenizeRequest(StrictModel):
    """POST /tokenize: of `prompt` and `messages` exactly one."""

    not_supported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "mm_processor_kwargs": ({},),
    }

    model: str | None = Field(None, description="a name from /v1/models; left out: the model served here")
    prompt: str | None = Field(None, description="plain text, as in /v1/completions")
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=MAX_MESSAGES, description="as in a chat")
    tools: list[ChatTool] = Field(default_factory=list, max_length=MAX_TOOLS, description="of messages: as in a chat")
    add_special_tokens: bool | None = Field(
        None,
        description="what the tokenizer puts around a text, too; left out: true for a prompt, false for messages",
    )
    add_generation_prompt: bool = Field(True, description="of messages: begin a new assistant message")
    continue_final_message: bool = Field(False, description="of messages: go on with the last one, the assistant's own")
    return_token_strs: bool = Field(False, description="tell the tokens as the tokenizer's file writes them, too")

    @model_validator(mode="after")
    def _check_one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise refusal("send either prompt or messages", "prompt")
        if self.tools and self.messages is None:
            raise refusal("{param} belong to messages", "tools")
        if self.continue_final_message:
            if self.messages is None or self.messages[-1].role != "assistant":
                raise refusal("{param}: the last message must be the assistant's", "continue_final_message")
            if self.add_generation_prompt and "add_generation_prompt" in self.model_fields_set:
                raise refusal("{param} excludes add_generation_prompt: send one", "continue_final_message")
        tool_use_of(self.tools, None, True, ".function")
        return self

    @property
    def tool_use(self) -> ToolUse | None:
        return tool_use_of(self.tools, None, True, ".function")


def _integers(given: Any) -> Any:
    # A set of types: millions of ids go through here, and bool is an int to isinstance.
    if not isinstance(given, list) or set(map(type, given)) - {int}:
        raise refusal("must be an array of token ids, all of them integers")
    return given


class DetokenizeRequest(StrictModel):
    """POST /detokenize."""

    model: str | None = Field(None, description="a name from /v1/models; left out: the model served here")
    tokens: Annotated[list[int], BeforeValidator(_integers)] = Field(description="ids; special tokens are told by name")


class Tokenized(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(BaseModel):
    prompt: str


def tokenize_router(edge: Edge) -> APIRouter:
    """The endpoints, over `edge`."""
    router = APIRouter(tags=["tokens"])
    settings = edge.settings

    @router.post("/tokenize", **body_docs(TokenizeRequest, Tokenized, 404, 408))
    async def tokenize(request: Request) -> Response:
        """The ids that a request with this prompt, or these messages, would have. Nothing is computed or kept."""
        asked = validated(TokenizeRequest, await read_object(request, settings))
        check_model(asked.model, settings)
        is_special = asked.messages is None if asked.add_special_tokens is None else asked.add_special_tokens
        token_ids = await edge.tokens.of_prompt(_turn(asked, tenant_of(request)), add_special_tokens=is_special)
        answer = Tokenized(
            count=len(token_ids),
            max_model_len=settings.max_model_len,
            tokens=token_ids,
            token_strs=await edge.tokens.names(token_ids) if asked.return_token_strs else None,
        )
        return Response(to_json(answer.model_dump()), media_type="application/json")

    @router.post("/detokenize", **body_docs(DetokenizeRequest, Detokenized, 404, 408))
    async def detokenize(request: Request) -> Response:
        """The text of ids."""
        asked = validated(DetokenizeRequest, await read_object(request, settings))
        check_model(asked.model, settings)
        check_token_ids("tokens", asked.tokens, settings.vocab_size)
        return Response(to_json({"prompt": await edge.tokens.text(asked.tokens)}), media_type="application/json")

    return router


def _turn(asked: TokenizeRequest, tenant: str) -> TurnRequest:
    """The turn whose prompt is meant."""
    return TurnRequest(
        tenant=tenant,
        session_id=None,
        request_id="",
        sampling={},
        messages=None if asked.messages is None else [message.for_turn() for message in asked.messages],
        prompt=asked.prompt,
        tool_use=asked.tool_use,
        add_generation_prompt=asked.add_generation_prompt and not asked.continue_final_message,
        continue_final_message=asked.continue_final_message,
    )
