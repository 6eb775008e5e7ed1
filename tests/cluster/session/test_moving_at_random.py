"""Three nodes, one session, everything at the same time: turns and moves anywhere, sleep, loss of memory, links that
die, lose answers and flip bits. Whatever comes of it, keys and values belong to the tokens that the journal has."""

from __future__ import annotations

import asyncio
import os
import random

import pytest
from ray.exceptions import RayActorError

from phi_cluster.cluster.errors import PhiError
from phi_cluster.cluster.messages import BeginTurn, SessionKey, TurnGrant
from phi_cluster.cluster.session import moving_memory
from phi_cluster.cluster.session.kept_turns import HeldBy
from phi_cluster.cluster.session.moving_memory import Piece
from phi_cluster.cluster.session.recycler import RecycleReason
from phi_cluster.cluster.session.segment import Segment
from phi_cluster.cluster.session.session import SessionStats

KEY = SessionKey("tenant", "wanderer")
NAMES = ("a", "b", "c")
NUM_SEEDS = 24
ROUNDS = 8


class Run:
    def __init__(self, seed, nodes, links, kit):
        self.rng = random.Random(seed)
        self.nodes = dict(zip(NAMES, nodes, strict=True))
        self.links = links
        self.kit = kit
        self.num_words = 0
        self.moved = self.turns = 0
        for name in NAMES:
            for method in ("offer", "piece", "let_go"):
                links[name].between[method] = self._fault(method)

    def _fault(self, method):
        async def between(answer):
            chance = self.rng.random()
            await asyncio.sleep(0.001 * self.rng.random())
            if chance < 0.005:
                raise RayActorError
            if chance < 0.01 and method == "piece" and answer is not None:
                data = bytearray(answer.data)
                data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
                return Piece(data)
            return answer

        return between

    async def turn(self):
        node = self.nodes[self.rng.choice(NAMES)]
        journal = node.keeper._custody.journal(KEY)
        before = "".join(turn.text for turn in journal.load())
        journal.close()
        self.num_words += 1
        word = f"w{self.num_words} "
        ids = [self.num_words * 100 + i for i in range(self.rng.randrange(1, 60))]
        request = BeginTurn(KEY, word.strip(), before + word, wait_seconds=1.0)
        answer = await node.keeper.begin_turn(request)
        while isinstance(answer, HeldBy):
            held = await answer.actor.begin_turn.remote(request)
            answer = held if isinstance(held, TurnGrant) else await node.keeper.begin_turn(request)
        grant, is_over = answer, False
        try:
            await node.keeper.reserve(KEY, grant.num_kept_tokens + len(ids))
            await asyncio.sleep(0.002 * self.rng.random())
            self._write(node, grant, ids)
            if self.rng.random() < 0.2:
                return
            turn = self.kit.turn(
                KEY,
                grant.epoch,
                (before + word)[grant.num_kept_chars :],
                ids,
                kept=(grant.num_kept_chars, grant.num_kept_tokens),
                request_id=word.strip(),
            )
            # Raises StaleEpoch where another node's turn began later.
            await self._told(node, "commit", turn)
            is_over = True
            self.turns += 1
        finally:
            if not is_over:
                await self._told(node, "abandon", KEY, grant.epoch)

    async def _told(self, node, method, *arguments):
        """Whoever holds the session; as a replica does it."""
        stats = await getattr(node.keeper, method)(*arguments)
        if isinstance(stats, HeldBy):
            stats = await getattr(stats.actor, method).remote(*arguments)
            if isinstance(stats, SessionStats):
                await node.keeper.settle(KEY, stats.kv_cache_bytes)

    def _write(self, node, grant, ids):
        segment = Segment.open(grant.segment, node.layout, self.kit.fingerprint)
        segment.trim(grant.num_kept_tokens)
        self.check(node, segment)
        segment.append_tokens(ids)
        for place in range(segment.num_computed_tokens, segment.num_tokens):
            self.kit.write_kv(segment, place, place + 1, value_of(segment.token_ids(place, place + 1)[0]))
        segment.set_num_computed_tokens(segment.num_tokens)
        segment.close()

    def check(self, node, segment):
        """Every row is its token's."""
        kv = node.layout.kv
        ids = segment.token_ids(0, segment.num_computed_tokens)
        expected = b"".join(bytes([value_of(one)]) * kv.row_nbytes for one in ids)
        for region in range(kv.num_regions):
            offset = node.layout.kv_offset + region * kv.region_nbytes
            assert os.pread(segment._fd, len(expected), offset) == expected

    async def move(self):
        source, target = self.rng.sample(NAMES, 2)
        self.moved += await self.nodes[target].keeper.move_here(KEY, source)

    async def sleep(self):
        await self.nodes[self.rng.choice(NAMES)].keeper.hibernate(KEY)

    async def renew(self):
        await self.nodes[self.rng.choice(NAMES)].keeper.recycle(KEY, RecycleReason.REQUESTED)

    async def lose(self):
        await self.nodes[self.rng.choice(NAMES)].keeper.drop_cache(KEY)

    async def leave(self):
        name = self.rng.choice(NAMES)
        await self.nodes[name].keeper.evacuate([one for one in NAMES if one != name], 0.3)

    async def go(self):
        deeds = (self.turn, self.turn, self.move, self.move, self.move, self.sleep, self.renew, self.lose, self.leave)
        await self.turn()
        for _ in range(ROUNDS):
            some = [self._tried(self.rng.choice(deeds)) for _ in range(self.rng.choice((1, 2, 3, 4)))]
            await asyncio.gather(*some)

    async def _tried(self, deed):
        try:
            await deed()
        except PhiError:
            # Busy, or gone meanwhile.
            return

    async def settle(self):
        """All is well again, and nothing is left of moves."""
        for name in NAMES:
            self.links[name].between.clear()
        for node in self.nodes.values():
            # Whoever asked for it may have left.
            await node.keeper._moves.arrived(KEY)
            await asyncio.sleep(0)
        for node in self.nodes.values():
            for move_id, given in list(node.keeper._offers._given.items()):
                # Its end was lost, and comes by itself after a while.
                node.keeper._offers._end(move_id, given)
            assert node.keeper._offers._taken == set()
            assert node.keeper._moves.num_coming == 0
        for node in self.nodes.values():
            await node.keeper.report()
            held = {entry.key.digest for entry in node.keeper._roster}
            leases = node.leases()
            assert leases.keys() <= held
            for digest, nbytes in leases.items():
                [entry] = [one for one in node.keeper._roster if one.key.digest == digest]
                assert nbytes == (await node.keeper._custody.stats(entry)).kv_cache_bytes
        before = self.turns
        while self.turns == before:
            await self.turn()
        holder = next(name for name in NAMES if self.nodes[name].keeper._roster.find(KEY))
        target = next(name for name in NAMES if name != holder)
        await self.nodes[target].keeper.move_here(KEY, holder, True)
        await self.turn()


def value_of(token_id):
    return token_id % 251


def segments(kit):
    return [name for name in kit.descriptors() if "phi-kv" in name]


@pytest.mark.parametrize("part", range(4))
async def test_whatever_happens_rows_belong_to_their_tokens(make_nodes, links, kit, monkeypatch, part):
    monkeypatch.setattr(moving_memory, "PIECE_NBYTES", 3000)
    monkeypatch.setattr("phi_cluster.cluster.session.offers._WAIT_SECONDS", 0.02)
    before = segments(kit)
    moved = turns = 0
    for seed in range(part, NUM_SEEDS, 4):
        nodes = make_nodes(*NAMES, turn_wait=0.5)
        run = Run(seed, nodes, links, kit)
        await run.go()
        await run.settle()
        moved, turns = moved + run.moved, turns + run.turns
        await nodes[0].keeper.delete(KEY)
        for node in nodes:
            await node.close()
            for entry in list(node.keeper._roster):
                node.keeper._roster.forget(entry, deleted=True)
    # It was worth it.
    assert moved > NUM_SEEDS / 8
    assert turns > NUM_SEEDS / 4
    assert segments(kit) == before
