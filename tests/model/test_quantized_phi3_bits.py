"""The compiled network's promise: a sequence's logits and stored rows are the same bits whatever else is in a step,
however its tokens are cut into chunks, and on any number of threads.

What is expected is always the sequence alone, its tokens in one chunk, on one thread; the same instruction set.
"""

from __future__ import annotations

import gc
import random
import runpy
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from phi_cluster.model.config import Phi3Config
from phi_cluster.model.kv_cache import KVCache
from phi_cluster.model.ops import library
from phi_cluster.model.phi3 import SequenceChunk
from phi_cluster.model.quantized_phi3 import QuantizedPhi3ForCausalLM
from phi_cluster.model.sampler import ROW

tiny = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("random_network.py"))))

pytestmark = pytest.mark.skipif(library.problem() is not None, reason=f"no kernels: {library.problem()}")

DTYPES = ["int8", "int4", "int8_int8"]
KINDS = ["bfloat16", "int8"]
ISAS = tiny.available()
# Longer than a super block of attention (512 positions).
MAX_MODEL_LEN = 640
MAX_DRAFTS = 5
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.05 * i for i in range(6)],
    "long_factor": [1.5 + 0.7 * i for i in range(6)],
}
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "window_mha": {"num_key_value_heads": 4, "sliding_window": 37},
    "longrope_partial": {
        "original_max_position_embeddings": 24,
        "rope_scaling": LONGROPE,
        "partial_rotary_factor": 0.75,
        "tie_word_embeddings": True,
    },
    # Heads as wide as Phi-3-mini's, and three for each kv head as SmolLM2's.
    "mini": {"hidden_size": 192, "num_attention_heads": 2},
    "groups_of_3": {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1},
    # Nothing is a multiple of 16; 3 query heads for each kv head.
    "odd": {"hidden_size": 60, "num_attention_heads": 6, "intermediate_size": 50, "vocab_size": 133},
}


@dataclass(frozen=True)
class Subject:
    """A kind of network, and its weights."""

    config: Phi3Config
    weights: dict[str, Tensor]
    activations: str
    kind: str
    isa: str
    max_model_len: int = MAX_MODEL_LEN

    def network(self, num_threads: int = 1) -> QuantizedPhi3ForCausalLM:
        return tiny.network(
            self.config, self.weights, self.kind, self.max_model_len, self.isa, num_threads, self.activations
        )

    def cache(self) -> KVCache:
        return tiny.new_cache(self.config, self.kind, self.max_model_len)


def subject(variant: str, dtype: str, kind: str, isa: str) -> Subject:
    config = tiny.config(**VARIANTS[variant])
    return Subject(config, tiny.weights(config, dtype), tiny.activations(dtype), kind, isa)


@dataclass(frozen=True, eq=False)
class Session:
    """Token ids, and what they give alone: logits after each, and the stored rows."""

    ids: Tensor
    long_rope: bool
    logits: Tensor
    rows: Tensor

    def chunk(self, start: int, n: int, cache: KVCache, num_logits: int = 1) -> SequenceChunk:
        return SequenceChunk(self.ids[start : start + n], start, cache, self.long_rope, num_logits)


def stored(cache: KVCache, num_tokens: int) -> Tensor:
    """uint8 [regions, bytes]"""
    return cache.rows[:, :num_tokens].contiguous().view(torch.uint8).flatten(1)


def make_sessions(of: Subject, lengths: list[int], seed: int = 0) -> list[Session]:
    network, generator = of.network(), torch.Generator().manual_seed(seed)
    sessions = []
    for length in lengths:
        ids = torch.randint(of.config.vocab_size, (length,), generator=generator)
        cache, long_rope = of.cache(), network.rope.regime_for(length) == "long"
        logits = network.forward_all(SequenceChunk(ids, 0, cache, long_rope)).clone()
        assert logits.isfinite().all()
        sessions.append(Session(ids, long_rope, logits, stored(cache, length)))
    network.close()
    return sessions


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def random_lengths(rng: random.Random, count: int, long: int) -> list[int]:
    """Short and middling ones, and one of `long`."""
    return [rng.choice([1, 2, rng.randint(3, 12), rng.randint(13, 70)]) for _ in range(count - 1)] + [long]


class Traffic:
    """Random steps over sessions until all are computed: prefills in chunks of any size, decodes, wrong guesses behind
    true tokens, tokens computed twice, logits wanted or not; some sessions rest, and the order changes."""

    def __init__(self, of: Subject, sessions: list[Session], rng: random.Random, largest: int = 40):
        self.rng = rng
        self.sessions = sessions
        self.caches = {session: of.cache() for session in sessions}
        self.done = dict.fromkeys(sessions, 0)
        self.vocab_size = of.config.vocab_size
        self.num_compared = self.num_steps = 0
        self.largest = largest

    def run(self, network: QuantizedPhi3ForCausalLM) -> None:
        while self.unfinished:
            self.step(network)
        for session, cache in self.caches.items():
            n = len(session.ids)
            assert torch.equal(stored(cache, n), session.rows)

    @property
    def unfinished(self) -> list[Session]:
        return [session for session in self.sessions if self.done[session] < len(session.ids)]

    def step(self, network: QuantizedPhi3ForCausalLM) -> None:
        unfinished = self.unfinished
        few = self.rng.random() < 0.2
        chosen = self.rng.sample(unfinished, self.rng.randint(1, min(len(unfinished), 3 if few else 32)))
        chunks, expected = [], []
        for session in chosen:
            chunk, logits = self.chunk(session)
            chunks.append(chunk)
            expected.append(logits)
        actual = network.forward(chunks).split([chunk.num_logits for chunk in chunks])
        for rows, logits in zip(actual, expected, strict=True):
            # What follows wrong guesses counts for nothing.
            assert same_bits(rows[: len(logits)], logits)
            self.num_compared += len(logits)
        self.num_steps += 1

    def chunk(self, session: Session) -> tuple[SequenceChunk, Tensor]:
        """A session's next chunk, and the logits that its true tokens must give."""
        rng, start = self.rng, self.done[session]
        if rng.random() < 0.1:
            start = rng.randint(0, start)
        left = len(session.ids) - start
        # Except far from the end.
        n = 1 if rng.random() < 0.4 else rng.randint(1, self.largest if left < 100 else left)
        n = min(n, left)
        end = start + n
        num_logits = rng.choice([0, 1, n, n, rng.randint(0, n)])
        expected = session.logits[end - num_logits : end]
        chunk = session.chunk(start, n, self.caches[session], num_logits)
        self.done[session] = max(self.done[session], end)
        if num_logits and rng.random() < 0.2:
            guesses = torch.tensor([rng.randrange(self.vocab_size) for _ in range(rng.randint(1, MAX_DRAFTS))])
            chunk.token_ids = torch.cat([chunk.token_ids, guesses])
            chunk.num_logits += len(guesses)
            # They have overwritten what follows.
            self.done[session] = end
        return chunk, expected


# Alone and together.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "plain"] or ISAS)
def test_32_sessions_alone_and_together(isa, variant, dtype, kind):
    of = subject(variant, dtype, kind, isa)
    rng = random.Random(f"{variant} {dtype} {kind}")
    sessions = make_sessions(of, random_lengths(rng, 32, long=560))
    assert variant != "longrope_partial" or len({session.long_rope for session in sessions}) == 2
    # Large chunks and few steps, small ones and many.
    for num_threads, largest in ((1, 40), (2, 4), (2, 40), (3, 20)):
        network, traffic = of.network(num_threads), Traffic(of, sessions, rng, largest)
        traffic.run(network)
        assert traffic.num_compared > 150
        assert traffic.num_steps > 5
        network.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_kernels_alone_and_together(dtype, kind):
    of = subject("gqa", dtype, kind, "plain")
    rng = random.Random(f"{dtype} {kind}")
    sessions = make_sessions(of, random_lengths(rng, 12, long=20))
    Traffic(of, sessions, rng).run(of.network(2))


@pytest.mark.parametrize("seed", range(12))
def test_random_chunkings(seed):
    """A few sequences, many ways to cut them; each seed another network."""
    rng = random.Random(seed)
    isa = ISAS[0] if seed % 6 else "plain"
    of = subject(rng.choice(list(VARIANTS)), rng.choice(DTYPES), rng.choice(KINDS), isa)
    sessions = make_sessions(of, [rng.randint(1, 40 if isa == "plain" else 300) for _ in range(3)], seed)
    network = of.network(rng.choice([1, 2, 3]))
    for _ in range(2 if isa == "plain" else 6):
        Traffic(of, sessions, rng, rng.choice([2, 8, 40, 100])).run(network)
    network.close()


# Special cases, by hand.


@pytest.fixture(params=[(dtype, kind) for dtype in DTYPES for kind in KINDS], ids=lambda pair: "-".join(pair))
def gqa(request: pytest.FixtureRequest) -> Subject:
    return subject("gqa", *request.param, ISAS[0])


@pytest.mark.parametrize("length", [1, 31, 32, 33, 512, 513, 600])
def test_token_by_token(gqa, length):
    [session] = make_sessions(gqa, [length], length)
    network, cache = gqa.network(2), gqa.cache()
    for start in range(length):
        assert same_bits(network.forward([session.chunk(start, 1, cache)]), session.logits[start : start + 1])
    assert torch.equal(stored(cache, length), session.rows)


def test_a_long_sequence_on_any_number_of_threads(gqa):
    """Four super blocks, which threads share where there is nothing else to share."""
    of = replace(gqa, max_model_len=1700)
    [session] = make_sessions(of, [1640])
    for num_threads in (1, 2, 3):
        network, cache = of.network(num_threads), of.cache()
        start = 0
        for size in (700, 1, 300, 598, *[1] * 30, 3, 7, 1):
            assert same_bits(
                network.forward([session.chunk(start, size, cache)]), session.logits[start + size - 1 : start + size]
            )
            start += size
        assert start == 1640
        assert torch.equal(stored(cache, start), session.rows)


def test_a_closed_network_is_refused(gqa):
    """Its memory is gone: whoever comes late is told, and reads none of it."""
    [session] = make_sessions(gqa, [4])
    network = gqa.network()
    network.close()
    network.close()
    for use in (
        lambda: network.forward([session.chunk(0, 4, gqa.cache())]),
        lambda: network.draw(np.zeros(0, ROW)),
        lambda: network.progress,
    ):
        with pytest.raises(RuntimeError, match="closed"):
            use()


def test_wanted_logits_are_the_last(gqa):
    [session] = make_sessions(gqa, [50])
    network = gqa.network()
    assert same_bits(network.forward_all(session.chunk(0, 50, gqa.cache(), 0)), session.logits)
    for num_logits in range(51):
        cache = gqa.cache()
        logits = network.forward([session.chunk(0, 50, cache, num_logits)])
        assert logits.shape == (num_logits, gqa.config.vocab_size)
        assert same_bits(logits, session.logits[50 - num_logits :])
        # Rows are stored whatever is wanted.
        assert torch.equal(stored(cache, 50), session.rows)


def test_wanted_logits_of_several_chunks_come_in_order(gqa):
    sessions = make_sessions(gqa, [5, 3, 1, 9])
    network = gqa.network(2)
    for wanted in ([1, 1, 1, 1], [0, 2, 1, 0], [5, 3, 1, 9], [0, 0, 0, 3], [4, 0, 0, 0], [0, 0, 0, 0]):
        chunks = [s.chunk(0, len(s.ids), gqa.cache(), num) for s, num in zip(sessions, wanted, strict=True)]
        expected = torch.cat([s.logits[len(s.ids) - num :] for s, num in zip(sessions, wanted, strict=True)])
        logits = network.forward(chunks)
        assert logits.shape == expected.shape
        assert same_bits(logits, expected)


def test_a_cache_that_was_cleared_and_computed_again_holds_the_same_bytes(gqa):
    [session] = make_sessions(gqa, [130])
    network, cache = gqa.network(2), gqa.cache()
    for sizes in ([130], [1] * 130, [100, 30], [7, 64, 1, 58], [129, 1]):
        cache.clear()
        start = 0
        for size in sizes:
            network.forward([session.chunk(start, size, cache, 0)])
            start += size
        assert torch.equal(stored(cache, 130), session.rows)


def test_a_trimmed_cache_equals_one_that_was_never_longer(gqa):
    long, other = make_sessions(gqa, [90, 60])
    network, cache = gqa.network(), gqa.cache()
    network.forward([long.chunk(0, 90, cache)])
    mixed = torch.cat([long.ids[:40], other.ids[:30]])
    logits = network.forward_all(SequenceChunk(mixed[40:], 40, cache)).clone()
    fresh = gqa.cache()
    expected = network.forward_all(SequenceChunk(mixed, 0, fresh))
    assert same_bits(logits, expected[40:])
    assert torch.equal(stored(cache, 70), stored(fresh, 70))


def test_only_the_chunks_rows_are_written(gqa):
    session, other = make_sessions(gqa, [20, 20])
    network, cache = gqa.network(3), gqa.cache()
    network.forward([session.chunk(0, 20, cache)])
    everything = cache.rows.view(torch.uint8).flatten(2).clone()
    network.forward([other.chunk(5, 3, cache)])
    changed = (cache.rows.view(torch.uint8).flatten(2) != everything).any(dim=2)
    assert changed.any(dim=0).nonzero().flatten().tolist() == [5, 6, 7]
    assert changed[:, 5:8].all()


def test_what_is_not_finite_stays_in_its_session(gqa):
    sessions = make_sessions(gqa, [40] * 9)
    network = gqa.network(2)
    caches = [gqa.cache() for _ in sessions]
    network.forward([s.chunk(0, 30, cache) for s, cache in zip(sessions, caches, strict=True)])
    # All of its stored rows become NaN.
    caches[4].rows.view(torch.uint8)[:, :30] = 0xFF
    for start, n in ((30, 1), (31, 9)):
        logits = network.forward([s.chunk(start, n, cache, n) for s, cache in zip(sessions, caches, strict=True)])
        for i, (session, rows) in enumerate(zip(sessions, logits.split(n), strict=True)):
            if i == 4:
                assert rows.isnan().all()
            else:
                assert same_bits(rows, session.logits[start : start + n])


def test_weights_and_caches_may_lie_anywhere_and_networks_keep_their_weights(gqa):
    [session] = make_sessions(gqa, [30])
    # Odd addresses: the packed file aligns them, but nothing may depend on it but speed.
    moved = {}
    for name, tensor in gqa.weights.items():
        room = torch.zeros(tensor.nbytes + 64, dtype=torch.uint8)
        first = (-room.data_ptr()) % 64 + tensor.itemsize
        moved[name] = room[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    network = replace(gqa, weights=moved).network()
    del moved, tensor, room
    gc.collect()
    assert same_bits(network.forward_all(session.chunk(0, 30, gqa.cache())), session.logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa.startswith(("avx512", "amx"))])
def test_instruction_sets_with_fused_sums_agree(isa, kind, dtype):
    """A server may move between such CPUs."""
    for variant in VARIANTS:
        of = subject(variant, dtype, kind, isa)
        sessions = make_sessions(replace(of, isa="avx2"), [1, 5, 33, 70])
        Traffic(of, sessions, random.Random(variant)).run(of.network(2))
