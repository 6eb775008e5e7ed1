"""What a turn's trace tells: by the conventions, of all that took time, and never what was said."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes

from phi_cluster.cluster.errors import Overloaded, PhiError
from phi_cluster.cluster.frames import SequenceOutput
from phi_cluster.cluster.messages import Stretch, TurnGrant
from phi_cluster.cluster.open_telemetry import OpenTelemetryTracer
from phi_cluster.cluster.traced_turns import TracedTurns
from phi_cluster.cluster.turn_api import BEGINNING, TurnEvent, TurnRequest, WantedFormat
from tests.cluster.test_turn import World, build_tokenizer, chat, raw, until

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SECRET = "sesame"


class Traced:
    """A world whose turns are traced. `stretches`: what its sessions say took time."""

    def __init__(self) -> None:
        self.world = World(build_tokenizer(), max_turns=8)
        self.stretches: tuple[Stretch, ...] = ()
        self.exporter = InMemorySpanExporter()
        self.tracer = OpenTelemetryTracer(SimpleSpanProcessor(self.exporter), Resource({}))
        self.turns = TracedTurns(self.world.turns, self.tracer, "tiny")
        begin, commit = self.world.sessions.begin_turn, self.world.sessions.commit

        async def begin_turn(request: Any) -> TurnGrant:
            return replace(await begin(request), stretches=self.stretches)

        async def commit_(message: Any) -> Stretch:
            await commit(message)
            return Stretch("journal.commit", 5.0, 0.5)

        self.world.sessions.begin_turn = begin_turn  # type: ignore[method-assign]
        self.world.sessions.commit = commit_  # type: ignore[assignment,method-assign]

    async def run(self, request: TurnRequest) -> list[TurnEvent]:
        async def collect() -> list[TurnEvent]:
            return [event async for event in self.turns.run(request)]

        return await asyncio.wait_for(collect(), 5)

    def spans(self) -> dict[str, ReadableSpan]:
        """By name."""
        return {span.name: span for span in self.exporter.get_finished_spans()}

    def root(self) -> ReadableSpan:
        [root] = [span for span in self.exporter.get_finished_spans() if " tiny" in span.name]
        return root


@pytest.fixture
async def traced() -> AsyncIterator[Traced]:
    traced = Traced()
    yield traced
    await traced.world.quiet()
    traced.tracer.close()


def told(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def happened(span: ReadableSpan) -> list[str]:
    return [event.name for event in span.events]


async def test_one_trace_of_replica_session_and_engine(traced: Traced) -> None:
    traced.stretches = (Stretch("session.wake", 10.0, 2.0), Stretch("journal.begin", 12.0, 0.25))
    traced.world.reply("hello")
    sampling = {"temperature": 0.5, "top_k": 7, "seed": 3, "max_tokens": 20}
    await traced.run(replace(chat("hi", sampling=sampling), traceparent=TRACEPARENT))
    spans, root = traced.spans(), traced.root()
    assert {span.context.trace_id for span in spans.values()} == {int(TRACEPARENT.split("-")[1], 16)}
    assert root.name == "chat tiny"
    assert root.parent.span_id == int(TRACEPARENT.split("-")[2], 16)
    parents = {span.name: span.parent.span_id for span in spans.values()}
    parts = ("engine.wait_ready", "session.begin_turn", "prompt.encode", "kv.reserve", "session.commit")
    phases = ("engine.queue", "engine.prefill", "engine.decode")
    inner = {"session.begin_turn": ("session.wake", "journal.begin"), "session.commit": ("journal.commit",)}
    assert {parents[name] for name in (*parts, "engine.queue")} == {root.context.span_id}
    for name, names in inner.items():
        assert {parents[one] for one in names} == {spans[name].context.span_id}
    assert (spans["session.wake"].start_time, spans["session.wake"].end_time) == (10 * 10**9, 12 * 10**9)
    assert {*parts, root.name, *sum(inner.values(), ())} <= set(spans) <= {root.name, *parts, *phases, *parents}
    # What is not told by the conventions is ours.
    conventions = {value for value in vars(gen_ai_attributes).values() if isinstance(value, str)}
    assert all(name in conventions or name.startswith("phi.") for name in told(root))
    prompt = len(traced.world.tokenizer.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"))
    attributes = told(root)
    assert attributes.pop("gen_ai.response.time_to_first_chunk") >= 0
    assert attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "phi-cluster",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.output.type": "text",
        "gen_ai.conversation.id": attributes["gen_ai.conversation.id"],
        "gen_ai.request.max_tokens": 20,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 7.0,
        "gen_ai.request.seed": 3,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.usage.input_tokens": prompt,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": 6,
        "gen_ai.response.finish_reasons": ("stop",),
        "phi.request_id": attributes["phi.request_id"],
        "phi.engine_replaced": False,
    }
    assert root.status.is_unset


async def test_nothing_of_what_was_said(traced: Traced) -> None:
    traced.world.reply(SECRET)
    request = chat(f"{SECRET}?", session_id=SECRET, stop=(f"{SECRET}!",))
    await traced.run(replace(request, tenant=SECRET, wanted_format=WantedFormat("f", "json_object", None)))
    traced.world.reply(SECRET)
    await traced.run(raw(SECRET))
    spans = traced.exporter.get_finished_spans()
    assert [span.name for span in spans if " tiny" in span.name] == ["chat tiny", "text_completion tiny"]
    assert SECRET not in "".join(span.to_json() for span in spans)
    first, second = (told(span) for span in spans if " tiny" in span.name)
    assert first["gen_ai.output.type"] == "json"
    assert len(first["gen_ai.conversation.id"]) == 12
    # Nobody named it.
    assert "gen_ai.conversation.id" not in second or SECRET not in second["gen_ai.conversation.id"]


async def test_an_engines_death_a_preemption_and_a_new_memory(traced: Traced) -> None:
    running = asyncio.ensure_future(traced.run(chat("hi")))
    engines = traced.world.engines
    await asyncio.wait_for(engines.added.wait(), 5)
    await until(lambda: engines.streams[0].watcher is not None)
    stream, number = engines.streams[0], engines.streams[0].add.sequence_id
    first = traced.world.tokenizer.encode("a")
    stream.push(SequenceOutput(number, [], queue_seconds=0.0))
    stream.preempted()
    stream.push(SequenceOutput(number, first, num_cached_tokens=0))
    stream.outlive_engine()
    stream.push(SequenceOutput(number, [], queue_seconds=0.125))
    stream.outlive_engine(died=False)
    stream.push(SequenceOutput(number, [], "gone", released=True))
    engines.added.clear()
    traced.world.reply("b")
    await running
    spans, root = traced.spans(), traced.root()
    decode = next(span for span in traced.exporter.get_finished_spans() if span.name == "engine.decode")
    assert happened(spans["engine.prefill"]) == ["engine.preempted"]
    assert happened(decode) == ["engine.lost", "engine.scheduled", "engine.recycled"]
    assert dict(decode.events[1].attributes or {}) == {"phi.queue.seconds": 0.125}
    assert told(decode)["error.type"] == "MemoryLost"
    assert happened(root) == ["session.memory_lost"]
    assert root.status.is_unset


async def test_what_is_refused_and_a_client_that_leaves(traced: Traced) -> None:
    traced.world.script.errors["reserve"] = Overloaded(f"{SECRET} has no room")
    with pytest.raises(PhiError):
        await traced.run(chat("hi"))
    root = traced.root()
    assert not root.status.is_ok
    assert told(root)["error.type"] == Overloaded.code
    assert told(traced.spans()["kv.reserve"])["error.type"] == Overloaded.code
    assert "has no room" not in "".join(span.to_json() for span in traced.exporter.get_finished_spans())
    traced.exporter.clear()
    del traced.world.script.errors["reserve"]
    async with aclosing(traced.turns.run(chat("hi"))) as events:
        running = asyncio.ensure_future(anext(events))
        await until(lambda: len(traced.world.engines.streams) == 1)
        traced.world.engines.push(*traced.world.tokenizer.encode("a"), cached=0)
        await running
    root = traced.root()
    assert told(root)["gen_ai.response.finish_reasons"] == ("abort",)
    assert root.status.is_unset
    traced.world.engines.push(reason="abort", released=True)


async def test_several_choices_and_reading_on_are_told(traced: Traced) -> None:
    for reply in ("a", "b"):
        traced.world.reply(reply)
    await traced.run(replace(chat("hi"), num_choices=2))
    root = traced.root()
    assert told(root)["gen_ai.request.choice.count"] == 2
    assert "phi.resumed" not in told(root)
    assert len([span for span in traced.exporter.get_finished_spans() if span.name == "session.begin_turn"]) == 2
    traced.exporter.clear()
    traced.world.reply("c")
    await traced.run(chat("hi", session_id="another", resume_from=BEGINNING))
    assert told(traced.root())["phi.resumed"] is True
