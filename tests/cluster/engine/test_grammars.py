"""Engine with replies that follow a grammar, or come with log probabilities: alone and in company, with guesses and
without, from the beginning and taken over in the middle."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from phi_cluster.cluster.engine.grammar_queue import GrammarQueue
from phi_cluster.cluster.engine.settings import Speculation
from phi_cluster.cluster.frames import AddSequence
from phi_cluster.cluster.messages import SegmentRef
from phi_cluster.model.grammar import GrammarError

END = 39
VOCAB_SIZE = 40


class ForkedRoad:
    """A grammar: at each fork, one of three roads, whose next three tokens must come; the end after `forks` of them."""

    def __init__(self, forks: int = 4):
        self._forks = forks
        self.said: list[int] = []
        self.broken = False

    def _may_come(self, said: Sequence[int]) -> list[int]:
        at = len(said) % 4
        if at == 0:
            return [END] if len(said) >= 4 * self._forks else [1, 2, 3]
        return [10 * said[-at] + at]

    def consume(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            if token_id not in self._may_come(self.said):
                raise ValueError(f"{token_id} may not come")
            self.said.append(token_id)

    def masks(self, draft_ids: Sequence[int] = ()) -> NDArray[np.uint32]:
        if self.broken:
            raise ValueError("too much to follow")
        masks = np.zeros((1 + len(draft_ids), 2), np.uint32)
        said = list(self.said)
        for row, mask in enumerate(masks):
            if row:
                if draft_ids[row - 1] not in self._may_come(said):
                    break
                said.append(draft_ids[row - 1])
            for token_id in self._may_come(said):
                mask[token_id // 32] |= np.uint32(1 << token_id % 32)
        return masks

    def forced(self) -> list[int]:
        said, forced = list(self.said), []
        while len(may := self._may_come(said)) == 1 and may != [END]:
            forced += may
            said += may
        return forced

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        said = list(self.said)
        for i, token_id in enumerate(token_ids):
            if token_id not in self._may_come(said):
                return i
            said.append(token_id)
        return len(token_ids)


def fits(reply: list[int]) -> bool:
    road = ForkedRoad()
    road.consume([token_id for token_id in reply if token_id != END])
    return True


def following(lab: Any, sequence_id: int, prompt: list[int], *, so_far: list[int] | None = None, **params: Any) -> Any:
    """A sequence that follows the grammar, perhaps with a part of its reply."""
    kv = lab.KV([*prompt, *(so_far or [])])
    made = lab.sequence(
        sequence_id, kv=kv, num_prompt_tokens=len(prompt), **{"stop_token_ids": (END,), "max_tokens": 60, **params}
    )
    made.matcher = ForkedRoad()
    made.matcher.consume(so_far or [])
    return made


def run(lab: Any, *sequences: Any, model: Any = None, **options: Any) -> tuple[dict[int, Any], int]:
    model = model or lab.Model()
    engine = lab.engine(model, **options)
    for sequence in sequences:
        engine.add(sequence)
    return lab.drain(engine), len(model.steps)


@pytest.mark.parametrize("seed", range(10))
def test_the_reply_follows_the_grammar_to_its_end(lab: Any, seed: int) -> None:
    replies, _ = run(lab, following(lab, 1, [1, 2, 3], seed=seed))
    assert replies[1].finish_reason == "stop"
    assert replies[1].token_ids[-1] == END
    assert len(replies[1].token_ids) == 17
    assert fits(replies[1].token_ids)


def test_what_must_come_takes_no_step_of_its_own_and_changes_nothing(lab: Any) -> None:
    class Silent(ForkedRoad):
        def forced(self) -> list[int]:
            return []

    for seed in range(10):
        guessed = following(lab, 1, [1, 2, 3], seed=seed)
        plain = following(lab, 1, [1, 2, 3], seed=seed)
        plain.matcher = Silent()
        replies, steps = run(lab, guessed)
        expected, steps_of_plain = run(lab, plain)
        assert replies[1].token_ids == expected[1].token_ids
        assert guessed.kv.token_ids == plain.kv.token_ids
        assert steps_of_plain == 17
        # One step a fork, which brings its three tokens with the next fork's first, and one for the first fork.
        assert steps < 10


def test_guesses_from_the_text_are_cut_where_the_grammar_does_not_allow_them(lab: Any) -> None:
    for seed in range(10):
        prompt = [1, 11, 12, 13, 2, 21, 22, 23, 1, 11, 12, 13]
        expected, _ = run(lab, following(lab, 1, prompt, seed=seed))
        replies, _ = run(lab, following(lab, 1, prompt, seed=seed), speculation=Speculation(4, 1, 4))
        assert replies[1].token_ids == expected[1].token_ids


def test_in_company_as_alone(lab: Any) -> None:
    rng = random.Random(0)
    prompts = {i: [rng.randrange(38) for _ in range(rng.randint(1, 30))] for i in range(1, 9)}

    def made(i: int) -> Any:
        if i % 2:
            return following(lab, i, prompts[i], seed=i, temperature=1.5)
        return lab.sequence(i, prompts[i], seed=i)

    together, _ = run(lab, *map(made, prompts), max_num_batched_tokens=16, max_num_seqs=5, max_kv_bytes=900)
    for i in prompts:
        alone, _ = run(lab, made(i))
        assert together[i].token_ids == alone[i].token_ids


def test_preempted_in_the_middle_it_goes_on_the_same(lab: Any) -> None:
    def made(i: int) -> Any:
        sequence = following(lab, i, [i] * 10, seed=i, temperature=1.5, max_tokens=80)
        sequence.matcher = ForkedRoad(forks=14)
        return sequence

    engine = lab.engine(lab.Model(), max_kv_bytes=900)
    for i in range(3):
        engine.add(made(i))
    replies = lab.drain(engine)
    assert engine.num_preemptions >= 1
    for i in range(3):
        alone, _ = run(lab, made(i))
        assert replies[i].finish_reason == "stop"
        assert replies[i].token_ids == alone[i].token_ids


@pytest.mark.parametrize("at", [0, 1, 4, 9, 16])
def test_taken_over_in_the_middle_it_goes_on_the_same(lab: Any, at: int) -> None:
    whole, _ = run(lab, following(lab, 1, [5, 6], seed=3))
    so_far = whole[1].token_ids[:at]
    rest, _ = run(lab, following(lab, 1, [5, 6], so_far=so_far, seed=3))
    assert so_far + rest[1].token_ids == whole[1].token_ids


def test_one_whose_grammar_cannot_be_followed_fails_alone(lab: Any) -> None:
    broken, other = following(lab, 1, [1, 2]), following(lab, 2, [1, 2])
    broken.matcher.broken = True
    replies, _ = run(lab, broken, other)
    assert (replies[1].finish_reason, replies[2].finish_reason) == ("error", "stop")
    assert "too much to follow" in replies[1].error


def test_a_grammar_that_becomes_too_much_is_the_requests_fault(lab: Any) -> None:
    """llguidance may find so only in the middle of a reply: told as what is seen before it begins."""

    class TooMuch(ForkedRoad):
        def masks(self, draft_ids: Sequence[int] = ()) -> NDArray[np.uint32]:
            if len(self.said) >= 4:
                raise GrammarError("too many items")
            return super().masks(draft_ids)

    much, other = following(lab, 1, [1, 2]), following(lab, 2, [1, 2])
    much.matcher = TooMuch()
    replies, _ = run(lab, much, other)
    assert (replies[1].finish_reason, replies[1].error) == ("bad_grammar", "too many items")
    assert replies[2].finish_reason == "stop"


def test_a_reply_that_does_not_fit_is_not_taken_over(lab: Any) -> None:
    kv = lab.KV([1, 2, 9])
    with pytest.raises(ValueError, match="may not come"):
        type(lab.sequence(1, [1]))(1, kv, [1, 2, 9], 2, lab.params(), 100, ForkedRoad())


# Log probabilities.


def logprobs_of(lab: Any, sequence: Any, **options: Any) -> tuple[list[int], list[Any]]:
    engine = lab.engine(lab.Model(), **options)
    engine.add(sequence)
    ids, logprobs = [], []
    while engine.has_work:
        for output in engine.step():
            assert len(output.logprobs or ()) == len(output.token_ids)
            ids += output.token_ids
            logprobs += output.logprobs or ()
    return ids, logprobs


def test_each_token_has_its_log_probability(lab: Any) -> None:
    ids, logprobs = logprobs_of(lab, lab.sequence(1, [1, 2], logprobs=3, temperature=0.0))
    assert len(ids) == len(logprobs) == 8
    for token_id, told in zip(ids, logprobs, strict=True):
        assert told.top_ids[0] == token_id
        assert told.top_logprobs[0] == told.logprob
        assert len(told.top_ids) == 3
        assert sorted(told.top_logprobs, reverse=True) == told.top_logprobs


def test_with_guesses_the_same_log_probabilities(lab: Any) -> None:
    plain = logprobs_of(lab, following(lab, 1, [1, 2], logprobs=2, seed=5), max_num_batched_tokens=1)
    guessed = logprobs_of(lab, following(lab, 1, [1, 2], logprobs=2, seed=5))
    assert guessed == plain


# Compiling in another thread.


class Slow:
    """Compiles when it may."""

    def __init__(self) -> None:
        self.may = threading.Event()

    def matcher(self, grammar: str, end_ids: tuple[int, ...]) -> Any:
        assert self.may.wait(10)
        if grammar == "wrong":
            raise ValueError("no such grammar")
        return (grammar, end_ids)


def frame(sequence_id: int, grammar: str) -> AddSequence:
    sampling = {"grammar": grammar, "grammar_end_ids": [END]}
    return AddSequence(sequence_id, SegmentRef(1, 2, b""), 1, 0, [1], sampling, 10, 1)


def test_the_queue_gives_back_what_it_was_given_in_order() -> None:
    source = Slow()
    waiting = GrammarQueue(source)
    for i, grammar in enumerate(["a", "wrong", "b", "c"]):
        waiting.submit(frame(i, grammar))
    assert waiting.cancel(2)
    assert not waiting.cancel(2)
    source.may.set()
    ready: list[Any] = []
    while len(ready) < 3:
        ready += waiting.take()
    assert [one.frame.sequence_id for one in ready] == [0, 1, 3]
    assert ready[0].result == ("a", (END,))
    assert isinstance(ready[1].result, ValueError)
    assert not waiting.cancel(0)
    waiting.close()
