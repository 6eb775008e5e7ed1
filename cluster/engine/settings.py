"""Limits of one engine, whether it guesses ahead, and where it listens.

Owns: `EngineSettings` and `Speculation`. Knows nothing of torch or Ray: replicas make it, engines read it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# More would be wrong too often to pay, and the scheduler's reserve of memory allows for so many.
MAX_DRAFT_TOKENS = 16


@dataclass(frozen=True)
class Speculation:
    """N-gram speculation (prompt lookup decoding): a sequence's last `max_match` down to `min_match` tokens are looked
    up among its earlier ones, and at most `num_tokens` of what followed there are guessed to follow again. 0: off.

    Raises ValueError for numbers that do not fit together.
    """

    num_tokens: int = 0
    min_match: int = 2
    max_match: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.num_tokens <= MAX_DRAFT_TOKENS:
            raise ValueError(f"num_tokens must be between 0 and {MAX_DRAFT_TOKENS}, got {self.num_tokens}")
        if not 1 <= self.min_match <= self.max_match:
            raise ValueError(f"min_match must be between 1 and max_match ({self.max_match}), got {self.min_match}")


@dataclass(frozen=True)
class EngineSettings:
    """`device` is cpu or cuda; `socket_path` is a Unix socket's, at most 107 bytes."""

    max_num_seqs: int
    max_num_batched_tokens: int
    num_threads: int
    device: str
    socket_path: str
    speculation: Speculation = field(default_factory=Speculation)
