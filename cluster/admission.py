"""Whether a tenant may have one more turn, and what it used.

Owns: asking before a turn and telling after it, however it ends: every turn of whatever endpoint comes by here. Knows
nothing of how limits are kept (session/accounts.py), of keys' files, HTTP and Ray.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import asdict, replace
from typing import Any, Protocol

from phi_cluster.cluster.errors import LimitReached, PhiError
from phi_cluster.cluster.messages import AdmitTurn, ProcessId, SessionKey, TenantLimits, TurnUsage
from phi_cluster.cluster.turn_api import (
    ChoiceFinished,
    Rates,
    TextDelta,
    TurnEvent,
    TurnRequest,
    TurnRunner,
    TurnStarted,
    UsageBook,
)

logger = logging.getLogger(__name__)

# What is taken from the rate of tokens for a reply whose length was not limited, until it is known.
_GUESSED_REPLY_TOKENS = 256


class Accountant(Protocol):
    """Whoever keeps the accounts; implemented by `session.directory`."""

    async def admit(self, ask: AdmitTurn) -> Rates:
        """Raises LimitReached."""
        ...

    async def charge(self, usage: TurnUsage) -> None: ...


class UsageOfKeys:
    """What tenants have used, with what they may use now (implements turn_api.UsageBook)."""

    def __init__(self, book: UsageBook, limits_of: Callable[[str], TenantLimits]):
        self._book = book
        self._limits_of = limits_of

    async def usage(self, tenant: str | None) -> list[dict[str, Any]]:
        """See turn_api.UsageBook."""
        return [{**one, "limits": asdict(self._limits_of(one["name"]))} for one in await self._book.usage(tenant)]


class BoundedTurns(TurnRunner, Protocol):
    """Runs turns, so many at a time."""

    def check_room(self, num_choices: int = 1) -> None:
        """Raises Overloaded if a turn more, of so many replies, would be refused."""
        ...


class AdmittedTurns:
    """Runs turns within their tenants' limits (implements turn_api.TurnRunner). For one event loop. `process` is this
    one: what it was granted ends with it."""

    def __init__(
        self,
        turns: BoundedTurns,
        accountant: Accountant,
        limits_of: Callable[[str], TenantLimits],
        process: ProcessId,
    ):
        self._turns = turns
        self._accountant = accountant
        self._limits_of = limits_of
        self._process = process
        self._charging: set[asyncio.Task[None]] = set()

    async def run(self, request: TurnRequest) -> AsyncGenerator[TurnEvent, None]:
        """See turn_api.TurnRunner.run; raises LimitReached before the first event."""
        # Before anybody else is asked: in a flood that would be the most of the work.
        self._turns.check_room(request.num_choices)
        usage = TurnUsage(request.tenant, uuid.uuid4().hex)
        is_refused = False
        try:
            try:
                rates = await self._accountant.admit(self._ask(request, usage.claim))
            except LimitReached:
                is_refused = True
                raise
            async with aclosing(self._turns.run(request)) as events:
                async for event in events:
                    if isinstance(event, TurnStarted):
                        event = replace(event, rates=rates or None)
                    usage = _counted(usage, event)
                    yield event
        finally:
            # Also if nobody knows whether it was let in. In the background: an await here may be cancelled.
            if not is_refused:
                self._charge_later(usage)

    async def charged(self) -> None:
        """Until all that was used is told."""
        while self._charging:
            await asyncio.wait(set(self._charging))

    def _ask(self, request: TurnRequest, claim: str) -> AdmitTurn:
        max_tokens: int | None = request.sampling["max_tokens"]
        return AdmitTurn(
            key=SessionKey(request.tenant, request.session_id or "", ephemeral=request.session_id is None),
            limits=self._limits_of(request.tenant),
            claim=claim,
            process=self._process,
            num_tokens=request.num_choices * (_GUESSED_REPLY_TOKENS if max_tokens is None else max_tokens),
        )

    def _charge_later(self, usage: TurnUsage) -> None:
        task = asyncio.get_running_loop().create_task(self._charge(usage))
        self._charging.add(task)
        task.add_done_callback(self._charging.discard)

    async def _charge(self, usage: TurnUsage) -> None:
        try:
            await self._accountant.charge(usage)
        except PhiError as error:
            logger.warning("what a turn used was not counted: %s", error)


def _counted(usage: TurnUsage, event: TurnEvent) -> TurnUsage:
    if isinstance(event, TextDelta):
        return replace(usage, num_completion_tokens=usage.num_completion_tokens + event.num_tokens)
    if isinstance(event, ChoiceFinished):
        return usage
    counted = replace(usage, num_prompt_tokens=event.num_prompt_tokens, num_cached_tokens=event.num_cached_tokens)
    if isinstance(event, TurnStarted):
        return counted
    # The turn's own totals win over what was counted here.
    return replace(counted, num_completion_tokens=event.num_completion_tokens)
