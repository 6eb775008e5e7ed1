"""The log probabilities of tokens, as the network gives them.

Owns: that computation. Knows nothing of how tokens are chosen: bias, penalties, temperature and grammars do not change
these numbers (as in OpenAI's API and vLLM's).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def token_logprobs(
    logits: NDArray[np.float32], token_ids: Sequence[int], num_top: int
) -> list[tuple[float, list[int], list[float]]]:
    """For each row of `logits` [n, V] and its token: the token's log probability (natural logarithm), and ids and log
    probabilities of the `num_top` likeliest, in descending order; of equals the lower id comes first.

    A row's numbers do not depend on other rows.
    """
    found = []
    for row, token_id in zip(logits, token_ids, strict=True):
        exact = row.astype(np.float64)
        peak = exact.max()
        total = peak + np.log(np.exp(exact - peak).sum())
        top: list[int] = []
        if num := min(num_top, len(row)):
            least = np.partition(row, len(row) - num)[len(row) - num]
            candidates = np.flatnonzero(row >= least)
            top = candidates[np.argsort(-row[candidates], kind="stable")][:num].tolist()
        found.append((float(exact[token_id] - total), top, [float(exact[i] - total) for i in top]))
    return found
