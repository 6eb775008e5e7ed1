"""Does what the scheduler decided: one forward pass over all chunks, then a token for whoever is due one.

Owns: building the network's input, and the check that ids fit the network. Knows nothing of budgets, queues, the
order in which memory is marked as written, or of messages.
"""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence
from typing import Protocol, TypeAlias

import torch

from phi_cluster.cluster.engine.sequence import Sequence
from phi_cluster.model.phi3 import SequenceChunk
from phi_cluster.model.sampler import SamplingError, sample

# What a step brought to a sequence: a token; None (its tokens are not all computed yet); or why there is none.
StepOutcome: TypeAlias = int | Exception | None


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
    """Runs a network; keeps nothing between two steps."""

    def __init__(self, model: Model, config: ModelConfig):
        self._model = model
        self._vocab_size = config.vocab_size

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

    def run(self, scheduled: list[tuple[Sequence, int]]) -> dict[int, StepOutcome]:
        """Compute the next `num` tokens of each sequence; outcomes by sequence id.

        Writes rows of the KV caches and nothing else, so a step that raises may be repeated. A row of logits that
        no token can be drawn from (NaN) fails its own sequence only.
        """
        chunks = []
        due: list[int] = []
        outcomes: dict[int, StepOutcome] = {}
        for row, (sequence, num) in enumerate(scheduled):
            start = sequence.num_computed_tokens
            ids = torch.tensor(sequence.token_ids[start : start + num], dtype=torch.int64)
            chunks.append(SequenceChunk(ids, start, sequence.kv.cache, sequence.long_rope))
            outcomes[sequence.sequence_id] = None
            if start + num == sequence.num_tokens:
                due.append(row)
        logits = self._model.forward(chunks)
        if logits.shape != (len(chunks), self._vocab_size):
            raise RuntimeError(f"logits of shape {tuple(logits.shape)} for {len(chunks)} chunks")
        for row, outcome in self._sample(logits, scheduled, due).items():
            outcomes[scheduled[row][0].sequence_id] = outcome
        return outcomes

    def _sample(
        self, logits: torch.Tensor, scheduled: list[tuple[Sequence, int]], rows: list[int]
    ) -> dict[int, StepOutcome]:
        """Tokens for these rows of `logits`, by row."""
        if not rows:
            return {}
        requests = [scheduled[row][0].sampling_request() for row in rows]
        picked = logits if len(rows) == len(logits) else logits[rows]
        try:
            return dict(zip(rows, sample(picked, requests), strict=True))
        except SamplingError as error:
            failed: dict[int, StepOutcome] = {
                rows[i]: RuntimeError(f"no token can be chosen: {why}") for i, why in error.rows.items()
            }
        return failed | self._sample(logits, scheduled, [row for row in rows if row not in failed])
