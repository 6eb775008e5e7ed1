"""A sequence's memory: in the segment itself, or on a device with only the ids in the segment."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

import pytest
import torch

from phi_cluster.cluster.engine.device_kv import DeviceCaches, DeviceKV
from phi_cluster.cluster.engine.segment_kv import SegmentKV, count_agreeing, splice
from phi_cluster.cluster.processes import process_id
from phi_cluster.cluster.session.segment import Segment, SegmentMismatch
from phi_cluster.cluster.session.segment_layout import SegmentLayout
from phi_cluster.model.config import Phi3Config
from phi_cluster.model.kv_layout import KVCacheLayout
from phi_cluster.model.phi3 import Phi3ForCausalLM, SequenceChunk

FINGERPRINT = "test"
OpenKV = Callable[[Segment], SegmentKV]


def make_config() -> Phi3Config:
    return Phi3Config.from_dict(
        {
            "architectures": ["Phi3ForCausalLM"],
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "original_max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "tie_word_embeddings": True,
            "eos_token_id": 1,
            "bos_token_id": 1,
            "hidden_act": "silu",
            "torch_dtype": "float32",
        }
    )


@pytest.fixture(scope="module")
def model() -> Phi3ForCausalLM:
    from phi_cluster.model.checkpoint import expected_tensors

    generator = torch.Generator().manual_seed(7)
    config = make_config()
    shapes = expected_tensors(config)
    weights = {
        name: torch.ones(shape) if "norm" in name else torch.randn(shape, generator=generator) * 0.1
        for name, shape in shapes.items()
    }
    return Phi3ForCausalLM(config, weights, torch.float32)


@pytest.fixture
def layout() -> SegmentLayout:
    return SegmentLayout(KVCacheLayout.for_config(make_config(), 128, 4))


@pytest.fixture
def segment(layout: SegmentLayout) -> Segment:
    return Segment.create(layout, FINGERPRINT)


@pytest.fixture(params=["segment", "device"])
def open_kv(request: pytest.FixtureRequest, layout: SegmentLayout) -> OpenKV:
    caches = DeviceCaches(layout.kv, torch.float32, "cpu", max_idle=2)
    if request.param == "device":
        return lambda segment: DeviceKV(segment.ref, layout, FINGERPRINT, caches, segment.epoch)
    return lambda segment: SegmentKV(segment.ref, layout, FINGERPRINT, torch.float32, segment.epoch)


def compute(model: Phi3ForCausalLM, kv: SegmentKV) -> torch.Tensor:
    """Logits of the last token, computing what is not computed yet."""
    ids = kv.token_ids()
    start = min(kv.num_computed_tokens, len(ids) - 1)
    assert kv.cache is not None
    logits = model.forward([SequenceChunk(torch.tensor(ids[start:]), start, kv.cache, False)])
    kv.set_computed(len(ids))
    return logits


def test_a_later_turn_goes_on_from_what_is_computed(model: Phi3ForCausalLM, segment: Segment, open_kv: OpenKV) -> None:
    kv = open_kv(segment)
    assert splice(kv, 0, [5, 6, 7, 8]) == [5, 6, 7, 8]
    compute(model, kv)
    kv.close()
    warm = open_kv(segment)
    splice(warm, 4, [9, 10])
    assert warm.num_computed_tokens == 4
    cold = open_kv(Segment.create(segment.layout, FINGERPRINT))
    splice(cold, 0, [5, 6, 7, 8, 9, 10])
    assert cold.num_computed_tokens == 0
    assert torch.allclose(compute(model, warm), compute(model, cold), atol=1e-5)


def test_ids_that_go_on_agreeing_stay_computed(model: Phi3ForCausalLM, segment: Segment, open_kv: OpenKV) -> None:
    kv = open_kv(segment)
    splice(kv, 0, [5, 6, 7, 8])
    compute(model, kv)
    assert splice(kv, 1, [6, 7, 11, 12]) == [5, 6, 7, 11, 12]
    assert kv.num_computed_tokens == 3
    assert kv.token_ids() == [5, 6, 7, 11, 12]


def test_a_segment_cleared_between_turns_is_computed_anew(
    model: Phi3ForCausalLM, segment: Segment, open_kv: OpenKV
) -> None:
    kv = open_kv(segment)
    splice(kv, 0, [5, 6, 7, 8])
    compute(model, kv)
    kv.close()
    segment.clear()
    again = open_kv(segment)
    splice(again, 0, [9, 6, 7, 8])
    assert again.num_computed_tokens == 0


def test_the_writer_is_named_while_the_segment_is_borrowed(segment: Segment, open_kv: OpenKV) -> None:
    assert segment.writer is None
    kv = open_kv(segment)
    assert segment.writer == process_id(os.getpid())
    kv.close()
    assert segment.writer is None
    kv.close()


def test_a_segment_lent_to_a_later_turn_is_refused_and_its_writer_stays(
    segment: Segment, layout: SegmentLayout
) -> None:
    segment.epoch = 2
    SegmentKV(segment.ref, layout, FINGERPRINT, torch.float32, 2)
    borrower = segment.writer
    assert borrower is not None
    with pytest.raises(SegmentMismatch, match="a later turn"):
        SegmentKV(segment.ref, layout, FINGERPRINT, torch.float32, 1)
    assert segment.writer == borrower


def test_int8_keys_and_values_lie_in_the_segment() -> None:
    layout = SegmentLayout(KVCacheLayout.for_config(make_config(), 128, 1, 4))
    segment = Segment.create(layout, FINGERPRINT)
    kv = SegmentKV(segment.ref, layout, FINGERPRINT, torch.int8, segment.epoch)
    assert kv.cache is not None
    assert kv.bytes_per_token == layout.kv.bytes_per_token == 2 * 2 * 2 * (4 + 8)
    region = layout.kv.region_offset(1, 0)
    ctypes.memset(kv.cache.address + region, 0x40, layout.kv.row_nbytes)
    assert bytes(segment.kv_buffer[region : region + layout.kv.row_nbytes]) == b"@" * layout.kv.row_nbytes
    kv.close()


def test_a_segment_is_not_opened_for_other_numbers(segment: Segment) -> None:
    int8, wide, plain = (
        SegmentLayout(KVCacheLayout.for_config(make_config(), 128, *sizes)) for sizes in ((1, 4), (2, 0), (1, 0))
    )
    assert len({layout.identity(FINGERPRINT) for layout in (int8, wide, plain, segment.layout)}) == 4
    with pytest.raises(SegmentMismatch, match="another model or layout"):
        SegmentKV(segment.ref, int8, FINGERPRINT, torch.int8, segment.epoch)


def test_numbers_that_cannot_be_are_refused(segment: Segment, open_kv: OpenKV) -> None:
    kv = open_kv(segment)
    with pytest.raises(ValueError, match="3 tokens are to be kept, the segment holds 0"):
        splice(kv, 3, [1])


def test_the_segment_never_counts_what_lies_on_the_device(
    model: Phi3ForCausalLM, segment: Segment, layout: SegmentLayout
) -> None:
    kv = DeviceKV(segment.ref, layout, FINGERPRINT, DeviceCaches(layout.kv, torch.float32, "cpu", max_idle=1), 0)
    splice(kv, 0, [5, 6, 7])
    compute(model, kv)
    assert (kv.num_computed_tokens, segment.num_computed_tokens) == (3, 0)


def test_device_caches_are_bounded(layout: SegmentLayout) -> None:
    caches = DeviceCaches(layout.kv, torch.float32, "cpu", max_idle=1)
    first, second = caches.borrow(b"a"), caches.borrow(b"b")
    caches.give_back(b"a", first)
    caches.give_back(b"b", second)
    assert caches.borrow(b"b") is second
    assert caches.borrow(b"a") is not first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_computes_what_the_cpu_does(model: Phi3ForCausalLM, layout: SegmentLayout) -> None:
    from phi_cluster.model.checkpoint import expected_tensors

    config = make_config()
    weights = {name: torch.randn(shape) * 0.1 for name, shape in expected_tensors(config).items()}
    on_cpu = Phi3ForCausalLM(config, weights, torch.float32)
    on_gpu = Phi3ForCausalLM(config, weights, torch.float32, "cuda")
    segments = Segment.create(layout, FINGERPRINT), Segment.create(layout, FINGERPRINT)
    caches = DeviceCaches(layout.kv, torch.float32, "cuda", max_idle=1)
    there = DeviceKV(segments[0].ref, layout, FINGERPRINT, caches, 0)
    here = SegmentKV(segments[1].ref, layout, FINGERPRINT, torch.float32, 0)
    for kv in (there, here):
        splice(kv, 0, [5, 6, 7, 8])
    assert torch.allclose(compute(on_gpu, there).cpu(), compute(on_cpu, here), atol=1e-3)


def test_count_agreeing() -> None:
    assert count_agreeing([1, 2, 3], [1, 2, 4]) == 2
    assert count_agreeing([], [1]) == 0
    assert count_agreeing([1, 2], [1, 2, 3]) == 2
