"""An engine that leaks on purpose: with this folder on PYTHONPATH, each Python process of a server imports this.

Owns: the leak, in the engine whose pid is in the file that PHI_BENCH_LEAK names, for as long as it is there: so many
bytes a second as the file says behind the pid. Knows nothing of our code, which knows nothing of it.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

_PAUSE_SECONDS = 0.25


def _leak(path: Path) -> None:
    kept = []
    while True:
        time.sleep(_PAUSE_SECONDS)
        try:
            pid, nbytes_per_second = map(int, path.read_text().split())
        except (OSError, ValueError):
            continue
        if pid == os.getpid():
            # Written to, so that the pages are really there.
            kept.append(bytearray(b"\1") * int(nbytes_per_second * _PAUSE_SECONDS))


if path := os.environ.get("PHI_BENCH_LEAK"):
    threading.Thread(target=_leak, args=(Path(path),), daemon=True).start()
