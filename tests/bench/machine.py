"""What this machine can do at most: bytes read and multiplications a second.

    python tests/bench/machine.py

Owns: a few lines of C++, compiled for this CPU with the compiler that is there, that read a buffer far larger than the
caches, in huge pages where the kernel has them (as weights are), and multiply in registers. Without a compiler numpy
stands in, which reads less and cannot tell the peak.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_BUFFER_NBYTES = 1 << 30
_ROUNDS = 7
_SOURCE = r"""
#include <cstdint>
#include <cstddef>
#include <immintrin.h>

// The sum keeps the compiler from leaving the reads out.
extern "C" int64_t read_bytes(const char* p, size_t nbytes) {
    __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
    for (size_t i = 0; i + 128 <= nbytes; i += 128) {
        _mm_prefetch(p + i + 2048, _MM_HINT_T0);
        _mm_prefetch(p + i + 2112, _MM_HINT_T0);
        a = _mm256_add_epi64(a, _mm256_load_si256((const __m256i*)(p + i)));
        b = _mm256_add_epi64(b, _mm256_load_si256((const __m256i*)(p + i + 32)));
        c = _mm256_add_epi64(c, _mm256_load_si256((const __m256i*)(p + i + 64)));
        d = _mm256_add_epi64(d, _mm256_load_si256((const __m256i*)(p + i + 96)));
    }
    a = _mm256_add_epi64(_mm256_add_epi64(a, b), _mm256_add_epi64(c, d));
    return _mm256_extract_epi64(a, 0) + _mm256_extract_epi64(a, 1) + _mm256_extract_epi64(a, 2) +
           _mm256_extract_epi64(a, 3);
}

// The operations of a round of each kind of product, by the widest instructions that the engine's kernels use.
// 12 independent sums, enough for the latency of any CPU with these instructions. The empty asm keeps each product
// apart; `x` is used from a register as a kernel would.
#define EACH(F) F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8) F(9) F(10) F(11)

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
typedef __m512i Ints;
typedef __m512 Floats;
#define WIDTH 16
#define ZERO _mm512_setzero_si512()
#define SET(n) _mm512_set1_epi8(n)
#define FIRST(s) _mm512_cvtsi512_si32(s)
#define ADD_INT16(s, x, y) _mm512_dpwssd_epi32(s, x, y)
#define ADD_INT8(s, x, y) _mm512_dpbusd_epi32(s, x, y)
#define SET_F(x) _mm512_set1_ps(x)
#define ADD_FLOAT32(f, x, y) _mm512_fmadd_ps(f, x, y)
#define FIRST_F(f) _mm512_cvtss_f32(f)
#else
// By vpmaddwd and vpaddd; by vpmaddubsw, vpmaddwd and vpaddd; by vfmadd.
typedef __m256i Ints;
typedef __m256 Floats;
#define WIDTH 8
#define ZERO _mm256_setzero_si256()
#define SET(n) _mm256_set1_epi8(n)
#define FIRST(s) _mm256_extract_epi32(s, 0)
#define ADD_INT16(s, x, y) _mm256_add_epi32(s, _mm256_madd_epi16(x, y))
#define ADD_INT8(s, x, y) \
    _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_maddubs_epi16(x, y), _mm256_set1_epi16(1)))
#define SET_F(x) _mm256_set1_ps(x)
#define ADD_FLOAT32(f, x, y) _mm256_fmadd_ps(f, x, y)
#define FIRST_F(f) _mm256_cvtss_f32(f)
#endif

#define DECLARE(i) Ints s##i = ZERO;
#define ADD(i) sum += FIRST(s##i);
#define MULTIPLY(kind, step)                       \
    static int64_t multiply_##kind##_by_vectors(size_t rounds) { \
        Ints x = SET(3), y = SET(5);               \
        EACH(DECLARE)                              \
        for (size_t n = 0; n < rounds; n++) {      \
            asm volatile("" : "+v"(x));            \
            EACH(step)                             \
        }                                          \
        int64_t sum = 0;                           \
        EACH(ADD)                                  \
        return sum;                                \
    }
#define STEP_16(i) s##i = ADD_INT16(s##i, x, y); asm volatile("" : "+v"(s##i), "+v"(y));
#define STEP_8(i) s##i = ADD_INT8(s##i, x, y); asm volatile("" : "+v"(s##i), "+v"(y));
MULTIPLY(int16, STEP_16)
MULTIPLY(int8, STEP_8)

extern "C" int64_t multiply_float32(size_t rounds) {
    Floats x = SET_F(0.5f), y = SET_F(1.0f);
#define DECLARE_F(i) Floats f##i = SET_F(i);
    EACH(DECLARE_F)
    for (size_t n = 0; n < rounds; n++) {
        asm volatile("" : "+v"(x));
#define STEP_F(i) f##i = ADD_FLOAT32(f##i, x, y); asm volatile("" : "+v"(f##i));
        EACH(STEP_F)
    }
    float sum = 0;
#define ADD_F(i) sum += FIRST_F(f##i);
    EACH(ADD_F)
    return (int64_t)sum;
}
extern "C" int64_t ops_float32() { return 12 * 2 * WIDTH; }

#if defined(__AMX_INT8__)
#include <sys/syscall.h>
#include <unistd.h>
static bool tiles() {
    static const bool allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return allowed;
}
static void load_shapes() {
    alignas(64) uint8_t shapes[64] = {1};
    for (int i = 0; i < 8; i++) shapes[16 + 2 * i] = 64, shapes[48 + i] = 16;
    asm volatile("ldtilecfg %0" : : "m"(shapes));
}
#else
static bool tiles() { return false; }
#endif

// An int16 number times an int8 one takes two products of bytes.
extern "C" int64_t ops_int16() { return tiles() ? 2 * 2 * 16 * 16 * 64 : 12 * 4 * WIDTH; }
extern "C" int64_t ops_int8() { return tiles() ? 4 * 2 * 16 * 16 * 64 : 12 * 8 * WIDTH; }
static int64_t multiply_tiles(size_t rounds) {
#if defined(__AMX_INT8__)
    load_shapes();
    for (size_t n = 0; n < rounds; n++) {
        asm volatile("tdpbssd %tmm7, %tmm4, %tmm0\n tdpbusd %tmm7, %tmm5, %tmm1\n"
                     "tdpbssd %tmm6, %tmm4, %tmm2\n tdpbusd %tmm6, %tmm5, %tmm3");
    }
    asm volatile("tilerelease");
#endif
    return rounds;
}
extern "C" int64_t multiply_int16(size_t rounds) {
    return tiles() ? multiply_tiles(rounds) : multiply_int16_by_vectors(rounds);
}
extern "C" int64_t multiply_int8(size_t rounds) {
    return tiles() ? multiply_tiles(rounds) : multiply_int8_by_vectors(rounds);
}
"""
_KINDS = ("int16", "int8", "float32")


@dataclass(frozen=True)
class Machine:
    """`read_bandwidth` in bytes a second with all threads; `peak_ops` in operations (a multiplication and an addition
    are two) a second by kind of number, `int16`, `int8` and `float32`, empty where it could not be measured."""

    threads: int
    read_bandwidth: float
    peak_ops: dict[str, float]

    def describe(self) -> str:
        peaks = "".join(f", {ops / 1e9:.0f} GOP/s {name}" for name, ops in self.peak_ops.items())
        return f"{self.threads} threads read {self.read_bandwidth / 1e9:.1f} GB/s{peaks}"


class Meter:
    """Measures with a buffer of a gigabyte, which `close` gives back. Neighbours on the same host share its memory: its
    bandwidth is to be measured beside what is compared to it, and again."""

    def __init__(self, threads: int):
        self._threads = threads
        self._folder = tempfile.TemporaryDirectory()
        self._library = _compile(Path(self._folder.name))
        self._memory = mmap.mmap(-1, _BUFFER_NBYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # A kernel without huge pages refuses.
        with suppress(OSError):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._buffer = np.frombuffer(self._memory, dtype=np.int64)
        self._buffer.fill(1)

    def close(self) -> None:
        del self._buffer
        self._memory.close()
        self._folder.cleanup()

    def read_bandwidth(self) -> float:
        """Bytes a second, with all threads; takes less than a second."""
        share = len(self._buffer) // self._threads // 1024 * 1024
        if self._library is None:
            parts = [self._buffer[i * share : (i + 1) * share].view(np.float32) for i in range(self._threads)]
            return 8 * share * self._threads / _together(self._threads, lambda i: parts[i].max())
        begin, read = self._buffer.ctypes.data, self._library.read_bytes
        return 8 * share * self._threads / _together(self._threads, lambda i: read(begin + i * 8 * share, 8 * share))

    def machine(self) -> Machine:
        """Takes some seconds."""
        rounds, peaks = 5_000_000, {}
        for name in _KINDS if self._library is not None else ():
            multiply, ops = getattr(self._library, f"multiply_{name}"), getattr(self._library, f"ops_{name}")()
            peaks[name] = ops * rounds * self._threads / _together(self._threads, lambda i, call=multiply: call(rounds))
        return Machine(self._threads, self.read_bandwidth(), peaks)


def _compile(folder: Path) -> Any:
    """The library, or None where there is no compiler, or no such CPU."""
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        return None
    source, library = folder / "machine.cpp", folder / "machine.so"
    source.write_text(_SOURCE)
    command = [compiler, "-O2", "-march=native", "-shared", "-fPIC", str(source), "-o", str(library)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        return None
    loaded = ctypes.CDLL(str(library))
    loaded.read_bytes.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
    for name in _KINDS:
        getattr(loaded, f"multiply_{name}").argtypes = [ctypes.c_size_t]
    return loaded


def _together(threads: int, work: Callable[[int], Any]) -> float:
    """Median seconds until all of `threads` threads have done their work, begun at once."""
    seconds = []
    for _ in range(_ROUNDS):
        running = [threading.Thread(target=work, args=(i,)) for i in range(1, threads)]
        begin = time.perf_counter()
        for thread in running:
            thread.start()
        work(0)
        for thread in running:
            thread.join()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    meter = Meter(parser.parse_args().threads)
    print(meter.machine().describe())
    for _ in range(4):
        print(f"again: {meter.read_bandwidth() / 1e9:.1f} GB/s")
    meter.close()
