"""What is counted, and that what has grown is seen."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest

from phi_cluster.cluster.messages import CommitTurn
from phi_cluster.cluster.runtime_dir import RUNTIME_DIR_VARIABLE
from phi_cluster.cluster.session.sqlite_journal import SQLiteJournal
from tests.chaos.journals import copy_journal, key_of
from tests.chaos.resources import SPARE_DESCRIPTORS, Alive, Resources, count, leaks
from tests.chaos.scripts import make_scripts
from tests.chaos.talker import Conversation
from tests.chaos.victims import Census

BEFORE = Resources(
    processes={"engine": 2, "keeper": 1, "session actor": 1, "idle worker": 1},
    descriptors={"engine": 40, "keeper": 50},
    segments=1,
    sockets=3,
    shm=["plasma"],
    stored=["one"],
    other_files=["lock"],
)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"processes": BEFORE.processes | {"engine": 3}}, "3 processes of kind engine"),
        ({"processes": BEFORE.processes | {"keeper": 0}}, "one is missing"),
        ({"processes": BEFORE.processes | {"session actor": 3}}, "session actor"),
        ({"descriptors": {"engine": 41 + 2 * SPARE_DESCRIPTORS, "keeper": 50}}, "descriptors of kind engine"),
        ({"segments": 3}, "KV segments"),
        ({"sockets": 4}, "sockets"),
        ({"shm": ["plasma", "sem"]}, "sem"),
        ({"stored": ["one", "two", "three"]}, "three"),
        ({"stored": ["one"]}, "missing"),
        ({"other_files": ["lock", "left"]}, "left"),
    ],
)
def test_what_has_grown_is_seen(fields, what):
    """One conversation is open: it may hold a journal, a segment and an actor."""
    after = replace(BEFORE, **{"stored": ["one", "two"], **fields})
    [leak] = leaks(BEFORE, after, Alive(journals={"two"}, actors=1, caches=1))
    assert what in leak


def test_what_sessions_hold_by_right_is_no_leak():
    assert leaks(BEFORE, BEFORE, Alive()) == []
    processes = BEFORE.processes | {"session actor": 2, "idle worker": 2}
    descriptors = {"engine": 50, "keeper": 40}
    after = replace(BEFORE, processes=processes, descriptors=descriptors, segments=3, stored=["one", "two"])
    assert leaks(BEFORE, after, Alive(journals={"two"}, caches=2, actors=1)) == []


def test_counting(tmp_path):
    runtime, state = tmp_path / "r", tmp_path / "s"
    runtime.mkdir()
    (state / "sessions" / "ab").mkdir(parents=True)
    for name in ("sessions/ab/abc.sqlite", "sessions/ab/abc.sqlite-wal", "lock"):
        (state / name).touch()
    fd = os.memfd_create("phi-kv")
    again = os.dup(fd)
    environment = os.environ | {RUNTIME_DIR_VARIABLE: str(runtime)}
    command = ["ray::Keeper", "-c", "import time; print(flush=True); time.sleep(60)"]
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(runtime / "x.sock"))
        # Two descriptors of one segment are one segment.
        keeper = subprocess.Popen(
            command, executable=sys.executable, env=environment, stdout=subprocess.PIPE, pass_fds=[fd, again]
        )
        assert keeper.stdout is not None
        keeper.stdout.readline()
        found = count(Census(runtime), runtime, state)
        keeper.kill()
        keeper.communicate()
    os.close(fd)
    os.close(again)
    assert found.processes == {"keeper": 1}
    assert found.descriptors == {"keeper": 3}
    assert (found.segments, found.sockets) == (1, 1)
    assert (found.stored, found.other_files) == (["abc"], ["lock"])


@pytest.mark.parametrize("closed", [False, True])
def test_a_journal_is_read_while_it_is_used_and_when_it_is_not(closed, tmp_path):
    talk = Conversation("one", make_scripts(1)[3])
    assert talk.script.key is not None
    key = key_of(talk)
    journal = SQLiteJournal(tmp_path, key, "fingerprint", lambda: 0.0)
    epoch = journal.take_epoch().epoch
    ids = b"\1\0\0\0\2\0\0\0"
    turn = CommitTurn(key, epoch, "request", 0, 0, ids, "text", ((4, 2),), 1, 0, 1, "length", {}, 0.0)
    journal.commit(turn)
    if closed:
        journal.close()
    files = sorted(tmp_path.rglob("*.sqlite*"))
    copy = copy_journal(tmp_path, talk)
    journal.close()
    assert (copy.error, copy.epoch) == ("", 1)
    [row] = copy.rows
    assert (row.request_id, row.text, row.num_new_tokens, row.num_completion_tokens) == ("request", "text", 2, 1)
    if closed:
        assert sorted(tmp_path.rglob("*.sqlite*")) == files


def test_a_journal_that_is_not_there_is_not_made(tmp_path):
    assert copy_journal(tmp_path, Conversation("one", make_scripts(1)[0])).error
    assert not list(tmp_path.iterdir())
