"""Loading the compiled kernels: which instruction set is taken, and why they may be refused."""

from __future__ import annotations

import ctypes.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi_cluster.model.ops import library
from phi_cluster.model.ops.library import ISA_VARIABLE, LARGEST_INT16, OpsUnavailable

built = pytest.mark.skipif(library.find_library() is None, reason="the kernels were not compiled")


@pytest.fixture(autouse=True)
def _loaded_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(ISA_VARIABLE, raising=False)
    library.load.cache_clear()
    yield
    library.load.cache_clear()


# What is there.


@built
def test_a_library_that_was_compiled_can_be_used():
    """Else all other tests of the kernels would skip, and the server would quietly be slow."""
    assert library.problem() is None


@built
def test_the_best_instruction_set_is_taken():
    order = ["amx", "avx512_vnni", "avx512", "avx2", "plain"]
    there = [isa for isa in order if library.load().c.phi_isa(isa.encode()) is not None]
    assert there[-1] == "plain"
    assert library.load().isa == there[0]
    for isa in there:
        assert library.load(isa).isa == isa


@built
def test_the_cpus_flags_say_which_instruction_sets_there_are():
    path = Path("/proc/cpuinfo")
    if not path.exists() or " avx" not in path.read_text():
        pytest.skip("no x86-64 Linux, or an old CPU")
    flags = set(next(line for line in path.read_text().splitlines() if line.startswith("flags")).split())
    needed = {
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq"},
        "avx512_vnni": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"},
    }
    for isa, names in needed.items():
        assert (library.load().c.phi_isa(isa.encode()) is not None) == (names <= flags), isa
    if library.load().c.phi_isa(b"amx") is not None:  # The kernel may refuse what the CPU has.
        assert {"amx_tile", "amx_int8", "amx_bf16", "avx512vbmi", "avx512_bf16"} <= flags


_WITHOUT_TILES = """
import ctypes
from phi_cluster.model.ops import library

class Stack(ctypes.Structure):
    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))

room = ctypes.create_string_buffer(4096)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(room), 0, 4096)), None) == 0
print(library.load().isa, library.load().c.phi_isa(b"amx"), library.problem())
"""


@built
def test_where_the_kernel_refuses_tiles_the_next_instruction_set_serves():
    """It does so where a stack for signals is too small to hold them."""
    if library.load().c.phi_isa(b"amx") is None:
        pytest.skip("no AMX here")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _WITHOUT_TILES], timeout=60, check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["avx512_vnni", "None", "None"]


@built
def test_a_library_is_loaded_and_tested_once():
    assert library.load() is library.load()
    assert library.load("plain") is library.load("plain")


# The variable.


@built
def test_the_variable_restricts_the_instruction_set(monkeypatch):
    monkeypatch.setenv(ISA_VARIABLE, "plain")
    assert library.load().isa == "plain"
    assert library.problem() is None


@built
def test_who_names_an_instruction_set_gets_it_whatever_the_variable_says(monkeypatch):
    best = library.load("").isa
    monkeypatch.setenv(ISA_VARIABLE, "nonsense")
    assert library.load("").isa == best
    assert library.load("plain").isa == "plain"


@built
def test_an_empty_variable_is_none(monkeypatch):
    best = library.load().isa
    library.load.cache_clear()
    monkeypatch.setenv(ISA_VARIABLE, "")
    assert library.load().isa == best


@built
@pytest.mark.parametrize("name", ["avx1024", "AVX2", "plain ", "AMX"])
def test_an_instruction_set_that_does_not_exist_is_named(monkeypatch, name):
    with pytest.raises(OpsUnavailable, match=f"this CPU or this build has no {name} kernels"):
        library.load(name)
    monkeypatch.setenv(ISA_VARIABLE, name)
    assert library.problem() == f"this CPU or this build has no {name} kernels"


@built
def test_an_instruction_set_that_this_cpu_lacks_makes_no_network():
    """Its first instruction would end the process."""
    description = library.NetworkC()
    assert library.load().c.phi_network_create(ctypes.byref(description), b"avx1024", 1) is None


# What is refused.


def test_not_compiled(monkeypatch):
    monkeypatch.setattr(library, "find_library", lambda: None)
    assert library.problem() == "the kernels were not compiled when phi-cluster was installed"
    monkeypatch.undo()
    monkeypatch.setattr(library, "_EXTENSION", "phi_cluster.model.ops._no_such_kernels")
    assert library.find_library() is None


def test_a_file_that_is_gone(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "find_library", lambda: tmp_path / "_kernels.so")
    with pytest.raises(OpsUnavailable, match=r"_kernels\.so: .*No such file"):
        library.load()


def test_a_file_that_is_no_library(monkeypatch, tmp_path):
    path = tmp_path / "_kernels.so"
    path.write_bytes(b"\x7fELF, or so it says")
    monkeypatch.setattr(library, "find_library", lambda: path)
    with pytest.raises(OpsUnavailable, match=r"_kernels\.so: "):
        library.load()


def test_a_library_without_our_functions(monkeypatch):
    name = ctypes.util.find_library("m")
    if name is None:
        pytest.skip("no other library at hand")
    monkeypatch.setattr(library, "find_library", lambda: Path(name))
    with pytest.raises(OpsUnavailable, match="phi_abi"):
        library.load()


@built
def test_a_library_of_other_sources(monkeypatch):
    monkeypatch.setattr(library, "_ABI", library._ABI + 1)
    with pytest.raises(OpsUnavailable, match=r"^_kernels.* was compiled from other sources$"):
        library.load()


@built
def test_after_a_refusal_it_can_be_tried_again(monkeypatch):
    monkeypatch.setattr(library, "find_library", lambda: None)
    assert library.problem() is not None
    monkeypatch.undo()
    assert library.problem() is None


# The check at start.


@built
@pytest.mark.parametrize("row", [0, 5, 12])
@pytest.mark.parametrize("dtype", ["int8", "int4", "int8 in groups"])
def test_kernels_that_compute_something_else_are_refused(monkeypatch, dtype, row):
    """One bit of one number of one layer, in the call that is not plain C++'s (the second of each pair is)."""
    linear = library.linear
    calls = []
    number = ["int8", "int4", "int8 in groups"].index(dtype) + 1

    def wrong(*arguments: Any) -> Any:
        y = linear(*arguments)
        calls.append(arguments[0].isa)
        if len(calls) == 2 * number - 1:
            y.view(np.int32)[row, -1] ^= 1
        return y

    monkeypatch.setattr(library, "linear", wrong)
    isa = _best()
    with pytest.raises(OpsUnavailable, match=rf"self-test: the {isa} kernels .* plain C.. computes \({dtype}\)"):
        library.load()
    assert calls == [isa, "plain"] * number


@built
def test_the_check_covers_sums_that_would_saturate(monkeypatch):
    """16 bits too few anywhere, and the largest sums tell."""
    seen = []
    linear = library.linear

    def spy(ops: Any, weight: Any, scale: Any, n: int, x: Any, *scales: Any) -> Any:
        seen.append((int(np.abs(weight.astype(np.int32)).max()), int(np.abs(x.astype(np.int32)).max()), x.shape))
        return linear(ops, weight, scale, n, x, *scales)

    monkeypatch.setattr(library, "linear", spy)
    library.load()
    assert [largest[:2] for largest in seen] == [(127, LARGEST_INT16)] * 2 + [(255, 127)] * 2 + [(127, 127)] * 2
    for _, _, shape in seen:
        # More rows than one tile has, more inputs than one block.
        assert shape[0] > 16
        assert shape[1] > 1024


def _best() -> str:
    """Of this CPU, without the check."""
    c = ctypes.CDLL(str(library.find_library()))
    c.phi_isa.restype = ctypes.c_char_p
    return c.phi_isa(b"").decode()


# Beside torch.


@built
def test_the_kernels_need_no_torch_and_no_compiler():
    """Replicas ask whether there are kernels, and must stay small."""
    code = "import sys; from phi_cluster.model.ops import library; library.load(); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], timeout=60, check=False)
    assert done.returncode == 0
