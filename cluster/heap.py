"""The heap of a process that lives for months gives back what it does not use.

Owns: how, and how often. Knows nothing of what is in the heap, and of whose it is.
"""

from __future__ import annotations

import ctypes
import threading
import time

_TRIM_SECONDS = 10.0


def keep_heap_trimmed() -> None:
    """For the rest of this process's life, in a thread of its own."""
    threading.Thread(target=_trim_for_ever, name="heap", daemon=True).start()


def trim_heap() -> None:
    """Gives pages of which nothing is in use back to the kernel, which glibc does by itself only at the heap's end. 0.1
    ms where there is little to give. Nothing where the C library cannot."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _trim_for_ever() -> None:
    while True:
        time.sleep(_TRIM_SECONDS)
        trim_heap()
