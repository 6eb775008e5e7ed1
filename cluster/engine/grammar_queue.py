"""Sequences that cannot begin before their grammar is compiled, which happens in another thread: steps go on meanwhile.

Owns: that thread and the two queues to it and from it. Knows nothing of grammars themselves, of sockets' frames, or of
how a sequence begins.
"""

from __future__ import annotations

import os
import queue
import threading
from typing import NamedTuple, Protocol

from phi_cluster.cluster.engine.sequence import ReplyMatcher
from phi_cluster.cluster.frames import AddSequence


class GrammarSource(Protocol):
    """Of model/grammar.py's Grammars, what is needed here."""

    def matcher(self, grammar: str, end_ids: tuple[int, ...]) -> ReplyMatcher:
        """Raises ValueError."""
        ...


class Compiled(NamedTuple):
    """`result` is the matcher, or why there is none."""

    frame: AddSequence
    result: ReplyMatcher | Exception


class GrammarQueue:
    """For one thread, which may wait for `fileno` to become readable: then `take` has something."""

    def __init__(self, grammars: GrammarSource):
        self._grammars = grammars
        self._asked: queue.SimpleQueue[AddSequence | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Compiled] = queue.SimpleQueue()
        self._waiting: set[int] = set()
        self._reader, self._writer = os.pipe()
        self._thread: threading.Thread | None = None

    def fileno(self) -> int:
        return self._reader

    def submit(self, frame: AddSequence) -> None:
        self._waiting.add(frame.sequence_id)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="grammars", daemon=True)
            self._thread.start()
        self._asked.put(frame)

    def cancel(self, sequence_id: int) -> bool:
        """Whether it waited here. It will not come out any more."""
        if sequence_id not in self._waiting:
            return False
        self._waiting.discard(sequence_id)
        return True

    def take(self) -> list[Compiled]:
        """What is ready, without waiting."""
        os.read(self._reader, 4096)
        ready = []
        while not self._done.empty():
            compiled = self._done.get()
            if self.cancel(compiled.frame.sequence_id):
                ready.append(compiled)
        return ready

    def close(self) -> None:
        """Ends the thread, when it has done what it is at."""
        self._asked.put(None)
        if self._thread is not None:
            self._thread.join()
        os.close(self._reader)
        os.close(self._writer)

    def _work(self) -> None:
        while (frame := self._asked.get()) is not None:
            sampling = frame.sampling
            result: ReplyMatcher | Exception
            try:
                result = self._grammars.matcher(sampling["grammar"], tuple(sampling["grammar_end_ids"]))
            except Exception as error:
                result = error
            self._done.put(Compiled(frame, result))
            os.write(self._writer, b"!")
