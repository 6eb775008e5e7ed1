"""The calls of a turn, which cross process borders.

Owns: the shapes of messages. Knows nothing of who sends them: no Ray, no torch, no HTTP. Text and token ids are kept
out of every `repr`, because frameworks print arguments.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple


@dataclass(frozen=True)
class SessionKey:
    """Who owns a conversation (tenant) and what they call it. `ephemeral` marks one nobody named."""

    tenant: str
    session_id: str
    ephemeral: bool = False

    @cached_property
    def digest(self) -> str:
        """32 hex digits: the only form of a session's name used for files, actors and dictionaries."""
        raw = b"\x00".join((self.tenant.encode(), b"e" if self.ephemeral else b"n", self.session_id.encode()))
        return hashlib.blake2b(raw, digest_size=16).hexdigest()


@dataclass(frozen=True)
class ProcessId:
    """A process that cannot be mistaken for a later one with the same pid (start time in clock ticks)."""

    pid: int
    start_ticks: int


@dataclass(frozen=True)
class SegmentRef:
    """Where a KV segment can be opened: `/proc/<pid>/fd/<fd>`, valid only if its header holds `nonce`."""

    pid: int
    fd: int
    nonce: bytes


@dataclass(frozen=True)
class SharedRows:
    """Keys and values of a prompt's first `num_tokens` tokens, in the segment of the turn `epoch`, for other sequences
    to use where they are."""

    segment: SegmentRef
    epoch: int
    num_tokens: int


class Stretch(NamedTuple):
    """What took time where a call was answered, for whoever called: when it began (wall clock) and how long it took, in
    seconds."""

    name: str
    began: float
    seconds: float


# Names of stretches: a session waits for its turn, is read back from the disk, or opened from its journal; a turn is
# begun and recorded there.
WAITED, WOKEN, OPENED = "session.wait", "session.wake", "session.open"
JOURNAL_BEGIN, JOURNAL_COMMIT = "journal.begin", "journal.commit"


@dataclass(frozen=True)
class BeginTurn:
    """A replica asks for a session's cache. `text` is the whole rendered prompt (see model/tokenizer.py)."""

    key: SessionKey
    request_id: str
    text: str = field(repr=False)
    wait_seconds: float = 30.0
    # Processes that may write for this turn; while one of them lives, nobody else may take the session. First the one
    # that commits it.
    writers: tuple[ProcessId, ...] = ()
    # The request comes again, to read on where its reply was interrupted.
    resume: bool = False
    # Names this attempt at a turn, where a request may make several: whoever asks again with it has had no answer.
    claim: str = ""
    # See turn_api.TurnRequest.
    cache_hint: str | None = field(default=None, repr=False)
    # The ids that are kept are to be told, too.
    wants_ids: bool = False

    @property
    def attempt(self) -> str:
        """What this attempt waits, begins and is withdrawn under."""
        return self.claim or self.request_id


@dataclass(frozen=True)
class TenantLimits:
    """What a tenant may use; None: no limit of its own. `kv_bytes`: KV cache, of all its sessions of a node."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_turns: int | None = None
    sessions: int | None = None
    kv_bytes: int | None = None


@dataclass(frozen=True)
class AdmitTurn:
    """A replica asks whether a tenant may have one more turn, before anything of it is begun. `claim` names this turn:
    whoever asks again with it has had no answer. `num_tokens`: so many are taken from the tenant's rate until it is
    known how many there really were. With `process` the turn ends in any case."""

    key: SessionKey
    limits: TenantLimits
    claim: str
    process: ProcessId
    num_tokens: int
    # Where the process runs; "": where it is asked.
    node_id: str = ""


@dataclass(frozen=True)
class TurnUsage:
    """What a turn that was admitted has used. Zeros if it never came to anything."""

    tenant: str
    claim: str
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0


@dataclass(frozen=True)
class TurnGrant:
    """The answer: stored text and ids that the new prompt extends, and the segment to borrow.

    The first `num_kept_chars` characters of the prompt are the first `num_kept_tokens` of the `num_tokens` stored ids;
    `last_kept_id` is the last of those. The segment holds all stored ids.
    """

    key: SessionKey
    epoch: int
    segment: SegmentRef
    num_kept_tokens: int
    num_kept_chars: int
    last_kept_id: int | None
    # Over the first `num_kept_tokens` ids, as int32: see reply.Position.
    kept_checksum: int
    num_tokens: int
    num_computed_tokens: int
    turns: int
    holder_pid: int
    # Of a request that reads on: the ids behind `num_kept_tokens` that it has left (int32), if they are still there.
    resumed_ids: bytes | None = field(default=None, repr=False)
    # The first `num_kept_tokens` ids (int32), if they were asked for.
    kept_ids: bytes | None = field(default=None, repr=False)
    # What the way here took.
    stretches: tuple[Stretch, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class CommitTurn:
    """What a turn leaves: ids appended behind `num_kept_tokens`, text appended behind `num_kept_chars`.

    `boundaries` are (chars, tokens) pairs, absolute, at which text and ids agree (end of prompt, end of reply
    with and without its end token), so that later prompts can be spliced there.
    """

    key: SessionKey
    epoch: int
    request_id: str
    num_kept_tokens: int
    num_kept_chars: int
    token_ids: bytes = field(repr=False)
    text: str = field(repr=False)
    boundaries: tuple[tuple[int, int], ...]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int
    finish_reason: str
    sampling: dict[str, Any] = field(repr=False)
    # Wall clock, seconds.
    committed_at: float


@dataclass(frozen=True)
class Moved:
    """The session is not here (any more): ask the keeper."""

    key: SessionKey
