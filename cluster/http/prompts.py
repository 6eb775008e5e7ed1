"""Several prompts in one request: a turn for each, told as one.

Owns: how many of them run at a time, and what their events are together. Knows nothing of JSON and of how a turn runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from phi_cluster.cluster.merging import Merged
from phi_cluster.cluster.turn_api import (
    ChoiceFinished,
    TextDelta,
    TurnEvent,
    TurnFinished,
    TurnRequest,
    TurnRunner,
)

# The rest of the server's places are for others.
_AT_A_TIME = 8


async def run_all(turns: TurnRunner, requests: Sequence[TurnRequest]) -> AsyncGenerator[TurnEvent, None]:
    """As one turn's events, see `TurnRunner.run`: the choices of the first prompt come first in the count, then the
    second's. Raises what the first turn that fails raises; the others end then, too."""
    if len(requests) == 1:
        async with aclosing(turns.run(requests[0])) as events:
            async for event in events:
                yield event
        return
    places = asyncio.Semaphore(_AT_A_TIME)
    ends: dict[int, TurnFinished] = {}
    async with Merged[TurnEvent]() as merged:
        for place, request in enumerate(requests):
            merged.add(place, _in_turn(turns, request, places))
        async with aclosing(merged.read()) as events_of_all:
            async for place, event in events_of_all:
                first = place * requests[place].num_choices
                if isinstance(event, TextDelta | ChoiceFinished):
                    yield replace(event, choice=first + event.choice)
                elif isinstance(event, TurnFinished):
                    ends[place] = event
                    if requests[place].num_choices == 1:
                        yield ChoiceFinished(first, event.finish_reason)
                else:
                    yield replace(event, choice=first)
    yield TurnFinished(
        finish_reason=ends[0].finish_reason,
        num_prompt_tokens=sum(one.num_prompt_tokens for one in ends.values()),
        num_cached_tokens=sum(one.num_cached_tokens for one in ends.values()),
        num_completion_tokens=sum(one.num_completion_tokens for one in ends.values()),
        engine_replaced=any(one.engine_replaced for one in ends.values()),
    )


async def _in_turn(
    turns: TurnRunner, request: TurnRequest, places: asyncio.Semaphore
) -> AsyncGenerator[TurnEvent, None]:
    async with places, aclosing(turns.run(request)) as events:
        async for event in events:
            yield event
