"""Each promise broken by hand in a history that keeps them all: the checker must see it, and nothing else."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest

from tests.chaos.checker import check
from tests.chaos.history import (
    Attempt,
    Death,
    Event,
    Expected,
    Fault,
    History,
    JournalCopy,
    JournalRow,
    Note,
    Ready,
)
from tests.chaos.promises import PROMISES
from tests.chaos.report import deaths_by_themselves, pauses, report
from tests.chaos.windows import windows_of

TOKENS = [f"w{number} " for number in range(12)]
TEXT = "".join(TOKENS)
LATER = "And then?"


def expected(script, canary, turn):
    prefixes = {n + 1: "".join(TOKENS[: n + 1]) for n in range(12)}
    return Expected(script, turn, TEXT, "length", 20 + turn, 12, canary, prefixes)


def attempt(session, script, turn, began, first=1, last=12, **fields):
    """The tokens `first` to `last` of a reply, ten a second, and its end."""
    events = [Event(began + 0.1 * n, TOKENS[n - 1], n) for n in range(first, last + 1)]
    ended = fields.pop("ended", began + 0.1 * (last + 1))
    good = {"ended": ended, "ending": "done", "status": 200, "request_id": f"{session}-{turn}", "events": events}
    good |= {"closings": 1, "dones": 1, "finish_reason": "length", "prompt_tokens": 20 + turn, "completion_tokens": 12}
    return Attempt(session, script, turn, began, **good | fields)


def broken(session, script, turn, began, last=5, **fields):
    """One whose connection ended after a few tokens."""
    bad = {"ending": "broken", "closings": 0, "dones": 0, "finish_reason": None}
    bad |= {"prompt_tokens": None, "completion_tokens": None}
    return attempt(session, script, turn, began, last=last, **bad | fields)


def row(epoch, request_id, kept, text, **fields):
    values = {"num_kept_tokens": kept // 5, "num_kept_chars": kept, "num_new_tokens": len(text) // 5}
    values |= {"num_completion_tokens": 12, "finish_reason": "length"}
    return JournalRow(epoch=epoch, request_id=request_id, text=text, **values | fields)


@pytest.fixture
def history():
    """Two conversations of two turns each; a replica dies in one's second turn, an engine in the other's."""
    kept = History(began=0.0, ended=60.0, sees_positions=True)
    kept.expected = [expected("s0", "Zorvexlin", 0), expected("s0", "Zorvexlin", 1)]
    kept.expected += [expected("s1", "Quimbaleth", 0), expected("s1", "Quimbaleth", 1)]
    kept.attempts = [
        attempt("a", "s0", 0, 1.0),
        broken("a", "s0", 1, 10.0, ended=10.6),
        attempt("a", "s0", 1, 14.0, first=6, resumed="a-1", resume_from=5),
        attempt("b", "s1", 0, 1.0),
        attempt("b", "s1", 1, 20.0, ended=27.0),
    ]
    # Silent for five seconds while its engine is replaced.
    for event in kept.attempts[4].events[6:]:
        event.at += 5.0
    kept.faults = [Fault(10.5, "kill", "replica", 7, died=10.5), Fault(20.7, "kill", "engine", 8, died=20.7)]
    kept.deaths = [Death(10.7, "replica", 7), Death(21.0, "engine", 8)]
    kept.ready = [Ready(t / 2, 503 if 21 <= t < 27 else 200) for t in range(120)]
    first = f"<user>{'Hello'}<assistant>{TEXT}<end>"
    later = f"<user>{LATER}<assistant>{TEXT}<end>"
    for session, script in (("a", "s0"), ("b", "s1")):
        rows = [row(1, f"{session}-0", 0, first), row(2, f"{session}-1", len(first), later, num_kept_tokens=9)]
        kept.journals.append(JournalCopy(30.0, session, script, 2, rows, ["Hello", TEXT, LATER, TEXT], [0, 1]))
    return kept


def test_a_history_that_keeps_them_all(history):
    assert check(history) == []
    assert "kept" in report(history, [])


def test_it_is_a_pure_function_and_survives_a_file(history, tmp_path):
    before = copy.deepcopy(history)
    check(history)
    assert history == before
    history.write(tmp_path / "history")
    assert History.read(tmp_path / "history") == history


# C1.


def forgotten(history):
    """The first reply is not in the journal."""
    rows = history.journals[0].rows
    rows[0].text = rows[0].text.replace(TEXT, "something else ")
    rows[1].num_kept_chars = len(rows[0].text)


def unacknowledged(history):
    """The journal ends before the last turn whose end was seen."""
    del history.journals[0].rows[1]


def no_journal(history):
    history.journals[0].rows.clear()
    history.journals[0].error = "no such file"


def other_history(history):
    """The second turn's prompt is shorter than what was said before."""
    history.attempts[4].prompt_tokens = 9


def forgotten_by_the_kill(history):
    history.journals.append(replace(history.journals[0], after_kill=True, rows=[]))


# C2.


def twice(history):
    events = history.attempts[0].events
    events.insert(4, Event(events[3].at, events[3].text, events[3].position))


def missing(history):
    del history.attempts[0].events[4]


def missing_at_the_end(history):
    del history.attempts[0].events[-1]


def other_text(history):
    history.attempts[4].events[8].text = "other "


def other_text_without_positions(history):
    history.sees_positions = False
    for one in history.attempts:
        for event in one.events:
            event.position = None
    other_text(history)


def other_position(history):
    """All the text, but one position is told twice."""
    history.attempts[0].events[5].position = 5


def no_position(history):
    history.attempts[0].events[5].position = None


def read_on_too_early(history):
    """The response begins before where the client was."""
    again = history.attempts[2]
    again.events.insert(0, Event(14.1, TOKENS[4], 5))


def read_on_too_late(history):
    del history.attempts[2].events[0]


def other_end(history):
    history.attempts[0].finish_reason = "stop"


def other_count(history):
    history.attempts[0].completion_tokens = 11


# C3.


def two_writers(history):
    history.journals[0].rows[1].epoch = 1


def a_writer_of_no_epoch(history):
    history.journals[0].rows[1].epoch = 3


def committed_twice(history):
    """Its second row is behind its first, instead of in its place."""
    history.journals[0].rows[1].request_id = "a-0"


def somebody_else(history):
    history.journals[0].rows[1].request_id = "who"


def goes_on_from_nothing(history):
    history.journals[0].rows[1].num_kept_tokens = 1000


# C4.


def another_ones_word(history):
    history.expected[3] = replace(history.expected[3], canary="w7")


def another_ones_word_is_stored(history):
    history.journals[0].rows[0].text += "Quimbaleth"


# C5.


def no_end(history):
    history.attempts[0].ending = "late"


def still_open(history):
    history.attempts[0].ending = "open"


def two_ends(history):
    history.attempts[0].closings = 2


def an_error_and_an_end(history):
    history.attempts[0].errors = [{"message": "no"}]


def behind_the_end(history):
    history.attempts[0].strays = 1


def broken_for_nothing(history):
    """The replica died long after."""
    history.faults[0].at = history.faults[0].died = 40.0
    history.deaths[0].at = 40.2


def broken_by_an_engine(history):
    """Clients must not notice that an engine died."""
    history.faults[0].target = "engine"
    history.deaths[0].role = "engine"


def refused_for_nothing(history):
    attempts = history.attempts
    attempts.insert(4, Attempt("b", "s1", 1, 19.0, ended=19.1, ending="refused", status=503, why="503"))


def again(began, **fields):
    """The conversation whose replica died tries to read on."""
    return Attempt("a", "s0", 1, began, resumed="a-1", resume_from=5, ended=began + 0.1, **fields)


def refused_with_another_status(history):
    history.attempts.insert(2, again(10.8, ending="refused", status=404, why="404", errors=[{"message": "no"}]))


def an_error_of_the_servers_own_in_repairs(history):
    history.attempts.insert(2, again(10.8, ending="refused", status=500, why="500", errors=[{"message": "no"}]))


def gave_up(history):
    del history.attempts[2]


def an_error(history):
    history.attempts[4] = broken("b", "s1", 1, 20.0, ending="error", dones=1, errors=[{"message": "no"}])


def slow(history):
    history.attempts[4].ended += 200.0
    history.ready.clear()


# C6.


def a_leak(history):
    history.notes.append(Note(60.0, "C6", "a segment"))


# C7.


def ready_without_steps(history):
    """A stream is silent for half a minute, and so are all others."""
    for event in history.attempts[4].events[6:]:
        event.at += 30.0
    history.attempts[4].ended += 30.0


def not_ready_again(history):
    for look in history.ready:
        if look.at > 45:
            look.status = 503


# C8.


def poison(history, met):
    """Failed as who killed two engines."""
    ends = {"ended": 26.0, "errors": [{"code": "poisonous_request"}], "dones": 1, "ending": "error"}
    history.attempts[4] = broken("b", "s1", 1, 20.0, **ends)
    history.faults += [Fault(23.0 + n, "kill", "engine", 20 + n, died=23.0 + n) for n in range(met - 1)]
    del history.journals[1]


def failed_after_one(history):
    poison(history, 1)


def went_on_after_three(history):
    history.faults += [Fault(21.5 + n, "kill", "engine", 20 + n, died=21.5 + n) for n in range(3)]


BREACHES = {
    "C1": [forgotten, unacknowledged, no_journal, other_history, forgotten_by_the_kill],
    "C2": [
        twice,
        missing,
        missing_at_the_end,
        other_text,
        other_text_without_positions,
        other_position,
        no_position,
        read_on_too_early,
        read_on_too_late,
        other_end,
        other_count,
    ],
    "C3": [two_writers, a_writer_of_no_epoch, committed_twice, somebody_else, goes_on_from_nothing],
    "C4": [another_ones_word, another_ones_word_is_stored],
    "C5": [
        no_end,
        still_open,
        two_ends,
        an_error_and_an_end,
        behind_the_end,
        broken_for_nothing,
        broken_by_an_engine,
        refused_for_nothing,
        refused_with_another_status,
        an_error_of_the_servers_own_in_repairs,
        gave_up,
        an_error,
        slow,
    ],
    "C6": [a_leak],
    "C7": [ready_without_steps, not_ready_again],
    "C8": [failed_after_one, went_on_after_three],
}


def test_there_are_breaches_of_all_promises():
    assert list(BREACHES) == list(PROMISES)


@pytest.mark.parametrize(
    ("promise", "breach"),
    [(promise, breach) for promise, breaches in BREACHES.items() for breach in breaches],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_broken_promise_is_seen(promise, breach, history):
    breach(history)
    found = check(history)
    assert {one.promise for one in found} == {promise}, found
    assert f"{promise}  " in report(history, found)
    assert "BROKEN" in report(history, found)


# What may have happened.


def test_one_on_which_two_engines_died_may_fail(history):
    poison(history, 2)
    assert check(history) == []


def test_of_two_clients_one_may_be_overtaken(history):
    said = {"errors": [{"code": "stale_epoch"}], "closings": 0, "finish_reason": None, "ending": "error"}
    history.attempts.append(attempt("b", "s1", 1, 20.0, lane=1, **said | {"completion_tokens": 12}))
    history.attempts.append(attempt("b", "s1", 1, 23.0, lane=1, request_id="b-2"))
    # Nobody who knew of the turn was killed.
    assert {breach.promise for breach in check(history)} == {"C5"}
    history.faults.append(Fault(20.5, "kill", "keeper", 30))
    assert check(history) == []
    history.attempts[-2].lane = history.attempts[-1].lane = 0
    assert {breach.promise for breach in check(history)} == {"C5"}


def test_such_a_request_is_remembered(history):
    poison(history, 2)
    later = broken("c", "s1", 1, 40.0, last=0, ending="refused", status=422, errors=[{"code": "poisonous_request"}])
    history.attempts.append(later)
    assert check(history) == []
    later.turn, history.attempts[3].turn = 0, 0
    assert {breach.promise for breach in check(history)} == {"C8"}


def test_a_client_that_left_and_read_on_leaves_two_parts(history):
    rows = history.journals[0].rows
    part = replace(rows[1], finish_reason="abort", num_completion_tokens=5)
    history.journals[0].rows = [rows[0], part, replace(rows[1], epoch=3)]
    history.journals[0].epoch = 3
    assert check(history) == []


def test_a_turn_whose_end_was_not_seen_may_be_stored_or_not(history):
    history.journals[0].acknowledged = [0]
    history.attempts[2] = broken("a", "s0", 1, 14.0, last=8, cut_by="script", ending="cut")
    assert check(history) == []
    del history.journals[0].rows[1]
    assert check(history) == []


def test_whoever_lost_a_connection_before_the_answer_may_have_been_served(history):
    history.attempts.insert(1, Attempt("a", "s0", 1, 9.9, ended=10.6, ending="broken", why="no response"))
    history.journals[0].rows[1].request_id = "who"
    assert check(history) == []


def test_repairs_may_take_a_while_but_not_for_ever(history):
    history.attempts.insert(2, again(12.0, ending="refused", status=503, why="503"))
    assert check(history) == []
    [window] = windows_of(history)
    # Ready at 13.5, and steady since then.
    assert window.covers(14.0)
    assert not window.covers(15.0)
    for look in history.ready:
        look.status = 503
    assert windows_of(history)[0].end == pytest.approx(10.4 + 75)


def test_a_proxy_without_a_server_behind_it_may_say_what_it_likes(history):
    history.attempts.insert(2, again(12.0, ending="refused", status=404, why="404 Path not found"))
    assert check(history) == []
    assert "1 times 404" in report(history, [])


def test_a_proxy_that_was_stopped_may_be_killed_for_it_later(history):
    history.faults[0] = Fault(3.0, "stop", "proxy", 7, over=5.0)
    history.deaths[0] = Death(10.5, "proxy", 7)
    assert check(history) == []


def test_a_pause_is_told_with_the_fault_that_it_is_from(history):
    waited = pauses(history)
    assert waited["kill", "replica"] == [pytest.approx(14.6 - 10.5)]
    assert waited["kill", "engine"] == [pytest.approx(5.1)]


def test_a_death_that_nobody_brought_about_is_told(history):
    assert deaths_by_themselves(history) == []
    # It went with its replica.
    history.deaths.append(Death(11.0, "engine", 9))
    assert deaths_by_themselves(history) == []
    history.deaths.append(Death(40.0, "engine", 10))
    assert deaths_by_themselves(history) == ["engine 10 at 40.0 s"]
    assert "engine 10" in report(history, [])
