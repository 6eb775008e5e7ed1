"""What Ctrl-C and SIGTERM mean to a process that serves: the first ends the serving, a second one the draining too.

Owns: the handlers. Knows nothing of what is ended.
"""

from __future__ import annotations

import signal
import threading


def on_signals(stop: threading.Event) -> None:
    """The first SIGINT or SIGTERM ends the serving, a second one the draining too."""

    def handle(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)


def at_once() -> None:
    """Until it serves, a signal ends it at once."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
