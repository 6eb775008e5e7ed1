"""What crosses process borders: the calls of a turn, and the frames between a replica and its engine.

Owns: the shapes of messages, and the length-prefixed msgpack framing. Knows nothing of who sends them: no Ray,
no torch, no HTTP. Text and token ids are kept out of every `repr`, because frameworks print arguments.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import msgpack


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


@dataclass(frozen=True)
class AddSequence:
    """Frame replica -> engine: generate. The engine trims the segment to `num_kept_tokens`, then appends
    `token_ids`; stored ids that go on agreeing stay. A sequence may hold at most `max_num_tokens` tokens (what its
    lease covers): there it pauses until an ExtendSequence comes."""

    sequence_id: int
    segment: SegmentRef
    # Of the turn: an engine that reads this late, when another turn has begun, must not touch the segment.
    epoch: int
    num_kept_tokens: int
    token_ids: list[int] = field(repr=False)
    sampling: dict[str, Any] = field(repr=False)
    max_num_tokens: int
    # Where the reply starts (absolute): penalties, min_tokens and max_tokens count from here. A sequence that
    # is taken over in mid-reply is added with the reply so far in `token_ids`.
    num_prompt_tokens: int
    # For the log.
    request_id: str = ""
    # Where the beginning of its keys and values lies, if not in its own segment.
    shared: SharedRows | None = None


@dataclass(frozen=True)
class ExtendSequence:
    """Frame replica -> engine: the sequence's lease covers so many tokens now."""

    sequence_id: int
    max_num_tokens: int


@dataclass(frozen=True)
class AbortSequence:
    """Frame replica -> engine: stop after the step in flight; `released` follows."""

    sequence_id: int


@dataclass(frozen=True)
class TakeOver:
    """Frame replica -> engine: until now it stood by; from here on it steps every few seconds also when idle. The first
    frame to every engine that serves."""


@dataclass(frozen=True)
class StepDown:
    """Frame replica -> engine: a successor stands ready. The engine ends between two steps, when it has sent all that
    the last one brought."""


class TokenLogprobs(NamedTuple):
    """A token's log probability, and ids and log probabilities of the likeliest in its place, in descending order."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


@dataclass(frozen=True)
class SequenceOutput:
    """One sequence's part of a step. After `released` the engine never touches its segment again."""

    sequence_id: int
    token_ids: list[int] = field(repr=False)
    # stop | length | abort | error | gone (there is no memory where the segment should be) | bad_grammar, once
    finish_reason: str | None = None
    released: bool = False
    # In the first output only: how many prompt tokens the cache saved.
    num_cached_tokens: int | None = None
    error: str | None = None
    # In the output after its first step only: for how long it had waited for that, in seconds.
    queue_seconds: float | None = field(default=None, compare=False)
    # One for each token, if the sequence's parameters ask for them.
    logprobs: list[TokenLogprobs] | None = field(default=None, repr=False)
    # In the first output with tokens only: one for each of the prompt's tokens but the first, if they are asked for.
    prompt_logprobs: list[TokenLogprobs] | None = field(default=None, repr=False)


class EngineTotals(NamedTuple):
    """What an engine has counted: preempted sequences, guesses computed, and those of them that were right."""

    num_preemptions: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


NO_TOTALS = EngineTotals()


class StepWork(NamedTuple):
    """What a step computed: for how many sequences, how many tokens, and in what time."""

    num_seqs: int
    num_tokens: int
    seconds: float


@dataclass(frozen=True)
class StepFrame:
    """Frame engine -> replica: all that one step brought, and the engine's counters (`totals`: since its start).
    `work` None: nothing of a sequence was computed. `queue_seconds`: how long the oldest of those has waited that have
    not been computed yet. `preempted`: the sequences whose memory was taken from them for others in this step."""

    step: int
    outputs: list[SequenceOutput]
    num_running: int
    num_waiting: int
    totals: EngineTotals = NO_TOTALS
    work: StepWork | None = None
    queue_seconds: float = 0.0
    preempted: tuple[int, ...] = ()


@dataclass(frozen=True)
class Heartbeat:
    """Frame engine -> replica, twice a second, also in the middle of a step: the process runs. While it is `busy`,
    `progress` grows at least once a layer of the network, or it hangs."""

    progress: int
    busy: bool


Frame: TypeAlias = AddSequence | ExtendSequence | AbortSequence | TakeOver | StepDown | StepFrame | Heartbeat


def encode_frame(message: Frame) -> bytes:
    """A 4-byte big-endian length, then msgpack `[kind, fields...]`."""
    body: list[Any]
    if isinstance(message, AddSequence):
        shared = message.shared
        body = [
            "add",
            message.sequence_id,
            _packed_ref(message.segment),
            None if shared is None else [_packed_ref(shared.segment), shared.epoch, shared.num_tokens],
            message.epoch,
            message.num_kept_tokens,
            message.token_ids,
            message.sampling,
            message.max_num_tokens,
            message.num_prompt_tokens,
            message.request_id,
        ]
    elif isinstance(message, ExtendSequence):
        body = ["extend", message.sequence_id, message.max_num_tokens]
    elif isinstance(message, AbortSequence):
        body = ["abort", message.sequence_id]
    elif isinstance(message, TakeOver):
        body = ["take_over"]
    elif isinstance(message, StepDown):
        body = ["step_down"]
    elif isinstance(message, Heartbeat):
        body = ["heartbeat", message.progress, message.busy]
    else:
        outputs = [
            [
                *(o.sequence_id, o.token_ids, o.finish_reason, o.released, o.num_cached_tokens, o.error),
                *(o.queue_seconds, o.logprobs, o.prompt_logprobs),
            ]
            for o in message.outputs
        ]
        counts = (message.num_running, message.num_waiting, message.totals, message.work, message.queue_seconds)
        body = ["step", message.step, outputs, *counts, message.preempted]
    packed = msgpack.packb(body)
    return len(packed).to_bytes(4, "big") + packed


def decode_frame(packed: bytes) -> Frame:
    """The inverse of `encode_frame`, without the length. Raises ValueError on an unknown kind."""
    kind, *fields = msgpack.unpackb(packed)
    if kind == "add":
        sequence_id, segment, shared, *rest = fields
        rows = None if shared is None else SharedRows(SegmentRef(*shared[0]), *shared[1:])
        return replace(AddSequence(sequence_id, SegmentRef(*segment), *rest), shared=rows)
    if kind == "extend":
        return ExtendSequence(*fields)
    if kind == "abort":
        return AbortSequence(*fields)
    if kind == "take_over":
        return TakeOver(*fields)
    if kind == "step_down":
        return StepDown(*fields)
    if kind == "heartbeat":
        return Heartbeat(*fields)
    if kind == "step":
        step, outputs, num_running, num_waiting, totals, work, queue_seconds, preempted = fields
        read = [_read_output(*fields) for fields in outputs]
        work = None if work is None else StepWork(*work)
        counts = (EngineTotals(*totals), work, queue_seconds, tuple(preempted))
        return StepFrame(step, read, num_running, num_waiting, *counts)
    raise ValueError(f"unknown frame kind {kind!r}")


def _packed_ref(ref: SegmentRef) -> list[Any]:
    return [ref.pid, ref.fd, ref.nonce]


def _read_output(*fields: Any) -> SequenceOutput:
    *rest, logprobs, prompt_logprobs = fields
    return replace(
        SequenceOutput(*rest), logprobs=_read_logprobs(logprobs), prompt_logprobs=_read_logprobs(prompt_logprobs)
    )


def _read_logprobs(packed: list[Any] | None) -> list[TokenLogprobs] | None:
    return packed and [TokenLogprobs(*one) for one in packed]
