"""Linear weights as int8 or int4 numbers with scales, in the order in which the CPU kernels read them.

Owns: the two packed formats, how numbers are rounded into them, and the way back. Knows nothing of checkpoints,
of where the packed bytes are kept, or of the kernels. Whoever keeps packed bytes must keep a version with them
that changes when anything here changes their meaning (cluster/weight_store.py does, in the file's name).

A weight is [N outputs, K inputs]. K is padded to K32, a multiple of 32, and N to P panels of 16 outputs; all
padding is 0.

* int8: value = q * scale, q in [-127, 127], one float32 scale an output.
  packed int8 [P, K32/4, 16, 4]: (p, j, r, i) is q[16p + r][4j + (0, 2, 1, 3)[i]]; scale float32 [P*16]. The two in
  the middle change places, so that 16-bit lanes hold (0, 1) in their lower and (2, 3) in their upper bytes.
* int4: value = q * d + m, q in [0, 15], float16 d and m for each group of 32 inputs of an output.
  packed uint8 [P, K32/8, 16, 4]: (p, j, r, i) is q[16p + r][8j + i] | q[16p + r][8j + 4 + i] << 4;
  scale float16 [P, K32/32, 2, 16]: (p, g, 0, r) is d and (p, g, 1, r) is m of group g of output 16p + r.
  GGUF's Q4_1 is the same numbers in another order, and is held without loss.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import reduce

import torch
from torch import Tensor

PANEL = 16
GROUP = 32
# Numbers that are worked on at once: what a pass over them writes stays in the CPU's cache.
_BLOCK_NUMBERS = 1 << 18
_NUM_REFITS = 2
_NUM_PROBED = 8
_LEVELS = 15


def int8_shapes(num_rows: int, num_columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the packed numbers (int8) and the scales (float32) of a weight [num_rows, num_columns]."""
    panels = _ceil(num_rows, PANEL)
    return (panels, _ceil(num_columns, GROUP) * GROUP // 4, PANEL, 4), (panels * PANEL,)


def int4_shapes(num_rows: int, num_columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the packed numbers (uint8) and the scales (float16) of a weight [num_rows, num_columns]."""
    panels, groups = _ceil(num_rows, PANEL), _ceil(num_columns, GROUP)
    return (panels, groups * GROUP // 8, PANEL, 4), (panels, groups, 2, PANEL)


def quantize_int8(
    weight: Tensor, name: str = "the weight", out: tuple[Tensor, Tensor] | None = None, num_threads: int = 1
) -> tuple[Tensor, Tensor]:
    """(packed, scale) of `weight`, [N, K] of any float dtype; written into `out` if that is given.

    Needs little memory beyond the results, whatever the weight's size. `num_threads` is worth more than 1 only
    where torch's own is 1. Raises ValueError, which calls the weight `name`, for NaN and infinities.
    """
    packed_shape, scale_shape = int8_shapes(*weight.shape)
    packed, scale = out or (torch.empty(packed_shape, dtype=torch.int8), torch.empty(scale_shape))

    def work(panels: slice, block: Tensor) -> None:
        row_scale = block.abs().amax(1) / 127
        # No scale: a row of zeros, or of numbers next to the smallest that float32 has.
        q = block.div_(torch.where(row_scale > 0, row_scale, torch.inf)[:, None]).round_().clamp_(-127, 127)
        fours = _padded(q, packed_shape[1] * 4, torch.int8).view(-1, PANEL, packed_shape[1], 2, 2)
        packed[panels].view(-1, packed_shape[1], PANEL, 2, 2).copy_(fours.transpose(3, 4).transpose(1, 2))
        scale.view(-1, PANEL)[panels].copy_(_padded(row_scale[:, None], 1, torch.float32).view(-1, PANEL))

    _for_blocks(work, weight, name, num_threads)
    return packed, scale


def dequantize_int8(packed: Tensor, scale: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """float32 [num_rows, num_columns]: the numbers that `quantize_int8`'s results stand for."""
    fours = packed.unflatten(3, (2, 2)).transpose(3, 4).transpose(1, 2)
    q = fours.reshape(packed.shape[0] * PANEL, -1)
    return (q.float() * scale[:, None])[:num_rows, :num_columns].contiguous()


def quantize_int4(
    weight: Tensor, name: str = "the weight", out: tuple[Tensor, Tensor] | None = None, num_threads: int = 1
) -> tuple[Tensor, Tensor]:
    """(packed, scale) of `weight`, [N, K] of any float dtype; written into `out` if that is given.

    Numbers that came from this format (or Q4_1) are held exactly; if they were rounded to bfloat16 meanwhile, to
    within that rounding. d and m of others are chosen for a small mean squared error. Memory and `num_threads` as
    for `quantize_int8`. Raises ValueError, which calls the weight `name`, for NaN, infinities, and numbers beyond
    float16's range.
    """
    packed_shape, scale_shape = int4_shapes(*weight.shape)
    packed, scale = out or (torch.empty(packed_shape, dtype=torch.uint8), torch.empty(scale_shape, dtype=torch.float16))
    whole, rest = divmod(weight.shape[1], GROUP)

    def work(panels: slice, block: Tensor) -> None:
        largest = float(block.abs().max())
        if largest > torch.finfo(torch.float16).max:
            raise ValueError(f"{name} holds {largest:.6g}: int4 cannot hold more than float16")
        parts = [_fit(block[:, : whole * GROUP].unflatten(1, (whole, GROUP)))] if whole else []
        if rest:
            parts.append(_fit(block[:, None, whole * GROUP :]))
        q = _padded(torch.cat([part[0].flatten(1) for part in parts], 1), packed_shape[1] * 8, torch.uint8)
        eights = q.view(-1, PANEL, packed_shape[1], 2, 4)
        packed[panels].copy_((eights[..., 0, :] | eights[..., 1, :] << 4).transpose(1, 2))
        for i in (1, 2):
            values = _padded(torch.cat([part[i] for part in parts], 1), scale_shape[1], torch.float16)
            scale[panels, :, i - 1].copy_(values.unflatten(0, (-1, PANEL)).transpose(1, 2))

    _for_blocks(work, weight, name, num_threads)
    return packed, scale


def dequantize_int4(packed: Tensor, scale: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """float32 [num_rows, num_columns]: the numbers that `quantize_int4`'s results stand for."""
    panels, eights = packed.shape[:2]
    by_row = packed.transpose(1, 2)
    q = torch.stack([by_row & 15, by_row >> 4], 3).reshape(panels * PANEL, eights * 8 // GROUP, GROUP)
    d, m = (scale[:, :, i].transpose(1, 2).reshape(panels * PANEL, -1, 1).float() for i in (0, 1))
    return (q.float() * d + m).flatten(1)[:num_rows, :num_columns].contiguous()


def _ceil(number: int, unit: int) -> int:
    return -(-number // unit)


def _for_blocks(work: Callable[[slice, Tensor], None], weight: Tensor, name: str, num_threads: int) -> None:
    """`work(panels, their rows as float32 [n, K])` for all panels; `work` may overwrite the rows, and only the last n
    may be no multiple of PANEL."""
    num_panels = _ceil(weight.shape[0], PANEL)
    step = max(_BLOCK_NUMBERS // weight.shape[1] // PANEL, 1)

    def convert(first: int) -> None:
        block = weight[first * PANEL : (first + step) * PANEL].to(torch.float32, copy=True)
        if not bool(torch.isfinite(block).all()):
            raise ValueError(f"{name} holds numbers that are not finite")
        work(slice(first, first + step), block)

    firsts = range(0, num_panels, step)
    if num_threads == 1:
        for first in firsts:
            convert(first)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for _ in pool.map(convert, firsts):
                pass
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _padded(values: Tensor, num_columns: int, dtype: torch.dtype) -> Tensor:
    """`values` [n, k] as `dtype`, with zeros up to whole panels and `num_columns`."""
    padded = torch.zeros((_ceil(values.shape[0], PANEL) * PANEL, num_columns), dtype=dtype)
    padded[: values.shape[0], : values.shape[1]] = values
    return padded


class _Fit:
    """The best numbers found so far for groups: `w` and `q` are [n, groups], `d`, `m` (numbers that float16 has) and
    `error` (the sum of squares) [groups], all float32."""

    def __init__(self, w: Tensor, d: Tensor, m: Tensor):
        self.w = w
        self.d, self.m = d, m
        self.q, self.error = self._round(d, m)

    def _round(self, d: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        q = (self.w - m).div_(torch.where(d > 0, d, torch.inf)).round_().clamp_(0, _LEVELS)
        off = (q * d).add_(m).sub_(self.w)
        return q, off.mul_(off).sum(0)

    def offer(self, d: Tensor, m: Tensor) -> None:
        """Takes these over for the groups that they are better for."""
        q, error = self._round(d, m)
        better = error < self.error
        self.d, self.m, self.error = (
            torch.where(better, new, old) for new, old in ((d, self.d), (m, self.m), (error, self.error))
        )
        self.q = torch.where(better, q, self.q)

    def refit(self) -> None:
        """Least squares: the best d and m for the q that there are, which then may be others."""
        n = self.w.shape[0]
        # Counted from m, so that few digits are lost where the numbers differ little from each other.
        w = self.w - self.m
        sum_q, sum_w = self.q.sum(0), w.sum(0)
        spread = n * (self.q * self.q).sum(0) - sum_q * sum_q
        d = (n * (self.q * w).sum(0) - sum_q * sum_w) / torch.where(spread > 0, spread, torch.inf)
        d = _float16(d)
        self.offer(d, _float16(self.m + (sum_w - d * sum_q) / n))

    def find_grid(self) -> None:
        """Numbers q * d + m of which no q is 0, or none is 15: least and largest do not tell d, but all of them do."""
        low, high = _range(self.w)
        span = high - low
        flat = (span == 0) & (self.error > 0)
        if bool(flat.any()):
            # One number, of more digits than float16 has: what m lacks, d is.
            part, number = self[flat], low[flat]
            m = _float16(number - number.abs() / 2048)
            part.offer(_float16(number - m), m)
            self[flat] = part
        # Most groups are none of these, and a few of their numbers show it: they lie anywhere between the steps.
        probed = (self.w[:_NUM_PROBED] - low).div_(torch.where(span > 0, span, torch.inf))
        for steps in range(_LEVELS - 1, 0, -1):
            place = probed * steps
            off = place.round().sub_(place).abs_().sum(0)
            # Room for bfloat16's rounding.
            on_grid = (off < 0.05 * len(probed)) & (self.error > 0)
            if bool(on_grid.any()):
                part = self[on_grid]
                least, d = low[on_grid], _float16(span[on_grid] / steps)
                for lowest in range(_LEVELS - steps + 1):
                    part.offer(d, _float16(least - lowest * d))
                self[on_grid] = part

    def __getitem__(self, groups: Tensor) -> _Fit:
        part = object.__new__(_Fit)
        part.w, part.q = self.w[:, groups], self.q[:, groups]
        part.d, part.m, part.error = self.d[groups], self.m[groups], self.error[groups]
        return part

    def __setitem__(self, groups: Tensor, part: _Fit) -> None:
        self.q[:, groups] = part.q
        self.d[groups], self.m[groups], self.error[groups] = part.d, part.m, part.error


def _fit(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (as `weight`), d and m [rows, groups] for float32 [rows, groups, n], n at most GROUP."""
    rows, groups, n = weight.shape
    # Groups side by side: what is done to each number is then done to whole rows of them.
    w = weight.permute(2, 0, 1).reshape(n, rows * groups).contiguous()
    low, high = _range(w)
    fit = _Fit(w, _float16((high - low) / _LEVELS), _float16(low))
    inexact = fit.error > 0
    if bool(inexact.any()):
        part = fit if bool(inexact.all()) else fit[inexact]
        part.find_grid()
        for _ in range(_NUM_REFITS):
            part.refit()
        if part is not fit:
            fit[inexact] = part
    return fit.q.view(n, rows, groups).permute(1, 2, 0), fit.d.view(rows, groups), fit.m.view(rows, groups)


def _range(w: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest [groups] of [n, groups]; many times as fast as amin."""
    return reduce(torch.minimum, w.unbind(0)), reduce(torch.maximum, w.unbind(0))


def _float16(values: Tensor) -> Tensor:
    """Rounded to float16, as float32."""
    return values.half().float()
