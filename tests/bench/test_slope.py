"""That a leak is told from noise, and from what only looks like one; and that a planted one is measured as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).parent
LIMIT, LEAK = 1000.0, 4096.0
# A sample every 10 of 1,800.
X = np.arange(0.0, 1800.0, 10.0)


@pytest.fixture
def fit_slope(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCH))
    from slope import fit_slope

    return fit_slope


def noise(size: float, memory: float = 0.0, seed: int = 1):
    """`memory`: how much of a value is left in the next one."""
    drawn = np.random.default_rng(seed).normal(0.0, size, len(X))
    for i in range(1, len(drawn)):
        drawn[i] += memory * drawn[i - 1]
    return drawn


def steps(*sizes: float):
    """An allocator that takes so much more at places in the first half, and keeps it."""
    y = np.zeros(len(X))
    for number, size in enumerate(sizes, start=1):
        y[number * len(X) // (2 * len(sizes) + 2) :] += size
    return y


SHAPES = {
    "still": np.zeros(len(X)),
    "noise": noise(200e3),
    "noise with memory": noise(50e3, memory=0.8),
    "a step": steps(1e6),
    "steps": steps(300e3, 200e3, 100e3),
    "steps and noise": steps(300e3, 200e3) + noise(50e3, memory=0.5),
    "bursts": np.where(np.arange(len(X)) % 17 == 0, 5e6, 0.0),
    "it sinks": -2000.0 * X,
    "a saw": 200e3 * (np.arange(len(X)) % 20) / 20,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_leak_is_told_from_all_that_is_none(shape: str, fit_slope) -> None:
    y = 60e6 + SHAPES[shape]
    slope, leaking = fit_slope(X, y), fit_slope(X, y + (LEAK + 2000.0 * (shape == "it sinks")) * X)
    assert slope.verdict(LIMIT) == "flat", slope
    assert leaking.verdict(LIMIT) == "grows", leaking
    assert slope.low <= slope.value <= slope.high


def test_what_is_too_noisy_or_too_short_is_not_called_flat(fit_slope) -> None:
    assert fit_slope(X, LIMIT * X + noise(500e3, memory=0.5)).verdict(LIMIT) == "unclear"
    with pytest.raises(ValueError, match="at least 20"):
        fit_slope(X[:19], X[:19])
    with pytest.raises(ValueError, match="ascend"):
        fit_slope(X[::-1], X)


def test_the_same_series_is_judged_the_same(fit_slope) -> None:
    y = noise(100e3, memory=0.5)
    assert fit_slope(X, y) == fit_slope(X, y)


def test_the_interval_is_neither_blind_nor_credulous(fit_slope) -> None:
    """Of many series with noise that remembers, it holds the truth in about 95 of 100 (blocks: a little less)."""
    held = 0
    for seed in range(20):
        slope = fit_slope(X, 500.0 * X + noise(50e3, memory=0.6, seed=seed))
        held += slope.low <= 500.0 <= slope.high
    assert held >= 16


def test_a_leak_in_a_process_of_the_server_is_measured(fit_slope, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one, found by its mark as a server's processes are, by the same samples as theirs."""
    monkeypatch.syspath_prepend(str(BENCH))
    from memory_samples import MemorySamples

    samples = MemorySamples(4_000_001)
    leaking = subprocess.Popen(
        [sys.executable, str(BENCH / "growing_process.py"), str(int(LEAK))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PHI_CLUSTER_RUNTIME_DIR": "/nowhere/phi-4000001-1"},
    )
    try:
        assert leaking.stdin is not None
        assert leaking.stdout is not None
        for number in range(0, 600, 20):
            leaking.stdin.write(b"\n" * 20)
            leaking.stdin.flush()
            # It answers when it has grown by all of them.
            for _ in range(20):
                leaking.stdout.readline()
            samples.take(float(number))
    finally:
        leaking.kill()
        with leaking:
            pass
    [points] = samples.series(20).values()
    x, y = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    slope = fit_slope(x, y)
    assert slope.verdict(LIMIT) == "grows"
    assert slope.value == pytest.approx(LEAK, rel=0.1)
