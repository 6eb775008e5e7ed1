"""A headless Chromium of the system's, for as long as several tests need it.

Owns: the process and its folder. Knows nothing of pages: who connects makes contexts of its own in it.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

_LISTENS = re.compile(r"DevTools listening on (ws://\S+)")


class Chromium:
    """Runs from its construction to `close`; `address` is where it is told what to do (Chrome's DevTools, loopback)."""

    def __init__(self, executable: str, folder: Path):
        """Raises RuntimeError if it does not start; then its last words are in `folder`/log."""
        log = folder / "log"
        options = ["--headless", "--no-sandbox", "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage"]
        command = [executable, *options, "--remote-debugging-port=0", f"--user-data-dir={folder / 'profile'}"]
        with log.open("wb") as errors:
            self._process = subprocess.Popen([*command, "about:blank"], stdout=errors, stderr=errors)
        self.address = self._wait(log)

    def _wait(self, log: Path) -> str:
        for _ in range(600):
            if (found := _LISTENS.search(log.read_text(errors="replace"))) is not None:
                return found[1]
            try:
                self._process.wait(0.05)
                break
            except subprocess.TimeoutExpired:
                pass
        self.close()
        raise RuntimeError(f"Chromium did not start; see {log}")

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
