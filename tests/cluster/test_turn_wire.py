"""What is sent between replicas comes as it was, whole or in pieces; anything else is refused."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi_cluster.cluster.errors import InvalidRequest, LimitReached, Overloaded, PhiError, StaleEpoch
from phi_cluster.cluster.session.journal import JournalFull
from phi_cluster.cluster.turn_api import (
    CallPiece,
    ChoiceFinished,
    Position,
    TextDelta,
    TextPiece,
    TokenChoice,
    TokenLogprob,
    Tool,
    ToolUse,
    TurnFinished,
    TurnRequest,
    TurnStarted,
    WantedFormat,
)
from phi_cluster.cluster.turn_wire import FrameReader, SentTurn, decode_turn, encode_frame, encode_turn

LOGPROB = TokenLogprob(b"\xf0\x9f", -0.25, (TokenChoice(b"a", -1.5),))
EVENTS = [
    TurnStarted(7, 3, rates={"requests": (60, 59, 1.5)}, echo="said", echo_logprobs=(LOGPROB,), choice=2),
    TurnStarted(7, 3),
    TextDelta("Hello \ud800", 1, Position(1, 0xFFFFFFFF)),
    TextDelta("x", 2, Position(3, 5), ("x", TextPiece("y", (LOGPROB,)), CallPiece(0, "f", "{}")), (LOGPROB,), 4),
    ChoiceFinished(1, "tool_calls"),
    TurnFinished("stop", 7, 3, 5, engine_replaced=True),
]
REQUEST = TurnRequest(
    tenant="t",
    session_id=None,
    request_id="r",
    sampling={
        "seed": -(2**63),
        "logit_bias": {3: -1.5},
        "stop_token_ids": (1, 2),
        "max_tokens": None,
        "temperature": 0.1,
    },
    messages=[
        {"role": "user", "content": "\ud800 \x00 ü", "tool_calls": [{"id": "1", "name": "f", "arguments": "{}"}]}
    ],
    stop=("a", "b"),
    wanted_format=WantedFormat("response_format", "json_schema", {"maximum": 10**40, "minimum": -(10**40), "a": [1.5]}),
    tool_use=ToolUse((Tool("f", "tools[0]", {"type": "object"}, "does"),), ("f",), is_required=True),
    resume_from=Position(3, 4),
    cache_hint="hint",
    traceparent="00-1-2-01",
)


def test_a_request_is_the_same_at_the_other_end():
    sent = decode_turn(encode_turn(SentTurn(REQUEST, "node")))
    assert sent == SentTurn(REQUEST, "node")
    assert isinstance(sent.request.stop, tuple)
    assert isinstance(sent.request.sampling["stop_token_ids"], tuple)


@given(st.integers(1, 50))
def test_events_are_the_same_however_they_come(size):
    data = b"".join(encode_frame(one) for one in (*EVENTS, None, *EVENTS))
    reader = FrameReader()
    got = [one for first in range(0, len(data), size) for one in reader.take(data[first : first + size])]
    assert got == EVENTS + EVENTS


@pytest.mark.parametrize(
    "error",
    [
        PhiError("message"),
        InvalidRequest("wrong", param="field", code="strange"),
        Overloaded("full", retry_after=1.5),
        LimitReached("much", retry_after=2, rates={"tokens": (1, 2, 3.5)}),
        StaleEpoch("late"),
        JournalFull("disk"),
    ],
)
def test_errors_come_through_as_themselves(error):
    (got,) = FrameReader().take(encode_frame(error))
    assert type(got) is type(error)
    assert got.body() == error.body()
    assert (got.message, got.retry_after, got.status) == (error.message, error.retry_after, error.status)
    assert getattr(got, "rates", None) == getattr(error, "rates", None)


def test_an_error_that_this_end_does_not_know_is_an_error_all_the_same():
    class Strange(PhiError):
        pass

    data = encode_frame(Strange("message"))
    data = data.replace(b"Strange", b"Unknown")
    (got,) = FrameReader().take(data)
    assert type(got) is PhiError
    assert got.message == "message"


def test_what_is_not_ours_is_not_sent():
    with pytest.raises(TypeError, match="object is not sent"):
        encode_turn(SentTurn(object()))


@given(st.binary(max_size=200))
def test_anything_else_is_refused(data):
    with pytest.raises(ValueError):  # noqa: PT011 -- whatever it says
        decode_turn(data)


@given(st.binary(max_size=60), st.integers(0, 127))
def test_frames_of_something_else_are_refused(data, code):
    for packed in (data, msgpack.packb(msgpack.ExtType(code, data))):
        try:
            got = list(FrameReader().take(len(packed).to_bytes(4, "big") + packed))
        except ValueError:
            continue
        assert all(isinstance(one, TextDelta | ChoiceFinished | TurnFinished | TurnStarted | PhiError) for one in got)


def test_a_frame_without_end_is_refused():
    with pytest.raises(ValueError, match="too long"):
        list(FrameReader().take(b"\xff" * 4))
