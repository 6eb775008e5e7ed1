"""What is asked of the nodes of a Ray that somebody else has started."""

from __future__ import annotations

from pathlib import Path

import pytest

from phi_cluster.cluster.config import Config
from phi_cluster.cluster.errors import StartError
from phi_cluster.cluster.node_tasks import check_environment, check_object_store
from phi_cluster.cluster.preflight import object_store_nbytes
from phi_cluster.cluster.ray_environment import environment

CONFIG = Config.model_validate({"journal": "redis://127.0.0.1:6379/0", "nodes": {"ray_address": "auto"}})


def test_what_environment_prints_is_enough(tmp_path: Path) -> None:
    given = environment(CONFIG, tmp_path, "")
    # It is printed without the token, which Ray has looked at.
    del given["RAY_AUTH_TOKEN"]
    check_environment("node a", CONFIG, given)
    check_environment("node a", CONFIG, given | {"RAY_AUTH_TOKEN": "secret", "RAY_OTHER": "1"})


def test_what_is_missing_is_named_with_the_remedy() -> None:
    given = environment(CONFIG, Path("/tmp/phi"), "")
    del given["RAY_SERVE_ENABLE_HA_PROXY"]
    given["RAY_worker_niceness"] = "15"
    with pytest.raises(StartError) as caught:
        check_environment("node a", CONFIG, given)
    assert caught.value.message == (
        "node a of this Ray was started without RAY_SERVE_ENABLE_HA_PROXY=1 (2 settings differ): start its nodes with "
        "what `phi-cluster environment CONFIG` prints"
    )
    with pytest.raises(StartError, match="settings differ"):
        check_environment("node a", CONFIG, {})


def test_the_object_store_must_hold_the_weights() -> None:
    check_object_store("node a", object_store_nbytes(192 * 10**6), 192 * 10**6)
    with pytest.raises(StartError) as caught:
        check_object_store("node a", 200 * 10**6, 192 * 10**6)
    assert "--object-store-memory=" + str(object_store_nbytes(192 * 10**6)) in caught.value.message
    assert caught.value.message.startswith("node a of this Ray has an object store of 200 MB")
