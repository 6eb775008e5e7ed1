"""What an engine does to be compared with ours, and the loop in which a process of its own does it.

Owns: the protocol between a benchmark and a peer's process (one JSON object a line), and the token ids of prompts.
Knows nothing of any peer, and imports nothing that is not in the standard library: it runs in the peers' environments.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, Protocol


class Peer(Protocol):
    """The bare loop of an engine: no HTTP, no text. Greedy. Every method computes everything anew."""

    # One line: version, precision of weights, activations and KV cache.
    description: str

    def decode(self, streams: int, context: int, tokens: int) -> list[float]:
        """Seconds of each of `tokens` decode steps of `streams` sequences whose prompts have `context` tokens."""

    def prefill(self, tokens: int) -> float:
        """Seconds from one prompt of so many tokens to its first token."""

    def log_likelihood(self, token_ids: list[int]) -> float:
        """The sum of log p of `token_ids[1:]`, each after all ids before it, natural logarithm.

        Raises NotImplementedError where the engine does not tell.
        """


class MissingPeer(Exception):
    """The engine is not there or does not run here; the message is one line."""


def prompt_ids(stream: int, tokens: int, vocab_size: int) -> list[int]:
    """`tokens` ids that differ between streams from the first one on, so that nothing can be shared; below
    `vocab_size` and above the special ones."""
    state = 12345 + 7919 * stream
    ids = []
    for _ in range(tokens):
        state = (1103515245 * state + 12345) % 2**31
        ids.append(100 + (state >> 8) % (vocab_size - 200))
    return ids


def run_peer(
    make: Callable[[argparse.Namespace], Peer], add_arguments: Callable[[argparse.ArgumentParser], None]
) -> None:
    """The main function of a peer's process: answers requests on stdin until its end.

    The first line on stdout is `{"ready": description}` or `{"missing": reason}`; a request is
    `{"do": method, ...arguments}`, its answer `{"result": ...}` or `{"error": ...}`.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add_arguments(parser)
    parsed = parser.parse_args()
    # Engines print on stdout what they like: it goes to stderr, and the answers to what was stdout.
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        try:
            peer = make(parsed)
        except MissingPeer as missing:
            _say(answers, {"missing": str(missing)})
            return
        except Exception as error:
            traceback.print_exc()
            _say(answers, {"missing": _one_line(error)})
            return
        _say(answers, {"ready": peer.description})
        for line in sys.stdin:
            request = json.loads(line)
            try:
                result = getattr(peer, request.pop("do"))(**request)
            except Exception as error:
                traceback.print_exc()
                _say(answers, {"error": _one_line(error)})
            else:
                _say(answers, {"result": result})
        answers.flush()
        # Not a clean exit: some engines hang in their destructors.
        os._exit(0)


def _say(answers: Any, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
