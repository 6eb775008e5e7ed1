"""Single row kernels on the caller's thread, for tests: whole tensors in numpy, row after row.

Owns: the calls, and the padding that the network's buffers have otherwise. `linear` and `sample` are library.py's.
Knows nothing of what the kernels compute (reference.py does).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phi_cluster.model.ops.library import Ops, out_of_order_of

Floats = NDArray[np.float32]
_GROUP = 32


class _QuantizedRowC(ctypes.Structure):
    """rowwise_args.h's QuantizedRow."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("group_sums", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class QuantizedRows:
    """m rounded rows, padded to k32: int16 `x` [m, k32] with `scale` [m]; or, in groups, int8 `x` with `scale`,
    `group_sums` and `offsets` [m, k32 / 32]."""

    x: NDArray[Any]
    scale: Floats
    group_sums: Floats | None
    offsets: NDArray[np.int32] | None


def norm_quantize(ops: Ops, x: Floats, weight: Floats, eps: float, groups: bool) -> QuantizedRows:
    """RMS norm of x [m, k] times weight [k], rounded."""
    padded_x, padded_weight = _padded(x), _padded(weight[None])[0]

    def call(row: int, scratch: Floats, out: Any) -> None:
        ops.c.phi_norm_quantize(
            ops.isa.encode(),
            _address(padded_x[row]),
            _address(padded_weight),
            ctypes.c_float(eps),
            x.shape[1],
            len(scratch),
            _address(scratch),
            out,
        )

    return _quantized(ops, len(x), x.shape[1], groups, call)


def silu_mul_quantize(ops: Ops, gate_up: Floats, groups: bool) -> QuantizedRows:
    """silu(gate) * up of gate_up [m, 2k], rounded."""
    k = gate_up.shape[1] // 2

    def call(row: int, scratch: Floats, out: Any) -> None:
        ops.c.phi_silu_mul_quantize(ops.isa.encode(), _address(gate_up[row]), k, len(scratch), _address(scratch), out)

    return _quantized(ops, len(gate_up), k, groups, call)


def copy_quantize(ops: Ops, x: Floats, groups: bool) -> QuantizedRows:
    """x [m, k], rounded."""

    def call(row: int, scratch: Floats, out: Any) -> None:
        ops.c.phi_copy_quantize(ops.isa.encode(), _address(x[row]), x.shape[1], len(scratch), _address(scratch), out)

    return _quantized(ops, len(x), x.shape[1], groups, call)


def rotate_heads(ops: Ops, heads: Floats, cos: Floats, sin: Floats) -> Floats:
    """heads [heads, head_dim] with the first 2 * len(cos) numbers of each turned."""
    turned = heads.copy()
    ops.c.phi_rotate_heads(ops.isa.encode(), _address(turned), *heads.shape, _address(cos), _address(sin), len(cos))
    return turned


def widen_row(ops: Ops, bf16: NDArray[np.uint16]) -> Floats:
    """float32 [k] of the bits of bfloat16 [k]."""
    wide = np.empty(len(bf16), np.float32)
    ops.c.phi_widen_row(ops.isa.encode(), _address(bf16), len(bf16), _address(wide))
    return wide


def _quantized(ops: Ops, m: int, k: int, groups: bool, call: Callable[[int, Floats, Any], None]) -> QuantizedRows:
    """What `call(row, scratch, where its result goes)` writes for each row."""
    k32 = -(-k // _GROUP) * _GROUP
    x = np.zeros((m, k32), np.int8 if groups else np.int16)
    scale = np.zeros((m, k32 // _GROUP) if groups else m, np.float32)
    group_sums = np.zeros((m, k32 // _GROUP), np.float32) if groups else None
    offsets = np.zeros((m, k32 // _GROUP), np.int32) if groups else None
    # What an earlier row left there must not matter.
    scratch = np.full(k32, np.nan, np.float32)
    for row in range(m):
        out = _QuantizedRowC(
            x[row].ctypes.data,
            scale[row:].ctypes.data,
            None if group_sums is None else group_sums[row].ctypes.data,
            None if offsets is None else offsets[row].ctypes.data,
        )
        call(row, scratch, ctypes.byref(out))
    return QuantizedRows(out_of_order_of(ops, x), scale, group_sums, offsets)


def _padded(rows: Floats) -> Floats:
    padded = np.zeros((len(rows), -(-rows.shape[1] // _GROUP) * _GROUP), np.float32)
    padded[:, : rows.shape[1]] = rows
    return padded


def _address(numbers: NDArray[Any]) -> ctypes.c_void_p:
    assert numbers.flags.c_contiguous
    return ctypes.c_void_p(numbers.ctypes.data)
