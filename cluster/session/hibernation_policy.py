"""Whether a cache is worth reading from the disk: what that takes against computing it again, as both were measured.

Owns: the two speeds and the comparison. Pure. Knows nothing of files, sessions or clocks.
"""

from __future__ import annotations

# Before anything was measured: a slow disk, and a small network on two cores.
_BYTES_PER_SECOND = 150e6
_TOKENS_PER_SECOND = 500.0
# Opening, checking and mapping, whatever the size.
_RESTORE_SECONDS = 0.02
# What is measured counts so much, what was known before the rest.
_WEIGHT = 0.3
# A turn computes in pieces, and its reply as well: from so many tokens on, what it took says how quick that is.
_MIN_TOKENS = 256


class HibernationPolicy:
    """Speeds adapt to what is told. Seconds, bytes, tokens."""

    def __init__(self) -> None:
        self.bytes_per_second = _BYTES_PER_SECOND
        self.tokens_per_second = _TOKENS_PER_SECOND

    def restored(self, nbytes: int, seconds: float) -> None:
        """So many bytes were read back."""
        if seconds > 0:
            self.bytes_per_second += _WEIGHT * (nbytes / seconds - self.bytes_per_second)

    def computed(self, num_prompt_tokens: int, num_reply_tokens: int, seconds: float) -> None:
        """A turn took so long in which so many tokens of its prompt were computed."""
        # A reply's tokens take much longer: a turn that is mostly reply says nothing of prompts.
        if num_prompt_tokens >= max(_MIN_TOKENS, 8 * num_reply_tokens) and seconds > 0:
            rate = num_prompt_tokens / seconds
            self.tokens_per_second += _WEIGHT * (rate - self.tokens_per_second)

    def is_worth_restoring(self, num_tokens: int, nbytes: int) -> bool:
        """Whether so many tokens, so many bytes on the disk, are there sooner if they are read than if they are
        computed."""
        restore = _RESTORE_SECONDS + nbytes / self.bytes_per_second
        return restore < num_tokens / self.tokens_per_second
