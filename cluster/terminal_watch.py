"""Watching a running server from a terminal: `phi-cluster top` and `phi-cluster events`.

Owns: what is asked how often, and drawing it again in place. Knows nothing of the layout (top.py) and of the server's
inside.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from phi_cluster.cluster.client import Client
from phi_cluster.cluster.errors import PhiError, Unavailable
from phi_cluster.cluster.top import event_line, screen

_SESSIONS = "/v1/sessions?sort=kv_cache_bytes&limit=50"
# Another screen, the cursor hidden; and back.
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"


def show_top(client: Client, out: TextIO, interval: float, sleep: Callable[[float], None] = time.sleep) -> None:
    """Draws the screen again and again until it is interrupted; where `out` is no terminal, prints it once."""
    if not out.isatty():
        print("\n".join(_look(client, 200, 200)), file=out)
        return
    out.write(_ENTER)
    try:
        while True:
            size = shutil.get_terminal_size()
            try:
                lines = _look(client, size.columns, size.lines - 1)
            except Unavailable as error:
                # It may be back in a moment.
                lines = [error.message]
            out.write("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J")
            out.flush()
            sleep(interval)
    finally:
        out.write(_LEAVE)
        out.flush()


def _look(client: Client, width: int, height: int) -> list[str]:
    page = client.ask("GET", _SESSIONS)
    try:
        cluster, events = client.ask("GET", "/v1/cluster"), client.ask("GET", "/v1/events?limit=20")["data"]
    except Unavailable:
        raise
    except PhiError:
        # Not for this key, or the controller is being replaced.
        cluster, events = None, []
    return screen(cluster, page, events, width, height)


def show_events(
    client: Client,
    out: TextIO,
    limit: int,
    *,
    follows: bool,
    as_json: bool,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """The last events, oldest first, and those to come if it `follows`; as JSON one object a line."""
    for event in _events(client, limit, follows, sleep):
        print(json.dumps(event, ensure_ascii=False) if as_json else event_line(event), file=out, flush=True)


def _events(client: Client, limit: int, follows: bool, sleep: Callable[[float], None]) -> Iterator[dict[str, Any]]:
    page = client.ask("GET", f"/v1/events?limit={limit}")
    yield from page["data"]
    last, seen = page["last"], {event["id"] for event in page["data"]}
    while follows:
        try:
            for event in client.events(last):
                last = event["number"]
                # A new controller tells again what it has heard.
                if event["id"] not in seen:
                    seen.add(event["id"])
                    yield event
        except Unavailable:
            pass
        sleep(1.0)
