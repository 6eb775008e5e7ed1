"""Turns between two replicas: a request, its events and its errors as bytes, and frames of them in a stream.

Owns: this form, which holds our own shapes and nothing else: to read it runs no code of the sender's. Both ends are of
one version (peer_proof.py sees to that). Knows nothing of sockets, of who sends, and of what a turn is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeAlias

import msgpack

from phi_cluster.cluster.errors import LimitReached, PhiError
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

# What a frame may be: no event, no error and no request is longer.
MAX_FRAME_NBYTES = 256 * 2**20
_SHAPES: tuple[type[Any], ...] = (
    TurnRequest,
    TurnStarted,
    TextDelta,
    ChoiceFinished,
    TurnFinished,
    Position,
    WantedFormat,
    Tool,
    ToolUse,
    CallPiece,
    TextPiece,
    TokenChoice,
    TokenLogprob,
)
_CODES = {shape: code for code, shape in enumerate(_SHAPES)}
# Where a turn's parts are measured stays where it is.
_FIELDS = {
    shape: tuple(one.name for one in fields(shape) if one.name != "span") for shape in _SHAPES if is_dataclass(shape)
}
_TUPLE, _INTEGER, _ERROR = 100, 101, 102


@dataclass(frozen=True)
class SentTurn:
    """What a replica asks of another. `move_from`: after its node has fetched the session's memory from there."""

    request: TurnRequest
    move_from: str | None = None


Sent: TypeAlias = "TurnStarted | TextDelta | ChoiceFinished | TurnFinished | PhiError"


def encode_turn(sent: SentTurn) -> bytes:
    return _packed([sent.move_from, sent.request])


def decode_turn(data: bytes) -> SentTurn:
    """Raises ValueError if it is something else."""
    value = _unpacked(data)
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[1], TurnRequest):
        raise ValueError("not a turn")
    return SentTurn(value[1], value[0])


def encode_frame(sent: Sent | None) -> bytes:
    """A 4-byte big-endian length, and an event or error of so many bytes; None: the turn goes on, no more."""
    if sent is None:
        return bytes(4)
    packed = _packed(sent)
    return len(packed).to_bytes(4, "big") + packed


class FrameReader:
    """Takes a stream's bytes as they come."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def take(self, data: bytes) -> Iterator[Sent]:
        """The events and errors that are complete with it. Raises ValueError if it is something else."""
        self._buffer += data
        while len(self._buffer) >= 4:
            end = 4 + int.from_bytes(self._buffer[:4], "big")
            if end > MAX_FRAME_NBYTES:
                raise ValueError("a frame is too long")
            if len(self._buffer) < end:
                return
            packed = bytes(self._buffer[4:end])
            del self._buffer[:end]
            if packed:
                value = _unpacked(packed)
                if not isinstance(value, TurnStarted | TextDelta | ChoiceFinished | TurnFinished | PhiError):
                    raise ValueError("not an event")
                yield value


def _packed(value: Any) -> bytes:
    # Lone surrogates are in texts of clients.
    packed: bytes = msgpack.packb(value, default=_shaped, strict_types=True, unicode_errors="surrogatepass")
    return packed


def _shaped(value: Any) -> msgpack.ExtType:
    """What msgpack has no form for."""
    shape = type(value)
    if shape is tuple:
        return msgpack.ExtType(_TUPLE, _packed(list(value)))
    if shape in _FIELDS:
        return msgpack.ExtType(_CODES[shape], _packed([getattr(value, name) for name in _FIELDS[shape]]))
    if shape in _CODES:
        return msgpack.ExtType(_CODES[shape], _packed(list(value)))
    if shape is int:
        return msgpack.ExtType(_INTEGER, b"%x" % value if value >= 0 else b"-%x" % -value)
    if isinstance(value, PhiError):
        rates = value.rates if isinstance(value, LimitReached) else None
        told = [shape.__name__, value.message, value.param, value.code, value.retry_after, rates]
        return msgpack.ExtType(_ERROR, _packed(told))
    raise TypeError(f"{shape.__name__} is not sent between replicas")


def _unpacked(data: bytes) -> Any:
    try:
        return msgpack.unpackb(data, ext_hook=_read, strict_map_key=False, unicode_errors="surrogatepass")
    except (msgpack.UnpackException, TypeError, RecursionError) as error:
        raise ValueError(f"not between replicas: {type(error).__name__}") from None


def _read(code: int, data: bytes) -> Any:
    if code == _INTEGER:
        return int(data, 16)
    values = _unpacked(data)
    if code == _TUPLE:
        return tuple(values)
    if code == _ERROR:
        return _error(*values)
    if not 0 <= code < len(_SHAPES):
        raise ValueError(f"unknown shape {code}")
    shape = _SHAPES[code]
    if shape in _FIELDS:
        return shape(**dict(zip(_FIELDS[shape], values, strict=True)))
    return shape(*values)


def _error(
    name: str, message: str, param: str | None, code: str | None, retry_after: float | None, rates: Any
) -> PhiError:
    shape = next((one for one in _all_errors(PhiError) if one.__name__ == name), PhiError)
    if issubclass(shape, LimitReached):
        return shape(message, param=param, code=code, retry_after=retry_after, rates=rates)
    return shape(message, param=param, code=code, retry_after=retry_after)


def _all_errors(shape: type[PhiError]) -> Iterator[type[PhiError]]:
    yield shape
    for one in shape.__subclasses__():
        yield from _all_errors(one)
