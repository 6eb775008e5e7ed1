"""The bodies of /v1/completions.

Owns: the request's prompt and fields, and the shapes of the responses (for the OpenAPI document; responses
are built in completions.py). Knows nothing of how a turn runs.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema, model_validator

from phi_cluster.cluster.http.schemas import MAX_CHOICES, NOT_SUPPORTED, ChoiceFields, Usage
from phi_cluster.cluster.http.strict_model import refusal
from phi_cluster.model.sampling_params import MAX_LOGPROBS

# OpenAI's default for this endpoint, and vLLM's.
DEFAULT_MAX_TOKENS = 16


# In one request, and so many replies to all of them.
MAX_PROMPTS = 64
MAX_REPLIES = 128


def _prompts(given: Any) -> Any:
    """Text or a list of token ids, or a list of such prompts."""
    several = isinstance(given, list) and given and isinstance(given[0], (str, list))
    prompts = given if several else [given]
    if len(prompts) > MAX_PROMPTS:
        raise refusal(f"must have at most {MAX_PROMPTS} prompts: send the others in another request")
    return [_checked(prompt) for prompt in prompts]


def _checked(prompt: Any) -> Any:
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
        *({"type": "array", "items": one, "minItems": 1, "maxItems": MAX_PROMPTS} for one in (_TEXT, _IDS)),
    ]
}


class CompletionRequest(ChoiceFields):
    """POST /v1/completions."""

    not_supported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **NOT_SUPPORTED,
        "prompt_embeds": (),
        "suffix": ("",),
    }

    prompt: Annotated[Any, BeforeValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)] = Field(
        description="one, or several: each has n choices, in order"
    )
    max_tokens: int | None = Field(None, ge=0, le=2**31 - 1, description="most tokens in the reply; 0 only with echo")
    echo: bool = Field(False, description="tell the prompt before the reply, and its tokens' log probabilities too")
    best_of: int | None = Field(
        None, ge=1, le=MAX_CHOICES, description="so many replies are made, and the n likeliest told; not streamed"
    )
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="tell each token's log probability, and those of so many likeliest"
    )

    @model_validator(mode="after")
    def _check_choices(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise refusal(f"{{param}} must be at least n, {self.n}", "best_of")
        if self.best_of is not None and self.best_of > (self.n or 1) and self.stream:
            raise refusal("{param} above n does not go with stream: true", "best_of")
        if len(self.prompt) * self.num_choices > MAX_REPLIES:
            raise refusal(f"{{param}}: at most {MAX_REPLIES} replies in one request", "prompt")
        if self.max_tokens == 0 and not self.echo:
            raise refusal("{param} must be at least 1 without echo: true", "max_tokens")
        return self

    @property
    def num_choices(self) -> int:
        return max(self.n or 1, self.best_of or 1)

    @property
    def reply_limit(self) -> int | None:
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class CompletionLogprobs(BaseModel):
    """A chunk's are of its own tokens; offsets are characters from the beginning of the reply."""

    tokens: list[str]
    # Null for the first token of a prompt that is told (echo).
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
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
