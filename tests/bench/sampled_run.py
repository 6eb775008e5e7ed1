"""Work of a bench, with a sample of the server's memory now and then, and the control that must be seen in it.

Owns: when samples are taken, and the process that leaks on purpose meanwhile (growing_process.py). Knows nothing of the
work, and of what is made of the samples (memory_slopes.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator

from growing_process import __file__ as growing_process
from memory_samples import MemorySamples
from server_processes import runtime_dir_of

from phi_cluster.cluster.runtime_dir import RUNTIME_DIR_VARIABLE


async def sampled(
    work: Coroutine[None, None, None],
    num_done: Callable[[], int],
    samples: MemorySamples,
    every: int,
    leak: int,
    on_sample: Callable[[int], None] = lambda done: None,
) -> None:
    """Does the work, with a sample for each `every` that are done, of which `on_sample` is told. The control leaks
    `leak` bytes for each that is done. Raises what the work raises."""
    with _control(samples.server_pid, leak) as leaking:
        running = asyncio.ensure_future(work)
        told = next_sample = 0
        while not running.done():
            await asyncio.wait({running}, timeout=0.1)
            if num_done() >= next_sample:
                assert leaking.stdin is not None
                leaking.stdin.write("\n" * (num_done() - told))
                leaking.stdin.flush()
                told = num_done()
                # It has read them, and nobody is in the middle of a burst.
                await asyncio.sleep(0.05)
                samples.take(told)
                next_sample = told + every
                on_sample(told)
        await running


@contextlib.contextmanager
def _control(server_pid: int, nbytes: int) -> Iterator[subprocess.Popen[str]]:
    """A process with the server's mark that grows by `nbytes` for each line it is sent."""
    process = subprocess.Popen(
        [sys.executable, str(growing_process), str(nbytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=os.environ | {RUNTIME_DIR_VARIABLE: str(runtime_dir_of(server_pid))},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
