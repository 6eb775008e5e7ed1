"""What tenants may use and have used: rates, turns at a time, and totals.

Owns: the token buckets, the turns that were admitted, and the totals. The keeper has it, because the limits must hold
over all replicas of a node, every turn comes by the keeper, and it is the keeper who knows how many sessions a tenant
has. Knows nothing of keys, of sessions' memory, Ray or HTTP; clock, storage and the liveness of processes are injected.

A keeper that is started again lets every bucket be full once more; the totals come back from the disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from phi_cluster.cluster.errors import LimitReached
from phi_cluster.cluster.messages import AdmitTurn, ProcessId, SessionKey, TenantLimits, TurnUsage
from phi_cluster.cluster.turn_api import Rates

_MINUTE = 60.0
# When a turn of the tenant's ends is not known: so many seconds are as good a guess as any.
_TURN_SECONDS = 1.0


@dataclass(frozen=True)
class UsageTotals:
    """Since `since` (wall clock, seconds). `refused`: turns that the tenant's own limits refused."""

    tenant: str
    since: float
    requests: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class UsageStore(Protocol):
    """Where the totals outlive the process."""

    def load(self) -> list[UsageTotals]:
        """All of them. Raises OSError."""
        ...

    def save(self, totals: Iterable[UsageTotals]) -> None:
        """Replaces those of the same tenants. Blocks. Raises OSError."""
        ...


class ForgetfulStore:
    """For a process whose totals need not outlive it."""

    def load(self) -> list[UsageTotals]:
        return []

    def save(self, totals: Iterable[UsageTotals]) -> None:
        """Nothing is kept."""


class Bucket:
    """Fills evenly up to what may be used in a minute; may be overdrawn, since what a turn takes is known afterwards.
    Times in seconds."""

    def __init__(self, limit: int, now: float):
        self._limit = limit
        self._level = float(limit)
        self._at = now

    def fill(self, limit: int, now: float) -> None:
        """Time has passed; the limit may be another one now."""
        self._level = min(self._level + max(now - self._at, 0.0) * limit / _MINUTE, float(limit))
        self._limit, self._at = limit, now

    def seconds_until(self, amount: float) -> float:
        """0 if so much is there already."""
        return max(amount - self._level, 0.0) * _MINUTE / self._limit

    def take(self, amount: float) -> None:
        """A negative amount is given back."""
        self._level = min(self._level - amount, float(self._limit))

    @property
    def rate(self) -> tuple[int, int, float]:
        """See turn_api.Rates."""
        return self._limit, max(int(self._level), 0), round(self.seconds_until(self._limit), 3)


@dataclass(frozen=True)
class _Turn:
    key: SessionKey
    process: ProcessId
    num_tokens: int
    node_id: str


@dataclass
class _Account:
    totals: UsageTotals
    limits: TenantLimits = field(default_factory=TenantLimits)
    requests: Bucket | None = None
    tokens: Bucket | None = None
    turns: dict[str, _Turn] = field(default_factory=dict)


class Accounts:
    """For one event loop. `clock` is wall time in seconds; a clock that is set back lets buckets wait, no more."""

    def __init__(
        self, store: UsageStore, clock: Callable[[], float], is_alive: Callable[[ProcessId], bool], node_id: str = ""
    ):
        """`is_alive` tells of processes of this node. Raises OSError if the totals cannot be read."""
        self._node_id = node_id
        self._store = store
        self._clock = clock
        self._is_alive = is_alive
        self._accounts = {totals.tenant: _Account(totals) for totals in store.load()}
        self._changed: set[str] = set()

    def admit(self, ask: AdmitTurn, known_sessions: Mapping[str, SessionKey]) -> Rates:
        """Lets a turn in, which ends with `charge`. `known_sessions` are the tenant's named ones. Raises LimitReached.

        Asked again with the same claim it changes nothing.
        """
        account = self._account(ask.key.tenant)
        account.limits = ask.limits
        self._fill(account)
        if ask.claim in account.turns:
            return _rates(account)
        try:
            self._check(account, ask, known_sessions)
        except LimitReached as refusal:
            refusal.rates = _rates(account)
            self._count(account, refused=1)
            raise
        if account.requests is not None:
            account.requests.take(1)
        num_tokens = 0
        if account.tokens is not None:
            # A full bucket is always enough, whatever a turn may take.
            num_tokens = min(ask.num_tokens, account.tokens.rate[0])
            account.tokens.take(num_tokens)
        account.turns[ask.claim] = _Turn(ask.key, ask.process, num_tokens, ask.node_id)
        self._count(account, requests=1)
        return _rates(account)

    def charge(self, usage: TurnUsage) -> None:
        """The turn is over. One that was not let in here (a keeper died meanwhile) counts in the totals only."""
        account = self._account(usage.tenant)
        turn = account.turns.pop(usage.claim, None)
        if turn is not None and account.tokens is not None:
            self._fill(account)
            used = usage.num_prompt_tokens - usage.num_cached_tokens + usage.num_completion_tokens
            account.tokens.take(used - turn.num_tokens)
        self._count(
            account,
            prompt_tokens=usage.num_prompt_tokens,
            cached_tokens=usage.num_cached_tokens,
            completion_tokens=usage.num_completion_tokens,
        )

    def check_new_session(self, key: SessionKey, known: Mapping[str, SessionKey]) -> None:
        """A session is about to be made without a turn. Raises LimitReached, by the limits of the last turn."""
        account = self._accounts.get(key.tenant)
        if account is not None:
            self._check_session(account, key, known)

    def limits_of(self, tenant: str) -> TenantLimits:
        """As its last turn brought them."""
        account = self._accounts.get(tenant)
        return TenantLimits() if account is None else account.limits

    def learn(self, tenant: str, limits: TenantLimits) -> None:
        """Another keeper keeps the tenant's account: what memory it may have here is to be known all the same."""
        self._account(tenant).limits = limits

    def elsewhere(self) -> set[tuple[str, ProcessId]]:
        """The processes, with their nodes, that have turns and are not on this node."""
        turns = (turn for account in self._accounts.values() for turn in account.turns.values())
        return {(turn.node_id, turn.process) for turn in turns if turn.node_id not in ("", self._node_id)}

    def ended(self, node_id: str, process: ProcessId) -> None:
        """A process on another node is dead, and nobody will say that its turns are over."""
        for account in self._accounts.values():
            for claim, turn in list(account.turns.items()):
                if (turn.node_id, turn.process) == (node_id, process):
                    del account.turns[claim]

    def num_turns(self, tenant: str) -> int:
        account = self._accounts.get(tenant)
        return 0 if account is None else len(account.turns)

    def totals(self, tenant: str | None = None) -> list[UsageTotals]:
        """Of all tenants that there are, or of one, by name."""
        if tenant is not None:
            return [self._account(tenant).totals]
        return [self._accounts[name].totals for name in sorted(self._accounts)]

    def leave(self) -> dict[str, Any]:
        """For a successor: buckets, turns and totals as they are."""
        return {"accounts": self._accounts, "changed": self._changed}

    def inherit(self, left: dict[str, Any]) -> None:
        """What a predecessor left."""
        self._accounts, self._changed = left["accounts"], left["changed"]

    async def save(self) -> None:
        """Stores what has changed since the last time. Raises OSError, and then the next time tries again."""
        if not self._changed:
            return
        changed, self._changed = self._changed, set()
        try:
            await asyncio.to_thread(self._store.save, [self._accounts[name].totals for name in changed])
        except BaseException:
            self._changed |= changed
            raise

    def _account(self, tenant: str) -> _Account:
        if tenant not in self._accounts:
            self._accounts[tenant] = _Account(UsageTotals(tenant, self._clock()))
        return self._accounts[tenant]

    def _fill(self, account: _Account) -> None:
        now, limits = self._clock(), account.limits
        account.requests = _filled(account.requests, limits.requests_per_minute, now)
        account.tokens = _filled(account.tokens, limits.tokens_per_minute, now)

    def _check(self, account: _Account, ask: AdmitTurn, known: Mapping[str, SessionKey]) -> None:
        limits = ask.limits
        if account.requests is not None and (seconds := account.requests.seconds_until(1)):
            raise LimitReached(
                f"this key may send {limits.requests_per_minute} requests a minute; try again in {seconds:.1f} s",
                retry_after=seconds,
            )
        if account.tokens is not None:
            wanted = min(ask.num_tokens, account.tokens.rate[0])
            if seconds := account.tokens.seconds_until(wanted):
                raise LimitReached(
                    f"this key may use {limits.tokens_per_minute} tokens a minute, and fewer are left than the "
                    f"{wanted} that are asked for; try again in {seconds:.1f} s, or lower max_tokens",
                    retry_after=seconds,
                )
        if limits.concurrent_turns is not None and len(account.turns) >= limits.concurrent_turns:
            self._forget_dead(account)
            if len(account.turns) >= limits.concurrent_turns:
                raise LimitReached(
                    f"this key may have {limits.concurrent_turns} requests at a time; wait until one has ended",
                    code="concurrency_limit_reached",
                    retry_after=_TURN_SECONDS,
                )
        if not ask.key.ephemeral:
            self._check_session(account, ask.key, known)

    def _check_session(self, account: _Account, key: SessionKey, known: Mapping[str, SessionKey]) -> None:
        most = account.limits.sessions
        if most is None or key.session_id in known:
            return
        # With those that are about to begin.
        new = {t.key.session_id for t in account.turns.values() if not t.key.ephemeral} - known.keys()
        if key.session_id not in new and len(known) + len(new) >= most:
            raise LimitReached(
                f"this key may have {most} sessions; delete one (DELETE /v1/sessions/...)",
                code="session_limit_reached",
            )

    def _forget_dead(self, account: _Account) -> None:
        """Turns whose replica died: nobody will say that they are over."""
        for claim, turn in list(account.turns.items()):
            # Of others it is found out apart (see `ended`).
            if turn.node_id in ("", self._node_id) and not self._is_alive(turn.process):
                del account.turns[claim]

    def _count(self, account: _Account, **more: int) -> None:
        totals = account.totals
        summed = {name: getattr(totals, name) + count for name, count in more.items()}
        account.totals = replace(totals, **summed)
        self._changed.add(totals.tenant)


def _filled(bucket: Bucket | None, limit: int | None, now: float) -> Bucket | None:
    if limit is None:
        return None
    if bucket is None:
        return Bucket(limit, now)
    bucket.fill(limit, now)
    return bucket


def _rates(account: _Account) -> Rates:
    buckets = {"requests": account.requests, "tokens": account.tokens}
    return {what: bucket.rate for what, bucket in buckets.items() if bucket is not None}
