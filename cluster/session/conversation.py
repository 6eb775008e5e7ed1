"""What a conversation consists of: its memory (a KV segment), its record (a journal), and what both are
about.

Owns: keeping segment, transcript and journal in step. Knows nothing of whose turn it is or who waits: the
caller (`session.py`) lets one in at a time.
"""

from __future__ import annotations

import os
from array import array
from dataclasses import replace

from phi_cluster.cluster.messages import CommitTurn, TurnGrant
from phi_cluster.cluster.session.journal import Journal, JournalCorrupt, JournalInfo
from phi_cluster.cluster.session.segment import Segment
from phi_cluster.cluster.session.transcript import Transcript


class Conversation:
    """`info` is what the journal said last; `transcript` is never behind it once a turn has begun."""

    info: JournalInfo
    transcript: Transcript
    _last_commit: tuple[int, str]

    def __init__(self, segment: Segment, journal: Journal, fingerprint: str, info: JournalInfo):
        """Takes the segment over. Raises the journal's errors."""
        self.key = journal.key
        self.segment = segment
        self.journal = journal
        self._fingerprint = fingerprint
        self._load(info)

    def begin(self, text: str) -> TurnGrant:
        """Take the epoch, make the segment hold the stored ids, and say how much of the prompt `text` they
        are.

        Raises the journal's errors; a turn has not begun then.
        """
        info = self.journal.take_epoch()
        if info.epoch != self.info.epoch + 1 or info.turns != self.info.turns:
            # Another incarnation was at the journal: what it recorded counts.
            self._load(info)
        self.info = info
        self.lay_tokens()
        segment = self.segment
        segment.epoch = info.epoch
        match = self.transcript.match(text, segment.num_tokens)
        kept = match.num_kept_tokens
        return TurnGrant(
            key=self.key,
            epoch=info.epoch,
            segment=segment.ref,
            num_kept_tokens=kept,
            num_kept_chars=match.num_kept_chars,
            last_kept_id=self.transcript.token_ids[kept - 1] if kept else None,
            num_tokens=segment.num_tokens,
            num_computed_tokens=segment.num_computed_tokens,
            turns=info.turns,
            holder_pid=os.getpid(),
        )

    def record(self, turn: CommitTurn) -> bool:
        """Store a turn durably. False if the same request's commit is stored already: nothing changes then.

        Raises StaleEpoch, ValueError if the numbers cannot be (nothing is stored), and the journal's errors.
        """
        if turn.key != self.key:
            raise ValueError("the turn belongs to another session")
        if (turn.epoch, turn.request_id) == self._last_commit:
            return False
        if turn.epoch > self.info.epoch:
            # Another incarnation let it begin: see what it built on.
            self._load(self.journal.info())
        if turn.epoch == self.info.epoch and turn.epoch != self._last_commit[0]:
            self.transcript.check(turn)
        if not self.journal.commit(turn):
            return False
        self.transcript.apply(turn)
        self.info = replace(self.info, turns=self.info.turns + 1, fingerprint=self._fingerprint)
        self._last_commit = (turn.epoch, turn.request_id)
        return True

    def forget(self) -> None:
        """Drop history, record and cache. Raises the journal's errors."""
        # A writer that was taken over may still commit: not into the new conversation.
        self.journal.take_epoch()
        self.journal.clear()
        self._load(self.journal.info())
        self.segment.clear()

    def replace_segment(self, segment: Segment) -> None:
        """Go on in other memory, and let no turn commit that began before."""
        old, self.segment = self.segment, segment
        old.close()
        info = self.journal.take_epoch()
        if info.turns != self.info.turns:
            self._load(info)
        self.info = info

    def lay_tokens(self) -> None:
        """Make the segment hold the stored ids (as many as fit). What it holds of them keeps its keys and
        values; what an unrecorded turn left goes."""
        stored: array[int] = self.transcript.token_ids[: self.segment.layout.max_model_len]
        matching = self.segment.count_matching(stored)
        if matching < self.segment.num_tokens:
            self.segment.trim(matching)
        self.segment.append_tokens(stored[matching:])

    def close(self) -> None:
        """Let go of memory and files."""
        self.segment.close()
        self.journal.close()

    def _load(self, info: JournalInfo) -> None:
        turns = self.journal.load()
        # Ids of another model mean nothing to this one. The record stays until a turn supersedes it.
        same_model = info.fingerprint == self._fingerprint
        try:
            self.transcript = Transcript.replay(turns if same_model else ())
        except ValueError as error:
            raise JournalCorrupt(f"the session's journal contradicts itself: {error}") from None
        self.info = info
        self._last_commit = (turns[-1].epoch, turns[-1].request_id) if turns else (0, "")
