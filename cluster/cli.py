"""The command line: `phi-cluster serve | join | drain | environment | check | chat | sessions | top | events | keys`.

Owns: arguments, what is printed, exit statuses, and signals. Knows nothing of how serving is done: `app` does it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from phi_cluster.cluster.client import ChatAnswer, Client
from phi_cluster.cluster.config import Config, describe_config, load_config
from phi_cluster.cluster.errors import PhiError
from phi_cluster.cluster.keys import KeyFile, append_entry, entry_text, new_key
from phi_cluster.cluster.node_commands import run_drain, run_environment, run_join
from phi_cluster.cluster.processes import forbid_core_dumps
from phi_cluster.cluster.ray_environment import set_environment, token_of
from phi_cluster.cluster.runtime_dir import create_runtime_dir, remove_runtime_dir
from phi_cluster.cluster.session_commands import add_filters, run_sessions
from phi_cluster.cluster.stop_signals import at_once, on_signals
from phi_cluster.cluster.terminal_watch import show_events, show_top

_DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "smollm2.yaml"
# How often the file of keys is looked at, to tell whether it was read.
_KEYS_SECONDS = 1.0
_DEFAULT_URL = "http://127.0.0.1:8000"


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 for an error (one sentence on stderr), 130 after Ctrl-C."""
    parsed = _parser().parse_args(arguments)
    try:
        return parsed.run(parsed)
    except PhiError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output (head, a pager) has left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="phi-cluster", description="Serves Phi-3 models from KV caches that conversations own."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = _with_config(commands.add_parser("serve", help="start a server; Ctrl-C drains and stops it"))
    serve.add_argument("--print-config", action="store_true", help="print every field, its value and meaning, and end")
    serve.add_argument("--address", metavar="auto|HOST:PORT", help="serve on a Ray that runs already")
    serve.set_defaults(run=_serve)

    join = commands.add_parser("join", help="add this machine to a cluster; Ctrl-C drains it and takes it out again")
    join.add_argument("head", help="HOST:PORT of the head: its nodes.address and nodes.port")
    join.add_argument("--token-file", type=Path, help="the head's nodes.token_file (default: RAY_AUTH_TOKEN)")
    join.add_argument("--node-address", metavar="IP", help="this machine's, as others reach it (default: found out)")
    join.set_defaults(run=run_join)

    drain = commands.add_parser("drain", help="drain this machine, whose Ray somebody else has started and will end")
    drain.add_argument("--address", default="auto", metavar="auto|HOST:PORT", help="of its Ray (default: auto)")
    drain.set_defaults(run=run_drain)

    environment = commands.add_parser("environment", help="print what a Ray of your own must have in its environment")
    environment.add_argument("config", nargs="?", type=Path, default=_DEFAULT_CONFIG, help="a YAML file")
    environment.add_argument("--runtime-dir", type=Path, default=Path("/tmp/phi"), help="for sockets, on each machine")
    environment.set_defaults(run=run_environment)

    check = _with_config(commands.add_parser("check", help="find everything that would stop a start, without serving"))
    check.set_defaults(run=_check)

    chat = _with_url(commands.add_parser("chat", help="talk to a running server"))
    chat.add_argument("--session", default="chat", help="the session's name (default: chat)")
    chat.add_argument("--temperature", type=float, default=0.0)
    chat.set_defaults(run=_chat)

    sessions = _with_url(commands.add_parser("sessions", help="list sessions, or act on one"))
    actions = ["list", "show", "fork", "hibernate", "clear", "recycle", "delete", "export", "import"]
    sessions.add_argument("action", nargs="?", default="list", choices=actions)
    sessions.add_argument("id", nargs="?", help="the session, for all actions but list")
    sessions.add_argument("--to", metavar="ID", help="fork, import: the new session's id (default: one is made)")
    sessions.add_argument("--file", type=Path, help="export, import: where to (default: ID.phisession) or from")
    sessions.add_argument("--kv", action="store_true", help="export: with the KV cache, as much as an import may have")
    sessions.add_argument("--turn", type=int, help="fork: the new session ends after so many turns (default: all)")
    add_filters(sessions)
    sessions.set_defaults(run=run_sessions)

    top = _with_url(commands.add_parser("top", help="watch the cluster; prints once where there is no terminal"))
    top.add_argument("--interval", type=float, default=2.0, metavar="SECONDS", help="between two looks (default: 2)")
    top.set_defaults(run=_top)

    events = _with_url(commands.add_parser("events", help="what happened to the cluster"))
    events.add_argument("--follow", action="store_true", help="go on with what comes, until Ctrl-C")
    events.add_argument("--json", action="store_true", help="one JSON object a line")
    events.add_argument("--limit", type=int, default=100, metavar="N", help="so many that were (default: 100)")
    events.set_defaults(run=_events)

    keys = commands.add_parser("keys", help="make an API key")
    keys.add_argument("action", choices=["new"])
    keys.add_argument("name", help="of whoever will hold it: a tenant")
    keys.add_argument("--admin", action="store_true", help="may see all tenants and renew engines")
    keys.add_argument("--append", type=Path, metavar="FILE", help="add the entry to this file of keys (server.keys)")
    keys.set_defaults(run=_keys)
    return parser


def _with_config(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("config", nargs="?", type=Path, default=_DEFAULT_CONFIG, help="a YAML file")
    parser.add_argument("--model", help="folder, .gguf file, hub id, or smollm2")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    return parser


def _with_url(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--url", default=os.environ.get("PHI_CLUSTER_URL", _DEFAULT_URL))
    parser.add_argument("--api-key", default=os.environ.get("PHI_CLUSTER_API_KEY"))
    return parser


def _config(parsed: argparse.Namespace) -> Config:
    overrides = {
        "model": parsed.model,
        "server": {"host": parsed.host, "port": parsed.port},
        "nodes": {"ray_address": getattr(parsed, "address", None)},
    }
    return load_config(parsed.config, overrides)


def _serve(parsed: argparse.Namespace) -> int:
    config = _config(parsed)
    if parsed.print_config:
        print(describe_config(config))
        return 0
    out = sys.stdout
    runtime_dir = create_runtime_dir()
    try:
        # Ray prints its workers' deaths to the driver's stdout, whatever one asks of it: they are our business.
        with open(runtime_dir / "driver.log", "w") as log, contextlib.redirect_stdout(log):
            return _run_server(config, runtime_dir, out)
    finally:
        remove_runtime_dir(runtime_dir)


def _run_server(config: Config, runtime_dir: Path, out: TextIO) -> int:
    begin = time.monotonic()
    stop = threading.Event()
    at_once()
    set_environment(config, runtime_dir, token_of(config))
    forbid_core_dumps()
    # Only now: Ray reads its environment when it is imported (and the client commands need not wait for it).
    from phi_cluster.cluster.app import Server
    from phi_cluster.cluster.preparation import prepare
    from phi_cluster.cluster.terminal import TerminalReport

    report = TerminalReport(out)
    keys = None if config.keys_path is None else KeyFile(config.keys_path)
    server = Server(prepare(config, report), runtime_dir, report)
    try:
        on_signals(stop)
        report.ready()
        base = f"http://{_in_url(config.server.host)}"
        metrics = f"http://{_in_url(config.server.metrics_host)}:{config.server.metrics_port}/metrics"
        print(
            f"Ready in {time.monotonic() - begin:.1f}s   {base}:{config.server.port}/v1  ({_who_may(keys)})   "
            f"metrics {metrics}   state {config.state_path}   Ctrl-C drains",
            file=out,
            flush=True,
        )
        while not stop.wait(_KEYS_SECONDS):
            if keys is not None and (told := keys.refresh()):
                report.noted(told)
    finally:
        streams = server.num_streams()
        print(f"\ndraining {streams} stream{'' if streams == 1 else 's'} …", end=" ", file=out, flush=True)
        kept = server.stop()
        print(f"{kept} session{'' if kept == 1 else 's'} kept … stopped clean", file=out, flush=True)
    return 0


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _who_may(keys: KeyFile | None) -> str:
    if keys is None:
        return "loopback, no keys"
    return f"{len(keys.names)} key{'' if len(keys.names) == 1 else 's'}"


def _keys(parsed: argparse.Namespace) -> int:
    key = new_key()
    text = entry_text(parsed.name, key, ("admin",) if parsed.admin else ())
    if parsed.append is not None:
        append_entry(parsed.append, text)
    # The key alone on stdout, so that a script can take it.
    print(key)
    print("This is the key, shown once: nothing but its hash is kept.", file=sys.stderr)
    if parsed.append is not None:
        print(f"Its entry was added to {parsed.append}.", file=sys.stderr)
    else:
        print(f"Its entry, for the file that server.keys names, under keys:\n\n{text}", file=sys.stderr, end="")
    return 0


def _check(parsed: argparse.Namespace) -> int:
    config = _config(parsed)
    from phi_cluster.cluster.preparation import prepare
    from phi_cluster.cluster.terminal import TerminalReport

    report = TerminalReport()
    prepared = prepare(config, report)
    served = prepared.served
    print(
        f"model        {served.names[0]}, {served.dtype}, {prepared.weights_nbytes / 1e6:.0f} MB of weights, "
        f"activations {served.activation_dtype}, KV cache {served.kv_cache_dtype}, up to {served.max_model_len} tokens"
    )
    print(f"/dev/shm     {prepared.shm_nbytes / 1e6:.0f} MB: docker run --shm-size {prepared.shm_nbytes}")
    budget = prepared.plan.budget_nbytes
    print(f"memory       {budget / 1e9:.1f} GB for KV caches, {prepared.num_threads} threads an engine")
    print("ok: phi-cluster serve would start")
    return 0


def _chat(parsed: argparse.Namespace, ask: Callable[[str], str] = input) -> int:
    messages: list[dict[str, str]] = []
    with Client(parsed.url, parsed.api_key) as client:
        client.ask("GET", "/health")
        while True:
            try:
                said = ask("> ").strip()
            except EOFError:
                print()
                return 0
            if not said:
                continue
            messages.append({"role": "user", "content": said})
            reply = ""
            for piece in client.chat(messages, parsed.session, parsed.temperature):
                if isinstance(piece, ChatAnswer):
                    print(f"    {piece.summary()}", flush=True)
                else:
                    reply += piece
                    print(piece, end="", flush=True)
            messages.append({"role": "assistant", "content": reply})


def _top(parsed: argparse.Namespace) -> int:
    with Client(parsed.url, parsed.api_key) as client:
        show_top(client, sys.stdout, max(parsed.interval, 0.2))
    return 0


def _events(parsed: argparse.Namespace) -> int:
    with Client(parsed.url, parsed.api_key) as client:
        show_events(client, sys.stdout, parsed.limit, follows=parsed.follow, as_json=parsed.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
