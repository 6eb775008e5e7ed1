"""Two servers' keepers over the same journals: what one makes or deletes is there or gone at the other."""

from __future__ import annotations

import pytest

from phi_cluster.cluster.errors import NotFound, StaleEpoch
from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.session.elsewhere import Elsewhere
from phi_cluster.cluster.session.hibernation_store import FileHibernationStore
from phi_cluster.cluster.session.recycler import RecycleReason

KEY = SessionKey("tenant", "demo")
TOKENS = list(range(1, 101))


@pytest.fixture
def here(make_node, tmp_path):
    return shared(make_node, tmp_path / "here")


@pytest.fixture
def there(make_node, tmp_path):
    return shared(make_node, tmp_path / "there")


def shared(make_node, folder):
    """The same journals, a disk of its own for caches."""
    node = make_node(store=FileHibernationStore(folder, 2**30, reserve_nbytes=0))
    node.journals.shared = True
    return node


async def look(node):
    await Elsewhere(node.keeper._custody, node.keeper._administration).look()


async def test_what_is_made_elsewhere_is_listed_and_found_by_its_name_before(here, there):
    await here.keeper.start()
    await there.turn(KEY, "first ", TOKENS)
    assert await here.listed("tenant") == []
    assert (await here.keeper.describe(KEY))["turns"] == 1
    other = SessionKey("tenant", "other")
    await there.turn(other, "first ", TOKENS)
    await look(here)
    assert [one["id"] for one in await here.listed("tenant")] == ["demo", "other"]


async def test_a_conversation_that_went_on_elsewhere_goes_on_from_there(here, there):
    await here.turn(KEY, "first ", TOKENS)
    await there.turn(KEY, "first second ", [500])
    grant = await here.turn(KEY, "first second third", [600])
    # What this one computed is still there, and the rest is not.
    assert (grant.num_kept_tokens, grant.num_computed_tokens) == (101, 100)


@pytest.mark.parametrize("place", ["keeper", "actor", "disk"])
async def test_what_is_deleted_elsewhere_leaves_nothing_here(here, there, tmp_path, place):
    await here.turn(KEY, "first ", TOKENS)
    if place == "actor":
        await here.keeper.recycle(KEY, RecycleReason.REQUESTED)
    if place == "disk":
        await here.keeper.hibernate(KEY)
        assert list((tmp_path / "here").rglob("*.kv"))
    await there.keeper.delete(KEY)
    await look(here)
    assert (await here.listed("tenant"), here.leases()) == ([], {})
    assert not list(tmp_path.rglob("*.kv"))
    assert not list(tmp_path.rglob("*.sqlite"))
    with pytest.raises(NotFound):
        await here.keeper.describe(KEY)


async def test_one_that_is_used_again_is_a_new_one_and_stays(here, there):
    await here.turn(KEY, "first ", TOKENS)
    await there.keeper.delete(KEY)
    grant = await here.turn(KEY, "again ", [7])
    assert grant.num_kept_tokens == 0
    await look(here)
    assert (await here.keeper.describe(KEY))["num_tokens"] == 1


async def test_one_in_a_turn_is_left_alone(here, there, kit):
    await here.turn(KEY, "first ", TOKENS)
    grant, commit = await here.begin(KEY, "first second ")
    await there.keeper.delete(KEY)
    await look(here)
    assert (await here.keeper.describe(KEY))["num_tokens"] == 100
    # It was begun in a conversation that is gone: nothing of it is recorded.
    with pytest.raises(StaleEpoch):
        await commit(kit.turn(KEY, grant.epoch, "second ", [500], kept=(6, 100)))
