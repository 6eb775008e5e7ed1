"""Whether time tells a tenant what another has said: guessing a prompt must be no quicker than asking something new.

    phi-cluster keys new victim --append keys.yaml; phi-cluster keys new guesser --append keys.yaml
    phi-cluster serve config.yaml &                       # with server.keys
    python tests/bench/tenant_timing.py --url http://127.0.0.1:8000 --keys VICTIM GUESSER --rounds 300 --check

In each round the victim says something that nobody has said. Then, in random order, the guesser sends the same prompt
and one that nobody has sent, and so does the victim itself, which is the control: its own cache it must be able to see.
Told is the AUC of the times to the first token, which is the chance that a guessed prompt was quicker than a new one:
0.5 is no knowledge, 1 is certainty. `--check` fails unless the guesser's is 0.5 within `--tolerance`, and the control's
above 0.9. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import httpx

_WORDS = [
    "amber",
    "birch",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "grove",
    "heath",
    "inlet",
    "jetty",
    "knoll",
    "lagoon",
    "meadow",
    "nook",
    "oasis",
    "prairie",
]
_CONTROL = 0.9


def secret(rng: random.Random, num_words: int) -> str:
    """A prompt that nobody has sent, new from its first word on."""
    return f"{rng.getrandbits(64):x} " + " ".join(rng.choice(_WORDS) for _ in range(num_words))


def first_token_seconds(client: httpx.Client, key: str, content: str) -> float:
    """From the request to its first piece of text, in a conversation that nobody named."""
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1, "temperature": 0, "stream": True}
    headers = {"authorization": f"Bearer {key}"}
    begin = time.perf_counter()
    seconds: float | None = None
    with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as stream:
        stream.raise_for_status()
        for line in stream.iter_lines():
            # The first chunk has no text; a token may have none either.
            if seconds is None and line.startswith("data: {") and '"content":""' not in line:
                seconds = time.perf_counter() - begin
    if seconds is None:
        raise RuntimeError("a reply of nothing")
    return seconds


def area_under_curve(guessed: Sequence[float], new: Sequence[float]) -> float:
    """The chance that a time of `guessed` is below one of `new`; ties count half (Mann and Whitney's U)."""
    below = sum((g < n) + 0.5 * (g == n) for g in guessed for n in new)
    return below / (len(guessed) * len(new))


def measure(url: str, keys: tuple[str, str], rounds: int, num_words: int, seed: int) -> dict[str, Any]:
    victim, guesser = keys
    rng = random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in ("guessed", "new", "own", "own_new")}
    with httpx.Client(base_url=url, timeout=60.0) as client:
        for key in keys:
            first_token_seconds(client, key, secret(rng, num_words))
        for _ in range(rounds):
            said = secret(rng, num_words)
            first_token_seconds(client, victim, said)
            asked = [
                ("guessed", guesser, said),
                ("new", guesser, secret(rng, num_words)),
                ("own", victim, said),
                ("own_new", victim, secret(rng, num_words)),
            ]
            rng.shuffle(asked)
            for name, key, content in asked:
                times[name].append(first_token_seconds(client, key, content))
    return {
        "rounds": rounds,
        "auc_another_key": round(area_under_curve(times["guessed"], times["new"]), 3),
        "auc_same_key": round(area_under_curve(times["own"], times["own_new"]), 3),
        "ttft_ms_median": {name: round(statistics.median(some) * 1000, 1) for name, some in times.items()},
    }


def complaints(result: dict[str, Any], tolerance: float) -> list[str]:
    """What is wrong with a result, in words; nothing if it shows that time tells nothing."""
    wrong = []
    if abs(result["auc_another_key"] - 0.5) > tolerance:
        wrong.append(f"time tells of another key's prompts: AUC {result['auc_another_key']}")
    if result["auc_same_key"] <= _CONTROL:
        wrong.append(f"the control sees no cache either (AUC {result['auc_same_key']}): this measurement says nothing")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--keys", nargs=2, required=True, metavar=("VICTIM", "GUESSER"))
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--words", type=int, default=20, help="length of each prompt")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--tolerance", type=float, default=0.05)
    parsed = parser.parse_args()
    result = measure(parsed.url, tuple(parsed.keys), parsed.rounds, parsed.words, parsed.seed)
    print(json.dumps(result))
    if parsed.check and (wrong := complaints(result, parsed.tolerance)):
        sys.exit("; ".join(wrong))


if __name__ == "__main__":
    main()
