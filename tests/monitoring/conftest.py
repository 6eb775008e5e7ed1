"""Families as Prometheus reads them: through prometheus_client to text, and parsed again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pytest
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families


class Exported:
    """What the controller does with families."""

    def __init__(self, *metrics: Iterable[Metric]):
        self._metrics = [metric for some in metrics for metric in some]

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics

    def text(self) -> str:
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry).decode()

    def families(self) -> list[Metric]:
        return list(text_string_to_metric_families(self.text()))

    def values(self, name: str) -> dict[tuple[str, ...], float]:
        """All of a sample's series, by their labels' values in order of the labels' names."""
        return {
            tuple(value for _, value in sorted(sample.labels.items())): sample.value
            for family in self.families()
            for sample in family.samples
            if sample.name == name
        }

    def value(self, name: str, **labels: str) -> float:
        found = [
            sample.value
            for family in self.families()
            for sample in family.samples
            if sample.name == name and sample.labels == labels
        ]
        assert len(found) == 1, (name, labels, found)
        return found[0]


@pytest.fixture
def exported() -> Callable[..., Exported]:
    """`exported(families, ...)`."""
    return Exported
