"""The engine: `step() = schedule -> run -> update`, for all sequences at once.

Owns: the sequences from `add` to their last output, the order in which their memory is written, and the promise
that each gets exactly one finish reason and is released exactly once, after the last write to its memory.
Knows nothing of Ray, sockets, sessions or text; never sleeps; for one thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from phi_cluster.cluster.engine.model_runner import StepOutcome
from phi_cluster.cluster.engine.scheduler import EngineLimits, ScheduledSequence, Scheduler
from phi_cluster.cluster.engine.sequence import Sequence, SequenceStatus
from phi_cluster.cluster.engine.settings import Speculation
from phi_cluster.cluster.frames import SequenceOutput, StepWork, TokenLogprobs
from phi_cluster.model.grammar import GrammarError

__all__ = ["Engine", "EngineLimits"]

logger = logging.getLogger(__name__)


class Runner(Protocol):
    """What the engine needs of a ModelRunner."""

    def long_rope_for(self, num_tokens: int) -> bool: ...

    def check(self, sequence: Sequence) -> None: ...

    def run(self, scheduled: list[ScheduledSequence]) -> dict[int, StepOutcome]: ...


class Engine:
    """Continuous batching over `runner`. `clock` gives seconds (monotonic). With `speculation` a step may bring a
    sequence several tokens; they are those that it would have got one by one.

    Attributes: `step_count`, forward passes so far; `last_step_at`, the clock after the latest (None before the
    first): whoever watches over the engine believes these and nothing else; `num_preemptions`; `num_draft_tokens`,
    guesses computed so far, and `num_accepted_tokens`, those of them that were right; `last_work`, what the latest
    `step` computed (None: nothing); `last_preempted`, the sequences whose memory it gave to others.
    """

    def __init__(
        self,
        limits: EngineLimits,
        runner: Runner,
        clock: Callable[[], float],
        speculation: Speculation | None = None,
    ):
        self._limits = limits
        self._runner = runner
        self._clock = clock
        self._scheduler = Scheduler(limits, runner.long_rope_for, speculation)
        self._sequences: dict[int, Sequence] = {}
        # Sequences that have had an output: num_cached_tokens goes into the first only.
        self._announced: set[int] = set()
        # When each came that has not been computed yet, in the order of their coming.
        self._came_at: dict[int, float] = {}
        # How long each had waited for its first step, until an output says so.
        self._queued: dict[int, float] = {}
        self._outputs: list[SequenceOutput] = []
        self.step_count = 0
        self.num_preemptions = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        self.last_step_at: float | None = None
        self.last_work: StepWork | None = None
        self.last_preempted: tuple[int, ...] = ()

    @property
    def has_work(self) -> bool:
        """Whether `step` would bring anything. Sequences that wait for a longer lease are no work."""
        return bool(self._outputs) or self._scheduler.has_work

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for their turn, preempted ones included."""
        return len(self._scheduler.waiting)

    @property
    def queue_seconds(self) -> float:
        """How long the oldest sequence has waited that has not been computed yet."""
        oldest = next(iter(self._came_at.values()), None)
        return 0.0 if oldest is None else max(self._clock() - oldest, 0.0)

    def add(self, sequence: Sequence) -> None:
        """Take a sequence in, and its memory with it.

        Raises ValueError for ids that the network does not know, a sequence longer than max_model_len, or an id in
        use. The memory is closed then, and no output will name the sequence. A reply that is over already (taken
        over between its last token and the news of its end) is finished by the next step without computing.
        """
        try:
            name = sequence.sequence_id
            if name in self._sequences or any(o.sequence_id == name for o in self._outputs):
                raise ValueError(f"sequence id {name} is in use")
            if sequence.num_tokens > self._limits.max_model_len:
                raise ValueError(
                    f"{sequence.num_tokens} tokens are more than max_model_len {self._limits.max_model_len}"
                )
            self._runner.check(sequence)
            if sequence.kv.num_computed_tokens > sequence.num_computed_tokens:
                # Rows that are computed again do not count as stored meanwhile.
                sequence.kv.set_computed(sequence.num_computed_tokens)
        except BaseException:
            sequence.kv.close()
            raise
        self._sequences[sequence.sequence_id] = sequence
        self._came_at[sequence.sequence_id] = self._clock()
        self._scheduler.add(sequence)
        reason = sequence.finish_reason(self._limits.max_model_len)
        if reason is not None:
            self._finish(sequence, reason)

    def extend(self, sequence_id: int, max_num_tokens: int) -> None:
        """The sequence's lease covers so many tokens now. Never fewer than before; ignored if it is over."""
        sequence = self._sequences.get(sequence_id)
        if sequence is not None:
            sequence.max_num_tokens = max(sequence.max_num_tokens, max_num_tokens)

    def abort(self, sequence_id: int) -> None:
        """End a sequence, waiting or running; the next step says so. Ignored if it is over already."""
        sequence = self._sequences.get(sequence_id)
        if sequence is not None:
            self._finish(sequence, "abort")

    def step(self) -> list[SequenceOutput]:
        """Compute once for all who can, and return what is new since the last call, one output a sequence.

        No error of a single sequence gets out of here: it ends that sequence with finish reason "error".
        """
        decision = self._scheduler.schedule()
        self.last_preempted = tuple(sequence.sequence_id for sequence in decision.preempted)
        for sequence in decision.preempted:
            self.num_preemptions += 1
            self._change_kv(sequence, _clear)
        for sequence in decision.regime_changed:
            self._change_kv(sequence, _change_regime)
        for sequence, why in decision.refused:
            self._finish(sequence, "error", error=why)
        scheduled = [one for one in decision.scheduled if one.sequence.status is SequenceStatus.RUNNING]
        self.last_work = None
        if scheduled:
            began = self._clock()
            outcomes = self._run(scheduled)
            self.step_count += 1
            self.last_step_at = self._clock()
            num_tokens = sum(one.num_tokens + len(one.draft_ids) for one in scheduled)
            self.last_work = StepWork(len(scheduled), num_tokens, self.last_step_at - began)
            for one in scheduled:
                came_at = self._came_at.pop(one.sequence.sequence_id, None)
                if came_at is not None:
                    self._queued[one.sequence.sequence_id] = max(began - came_at, 0.0)
            for one in scheduled:
                self._update(one, outcomes.get(one.sequence.sequence_id))
        outputs, self._outputs = self._outputs, []
        return outputs

    def _run(self, scheduled: list[ScheduledSequence]) -> dict[int, StepOutcome]:
        """The runner's outcomes. If a step fails as a whole, it is repeated one sequence at a time and without drafts,
        so that only the culprit fails; rows that are written twice are the same rows."""
        try:
            return self._runner.run(scheduled)
        except Exception as error:
            if len(scheduled) == 1 and not scheduled[0].draft_ids:
                return {scheduled[0].sequence.sequence_id: error}
            logger.warning("a step of %d sequences failed and is repeated one by one", len(scheduled), exc_info=True)
        outcomes: dict[int, StepOutcome] = {}
        for one in scheduled:
            outcomes |= self._run([one._replace(draft_ids=())])
        return outcomes

    def _update(self, one: ScheduledSequence, outcome: StepOutcome | None) -> None:
        """Mark what was computed, take the tokens in, and see whether one was the last.

        Token by token: the row, the count of rows, the token. What a wrong draft left lies behind all that is counted
        and is overwritten by the next step.
        """
        sequence, num, draft_ids = one
        if isinstance(outcome, Exception):
            self._fail(sequence, outcome)
            return
        if outcome is None or bool(outcome.token_ids) != (num == sequence.num_uncomputed_tokens):
            self._fail(sequence, RuntimeError("the runner drew no token, or one too early"))
            return
        right = tuple(outcome.token_ids[:-1])
        if right != draft_ids[: len(right)]:
            self._fail(sequence, RuntimeError("the runner drew a token behind a wrong draft"))
            return
        sequence.prompt_logprobs += outcome.prompt_logprobs or ()
        taken: list[int] = []
        reason: str | None = None
        try:
            self._mark_computed(sequence, num)
            for token_id in outcome.token_ids:
                if taken:
                    # The token before was a draft, whose row is there already.
                    self._mark_computed(sequence, 1)
                sequence.kv.append_tokens([token_id])
                sequence.append(token_id)
                taken.append(token_id)
                reason = sequence.finish_reason(self._limits.max_model_len)
                if reason is not None:
                    break
        except Exception as error:
            self._fail(sequence, error, taken)
            return
        logprobs = None if outcome.logprobs is None else outcome.logprobs[: len(taken)]
        self.num_draft_tokens += len(draft_ids)
        self.num_accepted_tokens += max(len(taken) - 1, 0)
        if reason is not None:
            self._finish(sequence, reason, taken, logprobs=logprobs)
        elif taken:
            self._outputs.append(
                SequenceOutput(
                    sequence.sequence_id,
                    taken,
                    num_cached_tokens=self._announce(sequence),
                    queue_seconds=self._queued.pop(sequence.sequence_id, None),
                    logprobs=logprobs,
                    prompt_logprobs=_take_prompt_logprobs(sequence),
                )
            )

    def _mark_computed(self, sequence: Sequence, num: int) -> None:
        sequence.kv.set_computed(sequence.num_computed_tokens + num)
        sequence.num_computed_tokens += num

    def _change_kv(self, sequence: Sequence, change: Callable[[Sequence], None]) -> None:
        if sequence.status is SequenceStatus.FINISHED:
            return
        try:
            change(sequence)
        except Exception as error:
            self._fail(sequence, error)

    def _fail(self, sequence: Sequence, error: Exception, token_ids: list[int] | None = None) -> None:
        names = {"request_id": sequence.request_id, "sequence_id": sequence.sequence_id}
        logger.error("a sequence failed", exc_info=error, extra=names)
        if isinstance(error, GrammarError):
            # Seen with a tokenizer only, perhaps in the middle of a reply: the request's fault all the same.
            self._finish(sequence, "bad_grammar", token_ids, error=str(error))
        else:
            self._finish(sequence, "error", token_ids, error=f"{type(error).__name__}: {error}")

    def _finish(
        self,
        sequence: Sequence,
        reason: str,
        token_ids: list[int] | None = None,
        error: str | None = None,
        logprobs: list[TokenLogprobs] | None = None,
    ) -> None:
        """The one place where a sequence ends: out of the scheduler, memory closed, then released."""
        self._scheduler.remove(sequence)
        try:
            sequence.kv.close()
        except Exception:
            # Nothing will write here any more, closed or not.
            logger.exception("the memory of sequence %d could not be closed", sequence.sequence_id)
        del self._sequences[sequence.sequence_id]
        self._came_at.pop(sequence.sequence_id, None)
        num_cached_tokens = self._announce(sequence)
        self._announced.discard(sequence.sequence_id)
        queue_seconds = self._queued.pop(sequence.sequence_id, None)
        told = {"request_id": sequence.request_id, "sequence_id": sequence.sequence_id, "outcome": reason}
        logger.info("a sequence has ended", extra=told)
        self._outputs.append(
            SequenceOutput(
                sequence.sequence_id,
                token_ids or [],
                reason,
                released=True,
                num_cached_tokens=num_cached_tokens,
                error=error,
                queue_seconds=queue_seconds,
                logprobs=logprobs,
                prompt_logprobs=_take_prompt_logprobs(sequence),
            )
        )

    def _announce(self, sequence: Sequence) -> int | None:
        if sequence.sequence_id in self._announced:
            return None
        self._announced.add(sequence.sequence_id)
        return sequence.num_cached_tokens


def _take_prompt_logprobs(sequence: Sequence) -> list[TokenLogprobs] | None:
    """They are told once."""
    told, sequence.prompt_logprobs = sequence.prompt_logprobs, []
    return told or None


def _clear(sequence: Sequence) -> None:
    sequence.kv.clear()


def _change_regime(sequence: Sequence) -> None:
    sequence.kv.clear()
    sequence.kv.long_rope = sequence.long_rope
