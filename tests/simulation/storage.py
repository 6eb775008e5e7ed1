"""What outlives a process: journals on a disk, and memory for as long as some live process has it open.

Owns: `Disk` and its journals, `Segments` and their memory. Knows nothing of what is stored.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from phi_cluster.cluster.messages import CommitTurn, SegmentRef, SessionKey
from phi_cluster.cluster.session.hibernation_file import BadHibernation, Mark
from phi_cluster.cluster.session.hibernation_store import Hibernated
from phi_cluster.cluster.session.journal import Glance, JournalFull, JournalInfo, JournalUnavailable, MemoryJournal
from phi_cluster.cluster.session.segment import Segment, SegmentGone, SegmentLayout, SegmentMismatch
from tests.simulation.loop import Loop, Process

FINGERPRINT = "simulated"
_NUM_FIELDS = 32
_NUM_COMPUTED_TOKENS, _NUM_TOKENS = 3, 4


class Disk:
    """Journals by digest, and all that was ever written, in order: (what, digest, life, CommitTurn or epoch).

    `fault(process, operation)`: "", "before" or "after" (a death there), "full". A `life` of a journal ends with its
    deletion."""

    def __init__(
        self, clock: Callable[[], float], fault: Callable[[Process, str], str], kill: Callable[[Process], None]
    ):
        self.clock = clock
        self.fault = fault
        self.kill = kill
        self.files: dict[str, MemoryJournal] = {}
        # Hibernated ones, by digest.
        self.memories: dict[str, tuple[Memory, Mark]] = {}
        self.lives: dict[str, int] = {}
        self.history: list[tuple[str, str, int, Any]] = []

    def journal_of(self, key: SessionKey) -> MemoryJournal:
        digest = key.digest
        if digest not in self.files:
            self.files[digest] = MemoryJournal(key, FINGERPRINT, self.clock)
            self.lives[digest] = self.lives.get(digest, 0) + 1
        return self.files[digest]

    def note(self, what: str, key: SessionKey, value: Any = None) -> None:
        digest = key.digest
        self.history.append((what, digest, self.lives.get(digest, 0), value))


class DurableJournal:
    """See `Journal`: of one process, on the disk."""

    def __init__(self, key: SessionKey, disk: Disk, process: Process):
        self.key = key
        self._disk = disk
        self._process = process

    def info(self) -> JournalInfo:
        return self._do("info", lambda journal: journal.info())

    def activate(self, *, recycled: bool) -> JournalInfo:
        return self._do("activate", lambda journal: journal.activate(recycled=recycled))

    def take_epoch(self) -> JournalInfo:
        def take(journal: MemoryJournal) -> JournalInfo:
            info = journal.take_epoch()
            self._disk.note("epoch", self.key, info.epoch)
            return info

        return self._do("take_epoch", take)

    def commit(self, turn: CommitTurn) -> bool:
        def write(journal: MemoryJournal) -> bool:
            done = self._write(journal, turn)
            if done:
                self._disk.note("commit", self.key, turn)
            return done

        return self._do("commit", write)

    def load(self) -> list[CommitTurn]:
        return self._do("load", lambda journal: journal.load())

    def fill(self, turns: Sequence[CommitTurn], fingerprint: str) -> None:
        if self.key.digest in self._disk.files:
            raise ValueError("there is a journal of this session")

        def fill(journal: MemoryJournal) -> None:
            journal.fill(turns, fingerprint)
            self._disk.note("fill", self.key, list(turns))
            self._disk.note("epoch", self.key, journal.info().epoch)

        self._do("fill", fill)

    def clear(self) -> None:
        def clear(journal: MemoryJournal) -> None:
            journal.clear()
            self._disk.note("clear", self.key)

        self._do("clear", clear)

    def delete(self) -> None:
        def delete(journal: MemoryJournal) -> None:
            self._disk.note("delete", self.key)
            del self._disk.files[self.key.digest]

        self._do("delete", delete)

    def close(self) -> None:
        pass

    def _write(self, journal: MemoryJournal, turn: CommitTurn) -> bool:
        return journal.commit(turn)

    def _do(self, operation: str, work: Callable[[MemoryJournal], Any]) -> Any:
        fault = self._disk.fault(self._process, operation)
        if fault == "full":
            raise JournalFull("the disk is full")
        if fault == "before":
            self._disk.kill(self._process)
        if not self._process.alive:
            # Nothing of it is seen any more: it runs to its next await only.
            raise JournalUnavailable("this process is dead")
        answer = work(self._disk.journal_of(self.key))
        if fault == "after":
            self._disk.kill(self._process)
        return answer


class Journals:
    """Of one process (the keeper's `Journals`)."""

    shared = False

    def __init__(self, disk: Disk, process: Process, kind: type[DurableJournal]):
        self._disk = disk
        self._process = process
        self._kind = kind

    def open(self, key: SessionKey) -> DurableJournal:
        return self._kind(key, self._disk, self._process)

    def glance(self, key: SessionKey) -> Glance | None:
        if key.digest not in self._disk.files:
            return None
        info, now = self._disk.files[key.digest].info(), self._disk.clock()
        return Glance(0, info.turns, info.activation, info.recycles, info.created_at, now)

    def nbytes(self) -> int:
        return 0

    def take_seat(self, key: SessionKey) -> None:
        pass

    def keys(self) -> Iterator[SessionKey]:
        yield from [journal.key for journal in self._disk.files.values()]


class HibernationDisk:
    """Hibernated memories (in the place of FileHibernationStore), of one process."""

    def __init__(self, disk: Disk, process: Process):
        self._disk = disk
        self._process = process

    def scan(self) -> dict[str, Hibernated]:
        return {digest: Hibernated(1000, 0.0) for digest in self._disk.memories}

    def write(
        self,
        digest: str,
        segment: Segment,
        num_tokens: int,
        mark: Mark,
        on_drop: Callable[[str], None] = lambda digest: None,
    ) -> Hibernated:
        assert isinstance(segment, SimulatedSegment)
        self._disk.memories.pop(digest, None)
        fault = self._fault("hibernate")
        if fault == "full":
            raise OSError(28, "no space left on device")
        memory = segment.memory.copy()
        memory.fields[_NUM_COMPUTED_TOKENS] = memory.fields[_NUM_TOKENS] = num_tokens
        del memory.rows[num_tokens:]
        self._disk.memories[digest] = (memory, mark)
        if fault == "after":
            self._disk.kill(self._process)
        return Hibernated(1000, 0.0)

    def take(self, digest: str, segment: Segment, mark: Mark) -> None:
        assert isinstance(segment, SimulatedSegment)
        if self._fault("wake") == "full":
            self._disk.memories.pop(digest, None)
            raise BadHibernation("damaged")
        if digest not in self._disk.memories:
            raise FileNotFoundError(digest)
        memory, written = self._disk.memories.pop(digest)
        if written != mark:
            raise BadHibernation("stale")
        count = memory.fields[_NUM_TOKENS]
        segment.memory.rows[:] = memory.rows
        segment._ids[:count] = memory.ids[:count]
        segment.set_counts(count, memory.fields[_NUM_COMPUTED_TOKENS], long_rope=False)

    def delete(self, digest: str) -> None:
        self._disk.memories.pop(digest, None)

    def _fault(self, operation: str) -> str:
        fault = self._disk.fault(self._process, operation)
        if fault == "before":
            self._disk.kill(self._process)
        if not self._process.alive:
            raise OSError(5, "this process is dead")
        return fault


class Memory:
    """The bytes. `rows` stands for keys and values; `lent` is the last epoch that was granted with it."""

    def __init__(self, nonce: bytes, max_model_len: int):
        self.nonce = nonce
        self.fields = [0] * _NUM_FIELDS
        self.ids = array("i", bytes(4 * max_model_len))
        self.rows: list[int] = []
        self.lent = 0
        self.mappings: list[SimulatedSegment] = []

    def copy(self) -> Memory:
        memory = Memory(self.nonce, len(self.ids))
        memory.fields, memory.ids, memory.rows = list(self.fields), self.ids[:], list(self.rows)
        return memory


class SimulatedSegment(Segment):
    """The product's header and ids over a fake memory."""

    def __init__(self, memory: Memory, layout: SegmentLayout, process: Process):
        self.layout = layout
        self.nonce = memory.nonce
        self.process = process
        process.num_fds += 1
        self._fd = process.num_fds
        process.fds[self._fd] = self
        memory.mappings.append(self)
        self._map(memory)

    def _map(self, memory: Memory) -> None:
        self.memory = memory
        self._fields: Any = memory.fields
        self._ids = memoryview(memory.ids)

    @property
    def ref(self) -> SegmentRef:
        if self._fd < 0:
            raise ValueError("the KV segment is closed")
        return SegmentRef(self.process.identity.pid, self._fd, self.nonce)

    @property
    def nbytes_resident(self) -> int:
        if self._fd < 0:
            raise ValueError("the KV segment is closed")
        return self.layout.nbytes_used(len(self.memory.rows))

    def copy_from(self, source: Segment, num_tokens: int) -> None:
        assert isinstance(source, SimulatedSegment)
        computed = min(num_tokens, source.num_computed_tokens)
        self.memory.rows[:] = source.memory.rows[:computed]
        self._ids[:num_tokens] = source._ids[:num_tokens]
        self._fields[1] = source._fields[1]
        self._fields[_NUM_COMPUTED_TOKENS], self._fields[_NUM_TOKENS] = computed, num_tokens

    def trim(self, num_tokens: int) -> None:
        if not 0 <= num_tokens <= self.num_tokens:
            raise ValueError(f"cannot trim {self.num_tokens} tokens to {num_tokens}")
        self._fields[_NUM_COMPUTED_TOKENS] = min(self.num_computed_tokens, num_tokens)
        self._fields[_NUM_TOKENS] = num_tokens
        del self.memory.rows[num_tokens:]

    def drop_kv(self) -> None:
        self._fields[_NUM_COMPUTED_TOKENS] = 0
        self.memory.rows.clear()

    def close(self) -> None:
        if self._fd >= 0:
            self.process.fds.pop(self._fd, None)
            if self in self.memory.mappings:
                self.memory.mappings.remove(self)
            self._fd = -1

    def lose(self) -> None:
        """The process died: what it still does until its next await is seen by nobody."""
        self.memory.mappings.remove(self)
        self._map(self.memory.copy())


class Segments:
    """Makes and opens memory for whichever process runs (in the place of the class Segment)."""

    def __init__(
        self,
        loop: Loop,
        process_of: Callable[[int], Process | None],
        kind: type[SimulatedSegment],
        layout: SegmentLayout,
    ):
        self._loop = loop
        self._layout = layout
        self._process_of = process_of
        self._kind = kind
        self._made = 0

    def create(self, layout: SegmentLayout, fingerprint: str) -> SimulatedSegment:
        self._made += 1
        assert self._loop.current is not None
        return self._kind(Memory(self._made.to_bytes(16, "big"), layout.max_model_len), layout, self._loop.current)

    def open(self, ref: SegmentRef, layout: SegmentLayout, fingerprint: str) -> SimulatedSegment:
        holder = self._process_of(ref.pid)
        held = None if holder is None or not holder.alive else holder.fds.get(ref.fd)
        if held is None:
            raise SegmentGone(3, "the KV segment's holder is gone")
        if held.nonce != ref.nonce:
            raise SegmentMismatch("the descriptor holds another KV segment by now")
        assert self._loop.current is not None
        return self._kind(held.memory, layout, self._loop.current)

    def hold(self, ref: SegmentRef) -> SimulatedSegment:
        """In the place of HeldMemory."""
        return self.open(ref, self._layout, FINGERPRINT)
