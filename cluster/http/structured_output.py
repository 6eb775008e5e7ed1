"""What a request says about its reply's format.

Owns: `response_format`, vLLM's `structured_outputs` and its older `guided_*` fields: their forms, and that at most one
of them is given. Knows nothing of what can be followed, and how.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field, WithJsonSchema, model_validator

from phi_cluster.cluster.http.strict_model import StrictModel, refusal
from phi_cluster.cluster.turn_api import WantedFormat

MAX_CHOICES = 1024
_Kind: TypeAlias = Literal["json_schema", "json_object", "regex", "choice", "grammar"]
# vLLM's names where they differ from ours.
_NAMES = {"json_schema": "json"}
Schema = Annotated[dict[str, Any], WithJsonSchema({"type": "object", "description": "a JSON schema"})]
SchemaName = Annotated[str, Field(min_length=1, max_length=64, pattern="^[a-zA-Z0-9_-]+$")]


class JsonSchemaFormat(StrictModel):
    """OpenAI's json_schema object."""

    name: SchemaName
    description: str | None = Field(None, description="accepted, without effect")
    schema_: Schema | None = Field(None, alias="schema", description="left out: any JSON object")
    strict: bool | None = Field(None, description="replies follow the schema with and without it")


class ResponseFormat(StrictModel):
    """OpenAI's response_format."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise refusal('{param} belongs to type "json_schema"', "json_schema")
        return self


class StructuredOutputs(StrictModel):
    """vLLM's structured_outputs: one of these."""

    not_supported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "disable_additional_properties": (False,),
        "disable_any_whitespace": (True, False),
        "disable_fallback": (True, False),
        "structural_tag": (),
        "whitespace_pattern": (),
    }

    json_: Schema | None = Field(None, alias="json")
    regex: str | None = Field(None, min_length=1)
    choice: list[Annotated[str, Field(min_length=1)]] | None = Field(None, min_length=1, max_length=MAX_CHOICES)
    grammar: str | None = Field(None, min_length=1, description="in llguidance's variant of Lark's syntax")
    json_object: bool | None = None

    def formats(self) -> list[WantedFormat]:
        """What is given."""
        given: list[tuple[_Kind, Any]] = [
            ("json_schema", self.json_),
            ("regex", self.regex),
            ("choice", self.choice),
            ("grammar", self.grammar),
            ("json_object", self.json_object or None),
        ]
        return [
            WantedFormat(f"structured_outputs.{_NAMES.get(kind, kind)}", kind, value)
            for kind, value in given
            if value is not None
        ]


class StructuredFields(StrictModel):
    """The fields of a request that say how its reply is to be formed."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = Field(None, description="vLLM's")
    guided_json: Schema | None = Field(None, description="older name of structured_outputs.json")
    guided_regex: str | None = Field(None, min_length=1, description="older name of structured_outputs.regex")
    guided_choice: list[Annotated[str, Field(min_length=1)]] | None = Field(
        None, min_length=1, max_length=MAX_CHOICES, description="older name of structured_outputs.choice"
    )
    guided_grammar: str | None = Field(None, min_length=1, description="older name of structured_outputs.grammar")

    @property
    def wanted_format(self) -> WantedFormat | None:
        """None: free text. Raises a validation error for several at once."""
        given = self.formats()
        if len(given) > 1:
            first, second = (one.param for one in given[:2])
            raise refusal(f"{{param}} and {first} both say what the reply looks like: send one", second)
        return given[0] if given else None

    def formats(self) -> list[WantedFormat]:
        """All that is given."""
        given: list[WantedFormat] = []
        if self.response_format is not None and self.response_format.type != "text":
            schema = self.response_format.json_schema
            if schema is None or schema.schema_ is None:
                given.append(WantedFormat("response_format", "json_object"))
            else:
                given.append(WantedFormat("response_format.json_schema.schema", "json_schema", schema.schema_))
        if self.structured_outputs is not None:
            given += self.structured_outputs.formats()
        guided: list[tuple[_Kind, Any]] = [
            ("json_schema", self.guided_json),
            ("regex", self.guided_regex),
            ("choice", self.guided_choice),
            ("grammar", self.guided_grammar),
        ]
        for kind, value in guided:
            if value is not None:
                given.append(WantedFormat(f"guided_{_NAMES.get(kind, kind)}", kind, value))
        return given
