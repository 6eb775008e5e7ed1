"""OpenAI's x-ratelimit headers: what the caller's key may still use.

Owns: their names and their form. Knows nothing of how rates are kept.
"""

from __future__ import annotations

from phi_cluster.cluster.turn_api import Rates

RATE_HEADERS = tuple(
    f"x-ratelimit-{part}-{what}" for part in ("limit", "remaining", "reset") for what in ("requests", "tokens")
)


def rate_headers(rates: Rates | None) -> dict[str, str]:
    """None, or nothing in it, is no header."""
    headers = {}
    for what, (limit, remaining, reset_seconds) in (rates or {}).items():
        headers[f"x-ratelimit-limit-{what}"] = str(limit)
        headers[f"x-ratelimit-remaining-{what}"] = str(remaining)
        headers[f"x-ratelimit-reset-{what}"] = _duration(reset_seconds)
    return headers


def _duration(seconds: float) -> str:
    """As OpenAI writes it: `0s`, `120ms`, `1.5s`, `6m0s`."""
    if 0 < seconds < 1:
        return f"{max(round(seconds * 1000), 1)}ms"
    minutes, rest = divmod(round(seconds, 3), 60)
    return f"{int(minutes)}m{rest:g}s" if minutes else f"{rest:g}s"
