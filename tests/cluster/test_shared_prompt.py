"""A prompt that several replies answer: when it is there, and that nobody loses it while he uses it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from phi_cluster.cluster.messages import SegmentRef, SharedRows
from phi_cluster.cluster.shared_prompt import SharedPrompt

ROWS = SharedRows(SegmentRef(1, 2, b"nonce"), 3, 40)
REQUEST: Any = object()


async def settle_down() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture
def prompt() -> SharedPrompt:
    return SharedPrompt(2)


def lend(prompt: SharedPrompt, rows: SharedRows = ROWS, *, stays: bool = True) -> None:
    prompt.lend(REQUEST, list(range(41)), rows, stays=stays)


async def test_the_others_wait_until_it_is_computed(prompt: SharedPrompt) -> None:
    waiting = asyncio.ensure_future(prompt.rows())
    await settle_down()
    assert not waiting.done()
    lend(prompt)
    assert await waiting == ROWS
    assert (prompt.request, prompt.token_ids[-1], prompt.copied_from) == (REQUEST, 40, None)


async def test_what_may_not_stay_is_copied(prompt: SharedPrompt) -> None:
    lend(prompt, stays=False)
    assert await prompt.rows() is None
    assert prompt.copied_from == ROWS.segment


async def test_it_is_taken_back_when_the_last_user_has_left(prompt: SharedPrompt) -> None:
    lend(prompt)
    told: list[str] = []
    assert prompt.use("a", ROWS, lambda: told.append("a"))
    assert prompt.use("b", ROWS, lambda: told.append("b"))
    taking = asyncio.ensure_future(prompt.take_back())
    await settle_down()
    assert told == ["a", "b"]
    # Nobody begins to use what is wanted back.
    assert not prompt.use("c", ROWS, lambda: None)
    prompt.leave("a")
    prompt.leave("a")
    await settle_down()
    assert not taking.done()
    prompt.leave("b")
    await taking
    # They wait for the next one, which lies elsewhere.
    waiting = asyncio.ensure_future(prompt.rows())
    await settle_down()
    assert not waiting.done()
    again = SharedRows(SegmentRef(5, 6, b"other"), 4, 40)
    lend(prompt, again)
    assert await waiting == again
    assert not prompt.use("a", ROWS, lambda: None)


async def test_what_is_taken_back_for_good_is_waited_for_no_more(prompt: SharedPrompt) -> None:
    waiting = asyncio.ensure_future(prompt.rows())
    await settle_down()
    await prompt.take_back(for_good=True)
    assert await waiting is None


async def test_what_is_lost_is_no_longer_lent_but_what_came_instead_is(prompt: SharedPrompt) -> None:
    lend(prompt)
    prompt.lose(SharedRows(SegmentRef(9, 9, b"before"), 1, 40))
    assert await prompt.rows() == ROWS
    prompt.lose(ROWS)
    assert await prompt.rows() is None


async def test_the_first_outwaits_all_others(prompt: SharedPrompt) -> None:
    waiting = asyncio.ensure_future(prompt.wait_answered())
    prompt.has_answered()
    await settle_down()
    assert not waiting.done()
    prompt.has_answered()
    await asyncio.wait_for(waiting, 5)
    await SharedPrompt(0).wait_answered()
