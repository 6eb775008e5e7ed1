"""Three minutes of faults of every kind under load, with a fixed seed: every promise is kept.

`python -m tests.chaos --minutes 30 --seed N` does the same for longer.
"""

from __future__ import annotations

import pytest

from tests.chaos.__main__ import torment
from tests.chaos.nemesis import KINDS
from tests.chaos.report import report

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SEED = 11
SECONDS = 90.0


def test_every_promise_is_kept(launch, tmp_path):
    history, breaches = torment(launch, SEED, SECONDS, print)
    # For whoever wants to know more: `python -m tests.chaos --check FILE`.
    history.write(tmp_path / "history.jsonl")
    print(report(history, breaches))
    assert not breaches
    # Faults really came, and clients really talked.
    done = {(fault.kind, fault.target) for fault in history.faults if not fault.skipped}
    assert len(done) > len(KINDS) * 0.8, sorted(set(KINDS) - done)
    assert sum(attempt.ending == "done" for attempt in history.attempts) > 20
    assert any(copy.after_kill and copy.acknowledged for copy in history.journals)
