"""Vocabularies out of GGUF metadata encode as the models' own tokenizers do."""

from __future__ import annotations

import random
import runpy
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phi_cluster.model.gguf_file import GGUFFile
from phi_cluster.model.gguf_tokenizer import gguf_tokenizer
from phi_cluster.model.tokenizer import Tokenizer

tiny = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_gguf.py"))))


def load(tmp_path: Path, vocabulary: dict[str, Any], **metadata: Any) -> Tokenizer:
    path = tiny.write(tmp_path / "m.gguf", vocabulary=vocabulary, metadata=metadata)
    with GGUFFile(path) as file:
        files = gguf_tokenizer(file, tiny.VOCAB)
    template = files.tokenizer_config.get("chat_template")
    return Tokenizer(files.tokenizer, files.tokenizer_config, template, files.eos_token_ids)


def spelled(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.token_text(i) for i in tokenizer.encode(text)]


def sentencepiece(text: str, vocabulary: dict[str, Any]) -> list[int]:
    """SentencePiece's own way: merge the neighbours whose union scores best, leftmost first; bytes for the
    rest."""
    tokens, scores = vocabulary["tokenizer.ggml.tokens"], vocabulary["tokenizer.ggml.scores"]
    ids = {token: i for i, token in enumerate(tokens) if vocabulary["tokenizer.ggml.token_type"][i] == 1}
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(scores[ids[a + b]], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ids]
        if not pairs:
            break
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    byte = tokens.index("<0x00>")
    return [i for part in parts for i in ([ids[part]] if part in ids else [byte + b for b in part.encode()])]


def test_sentencepiece_merges_by_score(tmp_path: Path) -> None:
    vocabulary = tiny.sentencepiece_vocabulary()
    tokenizer = load(tmp_path, vocabulary)
    source = random.Random(5)
    for _ in range(300):
        text = "".join(source.choice("thes>  /é🎉") for _ in range(source.randrange(1, 25)))
        assert tokenizer.encode(text) == sentencepiece(text, vocabulary)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_begins_with_bos_unless_told_otherwise(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, tiny.sentencepiece_vocabulary())
    assert tokenizer.encode_prompt("the") == [1, *tokenizer.encode("the")]
    without = load(tmp_path, tiny.sentencepiece_vocabulary(), **{"tokenizer.ggml.add_bos_token": False})
    assert without.encode_prompt("the") == without.encode("the")


def test_no_merge_makes_a_control_token(tmp_path: Path) -> None:
    # "</" and "s>" are ordinary tokens, and "</s>" is in the vocabulary.
    tokenizer = load(tmp_path, tiny.sentencepiece_vocabulary())
    ids = tokenizer.encode(tokenizer.sanitize("the</s>the"))
    assert not any(map(tokenizer.is_special, ids))
    assert tokenizer.decode(ids) == "the</s>the"
    assert 2 in tokenizer.encode("the</s>the")


def test_prefix_space_can_be_off(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, tiny.sentencepiece_vocabulary(), **{"tokenizer.ggml.add_space_prefix": False})
    assert spelled(tokenizer, "the") == ["the"]
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"


def test_phi3s_special_tokens_swallow_whitespace(tmp_path: Path) -> None:
    vocabulary = tiny.sentencepiece_vocabulary()
    phi = load(tmp_path, vocabulary, **{"general.name": "Phi-3-mini"})
    other = load(tmp_path, vocabulary, **{"general.name": "TinyLlama"})
    assert phi.encode("<|end|>\n \nthe") == phi.encode("<|end|>the")
    assert other.encode("<|end|>\n \nthe") != other.encode("<|end|>the")
    # The token that begins a text keeps it.
    assert phi.encode("<s> the") != phi.encode("<s>the")


@pytest.mark.parametrize(
    ("pre", "text", "parts"),
    [
        ("smollm", "a 12 b", ["a", " ", "1", "2", " ", "b"]),
        ("gpt-2", "a 12", ["a", " ", "12"]),
        ("llama-bpe", "12", ["12"]),
        ("qwen2", "12", ["1", "2"]),
        ("gpt-4o", "the 12", ["t", "he", " ", "12"]),
    ],
)
def test_digits_split_as_the_pre_tokenizer_says(tmp_path: Path, pre: str, text: str, parts: list[str]) -> None:
    assert spelled(load(tmp_path, tiny.byte_level_vocabulary(pre)), text) == parts


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("smollm", "I'll go\n\n  now!!", ["I", "'ll", " go", "\n\n ", " now", "!!"]),
        ("llama-bpe", "I'LL go\n\n  12345!!\n", ["I", "'LL", " go", "\n\n", " ", " ", "123", "45", "!!\n"]),
        ("qwen2", "(hi) 123", ["(hi", ")", " ", "1", "2", "3"]),
        ("gpt-4o", "camelCase HTTPServer's", ["camel", "Case", " HTTPServer's"]),
        ("dbrx", "camelCase's", ["camelCase", "'s"]),
    ],
)
def test_words_split_as_the_pre_tokenizer_says(tmp_path: Path, pre: str, text: str, words: list[str]) -> None:
    path = tiny.write(tmp_path / "m.gguf", vocabulary=tiny.byte_level_vocabulary(pre))
    with GGUFFile(path) as file:
        description = gguf_tokenizer(file, tiny.VOCAB).tokenizer
    import json

    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(json.dumps(description))
    assert [text[a:b] for _, (a, b) in backend.pre_tokenizer.pre_tokenize_str(text)] == words


def test_user_defined_tokens_are_added_but_not_special(tmp_path: Path) -> None:
    vocabulary = tiny.byte_level_vocabulary()
    vocabulary["tokenizer.ggml.tokens"] = [*vocabulary["tokenizer.ggml.tokens"], "<think>"]
    vocabulary["tokenizer.ggml.token_type"] = [*vocabulary["tokenizer.ggml.token_type"], 4]
    tokenizer = load(tmp_path, vocabulary)
    ids = tokenizer.encode("the <think>")
    assert ids[-1] == len(vocabulary["tokenizer.ggml.tokens"]) - 1
    assert not tokenizer.is_special(ids[-1])
    assert tokenizer.decode(ids) == "the <think>"


def test_end_tokens_are_those_named_and_those_known_by_name(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, tiny.byte_level_vocabulary(), **{"tokenizer.ggml.eot_token_id": 1})
    assert tokenizer.eos_token_ids == (2, 1, 0)


def test_named_templates_are_kept(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m.gguf", metadata={"tokenizer.chat_template.tool_use": "tools"})
    with GGUFFile(path) as file:
        templates = gguf_tokenizer(file, tiny.VOCAB).tokenizer_config["chat_template"]
    assert [item["name"] for item in templates] == ["default", "tool_use"]
