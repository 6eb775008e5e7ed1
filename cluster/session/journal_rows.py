"""A committed turn as a row of plain values, as every durable journal stores it, and the checksum of rows.

Owns: the order and encoding of the values. Knows nothing of where they are kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import msgpack

from phi_cluster.cluster.messages import CommitTurn, SessionKey


def checksum(*values: int | float | str | bytes | None) -> int:
    """40 bits of a row, so that millions of them can be summed."""
    return packed_checksum(msgpack.packb(values))


def packed_checksum(row: bytes) -> int:
    """The same of a row that is packed already."""
    return int.from_bytes(hashlib.blake2b(row, digest_size=5).digest(), "little")


def turn_to_row(turn: CommitTurn) -> tuple[Any, ...]:
    """The values in the order of the turn's fields, without its key."""
    return (
        turn.epoch,
        turn.request_id,
        turn.num_kept_tokens,
        turn.num_kept_chars,
        turn.token_ids,
        # Bytes: text may hold anything Python's strings can, lone surrogates included.
        turn.text.encode("utf-8", "surrogatepass"),
        msgpack.packb(turn.boundaries),
        turn.num_prompt_tokens,
        turn.num_cached_tokens,
        turn.num_completion_tokens,
        turn.finish_reason,
        msgpack.packb(turn.sampling),
        # As SQLite gives it back: an integer would have another checksum.
        float(turn.committed_at),
    )


def row_to_turn(key: SessionKey, row: Sequence[Any]) -> CommitTurn:
    """The turn again. Raises ValueError, TypeError or msgpack.UnpackException if the row cannot be one."""
    epoch, request_id, kept_tokens, kept_chars, token_ids, text, boundaries, *rest = row
    num_prompt, num_cached, num_completion, reason, sampling, committed_at = rest
    return CommitTurn(
        key,
        epoch,
        request_id,
        kept_tokens,
        kept_chars,
        token_ids,
        text.decode("utf-8", "surrogatepass"),
        tuple((chars, tokens) for chars, tokens in msgpack.unpackb(boundaries)),
        num_prompt,
        num_cached,
        num_completion,
        reason,
        msgpack.unpackb(sampling, strict_map_key=False),
        committed_at,
    )
