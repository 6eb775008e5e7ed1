"""A token's log probability as OpenAI's JSON has it, in chats and in responses.

Owns: that form. A leaf. Knows nothing of where the numbers come from.
"""

from __future__ import annotations

from typing import Any

from phi_cluster.cluster.turn_api import TokenLogprob


def told_logprob(one: TokenLogprob) -> dict[str, Any]:
    """`token` (text), `logprob`, `bytes`, and `top_logprobs`, a list of the same without the last."""
    return {
        **_choice(one.token, one.logprob),
        "top_logprobs": [_choice(other.token, other.logprob) for other in one.top],
    }


def token_text(token: bytes) -> str:
    """What of a token is no text is shown as U+FFFD; `bytes` say what it is."""
    return token.decode("utf-8", "replace")


def _choice(token: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": token_text(token), "logprob": logprob, "bytes": list(token)}
