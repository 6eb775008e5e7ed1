"""Logs of workers that have ended go, the newest of them last; all others stay."""

from __future__ import annotations

import os
from pathlib import Path

from phi_cluster.cluster.worker_logs import logs_folder, prune_logs

OTHERS = (
    "raylet.out",
    "gcs_server.err",
    "python-core-driver-01ff_7.log",
    "worker-notes.txt",
    "debug_state.txt",
    "event_GCS.log",
)


def write_logs(folder: Path, worker: int, pid: int) -> list[Path]:
    """As Ray writes them, all of them at the second `worker`."""
    name = f"{worker:056x}"
    paths = [folder / f"worker-{name}-01000000-{pid}.{end}" for end in ("out", "err")]
    paths.append(folder / f"python-core-worker-{name}_{pid}.log")
    paths += [folder / place / f"event_CORE_WORKER_{pid}.log" for place in ("events", "export_events")]
    for path in paths:
        path.write_text("said")
        os.utime(path, (worker, worker))
    return paths


def test_only_the_newest_of_the_dead_are_kept(tmp_path: Path) -> None:
    folder = logs_folder(tmp_path)
    for place in ("old", "events", "export_events"):
        (folder / place).mkdir(parents=True)
    for name in OTHERS:
        (folder / name).write_text("kept")
    written = {worker: write_logs(folder, worker, pid=100 + worker) for worker in range(1, 7)}
    # What somebody has put aside goes the same way.
    moved = folder / "old" / written[1][0].name
    written[1][0].rename(moved)

    # The oldest one lives.
    assert prune_logs(folder, keep=2, is_running=lambda pid: pid == 102) == 15
    left = {path.name for path in folder.rglob("*") if path.is_file()}
    assert left == {*OTHERS, *(path.name for worker in (2, 5, 6) for path in written[worker])}
    assert not moved.exists()
    assert prune_logs(folder, keep=2, is_running=lambda pid: pid == 102) == 0


def test_a_folder_that_is_not_there_is_no_fault(tmp_path: Path) -> None:
    assert prune_logs(logs_folder(tmp_path), keep=0, is_running=lambda pid: False) == 0
