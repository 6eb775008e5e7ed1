"""The compiled kernels, reached through ctypes (which lets other Python threads run meanwhile).

Owns: finding and loading the shared library, its structures, the choice of instruction set, and the check that the
chosen kernels compute what plain C++ computes. Knows nothing of checkpoints, tensors or sequences.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ABI = 3
_EXTENSION = "phi_cluster.model.ops._kernels"
# Restricts the instruction set, so that nodes with different CPUs compute the same bits.
ISA_VARIABLE = "PHI_CLUSTER_ISA"
KV_KINDS = {"bfloat16": 0, "int8": 1}
# linear_args.h's LinearKind, by the dtypes of packed weights and of rounded rows.
LINEAR_KINDS = {("int8", "int16"): 0, ("uint8", "int8"): 1, ("int8", "int8"): 2}
# What int16 rows are rounded to at most: both bytes of such a number are int8.
LARGEST_INT16 = 256 * 127 + 127
# Outputs, inputs and rows of the layers in the check at start: more inputs than one block of exact sums has, and more
# rows than one tile.
_TESTED_SHAPE = (48, 1056, 19)


class OpsUnavailable(RuntimeError):
    """The compiled kernels cannot be used; the message says why in a few words."""


class LinearC(ctypes.Structure):
    """network.h's PhiLinear."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("n", ctypes.c_int32),
        ("k", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


class NetworkC(ctypes.Structure):
    """network.h's PhiNetwork."""

    _fields_ = (
        ("embed_tokens", ctypes.c_void_p),
        ("short_inv_freq", ctypes.c_void_p),
        ("long_inv_freq", ctypes.c_void_p),
        ("norms", ctypes.POINTER(ctypes.c_void_p)),
        ("linears", ctypes.POINTER(LinearC)),
        ("kv_region_nbytes", ctypes.c_int64),
        ("kv_row_nbytes", ctypes.c_int64),
        ("kv_kind", ctypes.c_int32),
        ("vocab_size", ctypes.c_int32),
        ("hidden_size", ctypes.c_int32),
        ("intermediate_size", ctypes.c_int32),
        ("num_layers", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("rotary_dim", ctypes.c_int32),
        ("sliding_window", ctypes.c_int32),
        ("rms_norm_eps", ctypes.c_float),
        ("attention_factor", ctypes.c_float),
    )


# network.h's PhiChunk.
CHUNK = np.dtype(
    [
        ("kv", np.uintp),
        ("start", np.int32),
        ("num_tokens", np.int32),
        ("num_logits", np.int32),
        ("long_rope", np.int32),
    ],
    align=True,
)


class LinearArgsC(ctypes.Structure):
    """linear_args.h's LinearArgs."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("n", ctypes.c_int),
        ("k32", ctypes.c_int),
        ("x", ctypes.c_void_p),
        ("x_scale", ctypes.c_void_p),
        ("group_sums", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("m", ctypes.c_int),
        ("y", ctypes.c_void_p),
        ("ld_y", ctypes.c_int64),
        ("add", ctypes.c_bool),
    )


@dataclass(frozen=True)
class Ops:
    """The loaded library `c` and the instruction set (`isa`) that its kernels are used with."""

    c: ctypes.CDLL
    isa: str


def find_library() -> Path | None:
    """Where the compiled library lies, or None if it was not built."""
    spec = importlib.util.find_spec(_EXTENSION)
    return Path(spec.origin) if spec is not None and spec.origin else None


@cache
def load(isa: str | None = None) -> Ops:
    """The kernels for `isa` (None: what PHI_CLUSTER_ISA names, else the best of this CPU), checked.

    Raises OpsUnavailable.
    """
    path = find_library()
    if path is None:
        raise OpsUnavailable("the kernels were not compiled when phi-cluster was installed")
    try:
        c = ctypes.CDLL(str(path))
        _declare(c)
    except (OSError, AttributeError) as error:
        raise OpsUnavailable(f"{path.name}: {error}") from None
    if c.phi_abi() != _ABI:
        raise OpsUnavailable(f"{path.name} was compiled from other sources")
    wanted = os.environ.get(ISA_VARIABLE, "") if isa is None else isa
    found = c.phi_isa(wanted.encode())
    if found is None:
        raise OpsUnavailable(f"this CPU or this build has no {wanted} kernels")
    ops = Ops(c, found.decode())
    problem = _self_test(ops)
    if problem:
        raise OpsUnavailable(problem)
    return ops


def problem() -> str | None:
    """Why the compiled kernels cannot be used, or None."""
    try:
        load()
    except OpsUnavailable as error:
        return str(error)
    return None


def linear(
    ops: Ops,
    weight: NDArray[Any],
    scale: NDArray[Any],
    n: int,
    x: NDArray[np.int16] | NDArray[np.int8],
    x_scale: NDArray[np.float32],
    group_sums: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """One linear layer on the caller's thread: float32 [m, n]. For tests and the check at start.

    Packed int8 weights with x int16 [m, k32] and x_scale [m], or with x int8 and x_scale [m, k32 / 32]; or int4 weights
    with x int8, x_scale and group_sums (scale times sum), both [m, k32 / 32].
    """
    y = np.zeros((len(x), n), np.float32)
    ordered = in_order_of(ops, x)
    offsets = -128 * x.reshape(len(x), x.shape[1] // 32, 32).sum(-1, dtype=np.int32)
    arguments = LinearArgsC(
        weight.ctypes.data,
        scale.ctypes.data,
        n,
        x.shape[1],
        ordered.ctypes.data,
        x_scale.ctypes.data,
        None if group_sums is None else group_sums.ctypes.data,
        offsets.ctypes.data,
        len(x),
        y.ctypes.data,
        n,
        False,
    )
    kind = LINEAR_KINDS[str(weight.dtype), str(x.dtype)]
    ops.c.phi_linear(ops.isa.encode(), kind, ctypes.byref(arguments))
    return y


def in_order_of(ops: Ops, x: NDArray[Any]) -> NDArray[Any]:
    """Rounded rows [m, k32] as the kernels keep them: int16 numbers as two planes of int8 for AMX (linear_amx.h)."""
    if ops.isa != "amx" or x.dtype != np.int16:
        return x
    bytes_ = (x + np.int16(128)).view(np.uint8).reshape(len(x), x.shape[1] // 4, 2, 2, 2)
    planes = np.ascontiguousarray(bytes_.transpose(0, 4, 1, 3, 2)[:, ::-1]).reshape(len(x), 2, x.shape[1])
    planes[:, 1] ^= 128
    return planes.reshape(len(x), 2 * x.shape[1]).view(np.int16)


def out_of_order_of(ops: Ops, x: NDArray[Any]) -> NDArray[Any]:
    """The inverse of `in_order_of`."""
    if ops.isa != "amx" or x.dtype != np.int16:
        return x
    planes = x.view(np.uint8).reshape(len(x), 2, x.shape[1]).copy()
    planes[:, 1] ^= 128
    bytes_ = planes.reshape(len(x), 2, x.shape[1] // 4, 2, 2)[:, ::-1].transpose(0, 2, 4, 3, 1)
    return np.ascontiguousarray(bytes_).reshape(len(x), 2 * x.shape[1]).view(np.int16) - np.int16(128)


def sample(ops: Ops, rows: NDArray[np.void]) -> None:
    """Draws a token for each of `rows` (sampler.ROW) on the caller's thread. For tests."""
    ops.c.phi_sample(ops.isa.encode(), rows.ctypes.data, len(rows))


def _declare(c: ctypes.CDLL) -> None:
    c.phi_abi.restype = ctypes.c_int
    c.phi_isa.restype = ctypes.c_char_p
    c.phi_isa.argtypes = [ctypes.c_char_p]
    c.phi_network_create.restype = ctypes.c_void_p
    c.phi_network_create.argtypes = [ctypes.POINTER(NetworkC), ctypes.c_char_p, ctypes.c_int]
    c.phi_network_destroy.restype = None
    c.phi_network_destroy.argtypes = [ctypes.c_void_p]
    c.phi_network_forward.restype = ctypes.c_int
    c.phi_network_forward.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    c.phi_network_progress.restype = ctypes.c_uint64
    c.phi_network_progress.argtypes = [ctypes.c_void_p]
    c.phi_network_sample.restype = None
    c.phi_network_sample.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    c.phi_sample.restype = None
    c.phi_sample.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int]
    c.phi_linear.restype = None
    c.phi_linear.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.POINTER(LinearArgsC)]


def _self_test(ops: Ops) -> str | None:
    """Compares linear layers with the same in plain C++, bit by bit: a CPU, a compiler or a hypervisor that does not
    do what it should is found before it computes anybody's answer.
    """
    random = np.random.default_rng(0)
    layers = {
        "int8": _int8_layer(random),
        "int4": _int4_layer(random),
        "int8 in groups": _int8_layer(random, groups=True),
    }
    for name, layer in layers.items():
        if linear(ops, *layer).tobytes() != linear(Ops(ops.c, "plain"), *layer).tobytes():
            return f"self-test: the {ops.isa} kernels do not compute what plain C++ computes ({name})"
    return None


def _int8_layer(random: np.random.Generator, groups: bool = False) -> tuple[Any, ...]:
    """Arguments of `linear`; with groups' scales all sums are exact in any order."""
    n, k, m = _TESTED_SHAPE
    weight = random.integers(-127, 128, (n // 16, k // 4, 16, 4), np.int8)
    scale = random.random(n, np.float32)
    largest, number = (127, np.int8) if groups else (LARGEST_INT16, np.int16)
    x = random.integers(-largest, largest + 1, (m, k), number)
    # The largest sums there can be.
    weight[0, :, 0], x[0] = 127, largest
    return weight, scale, n, x, np.ones((m, k // 32), np.float32) if groups else random.random(m, np.float32)


def _int4_layer(random: np.random.Generator) -> tuple[Any, ...]:
    """Arguments of `linear`; scales are 1 and minima whole numbers, so that all sums are exact in any order."""
    n, k, m = _TESTED_SHAPE
    weight = random.integers(0, 256, (n // 16, k // 8, 16, 4), np.uint8)
    scale = np.ones((n // 16, k // 32, 2, 16), np.float16)
    scale[:, :, 1] = random.integers(-4, 5, (n // 16, k // 32, 16))
    x = random.integers(-127, 128, (m, k), np.int8)
    # The largest sums there can be.
    weight[0, :, 0], x[0] = 255, 127
    group_sums = x.reshape(m, k // 32, 32).sum(-1, dtype=np.int32).astype(np.float32)
    return weight, scale, n, x, np.ones((m, k // 32), np.float32), group_sums
