"""Attention and the rounding of stored keys and values in plain torch: what the compiled kernels are tested against.

Owns: the stored rows' format and the meaning of their numbers. Knows nothing of blocks, threads or instruction sets.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# attention_args.h's kKeyBlock and kSuperBlock.
_BLOCK, _SUPER_BLOCK = 32, 512
# Heads whose numbers are all smaller are stored as zeros.
_SMALLEST_ABSMAX = 1e-30


def store_rows(numbers: Tensor, kind: str) -> Tensor:
    """uint8 [n, row_nbytes]: the stored rows for float32 numbers [n, kv_heads, head_dim].

    "bfloat16": the numbers, rounded to nearest even. "int8": for each head its float32 scale, absmax / 127, then
    int8 numbers; a head with a number that is not finite has the scale NaN. Bit for bit what the kernels store, except
    for NaN's payload.
    """
    if kind == "bfloat16":
        return numbers.bfloat16().view(torch.uint8).flatten(1)
    absmax = numbers.abs().amax(-1, keepdim=True)
    finite = numbers.isfinite().all(-1, keepdim=True)
    usable = finite & (absmax >= _SMALLEST_ABSMAX)
    scale = torch.where(usable, absmax / 127, 0.0)
    scale = torch.where(finite, scale, torch.nan)
    # Not 127 / absmax, which torch computes as the reciprocal times 127: that rounds twice.
    factor = torch.where(usable, torch.full_like(absmax, 127) / absmax, 0.0)
    quantized = torch.where(usable, numbers * factor, 0.0).round().to(torch.int8)
    return torch.cat([scale.view(torch.uint8), quantized.view(torch.uint8)], -1).flatten(1)


def load_rows(rows: Tensor, num_kv_heads: int, kind: str) -> Tensor:
    """float32 [n, kv_heads, head_dim]: the numbers that stored rows, uint8 [n, row_nbytes], mean."""
    heads = rows.unflatten(1, (num_kv_heads, -1))
    if kind == "bfloat16":
        return heads.view(torch.bfloat16).float()
    return heads[..., 4:].view(torch.int8).float() * heads[..., :4].contiguous().view(torch.float32)


def _greatest_so_far(scores: Tensor) -> Tensor:
    """For each score [heads, queries, keys] the greatest of its super block, up to and with its block."""
    keys = scores.shape[-1]
    padded = torch.nn.functional.pad(scores, (0, -keys % _SUPER_BLOCK), value=-torch.inf)
    blocks = padded.unflatten(-1, (-1, _SUPER_BLOCK // _BLOCK, _BLOCK)).amax(-1)
    return blocks.cummax(-1).values.flatten(-2).repeat_interleave(_BLOCK, -1)[..., :keys]


def attend(query: Tensor, keys: Tensor, values: Tensor, start: int, window: int = 0) -> Tensor:
    """float64 [n, heads, head_dim]: the attention of queries [n, heads, head_dim] at positions `start` and following
    over keys and values [positions, kv_heads, head_dim]: each up to its own position, at most `window` (0: all).

    Queries, scaled for powers of two, are rounded to bfloat16, and so are weights before they meet values. A weight is
    rounded as it stands when its block of keys has been seen: by the greatest score of its super block so far.
    """
    scale = torch.tensor(query.shape[-1] ** -0.5)
    factor = (scale.double() * math.log2(math.e)).float()
    query, keys, values = (query * factor).bfloat16().double(), keys.double(), values.double()
    group = query.shape[1] // keys.shape[1]
    positions = torch.arange(start, start + len(query))[:, None]
    at = torch.arange(start + len(query))
    visible = at <= positions
    if window:
        visible &= at > positions - window
    keys = keys[: len(at)].repeat_interleave(group, 1)
    values = values[: len(at)].repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", query, keys)
    scores = scores.masked_fill(~visible, -torch.inf)
    greatest = _greatest_so_far(scores)
    weights = (scores - greatest).nan_to_num(nan=-torch.inf).exp2()
    rounded = weights.bfloat16().double()
    # From each weight's own scale to one for all; as far as a row has seen nothing, there is none.
    to_all = (greatest - scores.amax(-1, keepdim=True)).exp2()
    weights = (rounded * to_all) / (weights * to_all).sum(-1, keepdim=True)
    # Hidden values may be anything: not even 0 times them is added.
    strange = ~values.isfinite()
    output = torch.einsum("hqk,khd->qhd", weights, values.masked_fill(strange, 0.0))
    spoilt = torch.einsum("qk,khd->qhd", visible.double(), strange.double()) > 0
    return output.masked_fill(spoilt, torch.nan)
