"""What of the object store's memory a process has mapped, by a real kernel."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from phi_cluster.cluster.mapped_weights import Mapped, MappedWeights, mapped_weights
from phi_cluster.model.flat_weights import protect_read_only

PAGE = 4096
NBYTES = 64 * PAGE


@pytest.fixture
def store() -> Iterator[Path]:
    """Memory that the kernel names as Ray's object store's."""
    path = Path(f"/dev/shm/plasma-test-{os.getpid()}")
    path.write_bytes(b"w" * NBYTES)
    yield path
    path.unlink()


def test_what_is_touched_is_mapped_and_what_is_written_is_copied(store: Path) -> None:
    """In a process of its own kind: this one."""
    before = mapped_weights(Path("/proc/self/smaps").read_text())
    assert before == Mapped()
    with store.open("r+b") as file:
        shared = np.frombuffer(mmap.mmap(file.fileno(), NBYTES, mmap.MAP_SHARED), np.uint8)
        private = np.frombuffer(mmap.mmap(file.fileno(), NBYTES, mmap.MAP_PRIVATE), np.uint8)
    # The store's own messages: writable.
    assert int(shared.sum()) == NBYTES * ord("w")
    assert mapped_weights(Path("/proc/self/smaps").read_text()) == Mapped()
    protect_read_only(shared)
    assert mapped_weights(Path("/proc/self/smaps").read_text()) == Mapped(NBYTES, 0)
    private[: 3 * PAGE] += 1
    assert int(private[3 * PAGE :].sum()) > 0
    protect_read_only(private)
    assert mapped_weights(Path("/proc/self/smaps").read_text()) == Mapped(2 * NBYTES, 3 * PAGE)


async def test_it_is_looked_at_now_and_then(tmp_path: Path) -> None:
    now = 100.0
    weights = MappedWeights(tmp_path, lambda: now)
    assert await weights.of(7) == Mapped()
    for pid, pages in ((7, 2), (8, 5)):
        (tmp_path / str(pid)).mkdir()
        smaps = f"7f00-7f01 r--s 00001000 00:1b 16 /dev/shm/plasmaX (deleted)\nSize: 99 kB\nRss: {4 * pages} kB\n"
        (tmp_path / str(pid) / "smaps").write_text(smaps + "Anonymous: 4 kB\nVmFlags: rd sh mr\n")
    assert await weights.of(7) == Mapped()
    # Another engine is looked at at once.
    assert await weights.of(8) == Mapped(5 * PAGE, PAGE)
    assert await weights.of(7) == Mapped(2 * PAGE, PAGE)
    (tmp_path / "7" / "smaps").write_text("")
    now += 20
    assert await weights.of(7) == Mapped(2 * PAGE, PAGE)
    now += 20
    assert await weights.of(7) == Mapped()
