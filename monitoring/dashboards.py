"""Grafana's dashboards, made of a short description: `python -m phi_cluster.monitoring.dashboards [FOLDER]`.

Owns: the form of Grafana's JSON (schemaVersion 39, which Grafana 10.4 and later read), and where panels lie. Knows
nothing of what they show: that is grafana/dashboards.yml's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

_FOLDER = Path(__file__).parent / "grafana"
_WIDTH, _HEIGHT = 12, 8
_STAT_WIDTH, _STAT_HEIGHT = 4, 4
_ROW = 24
_SELECTOR = 'instance=~"$instance"'
_RATES = "$__rate_interval"
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_KINDS = {"stat": "stat", "table": "table", "lines": "timeseries"}


def dashboards(description: Path = _FOLDER / "dashboards.yml") -> Iterator[tuple[str, dict[str, Any]]]:
    """File name and content of each dashboard. Raises ValueError for a kind of panel that there is not."""
    for one in yaml.safe_load(description.read_text()):
        yield f"{one['name']}.json", _dashboard(one["name"], one["title"], one["panels"])


def write(folder: Path) -> None:
    """All of them into `folder`."""
    for name, content in dashboards():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")


def _dashboard(name: str, title: str, panels: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "uid": f"phi-{name}",
        "title": title,
        "tags": ["phi-cluster"],
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_source_variable(), _instance_variable()]},
        "links": [{"type": "dashboards", "tags": ["phi-cluster"], "title": "phi-cluster", "asDropdown": True}],
        "panels": list(_placed(panels)),
    }


def _placed(panels: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    x = y = height = 0
    for number, panel in enumerate(panels, start=1):
        is_stat = panel.get("kind") == "stat"
        width, next_height = (_STAT_WIDTH, _STAT_HEIGHT) if is_stat else (_WIDTH, _HEIGHT)
        if x + width > _ROW or next_height != height:
            x, y = 0, y + height
        height = next_height
        yield _panel(number, panel) | {"gridPos": {"x": x, "y": y, "w": width, "h": height}}
        x += width


def _panel(number: int, panel: dict[str, Any]) -> dict[str, Any]:
    kind = panel.get("kind", "lines")
    if kind not in _KINDS:
        raise ValueError(f"{panel['title']}: there is no kind {kind!r} of panels")
    defaults: dict[str, Any] = {"unit": panel.get("unit", "short"), "min": 0}
    if "max" in panel:
        defaults["max"] = panel["max"]
    if kind == "lines":
        stacking = {"mode": "normal" if panel.get("stack") else "none"}
        defaults["custom"] = {"fillOpacity": 20 if panel.get("stack") else 0, "stacking": stacking}
    return {
        "id": number,
        "type": _KINDS[kind],
        "title": panel["title"],
        "description": panel.get("help", ""),
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": [_target(place, query, kind) for place, query in enumerate(panel["queries"])],
    }


def _target(place: int, query: str, kind: str) -> dict[str, Any]:
    expression, _, legend = query.partition(" | ")
    for short, long in (("{I}", f"{{{_SELECTOR}}}"), (",I}", f",{_SELECTOR}}}"), ("[R]", f"[{_RATES}]")):
        expression = expression.replace(short, long)
    target = {"refId": chr(ord("A") + place), "datasource": _SOURCE, "expr": expression, "legendFormat": legend}
    return target | ({"instant": True, "format": "table"} if kind == "table" else {})


def _source_variable() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}


def _instance_variable() -> dict[str, Any]:
    return {
        "name": "instance",
        "label": "cluster",
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": "label_values(phi_build_info, instance)", "refId": "instance"},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"text": "All", "value": "$__all"},
    }


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else _FOLDER / "dashboards")
