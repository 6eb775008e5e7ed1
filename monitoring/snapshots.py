"""Metrics as they travel: a process's families with their samples, and the sums of all processes' that there were.

Owns: the form of a snapshot, adding them up, and that no sum goes back: what a process counted stays when it is gone,
and can be stored for whoever goes on with the sums. Knows nothing of which metrics there are and of who sends them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import msgpack
from prometheus_client import Counter
from prometheus_client.core import Metric

# (name, type, help, samples); a sample is (name, labels, value).
FamilySnapshot: TypeAlias = tuple[str, str, str, list[tuple[str, dict[str, str], float]]]


def snapshot_of(families: Iterable[Metric]) -> list[FamilySnapshot]:
    """Families with their samples, picklable."""
    return [
        (
            family.name,
            family.type,
            family.documentation,
            [(s.name, s.labels, s.value) for s in family.samples if not s.name.endswith("_created")],
        )
        for family in families
    ]


def merge_snapshots(snapshots: Iterable[list[FamilySnapshot]]) -> Iterator[Metric]:
    """Sums samples of the same name and labels."""
    families: dict[str, tuple[str, str, dict[tuple[str, tuple[tuple[str, str], ...]], float]]] = {}
    for snapshot in snapshots:
        for name, kind, documentation, samples in snapshot:
            sums = families.setdefault(name, (kind, documentation, {}))[2]
            for sample_name, labels, value in samples:
                key = (sample_name, tuple(sorted(labels.items())))
                sums[key] = sums.get(key, 0.0) + value
    for name, (kind, documentation, sums) in families.items():
        metric = Metric(name, documentation, kind)
        for (sample_name, pairs), total in sums.items():
            metric.add_sample(sample_name, dict(pairs), total)
        yield metric


def without_gauges(snapshot: list[FamilySnapshot]) -> list[FamilySnapshot]:
    """What remains of a process that is gone: its counters and histograms."""
    return [family for family in snapshot if family[1] != "gauge"]


class SnapshotSums:
    """The sums over processes that come and go, each known by an id that no later one has. Moments are the caller's,
    seconds of one clock.

    A process that is silent for `silence` seconds counts in gauges no more. Only one that is gone for sure may be
    retired: if it reported again, it would count twice.
    """

    def __init__(self, silence: float):
        self._silence = silence
        self._living: dict[str, tuple[float, list[FamilySnapshot]]] = {}
        self._past: list[FamilySnapshot] = []
        # The server of metrics asks in a thread of its own: what moves from the living to the past is in one of them.
        self._moving = threading.Lock()

    def __contains__(self, process_id: str) -> bool:
        return process_id in self._living

    def take(self, process_id: str, snapshot: list[FamilySnapshot], now: float) -> None:
        """All that the process has counted so far."""
        self._living[process_id] = (now, snapshot)

    def retire(self, process_id: str) -> None:
        """The process is gone: what it counted stays, in one sum for all of them."""
        found = self._living.get(process_id)
        if found is not None:
            past = snapshot_of(merge_snapshots([self._past, without_gauges(found[1])]))
            with self._moving:
                self._past = past
                del self._living[process_id]

    def living(self, prefix: str) -> list[str]:
        """Those that are not retired and whose ids begin so."""
        return [process_id for process_id in self._living if process_id.startswith(prefix)]

    def snapshots(self, now: float) -> list[list[FamilySnapshot]]:
        """To be merged. Of those that are silent, without what was true only then."""
        with self._moving:
            past, living = self._past, list(self._living.values())
        return [past, *(one if now - at <= self._silence else without_gauges(one) for at, one in living)]

    def pack(self, **others: list[FamilySnapshot]) -> bytes:
        """All of it but gauges, for `unpack`, and what `others` have counted."""
        living = {process_id: without_gauges(one) for process_id, (_, one) in self._living.items()} | others
        packed: bytes = msgpack.packb([self._past, living])
        return packed

    def unpack(self, data: bytes, now: float) -> None:
        """What another one had summed. Processes that live will report again; they count as silent until then. Raises
        ValueError if it is something else."""
        try:
            past, living = msgpack.unpackb(data)
            self._past = _read(past)
            self._living = {str(name): (now - 2 * self._silence, _read(one)) for name, one in living.items()}
        except (ValueError, TypeError, AttributeError, msgpack.UnpackException) as error:
            raise ValueError(f"these are no sums: {error}") from None


def _read(families: Any) -> list[FamilySnapshot]:
    return [
        (str(name), str(kind), str(text), [(str(sample), dict(labels), float(n)) for sample, labels, n in samples])
        for name, kind, text, samples in families
    ]


class RaisedCounter:
    """A counter whose totals are counted elsewhere. It never goes back."""

    def __init__(self, counter: Counter):
        self._counter = counter
        self._totals: dict[tuple[str, ...], float] = {}

    def to(self, total: float, *labels: str) -> None:
        """So many so far, with these labels' values."""
        counter = self._counter.labels(*labels) if labels else self._counter
        counter.inc(max(total - self._totals.get(labels, 0), 0))
        self._totals[labels] = max(total, self._totals.get(labels, 0))
