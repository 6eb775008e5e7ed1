"""A whole run against a fake server: who talks when, and what is looked at."""

from __future__ import annotations

import pytest

from tests.chaos import run as module
from tests.chaos.checker import check
from tests.chaos.fake_server import said
from tests.chaos.nemesis import Plan
from tests.chaos.run import CONCURRENT, Run
from tests.chaos.scripts import Script, Turn, make_scripts

TURN = Turn("How are you?", {"max_tokens": 12})


def test_scripts_are_the_same_for_the_same_seed():
    scripts = make_scripts(1)
    assert make_scripts(1) == scripts != make_scripts(2)
    assert len({script.canary for script in scripts}) == len(scripts) == 12
    turns = [turn for script in scripts for turn in script.turns]
    assert any(turn.cut_at for turn in turns)
    assert any(turn.twice for turn in turns)
    assert all(turn.cut_at is None or not turn.twice for turn in turns)
    assert all("seed" in turn.fields or turn.fields["temperature"] == 0 for turn in turns)
    assert {script.key for script in scripts} == {None, "another"}


async def test_a_run_learns_what_undisturbed_clients_hear(fake):
    script = Script("s0", "Zorvexlin", (Turn("How are you?", {"max_tokens": 40}, cut_at=4, twice=True), TURN))
    run = Run(fake, 1, [script], print)
    await run.learn()
    assert run.history.expected == said(script)
    assert run.history.sees_positions
    # Once each, and its session is deleted.
    assert len(fake.requests) == 3


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(module, "QUIET_SECONDS", 0.2)
    monkeypatch.setattr(module, "_SETTLE_SECONDS", 0.0)


async def test_a_run_from_beginning_to_end(fake, tmp_path, quick):
    fake.state_dir = fake.runtime_dir = tmp_path
    fake.gap = 0.002
    logged: list[str] = []
    run = Run(fake, 1, make_scripts(1), logged.append)
    await run.learn()
    assert len(run.history.expected) == sum(len(script.turns) for script in run.scripts)
    await run.disturb([Plan("cut rst", "client", 0.3, number=n) for n in range(4)])
    # Each client's last conversation stays open.
    assert len(run.open) == CONCURRENT
    assert not any(talk.failed for talk in run.open)
    run.killed()
    await run.go_on()
    assert not run.open
    assert {attempt.cut_by for attempt in run.history.attempts} == {None, "script", "nemesis"}
    assert {look.status for look in run.history.ready} == {200}
    # There are no journals, and of those nobody could have made any.
    whats = [breach.what for breach in check(run.history)]
    assert whats
    assert all("the journal of" in what for what in whats)
    assert "quiet" in logged[-3]
