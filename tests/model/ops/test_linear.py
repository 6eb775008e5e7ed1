"""The compiled linear layers against torch: int8 bit by bit, int4 and rows in groups to within float32's rounding."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from phi_cluster.model.ops import library, reference
from phi_cluster.model.ops.library import LARGEST_INT16, LinearArgsC, Ops
from phi_cluster.model.quantize import dequantize_int4, int4_shapes, int8_shapes, quantize_int4

# Outputs and inputs: panels of 16 and groups of 32 that are full and that are not, and more inputs than sums are exact
# for.
SHAPES = [(1, 1), (16, 32), (17, 40), (5, 33), (33, 96), (48, 512), (7, 513), (20, 1056), (100, 544), (40, 2144)]
FLOAT32 = 2.0**-24


def available() -> list[Ops]:
    found = []
    for isa in ("amx", "avx512_vnni", "avx512", "avx2", "plain"):
        with suppress(library.OpsUnavailable):
            found.append(library.load(isa))
    return found


NONE = pytest.param(None, marks=pytest.mark.skip(reason=f"no kernels: {library.problem()}"))


@pytest.fixture(params=available() or [NONE], ids=lambda ops: ops and ops.isa)
def ops(request: pytest.FixtureRequest) -> Ops:
    return request.param


@dataclass
class Layer:
    """Packed weights of n outputs and k inputs, and m rounded rows for them."""

    n: int
    weight: Tensor
    scale: Tensor
    x: Tensor
    x_scale: Tensor
    group_sums: Tensor | None = None

    def __call__(self, ops: Ops, rows: slice | list[int] = slice(None)) -> Tensor:
        """float32 [m, n]"""
        x, x_scale = self.x[rows].contiguous(), self.x_scale[rows].contiguous()
        sums = None if self.group_sums is None else self.group_sums[rows].contiguous().numpy()
        y = library.linear(ops, self.weight.numpy(), self.scale.numpy(), self.n, x.numpy(), x_scale.numpy(), sums)
        return torch.from_numpy(y)

    def expected(self) -> Tensor:
        kind = self.weight.dtype, self.x.dtype
        compute = {
            (torch.int8, torch.int16): reference.linear_int8,
            (torch.int8, torch.int8): reference.linear_int8_groups,
            (torch.uint8, torch.int8): reference.linear_int4,
        }[kind]
        return compute(self.weight, self.scale, self.n, self.x, self.x_scale)


def ceil32(k: int) -> int:
    return -(-k // 32) * 32


def fours(k: int) -> list[int]:
    """The order in which int8 weights' inputs lie."""
    return [4 * (i // 4) + (0, 2, 1, 3)[i % 4] for i in range(k)]


def int8_layer(n: int, k: int, m: int, seed: int = 0) -> Layer:
    """Numbers up to the largest, padding zero as quantize.py leaves it."""
    generator = torch.Generator().manual_seed(seed + n * k)
    shape, scale_shape = int8_shapes(n, k)
    q = torch.zeros(shape[0] * 16, ceil32(k), dtype=torch.int8)
    q[:n, :k] = torch.randint(-127, 128, (n, k), generator=generator)
    weight = q[:, fours(ceil32(k))].view(-1, 16, ceil32(k) // 4, 4).transpose(1, 2).contiguous()
    scale = torch.zeros(scale_shape)
    scale[:n] = torch.rand(n, generator=generator) * 0.01
    x = torch.zeros(m, ceil32(k), dtype=torch.int16)
    x[:, :k] = torch.randint(-LARGEST_INT16, LARGEST_INT16 + 1, (m, k), generator=generator)
    return Layer(n, weight, scale, x, torch.rand(m, generator=generator) * 1e-3)


def int8_groups_layer(n: int, k: int, m: int, seed: int = 0) -> Layer:
    """int8 weights, and rows with a scale of its own for each group."""
    layer = int8_layer(n, k, m, seed)
    generator = torch.Generator().manual_seed(seed + n + k)
    layer.x = layer.x.remainder(255).sub(127).mul(torch.arange(ceil32(k)) < k).char()
    layer.x_scale = torch.rand(m, ceil32(k) // 32, generator=generator) * 1e-3
    return layer


def int4_layer(n: int, k: int, m: int, seed: int = 0) -> Layer:
    """Weights as they come out of a checkpoint, rows with a scale of its own for each group."""
    generator = torch.Generator().manual_seed(seed + n * k)
    weight, scale = quantize_int4(torch.randn(n, k, generator=generator) * 0.05)
    assert tuple(weight.shape) == int4_shapes(n, k)[0]
    rows = torch.zeros(m, ceil32(k))
    rows[:, :k] = torch.randn(m, k, generator=generator) * torch.rand(m, k, generator=generator).exp()
    return Layer(n, weight, scale, *reference.round_groups(rows))


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert torch.equal(actual.view(torch.int32), expected.view(torch.int32))


def assert_near(actual: Tensor, layer: Layer) -> None:
    """Within the rounding of a sum of so many float32 numbers, and 1e-5 of the numbers' size."""
    values = dequantize_int4(layer.weight, layer.scale, layer.n, layer.x.shape[1]).double()
    # d * q and m apart, because they are summed apart.
    d, m = (layer.scale[:, :, i].abs().double().transpose(1, 2).reshape(-1, layer.scale.shape[1]) for i in (0, 1))
    sizes = (15 * d + m)[: layer.n].repeat_interleave(32, 1)
    assert (values.abs() <= sizes + 1e-6).all()
    rows = layer.x.double().abs() * layer.x_scale.double().repeat_interleave(32, 1)
    allowed = rows @ sizes.T * (layer.scale.shape[1] + 4) * FLOAT32
    difference = (actual.double() - layer.expected()).abs()
    assert (difference <= allowed).all()
    assert difference.norm() <= 1e-5 * layer.expected().norm()


# int8.


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("m", [1, 2, 5, 6, 7, 13, 17, 33])
def test_int8_gives_the_bits_of_the_reference(ops, n, k, m):
    layer = int8_layer(n, k, m)
    assert_same_bits(layer(ops), layer.expected())


@pytest.mark.parametrize(("n", "k"), [(19, 70), (40, 600)])
def test_int8_of_any_number_of_rows(ops, n, k):
    layer = int8_layer(n, k, 40)
    expected = layer.expected()
    for m in range(1, 41):
        assert_same_bits(layer(ops, slice(m)), expected[:m])


@pytest.mark.parametrize("sign", [1, -1])
def test_int8_does_not_overflow(ops, sign):
    """The largest products there are, all of one sign, 8192 of them."""
    layer = int8_layer(32, 8192, 7)
    layer.weight.fill_(127)
    layer.x.fill_(LARGEST_INT16 * sign)
    layer.scale.fill_(1)
    layer.x_scale.fill_(1)
    actual = layer(ops)
    assert_same_bits(actual, layer.expected())
    assert torch.allclose(actual, torch.tensor(sign * 127.0 * LARGEST_INT16 * 8192))


@pytest.mark.parametrize("k", [512, 1024])
def test_int8_sums_are_exact_within_1024_inputs(ops, k):
    """Where float32 would lose the small number between two large ones."""
    layer = int8_layer(16, k, 1)
    layer.weight.fill_(127)
    layer.x.zero_()
    layer.x[0, [0, 1, -1]] = torch.tensor([LARGEST_INT16, 1, -LARGEST_INT16], dtype=torch.int16)
    assert_same_bits(layer(ops), torch.full((1, 16), 127.0) * layer.scale * layer.x_scale)


# int4.


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("m", [1, 3, 4, 5, 11])
def test_int4_is_near_float64(ops, n, k, m):
    layer = int4_layer(n, k, m)
    assert_near(layer(ops), layer)


def test_int4_with_8192_inputs(ops):
    layer = int4_layer(16, 8192, 5)
    assert_near(layer(ops), layer)


@pytest.mark.parametrize("sign", [1, -1])
def test_int4_does_not_overflow(ops, sign):
    layer = int4_layer(32, 8192, 5)
    layer.weight.fill_(0xFF)
    layer.scale[:, :, 0], layer.scale[:, :, 1] = 1, 0
    layer.x.fill_(127 * sign)
    layer.x_scale.fill_(1)
    layer.group_sums = layer.x.view(5, -1, 32).sum(-1).float()
    assert (layer(ops) == sign * 15.0 * 127 * 8192).all()


def test_int4_with_scales_among_float16s_extremes(ops):
    """Subnormal numbers, the largest, and both signs."""
    layer = int4_layer(16, 64, 4)
    smallest, largest = 2.0**-24, 65504.0
    layer.scale[0, :, 0] = torch.tensor([smallest, 3 * smallest, 2.0**-15, largest]).repeat(4)
    layer.scale[0, :, 1] = torch.tensor([-smallest, largest, -largest, 0.0]).repeat_interleave(4)
    assert_near(layer(ops), layer)


# int8 rows in groups.


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("m", [1, 2, 5, 12, 13, 17, 33])
def test_int8_groups_give_the_bits_of_the_reference(ops, n, k, m):
    layer = int8_groups_layer(n, k, m)
    if ops.isa == "plain":
        # It rounds a fused multiply and add twice.
        torch.testing.assert_close(layer(ops), layer.expected(), rtol=1e-5, atol=1e-6)
    else:
        assert_same_bits(layer(ops), layer.expected())


@pytest.mark.parametrize("weight", [127, -127])
@pytest.mark.parametrize("sign", [1, -1])
def test_int8_groups_do_not_overflow(ops, weight, sign):
    layer = int8_groups_layer(32, 8192, 13)
    layer.weight.fill_(weight)
    layer.x.fill_(127 * sign)
    layer.scale.fill_(1)
    layer.x_scale.fill_(1)
    assert (layer(ops) == sign * weight * 127.0 * 8192).all()


# All.


@pytest.mark.parametrize(("n", "k"), [(19, 70), (40, 600)])
@pytest.mark.parametrize("make", [int4_layer, int8_groups_layer])
def test_bits_of_groups_depend_on_nothing_but_the_row(ops, make, n, k):
    layer = make(n, k, 40)
    together = layer(ops)
    for m in range(1, 41):
        assert_same_bits(layer(ops, slice(m)), together[:m])
        assert_same_bits(layer(ops, slice(40 - m, None)), together[40 - m :])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1)).tolist()
    assert_same_bits(layer(ops, order), together[order])
    assert_same_bits(layer(ops, [3] * 9), together[[3] * 9])


@pytest.mark.parametrize("make", [int8_layer, int4_layer, int8_groups_layer])
def test_instruction_sets_agree(ops, make):
    layer = make(37, 200, 9)
    if make is int8_layer or ops.isa.startswith(("avx512", "amx")):
        assert_same_bits(layer(ops), layer(library.load("plain" if make is int8_layer else "avx2")))
    else:
        # Plain C++ rounds a fused multiply and add twice.
        torch.testing.assert_close(layer(ops), layer(library.load("plain")), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [int8_layer, int4_layer, int8_groups_layer])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_spoils_only_itself(ops, make, wrong):
    layer = make(40, 70, 11)
    expected = layer(ops)
    layer.x_scale[4] = wrong
    if layer.group_sums is not None:
        layer.group_sums[4] = wrong
    actual = layer(ops)
    assert not actual[4].isfinite().any()
    others = [row for row in range(11) if row != 4]
    assert_same_bits(actual[others], expected[others])


@pytest.mark.parametrize("make", [int8_layer, int4_layer, int8_groups_layer])
@pytest.mark.parametrize("n", [16, 19, 1])
def test_outputs_are_added_to_and_nothing_beside_them_is_written(ops, make, n):
    m, ld_y = 9, n + 5
    layer = make(n, 70, m)
    product = layer(ops)
    x = library.in_order_of(ops, layer.x.numpy())
    offsets = -128 * layer.x.unflatten(1, (-1, 32)).sum(-1, dtype=torch.int32)
    kind = {int8_layer: 0, int4_layer: 1, int8_groups_layer: 2}[make]
    before = torch.randn(m + 1, ld_y, generator=torch.Generator().manual_seed(n))
    for add in (False, True):
        y = before.clone()
        arguments = LinearArgsC(
            weight=layer.weight.data_ptr(),
            scale=layer.scale.data_ptr(),
            n=n,
            k32=layer.x.shape[1],
            x=x.ctypes.data,
            x_scale=layer.x_scale.data_ptr(),
            group_sums=None if layer.group_sums is None else layer.group_sums.data_ptr(),
            offsets=offsets.data_ptr(),
            m=m,
            y=y.data_ptr(),
            ld_y=ld_y,
            add=add,
        )
        ops.c.phi_linear(ops.isa.encode(), kind, ctypes.byref(arguments))
        assert_same_bits(y[:m, :n].contiguous(), before[:m, :n] + product if add else product)
        assert torch.equal(y[:m, n:], before[:m, n:])
        assert torch.equal(y[m], before[m])


def test_no_rows_are_no_work(ops):
    layer = int8_layer(16, 32, 1)
    y = library.linear(
        ops,
        layer.weight.numpy(),
        layer.scale.numpy(),
        16,
        np.empty((0, 32), np.int16),
        np.empty(0, np.float32),
    )
    assert y.shape == (0, 16)
