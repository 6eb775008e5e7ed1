"""What each instruction set's kernels take for the same step: CPU milliseconds of one core, and that their bits agree.

    python tests/bench/instruction_sets.py --dtype int8

Each has a copy of the weights, all have the same keys and values, and compute each step in turn. CPU time is measured,
not time by the clock: on a machine that others use too, figures by the clock say nothing, while these suffer only from
what others do to caches and memory. For figures by the clock: engine.py --isa.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import own_engine
import torch
from peers.peer import prompt_ids

from phi_cluster.model.kv_cache import KVCache
from phi_cluster.model.ops.library import OpsUnavailable, load
from phi_cluster.model.phi3 import SequenceChunk

_ORDER = ("amx", "avx512_vnni", "avx512", "avx2")


def compare(name: str, tokens: int, repeat: int, networks: dict[str, Any], chunks: list[SequenceChunk]) -> None:
    """Has all networks compute `chunks` in turn, prints median and least CPU milliseconds; logits must be the same."""
    taken: dict[str, list[float]] = {isa: [] for isa in networks}
    for _ in range(repeat):
        results = set()
        for isa, network in networks.items():
            begin = time.thread_time()
            logits = network.forward(chunks)
            taken[isa].append(1000 * (time.thread_time() - begin))
            results.add(logits.numpy().tobytes())
        assert len(results) == 1, "instruction sets do not agree"
    print(name)
    for isa, all_ms in taken.items():
        ms = statistics.median(all_ms)
        print(
            f"  {isa:<12} {ms:8.1f} ms (least {min(all_ms):.1f})  {1000 * tokens / ms:6.0f} tok/s of one core",
            flush=True,
        )


def run(parsed: argparse.Namespace) -> None:
    """All cases, with whichever instruction sets this CPU has."""
    networks, engine = {}, None
    for isa in parsed.isa:
        parsed.isa = isa
        try:
            load(isa)
        except OpsUnavailable as error:
            print(f"{isa}: left out: {error}")
            continue
        engine = own_engine.make(parsed)
        networks[isa] = engine.network
    if engine is None:
        return
    vocab_size = engine.served.config.vocab_size
    for streams in parsed.batch:
        engine.prepare(streams, parsed.context)
        chunks = [
            SequenceChunk(torch.tensor(prompt_ids(i, 1, vocab_size)), parsed.context, cache)
            for i, cache in enumerate(engine.caches[:streams])
        ]
        compare(f"decode, {streams} x context {parsed.context}", streams, parsed.repeat, networks, chunks)
    for size in parsed.prefill:
        cache = KVCache(engine.served.layout.kv, torch.bfloat16)
        ids = torch.tensor(prompt_ids(0, size, vocab_size))
        chunks = [SequenceChunk(ids, 0, cache)]
        compare(f"prefill {size} at once", size, parsed.repeat, networks, chunks)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own_engine.add_arguments(parser)
    parser.set_defaults(isa=_ORDER, kv_cache_dtype="bfloat16", threads=1)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 16, 32])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--prefill", type=int, nargs="*", default=[256])
    parser.add_argument("--repeat", type=int, default=5)
    run(parser.parse_args())
