"""What the compiled linear layers and row kernels compute, in a few lines of torch each: what they are tested against.

Owns: the meaning of rounded rows and of a linear layer on them. Attention and stored keys and values are
reference_attention.py's. Knows nothing of instruction sets, panels, threads or networks.

Rows are [m, k] here, without padding; what has several results names them in the order of rowwise_args.h.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from phi_cluster.model.ops.library import LARGEST_INT16
from phi_cluster.model.quantize import GROUP, dequantize_int4, dequantize_int8

# Rows (or groups) whose numbers are all smaller become zeros: the inverse of their scale would overflow.
_SMALLEST = 1e-30
# The products of so many inputs are summed exactly.
_EXACT_BLOCK = 1024


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int16 [m, k] and scales float32 [m] of float32 [m, k]; bit for bit what the kernels give.

    A row with a number that is not finite has the scale NaN, and then any integers.
    """
    q, scale = _round(x, LARGEST_INT16)
    return q.short(), scale


def round_groups(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int8 [m, k], scales and scales times sums float32 [m, k / 32] of float32 [m, k], k a multiple of 32; otherwise as
    `round_rows`, with a scale for each group of 32."""
    q, scale = _round(x.unflatten(1, (-1, GROUP)), 127)
    return q.char().flatten(1), scale, scale * q.sum(-1)


def linear_int8(packed: Tensor, scale: Tensor, n: int, x: Tensor, x_scale: Tensor) -> Tensor:
    """float32 [m, n]: packed int8 weights times rounded rows, int16 [m, k]. Bit for bit what the kernels give."""
    weight = dequantize_int8(packed, torch.ones_like(scale), n, x.shape[1]).long()
    sums = torch.zeros(len(x), n)
    for first in range(0, x.shape[1], _EXACT_BLOCK):
        block = slice(first, first + _EXACT_BLOCK)
        sums += (x[:, block].long() @ weight[:, block].T).float()
    return sums * scale[:n] * x_scale[:, None]


def linear_int8_groups(packed: Tensor, scale: Tensor, n: int, x: Tensor, x_scale: Tensor) -> Tensor:
    """float32 [m, n]: packed int8 weights times rows rounded in groups, int8 [m, k]. Bit for bit what the kernels give
    that have fused products."""
    weight = dequantize_int8(packed, torch.ones_like(scale), n, x.shape[1]).long()
    sums = torch.zeros(len(x), n)
    for group in range(x.shape[1] // GROUP):
        columns = slice(group * GROUP, (group + 1) * GROUP)
        exact = (x[:, columns].long() @ weight[:, columns].T).double()
        # The product is exact in float64; their sum is rounded once more than a fused one, which hardly ever matters.
        sums = (exact * x_scale[:, group, None].double() + sums.double()).float()
    return sums * scale[:n]


def linear_int4(packed: Tensor, scale: Tensor, n: int, x: Tensor, x_scale: Tensor) -> Tensor:
    """float64 [m, n]: packed int4 weights times rows rounded in groups, int8 [m, k]. The kernels sum in float32."""
    rows = x.double() * x_scale.double().repeat_interleave(GROUP, 1)
    return rows @ dequantize_int4(packed, scale, n, x.shape[1]).double().T


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """float64 [m, k]: `x` by its root mean square, times `weight` [k]. The kernels compute in float32."""
    x = x.double()
    return x * (x.square().mean(1, keepdim=True) + eps).rsqrt() * weight.double()


def silu_mul(gate_up: Tensor) -> Tensor:
    """float64 [m, k] of [m, 2k], gates and then ups: silu(gate) * up. The kernels compute in float32."""
    gate, up = gate_up.double().chunk(2, 1)
    return F.silu(gate) * up


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """float32 [heads, head_dim]: pairs (i, i + half) turned, half the length of `cos` and `sin`; the rest as it is. Bit
    for bit what the kernels give."""
    a, b, rest = heads.split([len(cos), len(cos), heads.shape[1] - 2 * len(cos)], 1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], 1)


def _round(x: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Whole numbers (as float32) up to `limit`, and scales, of the rows along the last dimension."""
    largest = torch.where(x.isfinite().all(-1), x.abs().amax(-1), torch.nan)
    usable = largest > _SMALLEST
    scale = torch.where(usable, largest / limit, torch.where(largest.isnan(), largest, 0.0))
    inverse = torch.where(usable, torch.full_like(largest, limit) / largest, 0.0)
    return (x * inverse[..., None]).nan_to_num(limit).clamp(-limit, limit).round(), scale
