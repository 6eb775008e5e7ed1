"""Several tokens in one event of a stream.

Owns: how long a reply's text is held back for company, and that nothing is held back at its end. Knows nothing of HTTP:
each event costs the replica, HAProxy and the client about the same, whatever is in it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from phi_cluster.cluster.turn_api import TextDelta, TurnEvent, TurnRequest, TurnRunner


class CoalescedTurns:
    """Runs turns as `turns` does (implements turn_api.TurnRunner), but each delta stands for `interval` tokens or more:
    all but the first that says something, which its reader waits for, and a reply's last one."""

    def __init__(self, turns: TurnRunner, interval: int):
        """Raises ValueError for an interval below 1."""
        if interval < 1:
            raise ValueError(f"interval must be at least 1, got {interval}")
        self._turns = turns
        self._interval = interval

    async def run(self, request: TurnRequest) -> AsyncGenerator[TurnEvent, None]:
        """See turn_api.TurnRunner.run."""
        # By choice; those of which something has been told.
        held: dict[int, TextDelta] = {}
        begun: set[int] = set()
        async with aclosing(self._turns.run(request)) as events:
            try:
                async for event in events:
                    if not isinstance(event, TextDelta):
                        # Whatever it is, it comes behind the text before it.
                        while held:
                            yield held.popitem()[1]
                        yield event
                        continue
                    delta = _joined(held.pop(event.choice, None), event)
                    if delta.num_tokens < self._interval and (event.choice in begun or not delta.pieces):
                        held[event.choice] = delta
                    else:
                        if delta.pieces:
                            begun.add(event.choice)
                        yield delta
            except Exception:
                # What is there is told before the client learns that there will be no more.
                while held:
                    yield held.popitem()[1]
                raise


def _joined(first: TextDelta | None, then: TextDelta) -> TextDelta:
    if first is None:
        return then
    return replace(
        then,
        text=first.text + then.text,
        num_tokens=first.num_tokens + then.num_tokens,
        pieces=first.pieces + then.pieces,
        logprobs=first.logprobs + then.logprobs,
    )
