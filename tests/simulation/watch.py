"""What is checked while a world runs: who writes where, and what prompts and replies are made of.

Owns: the record of every request. Knows nothing of faults or of how the world is built.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from phi_cluster.cluster.messages import BeginTurn, SessionKey, TurnGrant
from phi_cluster.cluster.turn_api import BEGINNING, Position
from tests.simulation import language
from tests.simulation.engine import Sequence


@dataclass
class Asked:
    """A request, and what came of it. `owner`: its conversation's number; `begins`: the stored ids it must build on."""

    request_id: str
    owner: int
    key: SessionKey
    prompt_text: str
    seed: int
    max_tokens: int
    at: float
    begins: list[int] = field(default_factory=list)
    prompt_ids: list[int] | None = None
    # Where in the reply its client is, and over how many connections it got there.
    position: Position = BEGINNING
    num_connections: int = 0
    # With which an engine had it last.
    epoch: int = 0
    # Its prompt had other ids when it was read on, because its session had lost (or been cleared of) the first ones:
    # what was said goes on behind the new ones, or is computed again and is then another reply.
    has_changed: bool = False
    is_other: bool = False
    # What the journal was told of the reply last.
    recorded: list[int] | None = None
    outcome: str = "open"
    ended: float = 0.0
    # How often the session had been cleared or deleted, or was about to be, when it was asked and when it ended.
    resets: int = 0
    resets_at_end: int = 0

    @cached_property
    def reply(self) -> list[int]:
        """The whole of it, once the prompt's ids are known."""
        assert self.prompt_ids is not None
        return language.reply(self.prompt_ids, self.seed, self.max_tokens)


class Watch:
    """`fail` ends the run, with what it says."""

    def __init__(self, fail: Callable[[str], None], resets: Counter[str]):
        self._fail = fail
        # How often each session was cleared or deleted, or may have been.
        self._resets = resets
        self.asked: dict[str, Asked] = {}
        # By memory and epoch, and by session, life of its journal and epoch.
        self._granted: dict[tuple[bytes, int], str] = {}
        self.epochs: dict[tuple[str, int, int], str] = {}

    def granted(self, request: BeginTurn, grant: TurnGrant, memory: Any, life: int) -> None:
        """A holder answers that the turn has begun."""
        self._granted[grant.segment.nonce, grant.epoch] = request.request_id
        self.epochs[grant.key.digest, life, grant.epoch] = request.request_id
        if memory is not None:
            memory.lent = max(memory.lent, grant.epoch)

    def added(self, sequence: Sequence) -> None:
        """An engine has taken a sequence in."""
        frame, segment = sequence.frame, sequence.segment
        request_id = self._granted.get((segment.nonce, frame.epoch))
        if request_id is None:
            self._fail("an engine computes in a memory that was never lent for this turn")
            return
        asked = self.asked[request_id]
        prompt, begun = sequence.token_ids[: frame.num_prompt_tokens], sequence.token_ids[frame.num_prompt_tokens :]
        if asked.prompt_ids is None:
            asked.prompt_ids = prompt
            if language.text_of(prompt) != asked.prompt_text:
                self._fail(f"{request_id}: the prompt's ids say something else than its text")
            was_reset = self._resets[asked.key.digest] != asked.resets
            if not was_reset and prompt[: len(asked.begins)] != asked.begins:
                self._fail(f"{request_id}: the prompt was not built on the stored ids")
        elif asked.prompt_ids != prompt:
            if frame.epoch == asked.epoch:
                self._fail(f"{request_id}: another engine was given another prompt")
            asked.has_changed = True
            asked.is_other = asked.position.count > 0 and not begun
            if asked.position.count > 0:
                return
            asked.prompt_ids = prompt
            del asked.reply
        asked.epoch = frame.epoch
        if begun != asked.reply[: len(begun)]:
            self._fail(f"{request_id}: it goes on with another reply than it had")
        if not all(language.is_of(asked.owner, token_id) for token_id in segment.token_ids()):
            self._fail(f"{request_id}: another conversation's tokens are in its memory")

    def writes(self, sequence: Sequence) -> None:
        """An engine is about to write."""
        memory, epoch = sequence.segment.memory, sequence.frame.epoch
        if memory.lent > epoch:
            self._fail(f"an engine writes for epoch {epoch} into a memory that was lent for {memory.lent}")
        for other in memory.mappings:
            if other is not sequence.segment and other.process.kind == "engine":
                self._fail("two engines write into one memory")
