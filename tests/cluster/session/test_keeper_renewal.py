"""One keeper follows another while turns go on: nothing gets cold or lost, and at each moment one is in charge."""

from __future__ import annotations

import asyncio

import pytest

from phi_cluster.cluster.errors import KeeperMoved
from phi_cluster.cluster.messages import AdmitTurn, BeginTurn, ProcessId, SessionKey, TenantLimits
from phi_cluster.cluster.session.directory import SessionDirectory
from phi_cluster.cluster.session.keeper_finder import KeeperFinder
from phi_cluster.cluster.session.recycler import RecycleReason
from phi_cluster.cluster.session.succession import Door, FileCharge
from tests.cluster.session.conftest import Turns, commit_turn
from tests.simulation.network import as_task_error

HELD, ACTIVE, ASLEEP = (SessionKey("tenant", name) for name in ("held", "active", "asleep"))


class Succession:
    """Two keepers of one state directory, of which the first makes the second when it is to be renewed."""

    def __init__(self, make_node, path):
        self.made = 0
        self.gave_up = False
        self.ended = False
        self.error = None
        self.first = make_node(charge=FileCharge(path), make_successor=self.make, end_process=self.end_process)
        self.second = make_node(charge=FileCharge(path))
        # The same actors, wherever they are asked from.
        self.second.actors.made = self.first.actors.made

    async def end_process(self):
        self.ended = True
        raise ProcessLookupError

    async def make(self):
        self.made += 1
        return self

    async def succeed(self, estate):
        if self.error is not None:
            raise self.error
        try:
            return await self.second.keeper.succeed(estate)
        except KeeperMoved as error:
            raise as_task_error(error) from None

    def give_up(self):
        self.gave_up = True


@pytest.fixture
def succession(make_node, tmp_path):
    return Succession(make_node, tmp_path / "keeper.lock")


async def test_nothing_gets_cold(succession):
    first, second = succession.first, succession.second
    for key in (HELD, ACTIVE, ASLEEP):
        await first.turn(key, "said ", [1, 2, 3], value=7)
    await first.keeper.recycle(ACTIVE, RecycleReason.REQUESTED)
    await first.keeper.hibernate(ASLEEP)
    unnamed = await first.keeper.begin_turn(BeginTurn(SessionKey("tenant", "", ephemeral=True), "r1", "unnamed "))
    await first.keeper.abandon(unnamed.key, unnamed.epoch)
    grant = await first.turn(SessionKey("tenant", "made", ephemeral=True), "hello ", [9, 9])
    before = [await first.keeper.describe(key) for key in (HELD, ACTIVE, ASLEEP)]
    leases = first.leases()

    assert await first.keeper.renew()
    assert [await second.keeper.describe(key) for key in (HELD, ACTIVE, ASLEEP)] == before
    assert second.leases() == leases
    for key in (HELD, ACTIVE):
        grant = await second.turn(key, "said more", [4])
        assert (grant.num_kept_tokens, grant.num_computed_tokens) == (3, 3)
    assert (await second.turn(ASLEEP, "said more", [4])).num_kept_tokens == 3
    again = await second.keeper.begin_turn(BeginTurn(SessionKey("tenant", "", ephemeral=True), "r2", "hello more"))
    assert (again.num_kept_tokens, again.num_computed_tokens) == (2, 2)
    assert len((await second.keeper.report()).sessions) == 4


async def test_a_turn_goes_on_over_it(succession):
    first, second = succession.first, succession.second
    await first.turn(HELD, "said ", [1, 2, 3], value=7)
    await first.turn(ACTIVE, "said ", [1, 2, 3], value=7)
    await first.keeper.recycle(ACTIVE, RecycleReason.REQUESTED)
    writer = (ProcessId(1, 1),)
    held = await first.keeper.begin_turn(BeginTurn(HELD, "now", "said more", writers=writer))
    await first.keeper.reserve(HELD, 4)
    active, commit = await first.begin(ACTIVE, "said more")
    await first.keeper.reserve(ACTIVE, 4)
    assert await first.keeper.renew()

    # The next turn waits for the one under way, which ends at the successor.
    asked = BeginTurn(HELD, "next", "said more and", wait_seconds=30)
    waiting = asyncio.ensure_future(second.keeper.begin_turn(asked))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    Turns(second.settings).write(held, [4])
    assert (await second.keeper.commit(end_of(held))).turns == 2
    assert ((await waiting).epoch, (await waiting).num_kept_tokens) == (held.epoch + 1, 4)
    # The actor's turn is committed where it always was.
    Turns(second.settings).write(active, [4])
    assert (await commit(end_of(active))).turns == 2


def end_of(grant):
    kept = (grant.num_kept_chars, grant.num_kept_tokens)
    return commit_turn(grant.key, grant.epoch, "more", [4], kept=kept)


async def test_the_predecessor_sends_everybody_to_its_successor(succession):
    first, second = succession.first, succession.second
    await first.turn(HELD, "said ", [1, 2, 3])
    with pytest.raises(KeeperMoved):
        await second.keeper.describe(HELD)
    assert await first.keeper.renew()
    for call in (first.keeper.describe(HELD), first.keeper.report(), first.keeper.close()):
        with pytest.raises(KeeperMoved):
            await call
    assert not await first.keeper.renew()
    assert (await second.keeper.describe(HELD))["state"] == "held"


async def test_whoever_asks_meanwhile_waits_and_is_told(succession):
    first, second = succession.first, succession.second
    await first.turn(HELD, "said ", [1, 2, 3])
    succeed, asked = succession.succeed, []

    async def slowly(estate):
        asked.append(asyncio.ensure_future(first.keeper.describe(HELD)))
        await asyncio.sleep(0.02)
        assert not asked[0].done()
        return await succeed(estate)

    succession.succeed = slowly
    assert await first.keeper.renew()
    with pytest.raises(KeeperMoved):
        await asked[0]
    assert (await second.keeper.describe(HELD))["turns"] == 1


async def test_with_a_call_that_waits_it_is_put_off(succession, monkeypatch):
    monkeypatch.setattr("phi_cluster.cluster.session.tenure._DRAIN_SECONDS", 0.01)
    first = succession.first
    grant, _ = await first.begin(HELD, "said ")
    waiting = asyncio.ensure_future(first.keeper.begin_turn(BeginTurn(HELD, "next", "said ", wait_seconds=30)))
    await asyncio.sleep(0.01)
    for _ in range(3):
        assert not await first.keeper.renew()
    await first.keeper.abandon(HELD, grant.epoch)
    assert (await waiting).epoch == grant.epoch + 1
    assert await first.keeper.renew()
    # It was kept for that.
    assert succession.made == 1


async def test_a_successor_that_refuses_leaves_the_keeper_in_charge(succession):
    first, second = succession.first, succession.second
    await first.turn(ACTIVE, "said ", [1, 2, 3], value=7)
    await first.keeper.recycle(ACTIVE, RecycleReason.REQUESTED)
    await first.keeper.recycle(ACTIVE, RecycleReason.REQUESTED)
    await asyncio.wait(first.keeper._custody.hands._pool._returning)
    succession.error = as_task_error(KeeperMoved("no"))
    assert not await first.keeper.renew()
    assert succession.gave_up
    assert not succession.ended
    assert first.keeper._custody.hands.num_warm == 1
    assert (await first.turn(ACTIVE, "said more", [4])).num_computed_tokens == 3
    with pytest.raises(KeeperMoved):
        await second.keeper.start()
    succession.error = None
    assert await first.keeper.renew()
    assert second.keeper._custody.hands.num_warm == 1


async def test_of_a_successor_that_does_not_answer_nobody_knows_anything(succession):
    first, second = succession.first, succession.second
    await first.turn(HELD, "said ", [1, 2, 3])
    succession.error = asyncio.TimeoutError()
    with pytest.raises(ProcessLookupError):
        await first.keeper.renew()
    assert succession.ended
    # Whoever takes charge then finds what it would after a death.
    assert await second.keeper.start()
    assert (await second.keeper.describe(HELD))["turns"] == 1


async def test_limits_are_kept_over_it(succession):
    first, second = succession.first, succession.second
    limits = TenantLimits(requests_per_minute=5)
    me = ProcessId(1, 1)
    for number in range(4):
        await first.keeper.admit(AdmitTurn(HELD, limits, f"claim-{number}", 10, me))
    assert await first.keeper.renew()
    rates = await second.keeper.admit(AdmitTurn(HELD, limits, "claim-4", 10, me))
    assert rates["requests"][1] == 0


async def test_a_directory_follows(succession, tmp_path):
    handles = {"one": Handle(succession.first.keeper), "two": Handle(succession.second.keeper)}
    directory = SessionDirectory(KeeperFinder(handles.__getitem__, ["one", "two"]), tmp_path)
    grant = await directory.begin_turn(BeginTurn(HELD, "r", "said "))
    await directory.abandon(HELD, grant.epoch)
    assert await succession.first.keeper.renew()
    assert (await directory.begin_turn(BeginTurn(HELD, "s", "said "))).epoch == grant.epoch + 1
    assert (await directory.get("tenant", "held"))["id"] == "held"


class Handle:
    def __init__(self, keeper):
        self._keeper = keeper

    def __getattr__(self, method):
        async def call(*arguments):
            try:
                return await getattr(self._keeper, method)(*arguments)
            except KeeperMoved as error:
                raise as_task_error(error) from None

        return type("Method", (), {"remote": staticmethod(lambda *arguments: asyncio.ensure_future(call(*arguments)))})


def test_one_has_the_charge_and_it_ends_with_it(tmp_path):
    first, second = FileCharge(tmp_path / "lock"), FileCharge(tmp_path / "lock")
    assert first.take()
    assert first.take()
    assert not second.take()
    first.give()
    assert second.take()
    assert not first.take()
    second.give()


async def test_a_door_that_is_shut_lets_out_and_not_in():
    door = Door()
    left = asyncio.Event()

    async def stay():
        async with door.inside():
            await left.wait()

    staying = asyncio.ensure_future(stay())
    await asyncio.sleep(0)
    assert not await door.shut(0.001)
    shutting = asyncio.ensure_future(door.shut(30))
    await asyncio.sleep(0)
    late = asyncio.ensure_future(stay())
    left.set()
    assert await shutting
    await staying
    assert not late.done()
    door.open()
    await late
    door.leave()
    with pytest.raises(KeeperMoved):
        await stay()
