"""Our network without a cluster, under the same protocol as the peers.

    python -m own_engine --model smollm2 --dtype int8      # from tests/bench; what a benchmark starts

Owns: packing or finding the weights as the server does, the caches, and the bare loop (one `forward` a step, argmax).
"""

from __future__ import annotations

import argparse
import json
import mmap
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers.peer import prompt_ids, run_peer

from phi_cluster.cluster.config import load_config
from phi_cluster.cluster.served_model import ServedModel, describe_model
from phi_cluster.cluster.weight_store import packed_paths
from phi_cluster.model.flat_weights import WeightIndex, pack_weights, view_weights
from phi_cluster.model.hub import resolve_model
from phi_cluster.model.huge_pages import gather_pages, mapped_for_huge_pages
from phi_cluster.model.kv_cache import KVCache
from phi_cluster.model.phi3 import Phi3ForCausalLM, SequenceChunk

_KV_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


class OwnEngine:
    """`chunk` is the number of prompt tokens in one step, as `engine.max_num_batched_tokens`."""

    def __init__(self, served: ServedModel, cache_dir: Path, threads: int, chunk: int, isa: str | None = None):
        torch.set_num_threads(threads)
        self.served = served
        self._config = served.config
        self._chunk = chunk
        buffer, self._index = _packed(served, cache_dir)
        self.network = _network(served, view_weights(buffer, self._index), threads, isa)
        self.caches: list[KVCache] = []
        # How many tokens each cache holds of the prompt of stream 0.
        self._filled: list[int] = []
        self.description = (
            f"phi-cluster, {served.dtype}, activations {served.activation_dtype}, KV cache {served.kv_cache_dtype}, "
            f"chunks of {chunk}"
        )

    @torch.inference_mode()
    def decode(self, streams: int, context: int, tokens: int) -> list[float]:
        self.prepare(streams, context)
        ids = torch.tensor([prompt_ids(i, 1, self._config.vocab_size)[0] for i in range(streams)])
        seconds = []
        for position in range(context, context + tokens):
            begin = time.perf_counter()
            chunks = [SequenceChunk(ids[i : i + 1], position, self.caches[i]) for i in range(streams)]
            # numpy's: torch's argmax takes milliseconds for a batch.
            ids = torch.from_numpy(self.network.forward(chunks).numpy().argmax(1))
            seconds.append(time.perf_counter() - begin)
        return seconds

    @torch.inference_mode()
    def prefill(self, tokens: int) -> float:
        self._grow(1)
        self._filled[0] = 0
        begin = time.perf_counter()
        self._compute(self.caches[0], tokens).argmax(-1).item()
        return time.perf_counter() - begin

    @torch.inference_mode()
    def log_likelihood(self, token_ids: list[int]) -> float:
        self._grow(1)
        self._filled[0] = 0
        ids = torch.tensor(token_ids)
        logits = self.network.forward_all(SequenceChunk(ids, 0, self.caches[0]))
        picked = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])
        return float(picked.double().sum())

    def costs(self) -> dict[str, Any]:
        """What a step reads and computes: bytes of weights (all but the embedding, of which a row a token is read),
        bytes of keys and values a token of context, multiplications and additions of the linear layers a token, and
        of the head a row of logits; and of what kind these are, as Machine calls them."""
        config = self._config
        head = config.vocab_size * config.hidden_size
        attention = config.num_attention_heads * config.head_dim
        key_values = 2 * config.num_key_value_heads * config.head_dim
        layer = (2 * attention + key_values) * config.hidden_size + 3 * config.hidden_size * config.intermediate_size
        tied = not any(entry.name.startswith("lm_head") for entry in self._index.entries)
        read = [entry.nbytes for entry in self._index.entries if tied or not entry.name.startswith("model.embed")]
        return {
            "weight_bytes": sum(read),
            "kv_bytes_per_token": self.served.layout.kv.bytes_per_token,
            "ops_per_token": 2 * layer * config.num_hidden_layers,
            "ops_per_logits": 2 * head,
            "products": {"int8": self.served.activation_dtype, "int4": "int8"}.get(self.served.dtype, "float32"),
            "products_of_head": self.served.activation_dtype if self.served.dtype in ("int8", "int4") else "float32",
        }

    def prepare(self, streams: int, context: int) -> None:
        """Caches that hold `context` tokens each: one is computed, the others get copies, which are read as slowly."""
        self._grow(streams)
        for i in range(streams):
            if self._filled[i] >= context:
                continue
            if i == 0:
                self._compute(self.caches[0], context)
            else:
                self.caches[i].rows[:, :context] = self.caches[0].rows[:, :context]
            self._filled[i] = context

    def _grow(self, streams: int) -> None:
        dtype = _KV_DTYPES[self.served.kv_cache_dtype]
        while len(self.caches) < streams:
            self.caches.append(KVCache(self.served.layout.kv, dtype))
            self._filled.append(0)

    def _compute(self, cache: KVCache, tokens: int) -> torch.Tensor:
        ids = torch.tensor(prompt_ids(0, tokens, self._config.vocab_size))
        for start in range(0, tokens, self._chunk):
            end = min(start + self._chunk, tokens)
            logits = self.network.forward([SequenceChunk(ids[start:end], start, cache, num_logits=int(end == tokens))])
        return logits


def _packed(served: ServedModel, cache_dir: Path) -> tuple[np.ndarray, WeightIndex]:
    """The weights from the file that the server would use, which is made if it is not there."""
    weights, index = packed_paths(served, cache_dir)
    if not index.exists():
        weights.parent.mkdir(parents=True, exist_ok=True)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        _, packed = pack_weights(served.folder, served.config, served.dtype, path=weights, num_threads=threads)
        torch.set_num_threads(threads)
        index.write_text(json.dumps(packed.to_dict()))
    found = WeightIndex.from_dict(json.loads(index.read_text()))
    # Not a mapped file, whose pages may be evicted: shared memory, as the object store's is, and as the server has it.
    memory = mmap.mmap(-1, found.nbytes)
    with weights.open("rb") as file:
        file.readinto(memory)
    buffer = mapped_for_huge_pages(np.frombuffer(memory, dtype=np.uint8))
    gather_pages(buffer)
    return buffer, found


def _network(served: ServedModel, weights: dict[str, torch.Tensor], threads: int, isa: str | None) -> Any:
    if served.dtype in ("float32", "bfloat16"):
        return Phi3ForCausalLM(served.config, weights, getattr(torch, served.dtype))
    from phi_cluster.model.ops.library import load
    from phi_cluster.model.quantized_phi3 import QuantizedPhi3ForCausalLM

    kv = served.layout.kv
    return QuantizedPhi3ForCausalLM(
        served.config, weights, kv, served.kv_cache_dtype, served.activation_dtype, load(isa), threads
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--activation-dtype", default="int16")
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--cache-dir", type=Path)
    parser.add_argument("--isa", help="as PHI_CLUSTER_ISA")


def make(parsed: argparse.Namespace) -> OwnEngine:
    config = load_config(
        None,
        {
            "model": parsed.model,
            "dtype": parsed.dtype,
            "kv_cache_dtype": parsed.kv_cache_dtype,
            "activation_dtype": parsed.activation_dtype,
            "max_model_len": parsed.max_model_len,
            "cache_dir": parsed.cache_dir,
        },
    )
    folder = resolve_model(config.model, config.cache_path)
    return OwnEngine(describe_model(config, folder), config.cache_path, parsed.threads, parsed.chunk, parsed.isa)


if __name__ == "__main__":
    run_peer(make, add_arguments)
