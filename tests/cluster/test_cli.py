"""The command line against a small HTTP server: what it asks, prints and returns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from phi_cluster.cluster.cli import main
from phi_cluster.cluster.config import Config, load_config
from phi_cluster.cluster.keys import KeyFile
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
            self._send(200, json.dumps({"data": page, "has_more": len(names) > server.page}).encode())
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
