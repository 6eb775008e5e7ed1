"""The keeper's process, and how one makes its successor: a node's sessions with Ray's actors and journals on the disk.

Owns: what a keeper is made of, and the Ray actors of two names that follow each other. Knows nothing of what a keeper
does (keeper.py), and of when one is renewed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from typing import Any

import ray

from phi_cluster.cluster.actors import NAMESPACE, create, detached_options, keeper_names, keeper_of
from phi_cluster.cluster.config import KVConfig, SessionsConfig
from phi_cluster.cluster.heap import keep_heap_trimmed
from phi_cluster.cluster.logs import log_as
from phi_cluster.cluster.messages import ProcessId
from phi_cluster.cluster.session.actor import session_settings
from phi_cluster.cluster.session.actor_pool import RayActors
from phi_cluster.cluster.session.cache_export import ExportSecret
from phi_cluster.cluster.session.hibernation_store import FileHibernationStore, read_key
from phi_cluster.cluster.session.journals import JournalPlace, open_journals
from phi_cluster.cluster.session.keeper import NodeSessions
from phi_cluster.cluster.session.segment_layout import SegmentLayout
from phi_cluster.cluster.session.succession import Estate, FileCharge
from phi_cluster.cluster.session.tenure import Successor
from phi_cluster.cluster.session.usage_file import UsageFile

# So long after a keeper has taken over, its predecessor and what that has open are not needed any more.
_LINGER_SECONDS = 10.0


# Whoever waits here, for a turn or for memory, must not take the place of the commit that it waits for: Ray's default
# is 1000.
@ray.remote(num_cpus=0, max_concurrency=15_000)  # type: ignore[call-overload]
class Keeper(NodeSessions):
    """A node's sessions in a process of their own, with Ray's actors and journals on the disk."""

    def __init__(
        self,
        layout: SegmentLayout,
        fingerprint: str,
        place: JournalPlace,
        sessions: SessionsConfig,
        kv: KVConfig,
        budget_nbytes: int,
        name: str,
    ):
        """`name`: one of the two that keepers of its node have."""
        log_as("keeper")
        keep_heap_trimmed()
        settings = session_settings(layout, fingerprint)
        node_id = ray.get_runtime_context().get_node_id()
        actors = RayActors(layout, fingerprint, place, node_id)
        journals = open_journals(place, fingerprint, settings.clock, node_id)
        state_path = place.state_path
        usage = UsageFile(state_path / "usage.sqlite")
        store = None
        if kv.hibernate_quota:
            key = read_key(kv.hibernate_key_file) if kv.hibernate_key_file else None
            store = FileHibernationStore(state_path, kv.hibernate_quota, key)
        secret = ExportSecret(state_path / "export.key")
        [other] = [one for one in keeper_names(node_id) if one != name]
        arguments = (layout, fingerprint, place, sessions, kv, budget_nbytes)
        super().__init__(
            settings,
            journals,
            actors,
            node_id,
            sessions,
            kv,
            budget_nbytes,
            store,
            state_path,
            usage,
            secret,
            charge=FileCharge(state_path / "keeper.lock"),
            make_successor=functools.partial(_make_successor, other, node_id, arguments),
            on_charge=functools.partial(_end_later, other),
            peers=keeper_of,
        )

    async def process(self) -> ProcessId:
        """Answers when it is up, whether in charge or not."""
        return self._process


class _RaySuccessor:
    def __init__(self, handle: Any):
        self._handle = handle

    async def succeed(self, estate: Estate) -> int:
        """See `Tenure.succeed`."""
        return await self._handle.succeed.remote(estate)

    def give_up(self) -> None:
        """It ends for good."""
        ray.kill(self._handle)


async def _make_successor(name: str, node_id: str, arguments: tuple[Any, ...]) -> Successor:
    """Under this name, up, and not in charge. Raises RayError."""
    _end(name)
    handle = create(Keeper, detached_options(name, node_id), *arguments, name)
    await handle.process.remote()
    return _RaySuccessor(handle)


def _end_later(name: str) -> None:
    asyncio.get_running_loop().call_later(_LINGER_SECONDS, _end, name)


def _end(name: str) -> None:
    """The keeper of this name, which is not in charge, ends for good, if there is one."""
    with contextlib.suppress(ValueError):
        ray.kill(ray.get_actor(name, namespace=NAMESPACE))
