"""Both forms of a log, and that a process logs once and in the form that was asked for."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from phi_cluster.cluster.logs import FORMAT_VARIABLE, LEVEL_VARIABLE, log_as


@pytest.fixture(autouse=True)
def ours() -> Iterator[logging.Logger]:
    """Our logger, which is left as it was."""
    logger = logging.getLogger("phi_cluster")
    handlers, level = list(logger.handlers), logger.level
    yield logger
    logger.handlers[:] = handlers
    logger.setLevel(level)


def logged(monkeypatch: pytest.MonkeyPatch, form: str, level: str) -> str:
    monkeypatch.setenv(FORMAT_VARIABLE, form)
    monkeypatch.setenv(LEVEL_VARIABLE, level)
    stream = io.StringIO()
    # Twice: a process that says it again does not log everything twice.
    log_as("engine", stream)
    log_as("engine", stream)
    logger = logging.getLogger("phi_cluster.cluster.engine.engine")
    logger.debug("too small")
    logger.info("a sequence has ended", extra={"request_id": "abc", "sequence_id": 7, "outcome": "stop", "other": "x"})
    try:
        raise ValueError("wörds\n")
    except ValueError as error:
        logger.error("a sequence failed: %s", "why", exc_info=error, extra={"request_id": "abc"})
    return stream.getvalue()


def test_json_is_one_object_a_line(monkeypatch):
    lines = [json.loads(line) for line in logged(monkeypatch, "json", "info").splitlines()]
    assert len(lines) == 2
    ended, failed = lines
    assert {name: ended[name] for name in ("level", "process", "message", "request_id", "sequence_id", "outcome")} == {
        "level": "info",
        "process": "engine",
        "message": "a sequence has ended",
        "request_id": "abc",
        "sequence_id": 7,
        "outcome": "stop",
    }
    assert "other" not in ended
    assert ended["time"].endswith("+00:00")
    assert failed["message"] == "a sequence failed: why"
    assert "ValueError: wörds" in failed["exception"]


def test_lines_to_read(monkeypatch):
    text = logged(monkeypatch, "pretty", "info")
    first = text.splitlines()[0]
    assert " INFO engine[" in first
    assert first.endswith("a sequence has ended request_id=abc sequence_id=7 outcome=stop")
    assert text.count("Traceback") == 1


def test_levels(monkeypatch):
    assert "has ended" not in logged(monkeypatch, "pretty", "warning")
    assert "too small" in logged(monkeypatch, "pretty", "debug")


def test_without_a_server_s_word_warnings_are_lines_to_read(monkeypatch):
    monkeypatch.delenv(FORMAT_VARIABLE, raising=False)
    monkeypatch.delenv(LEVEL_VARIABLE, raising=False)
    stream = io.StringIO()
    log_as("keeper", stream)
    logging.getLogger("phi_cluster.cluster").warning("hm")
    assert " WARNING keeper[" in stream.getvalue()
