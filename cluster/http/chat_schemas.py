"""The bodies of /v1/chat/completions.

Owns: the request's messages and fields, and the shapes of the responses (for the OpenAPI document; responses
are built in chat.py). Knows nothing of how a turn runs.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema, model_validator

from phi_cluster.cluster.http.content_parts import texts_of
from phi_cluster.cluster.http.schemas import NOT_SUPPORTED, ChoiceFields, Usage
from phi_cluster.cluster.http.strict_model import StrictModel, refusal
from phi_cluster.model.sampling_params import MAX_LOGPROBS

MAX_MESSAGES = 4096

_Role = Literal["system", "developer", "user", "assistant"]


def _known_role(given: Any) -> Any:
    if given in ("tool", "function"):
        raise refusal(f"the role {given} is not supported yet, because tools are not")
    return given


def _joined_parts(given: Any) -> Any:
    """Content as one string: text parts are joined by line ends, as vLLM does."""
    return "\n".join(texts_of(given, ("text",)))


_CONTENT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
                "additionalProperties": False,
            },
        },
    ]
}


class ChatMessage(StrictModel):
    """One message. What the `openai` client adds to a reply that is sent back is accepted while empty."""

    not_supported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "annotations": ([],),
        "audio": (),
        "function_call": (),
        "reasoning": ("",),
        "reasoning_content": ("",),
        "refusal": ("",),
        "tool_call_id": (),
        "tool_calls": ([],),
    }

    role: Annotated[_Role, BeforeValidator(_known_role)]
    content: Annotated[str, BeforeValidator(_joined_parts), WithJsonSchema(_CONTENT_SCHEMA)]
    name: str | None = Field(None, min_length=1, max_length=64)

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it: OpenAI's developer is the system's new name."""
        message = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        if self.name is not None:
            message["name"] = self.name
        return message


class ChatRequest(ChoiceFields):
    """POST /v1/chat/completions."""

    not_supported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **NOT_SUPPORTED,
        "audio": (),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "documents": ([],),
        "echo": (False,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "include_reasoning": (True, False),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "reasoning_effort": (),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="newer name of max_tokens")
    logprobs: bool = Field(False, description="tell each token's log probability")
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="and the likeliest; only with logprobs")
    add_generation_prompt: bool = Field(True, description="begin a new assistant message")
    continue_final_message: bool = Field(False, description="go on with the last message, the assistant's own")
    # Accepted, without effect.
    metadata: dict[str, str] | None = Field(None, description="accepted, without effect")
    parallel_tool_calls: bool | None = Field(None, description="accepted, without effect: there are no tools")
    prompt_cache_key: str | None = Field(
        None,
        max_length=512,
        description="without a session's name: of two conversations that the messages continue equally, the one that "
        "had this key before is meant",
    )
    prompt_cache_retention: str | None = Field(None, description="accepted, without effect")
    safety_identifier: str | None = Field(None, description="accepted, without effect")
    service_tier: str | None = Field(None, description="accepted, without effect")

    @model_validator(mode="after")
    def _check_messages(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise refusal("{param} and max_tokens are one limit by two names: send one", "max_completion_tokens")
        if self.top_logprobs and not self.logprobs:
            raise refusal("{param} is only allowed with logprobs: true", "top_logprobs")
        if self.continue_final_message:
            if self.add_generation_prompt and "add_generation_prompt" in self.model_fields_set:
                raise refusal("{param} excludes add_generation_prompt: send one", "continue_final_message")
            if self.messages[-1].role != "assistant":
                raise refusal("{param}: the last message must be the assistant's", "continue_final_message")
        return self

    @property
    def reply_limit(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class ReplyMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatTokenChoice(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatTokenChoice):
    top_logprobs: list[ChatTokenChoice]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob]
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class ChatCompletionChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
