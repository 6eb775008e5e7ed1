"""The folder of models that we converted or fetched: each is built once, completely or not at all.

Owns: the layout of the cache directory, building into a temporary folder followed by a rename, the lock
between processes, `ProgressEvent` and `ModelNotFound`. Knows nothing of what is built.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_UNFINISHED = ".unfinished"


class ModelNotFound(ValueError):
    """The model cannot be had; the message is one sentence that says why, and what to do."""


@dataclass(frozen=True)
class ProgressEvent:
    """How far a long piece of work is. `stage` is one word (downloading, checking, converting, waiting),
    `done` and `total` are bytes or counts (`total` 0: not known), `detail` says of what."""

    stage: str
    done: int
    total: int
    detail: str = ""


Progress = Callable[[ProgressEvent], None]


def ignore_progress(event: ProgressEvent) -> None:
    """For callers that show none."""


def build_once(cache_dir: Path, name: str, build: Callable[[Path], None], progress: Progress) -> Path:
    """The folder `cache_dir/name`; if it is not there yet, `build` fills an empty folder that then becomes
    it.

    Two processes that ask at once build it once: the second waits. What an interrupted build left is removed
    by the next. Raises what `build` raises, and OSError where the directory cannot be written.
    """
    folder = cache_dir / name
    if folder.is_dir():
        return folder
    cache_dir.mkdir(parents=True, exist_ok=True)
    # The lock file stays: removing it would let a third process lock a new one while the second still waits.
    with (cache_dir / f".{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(ProgressEvent("waiting", 0, 0, f"another process is preparing {name}"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return folder
        unfinished = cache_dir / f".{name}{_UNFINISHED}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            build(unfinished)
            for path in unfinished.rglob("*"):
                if path.is_file():
                    _flush(path)
            _flush(unfinished)
            unfinished.rename(folder)
            _flush(cache_dir)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _flush(path: Path) -> None:
    """A rename may reach the disk before the bytes of what is renamed, unless those are flushed first."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
