"""A conversation's cache from the disk against computing it again, at several lengths.

    python tests/bench/hibernation.py --tokens 1024 4096 16384
    python tests/bench/hibernation.py --folder /where/the/disk/is --encrypt

The network has the default model's shape, a context of 32,768 tokens and random weights: what it says makes no sense,
but takes as long. Everything is done by the server's own parts: the kernels fill a KV segment in steps of 256 tokens,
the store writes its used part (checksummed or encrypted, synced), the file's pages are dropped from memory, and the
store reads it into a new segment, whose bytes are compared. The last line is JSON.

Owns: the network, the order, and the clock. Knows nothing of sessions or of a server.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from phi_cluster.cluster.session.hibernation_file import Mark
from phi_cluster.cluster.session.hibernation_store import FileHibernationStore
from phi_cluster.cluster.session.segment import Segment
from phi_cluster.cluster.session.segment_layout import SegmentLayout
from phi_cluster.model.kv_cache import KVCache
from phi_cluster.model.phi3 import SequenceChunk

MAX_MODEL_LEN = 32_768
STEP_TOKENS = 256
# The default model's.
SHAPE: dict[str, Any] = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": MAX_MODEL_LEN,
    "original_max_position_embeddings": MAX_MODEL_LEN,
    "rope_theta": 100_000.0,
}
DIGEST = "b" * 32
MARK = Mark(1, 1)


class Network:
    """Computes keys and values into segments."""

    def __init__(self, threads: int, shape: dict[str, Any], max_model_len: int = MAX_MODEL_LEN):
        random_network = runpy.run_path(str(Path(__file__).parents[1] / "model" / "random_network.py"))
        config = random_network["config"](**shape)
        self.layout = SegmentLayout(random_network["layout"](config, "bfloat16", max_model_len))
        weights = random_network["weights"](config, "int8")
        self._network = random_network["network"](config, weights, "bfloat16", max_model_len, num_threads=threads)
        self._vocab_size = config.vocab_size

    def segment(self) -> Segment:
        return Segment.create(self.layout, "bench")

    @torch.inference_mode()
    def fill(self, segment: Segment, num_tokens: int) -> float:
        """Seconds that computing so many tokens takes."""
        cache = KVCache(self.layout.kv, torch.bfloat16, segment.kv_buffer)
        ids = torch.arange(num_tokens) * 7919 % self._vocab_size
        began = time.perf_counter()
        for start in range(0, num_tokens, STEP_TOKENS):
            self._network.forward([SequenceChunk(ids[start : start + STEP_TOKENS], start, cache)])
        seconds = time.perf_counter() - began
        segment.append_tokens(ids.tolist())
        segment.set_num_computed_tokens(num_tokens)
        return seconds


def measure(network: Network, store: FileHibernationStore, folder: Path, num_tokens: int) -> dict[str, Any]:
    """Times of one length, after checking that what comes back is what went."""
    segment, woken, warm = network.segment(), network.segment(), network.segment()
    try:
        computing = network.fill(segment, num_tokens)
        began = time.perf_counter()
        nbytes = store.write(DIGEST, segment, num_tokens, MARK).nbytes
        writing = time.perf_counter() - began
        [path] = folder.rglob("*.kv")
        # A second name: reading takes the first one away.
        os.link(path, folder / "again")
        drop_pages(path)
        began = time.perf_counter()
        store.take(DIGEST, woken, MARK)
        reading = time.perf_counter() - began
        for offset, length in network.layout.used_ranges(num_tokens, num_tokens):
            assert os.pread(woken._fd, length, offset) == os.pread(segment._fd, length, offset), "other bytes came back"
        assert woken.num_computed_tokens == num_tokens
        os.rename(folder / "again", path)
        path.read_bytes()
        began = time.perf_counter()
        store.take(DIGEST, warm, MARK)
        reading_warm = time.perf_counter() - began
    finally:
        for one in (segment, woken, warm):
            one.close()
    return {
        "tokens": num_tokens,
        "megabytes": round(nbytes / 1e6, 1),
        "compute_seconds": round(computing, 3),
        "write_seconds": round(writing, 3),
        "read_seconds": round(reading, 3),
        "read_seconds_in_page_cache": round(reading_warm, 3),
        "times_quicker": round(computing / reading, 1),
    }


def drop_pages(path: Path) -> None:
    """The next read comes from the disk (of which what lies below may have caches of its own)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 1024, 4096, 16_384])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the temporary folder's")
    parser.add_argument("--encrypt", action="store_true", help="AES-GCM instead of checksums")
    parsed = parser.parse_args()
    network = Network(parsed.threads, SHAPE)
    results = []
    with tempfile.TemporaryDirectory(dir=parsed.folder) as name:
        folder = Path(name)
        store = FileHibernationStore(folder, 2**40, os.urandom(32) if parsed.encrypt else None, reserve_nbytes=0)
        print(f"{'tokens':>7} {'MB':>8} {'compute':>9} {'write':>9} {'read':>9} {'in memory':>9} {'times':>7}")
        for num_tokens in parsed.tokens:
            one = measure(network, store, folder, num_tokens)
            results.append(one)
            columns = ("compute_seconds", "write_seconds", "read_seconds", "read_seconds_in_page_cache")
            seconds = " ".join(f"{one[column]:>8.3f}s" for column in columns)
            print(f"{one['tokens']:>7} {one['megabytes']:>8.1f} {seconds} {one['times_quicker']:>7.1f}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
