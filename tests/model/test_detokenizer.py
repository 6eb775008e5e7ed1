"""Text that comes piece by piece is the text of all ids at once, and stop strings are found wherever they are
cut."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from phi_cluster.model.detokenizer import Decoding
from phi_cluster.model.tokenizer import StopStrings, Tokenizer

TEXT = "the cat's café — naïve 日本 🎉 "


def byte_level() -> Tokenizer:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 4, trainer)
    # One that is not spelled in bytes, and one that looks as if it were.
    backend.add_tokens([AddedToken("→ö", normalized=False), AddedToken("é", normalized=False)])
    return Tokenizer(json.loads(backend.to_str()), {"eos_token": "<|end|>"})


def sentencepiece() -> Tokenizer:
    words = ["▁", "▁the", "the", "▁▁", "a", "日", "▁a", "<0xZZ>"]
    vocab = {"<unk>": 0, "<s>": 1, "<|end|>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {word: len(vocab) + i for i, word in enumerate(words)}
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "<|end|>"])
    return Tokenizer(json.loads(backend.to_str()), {"bos_token": "<s>", "eos_token": "<|end|>"})


@pytest.fixture(scope="module", params=[byte_level, sentencepiece], ids=["byte_level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    made: Tokenizer = request.param()
    return made


def stream(tokenizer: Tokenizer, ids: list[int], cuts: random.Random, previous_id: int | None = None) -> str:
    detokenizer = tokenizer.detokenizer(previous_id)
    text, at = "", 0
    while at < len(ids):
        step = cuts.randrange(0, 4)
        text += detokenizer.push(ids[at : at + step])
        at += step
    return text + detokenizer.flush()


def test_random_ids_stream_as_they_decode(tokenizer: Tokenizer) -> None:
    source = random.Random(11)
    for _ in range(1500):
        # Some ids beyond the vocabulary: the logits may be wider than it is.
        ids = [source.randrange(tokenizer.vocab_size + 3) for _ in range(source.randrange(24))]
        assert stream(tokenizer, ids, source) == tokenizer.decode(ids)


def test_texts_stream_as_they_were(tokenizer: Tokenizer) -> None:
    source = random.Random(12)
    for text in ("👩‍👩‍👧‍👦🎉 done", "  the  the", " a", "日本語", "x\n\n\ty", "ß" * 9, ""):
        assert stream(tokenizer, tokenizer.encode(text), source) == text


def test_no_half_characters_are_shown() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("🇫🇷")
    assert len(ids) > 2
    detokenizer = tokenizer.detokenizer()
    shown = [detokenizer.push([i]) for i in ids]
    assert "".join(shown) == "🇫🇷"
    assert set(shown) == {"", "🇫", "🇷"} or set(shown) <= {"", "🇫", "🇷", "🇫🇷"}
    assert detokenizer.flush() == ""


def test_incomplete_bytes_come_out_at_the_end() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("🎆")
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.push(ids[:-1]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_the_first_space_stays_in_the_middle_of_a_text() -> None:
    tokenizer = sentencepiece()
    ids = tokenizer.encode("the")
    source = random.Random(1)
    assert stream(tokenizer, ids, source) == "the"
    assert stream(tokenizer, ids, source, previous_id=tokenizer.encode("a")[-1]) == " the"
    assert stream(tokenizer, ids, source, previous_id=2) == "the"


def test_text_and_bytes_of_one_token() -> None:
    tokenizer = byte_level()
    first, *_ = tokenizer.encode("ぬ")
    assert tokenizer.token_bytes(first) == "ぬ".encode()[: len(tokenizer.token_bytes(first))]
    assert tokenizer.token_text(tokenizer.encode("<|end|>")[0]) == "<|end|>"
    other = sentencepiece()
    assert other.token_text(other.encode("the")[0]) == " "
    assert other.token_bytes(3 + 0xE2) == b"\xe2"
    assert other.token_bytes(9999) == b""


@pytest.mark.parametrize(
    ("decoder", "named"),
    [
        (None, "None"),
        ({"type": "WordPiece"}, "WordPiece"),
        ({"type": "Sequence", "decoders": [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]}, "Strip"),
    ],
)
def test_an_unknown_decoder_is_named(decoder: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Decoding(decoder, lambda token_id: "")


def stop_at(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    stop_strings = StopStrings(stops)
    text, stopped = "", False
    for piece in pieces:
        emitted, stopped = stop_strings.push(piece)
        text += emitted
    return text + stop_strings.flush(), stopped


def test_a_stop_string_across_pieces_is_found() -> None:
    stop_strings = StopStrings(["\n\nUser:"])
    assert stop_strings.push("Hi\n") == ("Hi", False)
    assert stop_strings.push("\nUs") == ("", False)
    assert stop_strings.push("er: next") == ("", True)
    assert stop_strings.push("more") == ("", True)
    assert stop_strings.flush() == ""


def test_text_that_only_looked_like_a_stop_string_comes_out() -> None:
    stop_strings = StopStrings(["STOP"])
    assert stop_strings.push("a ST") == ("a ", False)
    assert stop_strings.push("AY STO") == ("STAY ", False)
    assert stop_strings.flush() == "STO"
    assert stop_strings.flush() == ""


@pytest.mark.parametrize(
    ("stops", "text", "kept"),
    [
        (["abcd", "bc"], "xabcd", "xa"),
        (["bc", "abc"], "xabc", "x"),
        (["aab"], "aaab!", "a"),
        (["abab", "b"], "aab", "aa"),
        (["🎉"], "ok🎉", "ok"),
        (["zz"], "none here z", "none here z"),
        ([], "anything", "anything"),
    ],
)
def test_stops_do_not_depend_on_the_cuts(stops: list[str], text: str, kept: str) -> None:
    source = random.Random(4)
    for _ in range(40):
        cuts = sorted(source.sample(range(len(text) + 1), source.randrange(0, min(4, len(text)))))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert stop_at(stops, pieces) == (kept, kept != text)
    assert stop_at(stops, list(text)) == (kept, kept != text)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])
