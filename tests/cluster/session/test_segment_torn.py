"""A writer that dies between any two of its stores into a segment.

A session's and an engine's stores are recorded while they work (begin of a turn, the writer's mark, splice, prompt,
steps, trim, the other rope regime, clear). For every beginning of that record the memory is rebuilt as it was then, and
a successor takes it over. Proven: never more tokens computed than there are; every token is one that was stored; every
row that counts as computed is the whole row of that token, after those tokens, in that regime; and the successor's turn
ends as if nobody had died.
"""

import hashlib
import random
import types
from array import array

import pytest
import torch

from phi_cluster.cluster.engine.segment_kv import SegmentKV, splice
from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.session.conversation import Conversation
from phi_cluster.cluster.session.journal import MemoryJournal
from phi_cluster.cluster.session.segment import Segment, SegmentLayout
from phi_cluster.cluster.session.session import Session
from phi_cluster.model.kv_layout import KVCacheLayout

KEY = SessionKey("tenant", "demo")
FIELDS = 64


class Recorded:
    """A view of fields or ids that notes each store of one number."""

    def __init__(self, view, offset, log):
        self._view, self._offset, self._log = view, offset, log

    def __getitem__(self, at):
        return self._view[at]

    def __setitem__(self, at, value):
        size, at, value = self._view.itemsize, *((at, value) if isinstance(at, slice) else (slice(at, at + 1), [value]))
        self._view[at] = array(self._view.format, value)
        for i, one in enumerate(value):
            self._log.append(("store", self._offset + (at.start + i) * size, array(self._view.format, [one]).tobytes()))


class RecordedSegment(Segment):
    log: list

    def __init__(self, fd, layout, nonce):
        super().__init__(fd, layout, nonce)
        self._fields = Recorded(self._fields, FIELDS, self.log)
        self._ids = Recorded(self._ids, layout.ids_offset, self.log)

    def _punch(self, offset, length):
        super()._punch(offset, length)
        self.log.append(("punch", offset, length))


def row(ids, region, long_rope, nbytes):
    """A token's row: of all tokens up to it, so a row that belongs to others is seen."""
    return hashlib.shake_128(repr((ids, region, long_rope)).encode()).digest(nbytes)


class World:
    """A conversation whose stores are recorded, with an engine that computes as `row` says."""

    def __init__(self, layout, settings, journal):
        self.log = []
        kind = {"log": self.log}
        self.segment_class = types.new_class("Seen", (RecordedSegment,), {}, lambda space: space.update(kind))
        kv_kind = {"_segment_class": self.segment_class}
        self.kv_class = types.new_class("SeenKV", (SegmentKV,), {}, lambda space: space.update(kv_kind))
        self.layout, self.settings, self.journal = layout, settings, journal
        self.segment = self.segment_class.create(layout, settings.fingerprint)
        # Every token that was ever stored at a position, also in turns that came to nothing.
        self.stored: set[tuple[int, int]] = set()
        self.text = ""
        self.conversation = Conversation(self.segment, journal, settings.fingerprint, journal.info())

    def open_kv(self):
        ref, layout, epoch = self.segment.ref, self.layout, self.segment.epoch
        return self.kv_class(ref, layout, self.settings.fingerprint, torch.float32, epoch)

    def compute(self, kv, stop):
        ids = kv.token_ids()
        for position in range(kv.num_computed_tokens, stop):
            for region in range(self.layout.kv.num_regions):
                nbytes = self.layout.kv.row_nbytes
                content = row(ids[: position + 1], region, kv.long_rope, nbytes)
                at = self.layout.kv_offset + region * self.layout.kv.region_nbytes + position * nbytes
                start = at - self.layout.kv_offset
                kv._segment.kv_buffer[start : start + nbytes] = content
                # Torn within the row as well.
                half = nbytes // 2
                self.log += [("store", at, content[:half]), ("store", at + half, content[half:])]
        kv.set_computed(stop)

    def turn(self, kept, prompt, reply, *, flip=False, commit=True, chunk=3):
        """Keep `kept` tokens, add a prompt, compute it in chunks, draw the reply one token a step."""
        grant = self.conversation.begin(self.text)
        kept = min(kept, grant.num_kept_tokens)
        kv = self.open_kv()
        ids = splice(kv, kept, prompt)
        if flip:
            kv.clear()
            kv.long_rope = not kv.long_rope
        self._note(ids)
        if kv.num_computed_tokens == len(ids):
            kv.set_computed(len(ids) - 1)
        for token in [*reply, None]:
            while kv.num_computed_tokens < kv.num_tokens and token is not None:
                self.compute(kv, min(kv.num_computed_tokens + chunk, kv.num_tokens))
            if token is not None:
                ids.append(token)
                self._note(ids)
                kv.append_tokens([token])
        kv.close()
        if commit:
            self.conversation.record(self.message(grant, kept, ids))
            self.text = "".join(chr(0x100 + token) for token in ids)

    def message(self, grant, kept, ids):
        """One character a token."""
        text = "".join(chr(0x100 + token) for token in ids)
        return self._turn(
            grant.epoch, text[kept:], ids[kept:], kept=(kept, kept), boundaries=self._ends(kept, len(ids))
        )

    @staticmethod
    def _ends(kept, stop):
        return tuple((i, i) for i in range(kept + 1, stop + 1))

    def _note(self, ids):
        self.stored.update(enumerate(ids))


@pytest.fixture
def layout():
    """4 rows a page, 2 regions."""
    return SegmentLayout(KVCacheLayout(num_layers=1, num_kv_heads=1, head_dim=256, max_model_len=32, itemsize=4))


@pytest.fixture
def make_world(layout, settings, kit, clock):
    worlds = []

    def make():
        world = World(layout, settings, MemoryJournal(KEY, kit.fingerprint, clock))
        world._turn = lambda epoch, text, ids, **options: kit.turn(KEY, epoch, text, ids, **options)
        worlds.append(world)
        return world

    yield make
    for world in worlds:
        world.segment.close()


def check_counted(segment, layout, stored):
    """All that counts is true."""
    computed, ids = segment.num_computed_tokens, segment.token_ids()
    assert 0 <= computed <= len(ids) <= layout.max_model_len
    assert set(enumerate(ids)) <= stored
    for position in range(computed):
        for region in range(layout.kv.num_regions):
            at = region * layout.kv.region_nbytes + position * layout.kv.row_nbytes
            expected = row(ids[: position + 1], region, segment.long_rope, layout.kv.row_nbytes)
            assert segment.kv_buffer[at : at + layout.kv.row_nbytes] == expected, (position, region)


def check_every_beginning(world, settings, journals):
    """`journals` are (length of the record, the journal's turns then): what a successor finds."""
    image = bytearray(world.layout.nbytes)
    for done in range(len(world.log) + 1):
        if done:
            what, offset, content = world.log[done - 1]
            image[offset : offset + (content if what == "punch" else len(content))] = (
                bytes(content) if what == "punch" else content
            )
        torn = Segment.create(world.layout, settings.fingerprint)
        torn._fields[:] = memoryview(bytes(image[FIELDS : FIELDS + len(torn._fields) * 8])).cast("q")
        torn._ids[:] = memoryview(bytes(image[world.layout.ids_offset :][: len(torn._ids) * 4])).cast("i")
        torn.kv_buffer[:] = image[world.layout.kv_offset :]
        check_counted(torn, world.layout, world.stored)
        committed = [journal for length, journal in journals if length <= done][-1]
        check_successor(torn, world, settings, committed)
        torn.close()


def check_successor(torn, world, settings, committed):
    """Takes over, runs a turn on what was recorded: as one in memory that nobody died in."""
    turns, info = committed
    journal = MemoryJournal(KEY, settings.fingerprint, settings.clock)
    journal._turns, journal._info = list(turns), info
    session = Session.take_over(torn.ref, journal, settings)
    segment = session._conversation.segment
    ids = session._conversation.transcript.token_ids.tolist()
    assert segment.token_ids() == ids
    check_counted(segment, world.layout, world.stored | set(enumerate(ids)))
    text = "".join(chr(0x100 + token) for token in ids)
    grant = session._conversation.begin(text)
    assert grant.num_kept_tokens == len(ids)
    kv = SegmentKV(grant.segment, world.layout, settings.fingerprint, torch.float32, grant.epoch)
    assert splice(kv, len(ids), [40, 41]) == [*ids, 40, 41]
    recording, world.log = world.log, []
    world.compute(kv, kv.num_tokens)
    world.log = recording
    assert kv._segment.token_ids() == [*ids, 40, 41]
    assert kv.num_computed_tokens == len(ids) + 2
    check_counted(kv._segment, world.layout, set(enumerate([*ids, 40, 41])))
    kv.close()
    assert segment.writer is None
    segment.close()


def played(world, steps):
    """Runs the steps; the journal as it was after each, with the length of the record then."""
    journals = [(0, (world.journal.load(), world.journal.info()))]
    for step in steps:
        step(world)
        journals.append((len(world.log), (world.journal.load(), world.journal.info())))
    return journals


STEPS = {
    "first turn": lambda world: world.turn(0, [1, 2, 3, 4, 5, 6, 7], [8, 9]),
    "warm turn": lambda world: world.turn(9, [10, 11], [12]),
    "edited history": lambda world: world.turn(4, [5, 6, 20], [21]),
    "a turn that comes to nothing": lambda world: world.turn(6, [30, 31, 32], [33, 34], commit=False),
    "the turn after": lambda world: world.turn(8, [22], [23]),
    "the other regime": lambda world: world.turn(9, [24], [25], flip=True),
    "and back": lambda world: world.turn(3, [26], [27], flip=True),
    "clear": lambda world: (world.conversation.forget(), setattr(world, "text", "")),
    "anew": lambda world: world.turn(0, [1, 2, 15], [16]),
    "dropped": lambda world: world.segment.drop_kv(),
    "computed again": lambda world: world.turn(4, [17], [18]),
}


def test_a_death_between_any_two_stores(make_world, settings):
    world = make_world()
    journals = played(world, STEPS.values())
    assert len(world.log) > 250
    assert {what for what, _, _ in world.log} == {"store", "punch"}
    check_every_beginning(world, settings, journals)


@pytest.mark.parametrize("seed", range(3))
def test_a_death_in_a_random_life(make_world, settings, seed):
    chance = random.Random(seed)
    world = make_world()

    def step(world):
        length = len(world.text)
        what = chance.random()
        if what < 0.1:
            STEPS["clear"](world)
        elif what < 0.2:
            world.segment.drop_kv()
        else:
            kept = chance.randint(max(0, length - 6), length) if length < 20 else chance.randint(0, 8)
            prompt, reply = ([chance.randrange(30) for _ in range(chance.randint(1, 4))] for _ in range(2))
            flip, commit = chance.random() < 0.2, chance.random() < 0.8
            world.turn(kept, prompt, reply, flip=flip, commit=commit, chunk=chance.randint(1, 5))

    check_every_beginning(world, settings, played(world, [step] * 6))


def test_a_wrong_order_would_be_seen(make_world, settings):
    """The proof's own proof: a writer that counts a token's row before it is there."""
    world = make_world()
    journals = played(world, list(STEPS.values())[:1])
    counted = next(i for i, (_, at, _) in enumerate(world.log) if at == FIELDS + 3 * 8 and i > 10)
    # The first chunk's rows lie right before their count.
    world.log[counted - 1], world.log[counted] = world.log[counted], world.log[counted - 1]
    with pytest.raises(AssertionError):
        check_every_beginning(world, settings, journals)
