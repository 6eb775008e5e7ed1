"""A journal whose file was damaged: cut off, or with one bit flipped, at every byte of its headers and many others.

Proven: opening it gives one of the journal's errors or a state that the journal once acknowledged; never another error,
never a changed token or count. SQLite has no checksums over its pages, so the journal's own are proven here, also for
journals that were written before it had any.
"""

import contextlib
import dataclasses
import os

import pytest

from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.session.journal import (
    JournalCorrupt,
    JournalTooNew,
    JournalUnavailable,
    MemoryJournal,
)
from phi_cluster.cluster.session.sqlite_file import MIGRATIONS
from phi_cluster.cluster.session.sqlite_journal import SQLiteJournal

SUFFIXES = ("", "-wal", "-shm")
PAGE = 4096


def state(journal):
    return journal.info(), journal.load()


def script(kit):
    """Steps: counts, a turn, one that is longer than a page, one that supersedes it, one more."""

    def commit(epoch, text, token_ids, kept=(0, 0)):
        return lambda journal: journal.commit(kit.turn(journal.key, epoch, text, token_ids, kept=kept))

    def take_epoch(journal):
        journal.take_epoch()

    return [
        lambda journal: journal.activate(recycled=False),
        take_epoch,
        commit(1, "one", [1, 2]),
        take_epoch,
        commit(2, "two", [7] * 1100, (3, 2)),
        take_epoch,
        commit(3, "three", [70_000] * 1100, (3, 2)),
        take_epoch,
        commit(4, "four", [5], (8, 1102)),
    ]


class Damaged:
    """A journal's files, put back for each damage; and every state that it ever was in."""

    def __init__(self, make_journal, key, kit, clock, checkpoint_after=None):
        self._make_journal, self._key = make_journal, key
        neighbour = make_journal(next(other for i in range(10**6) if _beside(other := SessionKey("n", str(i)), key)))
        neighbour.take_epoch()
        neighbour.close()
        self._neighbour = (neighbour, neighbour.path.read_bytes(), state(neighbour))
        neighbour.close()
        journal, model = make_journal(key), MemoryJournal(key, kit.fingerprint, clock)
        self.path = journal.path
        self.states = [state(model)]
        for number, step in enumerate(script(kit)):
            step(journal)
            step(model)
            self.states.append(state(model))
            if number == checkpoint_after:
                journal._open().execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        assert state(journal) == self.states[-1]
        if checkpoint_after is None:
            journal.close()
        self.files = {suffix: self._read(suffix) for suffix in SUFFIXES[:2]}
        journal.close()
        assert self.open_with({}) == self.states[-1]

    def _read(self, suffix):
        with contextlib.suppress(FileNotFoundError), open(f"{self.path}{suffix}", "rb") as file:
            return file.read()

    def open_with(self, changed):
        """The state that is read from the files with `changed` (by suffix); None for one of the journal's errors."""
        for suffix in SUFFIXES:
            content = changed.get(suffix, self.files.get(suffix))
            if content is not None:
                with open(f"{self.path}{suffix}", "wb") as file:
                    file.write(content)
            else:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{self.path}{suffix}")
        journal = self._make_journal(self._key, busy_seconds=0.0)
        try:
            return state(journal)
        except (JournalCorrupt, JournalTooNew, JournalUnavailable):
            return None
        finally:
            journal.close()

    def check(self, suffix, damages):
        """None of the damages to one file shows anything that never was. Returns (errors, states) met."""
        errors = states = 0
        for what, content in damages:
            found = self.open_with({suffix: content})
            assert found is None or found in self.states, what
            errors += found is None
            states += found is not None
        journal, content, before = self._neighbour
        assert journal.path.read_bytes() == content
        assert state(journal) == before
        journal.close()
        return errors, states


def _beside(other, key):
    return other.digest[:2] == key.digest[:2]


def flips(content, step=1):
    """One bit of every byte of the file's header and, within and behind the pages' headers, of every `step`-th that is
    not zero, and of some that are."""
    for offset, byte in enumerate(content):
        if (byte and (offset % step == 0 or offset % PAGE < 40)) or offset < 100 or offset % (61 * step) == 0:
            bit = 1 << (offset * 5 + offset // 8) % 8
            yield f"bit {bit} at {offset}", content[:offset] + bytes([byte ^ bit]) + content[offset + 1 :]


def cuts(content, step=1):
    """Cut off within the first bytes, around every page's (and frame's) border, and here and there."""
    for size in range(len(content)):
        if size < 160 or any(-2 <= size % PAGE - part <= 2 for part in (0, 32, 56)) or size % 397 == 0:
            yield f"cut at {size}", content[:size]


DAMAGES = {"flipped": flips, "cut": cuts}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_closed_database(make_journal, key, kit, clock, how):
    damaged = Damaged(make_journal, key, kit, clock)
    assert damaged.files["-wal"] is None
    errors, states = damaged.check("", DAMAGES[how](damaged.files[""], 5))
    assert errors > 100
    # Some bytes say nothing that is needed, and nothing left at all is a new journal: most else is noticed.
    assert errors > 2 * states


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("suffix", ["", "-wal"])
def test_a_database_with_its_log_partly_written_back(make_journal, key, kit, clock, how, suffix):
    damaged = Damaged(make_journal, key, kit, clock, checkpoint_after=4)
    errors, states = damaged.check(suffix, DAMAGES[how](damaged.files[suffix], 37))
    assert errors + states > 100


def test_a_flipped_bit_in_a_token_is_noticed(make_journal, key, kit, clock):
    damaged = Damaged(make_journal, key, kit, clock)
    content = damaged.files[""]
    offset = content.index(kit.ids([70_000] * 10)) + 4
    assert damaged.open_with({"": content[:offset] + bytes([content[offset] ^ 1]) + content[offset + 1 :]}) is None


def test_a_journal_from_before_the_checksums_opens_and_gets_them(make_journal, key, kit):
    """Version 1's rows, as that version wrote them."""
    turn = kit.turn(key, 1, "old", [1, 2, 3])
    new = make_journal(key)
    new.take_epoch()
    new.commit(turn)
    connection = new._open()
    for name in ("turns_checksum", "checksum"):
        connection.execute(f"ALTER TABLE session DROP COLUMN {name}")
    connection.execute("PRAGMA user_version = 1")
    new.close()
    assert len(MIGRATIONS) == 2
    upgraded = make_journal(key)
    assert upgraded.load() == [turn]
    upgraded._open().execute("UPDATE turns SET token_ids = ?", (kit.ids([1, 2, 4]),))
    with pytest.raises(JournalCorrupt, match="checksum"):
        upgraded.load()


@pytest.mark.parametrize("column", ["epoch", "turns", "fingerprint", "turns_checksum"])
def test_a_changed_count_stops_the_next_write_too(make_journal, key, column):
    journal = make_journal(key)
    journal.activate(recycled=False)
    journal._open().execute(f"UPDATE session SET {column} = 5")
    for use in (journal.take_epoch, journal.info, journal.clear, lambda: journal.activate(recycled=True)):
        with pytest.raises(JournalCorrupt, match="checksum"):
            use()


def test_a_missing_turn_is_noticed(make_journal, key, kit):
    journal = make_journal(key)
    for step in script(kit):
        step(journal)
    journal._open().execute("DELETE FROM turns WHERE epoch = 1")
    with pytest.raises(JournalCorrupt, match="checksum"):
        journal.load()


def test_whole_seconds_are_no_damage(tmp_path, key, kit):
    journal = SQLiteJournal(tmp_path, key, kit.fingerprint, lambda: 1_000_000)
    turn = dataclasses.replace(kit.turn(key, journal.take_epoch().epoch, "x", [1]), committed_at=1_000_000)
    journal.commit(turn)
    assert journal.load() == [turn]
    journal.close()
