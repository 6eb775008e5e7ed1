"""An exported session: its turns as one file, to be kept elsewhere and to be read by another server of the same model.

Owns: the format, and believing nothing of what is read. Knows nothing of who exports or imports, or of keys and values
(cache_export.py puts them behind it; else they are computed again).

Format, version 1, all numbers little-endian: 8 bytes magic, 32 bytes BLAKE2b over all behind them; version (uint32),
number of turns (uint32), time of creation (float64), fingerprint, session id; then each turn: num_kept_tokens,
num_kept_chars, num_prompt_tokens, num_cached_tokens, num_completion_tokens (uint32), committed_at (float64),
request_id, finish_reason, token_ids (int32), text (UTF-8), boundaries (pairs of uint32), sampling (msgpack map).
Whatever has no fixed length is a uint32 length and its bytes, so that reading takes no more memory than the file. Times
are wall clock in seconds. Epochs stay at home: they count in a journal.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from phi_cluster.cluster.errors import InvalidRequest
from phi_cluster.cluster.messages import CommitTurn, SessionKey
from phi_cluster.cluster.session.transcript import Transcript

MAGIC = b"phiSESSn"
VERSION = 1
_CHECKSUM_NBYTES = 32
_START = struct.Struct("<IId")
_TURN = struct.Struct("<5Id")
_LENGTH = struct.Struct("<I")
_REQUEST_ID = re.compile(r"[0-9A-Za-z_-]{1,128}", re.ASCII)
_FINISH_REASON = re.compile(r"[a-z_]{0,32}", re.ASCII)
# Far beyond what a request can say.
_MAX_SAMPLING_NBYTES = 2**16


class BadExport(InvalidRequest):
    """What was given to be imported is no export, is damaged, or holds what cannot be."""

    code = "bad_export"


@dataclass(frozen=True)
class Export:
    """`turns` oldest first, with epochs from 1 on."""

    fingerprint: str
    session_id: str
    created_at: float
    turns: list[CommitTurn]


def pack_session(fingerprint: str, key: SessionKey, created_at: float, turns: Sequence[CommitTurn]) -> bytes:
    """The file."""
    parts = [
        _START.pack(VERSION, len(turns), created_at),
        *_sized(fingerprint.encode()),
        *_sized(key.session_id.encode()),
    ]
    for turn in turns:
        counts = (turn.num_kept_tokens, turn.num_kept_chars, turn.num_prompt_tokens, turn.num_cached_tokens)
        parts.append(_TURN.pack(*counts, turn.num_completion_tokens, turn.committed_at))
        parts += _sized(turn.request_id.encode())
        parts += _sized(turn.finish_reason.encode())
        parts += _sized(turn.token_ids)
        parts += _sized(turn.text.encode("utf-8", "surrogatepass"))
        parts += _sized(array("I", itertools.chain.from_iterable(turn.boundaries)).tobytes())
        parts += _sized(msgpack.packb(turn.sampling))
    body = b"".join(parts)
    return MAGIC + _checksum(body) + body


def unpack_session(data: bytes | memoryview, key: SessionKey, vocab_size: int) -> Export:
    """What the file holds, for the session `key`. Raises BadExport, saying what is wrong, whatever is in it."""
    start = len(MAGIC) + _CHECKSUM_NBYTES
    if data[: len(MAGIC)] != MAGIC:
        raise BadExport("this is not an exported session: send the bytes of GET /v1/sessions/{id}/export")
    body = memoryview(data)[start:]
    if _checksum(body) != data[len(MAGIC) : start]:
        raise BadExport("the exported session is damaged: its checksum is wrong")
    # Whoever can make a checksum can make anything.
    reader = _Reader(body)
    version, num_turns, created_at = reader.fixed(_START)
    if version != VERSION:
        raise BadExport(f"the exported session has version {version}, this server knows {VERSION}")
    _check(_is_time(created_at), "created_at")
    fingerprint, session_id = reader.text("fingerprint"), reader.text("session_id")
    turns = [_unpack_turn(reader, key, epoch, vocab_size) for epoch in range(1, num_turns + 1)]
    _check(reader.is_at_end, "bytes behind its end")
    try:
        Transcript.replay(turns)
    except ValueError as error:
        raise BadExport(f"the exported session's turns cannot follow each other: {error}") from None
    return Export(fingerprint, session_id, created_at, turns)


def _unpack_turn(reader: _Reader, key: SessionKey, epoch: int, vocab_size: int) -> CommitTurn:
    where = f"turns[{epoch - 1}]"
    *counts, committed_at = reader.fixed(_TURN)
    num_kept_tokens, num_kept_chars, num_prompt, num_cached, num_completion = counts
    _check(max(counts) < 2**31, f"{where}: a count")
    _check(_is_time(committed_at), f"{where}.committed_at")
    request_id = reader.text(f"{where}.request_id")
    _check(_REQUEST_ID.fullmatch(request_id) is not None, f"{where}.request_id")
    finish_reason = reader.text(f"{where}.finish_reason")
    _check(_FINISH_REASON.fullmatch(finish_reason) is not None, f"{where}.finish_reason")
    token_ids = reader.sized()
    _check(len(token_ids) % 4 == 0, f"{where}.token_ids")
    ids = array("i", token_ids)
    _check(not ids or (min(ids) >= 0 and max(ids) < vocab_size), f"{where}.token_ids: beyond the vocabulary")
    text = reader.text(f"{where}.text")
    boundaries = reader.sized()
    _check(len(boundaries) % 8 == 0, f"{where}.boundaries")
    numbers = array("I", boundaries)
    return CommitTurn(
        key,
        epoch,
        request_id,
        num_kept_tokens,
        num_kept_chars,
        token_ids,
        text,
        tuple(zip(numbers[::2], numbers[1::2], strict=True)),
        num_prompt,
        num_cached,
        num_completion,
        finish_reason,
        _unpack_sampling(reader.sized(), f"{where}.sampling"),
        committed_at,
    )


def _unpack_sampling(packed: bytes, where: str) -> dict[str, Any]:
    """Names with numbers, or with a list or map of numbers."""
    _check(len(packed) <= _MAX_SAMPLING_NBYTES, where)
    try:
        sampling = msgpack.unpackb(packed, strict_map_key=False)
    except Exception:
        raise _impossible(where) from None
    _check(isinstance(sampling, dict) and all(isinstance(name, str) for name in sampling), where)
    for value in sampling.values():
        inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]
        flat = itertools.chain.from_iterable(one if isinstance(one, list) else [one] for one in inner)
        _check(all(one is None or isinstance(one, bool | int | float | str) for one in flat), where)
    return sampling


class _Reader:
    """Takes a body apart from its beginning. Raises BadExport at its end."""

    def __init__(self, body: memoryview):
        self._rest = body

    @property
    def is_at_end(self) -> bool:
        return not len(self._rest)

    def fixed(self, kind: struct.Struct) -> tuple[Any, ...]:
        return kind.unpack(self._take(kind.size))

    def sized(self) -> bytes:
        return bytes(self._take(_LENGTH.unpack(self._take(_LENGTH.size))[0]))

    def text(self, what: str) -> str:
        try:
            return self.sized().decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise _impossible(what) from None

    def _take(self, nbytes: int) -> memoryview:
        if nbytes > len(self._rest):
            raise BadExport("the exported session ends too early")
        taken, self._rest = self._rest[:nbytes], self._rest[nbytes:]
        return taken


def _sized(data: bytes) -> tuple[bytes, bytes]:
    return _LENGTH.pack(len(data)), data


def _checksum(body: bytes | memoryview) -> bytes:
    return hashlib.blake2b(body, digest_size=_CHECKSUM_NBYTES).digest()


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise _impossible(what)


def _impossible(what: str) -> BadExport:
    return BadExport(f"the exported session holds what cannot be: {what}")


def _is_time(value: float) -> bool:
    return math.isfinite(value) and value >= 0
