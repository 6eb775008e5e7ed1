"""Does what the scheduler decided: one forward pass over all chunks, then tokens for whoever is due some.

Owns: building the network's input, verifying drafts, and the check that ids fit the network. Knows nothing of budgets,
queues, where drafts come from, the order in which memory is marked as written, or of frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as AbstractSequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from phi_cluster.cluster.engine.scheduler import ScheduledSequence
from phi_cluster.cluster.engine.sequence import Sequence
from phi_cluster.cluster.frames import TokenLogprobs
from phi_cluster.model.logprobs import token_logprobs
from phi_cluster.model.phi3 import SequenceChunk
from phi_cluster.model.sampler import DrawRows, SamplingError, SamplingRequest, sample


@dataclass(frozen=True)
class Drawn:
    """What a step brought to a sequence: its next tokens, all but the last equal to the drafts (none: its tokens are
    not all computed yet), and their log probabilities where those are wanted. `prompt_logprobs`: of the prompt's tokens
    behind those that were computed."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None


# Or why there is none.
StepOutcome: TypeAlias = Drawn | Exception


class Rope(Protocol):
    """Of model/rope.py's Rope, what is needed here."""

    def regime_for(self, num_tokens: int) -> str:
        """ "short" or "long"."""
        ...


class Model(Protocol):
    """Of model/phi3.py's Phi3ForCausalLM, what is needed here."""

    @property
    def rope(self) -> Rope: ...

    def forward(self, chunks: AbstractSequence[SequenceChunk]) -> torch.Tensor: ...


class ModelConfig(Protocol):
    """Of model/config.py's Phi3Config, what is needed here."""

    @property
    def vocab_size(self) -> int: ...


class ModelRunner:
    """Runs a network; keeps nothing between two steps but a thread, which finds out what grammars allow while the
    network computes."""

    def __init__(self, model: Model, config: ModelConfig, draw: DrawRows | None = None):
        """`draw`: the sampler's draws, if not numpy's."""
        self._model = model
        self._draw = draw
        self._vocab_size = config.vocab_size
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="grammars")

    def long_rope_for(self, num_tokens: int) -> bool:
        """Whether a sequence of `num_tokens` tokens is computed in LongRoPE's long regime."""
        return self._model.rope.regime_for(num_tokens) == "long"

    def check(self, sequence: Sequence) -> None:
        """Raises ValueError, naming the id, if the network has no row for an id of the prompt or of logit_bias."""
        for what, ids in (("token id", sequence.token_ids), ("logit_bias: token id", sequence.params.logit_bias)):
            if ids and (min(ids) < 0 or max(ids) >= self._vocab_size):
                wrong = next(i for i in ids if not 0 <= i < self._vocab_size)
                raise ValueError(
                    f"{what} {wrong} is not one of the model's {self._vocab_size} (0 to {self._vocab_size - 1})"
                )

    def run(self, scheduled: list[ScheduledSequence]) -> dict[int, StepOutcome]:
        """Compute the next tokens of each sequence, and its drafts behind them; outcomes by sequence id.

        Writes rows of the KV caches and nothing else, so a step that raises may be repeated. A row of logits that
        no token can be drawn from (NaN) fails its own sequence only.
        """
        chunks = [_chunk(one) for one in scheduled]
        constrained = [one for one in scheduled if one.sequence.matcher and _num_due(one)]
        masks = self._beside.submit(_masks, constrained) if constrained else None
        try:
            logits = self._model.forward(chunks)
        finally:
            # Nobody may look at a matcher while it is at work.
            allowed = {} if masks is None else masks.result()
        if logits.shape != (num_rows := sum(chunk.num_logits for chunk in chunks), self._vocab_size):
            raise RuntimeError(f"logits of shape {tuple(logits.shape)}, {num_rows} rows were asked for")
        told = _of_prompts(scheduled, chunks, logits)
        if told:
            logits = logits[_rows_due(scheduled, chunks)]
        # All rows at once. Whether a row counts turns out later, but what it would be drawn with is known: it counts
        # only if all drafts before it were right.
        requests = [
            sequence.sampling_request(draft_ids[:i], _row(allowed.get(sequence.sequence_id), i))
            for one in scheduled
            for sequence, _, draft_ids in (one,)
            for i in range(_num_due(one))
        ]
        drawn = iter(_sample(logits, requests, self._draw))
        outcomes: dict[int, StepOutcome] = {}
        first = 0
        for one in scheduled:
            sequence, num_due = one.sequence, _num_due(one)
            outcome = _verify(list(islice(drawn, num_due)), one.draft_ids)
            if isinstance(broken := allowed.get(sequence.sequence_id), Exception):
                outcome = broken
            elif isinstance(outcome, Drawn) and outcome.token_ids and sequence.params.logprobs is not None:
                outcome = _with_logprobs(outcome, logits[first:], sequence.params.logprobs)
            if isinstance(outcome, Drawn) and sequence.sequence_id in told:
                outcome = replace(outcome, prompt_logprobs=told[sequence.sequence_id])
            outcomes[sequence.sequence_id] = outcome
            first += num_due
        return outcomes


def _chunk(one: ScheduledSequence) -> SequenceChunk:
    sequence, num, draft_ids = one
    start = sequence.num_computed_tokens
    ids = torch.tensor([*sequence.token_ids[start : start + num], *draft_ids], dtype=torch.int64)
    num_logits = max(_num_due(one), num if sequence.wants_prompt_logprobs else 0)
    return SequenceChunk(ids, start, sequence.kv.cache, sequence.long_rope, num_logits)


def _num_due(one: ScheduledSequence) -> int:
    """So many tokens are to be drawn, by the last rows."""
    return 1 + len(one.draft_ids) if one.num_tokens == one.sequence.num_uncomputed_tokens else 0


def _rows_due(scheduled: list[ScheduledSequence], chunks: list[SequenceChunk]) -> list[int]:
    """Rows of logits that tokens are drawn from."""
    rows: list[int] = []
    end = 0
    for one, chunk in zip(scheduled, chunks, strict=True):
        end += chunk.num_logits
        rows += range(end - _num_due(one), end)
    return rows


def _of_prompts(
    scheduled: list[ScheduledSequence], chunks: list[SequenceChunk], logits: torch.Tensor
) -> dict[int, list[TokenLogprobs]]:
    """By sequence id: of the prompt's tokens that the computed rows foretell, where that is wanted."""
    found: dict[int, list[TokenLogprobs]] = {}
    end = 0
    for one, chunk in zip(scheduled, chunks, strict=True):
        sequence, start = one.sequence, end
        end += chunk.num_logits
        if sequence.wants_prompt_logprobs and sequence.params.logprobs is not None:
            first = sequence.num_computed_tokens + 1
            token_ids = sequence.token_ids[first : first + one.num_tokens]
            found[sequence.sequence_id] = _logprobs(logits[start:], token_ids, sequence.params.logprobs)
    return found


def _masks(scheduled: list[ScheduledSequence]) -> dict[int, NDArray[np.uint32] | Exception]:
    """What the grammar of each allows in its next place and behind each draft, or why that is not known."""
    masks: dict[int, NDArray[np.uint32] | Exception] = {}
    for sequence, _, draft_ids in scheduled:
        assert sequence.matcher is not None
        try:
            masks[sequence.sequence_id] = sequence.matcher.masks(draft_ids)
        except Exception as error:
            masks[sequence.sequence_id] = error
    return masks


def _row(masks: NDArray[np.uint32] | Exception | None, i: int) -> NDArray[np.uint32] | None:
    return masks[i] if isinstance(masks, np.ndarray) else None


def _with_logprobs(drawn: Drawn, logits: torch.Tensor, num_top: int) -> Drawn:
    return Drawn(drawn.token_ids, _logprobs(logits, drawn.token_ids, num_top))


def _logprobs(logits: torch.Tensor, token_ids: list[int], num_top: int) -> list[TokenLogprobs]:
    rows = logits[: len(token_ids)].detach().to("cpu", torch.float32).numpy()
    return [TokenLogprobs(*found) for found in token_logprobs(rows, token_ids, num_top)]


def _verify(drawn: list[int | Exception], draft_ids: AbstractSequence[int]) -> StepOutcome:
    """The tokens that count, of those drawn behind the sequence and behind each draft.

    As long as a draft is what was drawn in its place, the next one was drawn behind the true sequence. The first that
    differs is true itself; so is the last, behind all drafts.
    """
    accepted: list[int] = []
    for i, token_id in enumerate(drawn):
        if isinstance(token_id, Exception):
            # With tokens before it, these count; the next step meets the same row and fails.
            return Drawn(accepted) if accepted else token_id
        accepted.append(token_id)
        if i == len(draft_ids) or token_id != draft_ids[i]:
            break
    return Drawn(accepted)


def _sample(logits: torch.Tensor, requests: list[SamplingRequest], draw: DrawRows | None) -> list[int | Exception]:
    """For each row of `logits` a token, or why there is none."""
    if not requests:
        return []
    try:
        return list(sample(logits, requests, draw))
    except SamplingError as error:
        why = error.rows
    rest = [row for row in range(len(requests)) if row not in why]
    others: Iterator[int | Exception] = iter(_sample(logits[rest], [requests[row] for row in rest], draw))
    return [
        RuntimeError(f"no token can be chosen: {why[row]}") if row in why else next(others)
        for row in range(len(requests))
    ]
