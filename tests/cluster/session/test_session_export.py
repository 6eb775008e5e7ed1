"""Exported sessions: what comes back is what went out, and whatever else is given is refused by name."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import struct

import msgpack
import pytest

from phi_cluster.cluster.errors import SessionExists
from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.session.session_export import MAGIC, BadExport, pack_session, unpack_session
from phi_cluster.cluster.session_api import ImportLimits

KEY, COPY = SessionKey("tenant", "demo"), SessionKey("other", "copy")
VOCAB = 1000
LIMITS = ImportLimits(vocab_size=VOCAB, max_turns_nbytes=2**20)


@pytest.fixture
def turns(kit):
    return [
        kit.turn(KEY, 7, "héllo \ud800\x00", [1, 2, 999]),
        kit.turn(KEY, 9, "", [], kept=(8, 3)),
        kit.turn(KEY, 12, "tail", [5], kept=(8, 3), boundaries=()),
    ]


def signed(body):
    return MAGIC + hashlib.blake2b(body, digest_size=32).digest() + body


def export(kit, turns):
    return pack_session(kit.fingerprint, KEY, 5.5, turns)


def test_turns_come_back_under_the_new_name(kit, turns):
    found = unpack_session(export(kit, turns), COPY, VOCAB)
    assert (found.fingerprint, found.session_id, found.created_at) == (kit.fingerprint, "demo", 5.5)
    assert [turn.key for turn in found.turns] == [COPY] * 3
    assert [turn.epoch for turn in found.turns] == [1, 2, 3]
    for given, came in zip(turns, found.turns, strict=True):
        assert (came.token_ids, came.text, came.boundaries) == (given.token_ids, given.text, given.boundaries)
        assert (came.request_id, came.committed_at, came.sampling) == (
            given.request_id,
            given.committed_at,
            given.sampling,
        )
    assert unpack_session(export(kit, []), COPY, VOCAB).turns == []


def test_damage_is_noticed(kit, turns):
    whole = export(kit, turns)
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        with pytest.raises(BadExport):
            unpack_session(bytes(damaged), COPY, VOCAB)
    for length in (0, 7, 8, 39, 40, len(whole) - 1):
        with pytest.raises(BadExport):
            unpack_session(whole[:length], COPY, VOCAB)


def test_whoever_can_make_a_checksum_gets_no_further(kit, turns):
    """Random changes and cuts under a right checksum: refused, or a session that can be."""
    rng = random.Random(5)
    body = export(kit, turns)[40:]
    refused = 0
    for _ in range(3000):
        changed = bytearray(body)
        for _ in range(rng.choice((1, 1, 2, 8))):
            changed[rng.randrange(len(changed))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        if rng.random() < 0.2:
            del changed[rng.randrange(len(changed)) :]
        try:
            for turn in unpack_session(signed(bytes(changed)), COPY, VOCAB).turns:
                assert len(turn.token_ids) % 4 == 0
        except BadExport:
            refused += 1
    assert refused > 1000


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"", "too early"),
        (struct.pack("<IId", 2, 0, 0.0), "version 2"),
        (struct.pack("<IId", 1, 0, float("nan")), "created_at"),
        (struct.pack("<IIdI", 1, 0, 0.0, 2**32 - 1), "too early"),
        (struct.pack("<IIdII", 1, 2**32 - 1, 0.0, 0, 0), "too early"),
        (struct.pack("<IIdII", 1, 0, 0.0, 0, 0) + b"x", "behind its end"),
        (struct.pack("<IIdI", 1, 0, 0.0, 1) + b"\xff" + struct.pack("<I", 0), "fingerprint"),
    ],
)
def test_impossible_bodies(body, what):
    with pytest.raises(BadExport, match=what) as refused:
        unpack_session(signed(body), COPY, VOCAB)
    assert (refused.value.status, refused.value.code) == (400, "bad_export")


def test_impossible_turns(kit):
    def refusal(**changes):
        turn = dataclasses.replace(kit.turn(KEY, 1, "text", [1, 2]), **changes)
        with pytest.raises(BadExport) as refused:
            unpack_session(export(kit, [turn]), COPY, VOCAB)
        return refused.value.message

    assert "token_ids: beyond the vocabulary" in refusal(token_ids=kit.ids([1, VOCAB]))
    assert "token_ids: beyond the vocabulary" in refusal(token_ids=kit.ids([-1, 2]))
    assert "request_id" in refusal(request_id="../x")
    assert "finish_reason" in refusal(finish_reason="because of that")
    assert "cannot follow" in refusal(num_kept_tokens=5)
    assert "cannot follow" in refusal(boundaries=((4, 99),))
    assert "a count" in refusal(num_prompt_tokens=2**31)
    assert "committed_at" in refusal(committed_at=float("inf"))
    assert "sampling" in refusal(sampling={"deep": {1: [[[[]]]]}})
    assert "sampling" in refusal(sampling={"long": "x" * 2**16})


def test_a_map_that_grows_in_memory_is_refused(kit):
    turn = kit.turn(KEY, 1, "text", [1])
    body = export(kit, [turn])[40:]
    sampling = msgpack.packb(turn.sampling)
    grown = b"\xdd" + (60_000).to_bytes(4, "big") + b"\x90" * 60_000
    body = body[: -len(sampling) - 4] + struct.pack("<I", len(grown)) + grown
    with pytest.raises(BadExport, match="sampling"):
        unpack_session(signed(body), COPY, VOCAB)


# A whole node.


async def test_an_export_is_imported_and_goes_on(make_node):
    node = make_node()
    key = SessionKey("tenant", "demo")
    await node.turn(key, "first ", [1, 2, 3])
    await node.turn(key, "first second ", [4, 5])
    data = await node.keeper.export(key)
    described = await node.keeper.import_session(COPY, data, LIMITS)
    assert (described["id"], described["state"], described["num_tokens"], described["turns"]) == (
        "copy",
        "stored",
        5,
        2,
    )
    grant = await node.turn(COPY, "first second third", [6])
    assert (grant.num_kept_tokens, grant.num_computed_tokens) == (5, 0)
    assert (await node.keeper.describe(key))["turns"] == 2
    with pytest.raises(SessionExists):
        await node.keeper.import_session(COPY, data, LIMITS)
    assert (await node.keeper.describe(COPY))["turns"] == 3


async def test_another_models_session_is_refused(make_node, kit, turns):
    node = make_node()
    with pytest.raises(BadExport, match="another model"):
        await node.keeper.import_session(COPY, pack_session("model-2", KEY, 0.0, turns), LIMITS)
    assert await node.listed("other") == []
