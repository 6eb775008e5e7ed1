"""Tenants on a real server with two replicas: what one may use holds over both, and nothing of one reaches another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from phi_cluster.cluster.keys import hash_of

pytestmark = pytest.mark.cluster

CHAT = "/v1/chat/completions"
NAMES = ("alice", "bob", "rate", "turns", "few")
LIMITS: dict[str, dict[str, int]] = {
    "rate": {"requests_per_minute": 5},
    "turns": {"concurrent_turns": 2},
    "few": {"sessions": 2, "kv_bytes": 4_000_000},
}
# Nobody says this by chance.
CANARY = "quetzalcoatlus-7f3a9c"
# What Ray's own tables tell of actors, tasks and their arguments.
_RAY_TABLES = """
import sys
from ray._private.state import GlobalState
from ray._raylet import GcsClientOptions
state = GlobalState()
state._initialize_global_state(
    GcsClientOptions.create(sys.argv[1], None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
)
accessor = state._connect_and_get_accessor()
for row in [*accessor.get_task_events(), *accessor.get_actor_table(None, None)]:
    sys.stdout.buffer.write(row)
"""


def write_keys(path: Path, names: tuple[str, ...]) -> None:
    entries = [{"name": name, "hash": hash_of(f"phi-{name}"), "limits": LIMITS.get(name, {})} for name in names]
    entries[0]["scopes"] = ["admin"]
    path.write_text(yaml.safe_dump({"keys": entries}))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    write_keys(path, NAMES)
    return path


@pytest.fixture(scope="module")
def server(launch: Callable[..., Any], keys: Path) -> Iterator[Any]:
    engine = {"standby_engines": 0, "num_threads": 1}
    config = {"replicas": 2, "engine": engine, "kv": {"reserve_wait": "300ms"}, "server": {"keys": str(keys)}}
    # All that is ever logged.
    config["logging"] = {"format": "json", "level": "debug"}
    server = launch(config)
    yield server
    server.stop()


@pytest.fixture
def ask(server: Any) -> Iterator[Callable[..., httpx.Response]]:
    # No connection is used twice: each may end at another replica.
    with httpx.Client(base_url=server.url, timeout=60.0, limits=httpx.Limits(max_keepalive_connections=0)) as http:

        def ask(key: str, content: str = "Hi", session: str | None = None, **fields: Any) -> httpx.Response:
            headers = {"authorization": f"Bearer phi-{key}"} | ({} if session is None else {"x-session-id": session})
            messages = [{"role": "user", "content": content}]
            body = {"messages": messages, "max_tokens": 4, "temperature": 0, **fields}
            return http.post(CHAT, json=body, headers=headers)

        yield ask


def at_once(count: int, work: Callable[[int], httpx.Response]) -> Counter[str]:
    """How often there was which answer."""
    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(work, range(count)))
    return Counter("ok" if a.status_code == 200 else a.json()["error"]["code"] for a in answers)


def cached(response: httpx.Response) -> int:
    assert response.status_code == 200, response.text
    return response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_a_rate_holds_over_both_replicas(ask: Callable[..., httpx.Response]) -> None:
    begin = time.monotonic()
    answers = at_once(12, lambda number: ask("rate"))
    # One more for each twelfth of a minute that it took.
    assert 5 <= answers["ok"] <= 5 + (time.monotonic() - begin) // 12
    assert answers["rate_limit_exceeded"] == 12 - answers["ok"]


def test_turns_at_a_time_hold_over_both_replicas(ask: Callable[..., httpx.Response]) -> None:
    answers = at_once(8, lambda number: ask("turns", max_tokens=60, ignore_eos=True))
    assert answers == {"ok": 2, "concurrency_limit_reached": 6}
    assert ask("turns").status_code == 200


def test_sessions_and_memory_are_bounded(ask: Callable[..., httpx.Response], server: Any) -> None:
    assert [ask("few", session=name).status_code for name in ("a", "b", "a")] == [200, 200, 200]
    third = ask("few", session="c")
    assert (third.status_code, third.json()["error"]["code"]) == (429, "session_limit_reached")
    # Both together are more than 4 MB, so each turn takes the other's cache; the conversation is there all the same.
    long = "one two three four " * 8
    sizes = []
    for name in ("a", "b", "a"):
        assert ask("few", long, session=name).status_code == 200
        usage = httpx.get(f"{server.url}/v1/usage", headers={"authorization": "Bearer phi-few"}).json()["data"][0]
        sizes.append(usage["kv_cache_bytes"])
    assert max(sizes) <= 4_000_000
    too_long = ask("few", "one two three four " * 200, session="a")
    assert (too_long.status_code, too_long.json()["error"]["code"]) == (429, "kv_limit_reached")


@pytest.mark.parametrize("session", [None, "same"])
def test_another_keys_prompt_gains_nothing(ask: Callable[..., httpx.Response], session: str | None) -> None:
    """What is cached for whoever guesses a prompt is what is cached for a prompt that nobody has sent."""
    secret, other = (
        f"My password is {session} hunter two, remember it.",
        f"My password is {session} swordfish, forget it.",
    )
    for _ in range(3):
        ask("alice", secret, session)
    # The control: the one who knows it sees a cache that is shared on purpose.
    assert cached(ask("alice", secret, session)) > 20
    for content in (secret, other, secret[:-1]):
        assert cached(ask("bob", content, None if session is None else f"{session}-{len(content)}")) == 0


def test_a_prompt_is_nowhere_but_in_the_journal(ask: Callable[..., httpx.Response], server: Any) -> None:
    said = ask("alice", f"Repeat after me: {CANARY}", "canary", max_tokens=20)
    assert said.status_code == 200
    ask("alice", f"{CANARY} again", None, stop=CANARY, user=CANARY)
    # Refused ones, too, and errors that nobody expected.
    assert ask("bob", CANARY, max_tokens=10**9).status_code == 400
    assert ask("bob", CANARY, response_format={CANARY: CANARY}).status_code == 400
    httpx.get(f"{server.url}/v1/{CANARY}", headers={"authorization": f"Bearer {CANARY}"})
    time.sleep(2.0)
    needle = CANARY.encode()
    found = [path for path in files_of(server.runtime_dir) if needle in path.read_bytes()]
    assert found == []
    assert CANARY not in server.output
    assert CANARY not in httpx.get(server.metrics_url).text
    for process in server.processes():
        for name in ("cmdline", "environ"):
            assert needle not in Path(f"/proc/{process.pid}/{name}").read_bytes()
    assert needle not in ray_tables(server)
    # It is where it belongs, or all of this proves nothing.
    assert [path for path in files_of(server.state_dir) if needle in path.read_bytes()]


def test_a_request_is_known_by_its_id_in_every_process(
    ask: Callable[..., httpx.Response], server: Any, until: Callable[..., Any]
) -> None:
    request_id = ask("alice", "Hello", "traced").headers["x-request-id"]

    def told() -> list[dict[str, Any]]:
        logs = [path for path in files_of(server.runtime_dir) if path.suffix == ".err"]
        lines = [line for path in logs for line in path.read_text(errors="replace").splitlines()]
        return [json.loads(line) for line in lines if f'"request_id": "{request_id}"' in line]

    def in_all() -> bool:
        processes = {line["process"] for line in told()}
        # A new session is with the keeper until it has an actor.
        return {"replica", "engine"} < processes and bool(processes & {"keeper", "session_actor"})

    until(in_all, "a word of each process", 10)
    [ended] = [line for line in told() if line["process"] == "replica"]
    assert (ended["endpoint"], ended["outcome"]) in {("chat", "stop"), ("chat", "length")}
    assert ended["prompt_tokens"] > 0
    assert ended["seconds"] >= ended["ttft"] > 0


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def ray_tables(server: Any) -> bytes:
    [raylet] = [p for p in server.processes() if p.name.split()[0].endswith("/raylet")]
    # It is there for each kind of worker once.
    [address] = {word.partition("=")[2] for word in raylet.name.split() if word.startswith("--gcs-address=")}
    pairs = Path(f"/proc/{raylet.pid}/environ").read_text().split("\0")
    token = dict(pair.split("=", 1) for pair in pairs if "=" in pair)["RAY_AUTH_TOKEN"]
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    command = [sys.executable, "-W", "ignore", "-c", _RAY_TABLES, address]
    tables = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=True).stdout
    # The actors are there. Of tasks nothing is kept: the server has Ray record none.
    assert b"SessionActor" in tables
    assert b"begin_turn" not in tables
    return tables


def test_no_process_leaves_a_core_dump(server: Any) -> None:
    processes = server.processes()
    assert len(processes) > 8
    for process in processes:
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        [line] = [line for line in limits.splitlines() if line.startswith("Max core file size")]
        assert line.split()[4:6] == ["0", "0"], process
        assert int(Path(f"/proc/{process.pid}/coredump_filter").read_text(), 16) == 0, process


def test_a_key_that_is_taken_out_is_refused(
    ask: Callable[..., httpx.Response], keys: Path, until: Callable[..., Any], server: Any
) -> None:
    """By both replicas; and a version that is broken lets nobody in, or out."""
    assert ask("bob").status_code == 200
    text = keys.read_text()
    keys.write_text(text[: len(text) // 2])
    until(lambda: "the former API keys stay valid" in server.output, "a word about the file", 10)
    assert ask("bob").status_code == 200
    write_keys(keys, ("alice",))
    until(lambda: all(ask("bob").status_code == 401 for _ in range(6)), "bob is out", 10)
    assert ask("alice").status_code == 200
    listed = httpx.get(f"{server.url}/v1/usage", headers={"authorization": "Bearer phi-alice"}).json()["data"]
    assert [one["name"] for one in listed] == sorted(NAMES)
    metrics = httpx.get(server.metrics_url).text
    assert 'phi_key_refused_requests_total{key="rate"}' in metrics
    assert "phi-rate" not in metrics
