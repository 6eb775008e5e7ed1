"""The bodies of /v1/completions.

Owns: the request's prompt and fields, and the shapes of the responses (for the OpenAPI document; responses
are built in completions.py). Knows nothing of how a turn runs.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema

from phi_cluster.cluster.http.schemas import NOT_SUPPORTED, GenerationFields, Usage
from phi_cluster.cluster.http.strict_model import refusal
from phi_cluster.model.sampling_params import MAX_LOGPROBS

# OpenAI's default for this endpoint, and vLLM's.
DEFAULT_MAX_TOKENS = 16


def _one_prompt(given: Any) -> Any:
    """Text or a list of token ids; a list with one such prompt in it is that prompt."""
    prompt = given
    if isinstance(given, list) and given and isinstance(given[0], (str, list)):
        if len(given) > 1:
            raise refusal("several prompts in one request are not supported yet: send one request for each")
        prompt = given[0]
    if isinstance(prompt, str):
        if not prompt:
            raise refusal("must not be empty")
        return prompt
    if not isinstance(prompt, list):
        raise refusal("must be a string or an array of token ids")
    if not prompt:
        raise refusal("must not be empty")
    # A set of types: bool is an int to isinstance, and millions of ids go through here.
    if set(map(type, prompt)) != {int}:
        raise refusal("token ids must be integers, all of them")
    return prompt


_TEXT = {"type": "string", "minLength": 1}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT_SCHEMA = {
    "anyOf": [
        _TEXT,
        _IDS,
        *({"type": "array", "items": one, "minItems": 1, "maxItems": 1} for one in (_TEXT, _IDS)),
    ]
}


class CompletionRequest(GenerationFields):
    """POST /v1/completions."""

    not_supported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **NOT_SUPPORTED,
        "best_of": (1,),
        "prompt_embeds": (),
        "suffix": ("",),
    }

    prompt: Annotated[Any, BeforeValidator(_one_prompt), WithJsonSchema(_PROMPT_SCHEMA)] = Field()
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="tell each token's log probability, and those of so many likeliest"
    )

    @property
    def reply_limit(self) -> int | None:
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class CompletionLogprobs(BaseModel):
    """A chunk's are of its own tokens; offsets are characters from the beginning of the reply."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    # Null in all chunks of a stream but the last one with a choice.
    finish_reason: Literal["stop", "length"] | None


class Completion(BaseModel):
    """Whole, and as a chunk of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[CompletionChoice]
    usage: Usage | None = None
