"""From logits to token ids.

Owns: the logits processors, the order they come in (vLLM's), and the random draw. Knows nothing of sequences,
caches, batches' policy or text, and keeps nothing between two calls.

A token depends on its row of logits, its request and nothing else: not on the other rows, not on earlier calls.
* Random numbers are counter-based: a function of (seed, position), so no generator's state has to be saved, and
  a reply that is continued elsewhere goes on with the same numbers.
* Rows are worked on one by one in numpy, not as a batch in torch: torch's elementwise kernels split a batch into
  vector bodies and tails (and threads) by its total size, which may change the last bit of a row's exponentials.
  numpy is also the faster here (measured at 16 rows of 49152: argmax 0.08 ms against 1.6 ms).
* Where the compiled kernels are there, they make the draw (`DrawRows`), many times faster; processors stay in numpy.
  Both compute the same from the same random number, but their exponentials differ in the last bits. So they choose
  the same token unless a number falls within rounding of a boundary: the random one between two tokens, or a weight
  at the edge of top_p or min_p. One server uses one of them throughout.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from phi_cluster.model.sampling_params import SamplingParams

_MASK = 2**64 - 1
# The golden ratio's odd constant and the two multipliers of splitmix64 (Steele, Lea, Flood 2014; Vigna's code).
_GOLDEN = 0x9E3779B97F4A7C15
# Above this temperature every float32 distribution is uniform; the bound keeps -inf / temperature defined.
_MAX_TEMPERATURE = 1e30
# Weights are summed in blocks, then inside the block that is hit: 7 times faster than one running sum.
_BLOCK = 256

# One draw, as model/ops/sample_args.h's SampleArgs, where the fields are explained. `logits` is an address; `token` and
# `status` are results.
ROW = np.dtype(
    [
        ("logits", np.uint64),
        ("seed", np.uint64),
        ("position", np.uint64),
        ("top_p", np.float64),
        ("temperature", np.float32),
        ("min_p", np.float32),
        ("top_k", np.int32),
        ("vocab", np.int32),
        ("token", np.int32),
        ("status", np.int32),
    ],
    align=True,
)
# The same for one row: packing is 10 times faster than numpy's assignment.
_PACKED_ROW = struct.Struct("=QQQdffiiii")
# The largest logit of a row, by the row's `status` if that is not 0.
_PEAKS = {1: np.nan, 2: np.inf, 3: -np.inf}


class DrawRows(Protocol):
    """The draws of one step, elsewhere than in numpy."""

    def __call__(self, rows: NDArray[np.void]) -> None:
        """Set `token` and `status` of each of `rows` ([B], dtype ROW, contiguous). Logits stay alive meanwhile."""
        ...


@dataclass(frozen=True)
class SamplingRequest:
    """What the sampler must know beside the logits to choose one token."""

    params: SamplingParams
    # Absolute position in the sequence of the token to be chosen.
    position: int
    # Tokens of the reply so far (for min_tokens).
    num_generated: int = 0
    # The prompt's ids (an array is quickest), and how often each id occurs in the reply so far. Read only with
    # penalties.
    prompt_ids: Collection[int] = field(default=(), repr=False)
    generated_counts: Mapping[int, int] = field(default_factory=dict, repr=False)
    # uint32 [V / 32 rounded up]: bit i % 32 of word i / 32 says whether token i may be chosen; None: all may.
    allowed: NDArray[np.uint32] | None = field(default=None, repr=False)

    @property
    def needs_processing(self) -> bool:
        """Whether any logit is changed before the choice."""
        params = self.params
        masked = self.masks_stop_tokens or self.allowed is not None
        return bool(params.logit_bias) or params.has_penalties or masked

    @property
    def masks_stop_tokens(self) -> bool:
        return self.num_generated < self.params.min_tokens and bool(self.params.stop_token_ids)


class SamplingError(ValueError):
    """For some rows no token can be chosen; `rows` says which and why. The other rows are not at fault."""

    def __init__(self, rows: Mapping[int, str]):
        super().__init__("; ".join(f"row {row}: {why}" for row, why in rows.items()))
        self.rows = dict(rows)


def sample(logits: torch.Tensor, requests: Sequence[SamplingRequest], draw: DrawRows | None = None) -> list[int]:
    """One token id for each row of `logits` ([B, V], any float dtype and device; read as float32, not changed).

    Order and meaning are vLLM's: logit_bias, min_tokens mask, repetition penalty (over prompt and reply),
    frequency and presence penalty (over the reply), what `allowed` leaves; then the argmax at temperature 0, else
    temperature, min_p, top_k, top_p and the draw. Of equal logits the lower id comes first, also at the edge of top_k
    and top_p. `draw` makes argmax and draw; None: numpy does.

    Raises SamplingError for rows whose largest logit is NaN, infinite, or masked.
    """
    if logits.dim() != 2 or logits.shape[0] != len(requests):
        raise ValueError(f"logits of shape {tuple(logits.shape)} do not fit {len(requests)} requests")
    if not requests:
        return []
    rows = logits.detach().to("cpu", torch.float32).numpy()
    # Overflow to infinity is looked for; underflow to 0 is what the exponential is expected to do.
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        tokens, peaks = _sample_in_numpy(rows, requests) if draw is None else _sample_with(draw, rows, requests)
    if peaks:
        raise SamplingError({row: _why_not(peak) for row, peak in peaks.items()})
    return tokens


def _sample_with(
    draw: DrawRows, rows: NDArray[np.float32], requests: Sequence[SamplingRequest]
) -> tuple[list[int], dict[int, float]]:
    """A token for each row, and the largest logit of those rows for which there is none."""
    if rows.strides[1] != rows.itemsize:
        rows = np.ascontiguousarray(rows)
    vocab, address, stride = rows.shape[1], rows.ctypes.data, rows.strides[0]
    processed: list[NDArray[np.float32]] = []
    packed = bytearray(len(requests) * _PACKED_ROW.size)
    for i, request in enumerate(requests):
        params = request.params
        row_address = address + i * stride
        if request.needs_processing:
            processed.append(_process(rows[i], request))
            row_address = processed[-1].ctypes.data
        _PACKED_ROW.pack_into(
            packed,
            i * _PACKED_ROW.size,
            row_address,
            params.seed & _MASK,
            request.position,
            params.top_p,
            0.0 if params.is_greedy else min(params.temperature, _MAX_TEMPERATURE),
            params.min_p,
            min(params.top_k, vocab),
            vocab,
            -1,
            0,
        )
    drawn: NDArray[Any] = np.frombuffer(packed, ROW)
    draw(drawn)
    statuses = drawn["status"].tolist()
    return drawn["token"].tolist(), {i: _PEAKS[status] for i, status in enumerate(statuses) if status}


def _sample_in_numpy(
    rows: NDArray[np.float32], requests: Sequence[SamplingRequest]
) -> tuple[list[int], dict[int, float]]:
    """A token for each row that has one, and the largest logit of the others."""
    if all(r.params.is_greedy and not r.needs_processing for r in requests):
        # numpy's argmax takes the first of equals, and a NaN before any number.
        best = rows.argmax(axis=1)
        peaks = rows[np.arange(len(requests)), best]
        return best.tolist(), {int(i): float(peaks[i]) for i in np.flatnonzero(~np.isfinite(peaks))}
    tokens: list[int] = []
    failed: dict[int, float] = {}
    for i, request in enumerate(requests):
        row = _process(rows[i], request) if request.needs_processing else np.ascontiguousarray(rows[i])
        best_id = int(row.argmax())
        if not np.isfinite(row[best_id]):
            failed[i] = float(row[best_id])
        elif request.params.is_greedy:
            tokens.append(best_id)
        else:
            tokens.append(_draw(row, row[best_id], request.params, uniform(request.params.seed, request.position)))
    return tokens, failed


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, a function of its arguments alone.

    It is output number `position` of a splitmix64 generator whose start is itself a mixed `seed`, so that
    neighbouring seeds do not give shifted copies of one stream. Negative seeds count modulo 2**64.
    """
    start = _mix((seed + _GOLDEN) & _MASK)
    return (_mix((start + (position + 1) * _GOLDEN) & _MASK) >> 11) * 2.0**-53


def _mix(z: int) -> int:
    """splitmix64's output function: a bijection of 64-bit integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _why_not(peak: float) -> str:
    if peak == -np.inf:
        return "every token is masked"
    return f"the largest logit is {peak}"


def _process(row: NDArray[np.float32], request: SamplingRequest) -> NDArray[np.float32]:
    """The row (a copy) with bias, mask and penalties applied. Ids must lie within the row."""
    params = request.params
    row = row.copy()
    if params.logit_bias:
        row[_ids(params.logit_bias)] += np.fromiter(params.logit_bias.values(), np.float32)
    if request.masks_stop_tokens:
        stops = _ids(params.stop_token_ids)
        # An end token that the logits do not reach cannot be drawn anyway.
        row[stops[stops < len(row)]] = -np.inf
    if params.has_penalties:
        generated = _ids(request.generated_counts)
        if params.repetition_penalty != 1.0:
            # The ids of both, each once.
            occurs = np.zeros(len(row), np.bool_)
            occurs[_ids(request.prompt_ids)] = True
            occurs[generated] = True
            seen = np.flatnonzero(occurs)
            # float64, because a penalty may be too small or too large for float32.
            values = row[seen].astype(np.float64)
            penalty = params.repetition_penalty
            row[seen] = np.where(values > 0, values / penalty, values * penalty)
        counts = np.fromiter(request.generated_counts.values(), np.float64, len(generated))
        row[generated] -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    if request.allowed is not None:
        bits = np.unpackbits(request.allowed.view(np.uint8), count=len(row), bitorder="little")
        row[bits == 0] = -np.inf
    return row


def _ids(ids: Collection[int]) -> NDArray[np.int64]:
    if isinstance(ids, np.ndarray):
        return ids
    return np.fromiter(ids, np.int64, len(ids))


def _draw(row: NDArray[np.float32], peak: np.float32, params: SamplingParams, u: float) -> int:
    """A token id drawn with the uniform number `u` from the softmax of row / temperature, truncated."""
    # `ids` are the candidates in ascending order; None: all.
    ids: NDArray[np.int64] | None = None
    if 0 < params.top_k < len(row):
        ids = _top_k(row, params.top_k)
    values = row if ids is None else row[ids]
    # Probabilities times a constant; the largest is 1.
    weights = np.exp((values - peak) / np.float32(min(params.temperature, _MAX_TEMPERATURE)))
    # The order of min_p and top_k is free: each keeps the upper part of one and the same ranking.
    if params.min_p > 0:
        kept = np.flatnonzero(weights >= params.min_p)
        ids, values, weights = (kept if ids is None else ids[kept]), values[kept], weights[kept]
    if params.top_p < 1:
        kept = _top_p(values, weights, params.top_p)
        ids, weights = (kept if ids is None else ids[kept]), weights[kept]
    index = _inverse_cdf(weights, u)
    return index if ids is None else int(ids[index])


def _top_k(row: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Exactly k ids, ascending: the largest logits, of equal ones those with the lowest ids."""
    least = np.partition(row, len(row) - k)[len(row) - k]
    above = np.flatnonzero(row > least)
    equal = np.flatnonzero(row == least)[: k - len(above)]
    return np.sort(np.concatenate((above, equal)))


def _top_p(values: NDArray[np.float32], weights: NDArray[np.float32], top_p: float) -> NDArray[np.int64]:
    """Indices, ascending, of the fewest largest values whose weights reach top_p of all weight (at least one).

    Only a part need be sorted: tokens lighter than (1 - top_p) * total / number weigh, all together, less than
    (1 - top_p) * total, so the others hold more than top_p of it and with it the whole nucleus.
    """
    total = float(weights.sum(dtype=np.float64))
    likely = np.flatnonzero(weights >= (1 - top_p) * total / len(weights))
    order = likely[np.argsort(-values[likely], kind="stable")]
    # A token is kept if those before it do not reach top_p.
    reached = np.cumsum(weights[order], dtype=np.float64)
    num_kept = 1 + int(np.searchsorted(reached, top_p * total, side="left"))
    return np.sort(order[:num_kept])


def _inverse_cdf(weights: NDArray[np.float32], u: float) -> int:
    """The first index at which the running sum of weights exceeds u times their sum; u in [0, 1).

    The sum runs in token-id order, because that order is the same however the candidates were found (a sort's
    order of equals is not), and in float64, because 1e5 float32 additions would lose the small weights at its
    end, and because u has 53 bits: in float32 rare tokens could never be drawn.
    """
    exact = weights.astype(np.float64)
    ends = np.cumsum(np.add.reduceat(exact, np.arange(0, len(exact), _BLOCK)))
    target = u * ends[-1]
    # The largest weight is 1 and u at most 1 - 2**-53, so target < ends[-1] and there is such a block.
    block = int(np.searchsorted(ends, target, side="right"))
    inside = exact[block * _BLOCK : (block + 1) * _BLOCK]
    running = np.cumsum(inside) + (ends[block - 1] if block else 0.0)
    index = int(np.searchsorted(running, target, side="right"))
    if index == len(inside):
        # The two sums of the block differ in the last bit, and the target lies between them.
        index = int(np.flatnonzero(inside)[-1])
    return block * _BLOCK + index
