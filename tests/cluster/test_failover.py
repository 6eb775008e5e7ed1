"""Engines die and hang in the middle of streams of every kind: each goes on where it stopped, byte for byte.

One server whose engine has another one standing by. int8 logits are the same bits in any batch, so what an undisturbed
run said is what must come, greedy or sampled.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import itertools
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

CONFIG = {
    "dtype": "int8",
    "engine": {"standby_engines": 1, "hang_timeout": "3s", "speculation": {"num_tokens": 4}},
    "sessions": {"spawn_interval": "100ms"},
}
TOKENS = 64
LONG = {"max_tokens": TOKENS, "ignore_eos": True}
STREAMS: list[tuple[str, dict[str, Any]]] = [
    ("Tell me a story about a fox.", LONG),
    ("Repeat after me, again and again: one two three, one two three, one two three.", LONG),
    ("Tell me a story about rain.", LONG | {"temperature": 1.0, "seed": 5}),
    ("Describe Lima.", LONG | {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.02, "seed": -6}),
    (
        "List twenty animals.",
        LONG | {"temperature": 0.7, "seed": 7, "repetition_penalty": 1.2, "frequency_penalty": 0.5},
    ),
    ("What is a lighthouse?", LONG | {"presence_penalty": 1.0}),
    ("Tell me about the number 7.", LONG | {"temperature": 0.9, "seed": 8, "logit_bias": {"28": 3.0, "30": -100.0}}),
    (
        "List numbers as JSON.",
        {
            "max_tokens": TOKENS,
            "temperature": 0.8,
            "seed": 9,
            "structured_outputs": {
                "json": {"type": "array", "items": {"type": "integer", "minimum": 100}, "minItems": 40}
            },
        },
    ),
    # Gets its stop string from its own undisturbed reply.
    ("Explain how bread is made.", LONG),
]


@pytest.fixture(scope="module")
def server(launch):
    server = launch(CONFIG)
    yield server
    if server.main.lives:
        # Nothing is left of engines, those that stood by included.
        server.stop()


class Streams:
    """All streams at once, each in a session of its own; made once each of them has brought a few pieces."""

    _numbers = itertools.count()

    def __init__(self, client, asked):
        self._times: list[list[float]] = []
        started = threading.Barrier(len(asked) + 1)
        self._pool = concurrent.futures.ThreadPoolExecutor(len(asked))
        self._running = [
            self._pool.submit(self._run, client.conversation(f"failover-{next(self._numbers)}"), ask, started)
            for ask in asked
        ]
        started.wait(120)
        assert not any(one.done() for one in self._running)

    def _run(self, talk, ask, started):
        question, fields = ask
        try:
            with talk.stream(question, **fields) as stream:
                stream.read(3)
                started.wait(120)
                self._times.append(stream.times)
                return stream.finish()
        except BaseException:
            started.abort()
            raise

    def finish(self):
        with self._pool:
            return [one.result(180) for one in self._running]

    def longest_pause(self, since):
        return max(b - a for times in self._times for a, b in itertools.pairwise(times) if b > since)


@pytest.fixture(scope="module")
def asked(client):
    """The requests."""
    question, fields = STREAMS[-1]
    text = client.conversation("undisturbed-stop").say(question, **fields).text
    middle = text[len(text) // 2 : len(text) // 2 + 5]
    return [*STREAMS[:-1], (question, fields | {"stop": [middle, "never said"]})]


@pytest.fixture(scope="module")
def undisturbed(client, asked):
    """Text, finish reason and usage of each, one after the other, with nothing else in the batch."""
    replies = [client.conversation(f"undisturbed-{n}").say(ask, **fields) for n, (ask, fields) in enumerate(asked)]
    assert replies[-1].finish_reason == "stop"
    return replies


def engine(client, server, until, other_than=None):
    """The engine that serves."""

    def look():
        pid = client.session("undisturbed-0")["engine_pid"]
        return [p for p in server.processes("ray::EngineActor") if p.pid == pid != (other_than and other_than.pid)]

    return until(look, "an engine that serves")[0]


def standby(client, server, until):
    """The engine that stands by, once there is one."""
    serving = engine(client, server, until)

    def look():
        others = [p for p in server.processes("ray::EngineActor") if p.pid != serving.pid]
        # While it starts, its name says what it does; the metric alone may be of before the last death.
        started = [p.name for p in others] == ["ray::EngineActor"]
        return others if started and client.metric("phi_standby_engines") == 1 else None

    return until(look, "an engine to stand by", 120)[0]


_WALL = 0x40000000
_PTRACE_SEIZE, _PTRACE_INTERRUPT = 0x4206, 0x4207


def busiest_thread(pid):
    def ticks(task):
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    before = {task: ticks(task) for task in Path(f"/proc/{pid}/task").iterdir()}
    time.sleep(0.3)
    return int(max(before, key=lambda task: ticks(task) - before[task]).name)


@contextlib.contextmanager
def held(thread):
    """Stops one thread of a process, which only a tracer can."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    if libc.ptrace(_PTRACE_SEIZE, thread, None, None) != 0:
        pytest.skip(f"no thread may be traced here: {os.strerror(ctypes.get_errno())}")
    assert libc.ptrace(_PTRACE_INTERRUPT, thread, None, None) == 0
    # It has stopped.
    assert os.waitpid(thread, _WALL)[0] == thread
    yield thread


def logs(server):
    files = [path for path in (server.runtime_dir / "ray").rglob("worker-*.err") if path.is_file()]
    return "".join(path.read_text(errors="replace") for path in files)


def all_of(replies):
    return [(r.text, r.finish_reason, r.prompt, r.completion, r.cached) for r in replies]


def test_streams_go_on_byte_for_byte_on_the_engine_that_stood_by(client, server, asked, undisturbed, until):
    before = client.metric("phi_recoveries_total", component="engine", reason="death")
    for deaths in range(1, 5):
        heir = standby(client, server, until)
        streams = Streams(client, asked)
        victim, killed_at = engine(client, server, until), time.monotonic()
        victim.kill()
        replies = streams.finish()
        assert all_of(replies) == all_of(undisturbed)
        # It served at once, and no other was started for it.
        assert engine(client, server, until).pid == heir.pid
        until(
            lambda deaths=deaths: (
                client.metric("phi_recoveries_total", component="engine", reason="death") == before + deaths
            ),
            "the recovery to be counted",
        )
        print(f"longest pause {streams.longest_pause(killed_at) * 1000:.0f} ms")


def test_an_engine_that_is_stopped_is_replaced_and_stays_dead(client, server, asked, undisturbed, until):
    standby(client, server, until)
    victim = engine(client, server, until)
    streams = Streams(client, asked)
    os.kill(victim.pid, signal.SIGSTOP)
    stopped_at = time.monotonic()
    until(lambda: not victim.lives, "the death of the stopped engine", 15)
    # Found after hang_timeout, on a machine that may be busy.
    assert 2 < time.monotonic() - stopped_at < 8
    # Its number is nobody's, or a zombie's: there is nothing to go on.
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim.pid, signal.SIGCONT)
    assert all_of(streams.finish()) == all_of(undisturbed)
    assert not victim.lives
    assert 2 < streams.longest_pause(stopped_at) < 10
    until(
        lambda: client.metric("phi_recoveries_total", component="engine", reason="hang") == 1, "the hang to be counted"
    )


def test_a_step_that_never_ends_is_found(client, server, asked, undisturbed, until):
    """Only the thread that computes is held, so the process goes on giving signs of life."""
    standby(client, server, until)
    victim = engine(client, server, until)
    streams = Streams(client, asked)
    with held(busiest_thread(victim.pid)) as thread:
        held_at = time.monotonic()
        # A thread that is held by a tracer is dead only once that has looked.
        until(lambda: os.waitpid(thread, _WALL | os.WNOHANG)[0], "the death of the thread", 15)
    assert 1 < time.monotonic() - held_at < 8
    assert all_of(streams.finish()) == all_of(undisturbed)
    assert not victim.lives
    until(lambda: "is replaced" in logs(server), "the log to say so")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "hung"])
def test_an_engine_that_is_lost_while_it_stands_by_is_replaced(number, client, server, undisturbed, until):
    victim, serving = standby(client, server, until), engine(client, server, until)
    os.kill(victim.pid, number)
    until(lambda: not victim.lives, "the death of the engine that stood by", 15)
    until(lambda: client.metric("phi_standby_engines") == 0, "the metric to say so")
    assert standby(client, server, until).pid != victim.pid
    assert engine(client, server, until).pid == serving.pid
    assert client.metric("phi_recoveries_total", component="standby_engine") >= 1


def test_a_request_on_which_two_engines_died_gets_no_third(client, server, asked, undisturbed, refused, until):
    """Without a token in between: both die as they compute its long prompt. It is known by now, wherever it comes."""
    standby(client, server, until)
    prompt = "Once more, and slowly: the fox and the lighthouse. " * 260
    fields = {"max_tokens": 4}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = engine(client, server, until)
        running = pool.submit(client.conversation("poison").say, prompt, **fields)
        for victim in (first, None):
            until(lambda: client.metric("phi_num_requests_running") >= 1, "its prompt to be computed")
            victim = victim or engine(client, server, until, other_than=first)
            time.sleep(0.3)
            victim.kill()
        with pytest.raises(refused) as caught:
            running.result(60)
    assert (caught.value.status, caught.value.error["code"]) == (422, "poisonous_request")
    serving = engine(client, server, until)
    for name in ("poison", "poison-elsewhere", None):
        with pytest.raises(refused) as caught:
            client.conversation(name).say(prompt, **fields)
        assert (caught.value.status, caught.value.error["code"]) == (422, "poisonous_request")
    assert serving.lives
    # The session goes on, and so do all others.
    assert client.conversation("poison").say("Go on.", max_tokens=4).completion > 0
    replies = [client.conversation(f"after-{n}").say(ask, **fields) for n, (ask, fields) in enumerate(asked)]
    assert all_of(replies) == all_of(undisturbed)


@pytest.mark.parametrize("stands_by", [True, False])
def test_engines_are_renewed_and_no_stream_notices(client, server, asked, undisturbed, until, stands_by):
    """Between two steps, also where the successor must be started first."""
    first, spare = engine(client, server, until), standby(client, server, until)
    streams = Streams(client, asked)
    if not stands_by:
        spare.kill()
    deaths = client.metric("phi_recoveries_total", component="engine")
    renewed = client.metric("phi_engine_recycles_total", reason="requested")
    assert client.http.post("/v1/engines/recycle").json()["engines"] == 1
    replies = streams.finish()
    assert all_of(replies) == all_of(undisturbed)
    second = engine(client, server, until, other_than=first)
    assert (second.pid == spare.pid) == stands_by
    assert not first.lives
    until(lambda: client.metric("phi_engine_recycles_total", reason="requested") == renewed + 1, "it to be counted")
    assert client.metric("phi_recoveries_total", component="engine") == deaths


def test_the_session_actor_and_the_engine_die_in_one_turn(client, server, undisturbed, until):
    """Where the next engine would look for the memory there is nobody any more."""
    fields = {"max_tokens": 60, "ignore_eos": True, "temperature": 0.8, "seed": 12}
    questions = ["Tell me about mountains.", "And about valleys?"]
    twin, talk = client.conversation("both-twin"), client.conversation("both")
    for conversation in (twin, talk):
        conversation.say(questions[0], **fields)
    expected = twin.say(questions[1], **fields)
    actor = client.with_actor("both")["actor_pid"]
    standby(client, server, until)
    with talk.stream(questions[1], **fields) as stream:
        stream.read(10)
        os.kill(actor, signal.SIGKILL)
        engine(client, server, until).kill()
        reply = stream.finish()
    assert all_of([reply]) == all_of([expected])
    last = talk.say("Thank you.", max_tokens=4)
    assert last.cached >= reply.prompt + reply.completion - 1


def test_a_long_reply_outlives_several_engines(client, server, undisturbed, until):
    fields = {"max_tokens": 150, "ignore_eos": True, "temperature": 0.8, "seed": 11}
    question = "Tell me about the sea."
    expected = client.conversation("long-twin").say(question, **fields)
    deaths = client.metric("phi_recoveries_total", component="engine")
    with client.conversation("long").stream(question, **fields) as stream:
        for read in (10, 50, 90):
            stream.read(read)
            engine(client, server, until).kill()
        reply = stream.finish()
    assert all_of([reply]) == all_of([expected])
    until(lambda: client.metric("phi_recoveries_total", component="engine") == deaths + 3, "three deaths to be counted")


CALL_PARTS = ("name", "arguments")
NUMBERS = {"type": "array", "items": {"type": "integer", "minimum": 100}, "minItems": 20, "maxItems": 20}
PARAMETERS = {"type": "object", "properties": {"numbers": NUMBERS}, "required": ["numbers"]}
CALLING = {
    "tools": [{"type": "function", "function": {"name": "note", "parameters": PARAMETERS}}],
    **{"tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 400, "ignore_eos": None},
}


def several(client, num, kill=None, **fields):
    """So many replies to one prompt, streamed in a session, and the usage; `kill` is called once each has come some
    way. Text and calls are told as they come, one behind the other; a field that is None is left out."""
    body = {
        "messages": [{"role": "user", "content": "Tell me about islands, at length."}],
        "max_tokens": 48,
        "ignore_eos": True,
        "temperature": 0.9,
        "seed": 31,
        "n": num,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    body = {name: value for name, value in (body | fields).items() if value is not None}
    texts, ends, usage = [""] * num, [""] * num, {}
    with client.http.stream("POST", "/v1/chat/completions", json=body, headers={"x-session-id": "n"}) as got:
        assert got.status_code == 200
        for line in got.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, (event, texts)
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                functions = [call["function"] for call in choice["delta"].get("tool_calls") or ()]
                told = [choice["delta"].get("content"), *(one.get(part) for one in functions for part in CALL_PARTS)]
                texts[choice["index"]] += "".join(filter(None, told))
                ends[choice["index"]] = choice["finish_reason"] or ends[choice["index"]]
            if kill is not None and min(map(len, texts)) > 30:
                kill()
                kill = None
    client.http.delete("/v1/sessions/n").raise_for_status()
    return texts, ends, (usage["prompt_tokens"], usage["completion_tokens"])


def test_several_replies_to_one_prompt_outlive_an_engine_and_leave_nothing(client, server, undisturbed, until):
    expected = several(client, 4)
    texts, ends, (num_prompt, _) = expected
    assert len(set(texts)) == 4
    assert set(ends) <= {"stop", "length"}
    # The first is what one alone is.
    assert several(client, 1) == (texts[:1], ends[:1], (num_prompt, expected[2][1] // 4))
    deaths = client.metric("phi_recoveries_total", component="engine")
    assert several(client, 4, engine(client, server, until).kill) == expected
    until(lambda: client.metric("phi_recoveries_total", component="engine") == deaths + 1, "the death to be counted")
    until(lambda: client.metric("phi_sessions", state="ephemeral") == 0, "nothing to be left of them")


def test_calls_outlive_an_engine_that_dies_in_the_middle_of_them(client, server, undisturbed, until):
    expected = several(client, 2, **CALLING)
    texts, ends, _ = expected
    assert ends == ["tool_calls"] * 2
    for text in texts:
        assert text.startswith("note")
        assert len(json.loads(text.removeprefix("note"))["numbers"]) == 20
    assert len(set(texts)) == 2
    alone = several(client, 1, **CALLING)
    assert alone[:2] == (texts[:1], ends[:1])
    for num, whole in ((2, expected), (1, alone)):
        standby(client, server, until)
        assert several(client, num, engine(client, server, until).kill, **CALLING) == whole


def test_engines_end_with_their_replica_also_one_that_stands_by(client, server, until):
    engines = [standby(client, server, until), engine(client, server, until)]
    server.process("ray::ServeReplica").kill()
    until(lambda: not any(one.lives for one in engines), "the end of both", 15)
    until(server.is_ready, "the next replica", 60)
