"""Uses journals on a disk that fails, and checks what is left; `test_journal_faults.py` runs it with `file_faults.c`
preloaded.

    journal_faults.py SHIM FOLDER fail full|error|short        the k-th write or sync fails, for every k
    journal_faults.py SHIM FOLDER die in|after                 the process dies in it, or right after it
    journal_faults.py SHIM FOLDER cut                          the power fails after every one of them
    journal_faults.py SHIM FOLDER cut-after-error              a sync fails, life goes on, then the power fails

Prints how many faults there were; ends with a traceback if something is not as promised. `MemoryJournal` says what
each state should be.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import itertools
import os
import shutil
import struct
import sys
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phi_cluster.cluster.messages import CommitTurn, SessionKey
from phi_cluster.cluster.session.journal import Journal, JournalFull, JournalUnavailable, MemoryJournal
from phi_cluster.cluster.session.sqlite_journal import SQLiteJournal, journal_path

KEY = SessionKey("tenant", "demo")
# As in file_faults.c.
FAIL, SHORT, DIE_IN, DIE_AFTER, FAIL_SYNC = 1, 2, 3, 4, 5
DIED = 77

State = tuple[Any, ...]
Op = Callable[[Journal], object]


def clock() -> float:
    return 1_000_000.0


def turn(epoch: int, text: str, token_ids: list[int], kept: tuple[int, int] = (0, 0)) -> CommitTurn:
    end = (kept[0] + len(text), kept[1] + len(token_ids))
    ids = array("i", token_ids).tobytes()
    return CommitTurn(
        KEY, epoch, f"r{epoch}-{text[:3]}", kept[1], kept[0], ids, text, (end,), 1, 0, 1, "stop", {"seed": 7}, 1e6
    )


# With what the script has taken so far: a repeated take_epoch must not make the rest stale.
def commit(text: str, token_ids: list[int], kept: tuple[int, int] = (0, 0)) -> Op:
    return lambda journal: journal.commit(turn(journal.info().epoch, text, token_ids, kept))


def activate(journal: Journal) -> object:
    return journal.activate(recycled=False)


def take_epoch(journal: Journal) -> object:
    return journal.take_epoch()


def clear(journal: Journal) -> object:
    return journal.clear()


def close(journal: Journal) -> object:
    return journal.close()


# The second commit is longer than a page, the third supersedes it, the last comes after a clear and a reopening.
SCRIPT: list[Op] = [
    activate,
    take_epoch,
    commit("one", [1, 2, 3]),
    take_epoch,
    commit("two" * 2000, list(range(2000)), (3, 3)),
    take_epoch,
    commit("three", [4], (3, 3)),
    close,
    take_epoch,
    clear,
    take_epoch,
    commit("four", [5, 6]),
    close,
]


def state(journal: Journal) -> State:
    info = journal.info()
    return (info.epoch, info.turns, info.activation, info.recycles, info.fingerprint, tuple(journal.load()))


def states() -> list[State]:
    """Of the script, before its first step and after each."""
    model = MemoryJournal(KEY, "model-1", clock)
    found = [state(model)]
    for op in SCRIPT:
        op(model)
        found.append(state(model))
    return found


STATES = states()


def open_journal(folder: Path, key: SessionKey = KEY) -> SQLiteJournal:
    return SQLiteJournal(folder, key, "model-1", clock)


def reopened(folder: Path, key: SessionKey = KEY) -> State:
    journal = open_journal(folder, key)
    try:
        return state(journal)
    finally:
        journal.close()


class Shim:
    def __init__(self, path: str):
        self._c = ctypes.CDLL(path)
        self._c.faults_path.restype = ctypes.c_char_p

    def arm(self, folder: Path, k: int, how: int, number: int, record: int = -1) -> None:
        self._c.faults_arm(os.fsencode(folder), k, how, number, record)

    def off(self) -> None:
        self._c.faults_off()

    def note(self, number: int) -> None:
        self._c.faults_note(ctypes.c_int64(number))

    @property
    def hits(self) -> int:
        return self._c.faults_hits()

    @property
    def hit(self) -> tuple[str, str]:
        return chr(self._c.faults_what()), os.fsdecode(self._c.faults_path())


class Neighbour:
    """A journal in the same folder that nobody uses meanwhile."""

    def __init__(self, folder: Path):
        digests = ((key, key.digest) for i in itertools.count() if (key := SessionKey("other", str(i))))
        self.key = next(key for key, digest in digests if digest[:2] == KEY.digest[:2])
        self._folder = folder
        journal = open_journal(folder, self.key)
        journal.take_epoch()
        journal.close()
        self._before = self._look()

    def _look(self) -> tuple[bytes, State]:
        return journal_path(self._folder, self.key).read_bytes(), reopened(self._folder, self.key)

    def check(self) -> None:
        assert self._look() == self._before, "the neighbour's journal has changed"


def folders(parent: Path) -> Iterator[tuple[int, Path]]:
    for k in itertools.count(1):
        folder = parent / str(k)
        folder.mkdir()
        yield k, folder
        shutil.rmtree(folder)


def fail(shim: Shim, parent: Path, how: int, number: int) -> int:
    for k, folder in folders(parent):
        neighbour = Neighbour(folder) if k % 2 else None
        journal = open_journal(folder)
        shim.arm(folder, k, how, number)
        for done, op in enumerate(SCRIPT):
            try:
                op(journal)
            except (JournalFull, JournalUnavailable) as error:
                assert shim.hits, "an error without a fault"
                check_error(error, number, *shim.hit)
                shim.off()
                go_on(folder, journal, done)
                break
            assert state(journal) == STATES[done + 1] if shim.hits and op is not close else True
        hit = shim.hits
        shim.off()
        journal.close()
        if neighbour is not None:
            neighbour.check()
        if done == len(SCRIPT) - 1:
            assert reopened(folder) == STATES[-1]
            if not hit:
                return k - 1
    raise AssertionError


def check_error(error: Exception, number: int, what: str, path: str) -> None:
    # SQLite asks only a write whether the disk is full, and calls its index's memory an I/O error.
    full = number == errno.ENOSPC and what == "w" and not path.endswith("-shm")
    # A folder is synced by us, who know what the error means, and by SQLite, which does not tell.
    either = number == errno.ENOSPC and what == "s" and Path(path).suffix == ""
    assert isinstance(error, JournalFull) == full or either, (error, what, path)


def go_on(folder: Path, journal: SQLiteJournal, done: int) -> None:
    """The fault has gone. Step `done` failed: it is there completely or not at all, and can be repeated."""
    found = reopened(folder)
    assert found in STATES[done : done + 2], (done, found)
    assert state(journal) == found
    SCRIPT[done](journal)
    again = state(journal)
    if SCRIPT[done] in (activate, take_epoch):
        # Counted twice at most.
        assert again[-1] == STATES[done + 1][-1]
    else:
        assert again == STATES[done + 1], done
    epoch = journal.take_epoch().epoch
    kept = (len("".join(t.text for t in again[-1])), sum(len(t.token_ids) // 4 for t in again[-1]))
    last = turn(epoch, "last", [9, 9], kept)
    assert journal.commit(last)
    assert journal.load() == [*again[-1], last]
    journal.close()
    assert reopened(folder)[-1] == (*again[-1], last)


def die(shim: Shim, parent: Path, how: int) -> int:
    for k, folder in folders(parent):
        neighbour = Neighbour(folder) if k % 2 else None
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            journal = open_journal(folder)
            shim.arm(folder, k, how, 0)
            for op in SCRIPT:
                op(journal)
                os.write(writer, b"a")
            os._exit(0)
        os.close(writer)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        done = len(os.read(reader, 100))
        os.close(reader)
        assert status in (0, DIED)
        found = reopened(folder)
        assert found in STATES[done : done + 2], (k, done, found)
        assert reopened(folder) == found
        if neighbour is not None:
            neighbour.check()
        if status == 0:
            return k - 1
    raise AssertionError


# Power.


@dataclass
class File:
    """A file's bytes as they are safely on the disk, and the changes that may get there or not."""

    safe: bytearray = field(default_factory=bytearray)
    unsafe: list[tuple[str, int, bytes]] = field(default_factory=list)

    def sync(self) -> None:
        for change in self.unsafe:
            apply(self.safe, *change)
        self.unsafe = []

    def after_cut(self, survives: Callable[[int, int], bool]) -> bytes:
        content = bytearray(self.safe)
        for i, change in enumerate(self.unsafe):
            if survives(i, len(self.unsafe)):
                apply(content, *change)
        return bytes(content)


def apply(content: bytearray, what: str, offset: int, new: bytes) -> None:
    if what == "t":
        del content[offset:]
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(new)] = new


class Disk:
    """The record played back."""

    def __init__(self, root: str) -> None:
        self.files: dict[str, File] = {}
        # What a folder's entries are, and what they safely are: the same File, the same file. None is a folder.
        self.seen: dict[str, File | None] = {}
        self.safe: dict[str, File | None] = {}
        self.root = root

    def play(self, what: str, path: str, offset: int, content: bytes) -> None:
        file = self.seen.get(path)
        if what == "m":
            self.seen[path] = None
        elif what == "c":
            self.seen[path] = File()
        elif what == "u":
            self.seen.pop(path, None)
        elif what == "s" and file is None:
            self.safe = {name: kept for name, kept in self.safe.items() if os.path.dirname(name) != path}
            self.safe |= {name: entry for name, entry in self.seen.items() if os.path.dirname(name) == path}
        elif file is None:
            # A file that was unlinked: nobody will read it. Or a folder's sync that failed.
            pass
        elif what in "wt":
            file.unsafe.append((what, offset, content))
        elif what == "s":
            file.sync()
        else:
            # A sync that failed: a later one does not bring to the disk what this one should have (as Linux does it).
            assert what == "f", what
            file.unsafe = []

    def after_cut(self, entries_survive: bool, survives: Callable[[str, int, int], bool]) -> dict[str, bytes | None]:
        content: dict[str, bytes | None] = {}
        for path, file in sorted((self.seen if entries_survive else self.safe).items()):
            parent = os.path.dirname(path)
            if parent != self.root and parent not in content:
                continue
            content[path] = None if file is None else file.after_cut(lambda i, n, p=path: survives(p, i, n))
        return content


def read_record(path: Path) -> list[tuple[str, str, int, bytes]]:
    content, position, found = path.read_bytes(), 0, []
    while position < len(content):
        what, path_size, offset, size = struct.unpack_from("4q", content, position)
        position += 32
        name = content[position : position + path_size].decode()
        position += path_size
        carried = size if chr(what) == "w" else 0
        found.append((chr(what), name, offset, content[position : position + carried]))
        position += carried
    return found


# What of the changes that were not synced is on the disk all the same. A disk may choose; these are the extremes.
CUTS: dict[str, tuple[bool, Callable[[str, int, int], bool]]] = {
    "nothing": (False, lambda path, i, n: False),
    "entries": (True, lambda path, i, n: False),
    "not the log": (True, lambda path, i, n: not path.endswith("-wal")),
    "not the database": (True, lambda path, i, n: path.endswith("-wal")),
    "only each file's last": (True, lambda path, i, n: i == n - 1),
    "all but each file's last": (True, lambda path, i, n: i < n - 1),
    "every other": (True, lambda path, i, n: i % 2 == 0),
}


def rebuild(content: dict[str, bytes | None], old_root: str, root: Path) -> None:
    root.mkdir()
    for path, file in content.items():
        target = root / os.path.relpath(path, old_root)
        if file is None:
            target.mkdir()
        else:
            target.write_bytes(file)


def run(shim: Shim, parent: Path, k: int) -> tuple[list[tuple[str, str, int, bytes]], list[State]]:
    """The record of the script, and the states after its steps. If the k-th write or sync is a sync, it fails; the step
    that raises is done again."""
    folder, log = parent / "state", parent / "record"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with log.open("wb", buffering=0) as record:
        journal = open_journal(folder)
        shim.arm(folder, k, FAIL_SYNC, errno.EIO, record.fileno())
        lived = [STATES[0]]
        for done, op in enumerate(SCRIPT):
            try:
                op(journal)
            except JournalUnavailable:
                op(journal)
            # Looking at a closed journal would open it.
            lived.append(lived[-1] if op is close else state(journal))
            shim.note(done + 1)
        shim.off()
    return read_record(log), lived


def check_cut(disk: Disk, parent: Path, name: str, allowed: list[State], seen: set[bytes]) -> None:
    """The disk after a cut of that name, opened; `seen` are those that need no second look."""
    root = parent / "after"
    content = disk.after_cut(*CUTS[name])
    digest = hashlib.sha256(repr((allowed[0], sorted(content.items()))).encode()).digest()
    if digest in seen:
        return
    seen.add(digest)
    rebuild(content, disk.root, root)
    found = reopened(root)
    assert found in allowed, (name, found, allowed)
    shutil.rmtree(root)


def cut(shim: Shim, parent: Path) -> int:
    record, lived = run(shim, parent, 0)
    assert lived == STATES
    disk, done, seen = Disk(str(parent / "state")), 0, set[bytes]()
    for what, path, offset, content in record:
        if what == "a":
            done = offset
        else:
            disk.play(what, path, offset, content)
        for name in CUTS:
            check_cut(disk, parent, name, lived[done : done + 2], seen)
    return len(seen)


def cut_after_error(shim: Shim, parent: Path) -> int:
    syncs = 0
    for k in itertools.count(1):
        record, lived = run(shim, parent, k)
        if not shim.hits:
            return syncs
        what, hit = shim.hit
        # SQLite syncs the folder for its log and does not look at the answer: no promise of ours can hold then.
        if what != "s" or hit == str(journal_path(parent / "state", KEY).parent):
            continue
        syncs += 1
        disk, seen = Disk(str(parent / "state")), set[bytes]()
        for what, path, offset, content in record:
            if what != "a":
                disk.play(what, path, offset, content)
            else:
                check_cut(disk, parent, "nothing", lived[offset : offset + 2], seen)
    raise AssertionError


if __name__ == "__main__":
    shim, parent, (mode, *rest) = Shim(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    if mode == "fail":
        how, number = {"full": (FAIL, errno.ENOSPC), "error": (FAIL, errno.EIO), "short": (SHORT, errno.ENOSPC)}[
            rest[0]
        ]
        print(fail(shim, parent, how, number))
    elif mode == "die":
        print(die(shim, parent, {"in": DIE_IN, "after": DIE_AFTER}[rest[0]]))
    else:
        print({"cut": cut, "cut-after-error": cut_after_error}[mode](shim, parent))
