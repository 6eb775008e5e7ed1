"""The frames between a replica and its engine.

Owns: their shapes, and the length-prefixed msgpack framing. Knows nothing of sockets and of who sends them. Token ids
are kept out of every `repr`, because frameworks print arguments.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import msgpack

from phi_cluster.cluster.messages import SegmentRef, SharedRows


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
        read = [sequence_id, SegmentRef(*segment), *rest, rows]
        return AddSequence(*read)
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
    return SequenceOutput(*fields[:-2], *map(_read_logprobs, fields[-2:]))


def _read_logprobs(packed: list[Any] | None) -> list[TokenLogprobs] | None:
    return packed and [TokenLogprobs(*one) for one in packed]
