"""The journal on a disk that fails, "SQLite's way": every single write and sync of a script of activate, turns, clear,
close and reopen meets each kind of fault. Proven: what was acknowledged is there, what was under way is there
completely or not at all, the errors are the journal's own, the same journal goes on once the fault has gone, and a
neighbour's file stays as it was. The same for a power cut after every write: whatever of the unsynced is lost.

The loops are in journal_faults.py, a process of its own with file_faults.c preloaded.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang", "g++"))), None)
    if compiler is None:
        pytest.skip("needs a C compiler, as the kernels do")
    library = tmp_path_factory.mktemp("shim") / "file_faults.so"
    source = HERE / "file_faults.c"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-x", "c", source, "-o", library, "-ldl"], check=True
    )
    return library


@pytest.mark.parametrize(
    ("mode", "at_least"),
    [
        ("fail full", 100),
        ("fail error", 100),
        ("fail short", 100),
        ("die in", 100),
        ("die after", 100),
        ("cut", 100),
        ("cut-after-error", 20),
    ],
)
def test_every_fault_leaves_what_was_acknowledged(shim, tmp_path, mode, at_least):
    found = subprocess.run(
        [sys.executable, "-W", "error", HERE / "journal_faults.py", shim, tmp_path, *mode.split()],
        env={**os.environ, "LD_PRELOAD": str(shim)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    # The faults were really met: SQLite's own number of writes is not ours to fix.
    assert int(found.stdout) >= at_least
