"""Tools in requests: what may be called, and what must be.

Owns: the forms of `tools` and `tool_choice` in chats and in responses, and of the calls in a chat's messages. Knows
nothing of how tools are told of in a prompt, and of what a schema can ask for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema, model_validator

from phi_cluster.cluster.http.strict_model import StrictModel, refusal
from phi_cluster.cluster.http.structured_output import Schema
from phi_cluster.cluster.turn_api import Tool, ToolUse

# As OpenAI's.
MAX_TOOLS = 128
MAX_CALL_ID_LENGTH = 64
_NAME_PATTERN = "^[a-zA-Z0-9_-]{1,64}$"
ToolName = Annotated[str, Field(min_length=1, max_length=64, pattern=_NAME_PATTERN)]
CallId = Annotated[str, Field(min_length=1, max_length=MAX_CALL_ID_LENGTH)]


def _only_functions(given: Any) -> Any:
    """Before the names of fields, which other types have."""
    kind = given.get("type") if isinstance(given, dict) else None
    if isinstance(kind, str) and kind != "function":
        raise refusal(f"{{param}}: {kind[:32]} is not supported: tools are functions that the client calls", "type")
    return given


class FunctionFields(StrictModel):
    """What a function is called with."""

    name: ToolName
    description: str | None = Field(None, description="told to the model")
    parameters: Schema | None = Field(None, description="left out: the function takes none")
    strict: bool | None = Field(None, description="arguments follow the schema with and without it")

    def as_tool(self, param: str) -> Tool:
        """`param`: where the request has this."""
        return Tool(self.name, f"{param}.parameters", self.parameters, self.description)


class ChatTool(StrictModel):
    """OpenAI's tool of a chat: a function that the client calls."""

    type: Literal["function"]
    function: FunctionFields

    _check_type = model_validator(mode="before")(_only_functions)

    @property
    def fields(self) -> FunctionFields:
        return self.function


class ResponseTool(FunctionFields):
    """OpenAI's tool of a response: a function that the client calls."""

    not_supported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "allowed_callers": (["direct"],),
        "async": (False,),
        "defer_loading": (False,),
        "output_schema": (),
    }

    type: Literal["function"]

    _check_type = model_validator(mode="before")(_only_functions)

    @property
    def fields(self) -> FunctionFields:
        return self

    def described(self) -> dict[str, Any]:
        """As a response tells of it."""
        return {"strict": None, "parameters": None, **self.model_dump(exclude_unset=True)}


class ToolCallFunction(StrictModel):
    name: ToolName
    arguments: str = Field(description="JSON text; as a model wrote it, so perhaps none")


class ChatToolCall(StrictModel):
    """A call in an assistant's message."""

    # As streamed deltas have it.
    not_supported: ClassVar[dict[str, tuple[Any, ...]]] = {"index": tuple(range(MAX_TOOLS))}

    id: CallId
    type: Literal["function"] = "function"
    function: ToolCallFunction

    _check_type = model_validator(mode="before")(_only_functions)


# The mode, the names it is about (None: all), and the field as it came.
ToolChoice = tuple[Literal["none", "auto", "required"], tuple[str, ...] | None, Any]


def _name_of(given: Any, inner: str | None) -> Any:
    """Of {"type": "function", ...}; `inner`: the name is in a field of that name."""
    if not isinstance(given, dict) or given.get("type") != "function":
        return None
    at = given.get(inner) if inner is not None else given
    return at.get("name") if isinstance(at, dict) else None


def _choice(given: Any, inner: str | None) -> Any:
    """As a ToolChoice."""
    if given in ("none", "auto", "required"):
        return given, None, given
    if isinstance(name := _name_of(given, inner), str):
        return "required", (name,), given
    if isinstance(given, dict) and given.get("type") == "allowed_tools":
        allowed = given.get("allowed_tools") if inner is not None else given
        mode = allowed.get("mode") if isinstance(allowed, dict) else None
        tools = allowed.get("tools") if isinstance(allowed, dict) else None
        if mode in ("auto", "required") and isinstance(tools, list) and tools:
            names = [_name_of(one, inner) for one in tools]
            if all(isinstance(name, str) for name in names):
                return mode, tuple(names), given
    example = '"name": NAME' if inner is None else f'"{inner}": {{"name": NAME}}'
    raise refusal(f'must be none, auto, required, {{"type": "function", {example}}}, or allowed_tools of such')


def _chat_choice(given: Any) -> Any:
    return _choice(given, "function")


def _response_choice(given: Any) -> Any:
    return _choice(given, None)


def _choice_schema(named: dict[str, Any], allowed: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, named, allowed]})


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


_NAME_SCHEMA = {"type": "string", "pattern": _NAME_PATTERN}
_CHAT_NAMED = _object(type={"const": "function"}, function=_object(name=_NAME_SCHEMA))
_RESPONSE_NAMED = _object(type={"const": "function"}, name=_NAME_SCHEMA)


def _allowed(named: dict[str, Any]) -> dict[str, Any]:
    return {"mode": {"enum": ["auto", "required"]}, "tools": {"type": "array", "minItems": 1, "items": named}}


ChatToolChoice = Annotated[
    ToolChoice,
    BeforeValidator(_chat_choice),
    _choice_schema(
        _CHAT_NAMED, _object(type={"const": "allowed_tools"}, allowed_tools=_object(**_allowed(_CHAT_NAMED)))
    ),
]
ResponseToolChoice = Annotated[
    ToolChoice,
    BeforeValidator(_response_choice),
    _choice_schema(_RESPONSE_NAMED, _object(type={"const": "allowed_tools"}, **_allowed(_RESPONSE_NAMED))),
]


def tool_use_of(
    tools: Sequence[ChatTool | ResponseTool], choice: ToolChoice | None, is_parallel: bool, inner: str
) -> ToolUse | None:
    """None: there are no tools. `inner`: the path from a tool to its function's fields. Raises a validation error."""
    mode, chosen, _ = choice or ("auto", None, None)
    if not tools:
        if mode == "required":
            raise refusal("{param} asks for a call, but there are no tools", "tool_choice")
        return None
    names = [tool.fields.name for tool in tools]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise refusal(f"{{param}}: the name {name} comes twice", f"tools[{index}]{inner}.name")
    unknown = next((name for name in chosen or () if name not in names), None)
    if unknown is not None:
        raise refusal(f"{{param}} names {unknown[:64]}, and there is no such tool", "tool_choice")
    return ToolUse(
        tools=tuple(tool.fields.as_tool(f"tools[{index}]{inner}") for index, tool in enumerate(tools)),
        callable=() if mode == "none" else tuple(name for name in names if chosen is None or name in chosen),
        is_required=mode == "required",
        is_parallel=is_parallel,
    )


class SaidFunction(BaseModel):
    name: str
    arguments: str


class SaidCall(BaseModel):
    """A call in a reply."""

    id: str
    type: Literal["function"]
    function: SaidFunction


class FunctionDelta(BaseModel):
    name: str | None = None
    arguments: str


class CallDelta(BaseModel):
    """A part of a call in a stream: `id`, `type` and the name come with the first one."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta
