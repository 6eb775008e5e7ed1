"""A real Prometheus scrapes a real server under load: every panel, rule and alert finds what it asks for.

And the gauges of KV memory follow what the kernel says while it grows, and a collector gets the traces of it all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from phi_cluster.cluster.keys import hash_of
from tests.cluster.collector import Collector
from tests.prometheus import MONITORING, Prometheus

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("prometheus"), reason="prometheus is not installed"),
]

KEY = "phi-watcher"
# What Grafana puts in.
VARIABLES = {"$__rate_interval": "5m", "$instance": ".+"}
# A report may be so old when it is scraped: the replica's, and the controller's round.
REPORT_SECONDS = 3.0


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="module")
def server(launch: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Any]:
    keys = tmp_path_factory.mktemp("keys") / "keys.yaml"
    entry = {"name": "watcher", "hash": hash_of(KEY), "scopes": ["admin"], "limits": {"concurrent_turns": 20}}
    keys.write_text(yaml.safe_dump({"keys": [entry]}))
    sessions = {"spawn_interval": "100ms", "max_age": "6s", "warm_actors": 2}
    speculation = {"num_tokens": 3}
    server = launch(
        {
            "sessions": sessions,
            "engine": {"speculation": speculation, "standby_engines": 1},
            "server": {"keys": str(keys)},
            "tracing": {"endpoint": collector.url},
        }
    )
    yield server
    server.stop()


@pytest.fixture(scope="module")
def prometheus(server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), f"127.0.0.1:{server.metrics_port}")
    try:
        yield prometheus
    finally:
        prometheus.close()


@pytest.fixture(scope="module")
def user(client: Any) -> Any:
    """The client, with a key."""
    client.http.headers["authorization"] = f"Bearer {KEY}"
    return client


class Load:
    """Conversations that go on until it is ended, each in a thread of its own; `failed` says what went wrong."""

    def __init__(self, user: Any, names: list[str], text: str):
        self.failed: list[BaseException] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._talk, args=(user, name, text)) for name in names]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)

    def _talk(self, user: Any, name: str, text: str) -> None:
        try:
            talk = user.conversation(name)
            while not self._over.is_set():
                talk.say(text, max_tokens=60)
                # Quotes what was said, so that there are guesses; short afterwards.
                text = "Repeat that."
        except BaseException as error:
            self.failed.append(error)


def test_gauges_follow_the_kernel_under_load(user, until):
    """At rest they are equal (tests/cluster/test_whole_path.py); here within 1 %, but for the age of a report."""
    load = Load(user, [f"load-{number}" for number in range(4)], "word " * 500)
    seen: list[tuple[float, int]] = []
    wrong: list[tuple[float, list[int]]] = []
    num_compared = 0

    def look() -> None:
        kernel = 0
        for path in user.segments().values():
            try:
                kernel += path.stat().st_blocks * 512
            except OSError:
                # Its holder ended meanwhile.
                return
        seen.append((time.monotonic(), kernel))

    try:
        until(lambda: user.metric("phi_generation_tokens_total") > 0, "tokens", 90)
        begin = time.monotonic()
        while time.monotonic() - begin < 10:
            look()
            gauge = user.metric("phi_kv_cache_bytes")
            look()
            if time.monotonic() - begin > REPORT_SECONDS:
                recent = [nbytes for at, nbytes in seen if at > time.monotonic() - REPORT_SECONDS - 1]
                num_compared += 1
                if not min(recent) * 0.99 <= gauge <= max(recent) * 1.01:
                    wrong.append((gauge, recent))
    finally:
        load.end()
    assert not load.failed
    assert num_compared > 5
    assert seen[-1][1] > 30_000_000
    assert not wrong, wrong[0]


def say_all(user: Any, server: Any, until: Callable[..., Any]) -> None:
    """All that there are panels for, under load."""
    load = Load(user, ["a", "b", "c"], "Count from one to a hundred.")
    try:
        until(lambda: {"a", "b", "c"} <= user.sessions().keys(), "the conversations", 60)
        engine = user.session("a")["engine_pid"]
        os.kill(engine, signal.SIGKILL)
        until(lambda: user.metric("phi_recoveries_total", component="engine") >= 1, "the loss to be counted", 60)
        until(server.is_ready, "an engine", 60)
        talk = user.conversation("sleeper")
        user.patient(talk, "word " * 200, max_tokens=4)
        for _ in range(2):
            assert user.http.post("/v1/sessions/sleeper/hibernate").status_code == 200
            user.patient(talk, "And?", max_tokens=4)
        assert user.http.post("/v1/sessions/sleeper/fork", json={"id": "twin"}).status_code == 200
        assert user.http.post("/v1/chat/completions", json={"messages": []}).status_code == 400
        # One that is talked to without a pause has no moment in which it could be given an actor.
        user.patient(user.conversation("quiet"), "Hello.", max_tokens=4)
        until(lambda: user.session("quiet")["actor_pid"], "an actor", 90)
        assert user.http.post("/v1/sessions/quiet/recycle").status_code == 200
        until(lambda: user.metric("phi_session_recycles_total", reason="max_age") >= 1, "a renewal", 60)
        os.kill(until(lambda: user.session("quiet")["actor_pid"], "its successor", 30), signal.SIGKILL)
        until(lambda: user.metric("phi_recoveries_total", component="session_actor") >= 1, "that one to be counted", 60)
        time.sleep(5)
    finally:
        load.end()
    assert not load.failed


def panels() -> Iterator[tuple[str, str]]:
    for path in sorted((MONITORING / "grafana" / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                yield f"{path.stem}: {panel['title']} ({target['refId']})", target["expr"]


def rules(kind: str) -> Iterator[tuple[str, str]]:
    for path in sorted((MONITORING / "rules").glob("*.yml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                if kind in rule:
                    yield rule[kind], rule["expr"]


def without_threshold(expression: str) -> str:
    """What an alert looks at, whether it is too much or not; and as if hours had passed."""
    return re.sub(r"offset \d+h", "offset 5s", re.sub(r"\s*(>|==)\s*[\d.e]+(?![\d.]*\))", "", expression))


def test_every_panel_rule_and_alert_finds_what_it_asks_for(user, server, prometheus, until):
    # What came before its first look is no increase to it.
    until(lambda: prometheus.query("phi_sessions and on (instance) up == 1"), "the first scrape", 60)
    say_all(user, server, until)
    asked = [*panels(), *rules("record"), *((name, without_threshold(e)) for name, e in rules("alert"))]
    assert len(asked) > 100
    nothing = []
    for name, expression in asked:
        for variable, value in VARIABLES.items():
            expression = expression.replace(variable, value)
        assert "$" not in expression, name
        found = prometheus.query(expression)
        # What has no events is no number: that would hide a name that is wrong, too.
        if not any(value == value for _, value in found):
            nothing.append((name, expression, found))
    assert not nothing, "\n".join(map(str, nothing))


def test_prometheus_itself_has_nothing_to_complain_of(prometheus):
    [target] = prometheus.get("/targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")
    groups = prometheus.get("/rules")["groups"]
    checked = [rule for group in groups for rule in group["rules"]]
    assert len(checked) == len([*rules("record"), *rules("alert")])
    assert [(rule["name"], rule["lastError"]) for rule in checked if rule["health"] != "ok"] == []


def test_what_happened_can_be_seen(prometheus, until):
    def total(expression: str) -> float:
        return sum(value for _, value in prometheus.query(expression))

    assert total('phi_recoveries_total{component="engine",reason="death"}') == 1
    assert total('phi_recovery_seconds_count{component="engine"}') == 1
    assert total("phi_session_hibernations_total") == total("phi_session_hibernation_seconds_count") == 2
    assert total("phi_session_restores_total") == total("phi_session_restore_seconds_count") == 2
    assert total("phi_session_forks_total") == 1
    assert total('phi_request_errors_total{status="400"}') == 1
    assert total('phi_request_errors_total{status=~"5.."}') == 0
    assert total('phi_session_recycles_total{reason="requested"}') >= 1
    # Each turn is recorded; of one whose actor was killed only the repetition may be seen, which records nothing.
    num_turns = total('phi_request_success_total{finish_reason!="error"}')
    assert num_turns - 1 <= total("phi_journal_commit_seconds_count") <= num_turns
    # The keeper's report may be older than the replica's.
    until(lambda: total('phi_key_requests_total{key="watcher"}') >= num_turns, "all turns by key", 30)
    # Nobody is woken up for it.
    assert total('ALERTS{alertstate="firing",severity="page"}') == 0


def test_a_request_is_one_trace_over_all_processes(user, server, collector, until):
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    assert user.http.post("/v1/sessions/sleeper/hibernate").status_code == 200
    said = user.http.get("/v1/sessions/sleeper/messages").json()["data"]
    asked = {"messages": [*said, {"role": "user", "content": "Well?"}], "max_tokens": 4, "ignore_eos": True}
    headers = {"x-session-id": "sleeper", "traceparent": f"00-{trace}-{parent}-01"}
    reply = user.http.post("/v1/chat/completions", json=asked, headers=headers)
    assert reply.status_code == 200, reply.text
    [root] = until(lambda: [span for span in collector.spans if span.parent == parent], "the trace", 30)
    usage = reply.json()["usage"]
    assert (root.trace, root.name) == (trace, f"chat {reply.json()['model']}")
    assert root.attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert root.attributes["gen_ai.usage.output_tokens"] == usage["completion_tokens"] == 4
    assert root.attributes["gen_ai.response.finish_reasons"] == ["length"]
    parts = collector.parts(root)
    phases = ("engine.queue", "engine.prefill", "engine.decode")
    others = ("session.begin_turn", "session.wake", "journal.begin", "kv.reserve", "journal.commit")
    assert {*phases, *others} <= set(parts)
    for one in parts.values():
        # Clocks of one machine agree.
        assert root.began - 0.001 <= one.began <= one.ended <= root.ended + 0.001
    assert parts["session.begin_turn"].attributes["phi.session.num_computed_tokens"] > 0
    assert parts["engine.decode"].attributes["phi.engine.pid"] == user.session("sleeper")["engine_pid"]


def test_the_traces_tell_what_died_and_not_what_was_said(user, server, collector, until):
    """Of all that this server has been asked."""
    until(lambda: any("engine.lost" in span.events for span in collector.spans), "the engine's death", 30)
    ids = {span.id for span in collector.spans}
    lonely = [span for span in collector.spans if span.parent and span.parent not in ids]
    assert [span.name.split()[0] for span in lonely] == ["chat"]
    sent = b"".join(collector.raw)
    for secret in (b"Count from", b"Repeat", b"Well?", b"sleeper", b"watcher", KEY.encode()):
        assert secret not in sent
