"""Sixteen replies to one long prompt, on a real server: in memory that holds the prompt once, with the words of single
requests.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from phi_cluster.cluster.prompt import seed_of

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

# Of a token, in bfloat16.
TOKEN_NBYTES = 30 * 2 * 3 * 64 * 2
NUM = 16
# Two prompts of some 1,300 tokens, and the ends of sixteen replies.
BUDGET = 2 * 1400 * TOKEN_NBYTES + NUM * 2**20
CONFIG = {
    "dtype": "int8",
    "engine": {"standby_engines": 0, "max_num_seqs": NUM},
    "kv": {"budget": BUDGET, "reserve_wait": "5s"},
}
PROMPT = "Once there was a fox who counted: " + " ".join(map(str, range(1, 400))) + ". What did it say then?"
ASKED: dict[str, Any] = {
    "messages": [{"role": "user", "content": PROMPT}],
    "max_tokens": 24,
    "temperature": 1.0,
    "seed": 11,
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def server(launch):
    server = launch(CONFIG)
    yield server
    server.stop()


def asked(client, **fields):
    response = client.http.post("/v1/chat/completions", json=ASKED | fields)
    assert response.status_code == 200, response.text
    return response.json()


def nbytes(client):
    """What there is in segments now."""
    return sum(os.stat(path).st_blocks * 512 for path in client.segments().values())


def test_memory_holds_the_prompt_once(client, server, until):
    one = asked(client)
    prompt_nbytes = one["usage"]["prompt_tokens"] * TOKEN_NBYTES
    assert prompt_nbytes > 30e6
    peak = 0
    texts = [""] * NUM
    body = ASKED | {"n": NUM, "stream": True}
    with client.http.stream("POST", "/v1/chat/completions", json=body) as got:
        assert got.status_code == 200
        for line in got.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    texts[choice["index"]] += choice["delta"].get("content") or ""
                peak = max(peak, nbytes(client)) if all(texts) else peak
    # The conversation that was there before had the same prompt, and is gone on with.
    assert peak < 1.5 * prompt_nbytes + NUM * 2**20
    assert len(set(texts)) == NUM
    for choice in (0, 1, 9, 15):
        seed = seed_of(f"11 choice {choice}") if choice else 11
        assert asked(client, seed=seed)["choices"][0]["message"]["content"] == texts[choice]
