"""Small segments, hand-made turns, a clock to set and processes that die on command."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import pickle
import subprocess
import sys
from array import array
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import RayActorError

from phi_cluster.cluster.config import KVConfig, SessionsConfig
from phi_cluster.cluster.errors import KeeperMoved, PhiError
from phi_cluster.cluster.messages import BeginTurn, CommitTurn, ProcessId, SessionKey, TurnGrant
from phi_cluster.cluster.session.actor import SessionHost
from phi_cluster.cluster.session.hibernation_store import FileHibernationStore
from phi_cluster.cluster.session.journal import Glance, Journal
from phi_cluster.cluster.session.keeper import NodeSessions
from phi_cluster.cluster.session.kept_turns import HeldBy
from phi_cluster.cluster.session.segment import Segment, SegmentLayout
from phi_cluster.cluster.session.session import Session, SessionSettings
from phi_cluster.cluster.session.sqlite_journal import SQLiteJournal, glance, journals_nbytes, list_sessions
from phi_cluster.cluster.session_api import SessionQuery
from phi_cluster.model.kv_layout import KVCacheLayout
from tests.redis_process import RedisProcess
from tests.simulation.network import as_task_error

FINGERPRINT = "model-1"
_numbers = itertools.count(1)


class Clock:
    """Wall time in seconds that only moves when told."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Processes:
    """Which processes are alive."""

    dead: set[ProcessId] = field(default_factory=set)

    def is_alive(self, process: ProcessId) -> bool:
        return process not in self.dead


def ids(token_ids: Sequence[int]) -> bytes:
    return array("i", token_ids).tobytes()


def commit_turn(
    key: SessionKey,
    epoch: int,
    text: str,
    token_ids: Sequence[int],
    *,
    kept: tuple[int, int] = (0, 0),
    boundaries: tuple[tuple[int, int], ...] | None = None,
    request_id: str | None = None,
) -> CommitTurn:
    """A turn that keeps `kept` (chars, tokens) and has one boundary, at its end, unless told otherwise."""
    end = (kept[0] + len(text), kept[1] + len(token_ids))
    return CommitTurn(
        key=key,
        epoch=epoch,
        request_id=f"request-{epoch}" if request_id is None else request_id,
        num_kept_tokens=kept[1],
        num_kept_chars=kept[0],
        token_ids=ids(token_ids),
        text=text,
        boundaries=(end,) if boundaries is None else boundaries,
        num_prompt_tokens=end[1] - 1,
        num_cached_tokens=kept[1],
        num_completion_tokens=1,
        finish_reason="stop",
        sampling={"seed": 7, "temperature": 0.5, "logit_bias": [[3, -1.5]]},
        committed_at=1_000_000.0 + epoch,
    )


def write_kv(segment: Segment, start: int, stop: int, value: int) -> None:
    """Fill the rows of tokens [start, stop) in every region, as a network would."""
    kv = segment.layout.kv
    for layer in range(kv.num_layers):
        for which in (0, 1):
            offset = kv.region_offset(layer, which)
            rows = bytes([value]) * ((stop - start) * kv.row_nbytes)
            segment.kv_buffer[offset + start * kv.row_nbytes : offset + stop * kv.row_nbytes] = rows


def compute(segment: Segment, value: int) -> None:
    """Keys and values for all tokens that have none."""
    write_kv(segment, segment.num_computed_tokens, segment.num_tokens, value)
    segment.set_num_computed_tokens(segment.num_tokens)


@contextlib.contextmanager
def python_child(code: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A Python process and the words of the first line that it printed; killed with -9 at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().split()
        finally:
            process.kill()


def descriptors() -> list[str]:
    """The segments and journals that this process has open, one entry a descriptor."""
    gc.collect()
    names = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(name for name in names if "phi-kv" in name or ".sqlite" in name)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def processes() -> Processes:
    return Processes()


@pytest.fixture
def layout() -> SegmentLayout:
    """128 bytes a row: 32 rows a page; 2 layers, so 4 regions of 64 pages."""
    return SegmentLayout(KVCacheLayout(num_layers=2, num_kv_heads=2, head_dim=16, max_model_len=2048, itemsize=4))


@pytest.fixture
def settings(layout: SegmentLayout, clock: Clock, processes: Processes) -> SessionSettings:
    return SessionSettings(layout, FINGERPRINT, clock, processes.is_alive, poll_seconds=0.001, max_waiting=8)


@pytest.fixture
def key() -> SessionKey:
    return SessionKey("tenant", "demo")


@pytest.fixture
def make_journal(tmp_path: Path, clock: Clock) -> Iterator[Callable[..., SQLiteJournal]]:
    """SQLite journals under one state directory, closed at the end."""
    made: list[SQLiteJournal] = []

    def make(key: SessionKey, fingerprint: str = FINGERPRINT, **options: object) -> SQLiteJournal:
        made.append(SQLiteJournal(tmp_path, key, fingerprint, clock, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for journal in made:
        journal.close()


@pytest.fixture(scope="session")
def redis_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    process = RedisProcess(tmp_path_factory.mktemp("r"))
    yield process
    process.kill()


@dataclass
class Turns:
    """An engine and a replica in one: begins turns, writes into the segment as they would, commits."""

    settings: SessionSettings
    # By session and epoch.
    request_ids: dict[tuple[str, int], str] = field(default_factory=dict)

    async def begin(self, session: Session, text: str, request_id: str | None = None, **options: object) -> TurnGrant:
        request_id = request_id or f"r{next(_numbers)}"
        grant = await session.begin_turn(BeginTurn(session.key, request_id, text, **options))  # type: ignore[arg-type]
        assert isinstance(grant, TurnGrant)
        self.request_ids[grant.key.digest, grant.epoch] = request_id
        return grant

    def write(self, grant: TurnGrant, token_ids: Sequence[int], value: int = 1) -> int:
        """Trim to what the grant keeps, append, compute. Returns how many tokens were computed already."""
        segment = Segment.open(grant.segment, self.settings.layout, self.settings.fingerprint)
        segment.trim(grant.num_kept_tokens)
        cached = segment.num_computed_tokens
        segment.append_tokens(token_ids)
        compute(segment, value)
        segment.close()
        return cached

    async def run(self, session: Session, text: str, token_ids: Sequence[int], *, value: int = 1) -> TurnGrant:
        """A whole turn whose stored text becomes `text` and whose new ids are `token_ids`."""
        grant = await self.begin(session, text)
        self.write(grant, token_ids, value)
        session.commit(self.message(grant, text, token_ids))
        return grant

    def message(
        self, grant: TurnGrant, text: str, token_ids: Sequence[int], request_id: str | None = None
    ) -> CommitTurn:
        return commit_turn(
            grant.key,
            grant.epoch,
            text[grant.num_kept_chars :],
            token_ids,
            kept=(grant.num_kept_chars, grant.num_kept_tokens),
            request_id=request_id or self.request_ids[grant.key.digest, grant.epoch],
        )


@pytest.fixture
def turns(settings: SessionSettings) -> Turns:
    return Turns(settings)


class LocalActor:
    """A session actor's handle whose host runs in this process, until it is killed."""

    def __init__(self, host: SessionHost) -> None:
        self._host = host
        self.is_dead = False

    def restart(self, host: SessionHost) -> None:
        """In another process: whoever has the handle calls that one from now on."""
        self._host, self.is_dead = host, False

    def __getattr__(self, method: str) -> SimpleNamespace:
        async def call(*arguments: object) -> object:
            if self.is_dead:
                raise RayActorError
            try:
                return await getattr(self._host, method)(*arguments)
            except PhiError as error:
                # As Ray has it.
                raise as_task_error(error) from None

        return SimpleNamespace(remote=lambda *arguments: asyncio.ensure_future(call(*arguments)))

    def die(self) -> None:
        """As with kill -9: its memory goes, unless somebody else holds it."""
        self.is_dead = True
        session, self._host._session = self._host._session, None
        if session is not None:
            session._conversation.close()


class LocalActors:
    """In the place of RayActors."""

    def __init__(self, settings: SessionSettings, journal: Callable[[SessionKey], Journal], processes: Processes):
        self._settings, self._journal, self._processes = settings, journal, processes
        self.made: list[tuple[ProcessId, LocalActor]] = []

    def create(self) -> LocalActor:
        process = self._next_process()
        self.made.append((process, LocalActor(SessionHost(self._settings, self._journal, process))))
        return self.made[-1][1]

    async def restart(self, handle: LocalActor, process: ProcessId) -> ProcessId:
        if not handle.is_dead:
            self.kill(handle)
        await asyncio.sleep(0)
        process = self._next_process()
        handle.restart(SessionHost(self._settings, self._journal, process))
        self.made.append((process, handle))
        return process

    def _next_process(self) -> ProcessId:
        return ProcessId(900_000 + len(self.made), 1)

    def names(self) -> list[str]:
        return []

    def kill(self, handle: LocalActor) -> None:
        self._processes.dead.update(process for process, one in self.made if one is handle)
        handle.die()


class Node:
    """A keeper's NodeSessions over real memory and journals, with actors in this process, and its turns."""

    def __init__(self, settings: SessionSettings, state_dir: Path, processes: Processes, **options: Any) -> None:
        self.settings = settings
        self.layout = settings.layout

        class Journals:
            shared = options.pop("shared", False)

            def __init__(self) -> None:
                # Whose journals were looked into.
                self.looked_at: list[SessionKey] = []
                # Whose turns belong here from now on.
                self.seats: list[SessionKey] = []

            def open(self, key: SessionKey) -> SQLiteJournal:
                return SQLiteJournal(state_dir, key, settings.fingerprint, settings.clock)

            def take_seat(self, key: SessionKey) -> None:
                self.seats.append(key)

            def keys(self) -> list[SessionKey]:
                return list(list_sessions(state_dir))

            def nbytes(self) -> int:
                return journals_nbytes(state_dir)

            def glance(self, key: SessionKey) -> Glance | None:
                self.looked_at.append(key)
                return glance(state_dir, key)

        self.node_id = options.pop("node_id", "node")
        self.journals = options.pop("journals", None) or Journals()
        self.actors = LocalActors(settings, self.journals.open, processes)
        budget = options.pop("budget", 2**30)
        store = options.pop("store", FileHibernationStore(state_dir, 2**30, reserve_nbytes=0))
        secret = options.pop("export_secret", None)
        succession = {name: options.pop(name, None) for name in ("charge", "make_successor", "end_process")}
        kv = KVConfig(reserve_wait=options.pop("reserve_wait", 0.2))
        actors = cast(Any, self.actors)
        peers = options.pop("peers", None)
        sessions = SessionsConfig(**{"warm_actors": 0, "turn_wait": 0.2, "spawn_interval": 3600, **options})
        self.keeper = NodeSessions(
            settings,
            self.journals,
            actors,
            self.node_id,
            sessions,
            kv,
            budget,
            store,
            state_dir,
            None,
            secret,
            peers=peers,
            **succession,
        )

    async def listed(self, tenant: str) -> list[dict[str, Any]]:
        """Descriptions of the tenant's sessions, in order of their ids."""
        return (await self.keeper.browse(SessionQuery(tenant, 10))).sessions

    async def begin(self, key: SessionKey, text: str) -> tuple[TurnGrant, Any]:
        """The grant, and who gave it: call its `commit`."""
        request = BeginTurn(key, f"r{next(_numbers)}", text)
        await self.keeper.start()
        answer = await self.keeper.begin_turn(request)
        if isinstance(answer, HeldBy):
            grant = await answer.actor.begin_turn.remote(request)
            assert isinstance(grant, TurnGrant)
            return grant, lambda turn: answer.actor.commit.remote(turn)
        assert isinstance(answer, TurnGrant)
        return answer, self.keeper.commit

    async def turn(self, key: SessionKey, text: str, token_ids: Sequence[int], value: int = 1) -> TurnGrant:
        """A whole turn: the stored text becomes `text`, `token_ids` are appended, and all rows without one get
        `value`."""
        grant, commit = await self.begin(key, text)
        total = grant.num_kept_tokens + len(token_ids)
        await self.keeper.reserve(key, total)
        Turns(self.settings).write(grant, token_ids, value)
        kept = (grant.num_kept_chars, grant.num_kept_tokens)
        turn = commit_turn(key, grant.epoch, text[grant.num_kept_chars :], token_ids, kept=kept)
        stats = await commit(replace(turn, committed_at=self.settings.clock()))
        await self.keeper.settle(key, stats.kv_cache_bytes)
        return grant

    async def turn_unnamed(self, text: str, token_ids: Sequence[int], value: int = 1) -> TurnGrant:
        """The same in a conversation that nobody named; the grant tells which."""
        grant, commit = await self.begin(SessionKey("tenant", "", ephemeral=True), text)
        await self.keeper.reserve(grant.key, grant.num_kept_tokens + len(token_ids))
        Turns(self.settings).write(grant, token_ids, value)
        kept = (grant.num_kept_chars, grant.num_kept_tokens)
        await commit(commit_turn(grant.key, grant.epoch, text[grant.num_kept_chars :], token_ids, kept=kept))
        return grant

    async def memory(self, key: SessionKey) -> bytes:
        """All bytes of the session's segment behind its header's page."""
        described = self.keeper._roster.find(key)
        assert described is not None
        if described.session is not None:
            ref = described.session.memory
        else:
            ref = (await described.actor.handle.held.remote()).memory
        segment = Segment.open(ref, self.layout, self.settings.fingerprint)
        try:
            return os.pread(segment._fd, self.layout.nbytes - self.layout.ids_offset, self.layout.ids_offset)
        finally:
            segment.close()

    def leases(self) -> dict[str, int]:
        return dict(self.keeper._custody.ledger._leases)

    async def close(self) -> None:
        with contextlib.suppress(KeeperMoved):
            await self.keeper.close()
        for entry in self.keeper._roster:
            if entry.session is not None:
                entry.session._conversation.close()
        for _, actor in self.actors.made:
            actor.die()


class Link:
    """A keeper as another node's sees it. `between[method](answer)` stands between its answer and who asked; what it
    returns is the answer then."""

    def __init__(self, keeper: NodeSessions) -> None:
        self._keeper = keeper
        self.calls: list[str] = []
        self.between: dict[str, Any] = {}
        self.is_dead = False

    def __getattr__(self, method: str) -> SimpleNamespace:
        async def call(*arguments: object) -> object:
            if self.is_dead:
                raise RayActorError
            self.calls.append(method)
            answer = await getattr(self._keeper, method)(*arguments)
            if method in self.between:
                answer = await self.between[method](answer)
            if self.is_dead:
                raise RayActorError
            # As through Ray: what comes is a copy, and cannot be written to.
            return pickle.loads(pickle.dumps(answer, protocol=5))

        return SimpleNamespace(remote=lambda *arguments: asyncio.ensure_future(call(*arguments)))


@pytest.fixture
async def make_node(
    settings: SessionSettings, tmp_path: Path, processes: Processes
) -> AsyncIterator[Callable[..., Node]]:
    """Keepers of one state directory; of two, the second finds what the first one left."""
    made: list[Node] = []

    def make(**options: Any) -> Node:
        made.append(Node(settings, tmp_path, processes, **options))
        return made[-1]

    yield make
    for node in made:
        await node.close()


@pytest.fixture
def links() -> dict[str, Link]:
    """Keepers by node, as others see them."""
    return {}


@pytest.fixture
def make_nodes(make_node: Callable[..., Node], links: dict[str, Link], tmp_path: Path) -> Callable[..., list[Node]]:
    """Nodes that share journals, and nothing else."""

    def make(*names: str, **options: Any) -> list[Node]:
        def peers(node_id: str) -> Link:
            if node_id not in links:
                raise ValueError(node_id)
            return links[node_id]

        nodes = []
        for name in names:
            disk = tmp_path / name
            store = FileHibernationStore(disk, 2**30, options.get("key"), reserve_nbytes=0)
            some = {k: v for k, v in options.items() if k != "key"}
            node = make_node(store=store, shared=True, node_id=name, peers=peers, **some)
            # A thousand tokens a second: small sessions are worth moving.
            node.keeper._hibernation.policy.tokens_per_second = 1000.0
            links[name] = Link(node.keeper)
            nodes.append(node)
        return nodes

    return make


class Kit:
    """The functions above, for tests (which cannot import this file)."""

    ids = staticmethod(ids)
    turn = staticmethod(commit_turn)
    write_kv = staticmethod(write_kv)
    compute = staticmethod(compute)
    descriptors = staticmethod(descriptors)
    python_child = staticmethod(python_child)
    fingerprint = FINGERPRINT


@pytest.fixture
def kit() -> Kit:
    return Kit()
