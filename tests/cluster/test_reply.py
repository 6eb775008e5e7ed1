"""A reply as it grows: the same text in any grouping of tokens, and a client that reads on gets exactly the rest."""

import json
import random

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from phi_cluster.cluster.reply import Reply
from phi_cluster.model.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(json.loads(backend.to_str()), {}, None)


def play(tokenizer, token_ids, groups, stops=(), given=0, before=0):
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
        position = others[read - 1][1] if read else 0
        seen = "".join(text for text, _ in others[:read])
        for before in (0, rng.randrange(len(token_ids)), len(token_ids)):
            again, rest = play(tokenizer, token_ids, [rng.randrange(1, 5) for _ in range(40)], stops, position, before)
            assert seen + "".join(text for text, _ in rest) == whole
            assert again.text == whole
            assert again.token_ids == alone.token_ids


def test_positions_only_grow_and_name_all_text(tokenizer):
    _, pieces = play(tokenizer, tokenizer.encode("a€b"), [1] * 9)
    assert pieces == [("a", 1), ("€", 4), ("b", 5)]
