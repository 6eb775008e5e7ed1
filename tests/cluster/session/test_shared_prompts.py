"""A prompt that one session's turn has computed is copied into another session, while that turn goes on."""

from __future__ import annotations

import asyncio
import uuid
from array import array

import pytest

from phi_cluster.cluster.messages import BeginTurn, Moved, SegmentRef, SessionKey
from phi_cluster.cluster.session import memfd
from phi_cluster.cluster.session.recycler import RecycleReason
from phi_cluster.cluster.session.segment import Segment

SOURCE = SessionKey("tenant", "source")
# 128 bytes a row: 100 tokens are 4 pages in each of 4 regions.
PROMPT = list(range(1, 101))


class Turn:
    """A turn of the source that has computed its prompt and has begun to reply, as an engine has it mapped."""

    def __init__(self, node, grant):
        self.node, self.grant = node, grant
        self.segment = Segment.open(grant.segment, node.layout, node.settings.fingerprint)

    def reply(self, *token_ids, value=9):
        for token_id in token_ids:
            start = self.segment.num_tokens
            self.segment.append_tokens([token_id])
            kv = self.segment.layout.kv
            for layer in range(kv.num_layers):
                for which in (0, 1):
                    offset = kv.region_offset(layer, which) + start * kv.row_nbytes
                    self.segment.kv_buffer[offset : offset + kv.row_nbytes] = bytes([value]) * kv.row_nbytes
            self.segment.set_num_computed_tokens(start + 1)


@pytest.fixture(params=["keeper", "actor"])
async def turn(request, make_node):
    node = make_node()
    await node.turn(SOURCE, "prompt", PROMPT, value=7)
    if request.param == "actor":
        await node.keeper.recycle(SOURCE, RecycleReason.REQUESTED)
    grant, _ = await node.begin(SOURCE, "prompt more")
    turn = Turn(node, grant)
    turn.reply(500)
    yield turn
    turn.segment.close()


async def other(node, num_tokens=100):
    """Another session with a turn of its own, and memory leased."""
    key = SessionKey("tenant", uuid.uuid4().hex, ephemeral=True)
    grant, _ = await node.begin(key, "ids")
    await node.keeper.reserve(key, num_tokens)
    return grant


async def lay(node, grant, source, num_tokens=100):
    return await node.keeper.lay_prompt(grant.key, grant.epoch, source, num_tokens)


async def test_the_prompt_is_there_with_its_keys_and_values_and_nothing_else(turn):
    node = turn.node
    grant = await other(node)
    assert await lay(node, grant, turn.grant.segment) == 100
    copy = Segment.open(grant.segment, node.layout, node.settings.fingerprint)
    assert copy.token_ids() == PROMPT
    memory = await node.memory(grant.key)
    assert bytes([7]) * 128 in memory
    assert bytes([9]) * 128 not in memory
    # Exactly what was leased, and no page more.
    assert copy.nbytes_resident == node.layout.nbytes_used(100) == node.leases()[grant.key.digest]
    copy.close()
    # Each goes its way.
    turn.reply(501, value=11)
    assert await node.memory(grant.key) == memory


async def test_it_leaves_nothing_when_its_turn_ends(turn):
    node = turn.node
    grant = await other(node)
    await lay(node, grant, turn.grant.segment)
    await node.keeper.abandon(grant.key, grant.epoch)
    assert node.keeper._roster.find(grant.key) is None
    assert grant.key.digest not in node.leases()
    assert await lay(node, grant, turn.grant.segment) == Moved(grant.key)


async def test_what_goes_while_it_is_copied_is_not_taken_for_whole(turn, monkeypatch):
    """The source gives its memory back and has it again, all within one copy: a mixture of both must not count."""
    node = turn.node
    grant = await other(node)
    read, done = memfd.read_into, []

    def read_and_clear(fd, view, offset):
        read(fd, view, offset)
        if not done:
            done.append(offset)
            turn.segment.drop_kv()
            turn.segment.set_num_computed_tokens(turn.segment.num_tokens)

    monkeypatch.setattr(memfd, "read_into", read_and_clear)
    assert await lay(node, grant, turn.grant.segment) == 0
    copy = Segment.open(grant.segment, node.layout, node.settings.fingerprint)
    assert (copy.num_tokens, copy.num_computed_tokens) == (0, 0)
    assert copy.nbytes_resident == node.layout.nbytes_used(0)
    copy.close()


async def test_what_is_not_there_any_more_is_computed_anew(turn):
    node = turn.node
    gone = SegmentRef(turn.grant.segment.pid, 9999, turn.grant.segment.nonce)
    another = SegmentRef(turn.grant.segment.pid, turn.grant.segment.fd, bytes(16))
    for source in (gone, another):
        assert await lay(node, await other(node), source) == 0
    turn.segment.drop_kv()
    assert await lay(node, await other(node), turn.grant.segment) == 0
    # Longer than what there is.
    assert await lay(node, await other(node, 300), turn.grant.segment, 300) == 0


async def test_only_a_turn_under_way_gets_it(turn):
    node = turn.node
    grant = await other(node)
    assert await node.keeper.lay_prompt(grant.key, grant.epoch + 1, turn.grant.segment, 100) == 0


async def test_many_at_once(turn):
    node = turn.node
    grants = [await other(node) for _ in range(8)]
    assert await asyncio.gather(*(lay(node, grant, turn.grant.segment) for grant in grants)) == [100] * 8
    memories = {await node.memory(grant.key) for grant in grants}
    assert len(memories) == 1


async def test_kept_ids_are_told_if_they_are_asked_for(make_node):
    node = make_node()
    await node.turn(SOURCE, "prompt", PROMPT)
    grant = await node.keeper.begin_turn(BeginTurn(SOURCE, "r", "prompt more", wants_ids=True))
    assert array("i", grant.kept_ids).tolist() == PROMPT[: grant.num_kept_tokens] == PROMPT
    await node.keeper.abandon(SOURCE, grant.epoch)
    grant = await node.keeper.begin_turn(BeginTurn(SOURCE, "r2", "prompt more"))
    assert grant.kept_ids is None
