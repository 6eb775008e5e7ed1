"""Whether processes grow, from samples of their private memory: each one's slope, and what is wrong with it.

Owns: the verdicts, and that a measurement which would not see a leak is none. Knows nothing of what was done meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from memory_samples import MemorySamples
from slope import Slope, fit_slope

# A process that was replaced on the way is judged by a series of half the length.
_LEAST_SHARE = 0.4
# Of growing_process.py.
CONTROL = "planted leak"


@dataclass(frozen=True)
class Judgement:
    """What is done is counted by `unit`: `total` of them, of which the first `skip` do not count, with a sample every
    `every`. `limit` in bytes for one of them, and so `leak`, the control's."""

    unit: str
    total: int
    skip: int
    every: int
    limit: float
    leak: int


def judge(samples: MemorySamples, by: Judgement) -> list[dict[str, Any]]:
    """For each series its slope in bytes a unit, and whether the leak would be seen in it."""
    least = max(int(_LEAST_SHARE * (by.total - by.skip) / by.every), 20)
    rows = []
    for name, points in samples.series(least).items():
        x, y = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
        keep = x >= by.skip
        if keep.sum() < least:
            continue
        x, y = x[keep], y[keep]
        # A control is already what the others are made to be.
        planted = 0 if name == CONTROL else by.leak
        slope, leaking = fit_slope(x, y), fit_slope(x, y + planted * x)
        rows.append({"name": name, "slope": slope, "with_leak": leaking, "first": y[0], "last": y[-1], "n": len(x)})
    return rows


def problems(rows: list[dict[str, Any]], by: Judgement, failures: Sequence[str]) -> list[str]:
    """What is not as it should be, in words; `failures` of the work itself first."""
    found = [f"{len(failures)} failures, the first: {failures[0]}"] if failures else []
    found += [] if any(row["name"] == CONTROL for row in rows) else ["the control was not measured"]
    for row in rows:
        slope: Slope = row["slope"]
        wanted = "grows" if row["name"] == CONTROL else "flat"
        if slope.verdict(by.limit) != wanted:
            found.append(f"{row['name']}: {slope.verdict(by.limit)} (at most {slope.high:.0f} bytes a {by.unit})")
        if row["with_leak"].verdict(by.limit) != "grows":
            found.append(f"{row['name']}: a leak of {by.leak} bytes a {by.unit} would not be seen")
    return found


def show(rows: list[dict[str, Any]], by: Judgement) -> None:
    """Prints them as a table."""
    print(f"{'process':<22}{'MB':>8}{'bytes a ' + by.unit:>18}{'95 % interval':>20}  verdict   with the leak")
    for row in rows:
        slope = row["slope"]
        print(
            f"{row['name']:<22}{row['last'] / 1e6:>8.1f}{slope.value:>18.0f}{slope.low:>11.0f} to {slope.high:>5.0f}  "
            f"{slope.verdict(by.limit):<9} {row['with_leak'].verdict(by.limit)}"
        )


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same as JSON-able values."""
    return [
        {"name": row["name"], "bytes": row["last"], **{k: round(v, 1) for k, v in vars(row["slope"]).items()}}
        for row in rows
    ]
