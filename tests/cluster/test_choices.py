"""Several replies to one prompt: what they share, whose seeds they have, and that all end, however one does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace

import pytest

from phi_cluster.cluster.errors import Overloaded, PoisonousRequest
from phi_cluster.cluster.messages import SequenceOutput, SessionKey
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


async def test_the_prompt_is_computed_once_and_copied(world: World) -> None:
    for reply in ("a", "b", "c"):
        world.reply(reply)
    await world.run(three(chat("hi")))
    ids = [stream.add.token_ids for stream in world.engines.streams]
    assert ids[0] == ids[1] == ids[2] == world.tokenizer.encode(PROMPT)
    source = world.engines.streams[0].add.segment
    keys = [begun.key for begun in world.sessions.begun[1:]]
    assert sorted(world.sessions.laid, key=repr) == sorted(((key, source, len(ids[0])) for key in keys), key=repr)
    # Memory is leased before it is touched.
    for kind in ("lay_prompt", "add"):
        assert world.calls.index("reserve") < world.calls.index(kind)
    assert world.calls.count("reserve") == 3


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


async def begun(world: World) -> AsyncGenerator[TurnEvent, None]:
    """Three replies that have begun."""
    events = world.turns.run(three(chat("hi")))
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

    async def reserve(key: SessionKey, num_tokens: int) -> None:
        await real(key, num_tokens)
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
