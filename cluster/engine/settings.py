"""Limits of one engine and where it listens.

Owns: `EngineSettings`. Knows nothing of torch or Ray: replicas make it, engines read it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineSettings:
    """`device` is cpu or cuda; `socket_path` is a Unix socket's, at most 107 bytes."""

    max_num_seqs: int
    max_num_batched_tokens: int
    num_threads: int
    device: str
    socket_path: str
