"""What the head leaves for machines that join says all that they need, and tells what does not fit."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from phi_cluster.cluster.cluster_record import ClusterRecord, read
from phi_cluster.cluster.config import Config, NodesConfig
from phi_cluster.cluster.errors import StartError

CONFIG = Config(journal="redis://:secret@10.0.0.5:6379/0", nodes=NodesConfig(address="10.0.0.5"), replicas=3)


def test_a_configuration_arrives_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI_CLUSTER_JOURNAL_PASSWORD", "hidden")
    record = ClusterRecord.of(CONFIG, 4, 1000)
    arrived = ClusterRecord(**json.loads(json.dumps(asdict(record))))
    assert arrived == record
    assert arrived.loaded_config() == CONFIG
    assert arrived.password == "hidden"
    arrived.check_versions()


def test_another_version_is_refused() -> None:
    record = ClusterRecord.of(CONFIG, 4, 1000)
    other = replace(record, versions=record.versions | {"ray": "2.1"})
    with pytest.raises(StartError, match=r"this machine has ray 2\.\d+\.\d+, the head has 2\.1: install the same"):
        other.check_versions()


@pytest.mark.slow
def test_where_nobody_answers_that_is_said() -> None:
    with pytest.raises(StartError, match=r"127\.0\.0\.1:9"):
        read("127.0.0.1:9", "0" * 64)
