"""Holds a reply to a grammar: which tokens may come next, and which must.

Owns: the grammars that can be asked for (JSON schema, regular expression, Lark grammar, choice), what compiling them
may cost, and `Matcher`, one reply's place in its grammar. Compiling and matching are llguidance's. Knows nothing of
logits, sequences, requests or HTTP.

A matcher's state is a function of the reply's tokens alone, so a reply that goes on elsewhere gets a new one that has
consumed the same tokens.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

# Of what a client sends, in characters; what is compiled from it grows with it.
MAX_GRAMMAR_CHARS = 64 * 1024
# Compact JSON: a small model that may write spaces writes them for ever.
_JSON_OPTIONS: Any = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
# A compiled grammar that is asked for again costs nothing; one takes some 10 to 100 KB.
_NUM_CACHED = 64


class GrammarError(ValueError):
    """The grammar is wrong, or too large to be followed; the message says why in one line."""


def json_schema_grammar(schema: dict[str, Any] | bool) -> str:
    """Of compact JSON documents that the schema allows. Raises GrammarError for a schema that is too large or that
    cannot be written as JSON; what is wrong in it is found when the grammar is compiled."""
    text = json_text(schema)
    try:
        return LLMatcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS)
    except ValueError as error:
        raise GrammarError(_told(str(error))) from None


def json_object_grammar() -> str:
    """Of all JSON objects, compact."""
    return json_schema_grammar({"type": "object"})


def regex_grammar(pattern: str) -> str:
    """Of all texts that the whole pattern matches (Rust's syntax: no look-around, no back-references)."""
    check_size(pattern)
    return LLMatcher.grammar_from_regex(pattern)


def lark_grammar(text: str) -> str:
    """Of a context-free grammar in llguidance's variant of Lark's syntax."""
    check_size(text)
    return LLMatcher.grammar_from_lark(text)


def choice_grammar(choices: Sequence[str]) -> str:
    """Of these texts, nothing else."""
    check_size("".join(choices))
    return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(choice) for choice in choices))


def check_grammar(grammar: str) -> None:
    """Raises GrammarError for what is wrong in it as far as that is seen without a tokenizer."""
    is_wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar, None, limits=_limits())
    if is_wrong:
        raise GrammarError(_told(messages[0]))


class Grammars:
    """Compiles grammars for one tokenizer, which takes half a second and some 50 MB the first time. For any thread."""

    def __init__(self, folder: Path, vocab_size: int):
        """`folder` has the tokenizer.json; `vocab_size` is the network's."""
        self._folder = folder
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._tokenizers: dict[tuple[int, ...], LLTokenizer] = {}
        self._compiled: OrderedDict[tuple[str, tuple[int, ...]], LLMatcher] = OrderedDict()

    def matcher(self, grammar: str, end_ids: Sequence[int]) -> Matcher:
        """At the beginning of a reply. A grammar that is complete allows `end_ids` (the same for a whole server) to
        follow. Raises GrammarError."""
        key = (grammar, tuple(end_ids))
        with self._lock:
            compiled = self._compiled.pop(key, None)
            if compiled is None:
                compiled = self._compile(*key)
            self._compiled[key] = compiled
            if len(self._compiled) > _NUM_CACHED:
                self._compiled.popitem(last=False)
            return Matcher(compiled.deep_copy(), self._vocab_size)

    def _compile(self, grammar: str, end_ids: tuple[int, ...]) -> LLMatcher:
        tokenizer = self._tokenizers.get(end_ids)
        if tokenizer is None:
            text = (self._folder / "tokenizer.json").read_text(encoding="utf-8")
            tokenizer = LLTokenizer(text, n_vocab=self._vocab_size, eos_token=list(end_ids))
            self._tokenizers[end_ids] = tokenizer
        compiled = LLMatcher(tokenizer, grammar, log_level=0, limits=_limits())
        # A first mask finds what compiling does not: a grammar that nothing fits, or that is too much to follow.
        if not compiled.is_error():
            compiled.compute_bitmask()
        if compiled.is_error():
            raise GrammarError(_told(compiled.get_error()))
        return compiled


class Matcher:
    """One reply's place in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int):
        self._matcher = matcher
        self._num_words = -(-vocab_size // 32)

    def consume(self, token_ids: Sequence[int]) -> None:
        """The reply goes on with these. Raises GrammarError if it may not."""
        for token_id in token_ids:
            if not self._matcher.consume_token(token_id):
                raise GrammarError(_told(self._matcher.get_error()) or "a token that its grammar does not allow")

    def masks(self, draft_ids: Sequence[int] = ()) -> NDArray[np.uint32]:
        """uint32 [1 + drafts, vocab_size / 32 rounded up]: bit i % 32 of word i / 32 says whether token i may come
        next, and behind each of the drafts as if they had been consumed. Behind a draft that may not come nothing may.
        Raises GrammarError."""
        masks = np.zeros((1 + len(draft_ids), self._num_words), np.uint32)
        consumed = 0
        for row in range(len(masks)):
            if row:
                if self._matcher.validate_tokens([draft_ids[row - 1]]) == 0:
                    break
                self._matcher.consume_token(draft_ids[row - 1])
                consumed += 1
            self._matcher.unsafe_compute_mask_ptr(masks[row].ctypes.data, masks[row].nbytes)
        if consumed:
            self._matcher.rollback(consumed)
        if self._matcher.is_error():
            raise GrammarError(_told(self._matcher.get_error()))
        return masks

    def forced(self) -> list[int]:
        """Tokens that a reply which follows the grammar would most naturally go on with, because their text must come:
        a guess, since the same text may be cut into other tokens."""
        return list(self._matcher.compute_ff_tokens())

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        """How many of these may come next, one after the other."""
        return int(self._matcher.validate_tokens(list(token_ids)))


def _limits() -> LLParserLimits:
    """A tenth of a second at most for compiling and some milliseconds for a mask."""
    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=50_000,
        max_grammar_size=100_000,
        # They would quote the grammar.
        verbose_errors=False,
    )


def json_text(schema: dict[str, Any] | bool) -> str:
    """A schema in one line. Raises GrammarError if it is too large, or cannot be written as JSON."""
    try:
        text = json.dumps(schema)
    except (RecursionError, ValueError) as error:
        raise GrammarError(f"it cannot be written as JSON: {type(error).__name__}") from None
    check_size(text)
    return text


def check_size(text: str) -> None:
    """Raises GrammarError for more than may be compiled."""
    if len(text) > MAX_GRAMMAR_CHARS:
        raise GrammarError(f"it has {len(text)} characters, more than {MAX_GRAMMAR_CHARS}")


def _told(error: str) -> str:
    """llguidance's message without the lines that quote the grammar."""
    for line in reversed(error.splitlines()):
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    first = next((line for line in error.splitlines() if line.strip()), "")
    return first.split(" (in regex)")[0][:200]
