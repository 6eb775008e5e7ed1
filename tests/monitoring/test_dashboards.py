"""The dashboards are what their description says, and whole: what Grafana needs to show them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from phi_cluster.monitoring import dashboards

GRAFANA = Path(dashboards.__file__).parent / "grafana"
MADE = dict(dashboards.dashboards())


def test_the_files_are_made_of_the_description():
    stored = {path.name: json.loads(path.read_text()) for path in (GRAFANA / "dashboards").glob("*.json")}
    assert stored == MADE, "run python -m phi_cluster.monitoring.dashboards"


def test_written_anew_they_are_the_same(tmp_path):
    dashboards.write(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_text() == (GRAFANA / "dashboards" / path.name).read_text()


@pytest.mark.parametrize("name", MADE)
def test_a_dashboard_is_whole(name):
    board = MADE[name]
    assert board["uid"] == f"phi-{name.removesuffix('.json')}"
    assert len(board["uid"]) <= 40
    assert {variable["name"] for variable in board["templating"]["list"]} == {"datasource", "instance"}
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["type"] in ("timeseries", "stat", "table")
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken, f"{panel['title']} lies on another one"
        taken |= cells
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
        for target in panel["targets"]:
            # Every query is of the clusters that are chosen.
            assert 'instance=~"$instance"' in target["expr"]
            assert "{I}" not in target["expr"]
            assert "[R]" not in target["expr"]
            assert " | " not in target["expr"]


def test_what_compose_mounts_is_there():
    folder = GRAFANA.parent
    compose = yaml.safe_load((folder / "compose.yml").read_text())
    named = set(compose["volumes"])
    for service in compose["services"].values():
        for volume in service["volumes"]:
            source, target = volume.split(":")[:2]
            assert source in named or (folder / source).exists(), source
            assert target.startswith("/")
    [provider] = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "phi-cluster.yml").read_text())["providers"]
    mounts = [volume.split(":")[:2] for volume in compose["services"]["grafana"]["volumes"]]
    assert ["./grafana/dashboards", provider["options"]["path"]] in mounts
