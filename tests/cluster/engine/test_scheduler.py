"""Scheduler: budgets, fairness, preemption, regimes; nothing runs here."""

from __future__ import annotations

from typing import Any

import pytest

from phi_cluster.cluster.engine.scheduler import EngineLimits, Scheduler, share_drafts, share_tokens
from phi_cluster.cluster.engine.sequence import SequenceStatus
from phi_cluster.cluster.engine.settings import Speculation


def scheduler(
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 16,
    max_kv_bytes: int | None = None,
    long_from: int = 10**9,
    speculation: Speculation | None = None,
    max_model_len: int = 10_000,
) -> Scheduler:
    limits = EngineLimits(max_num_seqs, max_num_batched_tokens, max_model_len, max_kv_bytes)
    return Scheduler(limits, lambda num_tokens: num_tokens >= long_from, speculation)


def shares(decision: Any) -> dict[int, int]:
    return {s.sequence_id: num for s, num, _ in decision.scheduled}


def ids(sequences: list[Any]) -> list[int]:
    return [s.sequence_id for s in sequences]


def carry_out(decision: Any, token_id: int = 1) -> None:
    """What the engine would do to the sequences."""
    for sequence, num, _ in decision.scheduled:
        sequence.num_computed_tokens += num
        if sequence.num_uncomputed_tokens == 0:
            sequence.append(token_id)


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_kv_bytes"])
def test_limits_are_at_least_1(name: str) -> None:
    good = {"max_num_seqs": 1, "max_num_batched_tokens": 1, "max_model_len": 1, "max_kv_bytes": 1}
    EngineLimits(**good)
    with pytest.raises(ValueError, match=name):
        EngineLimits(**good | {name: 0})


# Tokens of a step


@pytest.mark.parametrize(
    ("lacking", "budget", "expected"),
    [
        ([5], 16, [5]),
        ([50], 16, [16]),
        ([1, 1, 1], 3, [1, 1, 1]),
        ([100, 1, 1], 16, [14, 1, 1]),  # decodes first
        ([100, 6], 16, [10, 6]),  # the short one is done at once
        ([100, 100], 16, [8 + 8, 0]),  # of equals the older
        ([100, 60, 30], 16, [8, 0, 8]),  # half for the oldest, half for the shortest
        ([100, 3, 3, 3], 16, [8, 3, 3, 2]),
        ([3, 100], 16, [3, 13]),  # nothing is left over
        ([100, 5], 1, [1, 0]),
        ([4, 100, 4], 16, [4, 8, 4]),
    ],
)
def test_share_tokens(lab: Any, lacking: list[int], budget: int, expected: list[int]) -> None:
    sequences = [lab.sequence(i, [1] * n) for i, n in enumerate(lacking)]
    granted = {s.sequence_id: num for s, num in share_tokens(sequences, budget)}
    assert [granted.get(i, 0) for i in range(len(lacking))] == expected
    assert 0 not in granted.values()


def test_a_long_prompt_goes_on_under_a_stream_of_short_ones(lab: Any) -> None:
    subject = scheduler(max_num_seqs=8, max_num_batched_tokens=16)
    long = lab.sequence(0, [1] * 200)
    subject.add(long)
    steps = 0
    while long.num_computed_tokens < 200:
        steps += 1
        subject.add(lab.sequence(steps, [1] * 20, max_tokens=1))
        decision = subject.schedule()
        assert sum(shares(decision).values()) == 16
        carry_out(decision)
        for sequence in list(subject.running):
            if sequence.num_generated_tokens:
                subject.remove(sequence)
    assert steps <= 25


def test_short_prompts_do_not_wait_for_a_long_one(lab: Any) -> None:
    subject = scheduler(max_num_batched_tokens=16)
    subject.add(lab.sequence(0, [1] * 10_000))
    carry_out(subject.schedule())
    short = lab.sequence(1, [1] * 8)
    subject.add(short)
    carry_out(subject.schedule())
    assert short.num_generated_tokens == 1


# Number of sequences


def test_no_more_than_max_num_seqs_run_and_first_come_first_served(lab: Any) -> None:
    subject = scheduler(max_num_seqs=2)
    for i in range(4):
        subject.add(lab.sequence(i, [1, 2]))
    assert set(shares(subject.schedule())) == {0, 1}
    assert ids(subject.waiting) == [2, 3]
    subject.remove(subject.running[0])
    assert set(shares(subject.schedule())) == {1, 2}


def test_no_more_run_than_there_are_tokens_a_step(lab: Any) -> None:
    subject = scheduler(max_num_seqs=8, max_num_batched_tokens=2)
    for i in range(4):
        subject.add(lab.sequence(i, [1]))
    assert shares(subject.schedule()) == {0: 1, 1: 1}


# KV bytes


def test_a_prompt_is_admitted_only_when_all_of_it_fits_with_room_to_grow(lab: Any) -> None:
    # 10 bytes a token: 100 tokens. max_tokens 8 each.
    subject = scheduler(max_kv_bytes=1000, max_num_batched_tokens=100)
    for i, length in enumerate((50, 30, 10)):
        subject.add(lab.sequence(i, [1] * length))
    subject.schedule()
    assert ids(subject.running) == [0, 1]  # 58 + 38; the third would make 114
    assert ids(subject.waiting) == [2]


def test_a_small_one_does_not_overtake_one_that_waits_for_room(lab: Any) -> None:
    subject = scheduler(max_kv_bytes=1000, max_num_batched_tokens=100)
    for i, length in enumerate((50, 80, 2)):
        subject.add(lab.sequence(i, [1] * length))
    subject.schedule()
    assert ids(subject.running) == [0]
    subject.remove(subject.running[0])
    subject.schedule()
    assert ids(subject.running) == [1, 2]


def test_the_youngest_is_preempted_and_waits_at_the_head(lab: Any) -> None:
    subject = scheduler(max_kv_bytes=2000, max_num_batched_tokens=100)
    for i in range(4):
        subject.add(lab.sequence(i, [1] * 10, max_tokens=1000))
    carry_out(subject.schedule())
    assert ids(subject.running) == [0, 1, 2, 3]  # 4 * (10 + 32) = 168 tokens of 200
    subject.add(lab.sequence(9, [1] * 60))
    preempted: list[int] = []
    while not preempted:
        decision = subject.schedule()
        preempted = ids(decision.preempted)
        assert sum(s.kv_nbytes for s in subject.running) <= 2000
        carry_out(decision)
    assert preempted == [3]
    assert ids(subject.running) == [0, 1, 2]
    assert ids(subject.waiting) == [3, 9]
    victim = subject.waiting[0]
    assert victim.status is SequenceStatus.PREEMPTED
    assert victim.num_computed_tokens == victim.num_cached_tokens == 0
    assert victim.num_generated_tokens == 41  # the reply so far is kept
    # It comes back when there is room for it and for everybody's growth, not only for its present length.
    subject.remove(subject.running[2])
    assert 3 not in shares(subject.schedule())
    subject.remove(subject.running[1])
    assert shares(subject.schedule())[3] == victim.num_tokens
    assert ids(subject.running) == [0, 3]


def test_the_oldest_is_never_preempted_and_what_can_never_fit_is_refused(lab: Any) -> None:
    subject = scheduler(max_kv_bytes=300, max_num_batched_tokens=100)
    subject.add(lab.sequence(0, [1] * 31))
    subject.add(lab.sequence(1, [1] * 10, max_tokens=1000))
    decision = subject.schedule()
    assert [(s.sequence_id, why) for s, why in decision.refused] == [
        (0, "31 tokens need 310 bytes of KV cache, the engine has 300")
    ]
    while not (decision := subject.schedule()).refused:
        assert not decision.preempted
        carry_out(decision)
    assert [s.num_tokens for s, _ in decision.refused] == [31]
    assert not subject.has_work


# Leases


def test_a_paused_sequence_is_not_scheduled_until_its_lease_grows(lab: Any) -> None:
    subject = scheduler()
    sequence = lab.sequence(0, [1, 2, 3], max_num_tokens=4)
    subject.add(sequence)
    carry_out(subject.schedule())
    assert sequence.is_paused
    assert not subject.has_work
    assert shares(subject.schedule()) == {}
    sequence.max_num_tokens = 5
    assert subject.has_work
    assert shares(subject.schedule()) == {0: 1}


def test_a_paused_sequence_keeps_its_cache_until_its_place_is_wanted(lab: Any) -> None:
    subject = scheduler(max_num_seqs=2)
    paused = [lab.sequence(i, [1, 2, 3], max_num_tokens=4) for i in range(2)]
    for sequence in paused:
        subject.add(sequence)
    carry_out(subject.schedule())
    assert not subject.schedule().preempted
    subject.add(lab.sequence(2, [1, 2]))
    decision = subject.schedule()
    assert ids(decision.preempted) == [1]
    assert shares(decision) == {2: 2}
    assert ids(subject.running) == [0, 2]
    # Waiting and paused, it does not stand in anybody's way, and comes back once it may grow.
    carry_out(decision)
    paused[1].max_num_tokens = 9
    decision = subject.schedule()
    assert ids(decision.preempted) == [0]
    assert shares(decision) == {1: 4, 2: 1}


# LongRoPE


def test_the_regime_follows_the_length_of_the_whole_sequence(lab: Any) -> None:
    subject = scheduler(max_num_batched_tokens=4, long_from=12)
    sequence = lab.sequence(0, [1] * 10)
    subject.add(sequence)
    seen = []
    for _ in range(8):
        decision = subject.schedule()
        seen.append((ids(decision.regime_changed), sequence.long_rope, shares(decision)[0]))
        carry_out(decision)
    assert seen == [
        ([], False, 4),
        ([], False, 4),
        ([], False, 2),  # the 11th token is drawn
        ([], False, 1),  # the 12th: the long regime is due
        ([0], True, 4),
        ([], True, 4),
        ([], True, 4),
        ([], True, 1),
    ]


def test_a_long_prompt_is_long_from_its_first_chunk(lab: Any) -> None:
    subject = scheduler(max_num_batched_tokens=4, long_from=12)
    sequence = lab.sequence(0, [1] * 12)
    subject.add(sequence)
    assert ids(subject.schedule().regime_changed) == [0]
    assert sequence.long_rope


def test_trimmed_below_the_boundary_the_cache_is_short_again(lab: Any) -> None:
    subject = scheduler(long_from=12)
    kv = lab.KV([1] * 8, long_rope=True)
    kv.num_computed_tokens = 7
    sequence = lab.sequence(0, kv=kv)
    assert sequence.num_cached_tokens == 7
    subject.add(sequence)
    decision = subject.schedule()
    assert ids(decision.regime_changed) == [0]
    assert shares(decision) == {0: 8}
    assert not sequence.long_rope
    assert sequence.num_cached_tokens == 0


# Drafts


SPECULATION = Speculation(num_tokens=4)
# Its last two tokens occurred before, and then came 6, 7, 8, 9.
PROMPT = [1, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5]


def drafts(decision: Any) -> dict[int, tuple[int, ...]]:
    return {s.sequence_id: draft_ids for s, _, draft_ids in decision.scheduled}


def decoding(lab: Any, sequence_id: int, token_ids: list[int] | None = None, **arguments: Any) -> Any:
    """A sequence that lacks one token; the last two of the prompt are its reply so far, unless told otherwise."""
    kv = lab.KV(PROMPT if token_ids is None else token_ids)
    kv.num_computed_tokens = kv.num_tokens
    return lab.sequence(sequence_id, kv=kv, **({"num_prompt_tokens": kv.num_tokens - 2, "max_tokens": 50} | arguments))


def only(lab: Any, subject: Scheduler, **arguments: Any) -> tuple[int, ...]:
    """The drafts of one sequence alone."""
    subject.add(decoding(lab, 0, **arguments))
    decision = subject.schedule()
    assert shares(decision) == {0: 1}
    return drafts(decision)[0]


def test_by_default_there_are_no_drafts(lab: Any) -> None:
    assert only(lab, scheduler()) == ()
    assert only(lab, scheduler(speculation=Speculation())) == ()


def test_what_followed_before_is_guessed_to_follow_again(lab: Any) -> None:
    assert only(lab, scheduler(speculation=SPECULATION)) == (6, 7, 8, 9)
    assert only(lab, scheduler(speculation=Speculation(3, 1, 2))) == (6, 7, 8)
    assert only(lab, scheduler(speculation=Speculation(4, 3, 4))) == ()


@pytest.mark.parametrize(("left", "expected"), [(0, 0), (1, 0), (2, 1), (3, 2), (4, 3), (5, 4), (6, 4)])
def test_drafts_and_the_token_behind_them_stay_within_every_limit(lab: Any, left: int, expected: int) -> None:
    num_tokens = len(PROMPT)
    if left:
        # With no room left the reply would be over, or paused.
        assert len(only(lab, scheduler(speculation=SPECULATION), max_tokens=2 + left)) == expected
        assert len(only(lab, scheduler(speculation=SPECULATION, max_model_len=num_tokens + left))) == expected
        assert len(only(lab, scheduler(speculation=SPECULATION), max_num_tokens=num_tokens + left)) == expected
    assert len(only(lab, scheduler(speculation=SPECULATION, max_num_batched_tokens=left + 1))) == min(left, 4)
    # The token behind the drafts must be one of the regime's: with `long_from` of n, tokens up to position n - 1.
    if left:
        assert len(only(lab, scheduler(speculation=SPECULATION, long_from=num_tokens + left))) == expected


def test_in_the_long_regime_there_are_drafts_again(lab: Any) -> None:
    kv = lab.KV(PROMPT, long_rope=True)
    kv.num_computed_tokens = kv.num_tokens
    subject = scheduler(speculation=SPECULATION, long_from=len(PROMPT))
    subject.add(lab.sequence(0, kv=kv, max_tokens=20))
    assert drafts(subject.schedule()) == {0: (6, 7, 8, 9)}


@pytest.mark.parametrize("min_tokens", [0, 40])
def test_nothing_is_guessed_from_a_stop_token_on(lab: Any, min_tokens: int) -> None:
    stops = {"stop_token_ids": (8, 30), "min_tokens": min_tokens}
    assert only(lab, scheduler(speculation=SPECULATION), **stops) == (6, 7)
    assert only(lab, scheduler(speculation=SPECULATION), **stops, ignore_eos=True) == (6, 7, 8, 9)
    assert only(lab, scheduler(speculation=SPECULATION), stop_token_ids=(6,)) == ()


def test_only_who_lacks_one_token_has_drafts_and_prefill_goes_first(lab: Any) -> None:
    subject = scheduler(max_num_batched_tokens=16, speculation=SPECULATION)
    subject.add(decoding(lab, 0))
    subject.add(lab.sequence(1, PROMPT))
    # 16 tokens: one, and eleven of the prompt; the rest is for drafts.
    decision = subject.schedule()
    assert shares(decision) == {0: 1, 1: 11}
    assert drafts(decision) == {0: (6, 7, 8, 9), 1: ()}
    subject.add(lab.sequence(2, [1] * 20))
    decision = subject.schedule()
    assert sum(shares(decision).values()) == 16
    assert set(drafts(decision).values()) == {()}


def test_a_paused_sequence_has_no_drafts_and_takes_nothing(lab: Any) -> None:
    subject = scheduler(max_num_batched_tokens=6, speculation=SPECULATION)
    subject.add(decoding(lab, 0, max_num_tokens=len(PROMPT)))
    subject.add(decoding(lab, 1))
    assert drafts(subject.schedule()) == {1: (6, 7, 8, 9)}


@pytest.mark.parametrize(
    ("lengths", "budget", "expected"),
    [
        ([], 5, []),
        ([4, 4, 4], 12, [4, 4, 4]),
        ([4, 4, 4], 6, [2, 2, 2]),
        ([4, 1, 4], 7, [3, 1, 3]),
        ([4, 4], 3, [1, 2]),
        ([2, 2, 2], 2, [0, 1, 1]),
    ],
)
def test_share_drafts(lengths: list[int], budget: int, expected: list[int]) -> None:
    granted = share_drafts({i: list(range(length)) for i, length in enumerate(lengths)}, budget)
    assert [len(granted[i]) for i in range(len(lengths))] == expected
    assert all(granted[i] == tuple(range(num)) for i, num in enumerate(expected))


def test_without_room_for_everybodys_growth_nobody_guesses(lab: Any) -> None:
    # 10 bytes a token. Two sequences that may grow by 32 tokens each.
    subject = scheduler(speculation=SPECULATION, max_kv_bytes=10 * 2 * (len(PROMPT) + 32))
    subject.add(decoding(lab, 0))
    subject.add(decoding(lab, 1))
    decision = subject.schedule()
    assert drafts(decision) == {0: (6, 7, 8, 9), 1: (6, 7, 8, 9)}
    carry_out(decision, 6)
    decision = subject.schedule()
    assert shares(decision) == {0: 1, 1: 1}
    assert drafts(decision) == {0: (), 1: ()}


def test_what_is_known_of_a_sequence_is_forgotten_with_it(lab: Any) -> None:
    subject = scheduler(speculation=SPECULATION)
    subject.add(decoding(lab, 0))
    subject.schedule()
    assert subject._ngrams
    subject.remove(subject.running[0])
    assert not subject._ngrams
