"""One request as its observer sees it.

Owns: the times between its events, and the line that the log has of it. Knows nothing of what counts them and of how
the response is written.
"""

from __future__ import annotations

import logging
from typing import Any

from phi_cluster.cluster.errors import PhiError
from phi_cluster.cluster.turn_api import (
    Clock,
    Endpoint,
    Outcome,
    RequestObserver,
    TextDelta,
    TurnEvent,
    TurnFinished,
    TurnStarted,
)

logger = logging.getLogger(__name__)


class Observation:
    """Begins with its construction, ends with `finish`, which counts only once."""

    def __init__(self, observer: RequestObserver, endpoint: Endpoint, clock: Clock, request_id: str) -> None:
        self._observer = observer
        self._endpoint: Endpoint = endpoint
        self._clock = clock
        self._request_id = request_id
        self._began = clock.monotonic()
        self._last_token: float | None = None
        self._counts = (0, 0, 0)
        self._finished = False
        # Seconds until the first token; None while there is none.
        self.ttft: float | None = None
        observer.on_start(endpoint)

    def started(self, event: TurnStarted) -> None:
        prompt, cached, completion = self._counts if event.choice else (0, 0, 0)
        self._counts = (prompt + event.num_prompt_tokens, cached + event.num_cached_tokens, completion)

    def tokens(self, num_tokens: int) -> None:
        if num_tokens < 1:
            return
        now = self._clock.monotonic()
        prompt, cached, completion = self._counts
        self._counts = (prompt, cached, completion + num_tokens)
        if self._last_token is None:
            self.ttft = now - self._began
            self._observer.on_first_token(self._endpoint, self.ttft)
        else:
            self._observer.on_token(self._endpoint, num_tokens, now - self._last_token)
        self._last_token = now

    def see(self, event: TurnEvent) -> None:
        """Any event of its turn."""
        if isinstance(event, TextDelta):
            self.tokens(event.num_tokens)
        elif isinstance(event, TurnStarted):
            self.started(event)
        elif isinstance(event, TurnFinished):
            self.totals(event)

    def totals(self, event: TurnFinished) -> None:
        """The turn's own totals win over what was counted here."""
        self._counts = (event.num_prompt_tokens, event.num_cached_tokens, event.num_completion_tokens)

    def fail(self, error: PhiError) -> None:
        """It ends with what its client is told."""
        if not self._finished:
            self._observer.on_error(error.status, error.code)
        self.finish("error")

    def finish(self, outcome: Outcome) -> None:
        if not self._finished:
            self._finished = True
            seconds = self._clock.monotonic() - self._began
            self._observer.on_finish(self._endpoint, outcome, seconds, *self._counts)
            self._log(outcome, seconds)

    def _log(self, outcome: Outcome, seconds: float) -> None:
        prompt, cached, completion = self._counts
        told: dict[str, Any] = {"request_id": self._request_id, "endpoint": self._endpoint, "outcome": outcome}
        told |= {"seconds": round(seconds, 3), "ttft": None if self.ttft is None else round(self.ttft, 3)}
        told |= {"prompt_tokens": prompt, "cached_tokens": cached, "completion_tokens": completion}
        logger.info("a request has ended", extra=told)
