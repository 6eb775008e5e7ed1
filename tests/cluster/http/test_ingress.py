"""What clients may not tell Serve, and one request id in every response."""

import json
from pathlib import Path

import pytest

from phi_cluster.cluster.config import Config
from phi_cluster.cluster.http.ingress import FALLBACK_PORT_VARIABLE, MAY_SLEEP_VARIABLE, Ingress, middlewares
from phi_cluster.cluster.ray_environment import INGRESS_PATH, environment


def wrapped(app):
    for middleware in middlewares():
        app = middleware.cls(app, *middleware.args, **middleware.kwargs)
    return app


@pytest.mark.parametrize("ids", [[b"ours"], [b"ours", b"serves"], []])
async def test_headers_at_the_border(ids):
    sent, seen = [], []

    async def app(scope, receive, send):
        seen.extend(scope["headers"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-request-id", one) for one in ids]})
        await send({"type": "http.response.body", "body": b"x"})

    async def send(message):
        sent.append(message)

    headers = [
        (b"x-request-disconnect-disabled", b"1"),
        (b"X-Request-Timeout-Seconds", b"nan"),
        (b"x-session-id", b"a"),
    ]
    await wrapped(app)({"type": "http", "path": "/", "headers": headers}, None, send)
    assert seen == [(b"x-session-id", b"a")]
    assert sent[0]["headers"] == [(b"x-request-id", one) for one in ids[:1]]
    assert sent[1]["body"] == b"x"


def server_on(port):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 418, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": b"{}"})

    async def ask(path):
        sent = []

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": path, "headers": [], "server": ("127.0.0.1", port)}
        await wrapped(app)(scope, None, send)
        return sent[0]["status"], json.loads(sent[1]["body"])

    return ask


@pytest.mark.parametrize("may_sleep", ["0", "1"])
async def test_probes_are_answered_where_there_is_no_replica_and_wake_none(monkeypatch, may_sleep):
    monkeypatch.setenv(FALLBACK_PORT_VARIABLE, "30899")
    monkeypatch.setenv(MAY_SLEEP_VARIABLE, may_sleep)
    fallback, replica = server_on(30899), server_on(30000)
    assert [await replica(path) for path in ("/health", "/ready")] == [(418, {})] * 2
    # What is not asked by probes waits for a replica, which wakes one.
    assert await fallback("/v1/chat/completions") == (418, {})
    status, told = await fallback("/ready")
    if may_sleep == "1":
        assert (status, told) == (200, {"status": "asleep"})
        assert await fallback("/health") == (200, {"status": "asleep"})
    else:
        assert (status, told["error"]["code"]) == (503, "unavailable")
        assert await fallback("/health") == (200, {"status": "ok"})


def test_the_variables_are_those_that_the_processes_get():
    asleep = Config.model_validate({"replicas": 0, "autoscaling": {"max_replicas": 1}})
    assert environment(asleep, Path("/x"), "")[MAY_SLEEP_VARIABLE] == "1"
    given = environment(Config(), Path("/x"), "")
    assert given[MAY_SLEEP_VARIABLE] == "0"
    assert int(given[FALLBACK_PORT_VARIABLE]) == Config().server.internal_ports + 899


async def test_what_is_not_http_passes():
    seen = []

    async def app(scope, receive, send):
        seen.append(scope)

    await wrapped(app)({"type": "lifespan"}, None, None)
    assert seen == [{"type": "lifespan"}]


def test_serve_finds_it():
    module, _, name = INGRESS_PATH.rpartition(".")
    assert module == Ingress.__module__
    assert getattr(__import__(module, fromlist=[name]), name) is middlewares


@pytest.mark.parametrize(
    ("status", "kind", "told"),
    [(404, b"text/plain", 503), (503, b"text/plain", 503), (500, b"text/plain", 500), (404, b"application/json", 404)],
)
async def test_serves_own_errors_are_told_as_ours(status, kind, told):
    """A proxy without routes says 404 to everything; only our app knows what is not there, and says so in JSON."""
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
        await send(
            {"type": "http.response.body", "body": b"Path '/v1' not found. Ping http://inside", "more_body": True}
        )
        await send({"type": "http.response.body", "body": b""})

    async def send(message):
        sent.append(message)

    await wrapped(app)({"type": "http", "path": "/v1", "headers": []}, None, send)
    assert sent[0]["status"] == told
    body = b"".join(message.get("body", b"") for message in sent)
    if kind == b"text/plain":
        assert json.loads(body)["error"]["type"] in ("unavailable_error", "server_error")
        assert b"inside" not in body
        assert len(sent) == 2
        if told == 503:
            assert dict(sent[0]["headers"])[b"retry-after"] == b"1"
    else:
        assert b"inside" in body
