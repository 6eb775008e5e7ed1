"""The network against transformers, and against itself: cached, chunked, batched."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from phi_cluster.model.checkpoint import iter_tensors
from phi_cluster.model.kv_cache import KVCache
from phi_cluster.model.kv_layout import KVCacheLayout
from phi_cluster.model.phi3 import Phi3ForCausalLM, SequenceChunk

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
    ("longrope", 24),
    ("longrope", 25),
    ("longrope_factors_given", 24),
    ("longrope_factors_given", LENGTH),
    ("longrope_factor_given", 24),
    ("longrope_factor_given", LENGTH),
    ("longrope_mscale", 24),
    ("longrope_mscale", LENGTH),
]


def load(tiny, dtype=torch.float32, device="cpu") -> Phi3ForCausalLM:
    return Phi3ForCausalLM(tiny.config, dict(iter_tensors(tiny.folder, tiny.config)), dtype, device)


def new_cache(model: Phi3ForCausalLM) -> KVCache:
    layout = KVCacheLayout.for_config(model.config, MAX_MODEL_LEN, model.dtype.itemsize)
    cache = KVCache(layout, model.dtype, device=model.device)
    # Rows not yet written are anything at all; nothing of them may reach a result.
    cache.rows.fill_(float("nan"))
    return cache


def random_ids(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 131, (n,), generator=torch.Generator().manual_seed(seed))


def is_long(model: Phi3ForCausalLM, num_tokens: int) -> bool:
    return model.rope.regime_for(num_tokens) == "long"


def in_chunks(model: Phi3ForCausalLM, ids: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """[sum(sizes), vocab]: logits after every token, computed chunk by chunk in one cache."""
    assert sum(sizes) == len(ids)
    cache, start, logits = new_cache(model), 0, []
    for size in sizes:
        chunk = SequenceChunk(ids[start : start + size], start, cache, is_long(model, len(ids)))
        logits.append(model.forward_all(chunk))
        start += size
    return torch.cat(logits)


@pytest.mark.parametrize(("variant", "length"), CASES)
def test_logits_equal_those_of_transformers(checkpoint, variant, length):
    tiny = checkpoint(variant)
    ids = random_ids(length)
    reference = tiny.reference_logits(ids)
    ours = in_chunks(load(tiny), ids, [length])
    assert ours.dtype == torch.float32
    assert reference.std() > 0.5  # else a small difference would mean nothing
    assert (ours - reference).abs().max() < 1e-4


def test_the_regimes_of_longrope_differ(checkpoint):
    # Without this, the comparisons on both sides of the switch could pass with one regime for both.
    model = load(checkpoint("longrope"))
    ids = random_ids(20)
    short, long = (
        model.forward([SequenceChunk(ids, 0, new_cache(model), long_rope=regime)]) for regime in (False, True)
    )
    assert (short - long).abs().max() > 1e-2


def test_greedy_generation_across_the_longrope_switch_equals_transformers(checkpoint):
    tiny = checkpoint("longrope")
    model = load(tiny)
    ids = random_ids(18, seed=3).tolist()
    reference = tiny.reference.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=16, min_new_tokens=16,
        do_sample=False,
    )[0].tolist()  # fmt: skip
    cache, num_computed_tokens, long_rope = new_cache(model), 0, False
    while len(ids) < len(reference):
        if is_long(model, len(ids)) != long_rope:
            # The sequence crossed the boundary: all its keys are of the wrong regime now.
            num_computed_tokens, long_rope = 0, True
        chunk = SequenceChunk(torch.tensor(ids[num_computed_tokens:]), num_computed_tokens, cache, long_rope)
        num_computed_tokens = len(ids)
        logits = model.forward([chunk])[0].clone()
        # transformers' min_new_tokens bans the end token
        logits[2] = -torch.inf
        ids.append(int(logits.argmax()))
    assert long_rope
    assert ids == reference


@pytest.mark.parametrize("variant", ["gqa", "mha", "window", "longrope", "partial"])
@pytest.mark.parametrize("sizes", [[1] * LENGTH, [7, 13, 1, 19], [39, 1]], ids=["single", "chunks", "decode"])
def test_cached_and_chunked_equal_uncached(checkpoint, variant, sizes):
    model = load(checkpoint(variant))
    ids = random_ids(LENGTH)
    whole = in_chunks(model, ids, [LENGTH])
    torch.testing.assert_close(in_chunks(model, ids, sizes), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", ["gqa", "tied", "window", "longrope"])
def test_batched_equals_alone(checkpoint, variant):
    # Decodes and chunks of several lengths mixed; for longrope, of both regimes.
    model = load(checkpoint(variant))
    sizes = [(0, 5), (30, 1), (11, 3), (25, 1), (0, 1), (20, 17)]

    def chunks() -> list[SequenceChunk]:
        made = []
        for seed, (start, size) in enumerate(sizes):
            ids, cache = random_ids(start + size, seed), new_cache(model)
            long_rope = is_long(model, start + size)
            if start:
                model.forward([SequenceChunk(ids[:start], 0, cache, long_rope)])
            made.append(SequenceChunk(ids[start:], start, cache, long_rope))
        return made

    together = chunks()
    batched = model.forward(together)
    assert batched.shape == (len(sizes), 131)
    for i, chunk in enumerate(chunks()):
        torch.testing.assert_close(batched[i], model.forward([chunk])[0], rtol=0, atol=1e-5)
        end = chunk.start + len(chunk.token_ids)
        stored = together[i].kv_cache.rows[:, :end]
        torch.testing.assert_close(stored, chunk.kv_cache.rows[:, :end], rtol=0, atol=1e-5)


@pytest.mark.parametrize("wanted", [[1, 1, 1], [0, 2, 1], [5, 3, 0], [0, 0, 1], [0, 0, 0]])
def test_logits_are_those_that_are_wanted(checkpoint, wanted):
    model = load(checkpoint("gqa"))
    sizes = [5, 3, 1]

    def chunks(num_logits: Sequence[int]) -> list[SequenceChunk]:
        return [
            SequenceChunk(random_ids(size, seed), 0, new_cache(model), num_logits=num)
            for seed, (size, num) in enumerate(zip(sizes, num_logits, strict=True))
        ]

    made = chunks(wanted)
    logits = model.forward(made)
    assert logits.shape == (sum(wanted), 131)
    assert logits.dtype == torch.float32
    everything = model.forward(chunks(sizes)).split(sizes)
    expected = torch.cat([rows[size - num :] for rows, size, num in zip(everything, sizes, wanted, strict=True)])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    # Rows are written whatever is wanted.
    for chunk, size in zip(made, sizes, strict=True):
        assert not chunk.kv_cache.rows[:, :size].isnan().any()


def test_without_wanted_logits_the_head_is_not_computed(checkpoint):
    model = load(checkpoint("gqa"))
    used: list[torch.Tensor] = []
    linear = model._linear

    def spying(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        used.append(weight)
        return linear(x, weight)

    model._linear = spying  # type: ignore[method-assign]
    for num_logits in (0, 1):
        model.forward([SequenceChunk(random_ids(4), 0, new_cache(model), num_logits=num_logits)])
        assert any(weight is model.lm_head for weight in used) == bool(num_logits)


@pytest.mark.parametrize(("size", "num_logits"), [(3, 4), (3, -1)])
def test_more_logits_than_tokens_are_refused(checkpoint, size, num_logits):
    model = load(checkpoint("gqa"))
    with pytest.raises(ValueError, match=f"num_logits is {num_logits} for a chunk of 3 tokens"):
        model.forward([SequenceChunk(random_ids(size), 0, new_cache(model), num_logits=num_logits)])


def test_a_trimmed_cache_equals_one_never_extended(checkpoint):
    model = load(checkpoint("gqa"))
    ids, other = random_ids(20), random_ids(12, seed=1)
    cache = new_cache(model)
    model.forward([SequenceChunk(ids, 0, cache)])
    after_trim = model.forward([SequenceChunk(other, 8, cache)])
    fresh = in_chunks(model, torch.cat([ids[:8], other]), [8, 12])[-1:]
    torch.testing.assert_close(after_trim, fresh, rtol=0, atol=1e-5)


def test_only_the_chunks_rows_are_written(checkpoint):
    model = load(checkpoint("gqa"))
    cache = new_cache(model)
    model.forward([SequenceChunk(random_ids(10), 0, cache)])
    before = cache.rows.clone()
    model.forward([SequenceChunk(random_ids(3, seed=1), 5, cache)])
    changed = (cache.rows != before) & ~(cache.rows.isnan() & before.isnan())
    assert changed.any(dim=(0, 2, 3)).nonzero().flatten().tolist() == [5, 6, 7]


@pytest.mark.parametrize("length", [1, 4, 30])
def test_bfloat16_is_near_transformers_bfloat16(checkpoint, length):
    # 30 rows take the widened linear layers on CPUs that have no bfloat16 instructions.
    tiny = checkpoint("gqa")
    ids = random_ids(length)
    exact = tiny.reference_logits(ids)
    ours = in_chunks(load(tiny, torch.bfloat16), ids, [length])
    assert ours.dtype == torch.float32
    # bfloat16 has 8 bits; a wrong step anywhere gives differences of the order of the logits themselves.
    assert (ours - exact).abs().mean() < 0.03 * exact.abs().mean()


def test_widened_linear_layers_equal_plain_ones(checkpoint):
    tiny = checkpoint("gqa")
    ids = random_ids(LENGTH)
    plain, widened = load(tiny, torch.bfloat16), load(tiny, torch.bfloat16)
    plain._widen, widened._widen = False, True
    x = torch.randn(20, 64).bfloat16()
    weight = plain.layers[0].qkv_proj
    torch.testing.assert_close(widened._linear(x, weight), plain._linear(x, weight), rtol=2**-7, atol=1e-3)
    difference = in_chunks(widened, ids, [LENGTH]) - in_chunks(plain, ids, [LENGTH])
    assert difference.abs().max() < 0.2


@pytest.mark.parametrize(("start", "size"), [(0, 0), (-1, 2), (MAX_MODEL_LEN - 1, 2), (0, MAX_MODEL_LEN + 1)])
def test_a_chunk_that_does_not_fit_is_refused(checkpoint, start, size):
    model = load(checkpoint("gqa"))
    with pytest.raises(ValueError, match=f"a chunk of {size} tokens at {start} does not fit"):
        model.forward([SequenceChunk(random_ids(size), start, new_cache(model))])


def test_other_dtypes_are_refused(checkpoint):
    with pytest.raises(ValueError, match="float16"):
        load(checkpoint("gqa"), torch.float16)


def test_weights_are_not_copied(checkpoint):
    tiny = checkpoint("tied")
    weights = dict(iter_tensors(tiny.folder, tiny.config))
    model = Phi3ForCausalLM(tiny.config, weights, torch.float32)
    assert model.layers[1].down_proj.data_ptr() == weights["model.layers.1.mlp.down_proj.weight"].data_ptr()
    assert model.lm_head.data_ptr() == weights["model.embed_tokens.weight"].data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("variant", ["gqa", "window", "longrope"])
def test_a_gpu_computes_the_same(checkpoint, variant):
    tiny = checkpoint(variant)
    ids = random_ids(LENGTH)
    on_cpu = in_chunks(load(tiny), ids, [7, 13, 1, 19])
    on_gpu = in_chunks(load(tiny, device="cuda"), ids, [7, 13, 1, 19])
    assert on_gpu.device.type == "cuda"
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=1e-3)
