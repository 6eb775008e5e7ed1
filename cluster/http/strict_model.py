"""A pydantic model for what strangers send: nothing is coerced, nothing unknown is passed over in silence.

Owns: `StrictModel` and how its complaints become one sentence that names the field and the remedy. Knows
nothing of particular fields.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from phi_cluster.cluster.errors import InvalidRequest

Model = TypeVar("Model", bound="StrictModel")


class StrictModel(BaseModel):
    """JSON types are taken as they are (1.0 is no integer, true no number), infinity and NaN are refused.

    null means "not given". `not_supported` lists fields that exist elsewhere, each with the values that ask
    for nothing: those are accepted and dropped, all others refused as not supported yet.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    not_supported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        known: dict[str, Any] = {}
        names = cls._names()
        for name, value in given.items():
            if name in names:
                if value is not None:
                    known[name] = value
            elif name not in cls.not_supported:
                raise refusal(f"{{param}} is not a field here{cls._nearest(name)}", name)
            elif value is not None and not any(_same(value, harmless) for harmless in cls.not_supported[name]):
                raise refusal("{param} is not supported yet: leave it out", name)
        return known

    @classmethod
    def _names(cls) -> list[str]:
        return [field.alias or name for name, field in cls.model_fields.items()]

    @classmethod
    def _nearest(cls, name: str) -> str:
        close = difflib.get_close_matches(name[:64], cls._names(), n=1)
        return f": did you mean {close[0]}?" if close else ": leave it out"


def refusal(message: str, field: str | None = None) -> PydanticCustomError:
    """To be raised in a validator; `{param}` in `message` becomes the path of it, or of `field` in it."""
    return PydanticCustomError("refused", "{message}", {"message": message, "field": field})


def untold(name: str) -> str:
    """As a tag of a union: it is no part of a field's path."""
    return f"<{name}>"


def validated(model: type[Model], given: dict[str, Any]) -> Model:
    """`given` as a `model`. Raises `InvalidRequest` about the first thing that is wrong with it."""
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise _explain(error.errors(include_url=False)[0]) from None


def _explain(detail: ErrorDetails) -> InvalidRequest:
    context = detail.get("ctx", {})
    field = context.get("field")
    param = _path((*detail["loc"], field) if field is not None else detail["loc"])
    if detail["type"] == "refused":
        message = str(context["message"])
        message = message.replace("{param}", param) if "{param}" in message else f"{param}: {message}"
    elif detail["type"] == "missing":
        message = f"{param} is required"
    else:
        told = detail["type"] != "literal_error" and not detail["type"].endswith(("_long", "_short", "_mismatch"))
        message = f"{param} {_demand(detail)}{_shown(detail['input']) if told else ''}"
    return InvalidRequest(message, param=param or None)


def _path(loc: tuple[int | str, ...]) -> str:
    path = ""
    for part in loc:
        if isinstance(part, str) and part == untold(part[1:-1]):
            continue
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += f".{part[:64]}" if path else part[:64]
    return path


def _demand(detail: ErrorDetails) -> str:
    # 2.0 is 2 to a reader of JSON.
    limits = {
        name: int(limit) if isinstance(limit, float) and limit.is_integer() else limit
        for name, limit in detail.get("ctx", {}).items()
    }
    demands = {
        "int_type": "must be an integer",
        "float_type": "must be a number",
        "bool_type": "must be true or false",
        "string_type": "must be a string",
        "list_type": "must be an array",
        "dict_type": "must be an object",
        "model_type": "must be an object",
        "finite_number": "must be a finite number",
        "greater_than": "must be greater than {gt}",
        "greater_than_equal": "must be at least {ge}",
        "less_than_equal": "must be at most {le}",
        "literal_error": "must be {expected}",
        "too_long": "must have at most {max_length} items",
        "too_short": "must not be empty",
        "string_too_long": "must have at most {max_length} characters",
        "string_too_short": "must not be empty",
        "string_pattern_mismatch": "must match {pattern}",
    }
    demand = demands.get(detail["type"])
    return demand.format(**limits) if demand else f"is wrong: {detail['msg']}"


def _shown(value: Any) -> str:
    """What came instead: kinds and numbers, never a client's text."""
    if isinstance(value, bool):
        return f", not {str(value).lower()}"
    if isinstance(value, int):
        return f", not {value}" if abs(value) < 2**64 else ", not a huge integer"
    if isinstance(value, float):
        return f", not {value}"
    kinds: dict[type, str] = {str: "a string", list: "an array", dict: "an object", type(None): "null"}
    return f", not {kinds[type(value)]}" if type(value) in kinds else ""


def _same(value: Any, harmless: Any) -> bool:
    # True == 1 in Python, but not in JSON.
    return isinstance(value, bool) == isinstance(harmless, bool) and bool(value == harmless)
