"""Several replies to one prompt as one turn: the first is the turn, the others begin when its prompt is computed.

Owns: the seeds of the others, and what the replies' events are together. Knows nothing of how a reply is made (that is
injected), of memory, engines or HTTP.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import TypeAlias

from phi_cluster.cluster.merging import Merged
from phi_cluster.cluster.prompt import seed_of
from phi_cluster.cluster.shared_prompt import SharedPrompt
from phi_cluster.cluster.turn_api import ChoiceFinished, TextDelta, TurnEvent, TurnFinished, TurnRequest, TurnStarted

RunReply: TypeAlias = Callable[[TurnRequest, SharedPrompt], AsyncGenerator[TurnEvent, None]]


async def several(request: TurnRequest, run_first: RunReply, run_other: RunReply) -> AsyncGenerator[TurnEvent, None]:
    """The events of `request.num_choices` replies (see turn_api.TurnRunner.run). `run_first` fills in what it shares;
    `run_other` is given the prompt as ids. Raises what the first that fails raises; the others end then, too."""
    shared = SharedPrompt(request.num_choices - 1)
    ends: dict[int, TurnFinished] = {}
    async with Merged[TurnEvent]() as replies:
        replies.add(0, run_first(request, shared))
        async with aclosing(replies.read()) as events:
            async for choice, event in events:
                if isinstance(event, TurnStarted):
                    shared.started = event
                    for other in range(1, request.num_choices):
                        replies.add(other, run_other(_other(shared, other), shared))
                    yield event
                elif isinstance(event, TextDelta):
                    yield replace(event, choice=choice)
                elif isinstance(event, ChoiceFinished):
                    # The first has said all, and waits for the others.
                    yield event
                elif isinstance(event, TurnFinished):
                    ends[choice] = event
                    if choice:
                        shared.has_answered()
                        yield ChoiceFinished(choice, event.finish_reason)
    yield replace(ends[0], num_completion_tokens=sum(one.num_completion_tokens for one in ends.values()))


def _other(shared: SharedPrompt, choice: int) -> TurnRequest:
    """The request of another reply to the prompt that is computed. The seed is always the same one for a request."""
    request = shared.request
    assert request is not None
    seed: int | None = request.sampling["seed"]
    name = f"{request.request_id if seed is None else seed} choice {choice}"
    return replace(
        request,
        session_id=None,
        request_id=f"{request.request_id}.{choice}",
        sampling=request.sampling | {"seed": seed_of(name)},
        messages=None,
        prompt=shared.token_ids,
        num_choices=1,
        echo=False,
    )
