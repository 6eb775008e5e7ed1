"""One generation in the engine: its tokens, how far they are computed, and when it is over.

Owns: `Sequence`, its states, and `SequenceKV`, the protocol of the memory it works on. Knows nothing of how
sequences share a step, of the network, of sessions or of text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as AbstractSequence
from enum import Enum
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from phi_cluster.cluster.frames import TokenLogprobs
from phi_cluster.model.sampler import SamplingRequest
from phi_cluster.model.sampling_params import SamplingParams


class SequenceStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    # Waiting again, after its KV cache was given up for older sequences.
    PREEMPTED = "preempted"
    FINISHED = "finished"


class SequenceKV(Protocol):
    """The memory of a sequence: token ids, and keys and values of the first `num_computed_tokens` of them.

    Order of writing: rows of the cache (by the network), `set_computed`, `append_tokens`; so whoever reads at
    any moment finds only what is complete. Lowering goes first, before pages are given back.
    """

    # Which of LongRoPE's regimes the stored keys belong to.
    long_rope: bool
    # Of keys and values in all layers.
    bytes_per_token: int

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_computed_tokens(self) -> int: ...

    @property
    def num_lasting_tokens(self) -> int:
        """Keys and values of so many tokens are shared with other sequences: `clear` leaves them."""

    @property
    def cache(self) -> Any:
        """What the network computes on (model/kv_cache.py's KVCache)."""

    def trim(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens only."""

    def append_tokens(self, token_ids: list[int]) -> None:
        """Store ids behind the last."""

    def set_computed(self, num_tokens: int) -> None:
        """Keys and values of the first `num_tokens` tokens are stored now."""

    def clear(self) -> None:
        """Give all keys and values back but those that are shared; token ids stay."""

    def close(self) -> None:
        """Let go: after this the memory is never touched again from here."""


class ReplyMatcher(Protocol):
    """Of model/grammar.py's Matcher, what is needed here. All raise ValueError."""

    def consume(self, token_ids: AbstractSequence[int]) -> None: ...

    def masks(self, draft_ids: AbstractSequence[int] = ()) -> NDArray[np.uint32]: ...

    def forced(self) -> list[int]: ...

    def num_allowed(self, token_ids: AbstractSequence[int]) -> int: ...


class Sequence:
    """A generation: `num_computed_tokens` chases `num_tokens`, and at the end of each chase a token is drawn.

    `num_prompt_tokens` says where the reply starts; tokens behind it that are there from the beginning are a
    reply that is taken over in its middle. The sequence never has more than `max_num_tokens` tokens (what its
    lease of memory covers): there it pauses until that number is raised.

    Raises ValueError if the numbers do not fit together, or the reply so far not to its grammar.
    """

    def __init__(
        self,
        sequence_id: int,
        kv: SequenceKV,
        token_ids: list[int],
        num_prompt_tokens: int,
        params: SamplingParams,
        max_num_tokens: int,
        matcher: ReplyMatcher | None = None,
        request_id: str = "",
    ):
        if kv.num_tokens != len(token_ids):
            raise ValueError(f"the KV segment holds {kv.num_tokens} tokens, the sequence has {len(token_ids)}")
        if not 1 <= num_prompt_tokens <= len(token_ids):
            raise ValueError(
                f"num_prompt_tokens must be between 1 and the number of tokens {len(token_ids)}, "
                f"got {num_prompt_tokens}"
            )
        if len(token_ids) > max_num_tokens:
            raise ValueError(f"{len(token_ids)} tokens are more than max_num_tokens {max_num_tokens}")
        self.sequence_id = sequence_id
        # For the log.
        self.request_id = request_id
        self.kv = kv
        self.token_ids = list(token_ids)
        self.num_prompt_tokens = num_prompt_tokens
        self.params = params
        # Of a reply that follows a grammar: it has taken in all of the reply that is there.
        self.matcher = matcher
        if matcher is not None:
            matcher.consume(token_ids[num_prompt_tokens:])
        self.max_num_tokens = max_num_tokens
        self.status = SequenceStatus.WAITING
        # Older sequences have lower numbers; the scheduler gives them.
        self.arrival = 0
        self.long_rope = kv.long_rope
        # Of the prompt's tokens behind the first, as far as they are computed, if they are wanted.
        self.prompt_logprobs: list[TokenLogprobs] = []
        # Logits come from computing: at least the last token is always computed (again).
        computed = 0 if self.wants_prompt_logprobs else kv.num_computed_tokens
        self.num_computed_tokens = min(computed, self.num_tokens - 1)
        # Prompt tokens that need not be computed for the first token of this reply.
        self.num_cached_tokens = min(self.num_computed_tokens, num_prompt_tokens)
        self._prompt_ids: NDArray[np.int64] | None = None
        self._generated_counts: Counter[int] | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_generated_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """At least 1 while the sequence is not finished."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Once there is a reply they have been told."""
        return self.params.prompt_logprobs and self.num_generated_tokens == 0

    @property
    def is_paused(self) -> bool:
        """Whether the lease has no room for one more token."""
        return self.num_tokens >= self.max_num_tokens

    @property
    def kv_nbytes(self) -> int:
        """Bytes of keys and values once all present tokens are computed."""
        return self.num_tokens * self.kv.bytes_per_token

    def restart(self) -> None:
        """Nothing is computed any more but what is shared: it begins anew with prompt and reply so far."""
        lasting = 0 if self.wants_prompt_logprobs else self.kv.num_lasting_tokens
        self.num_computed_tokens = min(lasting, self.num_tokens - 1)
        self.num_cached_tokens = 0
        self.prompt_logprobs.clear()

    def append(self, token_id: int) -> None:
        """Take a drawn token in. Raises ValueError if its grammar does not allow it."""
        self.token_ids.append(token_id)
        if self.matcher is not None and token_id not in self.params.stop_token_ids:
            self.matcher.consume([token_id])
        if self._generated_counts is not None:
            self._generated_counts[token_id] += 1

    def finish_reason(self, max_model_len: int) -> str | None:
        """ "stop" or "length" if the reply is over, else None."""
        reason = self.params.finish_reason(self.num_generated_tokens, self.token_ids[-1])
        return "length" if reason is None and self.num_tokens >= max_model_len else reason

    def sampling_request(
        self, draft_ids: AbstractSequence[int] = (), allowed: NDArray[np.uint32] | None = None
    ) -> SamplingRequest:
        """What the sampler needs for the token behind `draft_ids`, as if these had been drawn already; `allowed`: see
        there."""
        position = self.num_tokens + len(draft_ids)
        num_generated = self.num_generated_tokens + len(draft_ids)
        if not self.params.has_penalties:
            return SamplingRequest(self.params, position, num_generated, allowed=allowed)
        if self._prompt_ids is None or self._generated_counts is None:
            self._prompt_ids = np.unique(np.asarray(self.token_ids[: self.num_prompt_tokens], np.int64))
            self._generated_counts = Counter(self.token_ids[self.num_prompt_tokens :])
        counts = self._generated_counts
        if draft_ids:
            counts = counts.copy()
            counts.update(draft_ids)
        return SamplingRequest(self.params, position, num_generated, self._prompt_ids, counts, allowed)
