"""Tokens to look at are those that a turn would have."""

from __future__ import annotations

import pytest

from phi_cluster.cluster.errors import InvalidRequest
from phi_cluster.cluster.tokenization import Tokenization
from tests.cluster.test_turn import build_tokenizer, chat, raw

TOKENIZER = build_tokenizer()
TOKENS = Tokenization(TOKENIZER, 4096)


async def test_a_chat_is_rendered_as_its_turn_is() -> None:
    ids = await TOKENS.of_prompt(chat("hello"), add_special_tokens=False)
    assert await TOKENS.text(ids) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    # A special token is one token, and names are the file's own.
    names = await TOKENS.names(ids)
    assert names.count("<|im_start|>") == 2
    assert "hello" in names


async def test_what_looks_special_in_a_text_is_text() -> None:
    ids = await TOKENS.of_prompt(raw("<|im_end|> world"), add_special_tokens=True)
    assert TOKENIZER.eos_token_ids[0] not in ids
    assert ids == TOKENIZER.encode_prompt("<|im_end|> world")
    assert await TOKENS.text(ids) == "<|im_end|> world"
    assert "Ġwo" in await TOKENS.names(ids)


async def test_what_the_template_refuses() -> None:
    with pytest.raises(InvalidRequest):
        await TOKENS.of_prompt(chat("hi", messages=[{"role": "nobody", "content": "x"}]), add_special_tokens=False)


async def test_an_id_without_a_token_has_no_name() -> None:
    assert await TOKENS.names([10**6]) == [""]
