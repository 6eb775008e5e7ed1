"""Frames come out as they went in, and no representation shows what was said."""

from __future__ import annotations

import dataclasses
import random
import string
from typing import Any

import pytest

from phi_cluster.cluster.messages import (
    AbortSequence,
    AddSequence,
    BeginTurn,
    CommitTurn,
    EngineTotals,
    ExtendSequence,
    Frame,
    Heartbeat,
    ProcessId,
    SegmentRef,
    SequenceOutput,
    SessionKey,
    StepFrame,
    StepWork,
    TakeOver,
    TurnGrant,
    decode_frame,
    encode_frame,
)
from phi_cluster.model.sampling_params import SamplingParams


def random_frame(rng: random.Random) -> Frame:
    def number() -> int:
        return rng.choice([0, 1, rng.randrange(2**31), rng.randrange(2**62)])

    def ids() -> list[int]:
        return [rng.randrange(2**31) for _ in range(rng.choice([0, 1, 40, 3000]))]

    kind = rng.randrange(6)
    if kind == 0:
        params = SamplingParams(
            seed=rng.choice([-(2**63), 2**64 - 1, rng.randrange(-(2**63), 2**64)]),
            max_tokens=rng.randrange(1, 2**20),
            temperature=rng.random() * 2,
            stop_token_ids=tuple(ids()[:5]),
            logit_bias={rng.randrange(50_000): rng.uniform(-100, 100) for _ in range(rng.randrange(4))},
        )
        segment = SegmentRef(number(), number(), rng.randbytes(rng.choice([0, 16])))
        return AddSequence(number(), segment, number(), number(), ids(), params.to_dict(), number(), number())
    if kind == 1:
        return ExtendSequence(number(), number())
    if kind == 2:
        return AbortSequence(number())
    if kind == 3:
        return TakeOver()
    if kind == 4:
        return Heartbeat(number(), rng.random() < 0.5)
    outputs = [
        SequenceOutput(
            number(),
            ids()[:3],
            rng.choice([None, "stop", "length", "abort", "error"]),
            rng.random() < 0.5,
            rng.choice([None, 0, number()]),
            rng.choice([None, "", "wörds\n\0\ufffd"]),
            queue_seconds=rng.choice([None, 0.0, rng.random()]),
        )
        for _ in range(rng.randrange(5))
    ]
    totals = EngineTotals(number(), number(), number())
    work = rng.choice([None, StepWork(number(), number(), rng.random())])
    return StepFrame(number(), outputs, number(), number(), totals, work, rng.random())


def test_frames_come_out_as_they_went_in() -> None:
    rng = random.Random(1)
    kinds = set()
    for _ in range(400):
        frame = random_frame(rng)
        kinds.add(type(frame))
        packed = encode_frame(frame)
        assert int.from_bytes(packed[:4], "big") == len(packed) - 4
        decoded = decode_frame(packed[4:])
        assert decoded == frame
        if isinstance(frame, StepFrame):
            # What equality of outputs does not look at.
            waited = [output.queue_seconds for output in decoded.outputs]  # type: ignore[union-attr]
            assert waited == [output.queue_seconds for output in frame.outputs]
        if isinstance(frame, AddSequence):
            assert SamplingParams.from_dict(decoded.sampling).to_dict() == frame.sampling  # type: ignore[union-attr]
    assert len(kinds) == 6


def test_a_stream_of_frames_can_be_cut_by_its_lengths() -> None:
    rng = random.Random(2)
    frames = [random_frame(rng) for _ in range(50)]
    stream = b"".join(map(encode_frame, frames))
    found = []
    while stream:
        end = 4 + int.from_bytes(stream[:4], "big")
        found.append(decode_frame(stream[4:end]))
        stream = stream[end:]
    assert found == frames


def test_an_unknown_kind_is_refused() -> None:
    packed = encode_frame(AbortSequence(1))[4:].replace(b"abort", b"xbort")
    with pytest.raises(ValueError, match="xbort"):
        decode_frame(packed)


def test_broken_frames_are_value_errors_or_decode_to_something() -> None:
    """A reader that catches ValueError and TypeError survives any bytes."""
    rng = random.Random(3)
    for _ in range(500):
        packed = bytearray(encode_frame(random_frame(rng))[4:][:200])
        for _ in range(rng.randrange(1, 4)):
            packed[rng.randrange(len(packed))] = rng.randrange(256)
        try:
            decode_frame(bytes(packed[: rng.randrange(1, len(packed) + 1)]))
        except (ValueError, TypeError):
            continue


def test_no_representation_shows_prompts_replies_or_ids() -> None:
    key, segment = SessionKey("tenant", "demo"), SegmentRef(1, 2, b"nonce")
    secret, ids = "my secret words", [424242, 434343]
    messages: list[Any] = [
        BeginTurn(key, "r", secret),
        CommitTurn(
            key, 1, "r", 0, 0, b"424242", secret, ((1, 1),), 1, 0, 1, "stop", {"logit_bias": [[424242, 1]]}, 0.0
        ),
        AddSequence(1, segment, 3, 0, ids, {"stop_token_ids": ids}, 10, 2),
        SequenceOutput(1, ids),
        StepFrame(1, [SequenceOutput(1, ids)], 1, 0),
    ]
    for message in messages:
        shown = repr(message)
        assert type(message).__name__ in shown
        assert "secret" not in shown
        assert "424242" not in shown
        assert "434343" not in shown


def test_messages_cannot_be_changed() -> None:
    grant = TurnGrant(SessionKey("t", "s"), 1, SegmentRef(1, 2, b"n"), 0, 0, None, 0, 0, 0, 0, 1)
    for message, name in ((grant, "epoch"), (ProcessId(1, 2), "pid"), (grant.key, "tenant")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(message, name, 0)


def test_digests_are_distinct_stable_and_fit_for_file_names() -> None:
    rng = random.Random(4)

    def word() -> str:
        return "".join(rng.choices(string.ascii_letters + "._:-/ é", k=rng.randrange(0, 6)))

    keys = {SessionKey(word(), word(), rng.random() < 0.5) for _ in range(5000)}
    digests = {key.digest for key in keys}
    assert len(digests) == len(keys)
    assert all(len(digest) == 32 and set(digest) <= set("0123456789abcdef") for digest in digests)
    # Names of files and actors that exist already depend on it.
    assert SessionKey("tenant", "demo").digest == "e17682c7f0b33cabba5c1544afade887"


def test_parts_of_a_key_do_not_run_into_each_other() -> None:
    assert SessionKey("ab", "c").digest != SessionKey("a", "bc").digest
    assert SessionKey("a", "b", ephemeral=True).digest != SessionKey("a", "b").digest
    assert SessionKey("", "nb").digest != SessionKey("n", "b").digest
