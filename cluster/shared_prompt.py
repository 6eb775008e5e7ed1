"""A prompt that several replies answer: computed by the first of them, used by the others where it lies.

Owns: when the prompt is there, who uses it, and that the first reply's turn, in whose memory it lies, does not end
before they have let go. Knows nothing of how replies are made, of engines, or of what a segment is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from phi_cluster.cluster.messages import SegmentRef, SharedRows
from phi_cluster.cluster.turn_api import TurnRequest, TurnStarted


class SharedPrompt:
    """For one event loop. The first reply calls `lend`, `take_back` and `wait_answered`, the others the rest.

    Attributes, set once the prompt is computed: `request` as it was in the end; `started`; `token_ids` of the prompt;
    `copied_from`, where it is to be copied from if it cannot be shared.
    """

    def __init__(self, num_others: int):
        self.request: TurnRequest | None = None
        self.started: TurnStarted | None = None
        self.token_ids: list[int] = []
        self.copied_from: SegmentRef | None = None
        self._rows: SharedRows | None = None
        # Not while the first is without memory.
        self._is_known = asyncio.Event()
        # Who uses the rows, and how they are told to let go.
        self._users: dict[object, Callable[[], None]] = {}
        self._is_unused = asyncio.Event()
        self._is_unused.set()
        self._num_answering = num_others
        self._is_answered = asyncio.Event()

    # The first.

    def lend(self, request: TurnRequest, token_ids: list[int], rows: SharedRows, *, stays: bool) -> None:
        """The prompt is computed: others may answer it. It lies in `rows`, where it stays until it is taken back;
        without `stays` it may be copied only."""
        self.request, self.token_ids = request, token_ids
        self._rows, self.copied_from = (rows, None) if stays else (None, rows.segment)
        self._is_known.set()

    async def take_back(self, *, for_good: bool = False) -> None:
        """The memory is about to go: whoever uses it lets go first. They wait until the first has computed the prompt
        again or, if it will not (`for_good`), compute it themselves."""
        self._rows = self.copied_from = None
        if for_good:
            self._is_known.set()
        else:
            self._is_known.clear()
        for let_go in list(self._users.values()):
            let_go()
        await self._is_unused.wait()

    async def wait_answered(self) -> None:
        """Until all others have ended."""
        if self._num_answering:
            await self._is_answered.wait()

    # The others.

    async def rows(self) -> SharedRows | None:
        """Where the prompt is; None: each computes it for itself (or copies it)."""
        await self._is_known.wait()
        return self._rows

    def use(self, user: object, rows: SharedRows, let_go: Callable[[], None]) -> bool:
        """From here on, until `leave`, the rows stay. `let_go` is called if they are wanted back. False if they are not
        there any more."""
        if rows != self._rows:
            return False
        self._users[user] = let_go
        self._is_unused.clear()
        return True

    def leave(self, user: object) -> None:
        """Nobody reads the rows for this user any more. Idempotent."""
        self._users.pop(user, None)
        if not self._users:
            self._is_unused.set()

    def lose(self, rows: SharedRows) -> None:
        """They could not be found where they should be."""
        if rows == self._rows:
            self._rows = None

    def has_answered(self) -> None:
        """One of the others has ended."""
        self._num_answering -= 1
        if not self._num_answering:
            self._is_answered.set()
