"""The log files that Ray's worker processes leave behind: three for each session actor that there ever was.

Owns: which of them may go. Knows nothing of Ray's processes, of sessions or of what the files say.
"""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

# As Ray 2.60 names them: worker-<id>-<job>-<pid>.out and .err, python-core-worker-<id>_<pid>.log.
_NAME = re.compile(r"(?:worker-([0-9a-f]+)-[0-9a-f]+-(\d+)\.(?:out|err)|python-core-worker-([0-9a-f]+)_(\d+)\.log)")


def logs_folder(runtime_dir: Path) -> Path:
    """Of a server whose Ray has its files in `runtime_dir` (ray_cluster.py)."""
    return runtime_dir / "ray" / "session_latest" / "logs"


def prune_logs(folder: Path, keep: int, is_running: Callable[[int], bool]) -> int:
    """Deletes the logs of workers whose process has ended, but for the `keep` that wrote last; returns how many files.

    `is_running(pid)`. A file that is gone meanwhile, or cannot be deleted, is passed over: the next time looks again.
    """
    files: dict[str, list[Path]] = defaultdict(list)
    last_written: dict[str, float] = defaultdict(float)
    for path in (*folder.glob("*worker-*"), *(folder / "old").glob("*worker-*")):
        match = _NAME.fullmatch(path.name)
        if match is None or is_running(int(match[2] or match[4])):
            continue
        worker = match[1] or match[3]
        with contextlib.suppress(OSError):
            last_written[worker] = max(last_written[worker], path.stat().st_mtime)
            files[worker].append(path)
    deleted = 0
    newest_first = sorted(files, key=lambda worker: (last_written[worker], worker), reverse=True)
    for worker in newest_first[keep:]:
        for path in files[worker]:
            with contextlib.suppress(OSError):
                path.unlink()
                deleted += 1
    return deleted
