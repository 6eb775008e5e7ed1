"""The compiled network against torch's on the same rounded weights, and what it refuses.

That a result depends on its own sequence only is test_quantized_phi3_bits.py's.
"""

from __future__ import annotations

import functools
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from phi_cluster.model.checkpoint import expected_tensors
from phi_cluster.model.config import Phi3Config
from phi_cluster.model.flat_weights import pack_weights, protect_read_only, view_weights
from phi_cluster.model.kv_cache import KVCache
from phi_cluster.model.kv_layout import KVCacheLayout
from phi_cluster.model.ops import library, reference, reference_attention
from phi_cluster.model.phi3 import Phi3ForCausalLM, SequenceChunk
from phi_cluster.model.quantize import dequantize_int4, dequantize_int8
from phi_cluster.model.quantized_phi3 import QuantizedPhi3ForCausalLM

tiny = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("random_network.py"))))

pytestmark = pytest.mark.skipif(library.problem() is not None, reason=f"no kernels: {library.problem()}")

DTYPES = ["int8", "int4", "int8_int8", "int4_int8"]
KINDS = ["bfloat16", "int8"]
ISAS = tiny.available()
MAX_MODEL_LEN = 80
# Longer than the windows and, for longrope, than the original length.
LENGTH = 40
CASES = [
    ("mha", LENGTH),
    ("gqa", LENGTH),
    ("mqa", LENGTH),
    ("tied", LENGTH),
    ("partial", LENGTH),
    ("window", LENGTH),
    ("window_mha", LENGTH),
    ("odd", LENGTH),
    ("longrope", 24),
    ("longrope", 25),
    ("longrope_factors_given", LENGTH),
    ("longrope_mscale", LENGTH),
]

Packed = dict[str, Tensor]


@pytest.fixture(scope="module")
def packed(checkpoint: Any) -> Callable[[str, str], Packed]:
    """`packed(variant, dtype)`: a checkpoint's weights as the engine maps them, read-only."""

    @functools.cache
    def get(variant: str, dtype: str) -> Packed:
        one = checkpoint(variant)
        buffer, index = pack_weights(one.folder, one.config, dtype.partition("_")[0])
        protect_read_only(buffer)
        return view_weights(buffer, index)

    return get


def dequantized(config: Phi3Config, packed: Packed) -> Packed:
    """float32, the head always on its own."""
    weights = {}
    shapes = expected_tensors(config) | {"lm_head.weight": (config.vocab_size, config.hidden_size)}
    for name, shape in shapes.items():
        weight, scale = packed[name], packed.get(name.replace(".weight", ".scale"))
        if scale is None:
            weights[name] = weight.float()
        else:
            dequantize = dequantize_int8 if weight.dtype == torch.int8 else dequantize_int4
            weights[name] = dequantize(weight, scale, *shape)
    return weights


class RoundingPhi3(Phi3ForCausalLM):
    """phi3.py's network in float32, with activations, keys and values rounded where the kernels round them. All that is
    left between the two is float32's rounding, and the few numbers which that brings over a boundary."""

    def __init__(self, config: Phi3Config, weights: Packed, dtype: str, kind: str):
        super().__init__(config, weights, torch.float32)
        self._dtype, self._kind = dtype, kind

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        int8_weights = self._dtype.startswith("int8") or weight is self.lm_head
        if not int8_weights or tiny.activations(self._dtype) == "int8":
            q, scale, _ = reference.round_groups(torch.nn.functional.pad(x, (0, -x.shape[1] % 32)))
            scale = scale.repeat_interleave(32, 1)
        else:
            q, scale = reference.round_rows(x)
            scale = scale[:, None]
        return ((q.double() * scale)[:, : x.shape[1]] @ weight.double().T).float()

    def _attend(self, i: int, qkv: Tensor, cos: Tensor, sin: Tensor, attentions: Any) -> Tensor:
        # Turns queries and keys in `qkv`, and stores keys and values.
        super()._attend(i, qkv, cos, sin, attentions)
        [attention] = attentions
        query = qkv.view(attention.num_rows, -1, self.config.head_dim)[:, : self.config.num_attention_heads]
        keys, values = (stored[i][0].transpose(0, 1) for stored in (attention.keys, attention.values))
        output = reference_attention.attend(query, keys, values, 0, self.config.sliding_window or 0)
        return output.flatten(1).float()

    def _prepare(self, chunks: Any) -> Any:
        attentions = super()._prepare(chunks)
        for attention in attentions:
            attention.writes = tuple(_Rounding(rows, self._kind) for rows in attention.writes)  # type: ignore[misc]
        return attentions


class _Rounding:
    """Rows [2, n, kv_heads, head_dim] that hold what stored rows mean."""

    def __init__(self, rows: Tensor, kind: str):
        self._rows, self._kind = rows, kind

    def copy_(self, numbers: Tensor) -> None:
        for rows, new in zip(self._rows, numbers, strict=True):
            stored = reference_attention.store_rows(new.contiguous(), self._kind)
            rows.copy_(reference_attention.load_rows(stored, new.shape[1], self._kind))


def random_ids(n: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 131, (n,), generator=torch.Generator().manual_seed(seed))


def logits_of(model: Any, cache: KVCache, ids: Tensor) -> Tensor:
    long_rope = model.rope.regime_for(len(ids)) == "long"
    logits: Tensor = model.forward_all(SequenceChunk(ids, 0, cache, long_rope)).clone()
    return logits


def difference(actual: Tensor, expected: Tensor) -> float:
    """Of all logits, relative to their size."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype == torch.float32
    assert expected.std() > 0.5  # else a small difference would mean nothing
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("variant", "length"), CASES)
def test_logits_are_torchs(checkpoint, packed, variant, length, dtype, kind, isa):
    config, weights = checkpoint(variant).config, packed(variant, dtype)
    network = tiny.network(config, weights, kind, MAX_MODEL_LEN, isa, activation_dtype=tiny.activations(dtype))
    ids = random_ids(length)
    actual = logits_of(network, tiny.new_cache(config, kind, MAX_MODEL_LEN), ids)
    exact_config, exact_weights = replace(config, tie_word_embeddings=False), dequantized(config, weights)
    layout = KVCacheLayout.for_config(config, MAX_MODEL_LEN, 4)
    rounded = logits_of(RoundingPhi3(exact_config, exact_weights, dtype, kind), KVCache(layout, torch.float32), ids)
    # A single activation of 8 bits that is rounded the other way shows in all that follows.
    assert difference(actual, rounded) < (2e-3 if dtype == "int8" else 0.02)
    # What is rounded beside the weights costs little: activations have 8 bits, or 16.
    exact = Phi3ForCausalLM(exact_config, exact_weights, torch.float32)
    allowed = 0.05 if dtype != "int8" else 0.01 if kind == "bfloat16" else 0.03
    assert difference(actual, logits_of(exact, KVCache(layout, torch.float32), ids)) < allowed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_and_values_are_torchs(checkpoint, packed, dtype, kind):
    """Of the first layer, where nothing has been rounded differently before."""
    config, weights = checkpoint("longrope").config, packed("longrope", dtype)
    cache = tiny.new_cache(config, kind, MAX_MODEL_LEN)
    network = tiny.network(config, weights, kind, MAX_MODEL_LEN, activation_dtype=tiny.activations(dtype))
    logits_of(network, cache, random_ids(LENGTH))
    rounding = RoundingPhi3(config, dequantized(config, weights), dtype, kind)
    expected = KVCache(KVCacheLayout.for_config(config, MAX_MODEL_LEN, 4), torch.float32)
    logits_of(rounding, expected, random_ids(LENGTH))
    rows = cache.rows[:2, :LENGTH].contiguous().view(torch.uint8).flatten(0, 1).flatten(1)
    actual = reference_attention.load_rows(rows, config.num_key_value_heads, kind)
    exact = expected.rows[:2, :LENGTH].flatten(0, 1)
    # One step at most, and that seldom.
    step = 2.0**-7 * exact.abs() if kind == "bfloat16" else exact.abs().amax(-1, keepdim=True) / 127
    assert ((actual - exact).abs() <= 1.01 * step + 1e-6).all()
    assert ((actual - exact).abs() <= 1e-4 * exact.abs() + 1e-6).float().mean() > 0.99


def test_the_regimes_of_longrope_differ(checkpoint, packed):
    config = checkpoint("longrope").config
    network = tiny.network(config, packed("longrope", "int8"))
    short, long = (
        network.forward([SequenceChunk(random_ids(20), 0, tiny.new_cache(config), regime)]).clone()
        for regime in (False, True)
    )
    assert (short - long).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_checkpoints_own_logits_are_near(checkpoint, packed, dtype):
    """Of transformers, on weights that were never rounded. (Tiny random networks suffer more than real ones.)"""
    one = checkpoint("gqa")
    network = tiny.network(one.config, packed("gqa", dtype), activation_dtype=tiny.activations(dtype))
    actual = logits_of(network, tiny.new_cache(one.config), random_ids(LENGTH))
    assert difference(actual, one.reference_logits(random_ids(LENGTH))) < (
        0.4 if dtype.startswith("int4") else 0.03 if dtype == "int8" else 0.05
    )


# What is refused.


@pytest.fixture(scope="module")
def config() -> Phi3Config:
    made: Phi3Config = tiny.config()
    return made


@pytest.fixture(scope="module")
def network(config: Phi3Config) -> QuantizedPhi3ForCausalLM:
    made: QuantizedPhi3ForCausalLM = tiny.network(config, tiny.weights(config, "int8"), max_model_len=MAX_MODEL_LEN)
    return made


@pytest.fixture
def cache(config: Phi3Config) -> KVCache:
    made: KVCache = tiny.new_cache(config, max_model_len=MAX_MODEL_LEN)
    return made


def refused(network: QuantizedPhi3ForCausalLM, chunk: SequenceChunk, why: str) -> None:
    """Also beside another chunk, of which nothing is computed then."""
    before = [one.kv_cache.rows.view(torch.uint8).clone() for one in (chunk,)]
    good_cache = tiny.new_cache(network.config, max_model_len=MAX_MODEL_LEN)
    untouched = good_cache.rows.view(torch.uint8).clone()
    good = SequenceChunk(random_ids(3), 0, good_cache)
    for chunks in ([chunk], [good, chunk], [chunk, good]):
        with pytest.raises(ValueError, match=why):
            network.forward(chunks)
    assert torch.equal(good_cache.rows.view(torch.uint8), untouched)
    assert torch.equal(chunk.kv_cache.rows.view(torch.uint8), before[0])
    # It goes on working.
    assert network.forward([good]).isfinite().all()


@pytest.mark.parametrize(
    ("start", "size"), [(0, 0), (-1, 2), (MAX_MODEL_LEN - 1, 2), (MAX_MODEL_LEN, 1), (0, MAX_MODEL_LEN + 1)]
)
def test_a_chunk_that_does_not_fit(network, cache, start, size):
    chunk = SequenceChunk(random_ids(size), start, cache, num_logits=0)
    refused(network, chunk, f"a chunk of {size} tokens at {start} does not fit a KV cache of {MAX_MODEL_LEN} tokens")


def test_a_chunk_that_just_fits(network, cache):
    network.forward([SequenceChunk(random_ids(MAX_MODEL_LEN), 0, cache, num_logits=0)])
    assert network.forward([SequenceChunk(random_ids(1), MAX_MODEL_LEN - 1, cache)]).isfinite().all()


@pytest.mark.parametrize("wrong", [-1, 131, 2**31, 2**32, 2**32 + 5, -(2**32), 2**62])
@pytest.mark.parametrize("place", [0, 2])
def test_ids_that_are_not_the_networks(network, cache, wrong, place):
    ids = torch.tensor([1, 2, 3])
    ids[place] = wrong
    refused(network, SequenceChunk(ids, 0, cache), "are not all the network's")


def test_all_ids_of_the_network(network, cache):
    assert network.forward([SequenceChunk(torch.tensor([0, 130]), 0, cache)]).isfinite().all()


@pytest.mark.parametrize("num_logits", [-1, 4])
def test_more_logits_than_tokens_or_fewer_than_none(network, cache, num_logits):
    chunk = SequenceChunk(random_ids(3), 0, cache, num_logits=num_logits)
    refused(network, chunk, f"{num_logits} logits are asked of a chunk of 3 tokens")


@pytest.mark.parametrize(
    ("kind", "max_model_len", "changes"),
    [
        ("int8", MAX_MODEL_LEN, {}),
        ("bfloat16", MAX_MODEL_LEN - 1, {}),
        ("bfloat16", MAX_MODEL_LEN, {"num_key_value_heads": 4}),
        ("bfloat16", MAX_MODEL_LEN, {"num_hidden_layers": 1}),
    ],
)
def test_a_cache_of_another_layout(network, kind, max_model_len, changes):
    cache = tiny.new_cache(tiny.config(**changes), kind, max_model_len)
    refused(network, SequenceChunk(random_ids(3), 0, cache), "another layout")


@pytest.mark.parametrize(
    ("layout", "kind", "why"),
    [
        ({"itemsize": 2}, "int8", "not for int8"),
        ({"itemsize": 1, "scale_nbytes": 4}, "bfloat16", "not for bfloat16"),
        ({"itemsize": 4}, "bfloat16", "not for bfloat16"),
        ({"itemsize": 4}, "float32", "not for float32"),
        ({"itemsize": 2, "num_kv_heads": 4}, "bfloat16", "not the network's"),
        ({"itemsize": 2, "head_dim": 8}, "bfloat16", "not the network's"),
        ({"itemsize": 2, "num_layers": 1}, "bfloat16", "not the network's"),
    ],
)
def test_a_network_for_another_layout(config, layout, kind, why):
    fields = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "max_model_len": MAX_MODEL_LEN} | layout
    with pytest.raises(ValueError, match=why):
        QuantizedPhi3ForCausalLM(
            config, tiny.weights(config, "int8"), KVCacheLayout(**fields), kind, "int16", library.load(), num_threads=1
        )


def test_activations_that_there_are_not(config):
    layout = tiny.layout(config, "bfloat16", MAX_MODEL_LEN)
    with pytest.raises(ValueError, match="activations of bfloat16"):
        QuantizedPhi3ForCausalLM(
            config, tiny.weights(config, "int8"), layout, "bfloat16", "bfloat16", library.load(), num_threads=1
        )


def test_a_network_that_cannot_be_made(config):
    layout = tiny.layout(config, "bfloat16", MAX_MODEL_LEN)
    ops = replace(library.load(), isa="avx1024")
    with pytest.raises(MemoryError, match="workspace"):
        QuantizedPhi3ForCausalLM(config, tiny.weights(config, "int8"), layout, "bfloat16", "int16", ops, num_threads=1)


def test_logits_lie_where_the_next_call_writes(network, config):
    """As documented: callers clone what they keep."""
    first = network.forward([SequenceChunk(random_ids(3), 0, tiny.new_cache(config, max_model_len=MAX_MODEL_LEN))])
    kept = first.clone()
    second = network.forward([SequenceChunk(random_ids(3, 1), 0, tiny.new_cache(config, max_model_len=MAX_MODEL_LEN))])
    assert second.data_ptr() == first.data_ptr()
    assert not torch.equal(first, kept)


def test_progress_grows_with_every_layer(network, cache):
    before = network.progress
    network.forward([SequenceChunk(random_ids(3), 0, cache)])
    assert network.progress == before + 2
