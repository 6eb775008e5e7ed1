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
from phi_cluster.cluster.http.tool_results import first_orphan
from phi_cluster.cluster.http.tool_schemas import (
    MAX_TOOLS,
    CallDelta,
    CallId,
    ChatTool,
    ChatToolCall,
    ChatToolChoice,
    SaidCall,
    tool_use_of,
)
from phi_cluster.cluster.turn_api import FinishReason, ToolUse
from phi_cluster.model.sampling_params import MAX_LOGPROBS

MAX_MESSAGES = 4096

_Role = Literal["system", "developer", "user", "assistant", "tool"]


def _known_role(given: Any) -> Any:
    if given == "function":
        raise refusal("function is the older form of tool: send results with the role tool")
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
    }

    role: Annotated[_Role, BeforeValidator(_known_role)]
    content: Annotated[str | None, BeforeValidator(_joined_parts), WithJsonSchema(_CONTENT_SCHEMA)] = Field(
        None, description="may be left out of an assistant's message with tool_calls"
    )
    name: str | None = Field(None, min_length=1, max_length=64)
    tool_calls: list[ChatToolCall] = Field(default_factory=list, max_length=MAX_TOOLS, description="the assistant's")
    tool_call_id: CallId | None = Field(None, description="of the role tool: the call that this is the result of")

    @model_validator(mode="after")
    def _check_role(self) -> ChatMessage:
        if self.tool_calls and self.role != "assistant":
            raise refusal("{param} belongs to the role assistant", "tool_calls")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise refusal("{param} belongs to the role tool, and is required there", "tool_call_id")
        if self.content is None and not self.tool_calls:
            raise refusal("{param} is required", "content")
        ids = [call.id for call in self.tool_calls]
        if len(set(ids)) < len(ids):
            raise refusal("{param}: two of the calls have the same id", "tool_calls")
        return self

    def for_turn(self) -> dict[str, Any]:
        """As in `TurnRequest.messages`: OpenAI's developer is the system's new name."""
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": self.content or ""}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "name": call.function.name, "arguments": call.function.arguments}
                for call in self.tool_calls
            ]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
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
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="newer name of max_tokens")
    logprobs: bool = Field(False, description="tell each token's log probability")
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="and the likeliest; only with logprobs")
    tools: list[ChatTool] = Field(
        default_factory=list, max_length=MAX_TOOLS, description="functions that the reply may ask its client to call"
    )
    tool_choice: ChatToolChoice | None = Field(None, description="left out: auto")
    parallel_tool_calls: bool = Field(True, description="false: at most one call in a reply")
    add_generation_prompt: bool = Field(True, description="begin a new assistant message")
    continue_final_message: bool = Field(False, description="go on with the last message, the assistant's own")
    # Accepted, without effect.
    metadata: dict[str, str] | None = Field(None, description="accepted, without effect")
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
            if self.messages[-1].tool_calls:
                raise refusal("{param}: a message that has called tools is complete", "continue_final_message")
        orphan = first_orphan(self.turn_messages)
        if orphan is not None:
            answered = f"messages[{orphan}].tool_call_id"
            raise refusal("{param} is no call's of the assistant's message before it that waits for a result", answered)
        return self

    @property
    def turn_messages(self) -> list[dict[str, Any]]:
        """As `TurnRequest.messages`."""
        return [message.for_turn() for message in self.messages]

    @property
    def tool_use(self) -> ToolUse | None:
        return tool_use_of(self.tools, self.tool_choice, self.parallel_tool_calls, ".function")

    @property
    def reply_limit(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class ReplyMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[SaidCall] | None = None


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
    finish_reason: FinishReason


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
    tool_calls: list[CallDelta] | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
