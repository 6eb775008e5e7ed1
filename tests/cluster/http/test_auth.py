"""Keys at the edge: who comes in, what is refused how, and what a key may see."""

import httpx
import pytest
from starlette.datastructures import Headers

from phi_cluster.cluster.errors import LimitReached
from phi_cluster.cluster.http.auth import anonymous_tenant
from phi_cluster.cluster.http.edge import EdgeSettings
from phi_cluster.cluster.turn_api import TurnStarted

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hi"}]}
ALICE, BOB = {"authorization": "Bearer phi-alice"}, {"authorization": "Bearer phi-bob"}


@pytest.fixture
def app(make_app, settings, keys, usage):
    return make_app(settings, keys=keys, usage=usage)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer  "},
        {"authorization": "phi-alice"},
        {"authorization": "Basic phi-alice"},
        {"authorization": "Bearer phi-alice x"},
        {"authorization": "Bearer phi-alicf"},
        {"authorization": "Bearer Bearer phi-alice"},
        {"x-api-key": "phi-alice"},
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", CHAT),
        ("POST", "/v1/completions"),
        ("GET", "/v1/models"),
        ("GET", "/v1/sessions"),
        ("DELETE", "/v1/sessions/a"),
        ("POST", "/v1/engines/recycle"),
        ("GET", "/v1/usage"),
        ("GET", "/openapi.json"),
        ("GET", "/nope"),
        ("GET", "/health/"),
        ("GET", "//health"),
        ("GET", "/health/../v1/models"),
        ("GET", "/v1/models?x=/health"),
    ],
)
async def test_without_a_valid_key_nothing_is_told(client, turns, headers, method, path):
    response = await client.request(method, path, headers=headers)
    assert response.status_code == 401
    error = response.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "invalid_api_key", None)
    assert "alice" not in response.text
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-request-id"]
    assert turns.requests == []


async def test_health_is_open_to_all(client):
    for path in ("/health", "/ready"):
        assert (await client.get(path)).status_code == 200
        assert (await client.get(path, headers={"authorization": "Bearer wrong"})).status_code == 200


@pytest.mark.parametrize("host", ["health", "edge.test/health", "127.0.0.1:8000/health?", "a b"])
async def test_a_host_header_opens_nothing(connect, host):
    connection = connect("/v1/sessions", {}, headers={"host": host})
    assert (await connection.next())["status"] == 401


async def test_a_key_is_a_tenant(client, turns):
    for headers in (ALICE, BOB, {"authorization": "bearer   phi-bob "}):
        assert (await client.post(CHAT, json=HELLO, headers=headers)).status_code == 200
    assert [turn.tenant for turn in turns.requests] == ["alice", "bob", "bob"]


async def test_another_keys_session_is_one_that_there_is_not(client, sessions):
    sessions.add("alice", "hers")
    for method, path in (
        ("GET", "/v1/sessions/{}"),
        ("DELETE", "/v1/sessions/{}"),
        ("POST", "/v1/sessions/{}/clear"),
        ("POST", "/v1/sessions/{}/recycle"),
    ):
        answers = [await client.request(method, path.format(name), headers=BOB) for name in ("hers", "none")]
        bodies = [answer.json()["error"]["message"].replace("hers", "none") for answer in answers]
        assert [answer.status_code for answer in answers] == [404, 404]
        assert bodies[0] == bodies[1]
    assert (await client.get("/v1/sessions", headers=BOB)).json()["data"] == []
    assert (await client.get("/v1/sessions/hers", headers=ALICE)).status_code == 200


async def test_what_wants_an_admin(client, sessions):
    sessions.add("bob", "his")
    for method, path in (("POST", "/v1/engines/recycle"), ("GET", "/v1/sessions?tenant=alice")):
        refused = await client.request(method, path, headers=BOB)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "missing_scope")
    assert (await client.post("/v1/engines/recycle", headers=ALICE)).status_code == 202
    listed = await client.get("/v1/sessions?tenant=bob", headers=ALICE)
    assert [one["id"] for one in listed.json()["data"]] == ["his"]
    assert (await client.get("/v1/sessions?tenant=", headers=ALICE)).status_code == 400


async def test_usage_is_ones_own_but_for_an_admin(client, usage):
    for headers in (BOB, ALICE):
        response = await client.get("/v1/usage", headers=headers)
        assert response.status_code == 200
        assert response.json()["data"][0]["object"] == "usage"
    assert usage.asked == ["bob", None]


async def test_rates_are_told_and_refusals_say_when(client, turns):
    rates = {"requests": (60, 59, 1.0), "tokens": (1000, 0, 372.5)}
    turns.script[0] = TurnStarted(7, 3, rates)
    for stream in (False, True):
        response = await client.post(CHAT, json={**HELLO, "stream": stream}, headers=ALICE)
        assert response.status_code == 200
        assert response.headers["x-ratelimit-limit-requests"] == "60"
        assert response.headers["x-ratelimit-remaining-requests"] == "59"
        assert response.headers["x-ratelimit-reset-requests"] == "1s"
        assert response.headers["x-ratelimit-limit-tokens"] == "1000"
        assert response.headers["x-ratelimit-reset-tokens"] == "6m12.5s"
    turns.script[0] = LimitReached("enough", retry_after=0.2, rates={"requests": (60, 0, 0.2)})
    response = await client.post(CHAT, json=HELLO, headers=ALICE)
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    assert response.headers["x-ratelimit-reset-requests"] == "200ms"
    assert response.json()["error"]["code"] == "rate_limit_exceeded"


@pytest.mark.parametrize(
    ("headers", "status", "param"),
    [
        ({}, 200, None),
        ({"host": "127.0.0.1:8000"}, 200, None),
        ({"host": "LOCALHOST"}, 200, None),
        ({"host": "[::1]:80"}, 200, None),
        ({"host": "evil.test"}, 403, "host"),
        ({"host": "127.0.0.1.evil.test:8000"}, 403, "host"),
        ({"host": "evil.test:127.0.0.1"}, 403, "host"),
        ({"host": "127.0.0.1", "origin": "http://127.0.0.1"}, 200, None),
        ({"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:3000"}, 403, "origin"),
        ({"host": "127.0.0.1", "origin": "https://evil.test"}, 403, "origin"),
        ({"host": "127.0.0.1", "origin": "null"}, 403, "origin"),
    ],
)
async def test_without_keys_pages_of_others_stay_outside(make_app, headers, status, param):
    settings = EdgeSettings(("phi",), 128, 1000, allowed_hosts=("127.0.0.1", "localhost", "::1"))
    transport = httpx.ASGITransport(app=make_app(settings))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        response = await client.post("/v1/sessions/a/clear", headers=headers)
        assert response.status_code == (status if status != 200 else 404)
        if param:
            assert response.json()["error"]["param"] == param
        assert (await client.get("/health", headers=headers)).status_code == 200


async def test_cors_is_off_unless_it_is_configured(make_app, client, settings):
    asks = {"origin": "https://app.test", "access-control-request-method": "POST"}
    off = await client.options(CHAT, headers=asks)
    assert off.status_code in (401, 405)
    assert not [name for name in off.headers if name.startswith("access-control")]
    on = make_app(EdgeSettings(("phi",), 128, 1000, cors_origins=("https://app.test",)))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=on), base_url="http://edge.test") as client:
        asks["access-control-request-headers"] = "authorization, x-session-id, content-type"
        allowed = await client.options(CHAT, headers=asks)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://app.test"
        got = await client.get("/v1/models", headers={"origin": "https://app.test"})
        assert got.headers["access-control-allow-origin"] == "https://app.test"
        assert "x-ratelimit-remaining-tokens" in got.headers["access-control-expose-headers"]
        other = await client.options(CHAT, headers={**asks, "origin": "https://evil.test"})
        assert "access-control-allow-origin" not in other.headers
        assert (await client.get("/v1/models", headers={"origin": "https://evil.test"})).status_code == 403


async def test_usage_without_keys(make_app, settings):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=make_app(settings)), base_url="http://a") as client:
        response = await client.get("/v1/usage")
    assert response.status_code == 404
    assert "server.keys" in response.json()["error"]["message"]


def tenant(*authorization: str) -> str:
    return anonymous_tenant(Headers(raw=[(b"authorization", one.encode("latin-1")) for one in authorization]))


def test_without_keys_every_key_is_a_tenant():
    assert tenant() == tenant("") == tenant("Bearer") == tenant("Bearer  ") == "default"
    assert tenant("Bearer k1") == tenant("bearer  k1 ")
    others = ["Bearer k1", "Bearer k2", "Bearer default", "Basic k1", "Bearer \xe4"]
    assert len({*map(tenant, others), "default"}) == 6
    assert "k1" not in tenant("Bearer k1")[4:]
