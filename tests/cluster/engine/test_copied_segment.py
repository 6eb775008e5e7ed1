"""A copy of a session's segment in the engine, on a real (tiny) network with the compiled kernels: the copy and what it
was made of go on with the bytes that each gets alone, also where the copy ends in another rope regime.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from phi_cluster.cluster.engine.engine import Engine, EngineLimits
from phi_cluster.cluster.engine.model_runner import ModelRunner
from phi_cluster.cluster.engine.segment_kv import SegmentKV, splice
from phi_cluster.cluster.engine.sequence import Sequence
from phi_cluster.cluster.session.segment import Segment
from phi_cluster.cluster.session.segment_layout import SegmentLayout
from phi_cluster.model.ops import library
from phi_cluster.model.sampling_params import SamplingParams

tiny = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "model" / "random_network.py")))

pytestmark = pytest.mark.skipif(library.problem() is not None, reason=f"no kernels: {library.problem()}")

FINGERPRINT = "tiny"
# Sequences beyond 40 tokens are computed in the long regime.
CONFIG = tiny.config(
    original_max_position_embeddings=40,
    rope_scaling={
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.05 * i for i in range(8)],
        "long_factor": [1.5 + 0.7 * i for i in range(8)],
    },
)
LAYOUT = SegmentLayout(tiny.layout(CONFIG, "bfloat16", 128))
HISTORY = [(7 * i) % tiny.VOCAB_SIZE for i in range(60)]


@pytest.fixture(scope="module")
def network():
    return tiny.network(CONFIG, tiny.weights(CONFIG, "int8"), "bfloat16", 128)


@pytest.fixture
def create():
    made = []

    def create() -> Segment:
        made.append(Segment.create(LAYOUT, FINGERPRINT))
        return made[-1]

    yield create
    for segment in made:
        segment.close()


def run(network, segment, kept, token_ids, **sampling):
    """A turn that keeps so many tokens and brings more: the reply, and how many tokens were cached."""
    kv = SegmentKV(segment.ref, LAYOUT, FINGERPRINT, torch.bfloat16, segment.epoch)
    whole = splice(kv, kept, token_ids)
    engine = Engine(EngineLimits(1, 32, 128), ModelRunner(network, CONFIG, network.draw), lambda: 0.0)
    params = SamplingParams(**{"seed": 0, "max_tokens": 12, "ignore_eos": True, **sampling})
    engine.add(Sequence(1, kv, whole, len(whole), params, 128))
    reply, cached = [], None
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            reply += output.token_ids
            cached = output.num_cached_tokens if cached is None else cached
    return reply, cached


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 5}])
@pytest.mark.parametrize(
    ("num_history", "num_copied", "is_warm"),
    [(24, 24, True), (24, 12, True), (60, 60, True), (60, 45, True), (60, 20, False), (36, 36, False)],
)
def test_a_copy_and_its_source_go_on_as_if_alone(network, create, sampling, num_history, num_copied, is_warm):
    source, copy = create(), create()
    run(network, source, 0, HISTORY[:num_history], temperature=0.0)
    # As the next turn begins: cut back to the conversation.
    source.trim(num_history)
    copy.copy_from(source, num_copied)
    assert copy.nbytes_resident == LAYOUT.nbytes_used(num_copied)
    before = bytes(source.kv_buffer)

    forked, cached = run(network, copy, num_copied, [3, 1, 4], **sampling)
    assert forked == run(network, create(), 0, [*HISTORY[:num_copied], 3, 1, 4], **sampling)[0]
    # Below the boundary the keys of the long regime are worth nothing, as after a trim.
    assert cached == (num_copied if is_warm else 0)
    assert copy.long_rope == (num_copied + 15 > 40)
    assert bytes(source.kv_buffer) == before
    went_on, _ = run(network, source, num_history, [2, 7], **sampling)
    assert went_on == run(network, create(), 0, [*HISTORY[:num_history], 2, 7], **sampling)[0]
