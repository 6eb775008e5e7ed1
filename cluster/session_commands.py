"""`phi-cluster sessions ...`: lists sessions, and what is done with one.

Owns: which requests these commands are, and what they print. Knows nothing of the server's inside, nor of how arguments
are declared (cli.py).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from phi_cluster.cluster.client import Client
from phi_cluster.cluster.errors import StartError
from phi_cluster.cluster.session_api import SESSION_SORTS, SESSION_STATES
from phi_cluster.cluster.top import SESSION_COLUMNS, session_row, table

# Sessions a request.
_PAGE = 100


def add_filters(parser: argparse.ArgumentParser) -> None:
    """What a list of sessions may be asked for."""
    parser.add_argument("--json", action="store_true", help="list: one JSON object a line")
    parser.add_argument("--sort", choices=SESSION_SORTS, help="list: by this, the greatest first (default: by id)")
    parser.add_argument("--order", choices=["asc", "desc"], help="list: the other way round")
    parser.add_argument("--state", choices=SESSION_STATES, help="list: those in this state")
    parser.add_argument("--search", metavar="TEXT", help="list: those whose id has this in it")
    parser.add_argument("--node", metavar="ID", help="list: those in this node's memory")
    parser.add_argument("--tenant", metavar="NAME", help="list: another key's, or * for all; wants an admin's key")
    parser.add_argument("--limit", type=int, metavar="N", help="list: at most so many")


def run_sessions(parsed: argparse.Namespace) -> int:
    """Returns the exit status. Raises PhiError."""
    with Client(parsed.url, parsed.api_key) as client:
        if parsed.action == "list":
            _list(client, parsed)
            return 0
        if parsed.action == "import":
            return _import(client, parsed)
        if not parsed.id:
            raise StartError(f"phi-cluster sessions {parsed.action} needs a session's id")
        if parsed.action == "delete":
            client.ask("DELETE", f"/v1/sessions/{parsed.id}")
            print(f"deleted {parsed.id}")
        elif parsed.action == "export":
            file = parsed.file or Path(f"{parsed.id}.phisession")
            pieces = client.download(f"/v1/sessions/{parsed.id}/export{'?kv=true' if parsed.kv else ''}")
            # Conversations are private, and an earlier export is not overwritten by mistake.
            print(f"exported {parsed.id} to {file} ({_write_new(file, pieces)} bytes)")
        elif parsed.action == "show":
            for name, value in client.ask("GET", f"/v1/sessions/{parsed.id}").items():
                print(f"{name:<16} {value}")
        else:
            fields = {"id": parsed.to, "turn": parsed.turn} if parsed.action == "fork" else {}
            body = {name: value for name, value in fields.items() if value is not None}
            _print_rows([client.ask("POST", f"/v1/sessions/{parsed.id}/{parsed.action}", body)])
    return 0


def _import(client: Client, parsed: argparse.Namespace) -> int:
    if parsed.file is None:
        raise StartError("phi-cluster sessions import needs --file")
    query = f"?id={parsed.to}" if parsed.to else ""
    try:
        with parsed.file.open("rb") as file:
            imported = client.upload(f"/v1/sessions/import{query}", file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise StartError(f"cannot read {parsed.file}: {error.strerror}") from None
    _print_rows([imported])
    return 0


def _write_new(file: Path, pieces: Iterator[bytes]) -> int:
    """Returns how many bytes. What did not come whole is not left. Raises StartError, also if there is such a file, and
    what the pieces raise."""
    try:
        fd = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        try:
            with open(fd, "wb") as opened:
                return sum(opened.write(piece) for piece in pieces)
        except BaseException:
            file.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StartError(f"cannot write {file}: {error.strerror}") from None


def _list(client: Client, parsed: argparse.Namespace) -> None:
    found = list(itertools.islice(_all_sessions(client, parsed), parsed.limit))
    if parsed.json:
        for description in found:
            print(json.dumps(description, ensure_ascii=False))
    else:
        _print_rows(found)


def _all_sessions(client: Client, parsed: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Page by page, as many as are wanted."""
    wanted = {name: getattr(parsed, name) for name in ("sort", "order", "state", "search", "node", "tenant")}
    query = {"limit": min(parsed.limit or _PAGE, _PAGE)} | {name: value for name, value in wanted.items() if value}
    while True:
        page = client.ask("GET", f"/v1/sessions?{urlencode(query)}")
        yield from page["data"]
        if not page.get("has_more"):
            return
        query["after"] = page["last_id"]


def _print_rows(descriptions: list[dict[str, Any]]) -> None:
    for line in table(SESSION_COLUMNS, [session_row(one) for one in descriptions]):
        print(line)
