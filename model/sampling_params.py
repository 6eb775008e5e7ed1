"""How the tokens of one reply are to be chosen: the numbers, their limits, and their form on the wire.

Owns: `SamplingParams` and its validation. Knows nothing of logits, torch, HTTP field names or defaults that an
edge may choose, and nothing of stop strings: those are text, and the engine knows no text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

# Below this temperature the softmax is one token to float32 precision, and 1/temperature begins to overflow:
# it is taken as greedy (the bound is vLLM's).
GREEDY_BELOW = 1e-5
# The range of OpenAI's API for presence_penalty and frequency_penalty, and for logit_bias.
MAX_PENALTY = 2.0
MAX_LOGIT_BIAS = 100.0
# OpenAI's for top_logprobs.
MAX_LOGPROBS = 20
# What msgpack can carry; a negative seed is one of its own (two's complement).
MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one sequence, complete: nothing is left to be chosen later.

    Raises ValueError, naming the field and the value, for everything out of range (NaN and infinity included).
    """

    seed: int
    # Counted from the first token of the reply; the end token counts.
    max_tokens: int
    # 0 is greedy: the most probable token, of equals the one with the lowest id.
    temperature: float = 1.0
    # Keep the fewest most probable tokens whose probability reaches top_p.
    top_p: float = 1.0
    # Keep the top_k most probable tokens; 0 keeps all.
    top_k: int = 0
    # Keep tokens at least min_p times as probable as the most probable one.
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    # No stop token can be drawn before the reply has so many tokens.
    min_tokens: int = 0
    # No token id ends the reply: it goes on to its length limit.
    ignore_eos: bool = False
    # The checkpoint's end tokens included (merged by the caller).
    stop_token_ids: tuple[int, ...] = ()
    # Added to the logits of these token ids.
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    # The reply follows this grammar (as grammar.py's functions write it), and may end with one of `grammar_end_ids`
    # where it is complete.
    grammar: str | None = field(default=None, repr=False)
    grammar_end_ids: tuple[int, ...] = ()
    # Each token comes with its log probability, and those of so many of the likeliest in its place.
    logprobs: int | None = None
    # So do the prompt's tokens, all but the first; none of them is taken from a cache then.
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        _integer("seed", self.seed, MIN_SEED, MAX_SEED)
        _integer("max_tokens", self.max_tokens, 1)
        _number("temperature", self.temperature, low=0.0)
        _number("top_p", self.top_p, above=0.0, high=1.0)
        _integer("top_k", self.top_k, 0)
        _number("min_p", self.min_p, low=0.0, high=1.0)
        _number("repetition_penalty", self.repetition_penalty, above=0.0)
        _number("presence_penalty", self.presence_penalty, low=-MAX_PENALTY, high=MAX_PENALTY)
        _number("frequency_penalty", self.frequency_penalty, low=-MAX_PENALTY, high=MAX_PENALTY)
        _integer("min_tokens", self.min_tokens, 0)
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}")
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos must be true or false, got {self.ignore_eos!r}")
        if not isinstance(self.stop_token_ids, tuple | list):
            raise ValueError(f"stop_token_ids must be a list of token ids, got {self.stop_token_ids!r}")
        for token_id in self.stop_token_ids:
            _integer("stop_token_ids", token_id, 0)
        if not isinstance(self.logit_bias, Mapping):
            raise ValueError(f"logit_bias must map token ids to numbers, got {self.logit_bias!r}")
        for token_id, bias in self.logit_bias.items():
            _integer("logit_bias", token_id, 0)
            _number(f"logit_bias[{token_id}]", bias, low=-MAX_LOGIT_BIAS, high=MAX_LOGIT_BIAS)
        if self.grammar is not None and not isinstance(self.grammar, str):
            raise ValueError(f"grammar must be a string, got {type(self.grammar).__name__}")
        for token_id in self.grammar_end_ids:
            _integer("grammar_end_ids", token_id, 0)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if not isinstance(self.prompt_logprobs, bool) or (self.prompt_logprobs and self.logprobs is None):
            raise ValueError(f"prompt_logprobs must be false without logprobs, got {self.prompt_logprobs!r}")
        # Own copies: neither the caller's list nor his dictionary can change a running sequence.
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "grammar_end_ids", tuple(self.grammar_end_ids))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken, so that no random number is needed."""
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens so far change the logits (and must be counted)."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def finish_reason(self, num_generated: int, last_id: int) -> str | None:
        """ "stop" or "length" if a reply of so many tokens is over with `last_id`, else None."""
        # The sampler masks stop tokens until there are min_tokens others.
        if num_generated > self.min_tokens and not self.ignore_eos and last_id in self.stop_token_ids:
            return "stop"
        return "length" if num_generated >= self.max_tokens else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values that msgpack and JSON keep as they are; `logit_bias` becomes a list of [id, bias]."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        values["stop_token_ids"] = list(self.stop_token_ids)
        values["grammar_end_ids"] = list(self.grammar_end_ids)
        values["logit_bias"] = [[token_id, bias] for token_id, bias in self.logit_bias.items()]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """The inverse of `to_dict`. Fields that are not there get their defaults; unknown ones are refused."""
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                raise ValueError(f"unknown sampling parameter {name!r}")
        for name in ("seed", "max_tokens"):
            if name not in values:
                raise ValueError(f"{name} is missing")
        arguments = dict(values)
        if "logit_bias" in arguments:
            try:
                arguments["logit_bias"] = dict(arguments["logit_bias"])
            except (TypeError, ValueError):
                raise ValueError("logit_bias must be a list of [token id, bias] pairs") from None
        return cls(**arguments)


def _integer(name: str, value: object, low: int, high: int | None = None) -> None:
    # bool is an int to Python, but `top_k: true` is a mistake.
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {wanted}, got {value}")


def _number(
    name: str,
    value: object,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not _is_finite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    if above is not None and value <= above:
        raise ValueError(f"{name} must be above {above:g}, got {value!r}")
    if low is not None and value < low:
        raise ValueError(f"{name} must be at least {low:g}, got {value!r}")
    if high is not None and value > high:
        raise ValueError(f"{name} must be at most {high:g}, got {value!r}")


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False
