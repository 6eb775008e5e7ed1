"""Session actors' processes wake up rarely: the library that sees to it, and who loads it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from phi_cluster.cluster.session.signal_timer import find_library, rare_signal_checks

LIBRARY = Path("/opt/x/_signal_timer.so")
# What is left of timers of so many milliseconds, in ms, once they were set by the main thread and by another one.
SCRIPT = """
import ctypes, json, threading

class Timer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("every_sec", "every_ns", "sec", "ns")]

libc = ctypes.CDLL(None, use_errno=True)

def left(ms, flags=0, every_ms=0):
    fd, set_to, now = libc.timerfd_create(1, 0), Timer(0, every_ms * 10**6, *divmod(ms * 10**6, 10**9)), Timer()
    assert libc.timerfd_settime(fd, flags, ctypes.byref(set_to), None) == 0
    assert libc.timerfd_gettime(fd, ctypes.byref(now)) == 0
    return now.sec * 1000 + now.ns / 1e6

main, other = {}, {}
def measure(to):
    for ms in (0, 10, 19, 20, 300, 5000):
        to[ms] = left(ms)
    to["again and again"] = left(10, every_ms=10)
measure(main)
thread = threading.Thread(target=measure, args=(other,))
thread.start()
thread.join()
assert libc.timerfd_settime(-1, 0, ctypes.byref(Timer(0, 0, 0, 10**7)), None) == -1
assert ctypes.get_errno() == 9
print(json.dumps([main, other]))
"""


def test_only_the_main_threads_short_timers_take_longer() -> None:
    library = find_library()
    assert library is not None, "it was not compiled"
    environment = os.environ | rare_signal_checks(os.environ, library)
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    main, other = json.loads(done.stdout)
    assert main["0"] == 0
    assert all(100 < main[short] <= 200 for short in ("10", "19"))
    for timers, untouched in ((main, ("20", "300", "5000", "again and again")), (other, tuple(other))):
        for name in untouched:
            assert timers[name] <= (10 if name.startswith("again") else int(name))
    # They did not all run out meanwhile.
    assert main["5000"] > 300
    assert other["300"] > 200 or other["5000"] > 300


def test_without_the_library_nothing_is_set() -> None:
    assert rare_signal_checks({}, None) == {}


def test_what_else_is_preloaded_stays() -> None:
    assert rare_signal_checks({}, LIBRARY) == {"LD_PRELOAD": str(LIBRARY)}
    assert rare_signal_checks({"LD_PRELOAD": ""}, LIBRARY) == {"LD_PRELOAD": str(LIBRARY)}
    assert rare_signal_checks({"LD_PRELOAD": "/a.so /b.so"}, LIBRARY) == {"LD_PRELOAD": f"{LIBRARY}:/a.so /b.so"}


@pytest.mark.parametrize("path", ["/with blank/x.so", "/with:colon/x.so"])
def test_a_path_that_the_linker_would_cut_is_left_out(path: str) -> None:
    assert rare_signal_checks({}, Path(path)) == {}
