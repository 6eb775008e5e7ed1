"""/v1/cluster and /v1/events: pages, the stream, and whom they are for."""

import asyncio
import json

import httpx
import pytest

ALICE, BOB = ({"authorization": f"Bearer phi-{name}"} for name in ("alice", "bob"))


async def test_the_cluster(client):
    state = (await client.get("/v1/cluster")).json()
    assert state["object"] == "cluster"
    assert {"nodes", "replicas", "controller", "last_minute", "history"} <= set(state)
    assert (await client.get("/v1/cluster?x=1")).json()["error"]["param"] == "x"


async def test_pages_of_events(client, watch):
    for _ in range(5):
        watch.add()
    newest = (await client.get("/v1/events?limit=2")).json()
    assert [one["number"] for one in newest["data"]] == [104, 105]
    assert newest["last"] == 105
    oldest = (await client.get("/v1/events?after=0&limit=2")).json()
    assert ([one["number"] for one in oldest["data"]], oldest["has_more"], oldest["last"]) == ([101, 102], True, 102)


@pytest.mark.parametrize(
    ("query", "param"),
    [("after=-1", "after"), ("after=x", "after"), ("after=" + "9" * 17, "after"), ("stream=1", "stream"), ("a=b", "a")],
)
async def test_bad_queries(client, query, param):
    answer = await client.get(f"/v1/events?{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_only_admins_where_there_are_keys(make_app, settings, keys, watch):
    transport = httpx.ASGITransport(app=make_app(settings, keys=keys))
    async with httpx.AsyncClient(transport=transport, base_url="http://edge.test") as client:
        for path in ("/v1/cluster", "/v1/events", "/v1/events?stream=true"):
            assert (await client.get(path, headers=BOB)).status_code == 403
            assert (await client.get(path)).status_code == 401
        assert (await client.get("/v1/events", headers=ALICE)).status_code == 200
    # Everybody's sessions are named to her.
    assert watch.asked[-1][2] is None


async def test_without_keys_everybody_sees_events_but_no_names_of_others(client, watch):
    await client.get("/v1/events")
    assert watch.asked[-1][2] == "default"
    await client.get("/v1/events", headers={"authorization": "Bearer mine"})
    assert watch.asked[-1][2].startswith("key-")


async def read_stream(serve, app, query, headers, count):
    found = []
    url = await serve(app)
    async with (
        httpx.AsyncClient(base_url=url, timeout=20) as http,
        http.stream("GET", f"/v1/events?stream=true{query}", headers=headers) as stream,
    ):
        assert stream.headers["content-type"].startswith("text/event-stream")
        async for line in stream.aiter_lines():
            if line.startswith("data: {"):
                found.append(json.loads(line.removeprefix("data: "))["number"])
            if line == "data: [DONE]" or len(found) == count:
                break
    return found


@pytest.mark.parametrize(
    ("query", "headers", "first"),
    [("&after=101", {}, 102), ("", {"last-event-id": "102"}, 103), ("&after=101", {"last-event-id": "102"}, 102)],
)
async def test_a_stream_goes_on_behind_a_number(serve, app, watch, query, headers, first):
    for _ in range(4):
        watch.add()
    assert (await read_stream(serve, app, query, headers, 105 - first))[0] == first


async def test_a_stream_tells_what_comes_and_ends_with_the_server(serve, app, watch):
    watch.add()
    reading = asyncio.ensure_future(read_stream(serve, app, "", {}, 10))
    await asyncio.wait_for(watch.waited.acquire(), 20)
    watch.add()
    await asyncio.wait_for(watch.waited.acquire(), 20)
    watch.is_ending = True
    watch.add()
    # The first one was before, and the last one is told before the end.
    assert await asyncio.wait_for(reading, 20) == [102, 103]
