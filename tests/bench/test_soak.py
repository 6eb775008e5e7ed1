"""What a soak tells: lines of memory over time, and times by what returning turns found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def test_series_are_drawn_over_the_same_time() -> None:
    from text_plot import draw

    growing = [(float(x), float(x)) for x in range(0, 80)]
    short = [(x, 5.0) for x, _ in growing[60:]]
    lines = draw({"growing": growing, "short": short, "nothing": [(0.0, 0.0)]}, 8, "MB")
    assert lines[0].endswith("MB, 79 s from left to right")
    assert lines[1].split() == ["growing", "0", "79", "79", "▂▃▄▄▅▆▇█"]
    # Where it was not, it is blank.
    assert lines[2].endswith("5" + 7 * " " + "██")
    assert lines[3].split() == ["nothing", "0", "0", "0", "▁"]
    assert draw({}, 8, "MB") == []


def test_a_returning_turn_counts_by_what_it_found() -> None:
    from chat_load import Turn
    from soak import Soak, told

    soak = Soak(None, 1.0, seed=1)
    for state, cached in ((None, 0), ("active", 7), ("held", 7), ("hibernated", 7), ("hibernated", 0), ("stored", 0)):
        soak._take(Turn(0.0, times=[0.5], cached_tokens=cached), state)
    assert {name: len(times) for name, times in soak.found.items()} == {"warm": 2, "woken": 1, "replayed": 2}
    assert soak.first_turns == [0.5]
    assert told([0.3, 0.1, 0.2]) == {"turns": 3, "p50_ms": 200, "p99_ms": 300}
    assert told([]) == {"turns": 0}


def test_memory_is_told_by_halves() -> None:
    from soak import halves

    assert halves([(0.0, 3.0), (5.0, 9.0), (10.0, 4.0), (15.0, 5.0)]) == (9.0, 5.0)
    assert halves([(0.0, 3.0)]) == (3.0, 3.0)


@pytest.mark.cluster
@pytest.mark.slow
def test_two_minutes_of_it(launch: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Users come back to sessions that are recycled and hibernate all the time: nothing fails, nothing piles up."""
    from soak import CONFIG, main

    server = launch(CONFIG)
    where = ["--url", server.url, "--server-pid", str(server.main.pid)]
    status = main(["--minutes", "2", "--users", "60", "--think", "15", *where])
    printed = capsys.readouterr().out
    told = json.loads(printed.splitlines()[-1])
    assert (status, told["failures"]) == (0, 0), printed
    # There was something to fail.
    assert min(told[found]["turns"] for found in ("warm", "woken")) > 0, printed
    before, after = told["most_mb"]
    # Session actors are bounded, and so are the caches: engines, which come and go, are the noise.
    assert after < before + 400, printed
    server.stop()
