"""Log probabilities of a prompt's tokens: however it is computed, with caches, in company, and after a setback."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from phi_cluster.model.sampling_params import SamplingParams

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]


def asking(lab: Any, sequence_id: int = 1, token_ids: list[int] = PROMPT, **options: Any) -> Any:
    return lab.sequence(sequence_id, token_ids, **({"logprobs": 2, "prompt_logprobs": True, "max_tokens": 3} | options))


def run(engine: Any, *sequences: Any) -> dict[int, list[Any]]:
    """All outputs, by sequence."""
    outputs: dict[int, list[Any]] = {sequence.sequence_id: [] for sequence in sequences}
    for sequence in sequences:
        engine.add(sequence)
    while engine.has_work:
        for output in engine.step():
            outputs[output.sequence_id].append(output)
    return outputs


def told(outputs: list[Any]) -> list[Any]:
    """They come once, with the first token."""
    first, *others = outputs
    assert first.token_ids
    assert all(one.prompt_logprobs is None for one in others)
    return first.prompt_logprobs


def expected(lab: Any) -> list[Any]:
    """As replies of one token tell them, each forced to be the prompt's next one."""
    found = []
    for length in range(1, len(PROMPT)):
        sequence = lab.sequence(1, PROMPT[:length], logprobs=2, max_tokens=1, logit_bias={PROMPT[length]: 100.0})
        [output] = run(lab.engine(lab.Model()), sequence)[1]
        assert output.token_ids == [PROMPT[length]]
        found += output.logprobs
    return found


@pytest.mark.parametrize("batched", [1, 2, 5, 64])
def test_each_token_but_the_first_has_one(lab: Any, batched: int) -> None:
    outputs = run(lab.engine(lab.Model(), max_num_batched_tokens=batched), asking(lab))[1]
    assert told(outputs) == expected(lab)
    plain = run(lab.engine(lab.Model()), lab.sequence(1, PROMPT, logprobs=2, max_tokens=3))[1]
    assert [one.logprobs for one in outputs] == [one.logprobs for one in plain]


def test_cached_tokens_are_computed_again(lab: Any) -> None:
    first = lab.sequence(1, PROMPT, max_tokens=3)
    run(lab.engine(lab.Model()), first)
    kv = first.kv.reopen()
    kv.trim(len(PROMPT))
    outputs = run(lab.engine(lab.Model()), asking(lab, kv=kv, token_ids=None))[1]
    assert told(outputs) == expected(lab)
    assert outputs[0].num_cached_tokens == 0


def test_in_company(lab: Any) -> None:
    others = [lab.sequence(n, [n] * 9, logprobs=1, max_tokens=5) for n in (2, 3)]
    alone = [run(lab.engine(lab.Model()), lab.sequence(n, [n] * 9, logprobs=1, max_tokens=5))[n] for n in (2, 3)]
    outputs = run(lab.engine(lab.Model(), max_num_batched_tokens=7), others[0], asking(lab), others[1])
    assert told(outputs[1]) == expected(lab)

    def replies(of: list[Any]) -> list[Any]:
        pairs = [zip(one.token_ids, one.logprobs or (), strict=True) for one in of if one.token_ids]
        return list(itertools.chain(*pairs))

    assert [replies(outputs[n]) for n in (2, 3)] == [replies(one) for one in alone]


def test_rows_of_logits_are_few_at_a_time(lab: Any) -> None:
    model = lab.Model()
    outputs = run(lab.engine(model, max_num_batched_tokens=500), asking(lab, token_ids=[7] * 200))[1]
    assert len(told(outputs)) == 199
    assert max(sum(wanted) for wanted in model.wanted) == 64


def test_a_prompt_of_one_token_has_none(lab: Any) -> None:
    assert told(run(lab.engine(lab.Model()), asking(lab, token_ids=[3]))[1]) is None


def test_with_a_regime_of_its_own(lab: Any) -> None:
    """The prompt changes the regime with its length: what was computed in the other one does not count."""
    long = told(run(lab.engine(lab.Model(long_from=5)), asking(lab))[1])
    assert len(long) == len(PROMPT) - 1
    assert long != expected(lab)
    kv = lab.KV(PROMPT, long_rope=False)
    assert told(run(lab.engine(lab.Model(long_from=5)), asking(lab, kv=kv, token_ids=None))[1]) == long


def test_one_that_began_anew_tells_each_once(lab: Any) -> None:
    """Preempted in the middle of its prompt."""
    engine = lab.engine(lab.Model(), max_num_batched_tokens=4)
    sequence = asking(lab)
    engine.add(sequence)
    engine.step()
    assert 0 < len(sequence.prompt_logprobs) < len(PROMPT) - 1
    engine._scheduler._preempt(sequence, decision := engine._scheduler.schedule())
    del decision
    sequence.kv.clear()
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert told(outputs) == expected(lab)


def test_a_reply_that_is_taken_over_has_told_them(lab: Any) -> None:
    whole = run(lab.engine(lab.Model()), asking(lab))[1]
    so_far = whole[0].token_ids
    rest = asking(lab, token_ids=PROMPT + so_far, num_prompt_tokens=len(PROMPT))
    outputs = run(lab.engine(lab.Model()), rest)[1]
    assert all(one.prompt_logprobs is None for one in outputs)
    assert so_far + [i for one in outputs for i in one.token_ids] == [i for one in whole for i in one.token_ids]


def test_they_come_with_log_probabilities_only() -> None:
    with pytest.raises(ValueError, match="prompt_logprobs"):
        SamplingParams(seed=1, max_tokens=1, prompt_logprobs=True)
