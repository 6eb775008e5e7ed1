"""Engines that sleep instead of computing: with this folder on PYTHONPATH, each process of a server imports this.

Owns: what an engine's step is where PHI_BENCH_STEP_SECONDS is set: it takes so long, whoever is in it, and brings each
sequence a token that follows from how long it is. So many machines can be one. All else is as it is. Nothing of ours
knows of it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_MODULE = "phi_cluster.cluster.engine.model_runner"
# Ordinary words of the built-in model.
_FIRST_TOKEN, _NUM_TOKENS = 1000, 500


class _Finder:
    """Finds this one module as everybody does, and has its steps replaced once it is loaded."""

    def __init__(self, seconds: float):
        self._seconds = seconds

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            _replace(module, self._seconds)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _replace(module: Any, seconds: float) -> None:
    def run(self: object, scheduled: list[Any]) -> dict[int, Any]:
        time.sleep(seconds)
        outcomes = {}
        for one in scheduled:
            sequence = one.sequence
            is_due = one.num_tokens == sequence.num_uncomputed_tokens
            token_id = _FIRST_TOKEN + len(sequence.token_ids) % _NUM_TOKENS
            outcomes[sequence.sequence_id] = module.Drawn([token_id] if is_due else [])
        return outcomes

    module.ModelRunner.run = run


if given := os.environ.get("PHI_BENCH_STEP_SECONDS"):
    sys.meta_path.insert(0, _Finder(float(given)))
