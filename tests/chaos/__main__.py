"""Chaos for as long as you like: a server of its own, faults under load, and a verdict.

    python -m tests.chaos --minutes 30 --seed 7

From the repository's root. The server is killed as a whole and started again every few minutes, and conversations go on
with the next one. Prints a table of faults, pauses and promises (* marks faults that may break connections) and exits
with 1 if a promise was broken. `--history FILE` keeps everything that happened; `--check FILE` judges it again.

Owns: the command line. Knows nothing of what happens in a run.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.chaos.checker import check
from tests.chaos.history import History, Note
from tests.chaos.nemesis import make_schedule
from tests.chaos.promises import Breach
from tests.chaos.report import report
from tests.chaos.run import Run
from tests.chaos.scripts import make_scripts
from tests.conftest import Launch

CONFIG: dict[str, Any] = {
    "dtype": "int8",
    "engine": {"standby_engines": 1, "hang_timeout": "3s"},
    "sessions": {"spawn_interval": "500ms"},
}
# At most so long with one server.
_ROUND_SECONDS = 300.0


def torment(
    launch: Callable[..., Any],
    seed: int,
    seconds: float,
    log: Callable[[str], None],
    config: Mapping[str, Any] = CONFIG,
) -> tuple[History, list[Breach]]:
    """Faults for so many seconds, on one server after the other; the last one is stopped as users do."""
    server = launch(config)
    run = Run(server, seed, make_scripts(seed), log)
    asyncio.run(run.learn())
    rounds = max(round(seconds / _ROUND_SECONDS), 1)
    for number in range(rounds):
        asyncio.run(run.disturb(make_schedule(seed + number, seconds / rounds)))
        server.kill_all()
        run.killed()
        log("killed everything")
        server = run.server = launch(config, server.state_dir, like=server)
    asyncio.run(run.go_on())
    try:
        server.stop()
    except AssertionError as error:
        run.history.notes.append(Note(time.monotonic(), "C6", f"behind the end: {error}"))
    return run.history, check(run.history)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--history", type=Path, help="write what happened to this file (JSON lines)")
    parser.add_argument("--check", type=Path, help="judge such a file, and start nothing")
    parsed = parser.parse_args()
    if parsed.check:
        history = History.read(parsed.check)
        breaches = check(history)
    else:
        folder = Path(tempfile.mkdtemp(prefix="chaos-"))
        launch = Launch(lambda name: Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder)))
        try:
            history, breaches = torment(launch, parsed.seed, parsed.minutes * 60, lambda text: print(text, flush=True))
        finally:
            launch.close()
            shutil.rmtree(folder, ignore_errors=True)
        if parsed.history:
            history.write(parsed.history)
    print(report(history, breaches))
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())
