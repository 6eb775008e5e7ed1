"""Log probabilities as the two endpoints tell them.

Owns: OpenAI's two forms of them. Knows nothing of where they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from phi_cluster.cluster.told_logprobs import token_text, told_logprob
from phi_cluster.cluster.turn_api import TokenLogprob


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The `logprobs` of a chat choice."""
    return {"content": [told_logprob(one) for one in tokens], "refusal": None}


def completion_logprobs(tokens: Sequence[TokenLogprob], first_offset: int) -> dict[str, Any]:
    """The `logprobs` of a text completion's choice; `first_offset` characters of the reply come before."""
    offsets, offset = [], first_offset
    for one in tokens:
        offsets.append(offset)
        offset += len(token_text(one.token))
    return {
        "tokens": [token_text(one.token) for one in tokens],
        "token_logprobs": [one.logprob for one in tokens],
        # Parts of characters may look the same: the likelier one is told.
        "top_logprobs": [
            None if one.logprob is None else {token_text(other.token): other.logprob for other in reversed(one.top)}
            for one in tokens
        ],
        "text_offset": offsets,
    }
