"""What requests for generated text share: fields, their ranges, usage, and the error object.

Owns: the sampling fields and how they become `TurnRequest.sampling`. Knows nothing of messages, prompts and
how sampling works.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema, model_validator

from phi_cluster.cluster.errors import ContextOverflow, InvalidRequest
from phi_cluster.cluster.http.caller import RESUME_HEADER, Caller
from phi_cluster.cluster.http.edge import EdgeSettings
from phi_cluster.cluster.http.strict_model import StrictModel, refusal
from phi_cluster.cluster.http.structured_output import StructuredFields
from phi_cluster.cluster.turn_api import ToolUse

MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
MAX_IDS = 1024
# Of one prompt; a server with fewer places allows fewer.
MAX_CHOICES = 16
_MAX_COUNT = 2**31 - 1
_TOKEN_ID = re.compile(r"[0-9]{1,10}", re.ASCII)

# Fields of OpenAI's and vLLM's requests that nothing here implements, with the values that ask for nothing.
NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "cache_salt": (),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "priority": (0,),
    "prompt_logprobs": (0, False),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}


def _stop_list(given: Any) -> list[str]:
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list):
        raise refusal("must be a string or an array of strings")
    if len(stops) > MAX_STOPS:
        raise refusal(f"must have at most {MAX_STOPS} strings")
    for stop in stops:
        if not isinstance(stop, str):
            raise refusal("must be a string or an array of strings")
        if not 1 <= len(stop) <= MAX_STOP_LENGTH:
            raise refusal(f"each string must have 1 to {MAX_STOP_LENGTH} characters")
    return stops


def _bias_by_id(given: Any) -> dict[int, Any]:
    if not isinstance(given, dict):
        raise refusal('must be an object of token ids and numbers, such as {"50256": -100}')
    if len(given) > MAX_IDS:
        raise refusal(f"must have at most {MAX_IDS} token ids")
    if not all(_TOKEN_ID.fullmatch(token_id) for token_id in given):
        raise refusal('its keys must be token ids, as in {"50256": -100}')
    return {int(token_id): bias for token_id, bias in given.items()}


Stops = Annotated[
    list[str],
    BeforeValidator(_stop_list),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MAX_STOPS},
            ]
        }
    ),
]
LogitBias = Annotated[
    dict[int, Annotated[float, Field(ge=-100, le=100)]],
    BeforeValidator(_bias_by_id),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}}),
]


class StreamOptions(StrictModel):
    include_usage: bool = Field(False, description="send one more chunk with the usage before the end")
    data_only: bool = Field(
        False,
        description="nothing but data lines: no ids to read on from, no comments in silence. For clients that take "
        "every line for JSON, as bench clients do",
    )
    continuous_usage_stats: bool = Field(
        False, description="with include_usage: all chunks have the usage so far of the choice that they tell of, too"
    )
    include_obfuscation: bool = Field(False, description="accepted, without effect")


class GenerationFields(StructuredFields):
    """Fields of every request for text. Defaults and ranges are OpenAI's, else vLLM's."""

    model: str | None = Field(None, description="a name from /v1/models; left out: the model served here")
    stream: bool = Field(False, description="send server-sent events as text comes")
    stream_options: StreamOptions | None = Field(None, description="only with stream")
    max_tokens: int | None = Field(None, ge=1, le=_MAX_COUNT, description="most tokens in the reply")
    min_tokens: int = Field(0, ge=0, le=_MAX_COUNT, description="the reply does not end before so many tokens")
    temperature: float = Field(1.0, ge=0, le=2, description="0 takes the likeliest token")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=_MAX_COUNT, description="0 or -1: off")
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    # Logits are divided by it, and must stay finite.
    repetition_penalty: float = Field(1.0, ge=0.01, le=10)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description="left out: one is chosen")
    stop: Stops = Field(default_factory=list, description="the reply ends before any of these strings")
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list, max_length=MAX_IDS)
    ignore_eos: bool = Field(False, description="go on behind the model's end of text")
    logit_bias: LogitBias = Field(default_factory=dict)
    user: str | None = Field(None, description="accepted, without effect")

    @model_validator(mode="after")
    def _check_together(self) -> GenerationFields:
        if self.stream_options is not None and not self.stream:
            raise refusal("{param} is only allowed with stream: true", "stream_options")
        if self.reply_limit is not None and self.min_tokens > self.reply_limit:
            raise refusal(f"{{param}} must be at most max_tokens, {self.reply_limit}", "min_tokens")
        if self.wanted_format is not None:
            # A reply that is complete could not end, or one that must end would go on.
            for param, given in (("min_tokens", self.min_tokens > 0), ("ignore_eos", self.ignore_eos)):
                if given:
                    raise refusal("{param} does not go with a format that the reply has to follow", param)
        if self.tool_use is not None:
            # A reply that calls ends with its calls, and a call is whole.
            unfit = {"min_tokens": self.min_tokens > 0, "ignore_eos": self.ignore_eos}
            if self.tool_use.callable:
                unfit |= {"stop": bool(self.stop), "stop_token_ids": bool(self.stop_token_ids)}
            for param, given in unfit.items():
                if given:
                    raise refusal("{param} does not go with tools that may be called", param)
        return self

    @property
    def tool_use(self) -> ToolUse | None:
        """None: there are no tools. Raises a validation error."""
        return None

    @property
    def reply_limit(self) -> int | None:
        """The most tokens the reply may have, by whatever name or default; None: what the context holds."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are told in each place; None: no log probabilities at all."""
        return None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def data_only(self) -> bool:
        return self.stream_options is not None and self.stream_options.data_only

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats


class ChoiceFields(GenerationFields):
    """Where a request may ask for several replies."""

    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="so many replies, each by a seed of its own")

    @property
    def num_choices(self) -> int:
        """So many replies are made."""
        return self.n or 1


def sampling_of(fields: GenerationFields, settings: EdgeSettings) -> dict[str, Any]:
    """`TurnRequest.sampling`.

    Raises `InvalidRequest` for ids outside the vocabulary, `ContextOverflow` for limits beyond the context.
    """
    check_token_ids("logit_bias", list(fields.logit_bias), settings.vocab_size)
    check_token_ids("stop_token_ids", fields.stop_token_ids, settings.vocab_size)
    limit, room = fields.reply_limit, settings.max_model_len
    for param, count in (("max_tokens", limit), ("min_tokens", fields.min_tokens)):
        if count is not None and count > room:
            raise ContextOverflow(
                f"{param} must be at most {room}, the model's context length in tokens, not {count} "
                f"({count - room} too many)",
                param=param,
            )
    return {
        "temperature": fields.temperature,
        "top_p": fields.top_p,
        "top_k": max(0, fields.top_k),
        "min_p": fields.min_p,
        "repetition_penalty": fields.repetition_penalty,
        "presence_penalty": fields.presence_penalty,
        "frequency_penalty": fields.frequency_penalty,
        "seed": fields.seed,
        "max_tokens": limit,
        "min_tokens": fields.min_tokens,
        "ignore_eos": fields.ignore_eos,
        "logit_bias": dict(fields.logit_bias),
        "stop_token_ids": tuple(fields.stop_token_ids),
        "logprobs": fields.num_logprobs,
    }


def check_choices(fields: ChoiceFields, caller: Caller, settings: EdgeSettings, param: str = "n") -> None:
    """Raises `InvalidRequest` if there are more than this server makes, or the reply is to be read on."""
    if fields.num_choices > settings.max_choices:
        raise InvalidRequest(f"{param} must be at most {settings.max_choices} on this server", param=param)
    if fields.num_choices > 1 and caller.resume_from is not None:
        raise InvalidRequest(
            f"{RESUME_HEADER}: of a request with {param} above 1 no reply can be read on; send the request anew",
            param=RESUME_HEADER,
        )


def check_token_ids(param: str, token_ids: list[int], vocab_size: int) -> None:
    """Raises `InvalidRequest` if one of `token_ids` is not in 0 ... vocab_size - 1."""
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
        raise InvalidRequest(f"{param}: token ids must be from 0 to {vocab_size - 1}", param=param)


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(description="tokens of the prompt that the session's own KV cache saved")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorObject
