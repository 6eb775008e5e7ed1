"""What a process logs, and in which form: lines to read, or JSON objects to collect.

Owns: both forms, and the variables by which the processes of a server learn which one. Knows nothing of what is logged:
no text of a prompt or reply may be, and requests are known by their ids.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import datetime, timezone
from typing import TextIO

FORMAT_VARIABLE = "PHI_CLUSTER_LOG_FORMAT"
LEVEL_VARIABLE = "PHI_CLUSTER_LOG_LEVEL"

# What may stand beside a message, by the names under which it is given as `extra`.
_FIELDS = (
    *("request_id", "session", "sequence_id", "endpoint", "outcome", "seconds", "ttft"),
    *("prompt_tokens", "cached_tokens", "completion_tokens", "queue_seconds"),
)
_OURS = "phi_cluster"


class PrettyFormatter(logging.Formatter):
    """One line: moment, level, process, room, message, and the fields behind it."""

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {process}[%(process)d] %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return " ".join([super().formatMessage(record), *(f"{name}={value}" for name, value in _fields_of(record))])


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time` (ISO 8601, UTC), `level`, `process`, `pid`, `logger`, `message`, the fields that
    the record has, and `exception`."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        told = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "pid": record.process,
            "logger": record.name,
            "message": record.getMessage(),
            **dict(_fields_of(record)),
        }
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False, default=str)


def log_as(process: str, stream: TextIO | None = None) -> None:
    """From here on this process logs as one of this kind ("replica", "engine", ...), in the form that the server's
    configuration asks for. `stream` None: where Ray has its file for the process; Serve takes `sys.stderr` over and
    drops what comes there. May be called again."""
    is_json = os.environ.get(FORMAT_VARIABLE) == "json"
    handler = logging.StreamHandler(stream or sys.__stderr__)
    handler.setFormatter(JsonFormatter(process) if is_json else PrettyFormatter(process))
    ours = logging.getLogger(_OURS)
    for before in list(ours.handlers):
        ours.removeHandler(before)
    ours.addHandler(handler)
    ours.setLevel(os.environ.get(LEVEL_VARIABLE, "warning").upper())


def _fields_of(record: logging.LogRecord) -> list[tuple[str, object]]:
    return [(name, value) for name in _FIELDS if (value := getattr(record, name, None)) is not None]
