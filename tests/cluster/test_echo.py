"""Prompts that are told before the reply, with their tokens' log probabilities."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from phi_cluster.cluster.errors import InvalidRequest
from phi_cluster.cluster.frames import SequenceOutput, TokenLogprobs
from phi_cluster.cluster.turn_api import ChoiceFinished, TokenChoice, TokenLogprob, TurnFinished, TurnStarted
from tests.cluster.test_turn import World, build_tokenizer, default_sampling, raw, said


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World(build_tokenizer(), max_model_len=100_000, max_turns=8)
    yield world
    await world.quiet()


def echo(prompt: str | list[int], **sampling: Any) -> Any:
    return raw(prompt, echo=True, sampling=default_sampling() | sampling)


class Telling:
    """An engine that tells the prompt's log probabilities: of token i, -i, and of one other, -2i."""

    def __init__(self, world: World):
        self._add = world.engines.add

    async def __call__(self, add: Any) -> Any:
        stream = await self._add(add)
        first: SequenceOutput = stream._outputs._queue[0]
        ids = add.token_ids[1:]
        told = [TokenLogprobs(-float(i), [i, 98], [-float(i), -2.0 * i]) for i in ids]
        if add.sampling.get("prompt_logprobs"):
            object.__setattr__(first, "prompt_logprobs", told)
        return stream


async def test_the_text_is_told_as_it_came(world: World) -> None:
    world.reply(" more")
    events = await world.run(echo("hello<|im_end|>"))
    assert isinstance(events[0], TurnStarted)
    assert (events[0].echo, events[0].echo_logprobs) == ("hello<|im_end|>", ())
    assert said(events) == " more"
    assert "prompt_logprobs" not in world.engines.streams[0].add.sampling


async def test_ids_are_told_as_what_they_say(world: World) -> None:
    world.reply("x")
    ids = world.tokenizer.encode("<|im_start|>hello")
    events = await world.run(echo(ids))
    assert events[0].echo == "<|im_start|>hello"


async def test_all_of_the_prompts_tokens_have_log_probabilities(world: World) -> None:
    world.engines.add = Telling(world)  # type: ignore[method-assign]
    world.reply("x")
    ids = world.tokenizer.encode("<|im_start|>hello w")
    events = await world.run(echo(ids, logprobs=1))
    told = events[0].echo_logprobs
    name = world.tokenizer.token_bytes
    assert told[0] == TokenLogprob(b"<|im_start|>", None, ())
    assert len(told) == len(ids)
    for one, i in zip(told[1:], ids[1:], strict=True):
        assert one == TokenLogprob(name(i), -i, (TokenChoice(name(i), -i), TokenChoice(name(98), -2 * i)))
    assert "".join(one.token.decode() for one in told) == events[0].echo


async def test_no_reply_at_all(world: World) -> None:
    world.reply("x", stop=False)
    events = await world.run(echo("hello", max_tokens=0))
    num = len(world.tokenizer.encode("hello"))
    assert events[1:] == [TurnFinished("length", num, 0, 0)]
    assert events[0].echo == "hello"
    # The engine needs something to do.
    assert world.engines.streams[0].add.sampling["max_tokens"] == 1
    [commit] = world.sessions.commits
    assert (commit.text, commit.num_completion_tokens) == ("hello", 0)


async def test_several_replies_compute_the_prompts_once(world: World) -> None:
    world.engines.add = Telling(world)  # type: ignore[method-assign]
    for _ in range(2):
        world.reply("x")
    events = await world.run(raw("hello w", echo=True, num_choices=2, sampling=default_sampling() | {"logprobs": 0}))
    assert sum(isinstance(event, TurnStarted) for event in events) == 1
    assert sum(isinstance(event, ChoiceFinished) for event in events) == 2
    first, other = (stream.add.sampling for stream in world.engines.streams)
    assert first["prompt_logprobs"]
    assert "prompt_logprobs" not in other


async def test_a_prompt_too_long_to_tell(world: World) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        await world.run(echo([5] * 8193, logprobs=0))
    assert refusal.value.param == "echo"
    world.reply("x")
    await world.run(echo([5] * 8193))
