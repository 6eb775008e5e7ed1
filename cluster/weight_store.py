"""The owner of a node's one copy of the weights: a detached actor that publishes them in the object store.

Owns: the object (an object dies with its owner), and the packed file it is read from. Knows nothing of engines;
they map what is published. No torch in this process: packing runs in a process of its own that ends.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray

from phi_cluster.cluster.errors import StartError
from phi_cluster.cluster.logs import log_as
from phi_cluster.cluster.model_transfer import small_files
from phi_cluster.cluster.served_model import ServedModel
from phi_cluster.model.huge_pages import gather_pages, mapped_for_huge_pages

logger = logging.getLogger(__name__)

# Raise it when model/quantize.py packs other bytes than before, or means others by them, so that older files are not
# taken for new ones.
_PACKED_VERSION = {"int8": "-2", "int4": "-2"}


def packed_paths(model: ServedModel, cache_path: Path) -> tuple[Path, Path]:
    """Where the packed weights and their index lie."""
    name = f"{model.fingerprint}-{model.dtype}{_PACKED_VERSION.get(model.dtype, '')}"
    return cache_path / "packed" / f"{name}.bin", cache_path / "packed" / f"{name}.json"


def ensure_packed(
    model: ServedModel, cache_path: Path, progress: Callable[[int, int], None] | None = None
) -> tuple[Path, Path]:
    """Packs the checkpoint into one flat file unless that was done before. Raises StartError.

    The file appears whole or not at all (written aside, then renamed).
    """
    weights, index = packed_paths(model, cache_path)
    if weights.exists() and index.exists():
        return weights, index
    weights.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-P", "-m", "phi_cluster.model.pack", str(model.folder), model.dtype]
    aside = weights.with_suffix(f".{os.getpid()}.partial")
    try:
        with subprocess.Popen(
            [*command, str(aside), str(index)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as packing:
            assert packing.stdout is not None
            assert packing.stderr is not None
            for line in packing.stdout:
                done, _, total = line.partition(" ")
                if progress is not None:
                    progress(int(done), int(total))
            complaint = packing.stderr.read().strip()
        if packing.returncode != 0:
            last = complaint.splitlines()[-1] if complaint else f"exit status {packing.returncode}"
            raise StartError(last.removeprefix("error: "))
        aside.rename(weights)
    finally:
        aside.unlink(missing_ok=True)
    return weights, index


@ray.remote(num_cpus=0)
class WeightStore:
    """Publishes on first use and hands out the reference from then on. `num_standbys`: engines that each replica of the
    node may keep ready."""

    def __init__(self, model: ServedModel, cache_path: Path, num_standbys: int):
        log_as("weight_store")
        self._model = model
        self._cache_path = cache_path
        self._num_standbys = num_standbys
        self._published: tuple[dict[str, Any], list[ray.ObjectRef]] | None = None
        self._lock = asyncio.Lock()
        self._gathering: asyncio.Future[None] | None = None

    async def weights(self) -> tuple[dict[str, Any], list[ray.ObjectRef]]:
        """The index (see model/flat_weights.py) and, in a list so that it is not resolved on the way, the buffer."""
        async with self._lock:
            if self._published is None:
                self._published = await asyncio.to_thread(self._publish)
                # Engines need not wait for that: they are quicker from then on.
                self._gathering = asyncio.get_running_loop().run_in_executor(None, _gather, self._published[1])
        return self._published

    def served(self) -> tuple[ServedModel, int]:
        """The model, its folder as it is on this node, and how many engines may stand by for each replica."""
        return self._model, self._num_standbys

    def files(self) -> dict[str, bytes]:
        """For another node: what the model's folder holds besides weights, by name."""
        return small_files(self._model.folder)

    def sizes(self) -> tuple[int, int]:
        """For another node: bytes of the packed weights, and of their index."""
        weights, index = ensure_packed(self._model, self._cache_path)
        return weights.stat().st_size, index.stat().st_size

    def piece(self, of_index: bool, offset: int, nbytes: int) -> tuple[np.ndarray, int]:
        """For another node: a part of either file (uint8), and its CRC-32."""
        path = packed_paths(self._model, self._cache_path)[of_index]
        piece = np.fromfile(path, np.uint8, nbytes, offset=offset)
        return piece, zlib.crc32(piece.data)

    def pid(self) -> int:
        return os.getpid()

    def _publish(self) -> tuple[dict[str, Any], list[ray.ObjectRef]]:
        weights, index = ensure_packed(self._model, self._cache_path)
        buffer = np.memmap(weights, dtype=np.uint8, mode="r")
        return json.loads(index.read_text()), [ray.put(np.asarray(buffer))]


def _gather(published: list[ray.ObjectRef]) -> None:
    """Puts the published weights into huge pages."""
    [buffer] = ray.get(published)
    gathered = gather_pages(mapped_for_huge_pages(buffer))
    logger.info("%d of %d MB of the weights are in huge pages", gathered // 10**6, buffer.nbytes // 10**6)
