"""Several replies to one prompt: what they share, whose seeds they have, and that all end, however one does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from phi_cluster.cluster.errors import GaveWay, Overloaded, PoisonousRequest
from phi_cluster.cluster.frames import SequenceOutput
from phi_cluster.cluster.messages import SessionKey, SharedRows
from phi_cluster.cluster.turn_api import (
    ChoiceFinished,
    TextDelta,
    TurnEvent,
    TurnFinished,
    TurnRequest,
    TurnStarted,
    WantedFormat,
)
from tests.cluster.test_turn import PATIENCE, World, build_tokenizer, chat, raw, until

PROMPT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World(build_tokenizer(), max_turns=8)
    yield world
    await world.quiet()


def three(request: TurnRequest) -> TurnRequest:
    return replace(request, num_choices=3)


def texts(events: list[TurnEvent], num: int = 3) -> list[str]:
    """What each choice says; nothing comes behind a choice's end."""
    said, over = [""] * num, set()
    for event in events:
        if isinstance(event, TextDelta):
            assert event.choice not in over
            said[event.choice] += event.text
        elif isinstance(event, ChoiceFinished):
            over.add(event.choice)
    assert len(over) == num
    return said


async def test_the_first_is_the_turn_and_the_others_leave_nothing(world: World) -> None:
    for reply in ("one", "second", "3"):
        world.reply(reply)
    events = await world.run(three(chat("hi")))
    assert texts(events) == ["one", "second", "3"]
    num = len(world.tokenizer.encode(PROMPT))
    assert events[0] == TurnStarted(num, 0)
    # The prompt counts once, the replies' tokens all.
    assert events[-1] == TurnFinished("stop", num, 0, 4 + 7 + 2)
    assert sum(isinstance(event, TurnStarted | TurnFinished) for event in events) == 2
    [commit] = world.sessions.commits
    assert commit.key == SessionKey("tenant", "demo")
    assert commit.text == f"{PROMPT}one<|im_end|>"
    first, *others = world.sessions.begun
    assert not first.key.ephemeral
    assert all(other.key.ephemeral and other.key.session_id for other in others)
    assert len({other.key for other in others}) == 2
    assert sorted(world.sessions.abandoned) == [2, 3]


async def test_the_prompt_is_computed_once_and_used_where_it_lies(world: World) -> None:
    for reply in ("a", "b", "c"):
        world.reply(reply)
    await world.run(three(chat("hi")))
    first, *others = [stream.add for stream in world.engines.streams]
    assert first.shared is None
    for other in others:
        assert other.token_ids == first.token_ids == world.tokenizer.encode(PROMPT)
        # All but the last token, from which each draws.
        assert other.shared == SharedRows(first.segment, first.epoch, len(first.token_ids) - 1)
    # Memory is leased before it is touched, the prompt's once.
    assert world.calls.index("reserve") < world.calls.index("add")
    assert world.sessions.shared == {begun.key: len(first.token_ids) - 1 for begun in world.sessions.begun[1:]}
    assert world.sessions.laid == []


async def test_where_a_reply_may_come_into_the_other_regime_it_is_copied(world: World) -> None:
    num = len(world.tokenizer.encode(PROMPT))
    for regime, is_shared in ((num + 4, False), (num + 5, True), (num, False), (num - 1, True)):
        world.turns._around = replace(
            world.turns._around, limits=replace(world.turns._around.limits, regime_tokens=regime)
        )
        for _ in range(3):
            world.reply("a")
        before = len(world.engines.streams)
        await world.run(replace(three(chat("hi", session_id=None, sampling={"max_tokens": 5}))))
        first, *others = [stream.add for stream in world.engines.streams[before:]]
        assert [other.shared is not None for other in others] == [is_shared] * 2
        laid, world.sessions.laid = world.sessions.laid, []
        assert [one[1:] for one in laid] == ([] if is_shared else [(first.segment, num)] * 2)


async def test_the_turn_ends_after_those_who_use_its_prompt(world: World) -> None:
    events = await begun(world)
    push_end(world, 0)
    told = await asyncio.wait_for(anext(events), PATIENCE)
    assert told == ChoiceFinished(0, "length")
    push(world, 1, "b")
    await anext(events)
    assert world.sessions.commits == []
    # Those who wait for memory need not wait for it.
    assert world.sessions.settled == [world.sessions.begun[0].key]
    for choice in (2, 1):
        assert world.sessions.commits == []
        push_end(world, choice)
        assert await asyncio.wait_for(anext(events), PATIENCE) == ChoiceFinished(choice, "length")
    assert isinstance(await asyncio.wait_for(anext(events), PATIENCE), TurnFinished)
    assert len(world.sessions.commits) == 1
    with pytest.raises(StopAsyncIteration):
        await anext(events)


async def test_before_the_first_gives_its_memory_to_others_those_who_use_the_prompt_let_go(world: World) -> None:
    world.turns._around = replace(world.turns._around, limits=replace(world.turns._around.limits, lease_tokens=8))
    events = await begun(world, max_tokens=100)
    reading = asyncio.ensure_future(rest_of(events))
    streams = list(world.engines.streams)
    push(world, 1, "b")
    await asyncio.sleep(0)
    refuse_first(world)
    await until(lambda: streams[0].aborted)
    abandoned = world.sessions.abandoned
    streams[0].push(SequenceOutput(streams[0].add.sequence_id, [], "abort", released=True))
    await until(lambda: all(stream.aborted for stream in streams))
    # Nothing is given up while somebody reads it.
    assert abandoned == []
    streams[1].push(SequenceOutput(streams[1].add.sequence_id, [], "abort", released=True))
    await asyncio.sleep(0.02)
    assert 1 not in abandoned
    streams[2].push(SequenceOutput(streams[2].add.sequence_id, [], "abort", released=True))
    await until(lambda: 1 in abandoned)
    # The first comes again, computes the prompt, and the others go on where they were.
    await until(lambda: len(world.engines.streams) == 4)
    again = world.engines.streams[3]
    assert again.add.shared is None
    push(world, 3, "c", cached=0)
    await until(lambda: len(world.engines.streams) == 6)
    assert {stream.add.shared and stream.add.shared.epoch for stream in world.engines.streams[4:]} == {again.add.epoch}
    prompt = world.tokenizer.encode(PROMPT)
    said = sorted((stream.add.token_ids[len(prompt) :] for stream in world.engines.streams[4:]), key=len)
    assert said == [[], world.tokenizer.encode("b")]
    for choice in (3, 4, 5):
        push_end(world, choice)
    told = await asyncio.wait_for(reading, PATIENCE)
    assert isinstance(told[-1], TurnFinished)
    said = {i: "".join(e.text for e in told if isinstance(e, TextDelta) and e.choice == i) for i in range(3)}
    # Its first token was told before.
    assert said == {0: "c" * 8, 1: "b", 2: ""}


async def test_a_prompt_that_is_not_where_it_should_be_is_computed_anew(world: World) -> None:
    events = await begun(world)
    reading = asyncio.ensure_future(rest_of(events))
    lost = world.engines.streams[2]
    lost.push(SequenceOutput(lost.add.sequence_id, [], "gone", released=True))
    await until(lambda: len(world.engines.streams) == 4)
    again = world.engines.streams[3].add
    assert again.shared is None
    assert again.token_ids == lost.add.token_ids
    assert again.sampling["seed"] == lost.add.sampling["seed"]
    # The others, who have it, go on.
    for choice in (0, 1, 3):
        push_end(world, choice)
    assert isinstance((await asyncio.wait_for(reading, PATIENCE))[-1], TurnFinished)


async def rest_of(events: AsyncGenerator[TurnEvent, None]) -> list[TurnEvent]:
    return [event async for event in events]


def refuse_first(world: World) -> None:
    """The first reply's lease cannot grow: others need the memory."""
    reserve, key = world.sessions.reserve, world.sessions.begun[0].key

    async def refuse(key_: SessionKey, num_tokens: int, num_shared_tokens: int = 0) -> None:
        if key_ == key:
            world.sessions.reserve = reserve
            raise GaveWay("others go on")
        await reserve(key_, num_tokens, num_shared_tokens)

    world.sessions.reserve = refuse
    push(world, 0, "c" * 7)


def push_end(world: World, choice: int) -> None:
    stream = world.engines.streams[choice]
    stream.push(SequenceOutput(stream.add.sequence_id, [], "length", released=True, num_cached_tokens=0))


async def test_the_others_answer_the_stored_ids_not_the_text_anew(world: World) -> None:
    world.reply("hello")
    await world.run(chat("hi"))
    for reply in ("a", "b", "c"):
        world.reply(reply)
    events = await world.run(three(chat("hi", "hello", "more", request_id="request-2")))
    assert texts(events) == ["a", "b", "c"]
    stored = world.sessions.transcript("tenant", "demo").token_ids.tolist()
    first, *others = [stream.add for stream in world.engines.streams[1:]]
    assert first.num_kept_tokens > 0
    for other in others:
        assert other.num_kept_tokens == 0
        assert other.token_ids == stored[: other.num_prompt_tokens]
        assert other.num_prompt_tokens == first.num_prompt_tokens


@pytest.mark.parametrize("seed", [7, None])
async def test_each_has_a_seed_of_its_own_and_always_the_same(world: World, seed: int | None) -> None:
    seeds = []
    for num in (3, 3, 1):
        for _ in range(num):
            world.reply("x")
        before = len(world.engines.streams)
        await world.run(replace(chat("hi", session_id=None, sampling={"seed": seed}), num_choices=num))
        seeds.append([stream.add.sampling["seed"] for stream in world.engines.streams[before:]])
    assert sorted(seeds[0]) == sorted(seeds[1])
    assert len(set(seeds[0])) == 3
    # The first is what one alone would be.
    assert seeds[0][0] == seeds[1][0] == seeds[2][0]


async def test_replies_come_as_they_grow(world: World) -> None:
    events = world.turns.run(three(raw("hello")))
    first = asyncio.ensure_future(anext(events))
    await asyncio.wait_for(world.engines.added.wait(), PATIENCE)
    await asyncio.sleep(0)
    assert len(world.engines.streams) == 1
    push(world, 0, "a", cached=0)
    assert isinstance(await first, TurnStarted)
    event = await anext(events)
    assert isinstance(event, TextDelta)
    assert (event.choice, event.text) == (0, "a")
    await until(lambda: len(world.engines.streams) == 3)
    for choice, text in ((2, "x"), (1, "y"), (2, "z"), (0, "b")):
        push(world, choice, text)
        event = await asyncio.wait_for(anext(events), PATIENCE)
        assert isinstance(event, TextDelta)
        assert (event.choice, event.text) == (choice, text)
    await events.aclose()
    release(world)


def push(world: World, choice: int, text: str, cached: int | None = None) -> None:
    stream = world.engines.streams[choice]
    stream.push(SequenceOutput(stream.add.sequence_id, world.tokenizer.encode(text), num_cached_tokens=cached))


def release(world: World) -> None:
    for stream in world.engines.streams:
        if not stream.released:
            stream.push(SequenceOutput(stream.add.sequence_id, [], "abort", released=True))


async def begun(world: World, **sampling: Any) -> AsyncGenerator[TurnEvent, None]:
    """Three replies that have begun."""
    events = world.turns.run(three(chat("hi", sampling=sampling)))
    first = asyncio.ensure_future(anext(events))
    await asyncio.wait_for(world.engines.added.wait(), PATIENCE)
    push(world, 0, "a", cached=0)
    await first
    await anext(events)
    await until(lambda: len(world.engines.streams) == 3)
    return events


async def test_a_client_that_leaves_ends_all_of_them(world: World) -> None:
    events = await begun(world)
    push(world, 1, "b")
    await anext(events)
    await events.aclose()
    assert world.calls.count("abort") == 3
    release(world)
    await world.quiet()
    [commit] = world.sessions.commits
    assert commit.text.endswith("a")
    assert sorted(world.sessions.abandoned) == [2, 3]


async def test_a_client_that_leaves_while_the_first_waits_for_the_others(world: World) -> None:
    events = await begun(world)
    push_end(world, 0)
    assert await asyncio.wait_for(anext(events), PATIENCE) == ChoiceFinished(0, "length")
    reading = asyncio.ensure_future(anext(events))
    await until(lambda: bool(world.sessions.settled))
    reading.cancel()
    await asyncio.wait([reading])
    await events.aclose()
    # It has said all; only its memory is waited for.
    assert [stream.aborted for stream in world.engines.streams] == [False, True, True]
    await asyncio.sleep(0)
    assert world.sessions.commits == []
    release(world)
    await world.quiet()
    [commit] = world.sessions.commits
    assert commit.finish_reason == "length"


@pytest.mark.parametrize("failing", [0, 2])
async def test_one_that_fails_ends_the_others(world: World, failing: int) -> None:
    events = await begun(world)
    stream = world.engines.streams[failing]
    stream._deaths_in_place = 2
    stream.push(SequenceOutput(stream.add.sequence_id, [], "error", released=True, error="engines died on it"))
    with pytest.raises(PoisonousRequest):
        await asyncio.wait_for(anext(events), PATIENCE)
    release(world)
    await world.quiet()
    # What the client asked for is what is remembered, whichever reply it was.
    [poison] = world.poison.added
    assert poison.messages == chat("hi").messages
    assert sorted(world.sessions.abandoned) == [2, 3]


async def test_what_is_refused_before_the_prompt_is_computed_begins_no_other(world: World) -> None:
    world.script.errors["reserve"] = Overloaded("no memory")
    with pytest.raises(Overloaded):
        await world.run(three(chat("hi")))
    assert len(world.sessions.begun) == 1


async def test_others_wait_for_memory_as_replies_do_that_have_begun(world: World) -> None:
    for reply in ("a", "b", "c"):
        world.reply(reply)
    real, refused = world.sessions.reserve, []

    async def reserve(key: SessionKey, num_tokens: int, num_shared_tokens: int = 0) -> None:
        await real(key, num_tokens, num_shared_tokens)
        if key.ephemeral and len(refused) < 3:
            refused.append(key)
            raise Overloaded("no memory")

    world.sessions.reserve = reserve
    events = await world.run(three(chat("hi")))
    assert sorted(texts(events)) == ["a", "b", "c"]
    assert len(refused) == 3


async def test_each_reply_takes_a_place(world: World) -> None:
    world.script.gates["begin_turn"] = asyncio.Event()
    running = [asyncio.ensure_future(world.run(three(chat("hi", session_id=None)))) for _ in range(2)]
    await until(lambda: len(world.calls) == 4)
    with pytest.raises(Overloaded):
        await world.run(three(chat("hi")))
    for task in running:
        task.cancel()
    await asyncio.wait(running)
    assert world.turns.num_running == 0


async def test_a_format_is_followed_by_all(world: World) -> None:
    for reply in ("{}", "{}", "{}"):
        world.reply(reply)
    await world.run(three(chat("hi", wanted_format=WantedFormat("response_format", "json_object"))))
    grammars = {stream.add.sampling["grammar"] for stream in world.engines.streams}
    assert len(grammars) == 1
    assert None not in grammars
