"""A run as a table: faults by kind with the pauses that streams had from them, requests, and broken promises.

Owns: that text. Knows nothing of how promises are checked.
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence

from tests.chaos.history import Fault, History
from tests.chaos.promises import PROMISES, Breach
from tests.chaos.victims import HAPROXY
from tests.chaos.windows import breaks_connections

# A silence that begins later behind a fault is not from it.
_LATEST_SECONDS = 10.0
# Between two tokens of an undisturbed stream there is less than this.
_USUAL_SECONDS = 0.5
_ALIKE = 3


def pauses(history: History) -> dict[tuple[str, str], list[float]]:
    """For each kind of fault the longest silence of every stream that was open then, over reconnections too, until the
    next fault."""
    faults = sorted((fault for fault in history.faults if not fault.skipped), key=lambda fault: fault.at)
    ends = [fault.at for fault in faults[1:]] + [float("inf")]
    streams: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    for attempt in history.attempts:
        streams[attempt.session, attempt.turn, attempt.lane] += [event.at for event in attempt.events]
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for fault, end in zip(faults, ends, strict=True):
        end = min(end, fault.at + _LATEST_SECONDS)
        for moments in streams.values():
            if not moments or not moments[0] < fault.at < moments[-1]:
                continue
            # A silence that began long before the fault is an earlier one's.
            since = fault.at - _USUAL_SECONDS
            found[fault.kind, fault.target].append(
                max((b - a for a, b in itertools.pairwise(moments) if since < a < end and b > fault.at), default=0.0)
            )
    return found


def deaths_by_themselves(history: History) -> list[str]:
    """Deaths that no fault explains: of neither the nemesis's victim nor one that goes with it."""
    killed = {fault.pid for fault in history.faults if fault.pid}
    replicas = [death.at for death in history.deaths if death.role == "replica"]
    proxies = [fault.at for fault in history.faults if fault.target in (HAPROXY, "Serve controller")]
    found = []
    for death in history.deaths:
        # Engines go with their replica; whoever starts HAProxy is replaced when that is lost, or unknown to the next
        # Serve controller.
        others = {"engine": replicas, "proxy": proxies}.get(death.role, [])
        if death.pid not in killed and not any(-2 < death.at - at < 10 for at in others):
            found.append(f"{death.role} {death.pid} at {death.at - history.began:.1f} s")
    return found


def report(history: History, breaches: Sequence[Breach], promises: Sequence[str] = tuple(PROMISES)) -> str:
    """The whole table, in lines of at most 120 characters or so."""
    lines = [f"{'fault':<32} {'times':>5} {'streams':>8} {'pause p50':>10} {'p99':>7} {'max':>7}"]
    done = [fault for fault in history.faults if not fault.skipped]
    waited = pauses(history)
    for (kind, target), times in sorted(Counter((fault.kind, fault.target) for fault in done).items()):
        lines.append(_row(f"{kind} {target}", times, waited.get((kind, target), []), _breaking(done, kind, target)))
    skipped = Counter(f"{fault.kind} {fault.target}: {fault.skipped}" for fault in history.faults if fault.skipped)
    lines += [f"not done {times} times: {what}" for what, times in sorted(skipped.items())]
    endings = Counter(attempt.ending for attempt in history.attempts)
    resumed = sum(attempt.resumed is not None for attempt in history.attempts)
    tokens = sum(len(attempt.events) for attempt in history.attempts)
    copies, killed = len(history.journals), sum(copy.after_kill for copy in history.journals)
    lines.append(
        f"{len(history.attempts)} requests: {', '.join(f'{n} {ending}' for ending, n in sorted(endings.items()))}; "
        f"{resumed} read on; {tokens} pieces of text; {copies} journals read, {killed} of them after all was killed"
    )
    lines.append(f"processes that died by themselves: {', '.join(deaths_by_themselves(history)) or 'none'}")
    foreign = Counter(a.status for a in history.attempts if a.ending == "refused" and a.status and not a.errors)
    if foreign:
        said = ", ".join(f"{times} times {status}" for status, times in sorted(foreign.items()))
        lines.append(f"answers of a proxy that found nobody behind it: {said}")
    broken = Counter(breach.promise for breach in breaches)
    for promise in promises:
        lines.append(
            f"{promise}  {PROMISES[promise]:<36} {f'BROKEN {broken[promise]} times' if broken[promise] else 'kept'}"
        )
    lines += _some(breaches)
    return "\n".join(lines)


def _breaking(faults: Sequence[Fault], kind: str, target: str) -> bool:
    return any(breaks_connections(fault) for fault in faults if (fault.kind, fault.target) == (kind, target))


def _row(name: str, times: int, waited: list[float], breaking: bool) -> str:
    name += " *" * breaking
    if not waited:
        return f"{name:<32} {times:>5} {0:>8}"
    ordered = sorted(waited)
    p99 = ordered[min(int(len(ordered) * 0.99), len(ordered) - 1)]
    figures = f"{statistics.median(ordered):>8.2f} s {p99:>5.2f} s {ordered[-1]:>5.2f} s"
    return f"{name:<32} {times:>5} {len(ordered):>8} {figures}"


def _some(breaches: Sequence[Breach]) -> list[str]:
    """Of those that differ only in names and numbers a few."""
    lines, seen = [], Counter[str]()
    for breach in breaches:
        kind = breach.promise + re.sub(r"[0-9a-f]*[0-9][0-9a-f]*", "", breach.what)[:160]
        seen[kind] += 1
        if seen[kind] <= _ALIKE:
            lines.append(f"    {breach.promise}  {breach.what}")
    more = len(breaches) - len(lines)
    return [*lines, f"    and {more} more like these"] if more else lines
