"""Several replies on one prompt's keys and values, on a real (tiny) network with the compiled kernels: each says
what it says alone, whoever is preempted or killed, in memory that holds the prompt once.
"""

from __future__ import annotations

import random
import runpy
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from phi_cluster.cluster.engine.engine import Engine, EngineLimits
from phi_cluster.cluster.engine.model_runner import ModelRunner
from phi_cluster.cluster.engine.segment_kv import SegmentKV, splice
from phi_cluster.cluster.engine.sequence import Sequence
from phi_cluster.cluster.messages import SharedRows
from phi_cluster.cluster.session.segment import Segment, SegmentGone
from phi_cluster.cluster.session.segment_layout import SegmentLayout
from phi_cluster.model.ops import library
from phi_cluster.model.sampling_params import SamplingParams

tiny = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "model" / "random_network.py")))

pytestmark = pytest.mark.skipif(library.problem() is not None, reason=f"no kernels: {library.problem()}")

FINGERPRINT = "tiny"
MAX_MODEL_LEN = 512
CONFIG = tiny.config()
LAYOUT = SegmentLayout(tiny.layout(CONFIG, "bfloat16", MAX_MODEL_LEN))
# What happened to the replies of all seeds.
FAULTS: Counter[str] = Counter()
PAGE_TOKENS = 4096 // LAYOUT.kv.row_nbytes


@pytest.fixture(scope="module")
def network():
    return tiny.network(CONFIG, tiny.weights(CONFIG, "int8"), "bfloat16", MAX_MODEL_LEN)


class Replies:
    """`prompt` and its replies; the first holds the prompt. An engine at a time has them."""

    def __init__(self, network, prompt, params):
        self.network, self.prompt, self.params = network, prompt, params
        self.segments = [Segment.create(LAYOUT, FINGERPRINT) for _ in params]
        for epoch, segment in enumerate(self.segments):
            segment.epoch = 10 + epoch
        self.said = [[] for _ in params]
        self.over = [False] * len(params)
        # What each may have, as leases: nobody begins with all.
        self.covered = [len(prompt) + 2] * len(params)
        self.begun = {0}

    @property
    def rows(self):
        return SharedRows(self.segments[0].ref, self.segments[0].epoch, len(self.prompt) - 1)

    def engine(self, max_num_seqs, order):
        runner = ModelRunner(self.network, CONFIG, self.network.draw)
        self.current = Engine(EngineLimits(max_num_seqs, 64, MAX_MODEL_LEN), runner, lambda: 0.0)
        for choice in order:
            self.add(choice)
        return self.current

    def add(self, choice):
        segment = self.segments[choice]
        shared = self.rows if choice else None
        kv = SegmentKV(segment.ref, LAYOUT, FINGERPRINT, torch.bfloat16, segment.epoch, shared)
        ids = splice(kv, 0, self.prompt + self.said[choice])
        params = self.params[choice]
        self.current.add(Sequence(choice, kv, ids, len(self.prompt), params, self.covered[choice]))
        self.begun.add(choice)

    def step(self):
        for output in self.current.step():
            assert output.error is None
            self.said[output.sequence_id] += output.token_ids
            self.over[output.sequence_id] |= output.released

    def nbytes(self):
        return [segment.nbytes_resident for segment in self.segments]

    def leases(self):
        """What each may have in memory at most."""
        whole = [LAYOUT.nbytes_used(len(self.prompt) + len(said)) for said in self.said]
        shared = LAYOUT.nbytes_shared(len(self.prompt) - 1)
        return [nbytes - (shared if choice else 0) for choice, nbytes in enumerate(whole)]

    def close(self):
        for segment in self.segments:
            segment.close()


def alone(network, prompt, params):
    segment = Segment.create(LAYOUT, FINGERPRINT)
    kv = SegmentKV(segment.ref, LAYOUT, FINGERPRINT, torch.bfloat16, 0)
    splice(kv, 0, prompt)
    engine = Engine(EngineLimits(1, 64, MAX_MODEL_LEN), ModelRunner(network, CONFIG, network.draw), lambda: 0.0)
    engine.add(Sequence(1, kv, list(prompt), len(prompt), params, MAX_MODEL_LEN))
    said = []
    while engine.has_work:
        for output in engine.step():
            said += output.token_ids
    segment.close()
    return said


def wanted(random_, prompt, num):
    return [
        SamplingParams.from_dict(
            {
                "seed": random_.randrange(2**60),
                "temperature": random_.choice([0.0, 0.7, 1.3]),
                "max_tokens": random_.choice([1, 3, 20, 90]),
                "repetition_penalty": random_.choice([1.0, 1.2]),
            }
        )
        for _ in range(num)
    ]


@pytest.mark.parametrize("seed", range(40))
def test_each_says_what_it_says_alone_whoever_is_preempted_or_killed(network, seed):
    random_ = random.Random(seed)
    prompt = [random_.randrange(tiny.VOCAB_SIZE) for _ in range(random_.choice([1, 2, 5, 63, PAGE_TOKENS + 1, 300]))]
    params = wanted(random_, prompt, random_.randrange(2, 6))
    replies = Replies(network, prompt, params)
    preempted = deaths = 0
    replies.engine(random_.randrange(1, 4), [0])
    while not all(replies.over):
        if replies.said[0] and len(replies.begun) < len(params):
            replies.add(len(replies.begun))
        replies.step()
        for one, of, most in zip(replies.begun, replies.nbytes(), replies.leases(), strict=False):
            assert of <= most, one
        if random_.random() < 0.3 or not replies.current.has_work:
            # Leases grow, whoever's; who has none pauses, and gives its keys and values to others.
            choice = random_.randrange(len(params))
            replies.covered[choice] = min(replies.covered[choice] + random_.choice([1, 8, 60]), MAX_MODEL_LEN)
            replies.current.extend(choice, replies.covered[choice])
        if random_.random() < 0.02:
            # The engine is gone without a word; another one has them in any order.
            deaths += 1
            preempted += replies.current.num_preemptions
            order = [choice for choice in replies.begun if not replies.over[choice]]
            random_.shuffle(order)
            replies.engine(random_.randrange(1, 4), order)
    assert replies.said == [alone(network, prompt, one) for one in params]
    FAULTS.update(deaths=deaths, preemptions=preempted + replies.current.num_preemptions)
    replies.close()


def test_that_much_happened_to_them():
    """Else the test above proves little."""
    if sum(FAULTS.values()):
        assert FAULTS["deaths"] > 20
        assert FAULTS["preemptions"] > 20


def test_memory_holds_a_long_prompt_once_and_the_lender_keeps_it(network):
    prompt = [i % tiny.VOCAB_SIZE for i in range(400)]
    replies = Replies(network, prompt, [SamplingParams.from_dict({"seed": i, "max_tokens": 6}) for i in range(9)])
    replies.covered = [MAX_MODEL_LEN] * 9
    replies.engine(9, [0])
    while not replies.said[0]:
        replies.step()
    one = replies.nbytes()[0]
    for choice in range(1, 9):
        replies.add(choice)
    replies.step()
    first, *others = replies.nbytes()
    assert first == one
    # A header, the ids, and a page at the end of each region.
    assert max(others) <= LAYOUT.nbytes_used(410) - LAYOUT.nbytes_shared(399)
    # Of this network a prompt is 30 pages and a reply has at least 6 of its own; copies would be 9 prompts.
    assert sum(replies.nbytes()) < 3 * one
    lender = replies.segments[0]
    assert lender.num_pinned_tokens == 399
    with pytest.raises(ValueError, match="399 computed tokens are shared"):
        lender.trim(100)
    with pytest.raises(ValueError, match="399 computed tokens are shared"):
        lender.long_rope = True
    with pytest.raises(ValueError, match="399 computed tokens are shared"):
        lender.set_num_computed_tokens(0)
    lender.drop_kv()
    assert lender.num_computed_tokens == 399
    assert lender.nbytes_resident == LAYOUT.nbytes_used(lender.num_tokens, 399)
    # Whoever does not see the lender's rows finds nothing computed; once the turn is over there is nothing shared.
    other = replies.segments[1]
    assert (other.num_shared_tokens, other.num_computed_tokens) == (399, 0)
    other.unshare()
    assert (other.num_shared_tokens, other.num_computed_tokens) == (0, 0)
    lender.unshare()
    lender.trim(0)
    assert lender.nbytes_resident == LAYOUT.nbytes_used(0)
    replies.close()


def lender_of(network, prompt):
    replies = Replies(network, prompt, [SamplingParams.from_dict({"seed": i, "max_tokens": 6}) for i in range(2)])
    replies.covered = [MAX_MODEL_LEN] * 2
    replies.engine(2, [0])
    while not replies.said[0]:
        replies.step()
    return replies


@pytest.mark.parametrize(
    "spoil",
    [
        lambda lender: setattr(lender, "epoch", 99),
        lambda lender: lender.drop_kv(),
        lambda lender: lender.trim(150),
        lambda lender: lender.close(),
    ],
    ids=["a later turn", "dropped", "trimmed", "gone"],
)
def test_what_is_not_there_as_it_was_is_not_shared(network, spoil):
    replies = lender_of(network, [i % 7 for i in range(200)])
    rows = replies.rows
    spoil(replies.segments[0])
    mine = replies.segments[1]
    with pytest.raises(SegmentGone):
        SegmentKV(mine.ref, LAYOUT, FINGERPRINT, torch.bfloat16, mine.epoch, rows)
    assert mine.writer is None
    assert mine.num_shared_tokens == 0
    replies.close()


def test_rows_of_other_ids_are_not_shared(network):
    replies = lender_of(network, [i % 7 for i in range(200)])
    mine = replies.segments[1]
    kv = SegmentKV(mine.ref, LAYOUT, FINGERPRINT, torch.bfloat16, mine.epoch, replies.rows)
    with pytest.raises(SegmentGone, match="another"):
        splice(kv, 0, [i % 5 for i in range(200)])
    kv.close()
    replies.close()
