"""heap.py: what a process gives back, measured in one of its own."""

from __future__ import annotations

import subprocess
import sys

_PRELUDE = """
import os
from phi_cluster.cluster.heap import trim_heap
from phi_cluster.cluster.processes import private_bytes
"""


def told(script: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", _PRELUDE + script], capture_output=True, text=True, check=True)
    return [int(one) for one in done.stdout.split()]


def test_pages_between_what_is_used_go_back() -> None:
    [held, trimmed] = told("""
begin = private_bytes()
rows = [os.urandom(2000) for _ in range(20_000)]
# One in fifty stays: the heap's end is in use.
kept = rows[::50]
del rows
held = private_bytes()
trim_heap()
print(held - begin, private_bytes() - begin)
""")
    assert held > 30_000_000
    assert trimmed < 8_000_000
