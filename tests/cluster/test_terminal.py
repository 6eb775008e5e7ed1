"""What a start looks like, on a terminal and in a log."""

from __future__ import annotations

import io
import warnings

import pytest

from phi_cluster.cluster.preflight import Machine
from phi_cluster.model.model_cache import ProgressEvent

with warnings.catch_warnings():
    # Ray's own, when it is imported.
    warnings.simplefilter("ignore")
    from phi_cluster.cluster.terminal import TerminalReport


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def log() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def screen() -> Screen:
    return Screen()


def test_in_a_log_long_work_is_one_line_when_it_is_done(log: io.StringIO) -> None:
    report = TerminalReport(log)
    for done in range(0, 101, 5):
        report.progress(ProgressEvent("converting", done, 100, "SmolLM2"))
    assert log.getvalue().splitlines() == [f"converting   SmolLM2  {'█' * 24} 100%"]
    assert "\r" not in log.getvalue()
    report.progress(ProgressEvent("packing", 0, 2))
    report.progress(ProgressEvent("packing", 2, 2))
    assert len(log.getvalue().splitlines()) == 2


def test_on_a_terminal_a_bar_is_redrawn_now_and_then(screen: Screen) -> None:
    report = TerminalReport(screen)
    for done in range(1000):
        report.progress(ProgressEvent("converting", done, 1000))
    # Far fewer than a thousand times, but at once at the beginning.
    drawn = screen.getvalue().split("\r")[1:]
    assert 1 <= len(drawn) < 100
    assert drawn[0].endswith("  0%\x1b[K")
    report.progress(ProgressEvent("converting", 1000, 1000))
    assert screen.getvalue().endswith(f"{'█' * 24} 100%\x1b[K\n")


def test_work_of_unknown_length_is_shown_on_a_terminal(screen: Screen) -> None:
    report = TerminalReport(screen)
    report.progress(ProgressEvent("waiting", 0, 0, "another process is preparing it"))
    assert "another process is preparing it" in screen.getvalue()


def test_the_next_stage_is_shown_at_once(screen: Screen) -> None:
    report = TerminalReport(screen)
    report.progress(ProgressEvent("downloading", 1, 9))
    report.progress(ProgressEvent("checking", 1, 9))
    assert "checking" in screen.getvalue()


def test_bars_have_one_width(screen: Screen) -> None:
    widths = set()
    for done in (0, 1, 50, 99, 100):
        out = Screen()
        TerminalReport(out).progress(ProgressEvent("packing", done, 100, "x"))
        widths.add(len(out.getvalue().strip("\r\n").removesuffix("\x1b[K")))
    assert len(widths) == 1


def test_phases_are_lines_and_parts_share_one(log: io.StringIO) -> None:
    report = TerminalReport(log)
    report.checked(Machine(2, 24 * 2**30, 20 * 2**30, "AVX2"))
    report.cleared("ended process 5 of a server that was killed")
    report.noted("dtype is bfloat16")
    report.started("ray", 1.26)
    report.started("weights", 0.4)
    report.ready()
    report.ready()
    first, second, note, third = log.getvalue().splitlines()
    assert "2 cores, AVX2, 24 GiB" in first
    assert second == "clearing     ended process 5 of a server that was killed"
    assert note == "note         dtype is bfloat16"
    assert third == "starting     ray 1.3s  weights 0.4s"
