"""Replicas' views of two nodes with one Redis: each session is looked after where it is, lists have each once, and the
accounts are one node's."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
import redis
from ray.exceptions import RayActorError

from phi_cluster.cluster.errors import InvalidRequest, LimitReached, NotFound
from phi_cluster.cluster.messages import AdmitTurn, ProcessId, SessionKey, TenantLimits, TurnUsage
from phi_cluster.cluster.session.directory import SessionDirectory
from phi_cluster.cluster.session.hibernation_store import FileHibernationStore
from phi_cluster.cluster.session.keeper_finder import KeeperFinder
from phi_cluster.cluster.session.node_processes import NodeProcesses
from phi_cluster.cluster.session.recycler import RecycleReason
from phi_cluster.cluster.session.redis_journal import RedisJournals
from phi_cluster.cluster.session_api import SESSION_SORTS, SessionQuery

KEY = SessionKey("tenant", "demo")
TOKENS = [7] * 5


class Handle:
    """A keeper's, as Ray would have it; what was asked of it."""

    def __init__(self, keeper):
        self.keeper = keeper
        self.asked = []
        self.is_dead = False

    def __getattr__(self, method):
        if not hasattr(self.keeper, method):
            raise AttributeError(method)

        async def call(*arguments):
            if self.is_dead:
                raise RayActorError
            self.asked.append(method)
            return await getattr(self.keeper, method)(*arguments)

        return SimpleNamespace(remote=lambda *arguments: asyncio.ensure_future(call(*arguments)))


class Others:
    def __init__(self, own_id, handles):
        self.own_id = own_id
        self.head_id = "head"
        self.handles = handles

    @property
    def ids(self):
        return {name for name, one in self.handles.items() if not one.is_dead} - {self.own_id}

    def keeper(self, node_id):
        if node_id not in self.handles:
            raise ValueError
        return self.handles[node_id]

    def moved(self, node_id):
        raise AssertionError("no keeper is renewed here")

    def lost(self, node_id):
        """It is looked for each time."""


@pytest.fixture
def cluster(make_node, redis_process, kit, clock, tmp_path):
    raw = redis.Redis.from_url(redis_process.url)
    raw.flushdb()
    raw.close()
    found = SimpleNamespace(nodes={}, handles={}, directories={})
    for name in ("head", "n2"):
        journals = RedisJournals(redis_process.connect(), kit.fingerprint, clock, name)
        store = FileHibernationStore(tmp_path / name, 2**30, reserve_nbytes=0)
        found.nodes[name] = make_node(node_id=name, journals=journals, store=store)
        found.handles[name] = Handle(found.nodes[name].keeper)
    limits = {"tenant": TenantLimits(concurrent_turns=2, kv_bytes=2**40)}
    for name in found.nodes:
        handle = found.handles[name]
        found.directories[name] = SessionDirectory(
            KeeperFinder(lambda _, handle=handle: handle, ["one"]),
            tmp_path,
            None,
            Others(name, found.handles),
            lambda t: limits.get(t, TenantLimits()),
        )
    return found


async def look(node):
    await node.keeper._elsewhere.look()


async def test_where_a_session_is_is_known_everywhere(cluster):
    assert await cluster.directories["head"].locate(KEY) is None
    await cluster.nodes["n2"].turn(KEY, "first ", TOKENS)
    seen = await cluster.directories["head"].locate(KEY)
    assert (seen.seat, seen.num_tokens) == ("n2", 5)
    await cluster.nodes["head"].turn(KEY, "first second ", [1])
    assert (await cluster.directories["n2"].locate(KEY)).seat == "head"


async def test_it_is_looked_after_where_it_is(cluster):
    await cluster.nodes["n2"].turn(KEY, "first ", TOKENS)
    here = cluster.directories["head"]
    assert (await here.get("tenant", "demo"))["node_id"] == "n2"
    assert (await here.recycle("tenant", "demo"))["state"] == "active"
    assert await here.said("tenant", "demo") == "first "
    assert await here.export("tenant", "demo")
    assert (await here.fork("tenant", "demo", "twin", None))["node_id"] == "n2"
    assert (await here.hibernate("tenant", "demo"))["state"] == "hibernated"
    assert (await here.clear("tenant", "demo"))["num_tokens"] == 0
    await here.delete("tenant", "demo")
    with pytest.raises(NotFound):
        await here.get("tenant", "demo")
    # This one was asked where it is, and nothing else.
    assert set(cluster.handles["head"].asked) == {"locate", "describe"}
    assert cluster.nodes["head"].keeper._roster.find(KEY) is None


async def test_where_its_node_is_gone_it_is_looked_after_from_its_journal(cluster):
    await cluster.nodes["n2"].turn(KEY, "first ", TOKENS)
    cluster.handles["n2"].is_dead = True
    described = await cluster.directories["head"].get("tenant", "demo")
    assert (described["state"], described["node_id"], described["turns"]) == ("stored", None, 1)


async def test_a_keeper_that_is_started_again_is_waited_for(cluster):
    await cluster.nodes["n2"].turn(KEY, "first ", TOKENS)
    others = cluster.directories["head"]._others
    others.handles = {"head": cluster.handles["head"]}
    known = type("Known", (Others,), {"ids": property(lambda self: {"n2"})})
    others.__class__ = known
    asking = asyncio.ensure_future(cluster.directories["head"].get("tenant", "demo"))
    await asyncio.sleep(0.15)
    assert not asking.done()
    others.handles = cluster.handles
    assert (await asking)["node_id"] == "n2"


async def test_a_move_that_cannot_be_had_is_none(cluster):
    assert await cluster.directories["head"].move_here(KEY, "n2") is False
    cluster.nodes["head"].keeper.move_here = lambda *asked: asyncio.sleep(0, asked == (KEY, "n2"))
    assert await cluster.directories["head"].move_here(KEY, "n2") is True


@pytest.fixture
async def listed(cluster, clock):
    """a is active at n2, b held there; c is held at the head, d hibernates at n2, e is stored; f went on from n2, where
    it has memory still, to the head. Each was made a second after the one before."""
    head, n2 = cluster.nodes["head"], cluster.nodes["n2"]
    for number, name in enumerate("abcdef", 1):
        clock.now += 1
        node = head if name == "c" else n2
        await node.turn(SessionKey("tenant", name), "said ", [7] * number)
    clock.now += 1
    await head.turn(SessionKey("tenant", "f"), "said more ", [8])
    await n2.keeper.recycle(SessionKey("tenant", "a"), RecycleReason.REQUESTED)
    await n2.keeper.hibernate(SessionKey("tenant", "d"))
    n2.keeper._hibernation.policy.tokens_per_second = 1e9
    await n2.keeper.put_to_sleep(SessionKey("tenant", "e"))
    await n2.turn(SessionKey("other", "a"), "said ", [7])
    clock.now += 10
    for node in (head, n2):
        await look(node)
        await node.keeper.report()
    return cluster


@pytest.mark.parametrize("asked", ["head", "n2"])
async def test_each_session_is_told_once_by_whoever_holds_it(listed, asked):
    page = await listed.directories[asked].browse(SessionQuery("tenant", 10))
    told = [(one["id"], one["state"], one["node_id"]) for one in page.sessions]
    assert told == [
        ("a", "active", "n2"),
        ("b", "held", "n2"),
        ("c", "held", "head"),
        ("d", "hibernated", None),
        ("e", "stored", None),
        ("f", "held", "head"),
    ]
    assert page.totals["sessions"] == 6
    assert page.totals["by_state"] == {"active": 1, "held": 3, "hibernated": 1, "stored": 1}
    assert page.totals["kv_cache_bytes"] == sum(one["kv_cache_bytes"] for one in page.sessions)
    assert page.totals["disk_bytes"] == page.sessions[3]["disk_bytes"] > 0
    assert [one["num_tokens"] for one in page.sessions] == [1, 2, 3, 4, 5, 7]
    assert (page.has_more, page.last) == (False, "f")


@pytest.mark.parametrize("sort", SESSION_SORTS)
@pytest.mark.parametrize("is_descending", [False, True])
@pytest.mark.parametrize("limit", [1, 2, 5])
async def test_pages_are_a_whole_list_in_pieces(listed, sort, is_descending, limit):
    here, there = listed.directories["head"], listed.directories["n2"]
    whole = await here.browse(SessionQuery(None, 100, sort=sort, is_descending=is_descending))
    expected = [(one["tenant"], one["id"]) for one in whole.sessions]
    assert len(expected) == len(set(expected)) == 7
    seen, after = [], None
    while True:
        # Whichever node is asked.
        page = await (here if len(seen) % 2 else there).browse(SessionQuery(None, limit, after, sort, is_descending))
        seen += [(one["tenant"], one["id"]) for one in page.sessions]
        assert page.totals == whole.totals
        if not page.has_more:
            break
        after = page.last
    assert seen == expected
    if sort in ("tokens", "turns"):
        values = [one["num_tokens" if sort == "tokens" else "turns"] for one in whole.sessions]
        assert values == sorted(values, reverse=is_descending)


async def test_states_nodes_and_names_are_looked_for_in_the_whole_list(listed):
    here = listed.directories["head"]

    async def found(**wanted):
        return [one["id"] for one in (await here.browse(SessionQuery("tenant", 10, **wanted))).sessions]

    assert await found(state="stored") == ["e"]
    assert await found(state="active") == ["a"]
    assert await found(node_id="n2") == ["a", "b"]
    assert await found(node_id="head") == ["c", "f"]
    assert await found(search="F") == ["f"]
    with pytest.raises(InvalidRequest, match="after"):
        await found(after="gone", sort="tokens")


async def test_a_node_that_goes_leaves_what_the_journals_know(listed):
    listed.handles["n2"].is_dead = True
    page = await listed.directories["head"].browse(SessionQuery("tenant", 10))
    assert [(one["id"], one["state"]) for one in page.sessions] == [
        *(("a", "stored"), ("b", "stored"), ("c", "held"), ("d", "stored"), ("e", "stored"), ("f", "held"))
    ]


# Accounts.


def ask(claim, pid=1):
    return AdmitTurn(KEY, TenantLimits(concurrent_turns=2), claim, ProcessId(pid, 1), 10)


async def test_turns_of_all_nodes_count_together(cluster):
    await cluster.directories["n2"].admit(ask("one"))
    await cluster.directories["head"].admit(ask("two"))
    with pytest.raises(LimitReached):
        await cluster.directories["n2"].admit(ask("three"))
    assert "admit" not in cluster.handles["n2"].asked
    await cluster.directories["n2"].charge(TurnUsage("tenant", "one", 5, 0, 3))
    await cluster.directories["n2"].admit(ask("three"))
    (usage,) = await cluster.directories["n2"].usage("tenant")
    assert (usage["requests"], usage["completion_tokens"], usage["turns_running"]) == (3, 3, 2)


async def test_a_process_of_another_node_is_not_taken_for_a_dead_one_of_this(cluster, processes):
    process = ProcessId(1, 1)
    await cluster.directories["n2"].admit(ask("one"))
    await cluster.directories["n2"].admit(ask("two"))
    # There is none of this name here, which says nothing of there.
    accounts = cluster.nodes["head"].keeper._accounts
    looking = NodeProcesses(accounts, cluster.directories["head"]._others.keeper)
    await looking.look()
    with pytest.raises(LimitReached):
        await cluster.directories["n2"].admit(ask("three"))
    processes.dead.add(process)
    with pytest.raises(LimitReached):
        await cluster.directories["n2"].admit(ask("three"))
    await NodeProcesses(accounts, cluster.directories["head"]._others.keeper).look()
    await cluster.directories["n2"].admit(ask("three", pid=2))
    # With its node all is gone.
    del cluster.handles["n2"]
    await NodeProcesses(accounts, cluster.directories["head"]._others.keeper).look()
    assert accounts.num_turns("tenant") == 0


async def test_the_other_node_knows_what_memory_a_tenant_may_have(cluster):
    from phi_cluster.cluster.messages import BeginTurn

    grant = await cluster.directories["n2"].begin_turn(BeginTurn(KEY, "r", "said "))
    assert cluster.nodes["n2"].keeper._accounts.limits_of("tenant").kv_bytes == 2**40
    await cluster.directories["n2"].abandon(KEY, grant.epoch)
    await cluster.directories["n2"].begin_turn(BeginTurn(KEY, "r2", "said "))
    assert cluster.handles["n2"].asked.count("learn_limits") == 1
    assert cluster.handles["head"].asked.count("learn_limits") == 0


async def test_memory_of_all_nodes_is_told(cluster):
    await cluster.directories["head"].admit(ask("one"))
    await cluster.directories["n2"]._tell_limits("tenant")
    await cluster.nodes["n2"].turn(KEY, "first ", TOKENS)
    await cluster.nodes["head"].turn(SessionKey("tenant", "second"), "first ", TOKENS)
    expected = sum(
        [one["kv_cache_bytes"] for one in (await cluster.directories["n2"].browse(SessionQuery("tenant", 9))).sessions]
    )
    for name in ("head", "n2"):
        (usage,) = await cluster.directories[name].usage("tenant")
        assert usage["kv_cache_bytes"] == expected > 0
