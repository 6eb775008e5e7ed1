"""What a conversation consists of: its memory (a KV segment), its record (a journal), and what both are
about.

Owns: keeping segment, transcript and journal in step. Knows nothing of whose turn it is or who waits: the
caller (`session.py`) lets one in at a time.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from array import array
from dataclasses import replace

from phi_cluster.cluster.errors import ReplyGone
from phi_cluster.cluster.messages import CommitTurn, TurnGrant
from phi_cluster.cluster.session.journal import Journal, JournalCorrupt, JournalInfo
from phi_cluster.cluster.session.segment import Segment
from phi_cluster.cluster.session.transcript import Transcript


def name_digest(name: str) -> bytes:
    """How a segment names a request, or an attempt at a turn: 16 bytes."""
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


class Conversation:
    """`info` is what the journal said last; `transcript` is never behind it once a turn has begun."""

    info: JournalInfo
    transcript: Transcript
    _last_commit: tuple[int, str]
    # Of the turns that are left, oldest first.
    _request_ids: list[str]

    def __init__(self, segment: Segment, journal: Journal, fingerprint: str, info: JournalInfo):
        """Takes the segment over. Raises the journal's errors."""
        self.key = journal.key
        self.segment = segment
        self.journal = journal
        self._fingerprint = fingerprint
        self._load(info)

    def begin(self, text: str, resumed: str | None = None, *, wants_ids: bool = False) -> TurnGrant:
        """Take the epoch, make the segment hold the stored ids, and say how much of the prompt `text` they
        are; `wants_ids`: and which.

        `resumed`: the id of a request that came before and reads on. What it has left is told, if it is still there,
        and stays in the segment. Raises ReplyGone if other turns have been made since, and the journal's errors; a turn
        has not begun then.
        """
        if resumed is not None and resumed in self._request_ids[:-1]:
            raise ReplyGone("the conversation has gone on since: the interrupted reply is not to be had any more")
        info = self.journal.take_epoch()
        if info.epoch != self.info.epoch + 1 or info.turns != self.info.turns:
            # Another incarnation was at the journal: what it recorded counts.
            self._load(info)
        self.info = info
        segment = self.segment
        match = self.transcript.match(text, segment.layout.max_model_len)
        kept = match.num_kept_tokens
        resumed_ids = self._unrecorded(resumed, kept)
        # Of a turn that ended with its process.
        segment.unshare()
        if resumed_ids is None:
            self.lay_tokens()
            if resumed is not None and resumed == self._last_commit[1]:
                resumed_ids = self.transcript.token_ids[kept:].tobytes()
        segment.epoch = info.epoch
        return TurnGrant(
            key=self.key,
            epoch=info.epoch,
            segment=segment.ref,
            num_kept_tokens=kept,
            num_kept_chars=match.num_kept_chars,
            last_kept_id=self.transcript.token_ids[kept - 1] if kept else None,
            kept_checksum=zlib.crc32(self.transcript.token_ids[:kept].tobytes()),
            num_tokens=segment.num_tokens,
            num_computed_tokens=segment.num_computed_tokens,
            turns=info.turns,
            holder_pid=os.getpid(),
            resumed_ids=resumed_ids,
            kept_ids=self.transcript.token_ids[:kept].tobytes() if wants_ids else None,
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
        self._request_ids = [one for one in self._request_ids if one != turn.request_id] + [turn.request_id]
        return True

    def left_by(self, request_id: str) -> bool:
        """Whether this request left what is last here, recorded or not."""
        return self._last_commit[1] == request_id or self.segment.request == name_digest(request_id)

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

    def _unrecorded(self, request_id: str | None, kept: int) -> bytes | None:
        """The ids that a request's turn wrote behind the first `kept` and nobody recorded, if it built on those."""
        if request_id is None or self.segment.request != name_digest(request_id):
            return None
        if self.segment.count_matching(self.transcript.token_ids[:kept]) < kept:
            return None
        return self.segment.token_bytes(kept)

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
        self._request_ids = [turn.request_id for turn in turns]
