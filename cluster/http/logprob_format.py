"""Log probabilities as the two endpoints tell them.

Owns: OpenAI's two forms of them. Knows nothing of where they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from phi_cluster.cluster.turn_api import TokenLogprob


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The `logprobs` of a chat choice."""
    content = [
        {
            **_choice(one.token, one.logprob),
            "top_logprobs": [_choice(other.token, other.logprob) for other in one.top],
        }
        for one in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[TokenLogprob], first_offset: int) -> dict[str, Any]:
    """The `logprobs` of a text completion's choice; `first_offset` characters of the reply come before."""
    offsets, offset = [], first_offset
    for one in tokens:
        offsets.append(offset)
        offset += len(_text(one.token))
    return {
        "tokens": [_text(one.token) for one in tokens],
        "token_logprobs": [one.logprob for one in tokens],
        # Parts of characters may look the same: the likelier one is told.
        "top_logprobs": [
            None if one.logprob is None else {_text(other.token): other.logprob for other in reversed(one.top)}
            for one in tokens
        ],
        "text_offset": offsets,
    }


def _choice(token: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": _text(token), "logprob": logprob, "bytes": list(token)}


def _text(token: bytes) -> str:
    return token.decode("utf-8", "replace")
