"""More than a hundred hostile inputs to a real server: each gets its answer, and nobody else notices."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import httpx
import pytest
import yaml

from phi_cluster.cluster.keys import hash_of
from phi_cluster.cluster.processes import private_bytes
from tests.bench.unique_schemas import unique_schema
from tests.cluster.hostile import CHAT, HELLO, Hostile, table

pytestmark = pytest.mark.cluster

KEYS = {"alice": "phi-alice-key", "bob": "phi-bob-key"}
BYSTANDER = {
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 6,
    "temperature": 0,
    "stream": True,
    "stream_options": {"include_usage": True},
}
CASES = list(table("http://127.0.0.1:IMAGE/x.png"))


@pytest.fixture(scope="module")
def trap() -> Iterator[tuple[str, list[Any]]]:
    """The address of a listener, and whoever came to it."""
    came: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    connection, address = listener.accept()
                except OSError:
                    return
                came.append(address)
                connection.close()

        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}", came
        listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def server(launch: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    keys = tmp_path_factory.mktemp("keys") / "keys.yaml"
    entries: list[dict[str, Any]] = [{"name": name, "hash": hash_of(key)} for name, key in KEYS.items()]
    entries[0]["scopes"] = ["admin"]
    keys.write_text(yaml.safe_dump({"keys": entries}))
    edge = {"keys": str(keys), "max_body": "2MB", "body_timeout": "1s"}
    server = launch({"engine": {"standby_engines": 0}, "sessions": {"turn_wait": "300ms"}, "server": edge})
    yield server
    server.stop()


@pytest.fixture(scope="module")
def http(server: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30.0) as client:
        yield client


def bystander(http: httpx.Client, meanwhile: Callable[[], None] = lambda: None) -> bytes:
    """Her stream, byte for byte, but for its id and time; `meanwhile` happens while it runs."""
    headers = {"authorization": f"Bearer {KEYS['alice']}", "x-session-id": "bystander"}
    with http.stream("POST", CHAT, json=BYSTANDER, headers=headers) as response:
        assert response.status_code == 200
        meanwhile()
        body = b"".join(response.iter_raw())
    return re.sub(rb'"(id|created)":("[^"]*"|[0-9]+)', b"", body)


@pytest.fixture(scope="module")
def undisturbed(http: httpx.Client) -> bytes:
    """The second time all of her prompt is cached, as it is from then on."""
    headers = {"authorization": f"Bearer {KEYS['alice']}", "x-session-id": "hers"}
    assert http.post(CHAT, json={"messages": HELLO, "max_tokens": 2}, headers=headers).status_code == 200
    bystander(http)
    return bystander(http)


@pytest.fixture(scope="module")
def her_response(http: httpx.Client) -> str:
    """The id of a response of the bystander's."""
    headers = {"authorization": f"Bearer {KEYS['alice']}"}
    made = http.post("/v1/responses", json={"input": "Hi", "max_output_tokens": 16}, headers=headers)
    assert made.status_code == 200
    return made.json()["id"]


def send(http: httpx.Client, server: Any, case: Hostile) -> tuple[int, str]:
    """The answer's status and body."""
    if case.raw is not None:
        return send_raw(server.port, case.raw)
    headers = {"content-type": "application/json", **case.headers}
    if case.key:
        headers["authorization"] = f"Bearer {KEYS.get(case.key, case.key)}"
    request = http.build_request(case.method, case.path, content=case.body or None, headers=headers)
    # As it is written: httpx would tidy it up.
    request.url = request.url.copy_with(raw_path=case.path.encode())
    response = http.send(request)
    return response.status_code, response.text


def send_raw(port: int, text: bytes) -> tuple[int, str]:
    """The answer's status and body; a connection that is reset before all of it was read is a 400 too."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=15) as connection, suppress(OSError):
        connection.sendall(text)
        connection.shutdown(socket.SHUT_WR)
        while piece := connection.recv(65536):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    return (int(head.split()[1]) if head else 400), body.decode("utf-8", "replace")


def test_there_are_many() -> None:
    assert len(CASES) >= 120
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_hostile_input(
    http: httpx.Client, server: Any, undisturbed: bytes, her_response: str, trap: Any, case: Hostile
) -> None:
    """`undisturbed` and the answer at once; then health, and the bystander once more."""
    answers: list[tuple[int, str]] = []
    address, came = trap
    if case.raw is None:
        body = case.body.replace(b"127.0.0.1:IMAGE", address.encode()).replace(b"HER_RESPONSE", her_response.encode())
        case = replace(case, body=body, path=case.path.replace("HER_RESPONSE", her_response))
    beside = bystander(http, lambda: answers.append(send(http, server, case)))
    [(status, answer)] = answers
    assert status in (case.status if isinstance(case.status, tuple) else (case.status,)), answer[:500]
    if status >= 400 and case.raw is None and answer.startswith("{"):
        error = json.loads(answer)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert case.code in (None, error["code"])
        assert len(answer) < 1000
        for secret in ("Traceback", ".py", "pydantic", "phi_cluster", "/root", "/home", "/tmp", "ray::"):
            assert secret not in error["message"]
    assert beside == undisturbed
    assert http.get("/health").status_code == http.get("/ready").status_code == 200
    assert bystander(http) == undisturbed
    assert came == []


def test_a_slow_body_is_not_waited_for(http: httpx.Client, server: Any, undisturbed: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=15) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEYS['bob']}\r\nContent-Length: 50\r\n\r\n{{"
        connection.sendall(head.encode())
        answer = b""
        while b"}" not in answer and (piece := connection.recv(65536)):
            answer += piece
    assert b" 408 " in answer.splitlines()[0]
    assert b"request_timeout" in answer
    assert bystander(http) == undisturbed


def test_schemas_without_end_leave_nothing(http: httpx.Client, server: Any, undisturbed: bytes) -> None:
    """A short one of tests/bench/schemas.py: each is answered or refused, and what was compiled goes again."""
    pids = [server.process(name).pid for name in ("ray::EngineActor", "ray::ServeReplica")]
    headers = {"authorization": f"Bearer {KEYS['bob']}", "x-session-id": "schemas"}
    before: list[int] = []
    for number in range(180):
        if number == 90:
            before = list(map(private_bytes, pids))
        schema, is_followed = unique_schema(number)
        fields = {"type": "json_schema", "json_schema": {"name": "unique", "schema": schema}}
        answer = http.post(CHAT, json={"messages": HELLO, "max_tokens": 1, "response_format": fields}, headers=headers)
        assert answer.status_code == (200 if is_followed else 400), (number, answer.text)
        if not is_followed:
            assert answer.json()["error"]["param"] == "response_format.json_schema.schema"
    growth = [now - then for now, then in zip(map(private_bytes, pids), before, strict=True)]
    assert max(growth) < 4 << 20, growth
    assert http.delete("/v1/sessions/schemas", headers=headers).status_code == 200
    assert bystander(http) == undisturbed


def test_two_writers_and_a_session_that_is_gone(http: httpx.Client, undisturbed: bytes) -> None:
    headers = {"authorization": f"Bearer {KEYS['bob']}", "x-session-id": "mine"}
    long = {"messages": HELLO, "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with http.stream("POST", CHAT, json=long, headers=headers) as first:
        # Kept: the connection would be closed with its iterator.
        pieces = first.iter_raw()
        next(pieces)
        second = http.post(CHAT, json={"messages": HELLO}, headers=headers)
        assert (second.status_code, second.json()["error"]["code"]) == (409, "session_busy")
        refused = http.delete("/v1/sessions/mine", headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "session_busy")
    request_id = first.headers["x-request-id"]
    # Its client has left; what was said until then is kept, and then forgotten.
    answers = [http.delete("/v1/sessions/mine", headers=headers).status_code for _ in range(2)]
    while answers[-1] == 409:
        answers.append(http.delete("/v1/sessions/mine", headers=headers).status_code)
    assert answers[-1] == 404 or http.delete("/v1/sessions/mine", headers=headers).status_code == 404
    for path in ("clear", "recycle"):
        assert http.post(f"/v1/sessions/mine/{path}", headers=headers).status_code == 404
    replay = {"x-request-id": request_id, "x-resume-from": "3-00000000"}
    gone = http.post(CHAT, json={**long, "max_tokens": 4}, headers={**headers, **replay})
    assert '"reply_gone"' in gone.text
    assert bystander(http) == undisturbed


def test_nothing_of_it_is_left(http: httpx.Client, server: Any) -> None:
    """No label, no session and no file has a name of theirs."""
    metrics = httpx.get(server.metrics_url, timeout=10).text
    for word in ("passwd", "DROP", "ERROR root", "SERVE_CONTROLLER_ACTOR", "bystander"):
        assert word not in metrics
    listed = http.get("/v1/sessions", headers={"authorization": f"Bearer {KEYS['bob']}"}).json()["data"]
    assert {one["id"] for one in listed} <= {"SERVE_CONTROLLER_ACTOR", "controller", "CON", "gone", "mine"}
    names = [path.name for path in server.state_dir.rglob("*")]
    assert not [name for name in names if "SERVE" in name or "bystander" in name or "CON" in name]
