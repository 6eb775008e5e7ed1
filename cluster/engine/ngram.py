"""Guesses what comes next in a sequence from what followed the same tokens before (prompt lookup decoding).

Owns: `NgramIndex`, where each n-gram of one sequence ended last. Knows nothing of why a guess may not be used
(limits, budgets, stop tokens), of the network, or of how guesses are verified.

Whoever quotes, edits code or fills in a form repeats itself; there most guesses are right. It costs no second network.
"""

from __future__ import annotations

# Indexing a long conversation at once would hold up a step for everybody: 1024 tokens take about a millisecond.
_INDEXED_AT_ONCE = 1024


class NgramIndex:
    """The n-grams of `min_match` to `max_match` tokens of one sequence, which only grows. It takes about 130 bytes a
    token and n, far less than the token's keys and values."""

    def __init__(self, min_match: int, max_match: int):
        # By n, longest first: the n-gram's hash, and how many tokens of the sequence end with its latest occurrence.
        # Hashes are smaller than n-grams, and where two are alike a guess is wrong, nothing more.
        self._ends: list[tuple[int, dict[int, int]]] = [(n, {}) for n in range(max_match, min_match - 1, -1)]
        self._num_indexed = 0

    def propose(self, token_ids: list[int], num_tokens: int) -> list[int]:
        """`num_tokens` ids that may follow `token_ids`, or none if the last `min_match` tokens never occurred before.

        `token_ids` is the whole sequence: what it was at the last call and perhaps more. The latest earlier occurrence
        of the longest n-gram wins. If what followed it ends (with the sequence itself), the guess is that it goes on
        round and round. What is not indexed yet is, but only a piece of it a call: until the index has caught up there
        are no guesses.
        """
        self._index(token_ids)
        if self._num_indexed < len(token_ids) - 1:
            return []
        for n, ends in self._ends:
            end = ends.get(hash(tuple(token_ids[-n:])))
            if end is not None:
                period = len(token_ids) - end
                return [token_ids[end + i % period] for i in range(num_tokens)]
        return []

    def _index(self, token_ids: list[int]) -> None:
        """Takes in n-grams that end before the last token: the last ones are what is looked up, not found."""
        first = self._num_indexed + 1
        last = min(len(token_ids) - 1, self._num_indexed + _INDEXED_AT_ONCE)
        for n, ends in self._ends:
            for end in range(max(first, n), last + 1):
                ends[hash(tuple(token_ids[end - n : end]))] = end
        self._num_indexed = max(last, self._num_indexed)
