"""Whether the promises were kept: a pure function of what happened.

Owns: the promises C1 to C5, C7 and C8 as they show in a history (C6 is counted while the server still runs, and comes
as notes). Knows nothing of servers, and takes nothing for granted: what a client could not see may have happened.
"""

from __future__ import annotations

import itertools
from bisect import bisect
from collections import defaultdict
from collections.abc import Iterator

from tests.chaos.history import Attempt, Event, Expected, History
from tests.chaos.promises import Breach
from tests.chaos.stored import check_journal
from tests.chaos.talker import OVERTAKEN
from tests.chaos.windows import Window, windows_of

POISON_CODE = "poisonous_request"
# A turn with all its attempts.
TURN_SECONDS = 150.0
# /ready looks at the last 15 seconds, and clients see a token a moment later.
READY_SECONDS = 22.0
# What a client sees is so much older, and what the census sees.
_CLIENT_SLACK = 0.3
_CENSUS_SLACK = 1.0


def check(history: History) -> list[Breach]:
    """All breaches, in order of the promises."""
    chains = _chains(history)
    expected = {(one.script, one.turn): one for one in history.expected}
    windows = windows_of(history)
    found = [Breach(note.promise, note.what) for note in history.notes]
    for chain in chains:
        wanted = expected.get((chain[0].script, chain[0].turn))
        if wanted is None:
            continue
        found += _exactly_once(chain, wanted, history.sees_positions)
        found += _endings(chain, windows, history)
    found += _no_leak(history)
    for copy in history.journals:
        found += check_journal(copy, expected, history)
    found += _ready(history)
    found += _third_engine(chains, history)
    return sorted(dict.fromkeys(found), key=lambda breach: breach.promise)


def _chains(history: History) -> list[list[Attempt]]:
    """The attempts at each turn, each client's of its own, in order."""
    found: dict[tuple[str, int, int], list[Attempt]] = defaultdict(list)
    for attempt in sorted(history.attempts, key=lambda attempt: attempt.began):
        found[attempt.session, attempt.turn, attempt.lane].append(attempt)
    return list(found.values())


def _name(attempt: Attempt) -> str:
    return f"{attempt.session} turn {attempt.turn} lane {attempt.lane} request {attempt.request_id}"


# C2: what a client has of a reply is what an undisturbed run said, up to the same position.


def _exactly_once(chain: list[Attempt], wanted: Expected, sees_positions: bool) -> Iterator[Breach]:
    text, position = "", 0
    for attempt in chain:
        if attempt.resumed is None:
            text, position = "", 0
        elif attempt.resume_from != position:
            yield Breach("C2", f"{_name(attempt)}: the client read on from {attempt.resume_from}, not {position}")
        for event in attempt.events:
            text += event.text
            if sees_positions:
                why = _position(event, position, text, wanted)
                if why:
                    yield Breach("C2", f"{_name(attempt)}: {why}")
                    return
                assert event.position is not None
                position = event.position
        if not wanted.text.startswith(text):
            at = next((i for i, (a, b) in enumerate(zip(text, wanted.text, strict=False)) if a != b), len(wanted.text))
            said = text[max(at - 20, 0) : at + 20]
            ought = wanted.text[max(at - 20, 0) : at + 20]
            yield Breach("C2", f"{_name(attempt)}: from character {at} on it says {said!r}, not {ought!r}")
            return
        if attempt.ending == "done":
            yield from _whole(attempt, text, wanted)


def _position(event: Event, before: int, text: str, wanted: Expected) -> str:
    if event.position is None:
        return f"text without a position behind {before}"
    if event.position <= before:
        return f"position {event.position} came behind {before}"
    ought = wanted.prefixes.get(event.position)
    if ought is not None and ought != text:
        return f"at position {event.position} it says {text[-40:]!r}, not {ought[-40:]!r}"
    return ""


def _whole(attempt: Attempt, text: str, wanted: Expected) -> Iterator[Breach]:
    if text != wanted.text:
        yield Breach("C2", f"{_name(attempt)}: {len(wanted.text) - len(text)} characters are missing at the end")
    if attempt.finish_reason != wanted.finish_reason:
        yield Breach("C2", f"{_name(attempt)}: finish_reason {attempt.finish_reason}, not {wanted.finish_reason}")
    if attempt.completion_tokens != wanted.completion_tokens:
        has, ought = attempt.completion_tokens, wanted.completion_tokens
        yield Breach("C2", f"{_name(attempt)}: {has} completion tokens, not {ought}")
    if attempt.prompt_tokens != wanted.prompt_tokens:
        # Its history is not what was said before.
        yield Breach("C1", f"{_name(attempt)}: {attempt.prompt_tokens} prompt tokens, not {wanted.prompt_tokens}")


# C5: how requests end.


def _endings(chain: list[Attempt], windows: list[Window], history: History) -> Iterator[Breach]:
    for attempt in chain:
        name = _name(attempt)
        dones, closings, errors = attempt.dones, attempt.closings, len(attempt.errors)
        if attempt.strays:
            yield Breach("C5", f"{name}: {attempt.strays} events behind [DONE]")
        if attempt.ending in ("open", "late"):
            yield Breach("C5", f"{name}: no end within {attempt.ended - attempt.began:.0f} s ({attempt.why})")
        elif attempt.ending == "done" and (dones, closings, errors) != (1, 1, 0):
            yield Breach("C5", f"{name}: {dones} times [DONE], {closings} closing chunks, {errors} errors")
        elif _is_overtaken(attempt, history):
            continue
        elif attempt.ending == "error":
            if (dones, closings, errors) != (1, 0, 1):
                yield Breach("C5", f"{name}: {dones} times [DONE], {closings} closing chunks, {errors} errors")
            yield from _error(attempt, history)
        elif attempt.ending == "refused" and _is_poison(attempt):
            yield from _error(attempt, history)
        elif attempt.ending in ("refused", "broken"):
            repairing = any(window.covers(attempt.ended) for window in windows)
            # While there is no way to the server, a proxy may say what it likes: the server itself only 503.
            if not repairing or (attempt.errors and attempt.status != 503):
                fault = _last_fault(history, attempt.ended)
                yield Breach("C5", f"{name}: {attempt.ending} ({attempt.why}); the last fault: {fault}")
    last = chain[-1]
    if last.ending not in ("done", "error") and last.cut_by != "script" and not _is_poison(last):
        yield Breach("C5", f"{_name(last)}: its client gave up ({last.ending}: {last.why})")
    if last.ended - chain[0].began > TURN_SECONDS:
        yield Breach("C5", f"{_name(last)}: the turn took {last.ended - chain[0].began:.0f} s")


def _is_overtaken(attempt: Attempt, history: History) -> bool:
    """Whether another client asked for the same turn and it was right to refuse this one: it wanted to read on what the
    other's reply had replaced, or whoever knew that it had the turn was killed, and it lost it to the other."""
    others = [a for a in history.attempts if (a.session, a.turn) == (attempt.session, attempt.turn)]
    if attempt.error_code not in OVERTAKEN or all(other.lane == attempt.lane for other in others):
        return False
    holders = [fault for fault in history.faults if fault.target in ("keeper", "session actor")]
    killed = any(attempt.began - 10 < fault.at < attempt.ended for fault in holders)
    return killed or (attempt.error_code == "reply_gone" and attempt.resumed is not None)


def _last_fault(history: History, moment: float) -> str:
    before = [fault for fault in history.faults if fault.at <= moment and not fault.skipped]
    return f"{before[-1].kind} {before[-1].target}, {moment - before[-1].at:.1f} s before" if before else "none"


def _is_poison(attempt: Attempt) -> bool:
    return attempt.error_code == POISON_CODE


def _asks_the_same(one: Attempt, other: Attempt) -> bool:
    return (one.script, one.turn) == (other.script, other.turn)


def _error(attempt: Attempt, history: History) -> Iterator[Breach]:
    said = attempt.errors[0] if attempt.errors else {}
    if not _is_poison(attempt):
        yield Breach("C5", f"{_name(attempt)}: an error: {said.get('message', said)}")
        return
    if any(_is_poison(a) and a.ended < attempt.ended and _asks_the_same(a, attempt) for a in history.attempts):
        # Such a request is remembered, whoever sends it; whether the first one failed by right is looked at there.
        return
    since = attempt.events[-1].at if attempt.events else attempt.began
    met = _engine_deaths(history, since - _CENSUS_SLACK, attempt.ended + _CENSUS_SLACK)
    if met < 2:
        yield Breach("C8", f"{_name(attempt)}: failed as poisonous, but met {met} deaths of engines without a token")


# C8: nobody is tried on a third engine.


def _engine_deaths(history: History, begin: float, end: float) -> int:
    """Deaths of engines that served, by the nemesis or by themselves, within a time."""
    standing_by = {fault.pid for fault in history.faults if fault.target == "standby engine"}
    served = [d for d in history.deaths if d.role == "engine" and d.pid not in standing_by]
    killed = {f.pid: f.died for f in history.faults if f.target == "engine" and f.died is not None}
    moments = {death.pid: death.at for death in served} | killed
    return sum(begin <= moment <= end for moment in moments.values())


def _third_engine(chains: list[list[Attempt]], history: History) -> Iterator[Breach]:
    for chain in chains:
        for attempt in chain:
            if attempt.status != 200:
                continue
            moments = [attempt.began, *(event.at for event in attempt.events)]
            for before, after in itertools.pairwise(moments):
                met = _engine_deaths(history, before + _CLIENT_SLACK, after - _CLIENT_SLACK)
                if met > 2:
                    yield Breach("C8", f"{_name(attempt)}: went on after {met} deaths of engines without a token")


# C4: no byte of one session in another.


def _no_leak(history: History) -> Iterator[Breach]:
    canaries = {one.canary.lower(): one.script for one in history.expected}
    for attempt in history.attempts:
        said = attempt.text.lower()
        for canary, script in canaries.items():
            if script != attempt.script and canary in said:
                yield Breach("C4", f"{_name(attempt)} says {canary!r}, a word of conversation {script}")
    for copy in history.journals:
        stored = "".join(row.text for row in copy.rows).lower()
        for canary, script in canaries.items():
            if script != copy.script and canary in stored:
                yield Breach("C4", f"the journal of {copy.session} holds {canary!r}, a word of conversation {script}")


# C7: ready means that a step has been computed lately.


def _ready(history: History) -> Iterator[Breach]:
    if history.ready and all(look.status != 200 for look in history.ready if look.at > history.ready[-1].at - 10):
        yield Breach("C7", "the server is not ready again at the end")
    moments = sorted(event.at for attempt in history.attempts for event in attempt.events)
    for look in history.ready:
        begin = look.at - READY_SECONDS
        if look.status != 200 or bisect(moments, begin) < bisect(moments, look.at):
            continue
        # Those that an engine had in hand all the time: it computed nothing for any of them.
        waiting = [a for a in history.attempts if a.events and a.events[0].at < begin and a.ended > look.at]
        if waiting:
            yield Breach("C7", f"ready, but {len(waiting)} streams had no token for {READY_SECONDS:g} s")
            return
