"""However many tokens an event stands for, the reply is the same."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import pytest

from phi_cluster.cluster.coalescing import CoalescedTurns
from phi_cluster.cluster.errors import Unavailable
from phi_cluster.cluster.turn_api import (
    CallPiece,
    ChoiceFinished,
    Position,
    TextDelta,
    TokenLogprob,
    TurnEvent,
    TurnFinished,
    TurnRequest,
    TurnStarted,
)

REQUEST = TurnRequest(tenant="t", session_id=None, request_id="r", sampling={}, prompt="p")
STARTED, FINISHED = TurnStarted(3, 0), TurnFinished("length", 3, 0, 9)


class Scripted:
    """A runner whose turns bring these events, and then `error` if there is one."""

    def __init__(self, events: Sequence[TurnEvent], error: Exception | None = None):
        self._events = events
        self._error = error
        self.was_closed = False

    async def run(self, request: TurnRequest) -> AsyncGenerator[TurnEvent, None]:
        assert request is REQUEST
        try:
            for event in self._events:
                yield event
            if self._error is not None:
                raise self._error
        finally:
            self.was_closed = True


def delta(count: int, text: str, num_tokens: int = 1, choice: int = 0) -> TextDelta:
    pieces = (text,) if text else ()
    logprobs = tuple(TokenLogprob(b"x", -float(count), ()) for _ in range(num_tokens))
    return TextDelta(text, num_tokens, Position(count, count * 7), pieces, logprobs, choice)


async def told(turns: Scripted, interval: int) -> list[TurnEvent]:
    return [event async for event in CoalescedTurns(turns, interval).run(REQUEST)]


def text_of(events: Sequence[TurnEvent]) -> list[str]:
    return [event.text for event in events if isinstance(event, TextDelta)]


async def test_the_first_token_comes_at_once_the_others_together() -> None:
    events = [STARTED, *(delta(i, str(i)) for i in range(1, 10)), FINISHED]
    said = await told(Scripted(events), 3)
    assert text_of(said) == ["1", "234", "567", "89"]
    assert (said[0], said[-1]) == (STARTED, FINISHED)
    second = said[2]
    assert isinstance(second, TextDelta)
    # Where a client may read on is behind the last of them.
    assert (second.num_tokens, second.position, second.pieces) == (3, Position(4, 28), ("2", "3", "4"))
    assert [one.logprob for one in second.logprobs] == [-2.0, -3.0, -4.0]


async def test_an_interval_of_one_changes_nothing() -> None:
    events = [STARTED, *(delta(i, str(i)) for i in range(1, 6)), FINISHED]
    assert await told(Scripted(events), 1) == events


async def test_tokens_without_text_do_not_count_as_the_first() -> None:
    events = [STARTED, delta(1, ""), delta(2, "é"), delta(3, "b"), delta(4, "c"), FINISHED]
    assert text_of(await told(Scripted(events), 4)) == ["é", "bc"]


async def test_a_call_is_told_as_text_is() -> None:
    call = TextDelta("", 1, Position(1, 7), (CallPiece(0, "weather", ""),))
    assert await told(Scripted([STARTED, call, FINISHED]), 4) == [STARTED, call, FINISHED]


async def test_before_the_end_of_a_reply_there_is_all_of_it() -> None:
    events = [STARTED, delta(1, "a"), delta(1, "x", choice=1), delta(2, "b"), delta(2, "y", choice=1)]
    events += [ChoiceFinished(1, "stop"), delta(3, "c"), ChoiceFinished(0, "stop"), FINISHED]
    said = await told(Scripted(events), 8)
    for choice, whole in ((0, "abc"), (1, "xy")):
        end = said.index(ChoiceFinished(choice, "stop"))
        mine = [event for event in said[:end] if isinstance(event, TextDelta) and event.choice == choice]
        assert "".join(event.text for event in mine) == whole


async def test_an_error_comes_behind_what_there_was() -> None:
    turns = Scripted([STARTED, *(delta(i, str(i)) for i in range(1, 4))], Unavailable("gone"))
    said: list[TurnEvent] = []

    async def read() -> None:
        async for event in CoalescedTurns(turns, 10).run(REQUEST):
            said.append(event)

    with pytest.raises(Unavailable):
        await read()
    assert text_of(said) == ["1", "23"]


async def test_a_reader_that_leaves_ends_the_turn() -> None:
    turns = Scripted([STARTED, *(delta(i, str(i)) for i in range(1, 9)), FINISHED])
    async with aclosing(CoalescedTurns(turns, 3).run(REQUEST)) as events:
        async for event in events:
            if isinstance(event, TextDelta):
                break
    assert turns.was_closed


async def test_any_interval_tells_the_same_reply() -> None:
    rng = random.Random(5)
    for _ in range(200):
        counts, events = [0, 0], list[TurnEvent]([STARTED])
        for _ in range(rng.randrange(20)):
            choice = rng.randrange(2)
            counts[choice] += 1
            text = rng.choice(["", "a", "bc"])
            events.append(delta(counts[choice], text, rng.randrange(1, 3), choice))
        events += [ChoiceFinished(0, "stop"), ChoiceFinished(1, "stop"), FINISHED]
        said = await told(Scripted(events), interval := rng.randrange(1, 6))
        for choice in (0, 1):
            before, after = (
                [e for e in es if isinstance(e, TextDelta) and e.choice == choice] for es in (events, said)
            )
            assert "".join(e.text for e in after) == "".join(e.text for e in before)
            assert sum((e.pieces for e in after), ()) == sum((e.pieces for e in before), ())
            assert sum((e.logprobs for e in after), ()) == sum((e.logprobs for e in before), ())
            assert sum(e.num_tokens for e in after) == sum(e.num_tokens for e in before)
            assert [e.position for e in after][-1:] == [e.position for e in before][-1:]
            first = next((i for i, e in enumerate(after) if e.pieces), 0)
            assert all(e.num_tokens >= interval for i, e in enumerate(after[:-1]) if i != first)


def test_no_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        CoalescedTurns(Scripted([]), 0)
