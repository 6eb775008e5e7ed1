"""Requests on which engines have died, remembered so that they never get another one.

Owns: what makes two requests the same, and the memory: empty files in a folder of the node, so that it is shared by all
replicas and outlives each of them, but not the server. Knows nothing of engines or sessions.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from phi_cluster.cluster.turn_api import TurnRequest


class PoisonList:
    """For any thread or process."""

    def __init__(self, folder: Path):
        self._folder = folder

    def holds(self, request: TurnRequest) -> bool:
        return os.path.exists(self._path(request))

    def add(self, request: TurnRequest) -> None:
        """Raises OSError."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path(request).touch(mode=0o600)

    def _path(self, request: TurnRequest) -> Path:
        # What it says and asks for; not which session or connection it came by.
        sampling = {k: sorted(v.items()) if isinstance(v, dict) else v for k, v in request.sampling.items()}
        asked = [request.tenant, request.messages, request.prompt, request.stop, sampling]
        digest = hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=16).hexdigest()
        return self._folder / digest
