"""The durable journal: crashes, damage, versions, and what lies on the disk."""

import os
import sqlite3
import stat

import pytest

from phi_cluster.cluster.errors import StaleEpoch
from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.session.journal import (
    JournalCorrupt,
    JournalFull,
    JournalTooNew,
    JournalUnavailable,
)
from phi_cluster.cluster.session.sqlite_file import MIGRATIONS, translated
from phi_cluster.cluster.session.sqlite_journal import journal_path, list_sessions


def fill(journal, kit, num_turns=1, num_chars=10):
    for _ in range(num_turns):
        epoch = journal.take_epoch().epoch
        kept = (num_chars * (epoch - 1), 2 * (epoch - 1))
        journal.commit(kit.turn(journal.key, epoch, "s" * num_chars, [1, 2], kept=kept))


def files(journal):
    return sorted(path.name for path in journal.path.parent.iterdir())


def test_nothing_is_touched_before_the_first_use(make_journal, key, tmp_path):
    journal = make_journal(key)
    assert not journal.exists
    assert list(tmp_path.iterdir()) == []
    journal.info()
    assert journal.exists


def test_paths_show_only_the_digest_and_are_private(make_journal, kit, tmp_path):
    key = SessionKey("tenant", "../../etc/passwd")
    journal = make_journal(key)
    old = os.umask(0)
    try:
        fill(journal, kit)
    finally:
        os.umask(old)
    assert journal.path == tmp_path / "sessions" / key.digest[:2] / f"{key.digest}.sqlite"
    assert {path.parent for path in tmp_path.rglob("*.sqlite*")} == {journal.path.parent}
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


CRASH = """
import sys, time
from pathlib import Path
from phi_cluster.cluster.messages import CommitTurn, SessionKey
from phi_cluster.cluster.session.sqlite_journal import SQLiteJournal
key = SessionKey("tenant", "demo")
journal = SQLiteJournal(Path(sys.argv[1]), key, "model-1", time.time)
epoch = journal.take_epoch().epoch
journal.commit(CommitTurn(key, epoch, "r", 0, 0, b"\\1\\0\\0\\0", "acknowledged", ((12, 1),), 1, 0, 0, "stop", {}, 1.0))
print("acknowledged", flush=True)
journal.take_epoch()
sys.stdin.read()
"""


def test_a_commit_that_was_acknowledged_survives_kill_9(make_journal, key, kit, tmp_path):
    with kit.python_child(CRASH, str(tmp_path)) as (process, words):
        assert words == ["acknowledged"]
        process.kill()
        process.wait()
    journal = make_journal(key)
    assert [turn.text for turn in journal.load()] == ["acknowledged"]
    assert journal.info().epoch - journal.load()[0].epoch in (0, 1)


def test_writes_are_synced(make_journal, key):
    journal = make_journal(key)
    journal.info()
    connection = journal._open()
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA secure_delete").fetchone() == (1,)


def test_two_holders_of_one_journal_fence_each_other(make_journal, key, kit):
    old, new = make_journal(key), make_journal(key)
    epoch = old.take_epoch().epoch
    assert new.take_epoch().epoch == epoch + 1
    with pytest.raises(StaleEpoch):
        old.commit(kit.turn(key, epoch, "old", [1]))
    new.commit(kit.turn(key, epoch + 1, "new", [1]))
    assert [turn.text for turn in old.load()] == ["new"]


def test_a_locked_journal_says_so(make_journal, key, kit):
    journal, other = make_journal(key, busy_seconds=0.0), make_journal(key)
    fill(journal, kit)
    with other._transaction(), pytest.raises(JournalUnavailable, match="locked"):
        journal.take_epoch()
    assert journal.take_epoch().epoch == 2


def test_a_full_disk_leaves_what_was_there(make_journal, key, kit):
    journal = make_journal(key)
    fill(journal, kit)
    pages = journal._open().execute("PRAGMA page_count").fetchone()[0]
    journal._open().execute(f"PRAGMA max_page_count = {pages}").fetchone()
    epoch = journal.take_epoch().epoch
    big = kit.turn(key, epoch, "x" * 100_000, [1], kept=(10, 2))
    with pytest.raises(JournalFull) as caught:
        journal.commit(big)
    assert caught.value.status == 503
    assert [turn.text for turn in journal.load()] == ["s" * 10]
    # Room again: the same commit goes through.
    journal._open().execute("PRAGMA max_page_count = 100000").fetchone()
    assert journal.commit(big)


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.1])
def test_a_truncated_file_is_a_typed_error(make_journal, key, kit, keep):
    journal = make_journal(key)
    fill(journal, kit, num_turns=5, num_chars=20_000)
    journal.close()
    os.truncate(journal.path, int(journal.path.stat().st_size * keep))
    with pytest.raises(JournalCorrupt, match=key.digest):
        make_journal(key).load()


def test_garbage_is_a_typed_error(make_journal, key, kit):
    journal = make_journal(key)
    fill(journal, kit)
    journal.close()
    journal.path.write_bytes(b"not a database, whatever it is " * 1000)
    with pytest.raises(JournalCorrupt):
        make_journal(key).take_epoch()


def test_a_damaged_row_is_a_typed_error(make_journal, key, kit):
    journal = make_journal(key)
    fill(journal, kit)
    journal._open().execute("UPDATE turns SET boundaries = x'c1'")
    with pytest.raises(JournalCorrupt):
        journal.load()


def test_another_programs_database_is_left_alone(make_journal, key):
    journal = make_journal(key)
    journal.path.parent.mkdir(parents=True)
    with sqlite3.connect(journal.path) as connection:
        connection.execute("CREATE TABLE photos (name)")
    connection.close()
    with pytest.raises(JournalCorrupt, match="another program"):
        journal.info()
    with sqlite3.connect(journal.path) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("photos",)]
    connection.close()


def test_another_sessions_file_is_refused(make_journal, key, kit):
    fill(make_journal(key), kit)
    other = SessionKey("tenant", "other")
    make_journal(key).close()
    path = make_journal(other).path
    path.parent.mkdir(parents=True, exist_ok=True)
    journal = make_journal(key)
    journal.clear()  # empties the log: the file is whole
    path.write_bytes(journal.path.read_bytes())
    with pytest.raises(JournalCorrupt, match="another session"):
        make_journal(other).load()


def test_an_unwritable_place_is_a_typed_error(make_journal, key, tmp_path):
    (tmp_path / "sessions").write_text("a file where a folder should be")
    with pytest.raises(JournalUnavailable):
        make_journal(key).info()


def test_a_newer_version_is_refused_and_an_older_one_is_brought_up(make_journal, key, kit):
    newer = (*MIGRATIONS, "ALTER TABLE turns ADD COLUMN note TEXT NOT NULL DEFAULT 'none'")
    journal = make_journal(key)
    fill(journal, kit)
    journal.close()
    upgraded = make_journal(key, migrations=newer)
    assert len(upgraded.load()) == 1
    assert upgraded._open().execute("SELECT note FROM turns").fetchall() == [("none",)]
    upgraded.close()
    with pytest.raises(JournalTooNew, match="version 3 and this program knows 2"):
        make_journal(key).load()
    assert len(make_journal(key, migrations=newer).load()) == 1


def test_a_failed_migration_changes_nothing(make_journal, key, kit):
    fill(make_journal(key), kit)
    broken = (*MIGRATIONS, "CREATE TABLE fine (x); CREATE TABLE session (x)")
    with pytest.raises(JournalCorrupt):
        make_journal(key, migrations=broken).load()
    journal = make_journal(key)
    assert len(journal.load()) == 1
    assert journal._open().execute("SELECT name FROM sqlite_master WHERE name = 'fine'").fetchall() == []


def test_closed_files_leave_one_file_and_no_descriptor(make_journal, key, kit):
    journal = make_journal(key)
    before = kit.descriptors()
    fill(journal, kit)
    journal.close()
    assert files(journal) == [journal.path.name]
    assert kit.descriptors() == before
    assert len(journal.load()) == 1


def test_delete_leaves_no_file(make_journal, key, kit):
    journal = make_journal(key)
    fill(journal, kit)
    assert len(files(journal)) == 3
    journal.delete()
    assert files(journal) == []


@pytest.mark.parametrize("how", ["clear", "supersede"])
def test_dropped_text_is_gone_from_the_disk(make_journal, key, kit, how):
    journal = make_journal(key)
    canary = "canary-" + os.urandom(8).hex()
    journal.commit(kit.turn(key, journal.take_epoch().epoch, canary * 100, [1]))
    content = b"".join(path.read_bytes() for path in journal.path.parent.iterdir())
    assert canary.encode() in content
    if how == "clear":
        journal.clear()
    else:
        journal.commit(kit.turn(key, journal.take_epoch().epoch, "else", [1]))
        journal.close()
    content = b"".join(path.read_bytes() for path in journal.path.parent.iterdir())
    assert canary.encode() not in content


def test_a_file_deleted_by_another_process_is_not_written_to(make_journal, key, kit):
    journal, other = make_journal(key), make_journal(key)
    fill(journal, kit)
    other.delete()
    other.activate(recycled=False)
    with pytest.raises(StaleEpoch):
        journal.commit(kit.turn(key, 1, "into nothing", [1], request_id="late"))
    assert journal.load() == []
    fill(other, kit)
    assert len(journal.load()) == 1


def test_sessions_are_listed_by_key(make_journal, kit, tmp_path):
    keys = {SessionKey("a", "one"), SessionKey("a", "two"), SessionKey("b", "one"), SessionKey("b", "x", True)}
    journals = {stored: make_journal(stored) for stored in keys}
    for journal in journals.values():
        fill(journal, kit)
    assert set(list_sessions(tmp_path)) == keys
    damaged = journal_path(tmp_path, SessionKey("b", "one"))
    journals[SessionKey("b", "one")].close()
    damaged.write_bytes(b"x" * 5000)
    unfinished = journal_path(tmp_path, SessionKey("c", "unfinished"))
    unfinished.parent.mkdir(exist_ok=True)
    unfinished.touch()
    errors = []
    listed = set(list_sessions(tmp_path, lambda path, error: errors.append((path, type(error)))))
    assert listed == keys - {SessionKey("b", "one")}
    assert errors == [(damaged, JournalCorrupt)]


def test_no_state_directory_means_no_sessions(tmp_path):
    assert list(list_sessions(tmp_path / "nowhere")) == []


def test_mistakes_of_ours_are_not_taken_for_damage(tmp_path):
    with pytest.raises(sqlite3.ProgrammingError), translated(tmp_path):
        raise sqlite3.ProgrammingError("misuse")
