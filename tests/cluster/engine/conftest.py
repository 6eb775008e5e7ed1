"""The engine's surroundings as fakes: a memory that knows when it may be written, and a network that notices if
anything it needs is not there.

The fake network's logits are a hash of the rows it finds in the cache, each row being the token and the regime it
was written with. So a missing, stale, misplaced or foreign row changes the reply or fails.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from phi_cluster.cluster.engine.engine import Engine, EngineLimits
from phi_cluster.cluster.engine.model_runner import ModelRunner
from phi_cluster.cluster.engine.sequence import Sequence as EngineSequence
from phi_cluster.cluster.engine.settings import Speculation
from phi_cluster.cluster.frames import SequenceOutput
from phi_cluster.model.phi3 import SequenceChunk
from phi_cluster.model.sampling_params import SamplingParams

VOCAB_SIZE = 40
BYTES_PER_TOKEN = 10


class FakeCache:
    """Rows by position."""

    def __init__(self) -> None:
        self.rows: dict[int, tuple[int, bool]] = {}
        self.closed = False

    def write(self, position: int, token_id: int, long_rope: bool) -> None:
        assert not self.closed, "a row is written after the memory was released"
        self.rows[position] = (token_id, long_rope)


class FakeKV:
    """A SequenceKV in plain lists. Refuses everything after `close`, and lengths that are not true."""

    bytes_per_token = BYTES_PER_TOKEN
    # As if so many rows were shared with others.
    num_lasting_tokens = 0

    def __init__(self, token_ids: Sequence[int], long_rope: bool = False) -> None:
        self.token_ids = list(token_ids)
        self.num_computed_tokens = 0
        self._long_rope = long_rope
        self.cache = FakeCache()
        # Names of the calls that change something, and what must fail.
        self.calls: list[tuple[str, Any]] = []
        self.broken: set[str] = set()

    def _call(self, name: str, argument: Any = None) -> None:
        assert not self.cache.closed, f"{name} after the memory was released"
        self.calls.append((name, argument))
        if name in self.broken:
            raise OSError(f"{name} is broken")

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def long_rope(self) -> bool:
        return self._long_rope

    @long_rope.setter
    def long_rope(self, value: bool) -> None:
        self._call("long_rope", value)
        assert self.num_computed_tokens == 0, "the regime changes under stored rows"
        self._long_rope = value

    def trim(self, num_tokens: int) -> None:
        self._call("trim", num_tokens)
        self.num_computed_tokens = min(self.num_computed_tokens, num_tokens)
        del self.token_ids[num_tokens:]
        self.cache.rows = {p: row for p, row in self.cache.rows.items() if p < num_tokens}

    def append_tokens(self, token_ids: list[int]) -> None:
        self._call("append_tokens", list(token_ids))
        self.token_ids += token_ids

    def set_computed(self, num_tokens: int) -> None:
        self._call("set_computed", num_tokens)
        assert 0 <= num_tokens <= self.num_tokens
        for position in range(num_tokens):
            assert self.cache.rows[position] == (self.token_ids[position], self._long_rope)
        self.num_computed_tokens = num_tokens

    def clear(self) -> None:
        self._call("clear")
        self.num_computed_tokens = min(self.num_lasting_tokens, self.num_computed_tokens)
        self.cache.rows = {p: row for p, row in self.cache.rows.items() if p < self.num_computed_tokens}

    def close(self) -> None:
        self._call("close")
        self.cache.closed = True

    def reopen(self) -> FakeKV:
        """The same memory, mapped again for another turn."""
        again = FakeKV(self.token_ids, self._long_rope)
        again.num_computed_tokens = self.num_computed_tokens
        again.cache.rows = dict(self.cache.rows)
        return again


class FakeModel:
    """Logits [sum of num_logits, VOCAB_SIZE] from the rows that the cache holds up to each token. `long_from` is the
    first length in the long regime."""

    def __init__(self, long_from: int | None = None) -> None:
        self.rope = SimpleNamespace(
            regime_for=lambda n: "long" if long_from is not None and n >= long_from else "short"
        )
        # [(start, number of tokens)] of each step's chunks, and how many rows of logits each wanted.
        self.steps: list[list[tuple[int, int]]] = []
        self.wanted: list[list[int]] = []
        # Called with a step's chunks before anything is written; may raise.
        self.before: Callable[[Sequence[SequenceChunk]], None] = lambda chunks: None
        # Changes the logits after one token, given all tokens up to it.
        self.bend: Callable[[torch.Tensor, list[int]], None] = lambda row, token_ids: None

    def forward(self, chunks: Sequence[SequenceChunk]) -> torch.Tensor:
        self.before(chunks)
        self.steps.append([(chunk.start, len(chunk.token_ids)) for chunk in chunks])
        self.wanted.append([chunk.num_logits for chunk in chunks])
        rows = [row for chunk in chunks for row in self._rows(chunk)]
        return torch.stack(rows) if rows else torch.empty(0, VOCAB_SIZE)

    def _rows(self, chunk: SequenceChunk) -> list[torch.Tensor]:
        cache: Any = chunk.kv_cache
        assert 0 <= chunk.num_logits <= len(chunk.token_ids) >= 1
        for i, token_id in enumerate(chunk.token_ids.tolist()):
            cache.write(chunk.start + i, token_id, chunk.long_rope)
        end = chunk.start + len(chunk.token_ids)
        rows = [cache.rows[position] for position in range(end)]
        assert {long_rope for _, long_rope in rows} == {chunk.long_rope}, "rows of both regimes"
        return [self._logits(rows[:length]) for length in range(end - chunk.num_logits + 1, end + 1)]

    def _logits(self, rows: list[tuple[int, bool]]) -> torch.Tensor:
        digest = hashlib.blake2b(repr(rows).encode(), digest_size=8).digest()
        numbers = np.random.Generator(np.random.Philox(int.from_bytes(digest, "big"))).standard_normal(VOCAB_SIZE)
        logits = torch.from_numpy(numbers.astype(np.float32) * 3)
        self.bend(logits, [token_id for token_id, _ in rows])
        return logits


def repeating(row: torch.Tensor, token_ids: list[int]) -> None:
    """A `bend`: mostly the last token alone says which one comes next, so replies soon go round in circles, and leave
    them again."""
    row[(7 * token_ids[-1] + 3) % 11] += 9.0


class Lab:
    """Makes engines and sequences on fakes, and runs them to their end."""

    vocab_size = VOCAB_SIZE
    bytes_per_token = BYTES_PER_TOKEN
    KV = FakeKV
    Model = FakeModel
    repeating = staticmethod(repeating)

    def params(self, **overrides: Any) -> SamplingParams:
        return SamplingParams(**{"seed": 1, "max_tokens": 8, "temperature": 0.8, **overrides})

    def sequence(
        self,
        sequence_id: int,
        token_ids: Sequence[int] | None = None,
        *,
        kv: FakeKV | None = None,
        num_prompt_tokens: int | None = None,
        max_num_tokens: int = 10_000,
        **params: Any,
    ) -> EngineSequence:
        """On new memory with these ids, or on `kv` as it is."""
        if kv is None:
            assert token_ids is not None
            kv = FakeKV(token_ids)
        return EngineSequence(
            sequence_id=sequence_id,
            kv=kv,
            token_ids=list(kv.token_ids),
            num_prompt_tokens=kv.num_tokens if num_prompt_tokens is None else num_prompt_tokens,
            params=self.params(**params),
            max_num_tokens=max_num_tokens,
        )

    def engine(
        self,
        model: FakeModel | None = None,
        *,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 64,
        max_model_len: int = 1000,
        max_kv_bytes: int | None = None,
        clock: Callable[[], float] = lambda: 0.0,
        speculation: Speculation | None = None,
    ) -> Engine:
        limits = EngineLimits(max_num_seqs, max_num_batched_tokens, max_model_len, max_kv_bytes)
        runner = ModelRunner(model or FakeModel(), SimpleNamespace(vocab_size=VOCAB_SIZE))
        return Engine(limits, runner, clock, speculation)

    def drain(self, engine: Engine, max_steps: int = 2000) -> dict[int, Reply]:
        """Step until there is no work; replies by sequence id."""
        replies: dict[int, Reply] = {}
        for _ in range(max_steps):
            if not engine.has_work:
                return replies
            self.collect(engine.step(), replies)
        raise AssertionError(f"still at work after {max_steps} steps")

    def collect(self, outputs: list[SequenceOutput], replies: dict[int, Reply]) -> None:
        """Add one step's outputs, checking what must hold of any."""
        assert len({o.sequence_id for o in outputs}) == len(outputs)
        for output in outputs:
            replies.setdefault(output.sequence_id, Reply()).take(output)

    def alone(self, model: FakeModel, sequence: EngineSequence) -> Reply:
        """The reply of a sequence that has an engine for itself and is computed in one piece."""
        engine = self.engine(model, max_num_batched_tokens=10_000)
        engine.add(sequence)
        return self.drain(engine)[sequence.sequence_id]


class Reply:
    """All outputs of one sequence. Refuses outputs after the release, a second finish, a second first."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.released = False
        self.num_cached_tokens: int | None = None
        self.error: str | None = None
        self.num_outputs = 0

    def take(self, output: SequenceOutput) -> None:
        assert not self.released, "an output after the release"
        assert (output.num_cached_tokens is not None) == (self.num_outputs == 0)
        if output.finish_reason is not None:
            assert self.finish_reason is None
            self.finish_reason = output.finish_reason
        if output.released:
            assert self.finish_reason is not None
        if self.num_outputs == 0:
            self.num_cached_tokens = output.num_cached_tokens
        self.num_outputs += 1
        self.token_ids += output.token_ids
        self.released = output.released
        self.error = output.error


@pytest.fixture
def lab() -> Lab:
    return Lab()
