"""The bodies of /v1/responses.

Owns: the request's fields, and the shapes of responses and their events (for the OpenAPI document; they are built in
response_format.py). Knows nothing of how a response is made.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from phi_cluster.cluster.http.caller import Caller
from phi_cluster.cluster.http.edge import EdgeSettings
from phi_cluster.cluster.http.item_schemas import MAX_ITEMS, AnyItem, FunctionCallItem, MessageItem, Metadata
from phi_cluster.cluster.http.schemas import NOT_SUPPORTED, GenerationFields
from phi_cluster.cluster.http.strict_model import StrictModel, refusal
from phi_cluster.cluster.http.structured_output import Schema, SchemaName
from phi_cluster.cluster.http.tool_schemas import MAX_TOOLS, ResponseTool, ResponseToolChoice, tool_use_of
from phi_cluster.cluster.response_api import NewResponse
from phi_cluster.cluster.turn_api import ToolUse, WantedFormat
from phi_cluster.model.sampling_params import MAX_LOGPROBS


def _input_items(given: Any) -> Any:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


def _conversation_id(given: Any) -> Any:
    if isinstance(given, dict):
        if given.keys() != {"id"}:
            raise refusal('must be a conversation\'s id, or {"id": ...}')
        return given["id"]
    return given


def _includes(given: Any) -> Any:
    for one in given if isinstance(given, list) else ():
        if one not in INCLUDES:
            raise refusal(f"{str(one)[:64]} is not supported: leave it out, there is only {INCLUDES[0]}")
    return given


# What a response may have beside what it has anyway.
INCLUDES = ("message.output_text.logprobs",)
_INPUT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "maxItems": MAX_ITEMS,
            "items": {
                "anyOf": [
                    {"$ref": "#/components/schemas/InputItem"},
                    {"$ref": "#/components/schemas/CallItem"},
                    {"$ref": "#/components/schemas/ResultItem"},
                    {
                        "type": "object",
                        "properties": {"type": {"const": "item_reference"}, "id": {"type": "string", "minLength": 1}},
                        "required": ["type", "id"],
                        "additionalProperties": False,
                    },
                ]
            },
        },
    ]
}
_CONVERSATION_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"]},
    ]
}


class TextFormat(StrictModel):
    """Chat's response_format without its inner object."""

    type: Literal["text", "json_object", "json_schema"]
    name: SchemaName | None = None
    description: str | None = Field(None, description="accepted, without effect")
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="replies follow the schema with and without it")

    @model_validator(mode="after")
    def _check_schema(self) -> TextFormat:
        for param, value in (("name", self.name), ("schema", self.schema_)):
            if (self.type == "json_schema") != (value is not None):
                raise refusal('{param} belongs to type "json_schema"', param)
        return self

    def described(self) -> dict[str, Any]:
        """As a response tells of it."""
        if self.type != "json_schema":
            return {"type": self.type}
        given = {"name": self.name, "schema": self.schema_, "description": self.description, "strict": self.strict}
        return {"type": self.type, **given}


class TextConfig(StrictModel):
    not_supported: ClassVar[dict[str, tuple[Any, ...]]] = {"verbosity": ("medium",)}

    format: TextFormat | None = None


class ResponseRequest(GenerationFields):
    """POST /v1/responses."""

    not_supported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **NOT_SUPPORTED,
        "access_programs": (),
        "background_options": (),
        "context_management": ([],),
        "echo": (False,),
        "image": (),
        "moderation": (),
        "n": (1,),
        "prompt": (),
        "prompt_cache_options": ({}, {"mode": "implicit"}),
        "reasoning": ({}, {"effort": None}, {"effort": "none"}, {"effort": None, "summary": None}),
    }

    input: Annotated[
        list[AnyItem], BeforeValidator(_input_items), Field(max_length=MAX_ITEMS), WithJsonSchema(_INPUT_SCHEMA)
    ] = Field(default_factory=list, description="text, or messages")
    instructions: str | None = Field(None, description="a system message before everything, for this response only")
    previous_response_id: str | None = Field(None, description="go on from this response")
    conversation: Annotated[str | None, BeforeValidator(_conversation_id), WithJsonSchema(_CONVERSATION_SCHEMA)] = (
        Field(None, description="the conversation that this response becomes a part of: its id, or {id}")
    )
    store: bool = Field(True, description="false: nothing of it is kept, it cannot be gone on from")
    background: bool = Field(False, description="answer at once; the response is made without its client")
    truncation: Literal["auto", "disabled"] = Field(
        "disabled", description="auto: the oldest turns are left out where all do not fit; disabled: that is an error"
    )
    max_output_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="most tokens in the reply")
    metadata: Metadata = Field(default_factory=dict, description="up to 16 texts, given back with the response")
    text: TextConfig | None = Field(None, description="what the reply looks like: text, JSON, or JSON by a schema")
    include: Annotated[list[Literal["message.output_text.logprobs"]], BeforeValidator(_includes)] = Field(
        default_factory=list, max_length=16, description="tell each token's log probability"
    )
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="and the likeliest; only with include of them"
    )
    tools: list[ResponseTool] = Field(
        default_factory=list, max_length=MAX_TOOLS, description="functions that the reply may ask its client to call"
    )
    tool_choice: ResponseToolChoice | None = Field(None, description="left out: auto")
    parallel_tool_calls: bool = Field(True, description="false: at most one call in a reply")
    max_tool_calls: int | None = Field(None, ge=1, description="accepted, without effect: of tools that run here")
    prompt_cache_key: str | None = Field(None, max_length=512, description="as in chats, with store: false")
    prompt_cache_retention: Literal["in_memory", "24h"] | None = Field(None, description="accepted, without effect")
    safety_identifier: str | None = Field(None, description="accepted, without effect")
    service_tier: str | None = Field(None, description="accepted, without effect")

    @model_validator(mode="after")
    def _check_response(self) -> ResponseRequest:
        if self.max_tokens is not None:
            raise refusal("{param} is not a field here: did you mean max_output_tokens?", "max_tokens")
        if self.response_format is not None:
            raise refusal("{param} is not a field here: did you mean text.format?", "response_format")
        if self.conversation is not None and self.previous_response_id is not None:
            raise refusal("{param} excludes conversation: send one of them", "previous_response_id")
        if not self.store and self.background:
            raise refusal("{param} needs store: true, or nobody could ask for the response", "background")
        if not self.store and self.conversation is not None:
            raise refusal("{param}: false excludes conversation, which keeps what is said", "store")
        if self.top_logprobs and not self.include:
            raise refusal(f'{{param}} is only allowed with include: ["{INCLUDES[0]}"]', "top_logprobs")
        has_context = self.conversation is not None or self.previous_response_id is not None
        if not self.input and not has_context:
            raise refusal("{param} is required: a string or an array of messages", "input")
        return self

    @property
    def reply_limit(self) -> int | None:
        return self.max_output_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.include else None

    @property
    def tool_use(self) -> ToolUse | None:
        return tool_use_of(self.tools, self.tool_choice, self.parallel_tool_calls, "")

    def formats(self) -> list[WantedFormat]:
        wanted = None if self.text is None else self.text.format
        if wanted is None or wanted.type == "text":
            return super().formats()
        if wanted.type == "json_object":
            return [WantedFormat("text.format", "json_object"), *super().formats()]
        return [WantedFormat("text.format.schema", "json_schema", wanted.schema_), *super().formats()]

    def described(self, settings: EdgeSettings) -> dict[str, object]:
        """`NewResponse.settings`: what a response tells of its request."""
        wanted = None if self.text is None else self.text.format
        return {
            "model": settings.served_model_names[0],
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": self.max_tool_calls,
            "metadata": self.metadata,
            "parallel_tool_calls": self.parallel_tool_calls,
            "prompt_cache_key": self.prompt_cache_key,
            "prompt_cache_retention": self.prompt_cache_retention,
            "safety_identifier": self.safety_identifier,
            "temperature": self.temperature,
            "text": {"format": wanted.described() if wanted is not None else {"type": "text"}},
            "tool_choice": "auto" if self.tool_choice is None else self.tool_choice[2],
            "tools": [tool.described() for tool in self.tools],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": self.top_p,
            "truncation": self.truncation,
            "user": self.user,
        }


def new_response(
    fields: ResponseRequest, settings: EdgeSettings, sampling: dict[str, Any], caller: Caller
) -> NewResponse:
    """What is asked for, as those who make it know it."""
    return NewResponse(
        tenant=caller.tenant,
        request_id=caller.request_id,
        input=[item.as_item() for item in fields.input],
        settings=fields.described(settings),
        sampling=sampling,
        stop=tuple(fields.stop),
        wanted_format=fields.wanted_format,
        tool_use=fields.tool_use,
        truncate=fields.truncation == "auto",
        background=fields.background,
        store=fields.store,
        previous_response_id=fields.previous_response_id,
        conversation_id=fields.conversation,
        traceparent=caller.traceparent,
    )


class InputTokensDetails(BaseModel):
    cached_tokens: int = Field(description="tokens of the input that the session's own KV cache saved")
    cache_write_tokens: int


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int


class ResponseTokens(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(BaseModel):
    code: str
    message: str


class IncompleteDetails(BaseModel):
    reason: Literal["max_output_tokens"]


class ConversationReference(BaseModel):
    id: str


class ResponseObject(BaseModel):
    """A response. Times are seconds since 1970."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    background: bool
    conversation: ConversationReference | None
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[MessageItem | FunctionCallItem]
    previous_response_id: str | None
    store: bool
    temperature: float
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponseTokens | None


class ResponseEvent(BaseModel):
    """An event of a response's stream, by its `type` as OpenAI's."""

    model_config = ConfigDict(extra="allow")

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
        "response.incomplete",
        "response.failed",
        "error",
    ]
    sequence_number: int


class ResponseDeleted(BaseModel):
    id: str
    object: Literal["response"]
    deleted: Literal[True]
