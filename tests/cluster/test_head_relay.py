"""Requests about stored responses reach the head's replica as they came, once, and its answer comes back as it is."""

from __future__ import annotations

import asyncio
import socket

import aiohttp
import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from phi_cluster.cluster.head_relay import HeadClient, HeadRelay
from phi_cluster.cluster.http.edge import EdgeSettings
from phi_cluster.cluster.peer_door import PeerDoor
from phi_cluster.cluster.peer_proof import HEADER, ClusterKey, Guard
from phi_cluster.cluster.peers import PeerNews, PeerReplica, PeerTable, ReplicaOrders
from phi_cluster.cluster.placement import NodeLoad

KEY = ClusterKey("token", "1")
SETTINGS = EdgeSettings(("m",), 100, 100, max_body_bytes=1000)


class Head:
    """An app that notes what it is asked."""

    def __init__(self):
        self.asked, self.left = [], asyncio.Event()

    async def __call__(self, scope, receive, send):
        request = Request(scope, receive)
        relayed = scope.get("state", {}).get("is_relayed", False)
        path = (scope["raw_path"] + b"?" + scope["query_string"]).decode()
        self.asked.append((request.method, path, dict(request.headers), await request.body(), relayed))
        headers = {"x-request-id": "head", "retry-after": "3"}
        if request.query_params.get("stream"):

            async def words():
                try:
                    yield b"one "
                    await asyncio.sleep(0.3 if request.query_params["stream"] == "short" else 60)
                    yield b"two"
                except BaseException:
                    self.left.set()
                    raise

            await StreamingResponse(words(), 200, headers)(scope, receive, send)
            return
        await Response(b"told", 429, headers, media_type="text/plain")(scope, receive, send)


class Serving:
    def __init__(self, app):
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off", ws="none"))

    async def __aenter__(self):
        self.task = asyncio.ensure_future(self.server.serve())
        while not self.server.started:  # noqa: ASYNC110 -- what happens in a server says nothing
            await asyncio.sleep(0.01)
        return f"127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    async def __aexit__(self, *_):
        self.server.should_exit = self.server.force_exit = True
        await self.task


class Here:
    """A replica on a node that is not the head: its own app, and the relay in front of it."""

    def __init__(self, addresses, head="head"):
        self.own, self.errors, self.states = [], [], []
        self.table = PeerTable("here", lambda: 0)
        nodes = (NodeLoad("here", 0, 8), NodeLoad("head", 0, 8))
        replicas = tuple(PeerReplica(f"peer{number}", "head", one, number, 8) for number, one in enumerate(addresses))
        self.table.take(ReplicaOrders(None, head, PeerNews(nodes, replicas)), 0)
        self.client = HeadClient(KEY, self.table)

        async def app(scope, receive, send):
            self.own.append(scope["path"])
            await Response(b"own")(scope, receive, send)

        relay = HeadRelay(app, self.client, SETTINGS, lambda status, code: self.errors.append((status, code)))

        async def outer(scope, receive, send):
            scope["state"] = {"request_id": "here", **scope.get("state", {})}
            self.states.append(scope["state"])
            await relay(scope, receive, send)

        self.app = outer


@pytest.fixture
async def http():
    async with aiohttp.ClientSession(skip_auto_headers=("Content-Type",)) as session:
        yield session


async def test_it_comes_as_it_was_and_so_does_the_answer(http):
    head = Head()
    async with Serving(PeerDoor(head, Guard(KEY, "peer0"), None, None)) as address:
        here = Here([address])
        async with Serving(here.app) as own:
            url = f"http://{own}/v1/responses/a%2Fb?include=x&include=y"
            headers = {"Authorization": "Bearer key", "Host": "example.org", "Content-Type": "application/json"}
            async with http.post(url, data=b'{"a": 1}', headers=headers) as answer:
                assert (answer.status, await answer.read()) == (429, b"told")
                assert answer.headers["retry-after"] == "3"
                assert answer.headers["content-type"].startswith("text/plain")
                # What proves the answer stays between the two.
                assert HEADER not in answer.headers
        await here.client.close()
    ((method, path, given, body, relayed),) = head.asked
    assert (method, path, body, relayed) == ("POST", "/v1/responses/a%2Fb?include=x&include=y", b'{"a": 1}', True)
    assert (given["authorization"], given["host"]) == ("Bearer key", "example.org")
    # As the head's log has it.
    assert here.states[0]["request_id"] == "head"
    assert here.own == []


@pytest.mark.parametrize(
    ("path", "is_relayed"),
    [
        ("/v1/responses", True),
        ("/v1/conversations/c/items", True),
        ("/v1/responsesX", False),
        ("/v1/chat/completions", False),
        ("/v1/sessions", False),
        ("/", False),
    ],
)
async def test_only_what_the_head_stores_is_relayed(http, path, is_relayed):
    head = Head()
    async with Serving(PeerDoor(head, Guard(KEY, "peer0"), None, None)) as address:
        here = Here([address])
        async with Serving(here.app) as own, http.get(f"http://{own}{path}") as answer:
            await answer.read()
        await here.client.close()
    assert bool(head.asked) == is_relayed
    assert bool(here.own) != is_relayed


@pytest.mark.parametrize("head_id", ["here", None])
async def test_the_head_asks_nobody(http, head_id):
    here = Here(["127.0.0.1:1"], head_id)
    async with Serving(here.app) as own, http.get(f"http://{own}/v1/responses/x") as answer:
        assert await answer.read() == b"own"


async def test_who_was_sent_on_is_not_sent_on_again(http):
    """Two replicas that take each other for the head's."""
    second = Here(["127.0.0.1:1"])
    async with Serving(PeerDoor(second.app, Guard(KEY, "peer0"), None, None)) as address:
        first = Here([address])
        async with Serving(first.app) as own, http.get(f"http://{own}/v1/responses/x") as answer:
            assert await answer.read() == b"own"
        await first.client.close()
    assert second.own == ["/v1/responses/x"]
    # A client cannot say that it was.
    second = Here(["127.0.0.1:1"])
    async with (
        Serving(PeerDoor(second.app, Guard(KEY, "peer0"), None, None)) as own,
        http.get(f"http://{own}/v1/responses/x", headers={HEADER: "1 2 3 4"}) as answer,
    ):
        assert answer.status == 503
    await second.client.close()


async def test_words_come_as_they_are_said_and_who_leaves_ends_them(http):
    head = Head()
    async with Serving(PeerDoor(head, Guard(KEY, "peer0"), None, None)) as address:
        here = Here([address])
        async with Serving(here.app) as own:
            loop = asyncio.get_running_loop()
            async with http.get(f"http://{own}/v1/responses?stream=short") as answer:
                assert await answer.content.readany() == b"one "
                at = loop.time()
                assert await answer.content.readany() == b"two"
                assert loop.time() - at > 0.2
            async with http.get(f"http://{own}/v1/responses?stream=long") as answer:
                assert await answer.content.readany() == b"one "
                answer.close()
            await asyncio.wait_for(head.left.wait(), 5)
        await here.client.close()


async def test_a_replica_that_is_gone_is_passed_over(http):
    head = Head()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        gone = f"127.0.0.1:{free.getsockname()[1]}"
        async with Serving(PeerDoor(head, Guard(KEY, "peer1"), None, None)) as address:
            here = Here([gone, address])
            async with Serving(here.app) as own, http.get(f"http://{own}/v1/responses/x") as answer:
                assert answer.status == 429
            await here.client.close()
            here = Here([gone])
            async with Serving(here.app) as own, http.get(f"http://{own}/v1/responses/x") as answer:
                assert (answer.status, (await answer.json())["error"]["code"]) == (503, "unavailable")
                assert "retry-after" in answer.headers
            assert here.errors == [(503, "unavailable")]
            await here.client.close()
    assert len(head.asked) == 1


async def test_another_one_at_its_address_is_not_believed(http):
    head = Head()
    async with Serving(head) as address:
        here = Here([address])
        async with Serving(here.app) as own, http.get(f"http://{own}/v1/responses/x") as answer:
            assert answer.status == 503
        await here.client.close()


async def test_a_body_that_is_too_large_goes_no_further(http):
    head = Head()
    async with Serving(PeerDoor(head, Guard(KEY, "peer0"), None, None)) as address:
        here = Here([address])
        async with (
            Serving(here.app) as own,
            http.post(f"http://{own}/v1/responses", data=b"x" * 2000) as answer,
        ):
            assert (answer.status, (await answer.json())["error"]["code"]) == (413, "body_too_large")
        await here.client.close()
    assert head.asked == []
