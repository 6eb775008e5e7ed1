"""When connections may break: from the death of a replica or of the way to it until the server is itself again.

Owns: which faults break connections, and these spans of time. Knows nothing of what clients saw in them.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.chaos.history import Fault, History
from tests.chaos.victims import HAPROXY

# However slow a machine is: after so long it is not the fault any more.
LONGEST_SECONDS = 75.0
# A process that was stopped may be killed for it by whoever watches it, so much later.
_DELAYED_DEATH_SECONDS = 20.0
# So long it must have been ready without a break.
_STEADY_SECONDS = 2.0
_SLACK_SECONDS = 1.0


@dataclass(frozen=True)
class Window:
    """From `begin` to `end`, because of a fault."""

    begin: float
    end: float
    fault: Fault

    def covers(self, moment: float) -> bool:
        return self.begin <= moment <= self.end


def breaks_connections(fault: Fault) -> bool:
    """Whether it ends the process that holds the clients' connections, or one before that. Serve ends a proxy that
    does not answer for a moment."""
    if fault.skipped:
        return False
    return (fault.kind, fault.target) in {("kill", "replica"), ("kill", HAPROXY), ("kill", "proxy"), ("stop", "proxy")}


def windows_of(history: History) -> list[Window]:
    found = []
    for fault in history.faults:
        if breaks_connections(fault):
            begin = fault.at - 0.1
            found.append(Window(begin, min(_recovered_at(history, fault), begin + LONGEST_SECONDS), fault))
    return found


def _recovered_at(history: History, fault: Fault) -> float:
    """When it has said that it is ready for a while, behind the last that is known of the fault."""
    late = [d.at for d in history.deaths if d.pid == fault.pid and 0 <= d.at - fault.at < _DELAYED_DEATH_SECONDS]
    behind = max([fault.at, fault.over or 0.0, fault.died or 0.0, *late]) + _SLACK_SECONDS
    steady_since: float | None = None
    for look in history.ready:
        if look.at < behind:
            continue
        if look.status != 200:
            steady_since = None
        elif steady_since is None:
            steady_since = look.at
        elif look.at - steady_since >= _STEADY_SECONDS:
            return steady_since + _SLACK_SECONDS
    return float("inf")
