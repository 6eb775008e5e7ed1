"""The compiled row kernels against torch: rounding bit by bit, norm and activation to within float32; strange rows."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import Tensor

from phi_cluster.model.ops import library, reference, single_kernels
from phi_cluster.model.ops.library import LARGEST_INT16, Ops
from phi_cluster.model.ops.single_kernels import QuantizedRows

NAN, INF = float("nan"), float("inf")
# Vectors of 16 and groups of 32 that are full and that are not.
WIDTHS = [1, 16, 31, 32, 40, 64, 72, 200]
EPS = 1e-5


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


@pytest.fixture(params=[False, True], ids=["row", "groups"])
def groups(request: pytest.FixtureRequest) -> bool:
    return request.param


def random_rows(m: int, k: int) -> Tensor:
    """Of very different sizes, from one row to the next and within a row."""
    generator = torch.Generator().manual_seed(m * k)
    rows = torch.randn(m, k, generator=generator) * torch.randn(m, k, generator=generator).exp()
    return rows * torch.logspace(-25, 25, m)[:, None]


def padded(rows: Tensor) -> Tensor:
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % 32))


def values(rows: QuantizedRows) -> Tensor:
    """float64 [m, k32]: the numbers that rounded rows stand for."""
    return torch.from_numpy(rows.x).double() * steps(rows)


def steps(rows: QuantizedRows) -> Tensor:
    """float64 [m, k32]: the distance from one whole number to the next."""
    scale = torch.from_numpy(rows.scale).double()
    return scale.repeat_interleave(32, 1) if rows.group_sums is not None else scale[:, None]


def assert_rounded(actual: QuantizedRows, exact: Tensor) -> None:
    """Half a step from float64 [m, k], and what float32 loses."""
    exact = padded(exact)
    difference = (values(actual) - exact).abs()
    assert (difference <= 0.5001 * steps(actual) + 1e-6 * exact.abs() + 1e-30).all()
    # The largest number is the largest integer.
    in_groups = actual.group_sums is not None
    largest = torch.from_numpy(actual.x).int().abs()
    largest = largest.unflatten(1, (-1, 32)).amax(-1) if in_groups else largest.amax(1)
    assert (largest == (127 if in_groups else LARGEST_INT16)).logical_or(torch.from_numpy(actual.scale) == 0).all()
    if actual.group_sums is not None:
        sums = torch.from_numpy(actual.x).float().unflatten(1, (-1, 32)).sum(-1)
        assert_same_bits(torch.from_numpy(actual.group_sums), sums * torch.from_numpy(actual.scale))


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert torch.equal(actual.view(torch.int32), expected.view(torch.int32))


def assert_is_reference(actual: QuantizedRows, rows: Tensor) -> None:
    """Every bit."""
    if actual.group_sums is None:
        x, scale = reference.round_rows(padded(rows))
    else:
        x, scale, sums = reference.round_groups(padded(rows))
        assert_same_bits(torch.from_numpy(actual.group_sums), sums)
        assert actual.offsets is not None
        assert torch.equal(torch.from_numpy(actual.offsets), -128 * x.unflatten(1, (-1, 32)).sum(-1, dtype=torch.int32))
    assert torch.equal(torch.from_numpy(actual.x), x)
    assert_same_bits(torch.from_numpy(actual.scale), scale)


# Rounding.


@pytest.mark.parametrize("k", WIDTHS)
def test_rounding_gives_the_bits_of_the_reference(ops, groups, k):
    rows = random_rows(200, k)
    actual = single_kernels.copy_quantize(ops, rows.numpy(), groups)
    assert_is_reference(actual, rows)
    assert_rounded(actual, rows.double())


def test_ties_go_to_the_even_number(ops, groups):
    limit = 127 if groups else LARGEST_INT16
    row = torch.tensor([limit, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49999997, -limit, 100.5])
    x = single_kernels.copy_quantize(ops, row[None].numpy(), groups).x[0, :10]
    assert x.tolist() == [limit, 0, 2, 2, 0, -2, -2, 0, -limit, 100]


def test_the_largest_never_becomes_more_than_the_limit(ops, groups):
    """Its inverse is rounded, and so is the product."""
    rows = (1 + torch.arange(4000) * 2.0**-12)[:, None] * torch.tensor([1.0, -1.0])
    actual = single_kernels.copy_quantize(ops, rows.numpy(), groups)
    limit = 127 if groups else LARGEST_INT16
    assert (actual.x[:, 0] == limit).all()
    assert (actual.x[:, 1] == -limit).all()
    assert_is_reference(actual, rows)


@pytest.mark.parametrize("largest", [0.0, -0.0, 1e-45, 1e-39, 9e-31, 1.1e-30, 1e-20, 3e38, 3.4028234e38])
def test_sizes_at_the_ends_of_float32(ops, groups, largest):
    rows = torch.tensor([[largest, -largest / 2, 0.0], [1.0, 2.0, 3.0]])
    actual = single_kernels.copy_quantize(ops, rows.numpy(), groups)
    assert_is_reference(actual, rows)
    if largest < 1e-30:
        assert not actual.x[0].any()
        assert not actual.scale[0].any()
    else:
        assert_rounded(actual, rows.double())


@pytest.mark.parametrize("strange", [NAN, -NAN, INF, -INF])
@pytest.mark.parametrize("place", [0, 15, 33, 69])
def test_a_number_that_is_none_spoils_its_own_row(ops, groups, strange, place):
    rows = random_rows(5, 70)
    clean = single_kernels.copy_quantize(ops, rows.numpy(), groups)
    rows[2, place] = strange
    actual = single_kernels.copy_quantize(ops, rows.numpy(), groups)
    spoilt = torch.from_numpy(actual.scale).isnan()
    expected = torch.zeros_like(spoilt)
    if groups:
        # The linear layer adds all groups up.
        expected[2, place // 32] = True
        assert torch.equal(torch.from_numpy(actual.group_sums).isnan(), expected)
    else:
        expected[2] = True
    assert torch.equal(spoilt, expected)
    for row in (0, 1, 3, 4):
        assert (actual.x[row] == clean.x[row]).all()
        assert (actual.scale[row] == clean.scale[row]).all()


# Norm.


@pytest.mark.parametrize("k", WIDTHS)
def test_norm(ops, groups, k):
    rows = random_rows(40, k).clamp(-1e15, 1e15)
    weight = 1 + torch.randn(k, generator=torch.Generator().manual_seed(k))
    actual = single_kernels.norm_quantize(ops, rows.numpy(), weight.numpy(), EPS, groups)
    assert_rounded(actual, reference.rms_norm(rows, weight, EPS))


def test_norm_of_zeros_and_of_tiny_numbers(ops, groups):
    rows = torch.tensor([[0.0] * 40, [1e-45] * 40, [1e-20] * 40])
    actual = single_kernels.norm_quantize(ops, rows.numpy(), torch.ones(40).numpy(), EPS, groups)
    assert not actual.x[:2].any()
    assert not actual.scale[:2].any()
    assert_rounded(actual, reference.rms_norm(rows, torch.ones(40), EPS))


@pytest.mark.parametrize("strange", [NAN, INF, -INF])
def test_norm_of_a_number_that_is_none(ops, groups, strange):
    rows = random_rows(3, 70).clamp(-1e15, 1e15)
    weight = torch.ones(70)
    clean = single_kernels.norm_quantize(ops, rows.numpy(), weight.numpy(), EPS, groups)
    rows[1, 50] = strange
    actual = single_kernels.norm_quantize(ops, rows.numpy(), weight.numpy(), EPS, groups)
    spoilt = torch.from_numpy(actual.scale).isnan()
    assert spoilt[1].any()
    assert not spoilt[[0, 2]].any()
    for row in (0, 2):
        assert (actual.x[row] == clean.x[row]).all()
        assert (actual.scale[row] == clean.scale[row]).all()


# Activation.


@pytest.mark.parametrize("k", WIDTHS)
def test_silu_mul(ops, groups, k):
    generator = torch.Generator().manual_seed(k)
    gate = torch.randn(60, k, generator=generator) * torch.logspace(-6, 2, 60)[:, None]
    up = torch.randn(60, k, generator=generator) * torch.logspace(6, -6, 60)[:, None]
    gate_up = torch.cat([gate, up], 1)
    actual = single_kernels.silu_mul_quantize(ops, gate_up.numpy(), groups)
    assert_rounded(actual, reference.silu_mul(gate_up))


def test_silu_mul_of_large_and_small_gates(ops, groups):
    gate = torch.tensor([-1e30, -1e4, -100.0, -88.0, -20.0, -1e-30, 0.0, 1e-30, 20.0, 88.0, 100.0, 1e4])
    for i in range(len(gate)):
        # One number a row: each with a scale of its own.
        gate_up = torch.tensor([[float(gate[i]), 1.5]])
        actual = single_kernels.silu_mul_quantize(ops, gate_up.numpy(), groups)
        exact = reference.silu_mul(gate_up)
        # The exponential ends at 2^127.
        assert abs(float(values(actual)[0, 0] - exact[0, 0])) <= 2e-6 * abs(float(exact[0, 0])) + 1e-7


@pytest.mark.parametrize("strange", [NAN, INF, -INF])
@pytest.mark.parametrize("place", [0, 41, 50, 91])
def test_silu_mul_of_a_number_that_is_none(ops, groups, strange, place):
    """Among the gates (the first 50) or the ups."""
    gate_up = torch.ones(3, 100)
    clean = single_kernels.silu_mul_quantize(ops, gate_up.numpy(), groups)
    gate_up[1, place] = strange
    actual = single_kernels.silu_mul_quantize(ops, gate_up.numpy(), groups)
    spoilt = torch.from_numpy(actual.scale).isnan()
    assert spoilt[1].any()
    assert not spoilt[[0, 2]].any()
    assert (actual.x[[0, 2]] == clean.x[[0, 2]]).all()


# Rotation and embedding.


@pytest.mark.parametrize(
    ("head_dim", "half"), [(2, 1), (10, 5), (16, 8), (32, 16), (34, 17), (64, 24), (96, 48), (80, 15)]
)
def test_rotation_gives_the_bits_of_the_reference(ops, head_dim, half):
    generator = torch.Generator().manual_seed(head_dim)
    heads = torch.randn(5, head_dim, generator=generator)
    angles = torch.rand(half, generator=generator) * 100
    cos, sin = angles.cos() * 1.2, angles.sin() * 1.2
    turned = torch.from_numpy(single_kernels.rotate_heads(ops, heads.numpy(), cos.numpy(), sin.numpy()))
    assert_same_bits(turned, reference.rotate(heads, cos, sin))
    # What rotates neither loses nor gains length.
    rotated = 2 * half
    torch.testing.assert_close(turned[:, :rotated].norm(dim=1), 1.2 * heads[:, :rotated].norm(dim=1))
    assert torch.equal(turned[:, rotated:], heads[:, rotated:])


@pytest.mark.parametrize("k", [1, 15, 16, 17, 40, 100])
def test_a_bfloat16_row_keeps_all_its_bits(ops, k):
    bits = torch.randint(-(2**15), 2**15, (k,), generator=torch.Generator().manual_seed(k), dtype=torch.int16)
    wide = torch.from_numpy(single_kernels.widen_row(ops, bits.numpy().view("uint16")))
    assert_same_bits(wide, (bits.int() << 16).view(torch.float32))
