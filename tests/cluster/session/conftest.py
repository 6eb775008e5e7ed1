"""Small segments, hand-made turns, a clock to set and processes that die on command."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from phi_cluster.cluster.messages import BeginTurn, CommitTurn, ProcessId, SessionKey, TurnGrant
from phi_cluster.cluster.session.segment import Segment, SegmentLayout
from phi_cluster.cluster.session.session import Session, SessionSettings
from phi_cluster.cluster.session.sqlite_journal import SQLiteJournal
from phi_cluster.model.kv_layout import KVCacheLayout

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
