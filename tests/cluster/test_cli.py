"""The command line against a small HTTP server: what it asks, prints and returns."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from phi_cluster.cluster.cli import main
from phi_cluster.cluster.client import Client
from phi_cluster.cluster.config import Config, load_config
from phi_cluster.cluster.keys import KeyFile
from phi_cluster.cluster.terminal_watch import show_events, show_top
from phi_cluster.cluster.top import screen
from phi_cluster.cluster.turn_api import Identity


class Server(ThreadingHTTPServer):
    """Knows three sessions, and answers chats with the last message, upper case."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str]] = []
        self.uploads: list[bytes] = []
        self.bodies: list[dict[str, Any]] = []
        self.names = ["a", "b", "c"]
        self.page = 2
        self.cluster: dict[str, Any] | None = None
        self.events = [
            {"number": 7 + n, "id": f"e{n}", "time": 0.0, "text": text, "session_id": session_id}
            for n, (text, session_id) in enumerate((("an engine was lost", None), ("a session woke", "a")))
        ]
        # So many of them are in the page, the others come in the stream.
        self.told = 1

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @staticmethod
    def describe(name: str) -> dict[str, Any]:
        held = name == "b"
        return {
            "id": name,
            "state": "held" if held else "active",
            "num_tokens": 1234,
            "kv_cache_bytes": 26_500_000,
            "process_bytes": 0 if held else 44_000_000,
            "turns": 3,
            "actor_pid": None if held else 4121,
            "engine_pid": None,
        }


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        """Not on our stderr."""

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _handle(self) -> None:
        server = self.server
        server.asked.append((self.command, self.path))
        length = int(self.headers.get("content-length", 0))
        path, _, query = self.path.partition("?")
        data = self.rfile.read(length)
        if path == "/v1/sessions/import":
            server.uploads.append(data)
            self._send(200, json.dumps(server.describe(query.removeprefix("id="))).encode())
            return
        if path.endswith("/export"):
            self._send(200, b"the session's bytes")
            return
        body = json.loads(data) if length else {}
        if path == "/health":
            self._send(200, b'{"status": "ok"}')
        elif path == "/v1/sessions":
            after = dict(part.split("=") for part in query.split("&")).get("after", "")
            names = [name for name in server.names if name > after]
            page = [server.describe(name) for name in names[: server.page]]
            last = page[-1]["id"] if page else None
            totals = {
                "sessions": 3,
                "by_state": {"active": 2, "held": 1},
                "kv_cache_bytes": 79_500_000,
                "disk_bytes": 0,
            }
            body = {"data": page, "has_more": len(names) > server.page, "last_id": last, "totals": totals}
            self._send(200, json.dumps(body).encode())
        elif path == "/v1/cluster" and server.cluster is None:
            self._send(403, b'{"error": {"message": "no scope admin"}}')
        elif path == "/v1/cluster":
            self._send(200, json.dumps(server.cluster).encode())
        elif path == "/v1/events" and "stream" in query:
            after = int(self.headers["last-event-id"])
            lines = [one for one in server.events if one["number"] > after]
            self._send(200, b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in lines))
        elif path == "/v1/events":
            told = server.events[: server.told]
            self._send(200, json.dumps({"data": told, "has_more": False, "last": told[-1]["number"]}).encode())
        elif path == "/v1/chat/completions":
            server.bodies.append(body)
            said = body["messages"][-1]["content"].upper()
            usage = {"prompt_tokens": 9, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 4}}
            lines = [{"choices": [{"delta": {"content": said}}]}, {"choices": [], "usage": usage}]
            self._send(200, b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in lines))
        elif path.endswith("/fork") and body:
            server.bodies.append(body)
            self._send(200, json.dumps(server.describe(body["id"])).encode())
        elif path.split("/")[3] not in server.names:
            self._send(404, b'{"error": {"message": "no session \'z\'"}}')
        elif self.command == "DELETE":
            self._send(204, b"")
        else:
            self._send(200, json.dumps(server.describe(path.split("/")[3])).encode())

    do_GET = do_POST = do_DELETE = _handle


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.005})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_sessions_are_listed_page_by_page(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sessions", "--url", server.url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "ID  STATE   TOKENS  KV       PROCESS  TURNS  ACTOR  ENGINE",
        "a   active  1234    26.5 MB  44 MB    3      4121   -",
        "b   held    1234    26.5 MB  -        3      -      -",
        "c   active  1234    26.5 MB  44 MB    3      4121   -",
    ]
    assert server.asked == [("GET", "/v1/sessions?limit=100"), ("GET", "/v1/sessions?limit=100&after=b")]


def test_no_sessions_are_a_table_too(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.names = []
    assert main(["sessions", "list", "--url", server.url]) == 0
    assert capsys.readouterr().out == "ID  STATE  TOKENS  KV  PROCESS  TURNS  ACTOR  ENGINE\n"


@pytest.mark.parametrize(
    ("action", "asked", "told"),
    [
        ("show", ("GET", "/v1/sessions/a"), "num_tokens       1234"),
        ("clear", ("POST", "/v1/sessions/a/clear"), "a   active"),
        ("recycle", ("POST", "/v1/sessions/a/recycle"), "a   active"),
        ("fork", ("POST", "/v1/sessions/a/fork"), "a   active"),
        ("hibernate", ("POST", "/v1/sessions/a/hibernate"), "a   active"),
        ("delete", ("DELETE", "/v1/sessions/a"), "deleted a"),
    ],
)
def test_one_session(
    action: str, asked: tuple[str, str], told: str, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sessions", action, "a", "--url", server.url]) == 0
    assert server.asked == [asked]
    assert told in capsys.readouterr().out


def test_a_session_is_exported_to_a_new_private_file_and_imported(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.phisession"
    assert main(["sessions", "export", "a", "--file", str(file), "--url", server.url]) == 0
    assert file.read_bytes() == b"the session's bytes"
    assert file.stat().st_mode & 0o777 == 0o600
    assert main(["sessions", "export", "a", "--file", str(file), "--url", server.url]) == 1
    assert "File exists" in capsys.readouterr().err
    assert main(["sessions", "import", "--file", str(file), "--to", "b2", "--url", server.url]) == 0
    assert server.uploads == [b"the session's bytes"]
    assert server.asked[-1] == ("POST", "/v1/sessions/import?id=b2")
    assert capsys.readouterr().out.splitlines()[-1].startswith("b2  ")
    assert main(["sessions", "export", "a", "--kv", "--file", str(file) + "2", "--url", server.url]) == 0
    assert server.asked[-1] == ("GET", "/v1/sessions/a/export?kv=true")


@pytest.mark.parametrize("arguments", [[], ["--file", "/nowhere/x"]])
def test_an_import_wants_a_file(arguments: list[str], server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sessions", "import", *arguments, "--url", server.url]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert server.asked == []


def test_a_fork_is_told_what_it_shall_be(server: Server) -> None:
    assert main(["sessions", "fork", "a", "--to", "b2", "--turn", "3", "--url", server.url]) == 0
    assert server.bodies == [{"id": "b2", "turn": 3}]


def test_a_servers_refusal_is_one_sentence(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sessions", "show", "z", "--url", server.url]) == 1
    assert capsys.readouterr() == ("", "error: no session 'z'\n")


def test_an_action_needs_a_session(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sessions", "delete", "--url", server.url]) == 1
    assert capsys.readouterr().err == "error: phi-cluster sessions delete needs a session's id\n"
    assert server.asked == []


@pytest.mark.parametrize("command", [["sessions"], ["chat"]])
def test_no_server_is_one_sentence(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    # Nothing listens on port 1.
    assert main([*command, "--url", "http://127.0.0.1:1"]) == 1
    error = capsys.readouterr().err
    assert error == "error: no server answers at http://127.0.0.1:1; start one with: phi-cluster serve\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "COMMAND"),
        (["fly"], "invalid choice"),
        (["sessions", "explode", "a"], "invalid choice"),
        (["serve", "--port", "eighty"], "invalid int value"),
        (["chat", "--temperature", "warm"], "invalid float value"),
        (["serve", "--prot", "1"], "unrecognized arguments"),
    ],
)
def test_wrong_arguments(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


def test_help_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("serve", "check", "chat", "sessions"))


def test_the_configuration_is_printed_and_not_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("engine: {max_num_seqs: 7}")
    assert main(["serve", str(mine), "--print-config", "--model", "some/model", "--port", "8123"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    config = load_config(printed, {})
    assert (config.model, config.server.port, config.engine.max_num_seqs) == ("some/model", 8123, 7)
    assert config.server.host == Config().server.host


def test_the_default_configuration_is_the_shipped_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["serve", "--print-config"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(printed, {}).model == "smollm2"


@pytest.mark.parametrize("command", ["serve", "check"])
def test_a_wrong_configuration_is_one_sentence(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("modle: x")
    assert main([command, str(wrong)]) == 1
    assert capsys.readouterr().err == f"error: {wrong}: unknown field modle; did you mean model?\n"
    assert main([command, str(tmp_path / "none.yaml")]) == 1
    assert "cannot read the configuration" in capsys.readouterr().err
    assert main([command, "--port", "70000"]) == 1
    assert "server.port" in capsys.readouterr().err


def test_a_chat_in_a_process_of_its_own(server: Server) -> None:
    """With a real stdin, and without ever loading Ray or torch."""
    code = (
        "import sys; from phi_cluster.cluster.cli import main; status = main(sys.argv[1:]);"
        "heavy = {'ray', 'torch'} & set(sys.modules); sys.exit(f'loaded {heavy}' if heavy else status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "chat", "--session", "mine"],
        input="hello\n\n  again  \n",
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "PHI_CLUSTER_URL": server.url},
    )
    assert (done.returncode, done.stderr) == (0, "")
    summary = "    [9 prompt, 4 cached, TTFT "
    assert done.stdout.count(summary) == 2
    assert "HELLO" in done.stdout
    assert [body["messages"] for body in server.bodies] == [
        [{"role": "user", "content": "hello"}],
        [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "HELLO"},
            {"role": "user", "content": "again"},
        ],
    ]


def test_a_reader_that_leaves_is_no_error(server: Server) -> None:
    read, write = os.pipe()
    os.close(read)
    code = "import sys; from phi_cluster.cluster.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-u", "-c", code, "sessions", "--url", server.url],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=30,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_new_key_is_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.yaml"
    assert main(["keys", "new", "alice", "--admin", "--append", str(path)]) == 0
    shown = capsys.readouterr()
    key = shown.out.strip()
    assert KeyFile(path).identify(key) == Identity("alice", frozenset({"admin"}))
    assert key not in shown.err + path.read_text()
    assert main(["keys", "new", "bob"]) == 0
    shown = capsys.readouterr()
    path.write_text("keys:\n" + shown.err.partition("under keys:\n\n")[2])
    assert KeyFile(path).identify(shown.out.strip()) == Identity("bob")
    assert main(["keys", "new", "a b"]) == 1
    assert "cannot be the name of a key" in capsys.readouterr().err


def test_sessions_are_filtered_by_the_server_and_told_as_json(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--json", "--sort", "tokens", "--state", "held", "--search", "x:y", "--tenant", "*", "--limit", "3"]
    assert main(["sessions", "--url", server.url, *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["a", "b", "c"]
    query = "limit=3&sort=tokens&state=held&search=x%3Ay&tenant=%2A"
    assert server.asked == [("GET", f"/v1/sessions?{query}"), ("GET", f"/v1/sessions?{query}&after=b")]


def test_no_more_sessions_are_asked_for_than_are_wanted(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sessions", "--url", server.url, "--limit", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert len(server.asked) == 1


def test_events_are_told(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["events", "--url", server.url]) == 0
    assert re.fullmatch(r"\d\d:00:00  an engine was lost\n", capsys.readouterr().out)
    assert main(["events", "--url", server.url, "--json", "--limit", "5"]) == 0
    assert json.loads(capsys.readouterr().out) == server.events[0]
    assert server.asked[-1] == ("GET", "/v1/events?limit=5")


def test_events_are_followed_and_told_once(server: Server) -> None:
    """Also if the controller tells them again."""

    def sleep(_: float) -> None:
        server.events.append(server.events[1] | {"number": server.events[-1]["number"] + 1})
        if len(server.events) > 4:
            raise KeyboardInterrupt

    out = io.StringIO()
    with Client(server.url) as client, pytest.raises(KeyboardInterrupt):
        show_events(client, out, 100, follows=True, as_json=False, sleep=sleep)
    assert [line[10:] for line in out.getvalue().splitlines()] == ["an engine was lost", "a session woke  a"]


CLUSTER = {
    "nodes": [
        {
            "id": "c8ce43ddfae9",
            "kv_cache": {
                "budget_bytes": 9_000_000_000,
                "leased_bytes": 4_500_000_000,
                "bytes_by_state": {"active": 53_000_000},
            },
            "hibernated_bytes": 1_000_000,
            "keeper": {"pid": 12, "private_bytes": 58_000_000},
            "session_actors": {"count": 2, "private_bytes": 88_000_000},
        }
    ],
    "replicas": [
        {
            "pid": 13,
            "age_seconds": 90000.0,
            "private_bytes": 154_000_000,
            "requests_running": 3,
            "requests_waiting": 1,
            "engine": {
                "pid": 14,
                "age_seconds": 61.0,
                "steps": 1834,
                "private_bytes": 210_000_000,
                "private_growth_bytes": 2_000_000,
            },
            "standby_engines": [{"pid": 15, "private_bytes": 191_000_000}],
        }
    ],
    "controller": {"pid": 11, "age_seconds": 5.0, "private_bytes": 58_000_000},
    "last_minute": {
        "generation_tokens_per_second": 120.25,
        "ttft_seconds": {"p50": 0.045, "p95": 0.1},
        "inter_token_seconds": {"p50": None, "p95": None},
    },
    "requests_running": 3,
    "requests_waiting": 1,
}


def test_top_prints_once_where_there_is_no_terminal(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.cluster = CLUSTER
    assert main(["top", "--url", server.url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "last min  120.2 tok/s   first token 45 ms (p95 100)   between tokens -   3 running, 1 waiting",
        "node c8ce43dd  KV [###############...............] 50.0% of 9.00 GB   asleep 1.0 MB",
        "sessions  3 (2 active, 1 held)   KV 79.5 MB, on disk 0.0 MB",
    ]
    assert "engine          14   61 s  210.0 MB  1834 steps, +2.0 MB since it settled" in lines
    assert "a   active  1234    26.5 MB  44 MB    3      4121   -" in lines
    assert lines[-1].endswith("an engine was lost")
    assert "\x1b" not in "".join(lines)


def test_top_of_a_key_that_may_not_see_the_cluster(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--url", server.url]) == 0
    assert capsys.readouterr().out.startswith("sessions  3 (2 active, 1 held)")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_top_redraws_in_place_and_leaves_the_terminal_as_it_was(server: Server) -> None:
    server.cluster, out, looks = CLUSTER, Terminal(), []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        # No name may move the cursor.
        server.names = ["\x1b[2Jevil"]
        if len(looks) == 2:
            raise KeyboardInterrupt

    with Client(server.url) as client, pytest.raises(KeyboardInterrupt):
        show_top(client, out, 2.0, sleep)
    text = out.getvalue()
    assert text.count("last min") == 2
    assert text.startswith("\x1b[?1049h")
    assert text.endswith("\x1b[?1049l")
    assert "?[2Jevil" in text
    assert "\x1b[2J" not in text
    assert looks == [2.0, 2.0]


def test_a_screen_is_no_larger_than_the_terminal() -> None:
    page = {"data": [Server.describe("s" * 300)] * 60, "totals": {"sessions": 60, "by_state": {"active": 60}}}
    page["totals"] |= {"kv_cache_bytes": 1, "disk_bytes": 2}
    for width, height in ((80, 24), (40, 5), (200, 100)):
        lines = screen(CLUSTER, page, [], width, height)
        assert len(lines) <= height
        assert max(map(len, lines)) <= width
