"""configs/nginx.conf in front of the edge: TLS, streams that are not held up, clients that leave."""

import asyncio
import re
import shutil
import socket
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest

import phi_cluster.configs

CHAT = "/v1/chat/completions"
STREAM = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
PATIENCE = 20.0

pytestmark = pytest.mark.skipif(
    not (shutil.which("nginx") and shutil.which("openssl")), reason="nginx or openssl is not installed"
)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """(certificate, key), signed by itself."""
    folder = tmp_path_factory.mktemp("tls")
    files = folder / "crt", folder / "key"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    ]
    command += ["-addext", "subjectAltName=DNS:localhost", "-out", str(files[0]), "-keyout", str(files[1])]
    subprocess.run(command, check=True, capture_output=True)
    return files


@pytest.fixture
async def nginx(app, serve, certificate, tmp_path):
    """Its URL."""
    behind, port = await serve(app), free_port()
    text = (Path(phi_cluster.configs.__path__[0]) / "nginx.conf").read_text()
    temporary = "".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in ("proxy", "fastcgi", "uwsgi", "scgi"))
    for pattern, new in (
        ("worker_processes auto;", f"worker_processes 1; daemon off; pid {tmp_path}/pid; error_log stderr;"),
        (r"http \{", f"http {{ client_body_temp_path {tmp_path}/body; {temporary}"),
        ("server 127.0.0.1:8000;", f"server {behind.removeprefix('http://')};"),
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("llm.example.com;", "localhost;"),
        (r"/etc/ssl/\S+\.crt;", f"{certificate[0]};"),
        (r"/etc/ssl/\S+\.key;", f"{certificate[1]};"),
    ):
        text, count = re.subn(pattern, new, text, count=1)
        assert count == 1, pattern
    (tmp_path / "nginx.conf").write_text(text)
    command = ["nginx", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf"), "-e", "stderr"]
    with (tmp_path / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command, stderr=log)
    try:
        await asyncio.wait_for(_listens(port, process, tmp_path / "log"), PATIENCE)
        yield f"https://localhost:{port}"
    finally:
        process.terminate()
        await process.wait()


async def _listens(port, process, log):
    while True:
        assert process.returncode is None, log.read_text()
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.02)
        else:
            writer.close()
            return


@pytest.fixture
async def outside(nginx, certificate):
    trusting = ssl.create_default_context(cafile=str(certificate[0]))
    async with httpx.AsyncClient(base_url=nginx, verify=trusting, timeout=PATIENCE, trust_env=False) as client:
        yield client


async def test_tokens_come_one_by_one_through_tls(outside, turns, events):
    stepped = asyncio.Event()
    turns.script.insert(2, stepped)
    async with outside.stream("POST", CHAT, json=STREAM) as response:
        assert response.status_code == 200
        pieces = response.aiter_bytes()
        body = b""
        while b"Hello" not in body:
            # Its turn waits for us: had nginx held it back, it would never come.
            body += await anext(pieces)
        assert "wörld".encode() not in body
        stepped.set()
        async for piece in pieces:
            body += piece
    assert [event["choices"][0]["delta"].get("content") for event in events(body)] == ["", "Hello", ", wörld", None]


async def test_a_client_that_leaves_ends_its_turn(outside, turns):
    turns.script.insert(2, asyncio.Event())
    async with outside.stream("POST", CHAT, json=STREAM) as response:
        pieces = response.aiter_bytes()
        assert b"chat.completion.chunk" in await anext(pieces)
    await asyncio.wait_for(turns.ended.wait(), PATIENCE)
    assert turns.ends == ["cancelled"]


async def test_headers_pass_in_both_directions(outside, turns):
    headers = {"authorization": "Bearer mine", "x-session-id": "s"}
    response = await outside.post(CHAT, json={**STREAM, "stream": False}, headers=headers)
    assert response.headers["x-session-id"] == "s"
    assert len(response.headers["x-request-id"]) == 32
    [turn] = turns.requests
    assert turn.session_id == "s"
    assert turn.tenant.startswith("key-")


async def test_without_tls_nothing_is_served(nginx):
    async with httpx.AsyncClient(trust_env=False) as client:
        response = await client.get(nginx.replace("https", "http") + "/health")
    assert response.status_code == 400
