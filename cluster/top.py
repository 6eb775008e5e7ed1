"""What `phi-cluster top` shows: the cluster, its largest sessions and its last events, on one screen.

Owns: the layout, from what the server's API answers. Knows nothing of HTTP, of how a terminal is drawn on
(terminal_watch.py), or of colours.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

_BAR = 30
_EVENTS = 8


def screen(
    cluster: Mapping[str, Any] | None,
    page: Mapping[str, Any],
    events: Sequence[Mapping[str, Any]],
    width: int = 100,
    height: int = 40,
) -> list[str]:
    """Lines of at most `width` characters, at most `height` of them. `cluster` and `events` as /v1/cluster and
    /v1/events answer (None and none of them: not for this key), `page` as /v1/sessions."""
    lines = [*_head(cluster, page), ""]
    if cluster is not None:
        lines += [*table(("PROCESS", "PID", "AGE", "PRIVATE", ""), _processes(cluster)), ""]
    tail = ["", *(event_line(one) for one in reversed(events[-_EVENTS:]))] if events else []
    room = max(height - len(lines) - len(tail), 2)
    rows = [session_row(one) for one in page["data"][: room - 1]]
    lines += table(SESSION_COLUMNS, rows) + tail
    return [_printable(line)[:width] for line in lines[:height]]


SESSION_COLUMNS = ("ID", "STATE", "TOKENS", "KV", "PROCESS", "TURNS", "ACTOR", "ENGINE")


def session_row(description: Mapping[str, Any]) -> tuple[str, ...]:
    """A session in SESSION_COLUMNS."""
    return (
        description["id"],
        description["state"],
        str(description["num_tokens"]),
        f"{description['kv_cache_bytes'] / 1e6:.1f} MB",
        f"{description['process_bytes'] / 1e6:.0f} MB" if description["process_bytes"] else "-",
        str(description["turns"]),
        str(description["actor_pid"] or "-"),
        str(description["engine_pid"] or "-"),
    )


def table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Left-aligned columns, as wide as what stands in them."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    cells = [(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in (columns, *rows)]
    return ["  ".join(row).rstrip() for row in cells]


def event_line(event: Mapping[str, Any]) -> str:
    """`21:03:04  an engine was lost (death)`"""
    at = time.strftime("%H:%M:%S", time.localtime(event["time"]))
    session = f"  {event['session_id']}" if event["session_id"] else ""
    return _printable(f"{at}  {event['text']}{session}")


def _head(cluster: Mapping[str, Any] | None, page: Mapping[str, Any]) -> list[str]:
    totals = page["totals"]
    states = ", ".join(f"{count} {state}" for state, count in totals["by_state"].items() if count)
    sessions = f"sessions  {totals['sessions']}" + (f" ({states})" if states else "")
    sizes = f"KV {_bytes(totals['kv_cache_bytes'])}, on disk {_bytes(totals['disk_bytes'])}"
    if cluster is None:
        return [f"{sessions}   {sizes}"]
    speeds = cluster["last_minute"]
    lines = [
        f"last min  {speeds['generation_tokens_per_second']:.1f} tok/s   "
        f"first token {_latency(speeds['ttft_seconds'])}   between tokens {_latency(speeds['inter_token_seconds'])}   "
        f"{cluster['requests_running']} running, {cluster['requests_waiting']} waiting",
    ]
    for node in cluster["nodes"]:
        kv = node["kv_cache"]
        used = max(kv["leased_bytes"], sum(kv["bytes_by_state"].values()))
        share = used / kv["budget_bytes"] if kv["budget_bytes"] else 0.0
        bar = "#" * round(min(share, 1.0) * _BAR)
        lines.append(
            f"node {node['id'][:8]}  KV [{bar:.<{_BAR}}] {share:.1%} of {_bytes(kv['budget_bytes'])}   "
            f"asleep {_bytes(node['hibernated_bytes'])}"
        )
    return [*lines, f"{sessions}   {sizes}"]


def _processes(cluster: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for replica in cluster["replicas"]:
        busy = f"{replica['requests_running']} running, {replica['requests_waiting']} waiting"
        rows.append(
            ("replica", str(replica["pid"]), _age(replica["age_seconds"]), _bytes(replica["private_bytes"]), busy)
        )
        if (engine := replica["engine"]) is not None:
            steps = f"{engine['steps']} steps, +{_bytes(engine['private_growth_bytes'])} since it settled"
            size = _bytes(engine["private_bytes"])
            rows.append(("engine", str(engine["pid"]), _age(engine["age_seconds"]), size, steps))
        for standby in replica["standby_engines"]:
            rows.append(("standby engine", str(standby["pid"]), "", _bytes(standby["private_bytes"]), ""))
    for node in cluster["nodes"]:
        keeper, actors = node["keeper"], node["session_actors"]
        rows.append(("keeper", str(keeper["pid"]), "", _bytes(keeper["private_bytes"]), ""))
        rows.append(("session actors", "", "", _bytes(actors["private_bytes"]), f"{actors['count']} with a session"))
    controller = cluster["controller"]
    size = _bytes(controller["private_bytes"])
    return [*rows, ("controller", str(controller["pid"]), _age(controller["age_seconds"]), size, "")]


def _bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _latency(quantiles: Mapping[str, float | None]) -> str:
    middle, high = quantiles["p50"], quantiles["p95"]
    return "-" if middle is None or high is None else f"{middle * 1000:.0f} ms (p95 {high * 1000:.0f})"


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _printable(text: str) -> str:
    """A server's text is not to move the cursor."""
    return "".join(one if one.isprintable() else "?" for one in text)
