"""Sessions that move from one node's keeper to another's: the same bytes, or nothing happened."""

from __future__ import annotations

import asyncio
import os
import pickle
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError

from phi_cluster.cluster.errors import SessionBusy
from phi_cluster.cluster.events import EventKind
from phi_cluster.cluster.messages import BeginTurn, SessionKey
from phi_cluster.cluster.session import moving_memory, offers
from phi_cluster.cluster.session.moving_memory import Piece
from phi_cluster.cluster.session.recycler import RecycleReason
from phi_cluster.cluster.session.segment import Segment

KEY = SessionKey("tenant", "mover")
UNNAMED = SessionKey("tenant", "", ephemeral=True)
TOKENS = list(range(1, 101))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Many of them in a small session, across its regions."""
    monkeypatch.setattr(moving_memory, "PIECE_NBYTES", 5000)


@pytest.fixture
async def nodes(make_nodes):
    here, there = make_nodes("a", "b")
    await here.turn(KEY, "first ", TOKENS, value=7)
    return here, there


def used(node, memory, num_tokens=100):
    """The bytes of so many tokens, of what `Node.memory` gives."""
    start = node.layout.ids_offset
    return [memory[o - start : o - start + n] for o, n in node.layout.used_ranges(num_tokens, num_tokens)]


def results(node):
    families = {name: samples for name, *_, samples in node.keeper._metrics.snapshot()}
    found = {}
    for sample in families["phi_session_moves"]:
        name, labels, value = sample
        if name.endswith("_total") and value:
            found[dict(labels)["result"]] = value
    return found


def kinds(node):
    return [event.kind for event in node.keeper._custody.events.after(0)]


def entry_of(node, key=KEY):
    return node.keeper._roster.find(key)


@pytest.mark.parametrize("place", ["keeper", "actor", "disk"])
async def test_a_session_moves_with_the_same_bytes(nodes, kit, place):
    here, there = nodes
    before = used(here, await here.memory(KEY))
    assert len(before) == 5
    num_open = len([name for name in kit.descriptors() if "phi-kv" in name])
    if place == "actor":
        await here.keeper.recycle(KEY, RecycleReason.REQUESTED)
    elif place == "disk":
        await here.keeper.hibernate(KEY)
    assert await there.keeper.move_here(KEY, "a")

    assert used(there, await there.memory(KEY)) == before
    assert before[1] == bytes([7]) * 12_800
    assert there.leases() == {KEY.digest: there.layout.nbytes_used(100)}
    assert results(there) == {"moved": 1}
    assert EventKind.SESSION_MOVED in kinds(there)
    # Whoever looks for it is sent there.
    assert there.journals.seats == [KEY]
    # The one that had it has nothing of it but the journal.
    assert entry_of(here) is None
    assert here.leases() == {}
    assert (await here.keeper.describe(KEY))["state"] == "stored"
    assert len([name for name in kit.descriptors() if "phi-kv" in name]) == num_open
    assert (await here.keeper.report()).recycles.get("migrating", 0) == (place == "actor")
    # It goes on there, warm.
    grant = await there.turn(KEY, "first second", [500], value=8)
    assert (grant.num_kept_tokens, grant.num_computed_tokens, grant.turns) == (100, 100, 1)


async def test_its_pages_are_given_back_also_if_somebody_still_maps_them(nodes, kit):
    here, there = nodes
    mapped = Segment.open(entry_of(here).session.memory, here.layout, kit.fingerprint)
    assert await there.keeper.move_here(KEY, "a")
    assert (mapped.num_tokens, mapped.nbytes_resident) == (0, 4096)
    mapped.close()


async def test_it_comes_back_and_goes_on(nodes):
    here, there = nodes
    assert await there.keeper.move_here(KEY, "a")
    await there.turn(KEY, "first second", [500], value=8)
    assert await here.keeper.move_here(KEY, "b")
    grant = await here.turn(KEY, "first second third", [600], value=9)
    assert grant.num_computed_tokens == 101
    assert grant.turns == 2


async def test_a_file_under_a_key_moves_too_and_the_other_key_is_the_other_nodes_own(make_nodes, tmp_path, links):
    [here] = make_nodes("a", key=b"1" * 32)
    [there] = make_nodes("b", key=b"2" * 32)
    await here.turn(KEY, "first ", TOKENS, value=7)
    before = used(here, await here.memory(KEY))
    await here.keeper.hibernate(KEY)
    assert await there.keeper.move_here(KEY, "a")
    assert used(there, await there.memory(KEY)) == before
    assert list((tmp_path / "a").rglob("*.kv")) == []


async def test_an_unnamed_conversation_moves_with_what_was_said(nodes):
    here, there = nodes
    grant = await here.turn_unnamed("hello ", TOKENS, value=5)
    before = used(here, await here.memory(grant.key))
    assert await there.keeper.move_here(grant.key, "a")
    assert used(there, await there.memory(grant.key)) == before
    assert entry_of(here, grant.key) is None
    # Whoever repeats it goes on with it.
    again = await there.begin(UNNAMED, "hello again")
    assert (again[0].key, again[0].num_computed_tokens) == (grant.key, 100)


async def test_what_an_interrupted_turn_left_stays(nodes, kit):
    here, there = nodes
    grant, _ = await here.begin(KEY, "first second")
    segment = Segment.open(grant.segment, here.layout, kit.fingerprint)
    segment.append_tokens([777])
    kit.compute(segment, 9)
    segment.close()
    await here.keeper.abandon(KEY, grant.epoch)
    assert await there.keeper.move_here(KEY, "a")
    assert (await there.turn(KEY, "first second", [500])).num_tokens == 100


async def test_time_that_it_idled_comes_along(nodes, clock):
    _, there = nodes
    clock.now += 500
    assert await there.keeper.move_here(KEY, "a")
    assert (await there.keeper.describe(KEY))["idle_seconds"] == pytest.approx(500)


# Nothing happens.


def unchanged(here, there, kit):
    assert entry_of(there) is None
    assert there.leases() == {}
    assert there.keeper._moves.num_coming == 0
    assert here.keeper._offers._given == {}
    assert here.keeper._offers._taken == set()


async def computed_anew(node, text="first second"):
    """The next turn at the target finds only the journal."""
    grant = await node.turn(KEY, text, [500])
    return grant.num_kept_tokens, grant.num_computed_tokens


async def test_there_is_no_such_node_or_no_such_session(nodes, kit):
    here, there = nodes
    assert not await there.keeper.move_here(KEY, "nobody")
    assert not await there.keeper.move_here(SessionKey("tenant", "nobody"), "a")
    assert results(there) == {"failed": 1, "refused": 1}
    unchanged(here, there, kit)
    assert (await here.turn(KEY, "first second", [500])).num_computed_tokens == 100


async def test_where_nobody_is_known_nothing_moves(make_node):
    node = make_node()
    assert not await node.keeper.move_here(KEY, "a")


@pytest.mark.parametrize("when", ["offer", "piece", "let_go"])
async def test_the_node_dies(nodes, links, when):
    _, there = nodes

    async def die(answer):
        links["a"].is_dead = True
        return answer

    links["a"].between[when] = die
    has_moved = await there.keeper.move_here(KEY, "a")
    # Dead when it was told that all is well: what came is whole.
    assert has_moved == (when == "let_go")
    if not has_moved:
        assert entry_of(there) is None
        assert there.leases() == {}
        assert await computed_anew(there) == (100, 0)
    else:
        assert await computed_anew(there) == (100, 100)


@pytest.mark.parametrize("damage", ["flipped", "cut", "swapped", "foreign"])
async def test_a_damaged_piece(nodes, links, kit, damage):
    here, there = nodes
    other = SessionKey("tenant", "other")
    await here.turn(other, "other ", TOKENS, value=66)
    count = 0

    async def harm(piece):
        nonlocal count
        count += 1
        data = bytearray(piece.data)
        if count == 3:
            if damage == "flipped":
                data[100] ^= 1
            elif damage == "cut":
                data = data[:-1]
            else:
                move = next(iter(here.keeper._offers._given.values()))
                if damage == "foreign":
                    segment = Segment.open(entry_of(here, other).session.memory, here.layout, kit.fingerprint)
                    move = offers._of_segment(entry_of(here, other), segment, here.keeper._custody.recorded(other))
                data = move.memory.piece(5)
        return Piece(data)

    links["a"].between["piece"] = harm
    assert not await there.keeper.move_here(KEY, "a")
    unchanged(here, there, kit)
    assert results(there) == {"failed": 1}
    assert (await here.turn(KEY, "first second", [500])).num_computed_tokens == 100


@pytest.mark.parametrize("method", ["offer", "piece", "let_go"])
async def test_a_silent_node(nodes, links, monkeypatch, method):
    here, there = nodes
    monkeypatch.setattr("phi_cluster.cluster.session.moving._ANSWER_SECONDS", 0.3)
    go_on = asyncio.Event()

    async def wait(answer):
        await go_on.wait()
        return answer

    links["a"].between[method] = wait
    assert await there.keeper.move_here(KEY, "a") == (method == "let_go")
    if method != "let_go":
        # If the other does not end its offer by itself, it does when somebody comes.
        assert (await here.turn(KEY, "first ", [])).num_computed_tokens == 100
    go_on.set()
    assert here.keeper._offers._given == {}


async def test_an_offer_of_which_nothing_is_read_ends(nodes, monkeypatch):
    here, _ = nodes
    monkeypatch.setattr("phi_cluster.cluster.session.offers._SILENT_SECONDS", 1.0)
    offer = await here.keeper.offer(KEY)
    assert entry_of(here).session.describe().state == "handing_over"
    assert await here.keeper.piece(offer.move_id, 0) is not None
    for _ in range(200):
        if entry_of(here).session.describe().state == "active":
            break
        await asyncio.sleep(0.02)
    assert await here.keeper.piece(offer.move_id, 1) is None
    assert not await here.keeper.let_go(offer.move_id, True)
    assert (await here.turn(KEY, "first second", [500])).num_computed_tokens == 100


async def test_no_room(nodes, links, make_nodes, kit):
    here, _ = nodes
    [small] = make_nodes("c", budget=50_000)
    assert not await small.keeper.move_here(KEY, "a")
    assert results(small) == {"no_room": 1}
    unchanged(here, small, kit)
    assert (await here.turn(KEY, "first second", [500])).num_computed_tokens == 100


async def test_idle_sessions_make_room(nodes, make_nodes):
    [small] = make_nodes("c", budget=100_000)
    other = SessionKey("tenant", "other")
    await small.turn(other, "other ", TOKENS)
    assert await small.keeper.move_here(KEY, "a")
    assert entry_of(small, other) is None
    assert small.leases() == {KEY.digest: small.layout.nbytes_used(100)}


async def test_what_is_computed_sooner_does_not_move_unless_it_must(nodes, links):
    here, there = nodes
    there.keeper._hibernation.policy.tokens_per_second = 1e9
    assert not await there.keeper.move_here(KEY, "a")
    assert results(there) == {"not_worth": 1}
    assert "piece" not in links["a"].calls
    assert (await here.turn(KEY, "first ", [])).num_computed_tokens == 100
    assert await there.keeper.move_here(KEY, "a", always=True)


async def test_another_model_or_layout(nodes, links, make_nodes, kit):
    here, there = nodes

    async def of_another(offer):
        header = offers.replace(moving_memory.HibernationHeader.unpack(offer.packed), identity=b"x" * 32)
        return offers.replace(offer, packed=header.pack())

    links["a"].between["offer"] = of_another
    assert not await there.keeper.move_here(KEY, "a")
    assert results(there) == {"failed": 1}
    unchanged(here, there, kit)


# At the same time.


def paused(links, method="piece", name="a"):
    """The first answer waits until it is let go on: (has come, go on)."""
    has_come, go_on = asyncio.Event(), asyncio.Event()

    async def wait(answer):
        has_come.set()
        await go_on.wait()
        return answer

    links[name].between[method] = wait
    return has_come, go_on


async def test_two_ask_at_the_same_time(nodes, links):
    _, there = nodes
    moves = await asyncio.gather(*(there.keeper.move_here(KEY, "a") for _ in range(3)))
    assert moves == [True] * 3
    assert links["a"].calls.count("offer") == 1
    assert results(there) == {"moved": 1}


async def test_two_nodes_want_it_at_the_same_time(nodes, links, make_nodes, kit):
    """The one that came first gets it."""
    here, there = nodes
    [third] = make_nodes("c")
    has_come, go_on = paused(links)
    first = asyncio.ensure_future(there.keeper.move_here(KEY, "a"))
    await has_come.wait()
    assert not await third.keeper.move_here(KEY, "a")
    assert results(third) == {"refused": 1}
    go_on.set()
    assert await first
    assert entry_of(third) is None
    assert entry_of(here) is None


async def test_a_turn_comes_where_it_was(nodes, links, kit):
    """It does not wait, and is warm; the move has ended."""
    here, there = nodes
    has_come, go_on = paused(links)
    move = asyncio.ensure_future(there.keeper.move_here(KEY, "a"))
    await has_come.wait()
    grant = await asyncio.wait_for(here.turn(KEY, "first second", [500], value=8), 0.1)
    assert grant.num_computed_tokens == 100
    go_on.set()
    assert not await move
    unchanged(here, there, kit)
    assert results(there) == {"stale": 1}
    # And again.
    assert await there.keeper.move_here(KEY, "a")
    assert await computed_anew(there, "first second third") == (101, 101)


async def test_a_turn_comes_where_it_was_when_all_is_read(nodes, links, kit):
    here, there = nodes
    incoming = there.keeper._moves

    async def turn(key):
        await here.turn(KEY, "first second", [500], value=8)
        return True

    incoming._make_way = turn
    assert not await there.keeper.move_here(KEY, "a")
    unchanged(here, there, kit)
    assert results(there) == {"stale": 1}


async def test_a_turn_that_waits_already_comes_first(nodes, links):
    here, there = nodes
    grant, _ = await here.begin(KEY, "first second")
    waiting = asyncio.ensure_future(here.begin(KEY, "first third"))
    await asyncio.sleep(0.01)
    move = asyncio.ensure_future(there.keeper.move_here(KEY, "a"))
    await asyncio.sleep(0.01)
    await here.keeper.abandon(KEY, grant.epoch)
    assert not await move
    grant, _ = await waiting
    assert grant.num_computed_tokens == 100


async def test_a_session_in_a_turn_does_not_move(nodes, links, kit, monkeypatch):
    here, there = nodes
    monkeypatch.setattr("phi_cluster.cluster.session.offers._WAIT_SECONDS", 0.05)
    grant, _ = await here.begin(KEY, "first second")
    with pytest.raises(SessionBusy):
        await here.keeper.offer(KEY)
    assert not await there.keeper.move_here(KEY, "a")
    assert results(there) == {"refused": 1}
    await here.keeper.abandon(KEY, grant.epoch)
    unchanged(here, there, kit)
    assert await there.keeper.move_here(KEY, "a")


async def test_a_turn_comes_where_it_goes(nodes, links):
    """It waits for the move, and is warm."""
    _, there = nodes
    has_come, go_on = paused(links)
    move = asyncio.ensure_future(there.keeper.move_here(KEY, "a"))
    await has_come.wait()
    turn = asyncio.ensure_future(there.begin(KEY, "first second"))
    await asyncio.sleep(0.01)
    assert not turn.done()
    go_on.set()
    assert await move
    grant, _ = await turn
    assert grant.num_computed_tokens == 100


async def test_a_turn_where_it_goes_to_that_is_under_way(nodes, kit):
    """What is there is in use: it goes on, from the journal."""
    _, there = nodes
    grant, _ = await there.begin(KEY, "first second")
    assert grant.num_computed_tokens == 0
    assert not await there.keeper.move_here(KEY, "a")
    await there.keeper.abandon(KEY, grant.epoch)
    # Between two turns an older memory makes way.
    assert await there.keeper.move_here(KEY, "a")
    assert await computed_anew(there) == (100, 100)


@pytest.mark.parametrize("holder", ["keeper", "actor"])
async def test_an_older_memory_makes_way(nodes, kit, holder):
    here, there = nodes
    assert await there.keeper.move_here(KEY, "a")
    if holder == "actor":
        await there.keeper.recycle(KEY, RecycleReason.REQUESTED)
    await here.turn(KEY, "first second", list(range(200, 260)), value=8)
    assert await there.keeper.move_here(KEY, "a")
    assert await computed_anew(there, "first second third") == (160, 160)
    await there.keeper.report()
    assert sum(there.leases().values()) == there.layout.nbytes_used(161)


async def test_what_is_as_warm_here_is_not_fetched(nodes, links):
    here, there = nodes
    links["a"].between["let_go"] = None
    # The answer, or the question, is lost.
    links["a"].__dict__["let_go"] = SimpleNamespace(remote=lambda *a: asyncio.ensure_future(_lost()))
    assert await there.keeper.move_here(KEY, "a")
    assert entry_of(here) is not None
    del links["a"].__dict__["let_go"], links["a"].between["let_go"]
    here.keeper._offers._wanted(next(iter(here.keeper._offers._given)))
    links["a"].calls.clear()
    assert await there.keeper.move_here(KEY, "a")
    assert "piece" not in links["a"].calls
    assert results(there) == {"moved": 1, "here": 1}
    assert entry_of(here) is None


async def _lost():
    raise RayActorError


@pytest.mark.parametrize("deed", ["delete", "clear"])
@pytest.mark.parametrize("side", ["here", "there"])
async def test_a_user_deletes_or_clears_it_meanwhile(nodes, links, kit, deed, side):
    here, there = nodes
    has_come, go_on = paused(links)
    move = asyncio.ensure_future(there.keeper.move_here(KEY, "a"))
    await has_come.wait()
    await asyncio.wait_for(getattr(here.keeper if side == "here" else there.keeper, deed)(KEY), 0.1)
    go_on.set()
    assert not await move
    assert here.keeper._offers._given == {}
    assert entry_of(there) is None or entry_of(there).session.describe().num_tokens == 0
    assert (await here.turn(KEY, "anew", [1])).num_kept_tokens == 0


async def test_a_deleted_session_does_not_come_back(nodes, links):
    _, there = nodes
    has_come, go_on = paused(links)
    move = asyncio.ensure_future(there.keeper.move_here(KEY, "a"))
    await has_come.wait()
    await there.keeper.delete(KEY)
    go_on.set()
    assert not await move
    assert there.journals.glance(KEY) is None
    assert not await there.keeper.move_here(KEY, "a")
    assert there.journals.glance(KEY) is None


async def test_a_turn_wakes_it_while_its_file_moves(nodes, links, kit):
    here, there = nodes
    await here.keeper.hibernate(KEY)
    has_come, go_on = paused(links)
    move = asyncio.ensure_future(there.keeper.move_here(KEY, "a"))
    await has_come.wait()
    assert (await here.turn(KEY, "first second", [500])).num_computed_tokens == 100
    go_on.set()
    assert not await move
    unchanged(here, there, kit)


async def test_want_of_memory_leaves_it_on_its_way(nodes, links):
    here, there = nodes
    has_come, go_on = paused(links)
    move = asyncio.ensure_future(there.keeper.move_here(KEY, "a"))
    await has_come.wait()
    assert not await here.keeper._hibernation.make_room(entry_of(here))
    go_on.set()
    assert await move


async def test_who_asked_may_leave(nodes, links):
    _, there = nodes
    has_come, go_on = paused(links)
    move = asyncio.ensure_future(there.keeper.move_here(KEY, "a"))
    await has_come.wait()
    move.cancel()
    go_on.set()
    await asyncio.gather(move, return_exceptions=True)
    await there.keeper._moves.arrived(KEY)
    assert entry_of(there) is not None


async def test_a_retried_commit_of_before_is_known_where_it_went(nodes, kit):
    here, there = nodes
    grant, commit = await here.begin(KEY, "first second")
    segment = Segment.open(grant.segment, here.layout, kit.fingerprint)
    segment.append_tokens([500])
    kit.compute(segment, 8)
    segment.close()
    turn = kit.turn(KEY, grant.epoch, "second", [500], kept=(6, 100))
    await commit(turn)
    assert await there.keeper.move_here(KEY, "a")
    # Its answer was lost: whoever asks again is told the same, wherever.
    for node in (here, there):
        assert (await node.keeper.commit(turn)).turns == 2


async def test_speeds_are_told(nodes):
    _, there = nodes
    report = await there.keeper.report()
    assert report.move_bytes_per_second == 100e6
    assert report.compute_tokens_per_second == 1000.0


async def test_a_turn_that_begins_where_it_was_after_the_move_is_right(nodes):
    """Nobody has told its client: it is computed there, and the other's memory is older then."""
    here, there = nodes
    assert await there.keeper.move_here(KEY, "a")
    assert await computed_anew(here) == (100, 0)
    grant = await there.turn(KEY, "first second third", [600])
    # What it has of the conversation is right, and stays.
    assert (grant.num_kept_tokens, grant.num_computed_tokens, grant.turns) == (101, 100, 2)


def test_pieces_are_large_and_several(monkeypatch):
    monkeypatch.undo()
    mebi = 2**20
    assert [moving_memory.piece_nbytes(n) // mebi for n in (1, 8 * mebi, 80 * mebi, 800 * mebi)] == [1, 1, 10, 16]


def test_a_piece_is_carried_without_a_copy():
    buffers = []
    packed = pickle.dumps(Piece(bytearray(os.urandom(100_000))), protocol=5, buffer_callback=buffers.append)
    assert len(packed) < 1000
    assert len(buffers) == 1
    assert pickle.loads(packed, buffers=buffers).data.nbytes == 100_000


async def test_a_begin_is_not_lost_between_the_two(nodes, links):
    """A turn that is asked of the keeper that let go a moment ago is served there, from the journal."""
    here, there = nodes
    asked = []

    async def ask(answer):
        asked.append(asyncio.ensure_future(here.keeper.begin_turn(BeginTurn(KEY, "late", "first second"))))
        return answer

    links["a"].between["let_go"] = ask
    assert await there.keeper.move_here(KEY, "a")
    grant = await asked[0]
    assert (grant.num_kept_tokens, grant.num_computed_tokens) == (100, 0)
    await here.keeper.abandon(KEY, grant.epoch)
