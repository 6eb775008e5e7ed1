"""Items as clients send and get them: the messages of responses and conversations, calls and their results.

Owns: what an item may be, and its shape in responses. Knows nothing of what becomes of items.
"""

from __future__ import annotations

import uuid
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    model_validator,
)

from phi_cluster.cluster.http.content_parts import texts_of
from phi_cluster.cluster.http.strict_model import StrictModel, refusal, untold
from phi_cluster.cluster.http.tool_schemas import CallId, ToolName
from phi_cluster.cluster.response_api import Item

MAX_ITEMS = 4096
# How many may be added to a conversation at a time, as OpenAI's.
MAX_ADDED_ITEMS = 20

_TEXT_PARTS = ("input_text", "output_text", "text")
# What a client adds to the text of a reply that it sends back: the values that say nothing.
_EMPTY: dict[str, tuple[Any, ...]] = {
    "annotations": ([], None),
    "prompt_cache_breakpoint": (None,),
}


def _texts(given: Any) -> list[str]:
    # Log probabilities come back with the reply that they are of.
    return texts_of(given, _TEXT_PARTS, _EMPTY, ignored=("logprobs",))


_CONTENT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {"type": {"enum": list(_TEXT_PARTS)}, "text": {"type": "string"}},
                "required": ["type", "text"],
            },
        },
    ]
}


class InputItem(StrictModel):
    """A message. A reply that is sent back as it came is one too; ids are given anew."""

    not_supported: ClassVar[dict[str, tuple[Any, ...]]] = {"phase": ("final_answer",)}

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[list[str], BeforeValidator(_texts), WithJsonSchema(_CONTENT_SCHEMA)]
    id: str | None = Field(None, max_length=128, description="accepted, without effect")
    status: Literal["in_progress", "completed", "incomplete"] | None = Field(None, description="kept")

    # Before the names of fields, which other types have.
    @model_validator(mode="before")
    @classmethod
    def _check_type(cls, given: Any) -> Any:
        kind = given.get("type") if isinstance(given, dict) else None
        if not isinstance(kind, str) or kind == "message":
            return given
        if kind == "item_reference":
            raise refusal("{param}: item_reference is not for here: send the message itself", "type")
        if kind == "reasoning":
            raise refusal("{param}: reasoning is not supported: this model does not reason apart", "type")
        raise refusal(f"{{param}}: {kind[:32]} is not supported: tools are functions that the client calls", "type")

    def as_item(self) -> Item:
        """See response_api.Item; with an id of its own."""
        if self.role == "assistant":
            content = [
                {"type": "output_text", "text": text, "annotations": [], "logprobs": []} for text in self.content
            ]
        else:
            content = [{"type": "input_text", "text": text} for text in self.content]
        head = {"type": "message", "id": f"msg_{uuid.uuid4().hex}", "role": self.role}
        return {**head, "status": self.status or "completed", "content": content}


_OF_OTHER_TOOLS: dict[str, tuple[Any, ...]] = {"caller": (), "created_by": (), "namespace": ()}


class CallItem(StrictModel):
    """A call of a tool: as it came in a response. Ids of items are given anew, the call's stays."""

    not_supported: ClassVar[dict[str, tuple[Any, ...]]] = {
        # As the official client's objects dump it.
        "async": (False,),
        "async_": (False,),
        **_OF_OTHER_TOOLS,
    }

    type: Literal["function_call"]
    call_id: CallId
    name: ToolName
    arguments: str = Field(description="JSON text; as a model wrote it, so perhaps none")
    id: str | None = Field(None, max_length=128, description="accepted, without effect")
    status: Literal["in_progress", "completed", "incomplete"] | None = Field(None, description="kept")

    def as_item(self) -> Item:
        """See response_api.Item; with an id of its own."""
        head = {"type": "function_call", "id": f"fc_{uuid.uuid4().hex}", "call_id": self.call_id, "name": self.name}
        return {**head, "arguments": self.arguments, "status": self.status or "completed"}


class ResultItem(StrictModel):
    """What came of a call."""

    not_supported: ClassVar[dict[str, tuple[Any, ...]]] = _OF_OTHER_TOOLS

    type: Literal["function_call_output"]
    call_id: CallId
    name: ToolName | None = Field(None, description="accepted, without effect")
    output: Annotated[list[str], BeforeValidator(_texts), WithJsonSchema(_CONTENT_SCHEMA)]
    id: str | None = Field(None, max_length=128, description="accepted, without effect")
    status: Literal["in_progress", "completed", "incomplete"] | None = Field(None, description="kept")

    def as_item(self) -> Item:
        """See response_api.Item; with an id of its own."""
        head = {"type": "function_call_output", "id": f"fco_{uuid.uuid4().hex}", "call_id": self.call_id}
        return {**head, "output": "\n".join(self.output), "status": self.status or "completed"}


class ItemReference(StrictModel):
    """An item that is named instead of sent."""

    type: Literal["item_reference"]
    id: Annotated[str, Field(min_length=1, max_length=128)]

    def as_item(self) -> Item:
        """See response_api.NewResponse.input."""
        return {"type": "item_reference", "id": self.id}


def _kind(given: Any) -> str:
    """What is none of these is for messages to refuse."""
    kind = given.get("type") if isinstance(given, dict) else None
    return untold(kind if kind in ("function_call", "function_call_output") else "message")


def _any_kind(given: Any) -> str:
    is_reference = isinstance(given, dict) and given.get("type") == "item_reference"
    return untold("item_reference") if is_reference else _kind(given)


_Message = Annotated[InputItem, Tag(untold("message"))]
_Call = Annotated[CallItem, Tag(untold("function_call"))]
_Result = Annotated[ResultItem, Tag(untold("function_call_output"))]
_Reference = Annotated[ItemReference, Tag(untold("item_reference"))]
# What is said, called or answered.
NewItem = Annotated[_Message | _Call | _Result, Discriminator(_kind)]
# Or a reference to what is kept.
AnyItem = Annotated[_Message | _Call | _Result | _Reference, Discriminator(_any_kind)]


def _metadata(given: Any) -> Any:
    if isinstance(given, dict):
        if len(given) > 16:
            raise refusal("must have at most 16 keys")
        for name, value in given.items():
            if len(name) > 64 or (isinstance(value, str) and len(value) > 512):
                raise refusal("its keys may have 64 characters and its values 512")
    return given


# What clients attach to responses and conversations.
Metadata = Annotated[dict[str, str], BeforeValidator(_metadata)]


class Part(BaseModel):
    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class MessageItem(BaseModel):
    id: str
    type: Literal["message"]
    role: Literal["user", "assistant", "system", "developer"]
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[Part]


class FunctionCallItem(BaseModel):
    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    status: Literal["in_progress", "completed", "incomplete"]


class FunctionCallOutputItem(BaseModel):
    id: str
    type: Literal["function_call_output"]
    call_id: str
    output: str
    status: Literal["in_progress", "completed", "incomplete"]


SomeItem = MessageItem | FunctionCallItem | FunctionCallOutputItem


class ItemList(BaseModel):
    object: Literal["list"]
    data: list[SomeItem]
    has_more: bool
    first_id: str
    last_id: str
