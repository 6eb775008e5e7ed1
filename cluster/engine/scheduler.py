"""Who computes how many tokens in the next step.

Owns: the queue, the set of running sequences, the budgets (sequences, tokens a step, KV bytes), preemption, the
choice of LongRoPE's regime, and how many tokens ahead may be guessed. It decides only: it touches no KV memory, runs
nothing, and knows nothing of the network or of messages. The engine carries a `ScheduleDecision` out.

There are no phases: every sequence has `num_computed_tokens` chasing `num_tokens` (the idea of vLLM's v1).

Why nothing starves: sequences are admitted in the order they came, and the youngest gives way. One token a step
is kept for every running sequence; among those with more to compute, the oldest gets at least half of the rest.
Drafts (see ngram.py) get what is left over when all tokens that are there have their share.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from phi_cluster.cluster.engine.ngram import NgramIndex
from phi_cluster.cluster.engine.sequence import Sequence, SequenceStatus
from phi_cluster.cluster.engine.settings import MAX_DRAFT_TOKENS, Speculation

# A sequence is admitted beside others only if all of them can grow by so many tokens: otherwise it would soon be
# preempted again, and its prefill would be for nothing.
#
# Drafts are made only while there is so much room too. Rows of wrong drafts are then never charged: at most
# MAX_DRAFT_TOKENS lie behind a sequence, so after the last step with drafts (which may add as many tokens) it has
# overwritten them before it has used up the room.
_HEADROOM_TOKENS = 2 * MAX_DRAFT_TOKENS
# Where all of a prompt's logits are wanted: a row of them may have a megabyte.
_MAX_LOGIT_ROWS = 64


@dataclass(frozen=True)
class EngineLimits:
    """Budgets of one engine. `max_kv_bytes` None: whoever grants the leases watches the memory.

    Running sequences may be fewer than `max_num_seqs`: each needs a token of `max_num_batched_tokens` a step.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_kv_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_kv_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


class ScheduledSequence(NamedTuple):
    """Compute `num_tokens` tokens (at least 1) from `num_computed_tokens` on and, if they are the last, also the
    guesses `draft_ids` behind them."""

    sequence: Sequence
    num_tokens: int
    draft_ids: tuple[int, ...] = ()


@dataclass
class ScheduleDecision:
    """What is to be done, in this order."""

    # Give their keys and values back (they wait again).
    preempted: list[Sequence] = field(default_factory=list)
    # Give their keys and values back and store the new `long_rope`: the other regime is due.
    regime_changed: list[Sequence] = field(default_factory=list)
    # Can never run; with the reason, for the user.
    refused: list[tuple[Sequence, str]] = field(default_factory=list)
    scheduled: list[ScheduledSequence] = field(default_factory=list)


class Scheduler:
    """`waiting` and `running` are in the order of arrival. `long_rope_for` maps a sequence's number of tokens to
    the regime it must be computed in."""

    def __init__(
        self,
        limits: EngineLimits,
        long_rope_for: Callable[[int], bool],
        speculation: Speculation | None = None,
    ):
        self._limits = limits
        self._long_rope_for = long_rope_for
        self._speculation = speculation or Speculation()
        self._ngrams: dict[int, NgramIndex] = {}
        self._max_running = min(limits.max_num_seqs, limits.max_num_batched_tokens)
        self._arrivals = 0
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        """Whether `schedule` would decide anything: a paused sequence alone is no work."""
        return any(not s.is_paused for s in self.running) or any(not s.is_paused for s in self.waiting)

    def add(self, sequence: Sequence) -> None:
        self._arrivals += 1
        sequence.arrival = self._arrivals
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that is over (it may be gone already)."""
        sequence.status = SequenceStatus.FINISHED
        self._ngrams.pop(sequence.sequence_id, None)
        for sequences in (self.waiting, self.running):
            if sequence in sequences:
                sequences.remove(sequence)

    def schedule(self) -> ScheduleDecision:
        """Decide the next step; sequences are taken to be computed as decided."""
        decision = ScheduleDecision()
        self._make_running_fit(decision)
        self._admit(decision)
        active = [s for s in self.running if not s.is_paused]
        for sequence in active:
            # By the length of the whole sequence, as Hugging Face decides: it cannot change before everything is
            # computed and a token is drawn, so all chunks of a prefill share one regime.
            long_rope = self._long_rope_for(sequence.num_tokens)
            if sequence.long_rope != long_rope:
                sequence.long_rope = long_rope
                sequence.restart()
                decision.regime_changed.append(sequence)
        shares = share_tokens(active, self._limits.max_num_batched_tokens)
        drafts = self._draft(shares)
        decision.scheduled = [ScheduledSequence(s, num, drafts.get(s.sequence_id, ())) for s, num in shares]
        return decision

    # Drafts.

    def _draft(self, shares: list[tuple[Sequence, int]]) -> dict[int, tuple[int, ...]]:
        """Guesses, by sequence id, for sequences that lack one token, from what is left of the step's budget."""
        budget = self._limits.max_num_batched_tokens - sum(num for _, num in shares)
        if budget <= 0 or not self._all_can_grow(self.running):
            return {}
        proposals: dict[int, list[int]] = {}
        for sequence, _ in shares:
            if sequence.num_uncomputed_tokens == 1 and (draft_ids := self._propose(sequence)):
                proposals[sequence.sequence_id] = draft_ids
        return share_drafts(proposals, budget)

    def _propose(self, sequence: Sequence) -> list[int]:
        """Guesses that could become tokens, all of them with one more behind: within every limit of the sequence."""
        params, num_tokens = sequence.params, sequence.num_tokens
        matcher = sequence.matcher
        # Where a grammar leaves no choice, what must come is guessed whether speculation is on or not.
        num_forced = 0 if matcher is None else MAX_DRAFT_TOKENS
        most = min(
            max(self._speculation.num_tokens, num_forced),
            params.max_tokens - sequence.num_generated_tokens - 1,
            self._limits.max_model_len - num_tokens - 1,
            sequence.max_num_tokens - num_tokens - 1,
        )
        # The last token behind all drafts must be drawn in the regime that everything is computed in now.
        while most > 0 and self._long_rope_for(num_tokens + most) != sequence.long_rope:
            most -= 1
        if most <= 0:
            return []
        draft_ids = [] if matcher is None else matcher.forced()[:most]
        if not draft_ids and self._speculation.num_tokens:
            draft_ids = self._look_up(sequence, min(most, self._speculation.num_tokens))
            if matcher is not None:
                draft_ids = draft_ids[: matcher.num_allowed(draft_ids)]
        if not params.ignore_eos:
            # A stop token is the end, or masked (min_tokens): neither has anything behind it.
            stop = next((i for i, token_id in enumerate(draft_ids) if token_id in params.stop_token_ids), None)
            draft_ids = draft_ids[:stop]
        return draft_ids

    def _look_up(self, sequence: Sequence, most: int) -> list[int]:
        ngrams = self._ngrams.get(sequence.sequence_id)
        if ngrams is None:
            ngrams = NgramIndex(self._speculation.min_match, self._speculation.max_match)
            self._ngrams[sequence.sequence_id] = ngrams
        return ngrams.propose(sequence.token_ids, most)

    # KV bytes. A running sequence is charged for all of its present tokens, computed or not, so that bytes never
    # run out in the middle of a prefill and nothing but a drawn token makes the sum grow.

    def _make_running_fit(self, decision: ScheduleDecision) -> None:
        for sequence in [s for s in self.running if self._never_fits(s)]:
            self._refuse(sequence, decision)
        while self._too_large(sum(s.kv_nbytes for s in self.running)):
            self._preempt(self.running[-1], decision)

    def _admit(self, decision: ScheduleDecision) -> None:
        for candidate in list(self.waiting):
            if candidate.is_paused:
                continue
            if self._never_fits(candidate):
                self._refuse(candidate, decision)
                continue
            while not self._has_room_for(candidate):
                # Who may not go on gives way to who can.
                paused = [s for s in self.running if s.is_paused]
                if not paused:
                    # Nobody behind it is admitted before it, however small: it would wait for ever.
                    return
                self._preempt(paused[-1], decision)
            self.waiting.remove(candidate)
            candidate.status = SequenceStatus.RUNNING
            _insert(self.running, candidate)

    def _has_room_for(self, candidate: Sequence) -> bool:
        if not self.running:
            return True
        if len(self.running) >= self._max_running:
            return False
        return self._all_can_grow([*self.running, candidate])

    def _all_can_grow(self, sequences: list[Sequence]) -> bool:
        return not self._too_large(sum(self._nbytes_soon(s) for s in sequences))

    def _nbytes_soon(self, sequence: Sequence) -> int:
        growth = sequence.num_prompt_tokens + sequence.params.max_tokens - sequence.num_tokens
        return sequence.kv_nbytes + min(_HEADROOM_TOKENS, growth) * sequence.kv.bytes_per_token

    def _too_large(self, nbytes: int) -> bool:
        return self._limits.max_kv_bytes is not None and nbytes > self._limits.max_kv_bytes

    def _never_fits(self, sequence: Sequence) -> bool:
        return self._too_large(sequence.kv_nbytes)

    def _refuse(self, sequence: Sequence, decision: ScheduleDecision) -> None:
        self.remove(sequence)
        why = (
            f"{sequence.num_tokens} tokens need {sequence.kv_nbytes} bytes of KV cache, "
            f"the engine has {self._limits.max_kv_bytes}"
        )
        decision.refused.append((sequence, why))

    def _preempt(self, sequence: Sequence, decision: ScheduleDecision) -> None:
        self.running.remove(sequence)
        sequence.status = SequenceStatus.PREEMPTED
        sequence.restart()
        # Before all that came after it: unless older ones wait too, at the head of the queue.
        _insert(self.waiting, sequence)
        decision.preempted.append(sequence)


def share_tokens(sequences: list[Sequence], budget: int) -> list[tuple[Sequence, int]]:
    """How many tokens each computes: at most `budget` in all. `sequences` in order of arrival.

    First come those that lack one token (decoding): they are somebody's next word. Of the rest, half is for the
    oldest prefill, so that a long prompt goes on under any traffic; the other half goes to whoever can finish
    first, so that a short prompt need not wait for a long one.
    """
    lacking = {s.sequence_id: _num_at_once(s) for s in sequences}
    shares = {s.sequence_id: 1 for s in sequences if s.num_uncomputed_tokens == 1}
    prefills = [s for s in sequences if s.num_uncomputed_tokens > 1]
    rest = budget - len(shares)
    if prefills and rest > 0:
        oldest = prefills[0]
        shares[oldest.sequence_id] = min(lacking[oldest.sequence_id], (rest + 1) // 2)
        rest -= shares[oldest.sequence_id]
        lacking[oldest.sequence_id] -= shares[oldest.sequence_id]
        for sequence in sorted(prefills, key=lambda s: lacking[s.sequence_id]):
            share = min(rest, lacking[sequence.sequence_id])
            shares[sequence.sequence_id] = shares.get(sequence.sequence_id, 0) + share
            rest -= share
    return [(s, shares[s.sequence_id]) for s in sequences if shares.get(s.sequence_id)]


def _num_at_once(sequence: Sequence) -> int:
    num = sequence.num_uncomputed_tokens
    return min(num, _MAX_LOGIT_ROWS) if sequence.wants_prompt_logprobs else num


def share_drafts(proposals: dict[int, list[int]], budget: int) -> dict[int, tuple[int, ...]]:
    """At most `budget` of the guesses, by sequence id: all have the same share, and what one does not need goes to
    those who guess more."""
    granted: dict[int, tuple[int, ...]] = {}
    for i, (sequence_id, draft_ids) in enumerate(sorted(proposals.items(), key=lambda item: len(item[1]))):
        granted[sequence_id] = tuple(draft_ids[: budget // (len(proposals) - i)])
        budget -= len(granted[sequence_id])
    return granted


def _insert(sequences: list[Sequence], sequence: Sequence) -> None:
    bisect.insort(sequences, sequence, key=lambda s: s.arrival)
