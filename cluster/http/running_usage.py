"""Usage so far, in every chunk of a stream that asks for it (`stream_options.continuous_usage_stats`, vLLM's).

Owns: what has been counted for each choice. Knows nothing of what a chunk says.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from phi_cluster.cluster.turn_api import TextDelta, TurnEvent, TurnFinished, TurnStarted


class RunningUsage:
    """Of the choices of one request, `num_choices` to a prompt."""

    def __init__(self, num_choices: int):
        self._num_choices = num_choices
        self._prompts: dict[int, TurnStarted] = {}
        self._num_said: Counter[int] = Counter()

    def see(self, event: TurnEvent) -> None:
        """Before what it brings is told."""
        if isinstance(event, TurnStarted):
            self._prompts[event.choice // self._num_choices] = event
        elif isinstance(event, TextDelta):
            self._num_said[event.choice] += event.num_tokens

    def of(self, choice: int) -> dict[str, Any]:
        """OpenAI's usage object for one choice: its prompt, and what it has said."""
        started = self._prompts.get(choice // self._num_choices)
        num_prompt, num_cached = (0, 0) if started is None else (started.num_prompt_tokens, started.num_cached_tokens)
        return usage(num_prompt, num_cached, self._num_said[choice])


def usage_of(finished: TurnFinished) -> dict[str, Any]:
    """OpenAI's usage object for a whole turn."""
    return usage(finished.num_prompt_tokens, finished.num_cached_tokens, finished.num_completion_tokens)


def usage(num_prompt: int, num_cached: int, num_completion: int) -> dict[str, Any]:
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }
