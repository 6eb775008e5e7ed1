"""The log files that Ray's worker processes leave behind: five for each session actor that there ever was.

Owns: which of them may go. Knows nothing of Ray's processes, of sessions or of what the files say.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

# As Ray 2.60 names them: worker-<id>-<job>-<pid>.out and .err, python-core-worker-<id>_<pid>.log, and elsewhere
# event_CORE_WORKER_<pid>.log.
_NAME = re.compile(
    r"(?:worker-[0-9a-f]+-[0-9a-f]+-|python-core-worker-[0-9a-f]+_|event_[A-Z_]+_)(\d+)\.(?:out|err|log)"
)
# Under the folder: the second one is where they are put aside.
_PLACES = ("", "old", "events", "export_events")


def logs_folder(runtime_dir: Path) -> Path:
    """Of a server whose Ray has its files in `runtime_dir` (ray_cluster.py)."""
    return runtime_dir / "ray" / "session_latest" / "logs"


def prune_logs(folder: Path, keep: int, is_running: Callable[[int], bool]) -> int:
    """Deletes the logs of workers whose process has ended, but for the `keep` that wrote last; returns how many files.

    `is_running(pid)`. A file that is gone meanwhile, or cannot be deleted, is passed over: the next time looks again.
    """
    files: dict[int, list[str]] = defaultdict(list)
    last_written: dict[int, float] = defaultdict(float)
    for entry in (entry for place in _PLACES for entry in _entries(folder / place)):
        match = _NAME.fullmatch(entry.name)
        if match is None or is_running(pid := int(match[1])):
            continue
        with contextlib.suppress(OSError):
            last_written[pid] = max(last_written[pid], entry.stat().st_mtime)
            files[pid].append(entry.path)
    deleted = 0
    for pid in sorted(files, key=lambda pid: (last_written[pid], pid), reverse=True)[keep:]:
        for path in files[pid]:
            with contextlib.suppress(OSError):
                os.unlink(path)
                deleted += 1
    return deleted


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """No `Path` for each of hundreds, again and again: see processes.py."""
    try:
        return list(os.scandir(folder))
    except FileNotFoundError:
        return []
