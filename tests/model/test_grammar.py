"""Grammars over a small byte-level tokenizer: what may come, what must, and what is refused."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from phi_cluster.model.grammar import (
    GrammarError,
    Grammars,
    Matcher,
    check_grammar,
    choice_grammar,
    json_object_grammar,
    json_schema_grammar,
    lark_grammar,
    regex_grammar,
)
from tests.model.formats import HARMLESS, WRONG, Wanted

MERGES = [("{", '"'), ('"', ":"), ("n", "a"), ("na", "me"), ("m", "e"), ("y", "es"), ("e", "s"), ("}", "}"), ("1", "0")]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 256 bytes, some pairs, and an end token, in a network's vocabulary that is larger."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [pair for pair in MERGES if all(part in alphabet or len(part) > 1 for part in pair)]
    pairs.sort(key=lambda pair: len("".join(pair)))
    vocab = {text: i for i, text in enumerate([*alphabet, *("".join(pair) for pair in pairs)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(path / "tokenizer.json"))
    return path


class Language:
    """Matchers and texts of that tokenizer."""

    def __init__(self, folder: Path):
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.end_id: int = self.tokenizer.token_to_id("<end>")
        self.vocab_size = self.end_id + 40
        self.grammars = Grammars(folder, self.vocab_size)

    def matcher(self, grammar: str) -> Matcher:
        return self.grammars.matcher(grammar, [self.end_id])

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def allowed(self, mask: NDArray[np.uint32]) -> list[int]:
        return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()

    def allowed_texts(self, matcher: Matcher) -> set[str]:
        return {self.tokenizer.id_to_token(i) for i in self.allowed(matcher.masks()[0])}

    def say(self, grammar: str, rng: random.Random, most: int = 400) -> str | None:
        """A reply drawn at random from what is allowed; None if it does not end in time."""
        matcher, said = self.matcher(grammar), []
        for _ in range(most):
            allowed = self.allowed(matcher.masks()[0])
            assert allowed, "nothing may come"
            assert max(allowed) <= self.end_id, "a token that has no text may come"
            # Whoever may end does: a random text would never.
            token_id = self.end_id if self.end_id in allowed else rng.choice(allowed)
            if token_id == self.end_id:
                return self.tokenizer.decode(said)
            said.append(token_id)
            matcher.consume([token_id])
        return None


@pytest.fixture(scope="module")
def language(folder: Path) -> Language:
    return Language(folder)


# What may come.


def test_a_choice_allows_its_beginnings_then_the_end(language: Language) -> None:
    matcher = language.matcher(choice_grammar(["yes", "no"]))
    assert language.allowed_texts(matcher) == {"y", "yes", "n"}
    matcher.consume(language.ids("ye"))
    assert language.allowed_texts(matcher) == {"s"}
    matcher.consume(language.ids("s"))
    assert language.allowed_texts(matcher) == {"<end>"}


def test_what_is_not_allowed_is_refused(language: Language) -> None:
    matcher = language.matcher(choice_grammar(["yes", "no"]))
    with pytest.raises(GrammarError):
        matcher.consume(language.ids("maybe"))
    with pytest.raises(GrammarError):
        matcher.masks()


@pytest.mark.parametrize("quoted", ['say "hi"', "back\\slash", "line\nend", "é and 日本"])
def test_choices_are_taken_as_they_are(language: Language, quoted: str) -> None:
    matcher = language.matcher(choice_grammar([quoted, "other"]))
    matcher.consume(language.ids(quoted))
    assert language.allowed(matcher.masks()[0]) == [language.end_id]


@pytest.mark.parametrize("seed", range(40))
def test_random_replies_fit_the_schema(language: Language, seed: int) -> None:
    said = language.say(json_schema_grammar(PERSON), random.Random(seed))
    assert said is not None
    person = json.loads(said)
    assert list(person) == ["name", "age", "tags"]
    assert len(person["name"]) <= 5
    assert 0 <= person["age"] <= 150
    assert len(person["tags"]) <= 3
    assert set(person["tags"]) <= {"a", "b"}
    # Compact, so that no model writes spaces for ever.
    assert said.startswith('{"name":"')


@pytest.mark.parametrize("seed", range(10))
def test_random_replies_fit_the_regex(language: Language, seed: int) -> None:
    said = language.say(regex_grammar(r"(\d{3}-){1,2}[x-z]+!"), random.Random(seed))
    assert said is not None
    assert re.fullmatch(r"(\d{3}-){1,2}[x-z]+!", said)


def test_any_object(language: Language) -> None:
    for seed in range(10):
        said = language.say(json_object_grammar(), random.Random(seed))
        if said is not None:
            assert isinstance(json.loads(said), dict)


def test_a_lark_grammar(language: Language) -> None:
    matcher = language.matcher(lark_grammar('start: "a" start "b" | "c"'))
    matcher.consume(language.ids("aacbb"))
    assert language.allowed_texts(matcher) == {"<end>"}


# Drafts.


def test_masks_behind_drafts_are_those_behind_consumed_tokens(language: Language) -> None:
    grammar = json_schema_grammar(PERSON)
    text = language.ids('{"name":"ab","age":10,"tags":["a"]}')
    one_by_one, at_once = language.matcher(grammar), language.matcher(grammar)
    masks = at_once.masks(text)
    assert len(masks) == 1 + len(text)
    for i, mask in enumerate(masks):
        assert np.array_equal(mask, one_by_one.masks()[0])
        if i < len(text):
            one_by_one.consume([text[i]])
    # Nothing has been consumed by asking.
    assert np.array_equal(at_once.masks()[0], masks[0])


def test_nothing_may_come_behind_a_draft_that_may_not(language: Language) -> None:
    matcher = language.matcher(choice_grammar(["yes"]))
    wrong = language.ids("x")
    masks = matcher.masks([*wrong, *language.ids("yes")])
    assert language.allowed(masks[0])
    assert not masks[1:].any()
    assert matcher.num_allowed(wrong) == 0
    assert matcher.num_allowed([*language.ids("yes"), *wrong]) == len(language.ids("yes"))


def test_what_must_come_is_told(language: Language) -> None:
    matcher = language.matcher(json_schema_grammar(PERSON))
    forced = matcher.forced()
    assert language.tokenizer.decode(forced).startswith('{"na')
    matcher.consume(forced)
    assert matcher.masks()[0].any()


def test_a_new_matcher_goes_on_where_another_was(language: Language) -> None:
    grammar = json_schema_grammar(PERSON)
    said = language.ids('{"name":"x","age":1')
    first, second = language.matcher(grammar), language.matcher(grammar)
    first.consume(said)
    for token_id in said:
        second.masks()
        second.forced()
        second.consume([token_id])
    assert np.array_equal(first.masks(), second.masks())
    assert first.forced() == second.forced()


# What is refused, and what is not. Nothing is fetched, nothing takes long.


def grammar_of(wanted: Wanted) -> str:
    make: Callable[[Any], str] = {"json": json_schema_grammar, "regex": regex_grammar, "grammar": lark_grammar}[
        wanted.kind
    ]
    return make(wanted.value)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_grammars_are_refused_in_one_line(language: Language, name: str) -> None:
    wanted, hint = WRONG[name]
    with pytest.raises(GrammarError) as caught:
        language.matcher(grammar_of(wanted))
    message = str(caught.value)
    assert hint in message
    assert message
    assert "\n" not in message
    assert len(message) <= 300


@pytest.mark.parametrize("name", HARMLESS)
def test_large_grammars_are_followed(language: Language, name: str) -> None:
    grammar = grammar_of(HARMLESS[name])
    check_grammar(grammar)
    assert language.matcher(grammar).masks().any()


def test_most_of_what_is_wrong_is_seen_without_a_tokenizer() -> None:
    seen = 0
    for wanted, _ in WRONG.values():
        try:
            check_grammar(grammar_of(wanted))
        except GrammarError:
            seen += 1
    assert seen >= len(WRONG) - 3


def test_two_thousand_grammars_take_no_more_memory_than_some(language: Language) -> None:
    for i in range(2000):
        language.matcher(choice_grammar([f"word {i}"]))
    assert len(language.grammars._compiled) <= 64
