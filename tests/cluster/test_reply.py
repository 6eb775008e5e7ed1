"""A reply as it grows: the same text in any grouping of tokens, and a client that reads on gets exactly the rest."""

import json
import random
import zlib
from array import array

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from phi_cluster.cluster.errors import ReplyGone
from phi_cluster.cluster.reply import Reply
from phi_cluster.cluster.turn_api import BEGINNING, TokenLogprob
from phi_cluster.model.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(json.loads(backend.to_str()), {}, None)


def play(tokenizer, token_ids, groups, stops=(), given=BEGINNING, before=0):
    """The pieces that come, with their positions; `before` tokens are there already."""
    reply = Reply("prompt", tokenizer.detokenizer(), stops, given=given)
    pieces = [(reply.push(token_ids[:before]), reply.position)] if before else []
    start = before
    for size in groups:
        if reply.is_cut or start >= len(token_ids):
            break
        pieces.append((reply.push(token_ids[start : start + size]), reply.position))
        start += size
    if not reply.is_cut:
        pieces.append((reply.end("length"), reply.position))
    return reply, [(text, position) for text, position in pieces if text]


@pytest.mark.parametrize("stops", [(), ("ö wo",), ("never",), ("ld!",)])
@pytest.mark.parametrize("seed", range(6))
def test_reading_on_gives_exactly_the_rest(tokenizer, stops, seed):
    rng = random.Random(seed)
    # Ends in the middle of a character, which is given out at the very end.
    token_ids = [*tokenizer.encode("Hellö wörld! nev"), tokenizer.encode("€")[0]]
    alone, pieces = play(tokenizer, token_ids, [1] * 40, stops)
    whole = "".join(text for text, _ in pieces)
    assert alone.text == whole
    groups = [rng.randrange(1, 5) for _ in range(40)]
    grouped, others = play(tokenizer, token_ids, groups, stops)
    assert (grouped.text, grouped.token_ids, grouped.finish_reason) == (whole, alone.token_ids, alone.finish_reason)
    for read in range(len(others) + 1):
        position = others[read - 1][1] if read else BEGINNING
        seen = "".join(text for text, _ in others[:read])
        for before in (0, rng.randrange(len(token_ids)), len(token_ids)):
            again, rest = play(tokenizer, token_ids, [rng.randrange(1, 5) for _ in range(40)], stops, position, before)
            assert seen + "".join(text for text, _ in rest) == whole
            assert again.text == whole
            assert again.token_ids == alone.token_ids


def test_positions_only_grow_and_name_all_text(tokenizer):
    _, pieces = play(tokenizer, tokenizer.encode("a€b"), [1] * 9)
    assert [(text, position.count) for text, position in pieces] == [("a", 1), ("€", 4), ("b", 5)]
    assert len({position.checksum for _, position in pieces}) == 3


@pytest.mark.parametrize("stops", [(), ("ö wo",), ("ld!",)])
@pytest.mark.parametrize("seed", range(6))
def test_pieces_are_the_same_however_tokens_come(tokenizer, stops, seed):
    rng = random.Random(seed)
    token_ids = [*tokenizer.encode("Hellö wörld! nev"), tokenizer.encode("€")[0]]

    def pieces_of(sizes):
        reply = Reply("prompt", tokenizer.detokenizer(), stops)
        told, start = [], 0
        for size in sizes:
            text = reply.push(token_ids[start : start + size])
            pieces = reply.take_pieces()
            assert "".join(pieces) == text
            told += pieces
            start += size
        if not reply.is_cut:
            text = reply.end("length")
            pieces = reply.take_pieces()
            assert "".join(pieces) == text
            told += pieces
        return told

    one_by_one = pieces_of([1] * len(token_ids))
    assert all(one_by_one)
    assert len(one_by_one) > 4
    assert pieces_of([len(token_ids)]) == one_by_one
    assert pieces_of([rng.randrange(1, 5) for _ in token_ids]) == one_by_one


@pytest.mark.parametrize("stops", [(), ("ö wo",), ("ld!",)])
@pytest.mark.parametrize("seed", range(3))
def test_log_probabilities_go_with_the_text_that_their_tokens_complete(tokenizer, stops, seed):
    rng = random.Random(seed)
    token_ids = [*tokenizer.encode("Hellö wörld! nev"), tokenizer.encode("€")[0]]
    numbers = [TokenLogprob(bytes([i]), -float(i), ()) for i in range(len(token_ids))]
    # One has no text, as special tokens.
    numbers[3] = None

    def pieces_of(sizes):
        logprobs = []
        reply = Reply("prompt", tokenizer.detokenizer(), stops, logprobs=logprobs)
        told, start = [], 0
        for size in sizes:
            logprobs += numbers[start : start + size]
            text = reply.push(token_ids[start : start + size])
            pieces = reply.take_pieces()
            assert "".join(piece.text for piece in pieces) == text
            told += pieces
            start += size
        if not reply.is_cut:
            reply.end("length")
            told += reply.take_pieces()
        assert "".join(piece.text for piece in told) == reply.text
        return told, len(reply.token_ids)

    one_by_one, count = pieces_of([1] * len(token_ids))
    told = [one for piece in one_by_one for one in piece.logprobs]
    expected = [one for one in numbers[:count] if one]
    # What a stop string consists of is not told.
    assert told == (expected[: len(told)] if stops else expected)
    assert len(told) > 4
    # Its first byte has no text of its own.
    assert [len(piece.logprobs) for piece in one_by_one if piece.text == "ö"][:1] in ([2], [])
    assert pieces_of([len(token_ids)]) == (one_by_one, count)
    assert pieces_of([rng.randrange(1, 5) for _ in token_ids]) == (one_by_one, count)


def test_another_reply_is_noticed_where_the_client_is(tokenizer):
    token_ids, other = tokenizer.encode("abcdef"), tokenizer.encode("abXdef")
    _, pieces = play(tokenizer, token_ids, [1] * 9)
    for _, position in pieces:
        if position.count < 3:
            play(tokenizer, other, [1] * 9, given=position)
        else:
            with pytest.raises(ReplyGone):
                play(tokenizer, other, [1] * 9, given=position)
        if position.count > 2:
            # It is over too soon.
            with pytest.raises(ReplyGone):
                play(tokenizer, token_ids[:2], [1] * 9, given=position)
    # Where it is known to be the client's, it is not asked.
    reply = Reply("prompt", tokenizer.detokenizer(), given=pieces[3][1], is_known=True)
    assert reply.push(other) == "ef"


def test_the_prompt_counts_as_well_however_much_of_it_was_kept(tokenizer):
    prompt = tokenizer.encode("hello")
    found = set()
    for kept in range(6):
        reply = Reply("hello", tokenizer.detokenizer())
        reply.answer(zlib.crc32(array("i", prompt[:kept]).tobytes()), prompt[kept:])
        reply.push(tokenizer.encode("x"))
        found.add(reply.position)
    assert len(found) == 1
    reply = Reply("hullo", tokenizer.detokenizer())
    reply.answer(0, tokenizer.encode("hullo"))
    reply.push(tokenizer.encode("x"))
    assert reply.position not in found
