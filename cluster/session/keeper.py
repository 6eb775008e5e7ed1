"""A node's keeper: it knows who holds each session, holds those that have no actor (yet), and leases KV memory.

Owns: the calls of replicas, users and the controller; what they are about is in its custody (custody.py). Restartable:
what actors hold outlives it, what it held itself comes back from the journals. Knows nothing of engines, text or
policy: the controller tells it whom to recycle.

A burst of new sessions starts here at once; actors follow one by one, at the lowest priority, and take the sessions
over between two turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from phi_cluster.cluster.config import KVConfig, SessionsConfig
from phi_cluster.cluster.errors import KeeperMoved, Overloaded
from phi_cluster.cluster.messages import (
    AdmitTurn,
    BeginTurn,
    CommitTurn,
    Moved,
    ProcessId,
    SegmentRef,
    SessionKey,
    TenantLimits,
    TurnGrant,
    TurnUsage,
)
from phi_cluster.cluster.processes import kill_for_sure, process_id
from phi_cluster.cluster.session.accounts import Accounts, ForgetfulStore, UsageStore
from phi_cluster.cluster.session.actor_pool import RayActors
from phi_cluster.cluster.session.administration import Administration
from phi_cluster.cluster.session.cache_export import SECRET_NBYTES, CacheExports, opened
from phi_cluster.cluster.session.catalog import Catalog, Known
from phi_cluster.cluster.session.custody import Custody
from phi_cluster.cluster.session.elsewhere import Elsewhere
from phi_cluster.cluster.session.evacuation import Evacuation, Evacuations
from phi_cluster.cluster.session.forks import Forks
from phi_cluster.cluster.session.glances import Glances
from phi_cluster.cluster.session.hibernation import Hibernation
from phi_cluster.cluster.session.hibernation_store import HibernationStore
from phi_cluster.cluster.session.journal import Glance, Journals
from phi_cluster.cluster.session.keeper_reporter import KeeperReporter
from phi_cluster.cluster.session.kept_turns import HeldBy, KeptTurns
from phi_cluster.cluster.session.moving import MoveResult, Moves
from phi_cluster.cluster.session.moving_memory import Piece
from phi_cluster.cluster.session.node_processes import NodeProcesses
from phi_cluster.cluster.session.offers import Offer, Offers
from phi_cluster.cluster.session.recycler import RecycleReason
from phi_cluster.cluster.session.reports import (
    KeeperReport,
    public_usage,
)
from phi_cluster.cluster.session.retention import Retention
from phi_cluster.cluster.session.session import SessionSettings, SessionStats
from phi_cluster.cluster.session.spool import SpoolRef
from phi_cluster.cluster.session.succession import Charge, Estate, SoleCharge
from phi_cluster.cluster.session.tenant_memory import TenantMemory
from phi_cluster.cluster.session.tenure import Successor, Tenure
from phi_cluster.cluster.session_api import ImportLimits, SessionPage, SessionQuery
from phi_cluster.cluster.turn_api import Rates
from phi_cluster.monitoring.session_metrics import SessionMetrics

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# Why the keeper takes sessions back from their actors.
_DEACTIVATION_REASONS = (
    RecycleReason.IDLE.value,
    RecycleReason.MEMORY_PRESSURE.value,
    RecycleReason.MIGRATING.value,
)


def _call(method: Callable[..., Awaitable[_T]]) -> Callable[..., Awaitable[_T]]:
    """One that others make: through the door, once there is all to answer it with."""

    @functools.wraps(method)
    async def called(self: NodeSessions, *arguments: Any, **named: Any) -> _T:
        async with self._tenure.door.inside():
            await self._tenure.start()
            return await method(self, *arguments, **named)

    return called


class NodeSessions:
    """All methods are short or wait without holding anything."""

    def __init__(
        self,
        settings: SessionSettings,
        journals: Journals,
        actors: RayActors,
        node_id: str,
        sessions: SessionsConfig,
        kv: KVConfig,
        budget_nbytes: int,
        store: HibernationStore | None,
        spool_folder: Path,
        usage: UsageStore | None = None,
        export_secret: Callable[[], bytes] | None = None,
        charge: Charge | None = None,
        make_successor: Callable[[], Awaitable[Successor]] | None = None,
        on_charge: Callable[[], None] = lambda: None,
        peers: Callable[[str], Any] | None = None,
        end_process: Callable[[], Awaitable[None]] | None = None,
    ):
        """`store` None: no session hibernates; `spool_folder`: see cache_export.py; `usage` None: the tenants' totals
        end with this object; `export_secret`: see cache_export.py (None: one that nobody else will ever know).
        `charge`, `make_successor`: see succession.py (None: there is no other keeper, and will be none); `on_charge` is
        called when this one begins to serve. `peers`: see moving.py (None: there is no other node). `end_process`: see
        tenure.py (None: kill -9). Raises OSError if totals cannot be read."""
        self._layout = settings.layout
        self._clock = settings.clock
        self._node_id = node_id
        self._process = process_id()
        self._metrics = SessionMetrics(_DEACTIVATION_REASONS, [result.value for result in MoveResult])
        self._custody = Custody(settings, journals, actors, sessions, kv, budget_nbytes, self._metrics)
        self._roster = self._custody.roster
        self._hibernation = Hibernation(self._custody, store)
        self._offers = Offers(self._custody, self._hibernation)
        self._moves = Moves(self._custody, self._hibernation, peers or _no_peers)
        self._evacuations = Evacuations(self._custody, self._hibernation, peers or _no_peers, node_id)
        secret = os.urandom(SECRET_NBYTES)
        caches = CacheExports(self._custody, export_secret or (lambda: secret), spool_folder)
        self._administration = Administration(self._custody, self._hibernation, caches, node_id)
        glances = Glances(self._custody)
        self._elsewhere = Elsewhere(self._custody, self._administration)
        self._catalog = Catalog(self._custody, self._hibernation, self._administration, glances, node_id)
        self._forks = Forks(self._custody)
        self._retention = Retention(self._custody, self._administration, self._hibernation, glances, sessions.retention)
        self._accounts = Accounts(usage or ForgetfulStore(), settings.clock, settings.is_alive, node_id)
        self._processes = NodeProcesses(self._accounts, peers or _no_peers)
        self._memory = TenantMemory(
            self._custody, lambda tenant: self._accounts.limits_of(tenant).kv_bytes, kv.reserve_wait
        )
        self._turns = KeptTurns(self._custody, self._hibernation, self._moves, self._memory)
        self._tenure = Tenure(
            self._custody,
            self._hibernation,
            self._accounts,
            charge or SoleCharge(),
            make_successor,
            self._is_bound,
            on_charge,
            end_process or functools.partial(kill_for_sure, self._process),
        )
        self._reporter = KeeperReporter(
            node_id,
            self._process,
            self._custody,
            self._hibernation,
            self._accounts,
            self._processes,
            self._elsewhere,
            self._moves,
            self._forks,
            self._retention,
        )

    async def start(self) -> int:
        """See `Tenure.start`."""
        return await self._tenure.start()

    async def renew(self) -> bool:
        """See `Tenure.renew`."""
        return await self._tenure.renew()

    async def succeed(self, estate: Estate) -> int:
        """See `Tenure.succeed`."""
        return await self._tenure.succeed(estate)

    async def close(self) -> int:
        """Ends all actors; conversations stay in their journals. Returns how many named sessions there are."""
        await self.start()
        if self._tenure.door.is_left:
            raise KeeperMoved("this keeper has a successor")
        await self._reporter.save_usage()
        self._custody.hands.close()
        return sum(1 for _ in self._roster.stored_keys())

    def _is_bound(self) -> bool:
        """What is on its way is bound to this process."""
        return bool(self._moves.num_coming or self._offers.num_open)

    # A turn.

    @_call
    async def begin_turn(self, request: BeginTurn) -> TurnGrant | HeldBy:
        return await self._turns.begin(request)

    @_call
    async def commit(self, commit: CommitTurn) -> SessionStats | HeldBy | Moved:
        return await self._turns.commit(commit)

    @_call
    async def abandon(self, key: SessionKey, epoch: int) -> SessionStats | HeldBy | Moved:
        return await self._turns.abandon(key, epoch)

    @_call
    async def lay_prompt(
        self, key: SessionKey, epoch: int, source: SegmentRef, num_tokens: int
    ) -> int | HeldBy | Moved:
        """See `Session.lay_prompt`."""
        return await self._turns.lay_prompt(key, epoch, source, num_tokens)

    @_call
    async def withdraw(self, key: SessionKey, claim: str) -> bool | HeldBy | Moved:
        return await self._turns.withdraw(key, claim)

    @_call
    async def reserve(self, key: SessionKey, num_tokens: int, num_shared_tokens: int = 0) -> None:
        """See `KeptTurns.reserve`."""
        await self._turns.reserve(key, num_tokens, num_shared_tokens)

    @_call
    async def settle_early(self, key: SessionKey) -> None:
        """The session's turn goes on without more memory than it has."""
        await self._turns.settle_early(key)

    @_call
    async def settle(self, key: SessionKey, nbytes: int) -> None:
        """A turn with the session's actor is over."""
        self._turns.settle(key, nbytes)

    @_call
    async def drop_cache(self, key: SessionKey) -> None:
        """The session's turn gave way to others: so does its memory, unless another turn of it has begun."""
        await self._custody.drop_cache(key)

    @_call
    async def actor_died(self, key: SessionKey) -> None:
        """A replica could not reach the session's actor: if it is dead, the session goes on here, in its memory."""
        await self._custody.actor_died(key)

    # What tenants may use.

    @_call
    async def admit(self, ask: AdmitTurn) -> Rates:
        """Before each turn of a tenant with a key. Raises LimitReached."""
        return self._accounts.admit(ask, self._roster.named(ask.key.tenant))

    @_call
    async def charge(self, usage: TurnUsage) -> None:
        """After it, however it ended."""
        self._accounts.charge(usage)

    @_call
    async def learn_limits(self, tenant: str, limits: TenantLimits) -> None:
        """Another node's keeper keeps the accounts of all."""
        self._accounts.learn(tenant, limits)

    @_call
    async def are_alive(self, processes: list[ProcessId]) -> list[bool]:
        """Processes of this node."""
        return [self._custody.settings.is_alive(process) for process in processes]

    @_call
    async def usage(self, tenant: str | None) -> list[dict[str, Any]]:
        """Under the names of the HTTP API; None: of all tenants that have used anything."""
        return [
            public_usage(
                totals,
                num_turns=self._accounts.num_turns(totals.tenant),
                num_sessions=len(self._roster.named(totals.tenant)),
                kv_cache_nbytes=self._memory.usage(totals.tenant),
            )
            for totals in self._accounts.totals(tenant)
        ]

    # Between nodes.

    @_call
    async def move_here(self, key: SessionKey, source_node_id: str, always: bool = False) -> bool:
        """See `Moves.move_here`."""
        return await self._moves.move_here(key, source_node_id, always=always)

    @_call
    async def evacuate(self, targets: Sequence[str], seconds: float = 60.0) -> Evacuation:
        """See `Evacuations.evacuate`."""
        return await self._evacuations.evacuate(targets, seconds)

    @_call
    async def offer(self, key: SessionKey) -> Offer | None:
        """See `Offers.offer`; then `piece`, and `let_go` at the end."""
        return await self._offers.offer(key)

    @_call
    async def piece(self, move_id: str, number: int) -> Piece | None:
        return await self._offers.piece(move_id, number)

    @_call
    async def let_go(self, move_id: str, taken: bool) -> bool:
        return await self._offers.let_go(move_id, taken=taken)

    @_call
    async def room(self) -> int:
        """Bytes of KV memory that are not leased."""
        return self._custody.ledger.available

    # Where sessions are, where there are several nodes.

    @_call
    async def locate(self, key: SessionKey) -> Glance | None:
        """What the journal tells at a glance, its seat too; without one, nothing of the session is kept here either.
        Raises the journal's errors."""
        seen = await asyncio.to_thread(self._custody.journals.glance, key)
        if seen is None and self._custody.journals.shared and self._roster.is_known(key):
            await self._elsewhere.check(key)
        return seen

    @_call
    async def survey(self, query: SessionQuery, only_held: bool) -> list[Known]:
        """See `Catalog.survey`."""
        return await self._catalog.survey(query, only_held=only_held)

    @_call
    async def described(self, keys: list[SessionKey]) -> list[dict[str, Any] | None]:
        """See `Catalog.described`."""
        return await self._catalog.described(keys)

    # Administration.

    @_call
    async def describe(self, key: SessionKey) -> dict[str, Any]:
        """One session under the names of the HTTP API. Raises NotFound."""
        return await self._administration.describe(key)

    @_call
    async def browse(self, query: SessionQuery) -> SessionPage:
        """A page of the named sessions. Raises InvalidRequest if its place is gone."""
        return await self._catalog.browse(query)

    @_call
    async def clear(self, key: SessionKey) -> dict[str, Any]:
        """Raises NotFound and SessionBusy."""
        return await self._administration.clear(key)

    @_call
    async def delete(self, key: SessionKey) -> None:
        """Raises NotFound and SessionBusy."""
        await self._administration.delete(key)

    @_call
    async def recycle(self, key: SessionKey, reason: RecycleReason) -> dict[str, Any]:
        """Renews the session's actor (or gives it back, by reason). Raises NotFound and SessionBusy."""
        return await self._administration.recycle(key, reason)

    @_call
    async def hibernate(self, key: SessionKey) -> dict[str, Any]:
        """By a user's wish. Raises NotFound, SessionBusy and StorageFull."""
        return await self._administration.hibernate(key)

    @_call
    async def put_to_sleep(self, key: SessionKey) -> None:
        """By policy: nobody has used the session for long. Raises as `hibernate`."""
        await self._hibernation.hibernate(key, is_asked=False)

    @_call
    async def delete_unused(self) -> int:
        """Deletes sessions that nobody has used for longer than they are kept; returns how many."""
        return await self._retention.sweep()

    @_call
    async def export(self, key: SessionKey, cache_up_to: int | None = None) -> bytes | SpoolRef:
        """The session as a file; see `Administration.export`. Raises NotFound."""
        return await self._administration.export(key, cache_up_to)

    @_call
    async def export_fetched(self, token: bytes) -> None:
        """The file of an export is open where it was asked for."""
        self._administration.fetched(token)

    @_call
    async def said(self, key: SessionKey) -> str:
        """The conversation's text. Raises NotFound and the journal's errors."""
        return self._administration.said(key)

    @_call
    async def import_session(self, key: SessionKey, data: bytes | SpoolRef, limits: ImportLimits) -> dict[str, Any]:
        """Makes a session of such a file. Raises SessionExists, BadExport and LimitReached."""
        self._accounts.check_new_session(key, self._roster.named(key.tenant))
        with opened(data, limits.max_turns_nbytes) as given:
            if given.has_cache:
                await self._memory.come_within(key.tenant, given.nbytes)
            return await self._administration.import_session(key, given, limits.vocab_size)

    @_call
    async def fork(self, key: SessionKey, new: SessionKey, turn: int | None) -> dict[str, Any]:
        """See `Forks.fork`; returns the new session's description. Raises LimitReached too."""
        self._accounts.check_new_session(new, self._roster.named(new.tenant))
        with contextlib.suppress(Overloaded):
            # Its cache is worth copying.
            await self._hibernation.wake(key)
        await self._memory.come_within(key.tenant, self._custody.ledger.lease(key.digest))
        await self._forks.fork(key, new, turn)
        return await self._administration.describe(new)

    @_call
    async def report(self, events_after: int = 0) -> KeeperReport:
        """With what happened behind the event numbered so in this keeper's log."""
        return await self._reporter.report(events_after)


def _no_peers(node_id: str) -> Any:
    raise ValueError(f"no other nodes are known, nor {node_id}")
