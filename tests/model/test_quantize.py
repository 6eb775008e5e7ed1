"""Packed weights: each byte where the format says, and how near the numbers stay to the originals."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize

from phi_cluster.model import quantize as quantize_module
from phi_cluster.model.quantize import (
    dequantize_int4,
    dequantize_int8,
    int4_shapes,
    int8_shapes,
    quantize_int4,
    quantize_int8,
)

# No multiples of a panel (16) or a group (32); one with, one without whole groups.
SHAPES = [(17, 40), (16, 32), (1, 7), (33, 96)]


def random_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())


def grid(rows: int, groups: int, least: int, most: int, seed: int = 0) -> torch.Tensor:
    """Numbers q * d + m with q in [least, most], d and m float16, as Q4_1's are."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(least, most + 1, (rows, groups, 32), generator=generator)
    d = (torch.rand(rows, groups, 1, generator=generator) * 0.1 + 1e-4).half().float()
    m = (-20 * torch.rand(rows, groups, 1, generator=generator) * d).half().float()
    return (q * d + m).flatten(1)


# Formats.


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_int8_lies_where_the_format_says(rows, columns):
    weight = random_weight(rows, columns)
    packed, scale = quantize_int8(weight)
    panels, padded = -(-rows // 16), -(-columns // 32) * 32
    assert (packed.dtype, tuple(packed.shape)) == (torch.int8, (panels, padded // 4, 16, 4))
    assert (scale.dtype, tuple(scale.shape)) == (torch.float32, (panels * 16,))
    assert (tuple(packed.shape), tuple(scale.shape)) == int8_shapes(rows, columns)
    for n in range(panels * 16):
        expected_scale = np.float32(weight[n].abs().max()) / np.float32(127) if n < rows else 0
        assert float(scale[n]) == expected_scale
        for k in range(padded):
            q = int(packed[n // 16, k // 4, n % 16, (0, 2, 1, 3)[k % 4]])
            inside = n < rows and k < columns
            assert q == (int(np.rint(np.float32(weight[n, k]) / expected_scale)) if inside else 0)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_int4_lies_where_the_format_says(rows, columns):
    weight = random_weight(rows, columns)
    packed, scale = quantize_int4(weight)
    panels, padded = -(-rows // 16), -(-columns // 32) * 32
    assert (packed.dtype, tuple(packed.shape)) == (torch.uint8, (panels, padded // 8, 16, 4))
    assert (scale.dtype, tuple(scale.shape)) == (torch.float16, (panels, padded // 32, 2, 16))
    assert (tuple(packed.shape), tuple(scale.shape)) == int4_shapes(rows, columns)
    for n in range(panels * 16):
        for k in range(padded):
            d, m = (np.float32(scale[n // 16, k // 32, i, n % 16]) for i in (0, 1))
            both = int(packed[n // 16, k // 8, n % 16, k % 4])
            q = both >> 4 if k % 8 >= 4 else both & 15
            if n >= rows:
                assert (d, m, q) == (0, 0, 0)
            elif k >= columns:
                assert q == 0
            else:
                # Of the rounded d and m.
                assert q == np.clip(np.rint((np.float32(weight[n, k]) - m) / d), 0, 15)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_way_back(rows, columns):
    weight = random_weight(rows, columns)
    ours = dequantize_int8(*quantize_int8(weight), rows, columns)
    assert (ours.dtype, ours.shape) == (torch.float32, weight.shape)
    # Half a step of its row.
    assert ((ours - weight).abs() <= weight.abs().amax(1, keepdim=True) / 253).all()
    ours = dequantize_int4(*quantize_int4(weight), rows, columns)
    assert (ours.dtype, ours.shape) == (torch.float32, weight.shape)
    assert relative_error(ours, weight) < 0.1
    packed, scale = quantize_int4(weight)
    d, m = float(scale[0, 0, 0, 0]), float(scale[0, 0, 1, 0])
    assert ours[0, 4 if columns > 4 else 0] == np.float32((int(packed[0, 0, 0, 0]) >> 4) * d) + np.float32(m)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_checkpoints_dtypes_are_read_as_they_are(dtype):
    weight = random_weight(20, 64).to(dtype)
    for quantise in (quantize_int8, quantize_int4):
        for ours, same in zip(quantise(weight), quantise(weight.float()), strict=True):
            assert torch.equal(ours, same)


def test_views_are_written_into_and_the_weight_is_left_alone():
    weight = random_weight(40, 64)
    before = weight.clone()
    for quantise in (quantize_int8, quantize_int4):
        expected = quantise(weight)
        out = tuple(torch.full_like(one, 77) for one in expected)
        assert quantise(weight, out=out) is not expected
        assert all(torch.equal(*pair) for pair in zip(out, expected, strict=True))
    assert torch.equal(weight, before)


# What is kept of the numbers.


def test_int8_extremes():
    weight = torch.tensor([[0.0, 0.0], [1.0, -1.0], [-3e38, 1e38], [1e-45, 0.0], [1e-39, -1e-39], [0.3, 0.001]])
    packed, scale = quantize_int8(weight)
    back = dequantize_int8(packed, scale, *weight.shape)
    assert packed[0, 0, :3].tolist() == [[0, 0, 0, 0], [127, 0, -127, 0], [-127, 0, 42, 0]]
    assert torch.isfinite(back).all()
    assert float(scale[0]) == 0
    assert torch.allclose(back[[1, 2, 5]], weight[[1, 2, 5]], rtol=0.01, atol=0.002)


def test_q4_1_is_held_as_it_is():
    """Of the gguf package's own blocks: the same d, m and q."""
    weight = random_weight(32, 96).numpy()
    blocks = quantize(weight, gguf.GGMLQuantizationType.Q4_1)
    exact = torch.from_numpy(dequantize(blocks, gguf.GGMLQuantizationType.Q4_1))
    packed, scale = quantize_int4(exact)
    assert torch.equal(dequantize_int4(packed, scale, 32, 96), exact)
    for n, g in ((0, 0), (31, 2), (17, 1)):
        block = blocks[n, 20 * g : 20 * (g + 1)]
        assert scale[n // 16, g, :, n % 16].numpy().tobytes() == block[:4].tobytes()


@pytest.mark.parametrize(
    ("least", "most"), [(0, 15), (0, 14), (1, 15), (3, 9), (6, 8), (0, 1), (14, 15), (7, 7), (9, 15)]
)
def test_a_grid_is_held_without_loss(least, most):
    """Also where no number of a group, or of all groups, has the least or the largest q."""
    exact = grid(16, 6, least, most)
    assert torch.equal(dequantize_int4(*quantize_int4(exact), *exact.shape), exact)


def test_grids_among_other_numbers_are_held_without_loss():
    exact = grid(48, 8, 2, 13)
    exact[:, 64:] = random_weight(48, exact.shape[1] - 64)
    ours = dequantize_int4(*quantize_int4(exact), *exact.shape)
    assert torch.equal(ours[:, :64], exact[:, :64])
    assert relative_error(ours, exact) < 0.1


@pytest.mark.parametrize(("least", "most"), [(0, 15), (2, 13), (3, 9)])
def test_a_grid_that_was_rounded_to_bfloat16_is_found_to_within_that(least, most):
    exact = grid(20, 6, least, most)
    rounded = exact.bfloat16().float()
    ours = dequantize_int4(*quantize_int4(rounded), *exact.shape)
    # All numbers together tell more of d and m than each lost.
    assert relative_error(ours, exact) < relative_error(rounded, exact) < 0.003


def test_groups_of_one_number():
    weight = torch.tensor([0.1, 0.0, -60000.0, -0.123456789, 65504.0, -65504.0, 1e-9])[:, None].expand(-1, 32)
    packed, scale = quantize_int4(weight)
    back = dequantize_int4(packed, scale, *weight.shape)
    assert torch.allclose(back, weight, rtol=2e-7, atol=3e-8)
    # What float16 has needs no d.
    assert not scale[0, 0, 0, [1, 2, 4, 5]].any()
    assert torch.equal(back[[1, 2, 4, 5]], weight[[1, 2, 4, 5]])


def test_small_numbers_do_not_lose_their_size():
    """d among float16's subnormal numbers."""
    weight = random_weight(16, 128) * 1e-3
    assert relative_error(dequantize_int4(*quantize_int4(weight), *weight.shape), weight) < 0.1


def test_int4_is_better_than_least_and_largest_alone():
    weight = random_weight(256, 256)
    low, high = weight.view(-1, 32).aminmax(dim=1, keepdim=True)
    d = ((high - low) / 15).half().float()
    m = low.half().float()
    plain = (((weight.view(-1, 32) - m) / d).round().clamp(0, 15) * d + m).view(weight.shape)
    ours = dequantize_int4(*quantize_int4(weight), *weight.shape)
    assert relative_error(ours, weight) < 0.96 * relative_error(plain, weight)


# What is refused, and how much is worked on at once.


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("quantise", [quantize_int8, quantize_int4])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_numbers_that_are_none_name_the_tensor(quantise, wrong, num_threads):
    weight = random_weight(40, 40)
    weight[33, 7] = wrong
    with pytest.raises(ValueError, match=r"model\.x\.weight holds numbers that are not finite"):
        quantise(weight, "model.x.weight", num_threads=num_threads)


def test_numbers_beyond_float16_name_the_tensor():
    weight = random_weight(4, 40)
    weight[1, 1] = -70000
    with pytest.raises(ValueError, match=r"a\.weight holds 70000: int4 cannot hold more than float16"):
        quantize_int4(weight, "a.weight")
    weight[1, 1] = -65504
    quantize_int4(weight)


def test_blocks_and_threads_do_not_matter_and_blocks_are_small(monkeypatch):
    weight = random_weight(100, 96)
    whole = [quantise(weight) for quantise in (quantize_int8, quantize_int4)]
    sizes = []
    fit = quantize_module._fit
    monkeypatch.setattr(quantize_module, "_fit", lambda block: sizes.append(block.numel()) or fit(block))
    monkeypatch.setattr(quantize_module, "_BLOCK_NUMBERS", 32 * 96)
    for num_threads in (1, 3):
        for quantise, expected in zip((quantize_int8, quantize_int4), whole, strict=True):
            ours = quantise(weight, num_threads=num_threads)
            assert all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))
    assert max(sizes) == 32 * 96
    assert sum(sizes) == 2 * weight.numel()
    # At least one panel, however wide.
    monkeypatch.setattr(quantize_module, "_BLOCK_NUMBERS", 1)
    assert torch.equal(quantize_int4(weight)[0], whole[1][0])
