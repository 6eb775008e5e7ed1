"""Frames come out as they went in, and no representation shows what was said."""

from __future__ import annotations

import random
from typing import Any

import pytest

from phi_cluster.cluster.frames import (
    AbortSequence,
    AddSequence,
    EngineTotals,
    ExtendSequence,
    Frame,
    Heartbeat,
    SequenceOutput,
    StepFrame,
    StepWork,
    TakeOver,
    decode_frame,
    encode_frame,
)
from phi_cluster.cluster.messages import SegmentRef, SharedRows
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
        shared = rng.choice([None, SharedRows(segment, number(), number())])
        numbers = (number(), number())
        return AddSequence(number(), segment, *numbers, ids(), params.to_dict(), number(), number(), "r", shared)
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


def test_no_representation_shows_ids() -> None:
    segment, ids = SegmentRef(1, 2, b"nonce"), [424242, 434343]
    frames: list[Any] = [
        AddSequence(1, segment, 3, 0, ids, {"stop_token_ids": ids}, 10, 2),
        SequenceOutput(1, ids),
        StepFrame(1, [SequenceOutput(1, ids)], 1, 0),
    ]
    for frame in frames:
        shown = repr(frame)
        assert type(frame).__name__ in shown
        assert "424242" not in shown
        assert "434343" not in shown
