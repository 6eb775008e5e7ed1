"""Whether a session's journal holds what its clients were told (C1), and what one writer at a time would write (C3).

Owns: these checks of one copy of a journal. Knows nothing of streams, and of how journals are read.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.chaos.history import Expected, History, JournalCopy
from tests.chaos.promises import Breach


def check_journal(copy: JournalCopy, expected: dict[tuple[str, int], Expected], history: History) -> Iterator[Breach]:
    name = f"the journal of {copy.session}" + (" after kill -9 of everything" if copy.after_kill else "")
    if copy.error:
        if copy.acknowledged:
            yield Breach("C1", f"{name} cannot be read: {copy.error}")
        return
    yield from _writers(copy, name, history)
    if not copy.acknowledged:
        return
    text = ""
    for row in copy.rows:
        text = text[: row.num_kept_chars] + row.text
    position = 0
    # Two messages and what was said in between for each turn, up to the last one whose end was seen.
    for said in copy.said[: 2 * copy.acknowledged[-1] + 2]:
        found = text.find(said, position)
        if found < 0:
            yield Breach(
                "C1", f"{name}: {said[:60]!r} was acknowledged, and is not in it (behind character {position})"
            )
            return
        position = found + len(said)
    last = expected.get((copy.script, copy.acknowledged[-1]))
    if last is not None and not any(row.num_completion_tokens == last.completion_tokens for row in copy.rows):
        yield Breach("C1", f"{name}: no turn of {last.completion_tokens} completion tokens is in it")


def _writers(copy: JournalCopy, name: str, history: History) -> Iterator[Breach]:
    epochs = [row.epoch for row in copy.rows]
    if epochs != sorted(set(epochs)):
        yield Breach("C3", f"{name}: epochs {epochs}")
    if epochs and epochs[-1] > copy.epoch:
        yield Breach("C3", f"{name}: a turn of epoch {epochs[-1]}, but only {copy.epoch} were begun")
    requests = {row.request_id for row in copy.rows}
    chars = tokens = 0
    ends: dict[str, int] = {}
    for row in copy.rows:
        # One whose client read on is written again, from its prompt on.
        if row.num_kept_chars >= ends.get(row.request_id, row.num_kept_chars + 1):
            yield Breach("C3", f"{name}: request {row.request_id} was written twice, one behind the other")
        ends[row.request_id] = row.num_kept_chars + len(row.text)
        if row.num_kept_chars > chars or row.num_kept_tokens > tokens:
            yield Breach("C3", f"{name}: epoch {row.epoch} goes on from what is not there")
        chars, tokens = row.num_kept_chars + len(row.text), row.num_kept_tokens + row.num_new_tokens
    attempts = [attempt for attempt in history.attempts if attempt.session == copy.session]
    known = {attempt.request_id for attempt in attempts}
    # A request whose answer never began may have run all the same.
    if None not in known and requests - known:
        yield Breach("C3", f"{name}: turns of requests that nobody made: {sorted(requests - set(map(str, known)))}")
