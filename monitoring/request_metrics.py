"""What a replica counts of its requests.

Owns: these families, named as vLLM's with our prefix where they are the same. Implements turn_api.RequestObserver.
Knows nothing of HTTP, engines or sessions. All times in seconds.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_LATENCY_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_TOKENS_BUCKETS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 131072)
_OUTCOMES = ("stop", "length", "abort", "error")
# Codes are ours, and few; whatever else comes is one of these.
_MAX_CODES = 64
_OTHER = "other"


class RequestMetrics:
    """`on_running` tells how many sequences the engine runs."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._success = Counter(
            "phi_request_success",
            "Requests that ended, by how (stop, length, abort, error).",
            ["finish_reason"],
            registry=registry,
        )
        self._errors = Counter(
            "phi_request_errors",
            "Requests that were refused or failed, by HTTP status and error code.",
            ["status", "code"],
            registry=registry,
        )
        self._running = Gauge("phi_num_requests_running", "Sequences running in an engine.", registry=registry)
        self._waiting = Gauge("phi_num_requests_waiting", "Requests not running in an engine yet.", registry=registry)
        self._time_to_first_token = Histogram(
            "phi_time_to_first_token_seconds",
            "From the request to its first token.",
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self._inter_token = Histogram(
            "phi_inter_token_latency_seconds",
            "Between two tokens of a reply.",
            buckets=_TOKEN_LATENCY_BUCKETS,
            registry=registry,
        )
        self._end_to_end = Histogram(
            "phi_e2e_request_latency_seconds",
            "From the request to the end of its reply.",
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "phi_prompt_tokens", "Tokens of prompts, cached ones included.", registry=registry
        )
        self._cached_tokens = Counter(
            "phi_cached_prompt_tokens", "Tokens of prompts that the session's own cache saved.", registry=registry
        )
        self._generation_tokens = Counter("phi_generation_tokens", "Generated tokens.", registry=registry)
        self._prompt_sizes = Histogram(
            "phi_request_prompt_tokens", "Tokens of a request's prompt.", buckets=_TOKENS_BUCKETS, registry=registry
        )
        self._reply_sizes = Histogram(
            "phi_request_generation_tokens", "Tokens of a request's reply.", buckets=_TOKENS_BUCKETS, registry=registry
        )
        for outcome in _OUTCOMES:
            self._success.labels(outcome)
        # Without it a ratio of failures would be nothing instead of 0.
        self._errors.labels("500", "internal_error")
        self._codes: set[tuple[str, str]] = set()
        self._open = 0

    def on_start(self, endpoint: str) -> None:
        self._open += 1

    def on_first_token(self, endpoint: str, seconds: float) -> None:
        self._time_to_first_token.observe(seconds)

    def on_token(self, endpoint: str, num_tokens: int, seconds: float) -> None:
        # Each token counts, also where a step brought several.
        for _ in range(num_tokens):
            self._inter_token.observe(seconds / num_tokens)

    def on_finish(
        self,
        endpoint: str,
        outcome: str,
        seconds: float,
        num_prompt_tokens: int,
        num_cached_tokens: int,
        num_completion_tokens: int,
    ) -> None:
        self._open -= 1
        self._success.labels(outcome).inc()
        self._end_to_end.observe(seconds)
        self._prompt_tokens.inc(num_prompt_tokens)
        self._cached_tokens.inc(num_cached_tokens)
        self._generation_tokens.inc(num_completion_tokens)
        if num_prompt_tokens:
            self._prompt_sizes.observe(num_prompt_tokens)
            self._reply_sizes.observe(num_completion_tokens)

    def on_error(self, status: int, code: str | None) -> None:
        labels = (str(status), code or ("internal_error" if status >= 500 else "invalid_request"))
        if len(self._codes) >= _MAX_CODES and labels not in self._codes:
            labels = (str(status), _OTHER)
        self._codes.add(labels)
        self._errors.labels(*labels).inc()

    def on_running(self, num_running: int, num_elsewhere: int = 0) -> None:
        """The engine's sequences now; all other requests that are open wait for something, unless they are another
        replica's to count."""
        self._running.set(num_running)
        self._waiting.set(max(self._open - num_elsewhere - num_running, 0))
