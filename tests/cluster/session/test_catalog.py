"""Pages of sessions: sorted, found, counted, whoever holds them, and cheap where the disk has thousands."""

import pytest

from phi_cluster.cluster.errors import InvalidRequest
from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.session.journal import Glance
from phi_cluster.cluster.session.recycler import RecycleReason
from phi_cluster.cluster.session_api import SESSION_SORTS, ImportLimits, SessionQuery

A, B, C, D = (SessionKey("tenant", name) for name in "abcd")


def ids(page):
    return [one["id"] for one in page.sessions]


@pytest.fixture
async def node(make_node, clock):
    """a has an actor, b is held, c hibernates, d is on the disk only; each has a turn and a token more than the one
    before, and was made a second later."""
    node = make_node()
    for number, key in enumerate((A, B, C, D), 1):
        clock.now += 1
        for turn in range(number):
            await node.turn(key, "said " * (turn + 1), [7] * 3)
    await node.keeper.recycle(A, RecycleReason.REQUESTED)
    await node.keeper.hibernate(C)
    node.keeper._hibernation.policy.tokens_per_second = 1e9
    await node.keeper.put_to_sleep(D)
    clock.now += 10
    # As the controller asks, once a second.
    await node.keeper.report()
    return node


async def test_all_states_with_totals(node):
    page = await node.keeper.browse(SessionQuery("tenant", 10))
    assert [(one["id"], one["state"], one["tenant"]) for one in page.sessions] == [
        ("a", "active", "tenant"),
        ("b", "held", "tenant"),
        ("c", "hibernated", "tenant"),
        ("d", "stored", "tenant"),
    ]
    assert page.totals["by_state"] == {"active": 1, "held": 1, "hibernated": 1, "stored": 1}
    assert page.totals["kv_cache_bytes"] == sum(one["kv_cache_bytes"] for one in page.sessions)
    assert page.totals["disk_bytes"] == page.sessions[2]["disk_bytes"] > 0
    assert [one["turns"] for one in page.sessions] == [1, 2, 3, 4]
    assert (page.has_more, page.last) == (False, "d")


async def test_what_is_stored_is_told_as_it_is(node, clock):
    """Without reading its turns; the same as one by one, which reads them."""
    listed = (await node.keeper.browse(SessionQuery("tenant", 10))).sessions[3]
    assert listed == await node.keeper.describe(D) | {"tenant": "tenant"}
    assert (listed["num_tokens"], listed["idle_seconds"], listed["age_seconds"]) == (12, 10.0, 10.0)


@pytest.mark.parametrize(
    ("sort", "descending"),
    [("turns", "dcba"), ("tokens", "dcba"), ("age", "abcd"), ("idle", "abcd"), ("id", "dcba")],
)
async def test_sorted_in_pages(node, sort, descending):
    for is_descending in (True, False):
        seen, after = "", None
        while True:
            page = await node.keeper.browse(SessionQuery("tenant", 3, after, sort, is_descending))
            seen += "".join(ids(page))
            assert page.totals["sessions"] == 4
            if not page.has_more:
                break
            after = page.last
        assert seen == (descending if is_descending else descending[::-1])


async def test_the_largest_come_first_and_then_what_the_disk_holds(node):
    page = await node.keeper.browse(SessionQuery("tenant", 10, sort="kv_cache_bytes", is_descending=True))
    assert ids(page)[2:] == ["c", "d"]


async def test_found_by_state_node_and_name(node):
    async def found(**wanted):
        return ids(await node.keeper.browse(SessionQuery("tenant", 10, **wanted)))

    assert await found(state="hibernated") == ["c"]
    assert await found(state="active") == ["a"]
    assert await found(node_id="no") == ["a", "b"]
    assert await found(node_id="other") == []
    await node.turn(SessionKey("tenant", "Alice-1"), "hello ", [1])
    assert await found(search="LICE") == ["Alice-1"]
    assert await found(search="x") == []


async def test_of_all_tenants(node):
    await node.turn(SessionKey("other", "b"), "hello ", [1])
    page = await node.keeper.browse(SessionQuery(None, 2))
    assert [(one["tenant"], one["id"]) for one in page.sessions] == [("tenant", "a"), ("other", "b")]
    assert page.last == "other/b"
    rest = await node.keeper.browse(SessionQuery(None, 10, page.last))
    assert [(one["tenant"], one["id"]) for one in rest.sessions] == [("tenant", "b"), ("tenant", "c"), ("tenant", "d")]
    assert ids(await node.keeper.browse(SessionQuery("nobody", 10))) == []
    by_turns = await node.keeper.browse(SessionQuery(None, 2, sort="turns", is_descending=True))
    assert by_turns.last == "tenant/c"


async def test_unnamed_conversations_are_not_listed(node):
    await node.turn(SessionKey("tenant", "unnamed", ephemeral=True), "hello ", [1])
    assert len((await node.keeper.browse(SessionQuery(None, 10))).sessions) == 4


async def test_a_place_that_is_gone(node):
    await node.keeper.delete(B)
    assert ids(await node.keeper.browse(SessionQuery("tenant", 10, "b"))) == ["c", "d"]
    with pytest.raises(InvalidRequest, match="first page"):
        await node.keeper.browse(SessionQuery("tenant", 10, "b", "turns"))


async def test_what_was_seen_of_a_journal_is_forgotten_when_it_changes(node, clock):
    query = SessionQuery("tenant", 10, sort="turns", is_descending=True)
    assert ids(await node.keeper.browse(query))[0] == "d"
    for turn in range(3, 6):
        await node.turn(C, "said " * (turn + 1), [9])
    await node.keeper.put_to_sleep(C)
    page = await node.keeper.browse(query)
    assert (ids(page)[0], page.sessions[0]["state"], page.sessions[0]["turns"]) == ("c", "stored", 6)
    await node.keeper.delete(D)
    data = await node.keeper.export(C)
    assert D not in node.keeper._catalog._glances
    await node.keeper.import_session(D, data, ImportLimits(1000, 2**20))
    assert {one["id"]: one["turns"] for one in (await node.keeper.browse(query)).sessions}["d"] > 0


async def test_a_journal_that_cannot_be_read_hides_only_itself(node):
    path = node.journals.open(D).path
    path.write_bytes(b"no database at all" * 100)
    page = await node.keeper.browse(SessionQuery("tenant", 10, sort="turns"))
    assert sorted(ids(page)) == ["a", "b", "c"]
    assert page.totals["sessions"] == 4


@pytest.mark.parametrize("sort", SESSION_SORTS)
async def test_thousands_on_the_disk_are_read_once(node, sort):
    """And by name only those of the page."""
    asked = []

    def glance(key):
        asked.append(key.session_id)
        return Glance(len(asked), 1, 0, 0, 0.0, 0.0)

    node.journals.glance = glance
    for number in range(5000):
        node.keeper._custody.roster.add_stored(SessionKey("big", f"s{number:04}"))
    page = await node.keeper.browse(SessionQuery("big", 50, sort=sort, is_descending=True))
    assert (len(page.sessions), page.totals["sessions"], page.has_more) == (50, 5000, True)
    by_name = sort in ("id", "kv_cache_bytes")
    assert len(asked) == (50 if by_name else 5000)
    again = await node.keeper.browse(SessionQuery("big", 50, page.last, sort=sort, is_descending=True))
    assert len(asked) == (100 if by_name else 5000)
    assert not set(ids(page)) & set(ids(again))
