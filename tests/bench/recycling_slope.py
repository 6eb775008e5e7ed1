"""What a recycle leaves behind: the slope of every process's private memory over some thousands of them.

    phi-cluster serve &
    python tests/bench/recycling_slope.py --recycles 2000 --check

Sessions are recycled again and again (`POST /v1/sessions/{id}/recycle`), have a short turn in between, and are deleted
and begun anew now and then, so that a whole life is in it. After the first `--skip` recycles (caches fill, allocators
settle) a line is fitted to the private memory (RssAnon + swap) of each process (slope.py says how): its 95 % bound must
be below `--limit` bytes a recycle.

The control: a process that leaks `--leak` bytes a recycle on purpose runs beside the others, found and measured as they
are. A measurement that does not convict it proves nothing, and fails. So that its noise is not better than theirs, each
series is also judged with that leak added to it. `--check`: exit status 1 if anything is not as it should be. The
samples go to `--samples` as JSON lines, also on the way. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from chat_load import Conversation
from memory_samples import MemorySamples
from memory_slopes import Judgement, judge, problems, show, table
from sampled_run import sampled
from server_processes import find_server, runtime_dir_of


class Recycling:
    """`sessions` of them at once, recycled until `total` is reached. `failures` are the server's words."""

    def __init__(self, client: httpx.AsyncClient, total: int, parsed: argparse.Namespace):
        self._client = client
        self._total = total
        self._parsed = parsed
        self.begun = 0
        self.done = 0
        self.turns = 0
        self.failures: list[str] = []

    async def run(self) -> None:
        await asyncio.gather(*(self._run_one() for _ in range(self._parsed.sessions)))

    async def _run_one(self) -> None:
        while self.begun < self._total:
            conversation = Conversation(self._client)
            try:
                await self._live(conversation)
            except (RuntimeError, httpx.HTTPError, TimeoutError) as error:
                self.failures.append(f"{type(error).__name__}: {error}")
                if len(self.failures) > 50:
                    raise
            with contextlib.suppress(httpx.HTTPStatusError):
                await conversation.delete()

    async def _live(self, conversation: Conversation) -> None:
        """A session from its first turn to the recycle that is its last."""
        await self._say(conversation)
        if not await conversation.gets_actor(120):
            raise TimeoutError(f"{conversation.session} was given no actor within two minutes")
        for number in range(1, self._parsed.life + 1):
            if self.begun >= self._total:
                return
            self.begun += 1
            response = await self._client.post(f"/v1/sessions/{conversation.session}/recycle")
            if response.is_error:
                raise RuntimeError(f"recycle: {response.status_code} {response.text[:200]}")
            self.done += 1
            if number % self._parsed.turn_every == 0:
                await self._say(conversation)

    async def _say(self, conversation: Conversation) -> None:
        turn = await conversation.say(4)
        self.turns += 1
        if self.turns > 1 and len(conversation.messages) > 2 and not turn.cached_tokens:
            raise RuntimeError(f"a turn of {conversation.session} after a recycle found its cache cold")


async def measure(parsed: argparse.Namespace, server_pid: int) -> tuple[MemorySamples, dict[str, Any]]:
    """Recycles, with a sample every `--every` of them."""
    samples = MemorySamples(server_pid)
    runtime_dir = runtime_dir_of(server_pid)
    files_before = _num_files(runtime_dir)
    begin = time.perf_counter()
    async with httpx.AsyncClient(base_url=parsed.url, timeout=120.0) as client:
        recycling = Recycling(client, parsed.recycles, parsed)

        def on_sample(done: int) -> None:
            if done // 100 != (done - parsed.every) // 100:
                rate = done / (time.perf_counter() - begin)
                if parsed.samples:
                    write_samples(samples, parsed.samples)
                print(f"{done} recycles, {rate:.2f} a second, {_num_files(runtime_dir)} files", flush=True)

        await sampled(recycling.run(), lambda: recycling.done, samples, parsed.every, parsed.leak, on_sample)
    if parsed.samples:
        write_samples(samples, parsed.samples)
    return samples, {
        "recycles": recycling.done,
        "turns": recycling.turns,
        "failures": recycling.failures,
        "seconds": round(time.perf_counter() - begin, 1),
        "files_before": files_before,
        "files_after": _num_files(runtime_dir),
    }


def write_samples(samples: MemorySamples, path: Path) -> None:
    """As JSON lines, whatever there is so far."""
    lines = [json.dumps({"name": name, "points": points}) for name, points in samples.series(1).items()]
    path.write_text("\n".join(lines) + "\n")


def _num_files(folder: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--server-pid", type=int)
    parser.add_argument("--recycles", type=int, default=2000)
    parser.add_argument("--skip", type=int, default=200, help="the first ones, which do not count")
    parser.add_argument("--every", type=int, default=10, help="recycles between two samples")
    parser.add_argument("--sessions", type=int, default=3, help="recycled at once")
    parser.add_argument("--life", type=int, default=40, help="recycles of a session, which is deleted then")
    parser.add_argument("--turn-every", type=int, default=5, help="recycles between two turns of a session")
    parser.add_argument("--limit", type=float, default=1000.0, help="bytes a recycle")
    parser.add_argument("--leak", type=int, default=4096, help="bytes a recycle of the control")
    parser.add_argument("--samples", type=Path, help="file for the samples, JSON lines")
    parser.add_argument("--check", action="store_true")
    parsed = parser.parse_args()
    samples, told = asyncio.run(measure(parsed, parsed.server_pid or find_server()))
    by = Judgement("recycle", parsed.recycles, parsed.skip, parsed.every, parsed.limit, parsed.leak)
    rows = judge(samples, by)
    print(f"{told['recycles']} recycles, {told['turns']} turns, {told['seconds']} s, {len(told['failures'])} failures")
    print(f"files of the server: {told['files_before']} before, {told['files_after']} after")
    show(rows, by)
    found = problems(rows, by, told["failures"])
    print("\n".join(found) or "as it should be")
    print(json.dumps({**told, "rows": table(rows), "problems": found}))
    sys.exit(1 if parsed.check and found else 0)


if __name__ == "__main__":
    main()
