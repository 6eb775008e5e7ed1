"""/v1/sessions: pages, single sessions, actions, and that a key sees only its own."""

import asyncio

import httpx
import pytest
from starlette.datastructures import Headers

from phi_cluster.cluster.http.auth import anonymous_tenant


@pytest.fixture
def named(sessions):
    for session_id in "abcde":
        sessions.add("default", session_id)
    sessions.add(anonymous_tenant(Headers({"authorization": "Bearer other"})), "theirs")
    return sessions


async def test_pages(client, named):
    first = (await client.get("/v1/sessions?limit=3")).json()
    assert [one["id"] for one in first["data"]] == ["a", "b", "c"]
    assert (first["object"], first["has_more"], first["first_id"], first["last_id"]) == (
        "list",
        True,
        "a",
        "c",
    )
    second = (await client.get("/v1/sessions", params={"limit": 3, "after": first["last_id"]})).json()
    assert [one["id"] for one in second["data"]] == ["d", "e"]
    assert second["has_more"] is False
    empty = (await client.get("/v1/sessions?after=e")).json()
    assert (empty["data"], empty["first_id"], empty["last_id"]) == ([], None, None)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=-1", "limit"),
        ("limit=1.0", "limit"),
        ("limit=%D9%A1", "limit"),
        ("limit=", "limit"),
        ("limit=" + "9" * 5000, "limit"),
        ("limit=1&limit=2", "limit"),
        ("after=../x", "after"),
        ("after=a%0d%0ab", "after"),
        ("page=2", "page"),
        ("sort=size", "sort"),
        ("order=up", "order"),
        ("state=asleep", "state"),
        ("node=x", "node"),
        ("search=%3Cb%3E", "search"),
        ("after=default/a", "after"),
    ],
)
async def test_bad_queries(client, named, query, param):
    response = await client.get(f"/v1/sessions?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_one_session_and_its_actions(client, named):
    stats = (await client.get("/v1/sessions/a")).json()
    assert (stats["id"], stats["object"], stats["num_tokens"], stats["engine_pid"]) == (
        "a",
        "session",
        59,
        None,
    )
    assert (await client.post("/v1/sessions/a/recycle")).json()["recycles"] == 1
    asleep = (await client.post("/v1/sessions/a/hibernate")).json()
    assert (asleep["state"], asleep["kv_cache_bytes"], asleep["disk_bytes"]) == ("hibernated", 0, 8192)
    assert (await client.post("/v1/sessions/a/clear", json={})).json()["num_tokens"] == 0
    response = await client.delete("/v1/sessions/a")
    assert response.json() == {"id": "a", "object": "session.deleted", "deleted": True}
    assert (await client.get("/v1/sessions/a")).status_code == 404
    assert (await client.delete("/v1/sessions/a")).status_code == 404


async def test_actions_take_nothing(client, named):
    response = await client.post("/v1/sessions/a/clear", json={"keep": 3})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "keep"
    assert named.known["default", "a"]["num_tokens"] == 59


async def test_a_fork_is_another_session(client, named):
    response = await client.post("/v1/sessions/a/fork", json={"id": "a2", "turn": 1})
    assert (response.status_code, response.json()["id"], response.json()["turns"]) == (200, "a2", 1)
    assert (await client.post("/v1/sessions/a/fork")).json()["id"] == "made"
    taken = await client.post("/v1/sessions/a/fork", json={"id": "b"})
    assert (taken.status_code, taken.json()["error"]["code"], taken.json()["error"]["param"]) == (
        409,
        "session_exists",
        "id",
    )
    assert (await client.post("/v1/sessions/z/fork")).status_code == 404
    # Another tenant's cannot be forked, and its names are free.
    other = {"authorization": "Bearer other"}
    assert (await client.post("/v1/sessions/a/fork", headers=other)).status_code == 404
    assert (await client.post("/v1/sessions/theirs/fork", json={"id": "a"}, headers=other)).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"id": "../x"}, "id"),
        ({"id": 7}, "id"),
        ({"id": ""}, "id"),
        ({"turn": 0}, "turn"),
        ({"turn": True}, "turn"),
        ({"turn": 1.0}, "turn"),
        ({"turn": "1"}, "turn"),
        ({"turn": 2**40}, "turn"),
        ({"turn": 9}, "turn"),
        ({"name": "x"}, "name"),
    ],
)
async def test_bad_forks(client, named, body, param):
    before = set(named.known)
    response = await client.post("/v1/sessions/a/fork", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert set(named.known) == before


async def test_export_and_import(client, named):
    exported = await client.get("/v1/sessions/a/export")
    assert (exported.status_code, exported.headers["content-type"]) == (200, "application/octet-stream")
    assert named.exported_up_to is None
    imported = await client.post("/v1/sessions/import?id=again", content=exported.content)
    assert (imported.status_code, imported.json()["id"]) == (200, "again")
    assert (await client.post("/v1/sessions/import", content=exported.content)).json()["id"] == "made"
    assert (await client.get("/v1/sessions/z/export")).status_code == 404
    assert (await client.get("/v1/sessions/a/export?kv=true")).status_code == 200
    # No more than an import may have.
    assert named.exported_up_to == 2**20
    for query, param in (("kv=yes", "kv"), ("kv=true&kv=true", "kv"), ("cache=true", "cache")):
        refused = await client.get(f"/v1/sessions/a/export?{query}")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    assert (await client.get("/v1/sessions/a/export", headers={"authorization": "Bearer other"})).status_code == 404


@pytest.fixture
async def served(make_app, serve, settings):
    """A client of the same app behind a real server."""
    async with httpx.AsyncClient(base_url=await serve(make_app(settings)), timeout=60.0) as client:
        yield client


async def closed(file):
    """The client may have its last byte a little before."""
    for _ in range(1000):
        if file.closed:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the file stays open")


async def test_a_long_export_comes_in_pieces_and_is_closed(served, named):
    named.cache = bytes(range(256)) * 4096
    async with served.stream("GET", "/v1/sessions/a/export?kv=true") as stream:
        pieces = [piece async for piece in stream.aiter_raw()]
    assert b"".join(pieces) == b"exported a" + named.cache
    assert stream.headers["content-length"] == str(10 + 2**20)
    assert len(pieces) > 2
    await closed(named.downloads[-1].file)


async def test_an_export_that_ends_too_early_is_no_whole_one(served, named):
    exported = named.export

    async def too_short(*arguments):
        download = await exported(*arguments)
        download.nbytes += 5
        return download

    named.export = too_short
    with pytest.raises(httpx.RemoteProtocolError):
        await served.get("/v1/sessions/a/export")
    await closed(named.downloads[-1].file)


async def test_an_import_may_be_longer_than_other_bodies_and_comes_in_pieces(client, named):
    async def pieces():
        yield b"exported a"
        for _ in range(3):
            yield b" " * 70_000

    response = await client.post("/v1/sessions/import?id=long", content=pieces())
    # So far the fake has it all: the name is none of a session.
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
    assert (named.import_limits.vocab_size, named.import_limits.max_turns_nbytes) == (1000, 64 * 1024)


@pytest.mark.parametrize(
    ("query", "content", "status", "param"),
    [
        ("?id=../x", b"exported a", 400, "id"),
        ("?id=x&id=y", b"exported a", 400, "id"),
        ("?name=x", b"exported a", 400, "name"),
        ("?id=b", b"exported a", 409, "id"),
        ("", b"something else", 400, None),
        ("", b"", 400, None),
        ("", b"exported " + bytes(9 * 2**20), 413, None),
    ],
)
async def test_bad_imports(client, named, query, content, status, param):
    response = await client.post(f"/v1/sessions/import{query}", content=content)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
    assert len(named.known) == 6


@pytest.mark.parametrize("path", ["a%0d%0ab", "a%20b", "%2E%2E", "x" * 129, "%ff"])
async def test_bad_ids(client, named, path):
    for method, action in (
        ("GET", ""),
        ("DELETE", ""),
        ("POST", "/clear"),
        ("POST", "/recycle"),
        ("POST", "/fork"),
        ("POST", "/hibernate"),
    ):
        response = await client.request(method, f"/v1/sessions/{path}{action}")
        assert response.status_code in (400, 404, 405), (method, action)
        assert response.json()["error"]["type"] == "invalid_request_error"
    assert len(named.known) == 6


async def test_a_key_sees_only_its_own(client, named):
    mine = await client.get("/v1/sessions", headers={"authorization": "Bearer other"})
    assert [one["id"] for one in mine.json()["data"]] == ["theirs"]
    assert (await client.get("/v1/sessions/a", headers={"authorization": "Bearer other"})).status_code == 404
    assert (await client.delete("/v1/sessions/theirs")).status_code == 404
    assert len(named.known) == 6


async def test_what_was_said(client, named):
    named.said["a"] = [{"role": "user", "content": "<b>Hi</b>"}, {"role": "assistant", "content": "Hello."}]
    assert (await client.get("/v1/sessions/a/messages")).json() == {"object": "list", "data": named.said["a"]}
    assert (await client.get("/v1/sessions/theirs/messages")).status_code == 404


async def test_sorting_and_finding_are_asked_for(client, named):
    await client.get("/v1/sessions?sort=tokens&state=held&node=0a&search=B&limit=7")
    query = named.queries[-1]
    assert (query.tenant, query.sort, query.is_descending, query.limit) == ("default", "tokens", True, 7)
    assert (query.state, query.node_id, query.search) == ("held", "0a", "B")
    page = (await client.get("/v1/sessions?sort=age&order=asc")).json()
    assert page["totals"]["sessions"] == 5
    assert not named.queries[-1].is_descending
    await client.get("/v1/sessions?order=desc")
    assert named.queries[-1].is_descending


@pytest.fixture
async def keyed(make_app, settings, keys, sessions):
    for owner in ("alice", "bob"):
        sessions.add(owner, f"of-{owner}")
    transport = httpx.ASGITransport(app=make_app(settings, keys=keys))
    async with httpx.AsyncClient(transport=transport, base_url="http://edge.test") as client:
        yield client


async def test_an_admin_sees_and_looks_after_all(keyed, sessions):
    admin = {"authorization": "Bearer phi-alice"}
    page = (await keyed.get("/v1/sessions?tenant=*&limit=1", headers=admin)).json()
    assert ([one["tenant"] for one in page["data"]], page["last_id"]) == (["alice"], "alice/of-alice")
    after = (await keyed.get("/v1/sessions?tenant=*&after=alice/of-alice", headers=admin)).json()
    assert [(one["tenant"], one["id"]) for one in after["data"]] == [("bob", "of-bob")]
    assert (await keyed.get("/v1/sessions?tenant=*&after=of-alice", headers=admin)).status_code == 400
    assert (await keyed.get("/v1/sessions/of-bob", headers=admin)).status_code == 404
    for action in ("clear", "hibernate", "recycle", "fork"):
        answer = await keyed.post(f"/v1/sessions/of-bob/{action}?tenant=bob", headers=admin)
        assert answer.status_code == 200, action
    assert ("bob", "made") in sessions.known
    # What was said there is not hers to read.
    for path, status in (("export?tenant=bob", 400), ("export", 404), ("messages?tenant=bob", 404)):
        assert (await keyed.get(f"/v1/sessions/of-bob/{path}", headers=admin)).status_code == status
    assert (await keyed.delete("/v1/sessions/of-bob?tenant=bob", headers=admin)).status_code == 200
    assert ("bob", "of-bob") not in sessions.known


async def test_nobody_else_does(keyed, sessions):
    bob = {"authorization": "Bearer phi-bob"}
    for method, path in (
        ("GET", "?tenant=*"),
        ("GET", "?tenant=alice"),
        ("GET", "/of-alice?tenant=alice"),
        ("POST", "/of-alice/clear?tenant=alice"),
        ("DELETE", "/of-alice?tenant=alice"),
    ):
        assert (await keyed.request(method, f"/v1/sessions{path}", headers=bob)).status_code == 403, path
    assert ("alice", "of-alice") in sessions.known
