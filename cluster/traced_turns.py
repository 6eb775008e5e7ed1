"""Turns as traces: the span of each, by OpenTelemetry's conventions for generative AI.

Owns: that span, and what is told of a request and its reply in it (attributes of
https://opentelemetry.io/docs/specs/semconv/gen-ai/, and ours, which begin with `phi.`). All turns of whatever endpoint
come by here. Knows nothing of how spans are made and exported, of HTTP, engines or sessions.

Never what was said: no prompt, no reply, no stop string, no tool. A conversation is named as in the logs, by the
beginning of a digest of tenant and name, so that traces tell neither; an unnamed one is not named.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.span import Attributes, Span, Tracer, error_type
from phi_cluster.cluster.turn_api import TextDelta, TurnEvent, TurnFinished, TurnRequest, TurnRunner, TurnStarted

PROVIDER = "phi-cluster"
_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "seed", "frequency_penalty", "presence_penalty")


class TracedTurns:
    """Runs turns as `turns` does (implements turn_api.TurnRunner). `model`: the name under which it is served.
    `clock` is monotonic, in seconds."""

    def __init__(self, turns: TurnRunner, tracer: Tracer, model: str, clock: Callable[[], float] = time.monotonic):
        self._turns = turns
        self._tracer = tracer
        self._model = model
        self._clock = clock

    async def run(self, request: TurnRequest) -> AsyncGenerator[TurnEvent, None]:
        """See turn_api.TurnRunner.run."""
        attributes = _asked(request, self._model)
        name = f"{attributes['gen_ai.operation.name']} {self._model}"
        span = self._tracer.begin(name, request.traceparent, attributes)
        began, has_tokens = self._clock(), False
        try:
            async with aclosing(self._turns.run(replace(request, span=span))) as events:
                async for event in events:
                    if isinstance(event, TextDelta) and event.num_tokens and not has_tokens:
                        has_tokens = True
                        span.note({"gen_ai.response.time_to_first_chunk": self._clock() - began})
                    _note(span, event)
                    yield event
        except BaseException as error:
            kind = error_type(error)
            if kind == "cancelled":
                # The client left, which is no error.
                span.note({"gen_ai.response.finish_reasons": ("abort",)})
                span.end()
            else:
                span.end(kind)
            raise
        span.end()


def _asked(request: TurnRequest, model: str) -> Attributes:
    told: dict[str, str | bool | int | float | tuple[str, ...]] = {
        "gen_ai.operation.name": "text_completion" if request.messages is None else "chat",
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.output.type": _output_type(request),
        "phi.request_id": request.request_id,
    }
    for name in _SAMPLING:
        if (value := request.sampling.get(name)) is not None:
            told[f"gen_ai.request.{name}"] = float(value) if name == "top_k" else value
    if request.num_choices > 1:
        told["gen_ai.request.choice.count"] = request.num_choices
    if request.session_id is not None:
        told["gen_ai.conversation.id"] = SessionKey(request.tenant, request.session_id).digest[:12]
    if request.resume_from is not None:
        told["phi.resumed"] = True
    return told


def _output_type(request: TurnRequest) -> str:
    wanted = request.wanted_format
    return "json" if wanted is not None and wanted.kind.startswith("json") else "text"


def _note(span: Span, event: TurnEvent) -> None:
    if isinstance(event, TurnStarted):
        span.note(_of_prompt(event))
    elif isinstance(event, TurnFinished):
        span.note(
            {
                **_of_prompt(event),
                "gen_ai.usage.output_tokens": event.num_completion_tokens,
                "gen_ai.response.finish_reasons": (event.finish_reason,),
                "phi.engine_replaced": event.engine_replaced,
            }
        )


def _of_prompt(event: TurnStarted | TurnFinished) -> Attributes:
    return {
        "gen_ai.usage.input_tokens": event.num_prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": event.num_cached_tokens,
    }
