"""The compiled attention: against float64, bit by bit against itself in other pieces, and what must not reach it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from phi_cluster.model.ops import library, reference_attention

NAN = float("nan")
KINDS = ["bfloat16", "int8"]
# Of bfloat16, to nearest.
WEIGHTS_ROUNDING = 2**-8


class AttendArgsC(ctypes.Structure):
    """attention_args.h's AttendArgs."""

    _fields_ = (
        ("qkv", ctypes.c_void_p),
        ("ld_qkv", ctypes.c_int64),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("row_nbytes", ctypes.c_int64),
        ("kv_kind", ctypes.c_int),
        ("num_heads", ctypes.c_int),
        ("num_kv_heads", ctypes.c_int),
        ("head_dim", ctypes.c_int),
        ("start", ctypes.c_int),
        ("n", ctypes.c_int),
        ("window", ctypes.c_int),
        ("scale", ctypes.c_float),
        ("out", ctypes.c_void_p),
        ("ld_out", ctypes.c_int64),
        ("partials", ctypes.c_void_p),
        ("next", ctypes.c_void_p),
    )


@functools.cache
def kernels() -> ctypes.CDLL:
    """The compiled library with its functions for tests."""
    c = library.load("plain").c
    c.phi_test_attend.restype = None
    c.phi_test_attend.argtypes = [ctypes.c_char_p, ctypes.POINTER(AttendArgsC), ctypes.c_int]
    c.phi_test_store_kv_row.restype = None
    c.phi_test_store_kv_row.argtypes = [ctypes.c_char_p, ctypes.c_void_p, *[ctypes.c_int] * 3, ctypes.c_void_p]
    return c


def available() -> list[str]:
    """The instruction sets that this CPU and the compiled library have."""
    found = []
    for isa in ("amx", "avx512_vnni", "avx512", "avx2", "plain"):
        with suppress(library.OpsUnavailable):
            found.append(library.load(isa).isa)
    return found


NONE = pytest.param("", marks=pytest.mark.skip(reason=f"no kernels: {library.problem()}"))


@pytest.fixture(params=available() or [NONE])
def isa(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True, scope="module")
def _one_torch_thread() -> Iterator[None]:
    """Many small operations: torch's threads would mostly wait for each other, all the more beside other processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Stored:
    """Random queries of all positions, and stored keys and values."""

    kind: str
    # float32 [positions, heads, head_dim]
    query: Tensor
    num_kv_heads: int
    # uint8 [positions, row_nbytes]
    keys: Tensor
    values: Tensor
    window: int = 0

    def attend(self, isa: str, start: int, n: int, num_threads: int = 1) -> Tensor:
        """float32 [n, heads, head_dim], from rows that are longer than needed and begin anywhere."""
        heads, dim = self.query.shape[1:]
        width = (heads + 2 * self.num_kv_heads) * dim
        qkv = torch.full((n, width + 3), NAN)
        qkv[:, : heads * dim] = self.query[start : start + n].flatten(1)
        out = torch.full((n, heads * dim + 5), NAN)
        arguments = AttendArgsC(
            qkv=qkv.data_ptr(),
            ld_qkv=qkv.stride(0),
            keys=self.keys.data_ptr(),
            values=self.values.data_ptr(),
            row_nbytes=self.keys.stride(0),
            kv_kind=library.KV_KINDS[self.kind],
            num_heads=heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=dim,
            start=start,
            n=n,
            window=self.window,
            scale=dim**-0.5,
            out=out.data_ptr(),
            ld_out=out.stride(0),
        )
        kernels().phi_test_attend(isa.encode(), ctypes.byref(arguments), num_threads)
        assert out[:, heads * dim :].isnan().all(), "written behind a row"
        return out[:, : heads * dim].unflatten(1, (heads, dim)).clone()

    def in_chunks(self, isa: str, start: int, sizes: Sequence[int], num_threads: int = 1) -> Tensor:
        """The same for consecutive chunks."""
        outputs = []
        for size in sizes:
            outputs.append(self.attend(isa, start, size, num_threads))
            start += size
        return torch.cat(outputs)

    def expected(self, start: int, n: int) -> tuple[Tensor, Tensor]:
        """float64 [n, heads, head_dim] each: the results, and what weights change that are rounded the other way."""
        end = start + n
        keys, values = (
            reference_attention.load_rows(rows[:end], self.num_kv_heads, self.kind) for rows in (self.keys, self.values)
        )
        results, sizes = (
            reference_attention.attend(self.query[start:end], keys, numbers, start, self.window)
            for numbers in (values, values.abs())
        )
        return results, WEIGHTS_ROUNDING * sizes


def make(kind: str, positions: int, heads: int = 3, kv_heads: int = 1, dim: int = 64, window: int = 0) -> Stored:
    generator = torch.Generator().manual_seed(positions * dim + heads)
    # Scores of all sizes: some rows of weights are nearly flat, some have one key only.
    size = 6 * torch.rand(positions, heads, 1, generator=generator)
    query = size * torch.randn(positions, heads, dim, generator=generator)
    keys, values = torch.randn(2, positions, kv_heads, dim, generator=generator)
    store = functools.partial(reference_attention.store_rows, kind=kind)
    return Stored(kind, query, kv_heads, store(keys), store(values), window)


def assert_close(actual: Tensor, expected: tuple[Tensor, Tensor]) -> None:
    results, allowed = expected
    errors = (actual - results).abs()
    assert (errors <= allowed + 2e-5).all()
    # float32 seldom brings a large weight to the other side of a boundary.
    assert errors.median() < 2e-6


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 96), (9, 3, 64), (4, 1, 128), (7, 1, 32), (2, 1, 80)])
def test_values(isa, kind, heads, kv_heads, dim):
    sequence = make(kind, 1110, heads, kv_heads, dim)
    for start, n in ((0, 1), (0, 40), (30, 1), (31, 1), (32, 1), (511, 1), (505, 20), (1100, 1), (1080, 30)):
        assert_close(sequence.attend(isa, start, n, 2), sequence.expected(start, n))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [2, 8, 20, 48, 70])
def test_any_even_head_dim(isa, kind, dim):
    sequence = make(kind, 70, 4, 2, dim)
    assert_close(sequence.attend(isa, 0, 70), sequence.expected(0, 70))
    assert_close(sequence.attend(isa, 69, 1), sequence.expected(69, 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [1, 31, 33, 100, 600])
def test_window(isa, kind, window):
    sequence = make(kind, 1110, 2, 2, 32, window)
    for start, n in ((0, 40), (100, 5), (543, 1), (1023, 2), (1060, 50)):
        assert_close(sequence.attend(isa, start, n, 2), sequence.expected(start, n))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "window"), [(3, 3, 32, 0), (6, 2, 64, 0), (4, 1, 20, 90)])
@pytest.mark.parametrize("start", [5, 500, 1050])
def test_chunks_of_any_size_give_the_same_bits(isa, kind, heads, kv_heads, dim, window, start):
    sequence = make(kind, 1110, heads, kv_heads, dim, window)
    whole = sequence.attend(isa, start, 40)
    assert_same_bits(sequence.in_chunks(isa, start, [1] * 40), whole)
    generator = torch.Generator().manual_seed(start)
    for _ in range(2):
        cuts = torch.randint(0, 41, (6,), generator=generator).sort().values
        sizes = [n for n in cuts.diff(prepend=torch.tensor([0]), append=torch.tensor([40])).tolist() if n]
        assert_same_bits(sequence.in_chunks(isa, start, sizes), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_chunk_gives_the_same_bits(isa, kind):
    # Several items of queries, and more queries than a block of keys.
    sequence = make(kind, 650, 2, 1, 32)
    assert_same_bits(sequence.attend(isa, 0, 650), sequence.in_chunks(isa, 0, [170, 1, 300, 2, 3, 4, 170]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [0, 700])
@pytest.mark.parametrize("n", [1, 3, 60])
def test_threads_and_split_super_blocks_give_the_same_bits(isa, kind, window, n):
    sequence = make(kind, 1610, 4, 2, 32, window)
    for start in (400, 1023, 1550):
        alone = sequence.attend(isa, start, n)
        for num_threads in (2, 64):
            assert_same_bits(sequence.attend(isa, start, n, num_threads), alone)


@pytest.mark.parametrize("kind", KINDS)
def test_instruction_sets_agree(isa, kind):
    sequence = make(kind, 600, 3, 1, 64)
    _, allowed = sequence.expected(560, 40)
    assert_close(sequence.attend(isa, 560, 40), (sequence.attend("plain", 560, 40), 2 * allowed))
    if isa.startswith(("avx512", "amx")):
        assert_same_bits(sequence.attend(isa, 560, 40), sequence.attend("avx2", 560, 40))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("which", ["keys", "values"])
def test_nan_spoils_only_the_queries_that_see_it(isa, kind, window, which):
    sequence = make(kind, 160, 4, 2, 32, window)
    untouched = sequence.attend(isa, 0, 160)
    rows = getattr(sequence, which)
    poison = torch.full((1, 2, 32), 1.0)
    poison[0, 1, 3] = NAN
    rows[70] = reference_attention.store_rows(poison, kind)[0]
    output = sequence.attend(isa, 0, 160)
    assert_same_bits(output[:70], untouched[:70])
    if window:
        assert_same_bits(output[70 + window :], untouched[70 + window :])
    spoilt = output[70 : 70 + window if window else None, 2:]
    # bfloat16 values: only one of the numbers is NaN.
    assert spoilt[..., 3].isnan().all() if (kind, which) == ("bfloat16", "values") else spoilt.isnan().all()
    assert output[:, :2].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 30])
def test_rows_that_nobody_sees_may_be_anything(isa, kind, n):
    sequence = make(kind, 200, 3, 1, 48, 20)
    expected = sequence.attend(isa, 100, n)
    for rows in (sequence.keys, sequence.values):
        rows[: 100 - 19] = 0xFF
        rows[100 + n :] = 0xFF
    assert_same_bits(sequence.attend(isa, 100, n), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("kv_heads", "dim"), [(3, 64), (2, 20), (1, 2), (5, 98)])
def test_stored_rows(isa, kind, kv_heads, dim):
    generator = torch.Generator().manual_seed(dim)
    numbers = torch.randn(50, kv_heads, dim, generator=generator) * torch.logspace(-20, 20, 50)[:, None, None]
    numbers[0] = 0
    numbers[1] = -1e-31
    # Ties: n + 0.5 with a scale of 1, and halves of a bfloat16's last bit.
    numbers[2] = torch.arange(dim) + 0.5
    numbers[2, :, -1] = 127
    numbers[3] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8]).repeat(dim // 2)
    expected = reference_attention.store_rows(numbers, kind)
    actual = torch.zeros_like(expected)
    for source, row in zip(numbers, actual, strict=True):
        kernels().phi_test_store_kv_row(
            isa.encode(), source.data_ptr(), kv_heads, dim, library.KV_KINDS[kind], row.data_ptr()
        )
    assert torch.equal(actual, expected)
    stored = reference_attention.load_rows(actual, kv_heads, kind)
    allowed = 0.5 / 127 if kind == "int8" else 2**-8
    assert ((stored - numbers).abs() <= 1.001 * allowed * numbers.abs().amax(-1, keepdim=True) + 1e-30).all()


@pytest.mark.parametrize("strange", [NAN, float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_its_int8_head(isa, strange):
    numbers = torch.ones(1, 3, 20)
    numbers[0, 1, 17] = strange
    row = torch.zeros(1, 3 * 24, dtype=torch.uint8)
    kernels().phi_test_store_kv_row(isa.encode(), numbers.data_ptr(), 3, 20, library.KV_KINDS["int8"], row.data_ptr())
    stored = reference_attention.load_rows(row, 3, "int8")[0]
    assert torch.equal(stored[[0, 2]], numbers[0, [0, 2]])
    assert stored[1].isnan().all()


@pytest.mark.parametrize("n", [1, 40])
def test_numbers_that_are_hardly_any_are_zeros_on_every_cpu(isa, n):
    """Denormal products and sums: AMX takes them for zeros, and so do the others."""
    sequence = make("bfloat16", 600, 6, 2, 64)
    for rows in (sequence.keys, sequence.values):
        numbers = reference_attention.load_rows(rows, 2, "bfloat16")
        numbers[:, :, ::3] *= 2.0**-125
        numbers[:, :, 1::3] *= 2.0**-131
        rows[:] = reference_attention.store_rows(numbers, "bfloat16")
    sequence.query[::2] *= 2.0**-20
    actual = sequence.attend(isa, 560, n)
    # But for the signs of zeros, which nothing that follows tells apart.
    assert isa == "plain" or torch.equal(actual, sequence.attend("avx2", 560, n))
    assert (actual[..., 1::3] == 0).all()
