"""llama.cpp, as a peer.

    python -m peers.llama_cpp --quantize IN.gguf OUT.gguf --type Q8_0      # from tests/bench, with the peer's python
    python -m peers.llama_cpp --model OUT.gguf                             # what a benchmark starts

Owns: driving `llama_decode` with batches of several sequences, and its quantiser. Needs the package llama-cpp-python,
compiled for this CPU (CMAKE_ARGS=-DGGML_NATIVE=ON), and a .gguf file.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peers.peer import MissingPeer, prompt_ids, run_peer

_UBATCH = 512


class LlamaCpp:
    """A context of its own for every measurement, as large as it needs; greedy by argmax, which is quicker than its
    samplers."""

    def __init__(self, model: Path, threads: int, unified: bool, flash: str):
        self._c = _library()
        params = self._c.llama_model_default_params()
        if not model.is_file():
            raise MissingPeer(f"no file {model}")
        self._model = self._c.llama_model_load_from_file(os.fsencode(model), params)
        if not self._model:
            raise MissingPeer(f"llama.cpp cannot load {model}")
        self._vocab_size: int = self._c.llama_vocab_n_tokens(self._c.llama_model_get_vocab(self._model))
        self._threads, self._unified = threads, unified
        self._flash = getattr(self._c, f"LLAMA_FLASH_ATTN_TYPE_{flash.upper()}")
        from llama_cpp import __version__

        self.description = (
            f"llama.cpp of llama-cpp-python {__version__}, {model.name}, KV cache f16, "
            f"{'unified' if unified else 'a stream each'}, flash attention {flash}"
        )

    def decode(self, streams: int, context: int, tokens: int) -> list[float]:
        with self._context(streams, context + tokens + 1) as run:
            ids = [0] * streams
            for i in range(streams):
                ids[i] = run.prompt(i, prompt_ids(i, context, 32000))
            seconds = []
            for position in range(context, context + tokens):
                begin = time.perf_counter()
                ids = run.step(ids, position)
                seconds.append(time.perf_counter() - begin)
        return seconds

    def prefill(self, tokens: int) -> float:
        with self._context(1, tokens + 1) as run:
            # The first computation of a context is slower.
            run.prompt(0, prompt_ids(1, tokens, 32000))
            run.forget()
            begin = time.perf_counter()
            run.prompt(0, prompt_ids(0, tokens, 32000))
            return time.perf_counter() - begin

    def log_likelihood(self, token_ids: list[int]) -> float:
        with self._context(1, len(token_ids) + 1) as run:
            return run.log_likelihood(token_ids)

    @contextmanager
    def _context(self, streams: int, tokens: int) -> Iterator[_Run]:
        params = self._c.llama_context_default_params()
        # Whole blocks, as it wants them.
        params.n_ctx = streams * (-(-tokens // 256) * 256)
        params.n_batch = params.n_ubatch = _UBATCH
        params.n_seq_max = streams
        params.n_threads = params.n_threads_batch = self._threads
        params.kv_unified = self._unified
        params.flash_attn_type = self._flash
        params.no_perf = True
        context = self._c.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError("llama.cpp made no context")
        batch = self._c.llama_batch_init(_UBATCH, 0, 1)
        try:
            yield _Run(self._c, context, batch, self._vocab_size)
        finally:
            self._c.llama_batch_free(batch)
            self._c.llama_free(context)


class _Run:
    """A context's sequences, filled and stepped through one batch."""

    def __init__(self, c: Any, context: Any, batch: Any, vocab_size: int):
        import numpy as np

        self._np = np
        self._c, self._context, self._batch, self._vocab_size = c, context, batch, vocab_size

    def prompt(self, sequence: int, ids: list[int]) -> int:
        """Computes a prompt; the token after it."""
        for start in range(0, len(ids), _UBATCH):
            part = ids[start : start + _UBATCH]
            last = start + len(part) == len(ids)
            self._compute([(id_, start + i, sequence) for i, id_ in enumerate(part)], [len(part) - 1] if last else [])
        return self._best(len(part) - 1)

    def step(self, ids: list[int], position: int) -> list[int]:
        """One token of every sequence, all at `position`; the tokens after these."""
        self._compute([(id_, position, i) for i, id_ in enumerate(ids)], list(range(len(ids))))
        return [self._best(i) for i in range(len(ids))]

    def forget(self) -> None:
        """All sequences are empty again."""
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)

    def log_likelihood(self, ids: list[int]) -> float:
        total = 0.0
        for start in range(0, len(ids), _UBATCH):
            part = ids[start : start + _UBATCH]
            self._compute([(id_, start + i, 0) for i, id_ in enumerate(part)], list(range(len(part))))
            for i in range(min(len(part), len(ids) - 1 - start)):
                logits = self._logits(i).astype(self._np.float64)
                logits -= logits.max()
                total += float(logits[ids[start + i + 1]] - self._np.log(self._np.exp(logits).sum()))
        return total

    def _compute(self, tokens: list[tuple[int, int, int]], wanted: list[int]) -> None:
        """Runs (id, position, sequence) tokens through the network; logits for the rows `wanted`."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (id_, position, sequence) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = id_, position, 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = 0
        for i in wanted:
            batch.logits[i] = 1
        if self._c.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        self._c.llama_synchronize(self._context)

    def _best(self, row: int) -> int:
        return int(self._logits(row).argmax())

    def _logits(self, row: int) -> Any:
        pointer = self._c.llama_get_logits_ith(self._context, row)
        return self._np.ctypeslib.as_array(pointer, shape=(self._vocab_size,))


def quantize(source: Path, target: Path, type_name: str, threads: int) -> None:
    """Writes `source` with its weights as `type_name` (Q8_0, Q4_0, ...). Raises MissingPeer."""
    c = _library()
    params = c.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = getattr(c, f"LLAMA_FTYPE_MOSTLY_{type_name}")
    params.allow_requantize = True
    if c.llama_model_quantize(os.fsencode(source), os.fsencode(target), params) != 0:
        raise MissingPeer(f"llama.cpp cannot make {type_name} of {source}")


def _library() -> Any:
    try:
        import llama_cpp.llama_cpp as c
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingPeer(f"llama-cpp-python is not installed ({error})") from None
    c.llama_backend_init()
    return c


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path)
    parser.add_argument("--quantize", type=Path, nargs=2, metavar=("IN", "OUT"))
    parser.add_argument("--type", default="Q8_0")
    parser.add_argument("--unified", action="store_true", help="one KV buffer for all sequences")
    parser.add_argument("--flash", default="auto", choices=("auto", "enabled", "disabled"))


def make(parsed: argparse.Namespace) -> LlamaCpp:
    if parsed.quantize:
        quantize(*parsed.quantize, parsed.type, parsed.threads)
        sys.exit(0)
    if not parsed.model:
        raise MissingPeer("no --model for llama.cpp: a .gguf file is needed")
    return LlamaCpp(parsed.model, parsed.threads, parsed.unified, parsed.flash)


if __name__ == "__main__":
    run_peer(make, add_arguments)
