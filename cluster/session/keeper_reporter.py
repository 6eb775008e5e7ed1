"""What a keeper tells the controller once a round, and what it looks at on that occasion.

Owns: how the numbers of a KeeperReport are found, and the chores of a round: turns that ended without a word, files of
resting sessions, tenants' totals, the disk that journals take. Knows nothing of what the controller makes of them.
"""

from __future__ import annotations

import asyncio
import logging
import math

from phi_cluster.cluster.messages import ProcessId
from phi_cluster.cluster.processes import private_bytes
from phi_cluster.cluster.session.accounts import Accounts
from phi_cluster.cluster.session.custody import Custody
from phi_cluster.cluster.session.elsewhere import Elsewhere
from phi_cluster.cluster.session.forks import Forks
from phi_cluster.cluster.session.hibernation import Hibernation
from phi_cluster.cluster.session.journal import JournalUnavailable
from phi_cluster.cluster.session.moving import Moves
from phi_cluster.cluster.session.node_processes import NodeProcesses
from phi_cluster.cluster.session.reports import KeeperReport, SessionReport, private_or_zero
from phi_cluster.cluster.session.retention import Retention
from phi_cluster.cluster.session.roster import Entry
from phi_cluster.cluster.session.session import SessionStats

logger = logging.getLogger(__name__)

# A session that the keeper holds closes its journal's file after so long without a turn.
_REST_SECONDS = 30.0
# Between two looks at how much disk the journals take.
_JOURNALS_SECONDS = 20.0


class KeeperReporter:
    """For one event loop."""

    def __init__(
        self,
        node_id: str,
        process: ProcessId,
        custody: Custody,
        hibernation: Hibernation,
        accounts: Accounts,
        processes: NodeProcesses,
        elsewhere: Elsewhere,
        moves: Moves,
        forks: Forks,
        retention: Retention,
    ):
        self._node_id = node_id
        self._process = process
        self._custody = custody
        self._hibernation = hibernation
        self._accounts = accounts
        self._processes = processes
        self._elsewhere = elsewhere
        self._moves = moves
        self._forks = forks
        self._retention = retention
        # Disk that journals take, and when that was looked at (the loop's seconds).
        self._journal_nbytes = 0
        self._journals_seen_at = -math.inf

    async def report(self, events_after: int) -> KeeperReport:
        """With what happened behind the event numbered so in the keeper's log."""
        entries = list(self._custody.roster)
        leased = [self._custody.ledger.lease(entry.key.digest) for entry in entries]
        stats = await asyncio.gather(*(self._custody.stats(entry) for entry in entries))
        for entry, s, before in zip(entries, stats, leased, strict=True):
            if before == self._custody.ledger.lease(s.key.digest) != s.kv_cache_bytes:
                # A turn that ended without a word (its replica died): the lease shrinks to what is really there.
                self._custody.settle(entry, s)
            if entry.session is not None and not entry.session.in_turn and s.idle_seconds > _REST_SECONDS:
                entry.session.rest()
        await self.save_usage()
        await self._processes.look()
        await self._look_at_journals()
        in_memory = {entry.key.digest for entry in entries}
        on_disk = [key for key in self._custody.roster.stored_keys() if key.digest not in in_memory]
        asleep = [nbytes for key in on_disk if (nbytes := self._hibernation.nbytes(key)) is not None]
        return KeeperReport(
            node_id=self._node_id,
            process=self._process,
            budget_nbytes=self._custody.ledger.capacity,
            reserved_nbytes=self._custody.ledger.usage,
            sessions=[self._reported(entry, s) for entry, s in zip(entries, stats, strict=True)],
            num_stored=len(on_disk) - len(asleep),
            num_hibernated=len(asleep),
            hibernated_nbytes=sum(asleep),
            num_warm=self._custody.hands.num_warm,
            activations=self._custody.hands.activations,
            recycles=dict(self._custody.hands.recycles),
            private_nbytes=private_bytes(),
            journal_nbytes=self._journal_nbytes,
            snapshot=self._custody.metrics.snapshot(),
            usage=self._accounts.totals(),
            events=self._custody.events.after(events_after),
            move_bytes_per_second=self._moves.speed.bytes_per_second,
            compute_tokens_per_second=self._hibernation.policy.tokens_per_second,
            counts={"forks": self._forks.made, "deletions": self._retention.deleted, **self._hibernation.counts},
        )

    async def save_usage(self) -> None:
        """What tenants have used, to the disk."""
        try:
            await self._accounts.save()
        except OSError as error:
            # No turn fails for it; the next round tries again.
            logger.warning("what tenants have used was not stored: %s", error)

    async def _look_at_journals(self) -> None:
        """Now and then: there may be many files."""
        now = asyncio.get_running_loop().time()
        if now - self._journals_seen_at < _JOURNALS_SECONDS:
            return
        self._journals_seen_at = now
        try:
            self._journal_nbytes = await asyncio.to_thread(self._custody.journals.nbytes)
            if self._custody.journals.shared:
                await self._elsewhere.look()
        except JournalUnavailable as error:
            logger.warning("the journals were not looked at: %s", error.message)

    def _reported(self, entry: Entry, stats: SessionStats) -> SessionReport:
        pid = None if entry.actor is None else entry.actor.process.pid
        return SessionReport(stats, pid, private_or_zero(pid), entry.private_baseline)
