"""Where a session is: a replica's view of the sessions of its node.

Owns: the way from a session's key to whoever holds it (an actor, called directly, or the keeper), following it when
it moves and when a holder dies. Implements what `turn` and the HTTP edge ask of sessions. Knows nothing of text,
engines or HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ray.exceptions import RayActorError, RayError, RayTaskError

from phi_cluster.cluster.errors import KeeperMoved, PhiError, SessionExists, StaleEpoch, Unavailable
from phi_cluster.cluster.messages import (
    JOURNAL_BEGIN,
    AdmitTurn,
    BeginTurn,
    CommitTurn,
    Moved,
    ProcessId,
    SegmentRef,
    SessionKey,
    Stretch,
    TurnGrant,
    TurnUsage,
)
from phi_cluster.cluster.processes import end_of
from phi_cluster.cluster.session.keeper import HeldBy
from phi_cluster.cluster.session.keeper_finder import KeeperFinder
from phi_cluster.cluster.session.recycler import RecycleReason
from phi_cluster.cluster.session.session import SessionStats
from phi_cluster.cluster.session.spool import open_spooled
from phi_cluster.cluster.session.uploads import Uploads
from phi_cluster.cluster.session_api import Download, ImportLimits, SessionPage, SessionQuery
from phi_cluster.cluster.turn_api import Rates

_T = TypeVar("_T")

_REMEMBERED_HOLDERS = 4096
# A keeper that was killed is back in seconds, on a busy machine in tens of them.
_RETRIES = 300
_RETRY_SECONDS = 0.1
# So many hops are made at once; who needs more goes round in circles, because something is about to change.
_QUICK_HOPS = 3
# For an answer that came just before its sender died.
_LATE_SECONDS = 0.05


class JournalObserver(Protocol):
    """Measures what is told of journals. Times in seconds."""

    def on_begin(self, seconds: float) -> None:
        """A turn was begun in its journal."""
        ...

    def on_commit(self, seconds: float, nbytes: int) -> None:
        """So much was recorded of it."""
        ...


class SessionDirectory:
    """For one event loop. `spool_folder`: see uploads.py; `end_of`: see processes.py."""

    def __init__(
        self,
        keeper: KeeperFinder,
        spool_folder: Path,
        journals: JournalObserver | None = None,
        end_of: Callable[[ProcessId], AbstractContextManager[asyncio.Future[None]]] = end_of,
    ):
        self._keeper = keeper
        self._journals = journals
        self._end_of = end_of
        self._uploads = Uploads(spool_folder)
        self._holders: OrderedDict[str, HeldBy] = OrderedDict()
        self._background: set[asyncio.Future[Any]] = set()
        # By session: the memory of its last turn is being settled with the keeper.
        self._settling: dict[str, asyncio.Future[None]] = {}
        # By session: a prompt is being copied into it, which must not be torn.
        self._laying: dict[str, asyncio.Future[int]] = {}

    # What a turn asks.

    async def begin_turn(self, request: BeginTurn) -> TurnGrant:
        """Raises SessionBusy, and Unavailable if no holder answers."""
        begin = asyncio.ensure_future(self._call(request.key, "begin_turn", request))
        try:
            grant: TurnGrant = await asyncio.shield(begin)
        except asyncio.CancelledError:
            # The client left while it waited: a turn that begins all the same must not stay open.
            self._in_background(self._withdraw(request, begin))
            raise
        if self._journals is not None:
            for one in grant.stretches:
                if one.name == JOURNAL_BEGIN:
                    self._journals.on_begin(one.seconds)
        return grant

    async def reserve(self, key: SessionKey, num_tokens: int) -> None:
        """Raises Overloaded."""
        await self._ask_keeper("reserve", key, num_tokens)

    async def commit(self, commit: CommitTurn) -> Stretch | None:
        """When it was recorded; None: it was already. Raises StaleEpoch and the journal's errors. The turn is over in
        any case."""
        try:
            stats = await self._call(commit.key, "commit", commit)
        except StaleEpoch:
            if commit.key.ephemeral:
                return None
            raise
        recorded = stats.recorded if isinstance(stats, SessionStats) else None
        if self._journals is not None and recorded is not None:
            self._journals.on_commit(recorded.seconds, len(commit.token_ids) + len(commit.text))
        await self._settle(commit.key, stats)
        return recorded

    async def lay_prompt(self, grant: TurnGrant, source: SegmentRef, num_tokens: int) -> None:
        """The turn's session, which is new, gets the first tokens of another one's memory, as far as they are to be
        had."""
        key = grant.key
        laying = self._in_background(self._call(key, "lay_prompt", key, grant.epoch, source, num_tokens))
        self._laying[key.digest] = laying
        laying.add_done_callback(lambda _: self._laying.pop(key.digest, None))
        with contextlib.suppress(Unavailable):
            await asyncio.shield(laying)

    async def abandon(self, key: SessionKey, epoch: int) -> None:
        if laying := self._laying.get(key.digest):
            await asyncio.wait((laying,))
        await self._settle(key, await self._call(key, "abandon", key, epoch))

    async def admit(self, ask: AdmitTurn) -> Rates:
        """Raises LimitReached."""
        return await self._ask_keeper("admit", ask)

    async def charge(self, usage: TurnUsage) -> None:
        await self._ask_keeper("charge", usage)

    async def give_way(self, key: SessionKey) -> None:
        # What its turn held is settled before, not after the next one has leased.
        settling = self._settling.pop(key.digest, None)
        if settling is not None:
            await asyncio.wait((settling,))
        await self._ask_keeper("drop_cache", key)

    # What an administrator asks.

    async def usage(self, tenant: str | None) -> list[dict[str, Any]]:
        """See turn_api.UsageBook."""
        return await self._ask_keeper("usage", tenant)

    async def browse(self, query: SessionQuery) -> SessionPage:
        return await self._ask_keeper("browse", query)

    async def get(self, tenant: str, session_id: str) -> dict[str, Any]:
        return await self._ask_keeper("describe", SessionKey(tenant, session_id))

    async def delete(self, tenant: str, session_id: str) -> None:
        await self._ask_keeper("delete", SessionKey(tenant, session_id))

    async def clear(self, tenant: str, session_id: str) -> dict[str, Any]:
        return await self._ask_keeper("clear", SessionKey(tenant, session_id))

    async def recycle(self, tenant: str, session_id: str) -> dict[str, Any]:
        return await self._ask_keeper("recycle", SessionKey(tenant, session_id), RecycleReason.REQUESTED)

    async def hibernate(self, tenant: str, session_id: str) -> dict[str, Any]:
        return await self._ask_keeper("hibernate", SessionKey(tenant, session_id))

    async def said(self, tenant: str, session_id: str) -> str:
        """What the conversation's text is (see Transcript.text)."""
        return await self._ask_keeper("said", SessionKey(tenant, session_id))

    async def export(self, tenant: str, session_id: str, cache_up_to: int | None = None) -> Download:
        """Raises Unavailable too."""
        answer = await self._ask_keeper("export", SessionKey(tenant, session_id), cache_up_to)
        if isinstance(answer, bytes):
            return Download(io.BytesIO(answer), len(answer))
        try:
            return Download(open_spooled(answer), answer.nbytes)
        except OSError:
            raise Unavailable("the keeper has died with the exported session; try again", retry_after=1) from None
        finally:
            self._in_background(self._told_fetched(answer.token))

    async def import_session(
        self, tenant: str, new_session_id: str | None, data: AsyncIterator[bytes], limits: ImportLimits
    ) -> dict[str, Any]:
        """Raises Overloaded and StorageFull too."""
        new = SessionKey(tenant, new_session_id or uuid.uuid4().hex)
        async with self._uploads.received(data) as received:
            try:
                return await self._ask_keeper("import_session", new, received, limits)
            except SessionExists:
                if new_session_id is not None:
                    raise
                # Nobody else knows the name: the first answer was lost.
                return await self.get(tenant, new.session_id)

    async def fork(self, tenant: str, session_id: str, new_session_id: str | None, turn: int | None) -> dict[str, Any]:
        new = SessionKey(tenant, new_session_id or uuid.uuid4().hex)
        try:
            return await self._ask_keeper("fork", SessionKey(tenant, session_id), new, turn)
        except SessionExists:
            if new_session_id is not None:
                raise
            # Nobody else knows the name: the first answer was lost.
            return await self.get(tenant, new.session_id)

    # Inside.

    async def _call(self, key: SessionKey, method: str, *arguments: Any) -> Any:
        """Calls whoever holds the session, and follows it. Not for calls that may not be repeated: a commit is
        idempotent, an epoch may be taken twice."""
        digest = key.digest
        for attempt in range(_RETRIES):
            if attempt >= _QUICK_HOPS:
                await asyncio.sleep(_RETRY_SECONDS)
            actor = self._holders.get(digest)
            try:
                if actor is not None:
                    answer = await self._ask_actor(actor, method, *arguments)
                else:
                    answer = await _unwrapped(getattr(self._find_keeper(), method).remote(*arguments))
            except KeeperMoved:
                await self._on_keeper_moved(attempt)
                continue
            except RayActorError:
                # The keeper is being restarted, or the actor died: the keeper knows where the session goes on.
                self._holders.pop(digest, None)
                if actor is not None:
                    await self._ask_keeper("actor_died", key)
                elif attempt < _QUICK_HOPS:
                    await asyncio.sleep(_RETRY_SECONDS)
                continue
            if isinstance(answer, HeldBy):
                self._remember(digest, answer)
            elif isinstance(answer, Moved):
                if actor is None:
                    # Not even the keeper has it: an unnamed conversation that is gone.
                    return answer
                if self._holders.get(digest) is actor:
                    del self._holders[digest]
            else:
                return answer
        raise Unavailable("the session cannot be reached; try again", retry_after=2)

    async def _ask_actor(self, held: HeldBy, method: str, *arguments: Any) -> Any:
        """Raises RayActorError as soon as its process has ended: Ray, which restarts the actor, tells it only a second
        later."""
        answer = asyncio.ensure_future(_unwrapped(getattr(held.actor, method).remote(*arguments)))
        # Whoever asked may have gone.
        answer.add_done_callback(lambda late: late.cancelled() or late.exception())
        with self._end_of(held.process) as ended:
            await asyncio.wait({answer, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                # It may have been on the way.
                await asyncio.wait({answer}, timeout=_LATE_SECONDS)
        if answer.done():
            return answer.result()
        raise RayActorError(error_msg="the session's actor has died")

    async def _ask_keeper(self, method: str, *arguments: Any) -> Any:
        for attempt in range(_RETRIES):
            try:
                return await _unwrapped(getattr(self._find_keeper(), method).remote(*arguments))
            except KeeperMoved:
                await self._on_keeper_moved(attempt)
            except RayActorError:
                await asyncio.sleep(_RETRY_SECONDS)
        raise Unavailable("the keeper of this node does not answer; try again", retry_after=2)

    async def _on_keeper_moved(self, attempt: int) -> None:
        self._keeper.moved()
        if attempt:
            # Neither is in charge yet.
            await asyncio.sleep(_RETRY_SECONDS)

    def _find_keeper(self) -> Any:
        """Raises RayActorError while there is none."""
        try:
            return self._keeper()
        except ValueError:
            raise RayActorError(error_msg="this node has no keeper (yet)") from None

    async def _settle(self, key: SessionKey, stats: SessionStats | Moved) -> None:
        # The keeper settles what it holds itself. A turn under way is a later one, with a lease of its own.
        if isinstance(stats, SessionStats) and not stats.in_turn and key.digest in self._holders:
            settling = self._in_background(self._ask_keeper("settle", key, stats.kv_cache_bytes))
            self._settling[key.digest] = settling
            settling.add_done_callback(lambda _: self._settled(key.digest, settling))

    async def _told_fetched(self, token: bytes) -> None:
        # Else it waits a minute.
        with contextlib.suppress(PhiError, RayError):
            await self._ask_keeper("export_fetched", token)

    async def _withdraw(self, request: BeginTurn, begin: asyncio.Future[TurnGrant]) -> None:
        if not begin.done():
            # Whatever comes of it: if the turn begins all the same, it is ended.
            with contextlib.suppress(PhiError, RayError):
                await self._call(request.key, "withdraw", request.key, request.attempt)
        try:
            grant = await begin
        except (PhiError, RayError):
            return
        with contextlib.suppress(PhiError, RayError):
            await self.abandon(grant.key, grant.epoch)

    def _remember(self, digest: str, actor: HeldBy) -> None:
        self._holders[digest] = actor
        self._holders.move_to_end(digest)
        if len(self._holders) > _REMEMBERED_HOLDERS:
            self._holders.popitem(last=False)

    def _settled(self, digest: str, settling: asyncio.Future[None]) -> None:
        if self._settling.get(digest) is settling:
            del self._settling[digest]

    def _in_background(self, work: Awaitable[_T]) -> asyncio.Future[_T]:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


async def _unwrapped(call: Awaitable[Any]) -> Any:
    """Our own errors as they were raised, not as Ray wraps them."""
    try:
        return await call
    except RayTaskError as error:
        if isinstance(error.cause, PhiError):
            raise error.cause from None
        raise
