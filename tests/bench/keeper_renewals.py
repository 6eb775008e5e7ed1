"""What turns notice of a keeper that is renewed: time to first token inside and outside of renewals.

    python tests/bench/keeper_renewals.py
    python tests/bench/keeper_renewals.py --actors 0      # the keeper holds all sessions

A server of its own, whose keeper may not grow at all: once it has settled (a minute), it is renewed for the first page
that it takes, by the controller as always. Sessions meanwhile have turn after turn with pauses of a second or so
between them, and are deleted and begun anew now and then, which makes it grow. A renewal is the second before and
behind the moment from which the successor serves (its event `keeper_started`). A turn is inside if it waited for its
first token in that time; the first turn of a session behind a renewal is counted by itself; all others are outside. The
last line is JSON; exit status 1 if a turn failed or there were too few renewals in `--seconds`.

Owns: the turns, and the watch over the keeper. Knows nothing of how a keeper is renewed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import time
from collections.abc import Sequence
from typing import Any

import httpx
from chat_load import Conversation, Turn
from multi_turn import percentile
from own_server import own_server

_TOKENS = 16
# A conversation's turns before it is deleted.
_TURNS = 30
_PAUSE_SECONDS = 1.0
# The controller asks keepers for their events once a second.
_ASK_SECONDS = 0.5
_AROUND_SECONDS = 1.0


class Renewals:
    """Of one server's keeper. `periods`: begin and end of each, in seconds of the wall clock."""

    def __init__(self, client: httpx.AsyncClient):
        self._client = client
        self.periods: list[tuple[float, float]] = []

    async def watch(self, number: int) -> None:
        """Until there were so many."""
        seen = await self._starts()
        while len(self.periods) < number:
            await asyncio.sleep(_ASK_SECONDS)
            for moment in sorted(await self._starts() - seen):
                seen.add(moment)
                self.periods.append((moment - _AROUND_SECONDS, moment + _AROUND_SECONDS))
                print(f"renewal {len(self.periods)}", flush=True)

    async def _starts(self) -> set[float]:
        answer = await self._client.get("/v1/events", params={"limit": 100})
        events = answer.raise_for_status().json()["data"]
        return {float(event["time"]) for event in events if event["kind"] == "keeper_started"}


class Talks:
    """`turns`: of each user one after the other, with their numbers in the conversation from 0."""

    def __init__(self, client: httpx.AsyncClient, num_sessions: int):
        self._client = client
        self.turns: list[list[tuple[int, Turn]]] = [[] for _ in range(num_sessions)]
        self.failures: list[str] = []

    async def run(self) -> None:
        """Until it is cancelled."""
        await asyncio.gather(*(self._talk(user, turns) for user, turns in enumerate(self.turns)))

    async def _talk(self, user: int, turns: list[tuple[int, Turn]]) -> None:
        rng = random.Random(user)
        while True:
            conversation = Conversation(self._client)
            for number in range(_TURNS):
                try:
                    turn = await conversation.say(_TOKENS)
                except (RuntimeError, httpx.HTTPError) as error:
                    self.failures.append(f"{type(error).__name__}: {error}")
                    break
                turns.append((number, turn))
                await asyncio.sleep(rng.uniform(0.0, 2 * _PAUSE_SECONDS))
            with contextlib.suppress(httpx.HTTPError):
                await conversation.delete()


def sort_turns(
    users: Sequence[Sequence[tuple[int, Turn]]], periods: Sequence[tuple[float, float]]
) -> dict[str, list[float]]:
    """Times to first token in seconds. `periods` by the clock of the turns."""
    places: dict[str, list[float]] = {"inside": [], "first_after": [], "outside": []}
    for turns in users:
        # Renewals that the session has had a turn behind.
        seen = 0
        for number, turn in turns:
            over = sum(end < turn.begin for _, end in periods)
            if any(begin <= turn.times[0] and turn.begin <= end for begin, end in periods):
                place, over = "inside", over + 1
            else:
                # A new session has nothing that a keeper could have put away.
                place = "first_after" if number and over > seen else "outside"
            seen = over
            places[place].append(turn.time_to_first_token)
    return places


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    if not seconds:
        return {"turns": 0}
    return {
        "turns": len(seconds),
        **{f"ttft_ms_p{percent}": round(percentile(seconds, percent) * 1000) for percent in (50, 99)},
        "ttft_ms_max": round(max(seconds) * 1000),
    }


async def measure(url: str, parsed: argparse.Namespace) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=parsed.sessions + 4)
    async with httpx.AsyncClient(base_url=url, timeout=120.0, limits=limits) as client:
        renewals, talks = Renewals(client), Talks(client, parsed.sessions)
        wall_ahead = time.time() - time.perf_counter()
        talking = asyncio.create_task(talks.run())
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(renewals.watch(parsed.renewals), parsed.seconds)
        # Those that wait, and the first ones behind the last renewal.
        await asyncio.sleep(10 * _PAUSE_SECONDS)
        talking.cancel()
        await asyncio.gather(talking, return_exceptions=True)
    periods = [(begin - wall_ahead, end - wall_ahead) for begin, end in renewals.periods]
    return {
        "sessions": parsed.sessions,
        "actors": parsed.actors,
        "renewals": len(periods),
        **{place: summary(seconds) for place, seconds in sort_turns(talks.turns, periods).items()},
        "failures": len(talks.failures),
        "first_failures": talks.failures[:3],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--renewals", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=600.0, help="at most, after the start")
    parser.add_argument("--actors", type=int, default=64, help="session actors at most; 0: the keeper has all sessions")
    parser.add_argument("--port", type=int, default=8000, help="of the server that is started; metrics on the next")
    parser.add_argument("--internal-ports", type=int, default=30_000, help="first of some 900 others")
    parsed = parser.parse_args()
    config = {"recycler": {"max_keeper_growth": 0}, "sessions": {"max_actors": parsed.actors}}
    with own_server(config, parsed.port, parsed.internal_ports) as (url, _):
        result = asyncio.run(measure(url, parsed))
    for place in ("outside", "first_after", "inside"):
        print(f"{place:>12}  " + "  ".join(f"{name} {value}" for name, value in result[place].items()))
    print(json.dumps(result))
    return 1 if result["failures"] or result["renewals"] < parsed.renewals else 0


if __name__ == "__main__":
    sys.exit(main())
