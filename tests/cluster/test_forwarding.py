"""Turns that are run on another node: over real sockets, to a real door, and what becomes of them when it breaks."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from types import SimpleNamespace

import aiohttp
import pytest
import uvicorn

from phi_cluster.cluster.errors import InvalidRequest, NotFound, Overloaded, PhiError, Unavailable
from phi_cluster.cluster.forwarding import ForwardedTurns, conversation_name
from phi_cluster.cluster.peer_door import PeerDoor
from phi_cluster.cluster.peer_link import TURNS_PATH, PeerLinks, PeerLost
from phi_cluster.cluster.peer_proof import HEADER, ClusterKey, Guard
from phi_cluster.cluster.peers import PeerNews, PeerReplica, PeerTable, ReplicaOrders
from phi_cluster.cluster.placement import Costs, NodeLoad
from phi_cluster.cluster.turn_api import (
    BEGINNING,
    Position,
    TextDelta,
    TurnFinished,
    TurnRequest,
    TurnStarted,
)
from phi_cluster.cluster.turn_wire import SentTurn, encode_turn

STARTED = TurnStarted(7, 3)
WORDS = [TextDelta(word, 1, Position(number, number)) for number, word in enumerate(("one", "two", "three"), 1)]
FINISHED = TurnFinished("stop", 7, 3, 3)
SCRIPT = [STARTED, *WORDS, FINISHED]
REQUEST = TurnRequest(
    "tenant", "demo", "r1", {"max_tokens": 3, "seed": None}, messages=[{"role": "user", "content": "x"}]
)
KEY = ClusterKey("token", "1")


class Runner:
    """Plays its script, and notes what it was asked and how each run ended."""

    def __init__(self, *script):
        self.script = script or SCRIPT
        self.requests, self.ends = [], []
        self.is_full = False

    def check_room(self, num_choices=1):
        if self.is_full:
            raise Overloaded("full")

    async def run(self, request):
        self.requests.append(request)
        try:
            for one in self.script:
                if isinstance(one, asyncio.Event):
                    await one.wait()
                elif isinstance(one, Exception):
                    raise one
                else:
                    yield one
        except (asyncio.CancelledError, GeneratorExit):
            self.ends.append("left")
            raise
        except BaseException:
            self.ends.append("failed")
            raise
        self.ends.append("finished")


class Mover:
    def __init__(self):
        self.moves, self.found, self.asked = [], None, 0

    async def move_here(self, key, source):
        self.moves.append((key.session_id, source))
        return True

    async def locate(self, key):
        self.asked += 1
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


class Served:
    """A replica on another node, with a door and an app behind it."""

    def __init__(self, *script, name="peer", key=KEY, beat=0.05):
        self.runner, self.mover = Runner(*script), Mover()
        self.reached = []

        async def app(scope, receive, send):
            self.reached.append((scope["path"], scope.get("state", {}).get("is_relayed", False)))
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body", "body": b"nothing"})

        guard = None if key is None else Guard(key, name)
        self.server = uvicorn.Server(
            uvicorn.Config(
                PeerDoor(app, guard, self.runner, self.mover, beat),
                port=0,
                log_level="error",
                lifespan="off",
                ws="none",
            )
        )
        self.name = name

    async def __aenter__(self):
        self.task = asyncio.ensure_future(self.server.serve())
        await until(lambda: self.server.started)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.peer = PeerReplica(self.name, "there", f"127.0.0.1:{port}", 0, 8)
        return self

    async def __aexit__(self, *_):
        self.server.should_exit = self.server.force_exit = True
        await self.task

    async def ended(self):
        await until(lambda: self.runner.ends)
        return self.runner.ends


@pytest.fixture
async def links():
    links = PeerLinks(KEY, silence_seconds=1.0)
    yield links
    await links.close()


async def until(is_so):
    while not is_so():  # noqa: ASYNC110 -- what happens in a server says nothing
        await asyncio.sleep(0.01)


async def collect(got, events):
    async for one in events:
        got.append(one)


async def told(events):
    async with aclosing(events):
        return [event async for event in events]


async def test_a_turn_is_run_at_the_peer(links):
    async with Served() as there:
        sent = SentTurn(replace(REQUEST, stop=("a",)), "source")
        assert await told(links.run(there.peer, sent)) == SCRIPT
        assert there.runner.requests == [sent.request]
        assert there.mover.moves == [("demo", "source")]
        assert there.reached == []


async def test_errors_come_through_before_and_after_the_first_event(links):
    async with Served(InvalidRequest("wrong", param="prompt")) as there:
        with pytest.raises(InvalidRequest, match="wrong") as error:
            await told(links.run(there.peer, SentTurn(REQUEST)))
        assert error.value.param == "prompt"
    async with Served(STARTED, WORDS[0], RuntimeError("secret")) as there:
        got = []
        with pytest.raises(PhiError, match="server failed") as error:
            await collect(got, links.run(there.peer, SentTurn(REQUEST)))
        assert "secret" not in str(error.value)
        assert got == [STARTED, WORDS[0]]


async def test_who_leaves_ends_the_turn_there(links):
    async with Served(STARTED, WORDS[0], asyncio.Event()) as there:
        async with aclosing(links.run(there.peer, SentTurn(REQUEST))) as events:
            async for event in events:
                if event == WORDS[0]:
                    break
        assert await asyncio.wait_for(there.ended(), 5) == ["left"]
        # Before anything was said, too.
        there.runner.script, there.runner.ends = [asyncio.Event()], []
        reading = asyncio.ensure_future(told(links.run(there.peer, SentTurn(REQUEST))))
        await until(lambda: len(there.runner.requests) == 2)
        reading.cancel()
        assert await asyncio.wait_for(there.ended(), 5) == ["left"]


async def test_a_long_silence_is_no_death_while_it_says_that_it_lives(links):
    wait = asyncio.Event()
    async with Served(STARTED, wait, FINISHED) as there:
        reading = asyncio.ensure_future(told(links.run(there.peer, SentTurn(REQUEST))))
        await asyncio.sleep(1.5)
        assert not reading.done()
        wait.set()
        assert await reading == [STARTED, FINISHED]


async def test_a_peer_that_says_nothing_is_lost(links):
    async with Served(STARTED, asyncio.Event(), beat=60) as there:
        with pytest.raises(PeerLost) as lost:
            await told(links.run(there.peer, SentTurn(REQUEST)))
        assert lost.value.may_have_begun
        assert await asyncio.wait_for(there.ended(), 5) == ["left"]


async def test_a_peer_that_is_not_there_is_lost_and_was_not_asked(links):
    async with Served() as there:
        pass
    with pytest.raises(PeerLost) as lost:
        await told(links.run(there.peer, SentTurn(REQUEST)))
    assert not lost.value.may_have_begun


async def test_another_one_at_its_address_is_not_believed(links):
    async with Served(name="other") as there:
        with pytest.raises(PeerLost) as lost:
            await told(links.run(replace(there.peer, replica_id="peer"), SentTurn(REQUEST)))
        assert not lost.value.may_have_begun
        assert there.runner.requests == []


@pytest.mark.parametrize("key", [KEY, None, ClusterKey("other", "1"), ClusterKey("token", "2")])
async def test_strangers_get_what_an_unknown_path_gets(key):
    body = encode_turn(SentTurn(REQUEST))
    good, _ = KEY.prove("peer", TURNS_PATH, body)
    async with Served(key=key) as there, aiohttp.ClientSession() as client:
        url = f"http://{there.peer.address}{TURNS_PATH}"
        attempts = [{}, {HEADER: "x"}, {HEADER: KEY.prove("other", TURNS_PATH, body)[0]}]
        if key is not KEY:
            attempts.append({HEADER: good})
        for headers in attempts:
            async with client.post(url, data=body, headers=headers) as response:
                assert (response.status, await response.read()) == (404, b"nothing")
        assert there.runner.requests == []
        # Nobody has been let in, so nobody is believed to be sent on.
        assert there.reached == [(TURNS_PATH, False)] * len(attempts)


async def test_a_proof_is_good_once_and_for_its_body_and_method():
    body = encode_turn(SentTurn(REQUEST))
    async with Served() as there, aiohttp.ClientSession() as client:
        url = f"http://{there.peer.address}{TURNS_PATH}"

        async def status(data, proof, method="POST", **more):
            async with client.request(method, url, data=data, headers={HEADER: proof, **more}) as response:
                await response.read()
                return response.status

        proof, _ = KEY.prove("peer", TURNS_PATH, body)
        assert await status(body, proof) == 200
        assert await status(body, proof) == 404
        for other in (body + b"x", b"", encode_turn(SentTurn(replace(REQUEST, tenant="other")))):
            assert await status(other, KEY.prove("peer", TURNS_PATH, body)[0]) == 404
        # Understood by nobody, and not run.
        assert await status(b"x", KEY.prove("peer", TURNS_PATH, b"x")[0]) == 404
        assert await status(None, KEY.prove("peer", TURNS_PATH, b"")[0], "GET") == 404
        assert len(there.runner.requests) == 1


# Where turns belong.


class Counted:
    def __init__(self):
        self.outcomes = []

    def on_forward(self, outcome):
        self.outcomes.append(outcome)


@pytest.fixture
def make(links):
    """A replica "here" that knows of one peer on the node "there"."""

    def make(peer, here=(), there=(), seat=None):
        runner, mover, counted = Runner(), Mover(), Counted()
        mover.found = seat and SimpleNamespace(seat=seat, num_tokens=1000)
        table = PeerTable("here", lambda: 0)
        nodes = (NodeLoad("here", 0, 8, *here), NodeLoad("there", 0, 8, *there))
        table.take(ReplicaOrders(None, "here", PeerNews(nodes, (peer,))), 0)
        costs = Costs(1000, 1e9, 0.0, 100.0)
        turns = ForwardedTurns(runner, table, mover, links, costs, 4, counted)
        return SimpleNamespace(turns=turns, runner=runner, mover=mover, table=table, counted=counted)

    return make


DRAINING = (0, 0, True)


async def test_it_is_run_where_its_session_is(make):
    async with Served() as there:
        here = make(there.peer, seat="there")
        assert await told(here.turns.run(REQUEST)) == SCRIPT
        assert here.runner.requests == []
        assert there.runner.requests == [REQUEST]
        assert here.counted.outcomes == ["forwarded"]
        assert here.turns.num_forwarded == 0
        here.mover.found = SimpleNamespace(seat="here", num_tokens=5)
        assert await told(here.turns.run(REQUEST)) == SCRIPT
        assert here.runner.requests == [REQUEST]
        here.mover.found = None
        await told(here.turns.run(REQUEST))
        here.mover.found = Unavailable("Redis is away")
        await told(here.turns.run(REQUEST))
        assert len(here.runner.requests) == 3


async def test_alone_nobody_is_asked(make):
    here = make(PeerReplica("peer", "there", "127.0.0.1:1", 0, 8), seat="there")
    here.table.take(ReplicaOrders(None, "here"), 0)
    assert await told(here.turns.run(REQUEST)) == SCRIPT
    assert here.mover.asked == 0


async def test_memory_of_a_node_that_drains_is_fetched(make):
    here = make(PeerReplica("peer", "there", "127.0.0.1:1", 0, 8), there=DRAINING, seat="there")
    assert await told(here.turns.run(REQUEST)) == SCRIPT
    assert here.mover.moves == [("demo", "there")]
    assert here.counted.outcomes == ["moved"]
    async with Served() as there:
        here = make(there.peer, here=DRAINING, seat="here")
        assert await told(here.turns.run(REQUEST)) == SCRIPT
        assert there.mover.moves == [("demo", "here")]
        assert here.mover.moves == []


async def test_unnamed_conversations_go_where_their_name_says(make):
    async with Served() as there:
        here = make(there.peer)
        for number in range(20):
            messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": str(number)}]
            asked = replace(REQUEST, session_id=None, messages=messages)
            await told(here.turns.run(asked))
            grown = [*messages, {"role": "assistant", "content": "ok"}, {"role": "user", "content": "more"}]
            await told(here.turns.run(replace(asked, messages=grown)))
        for runner in (here.runner, there.runner):
            first = [one.messages[1]["content"] for one in runner.requests]
            assert first
            # Each with what follows it.
            assert first[::2] == first[1::2]
        assert here.mover.asked == 0


def test_what_names_an_unnamed_conversation():
    def name(**fields):
        return conversation_name(replace(REQUEST, session_id=None, **fields))

    assert name() != conversation_name(replace(REQUEST, session_id=None, tenant="other"))
    assert name(cache_hint="a") == name(cache_hint="a", messages=[{"role": "user", "content": "other"}]) != name()
    text = "Once upon a time there was a prompt that was long enough to be told from others."
    assert name(messages=None, prompt=text) == name(messages=None, prompt=text + " And more.")
    assert name(messages=None, prompt=[1, 2]) != name(messages=None, prompt="ab")
    assert name(messages=[{"role": "assistant", "content": None, "tool_calls": []}])


# What breaks.


async def test_a_peer_that_cannot_be_reached_is_left_alone(make):
    here = make(PeerReplica("peer", "there", "127.0.0.1:1", 0, 8), seat="there")
    assert await told(here.turns.run(REQUEST)) == SCRIPT
    # As it came: nobody has begun it.
    assert here.runner.requests == [REQUEST]
    assert here.counted.outcomes == ["forwarded", "lost"]
    assert await told(here.turns.run(REQUEST)) == SCRIPT
    assert here.counted.outcomes == ["forwarded", "lost"]


@pytest.mark.parametrize("num_said", [0, 1, 2, 3])
async def test_a_turn_whose_peer_dies_goes_on_here(make, num_said):
    async with Served(*SCRIPT[:num_said], asyncio.Event(), beat=60) as there:
        here = make(there.peer, seat="there")
        rest = [one for one in WORDS if one.position.count >= num_said]
        here.runner.script = [TurnStarted(7, 0), *rest, FINISHED]
        got = await told(here.turns.run(REQUEST))
        if num_said:
            assert got == SCRIPT
        assert got[-1] == FINISHED
        assert sum(isinstance(one, TurnStarted) for one in got) == 1
        # Read on, behind what has come: it may have begun there.
        (asked,) = here.runner.requests
        assert asked.resume_from == (WORDS[num_said - 2].position if num_said > 1 else BEGINNING)
        assert asked.request_id == REQUEST.request_id
        assert here.counted.outcomes == ["forwarded", "lost"]
        assert await asyncio.wait_for(there.ended(), 5) == ["left"]


async def test_who_reads_on_reads_on_behind_his_own_position(make):
    async with Served(asyncio.Event(), beat=60) as there:
        here = make(there.peer, seat="there")
        await told(here.turns.run(replace(REQUEST, resume_from=Position(2, 2))))
        assert here.runner.requests[0].resume_from == Position(2, 2)


async def test_several_replies_cannot_be_read_on(make):
    several = replace(REQUEST, num_choices=2)
    async with Served(STARTED, WORDS[0], asyncio.Event(), beat=60) as there:
        here = make(there.peer, seat="there")
        got = []
        with pytest.raises(Unavailable, match="lost"):
            await collect(got, here.turns.run(several))
        assert got == [STARTED, WORDS[0]]
        assert here.runner.requests == []
        # Before the first word they begin here.
        there.runner.script = [asyncio.Event()]
        here = make(there.peer, seat="there")
        assert await told(here.turns.run(several)) == SCRIPT
        assert here.runner.requests == [several]


@pytest.mark.parametrize("refusal", [Overloaded("full"), Unavailable("starting")])
async def test_a_peer_without_room_sends_it_back(make, refusal):
    async with Served(refusal) as there:
        here = make(there.peer, seat="there")
        assert await told(here.turns.run(REQUEST)) == SCRIPT
        assert here.runner.requests == [REQUEST]
        there.runner.script = [STARTED, refusal]
        with pytest.raises(type(refusal)):
            await told(here.turns.run(REQUEST))


async def test_other_errors_are_the_turns(make):
    async with Served(NotFound("no")) as there:
        here = make(there.peer, seat="there")
        with pytest.raises(NotFound):
            await told(here.turns.run(REQUEST))
        assert here.runner.requests == []


async def test_a_client_that_leaves_ends_it_there(make):
    async with Served(STARTED, WORDS[0], asyncio.Event()) as there:
        here = make(there.peer, seat="there")
        async with aclosing(here.turns.run(REQUEST)) as events:
            async for event in events:
                if event == WORDS[0]:
                    assert here.turns.num_forwarded == 1
                    break
        assert here.turns.num_forwarded == 0
        assert await asyncio.wait_for(there.ended(), 5) == ["left"]
        assert here.runner.requests == []


async def test_a_full_replica_sends_on_what_belongs_elsewhere(make):
    async with Served() as there:
        here = make(there.peer, seat="there")
        here.runner.is_full = True
        here.turns.check_room()
        with pytest.raises(Overloaded):
            here.turns.check_room(5)
        here.table.take(ReplicaOrders(None, "here"), 0)
        with pytest.raises(Overloaded):
            here.turns.check_room()


async def test_a_trace_goes_on_at_the_peer(make):
    class Seen:
        traceparent = "00-1-2-01"

        def event(self, *_):
            pass

    async with Served() as there:
        here = make(there.peer, seat="there")
        await told(here.turns.run(replace(REQUEST, span=Seen(), traceparent="00-0-0-00")))
        assert there.runner.requests[0].traceparent == "00-1-2-01"
