"""vLLM's CPU backend, as a peer.

    python -m peers.vllm_cpu --model FOLDER --dtype bfloat16      # from tests/bench, with the peer's python

Owns: driving `LLMEngine` step by step, in one process. Needs the package vllm-cpu (0.32 has kernels for AVX2 beside
those for AVX-512) and a folder with config.json, safetensors and tokenizer.json.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from peers.peer import MissingPeer, prompt_ids, run_peer


class VLLM:
    """Nothing is shared between prompts (no prefix cache); a step holds as many tokens as there are."""

    def __init__(self, model: Path, dtype: str, threads: int, eager: bool):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
        os.environ["HF_HUB_OFFLINE"] = "1"
        try:
            import vllm
            from vllm import EngineArgs, LLMEngine
        except ImportError as error:
            raise MissingPeer(f"vLLM is not installed ({error})") from None
        arguments = EngineArgs(
            model=str(model),
            dtype=dtype,
            max_model_len=4096,
            max_num_batched_tokens=4096,
            max_num_seqs=64,
            enable_prefix_caching=False,
            enforce_eager=eager,
            async_scheduling=False,
            disable_log_stats=True,
        )
        self._vllm = vllm
        self._engine: Any = LLMEngine.from_engine_args(arguments)
        self._vocab_size = 32000
        self._next_id = 0
        self.description = f"vLLM {vllm.__version__} CPU, {dtype}{', eager' if eager else ''}"

    def decode(self, streams: int, context: int, tokens: int) -> list[float]:
        self._add([prompt_ids(i, context, self._vocab_size) for i in range(streams)], tokens + 1)
        return self._run()[0][-tokens:]

    def prefill(self, tokens: int) -> float:
        self._add([prompt_ids(0, tokens, self._vocab_size)], 1)
        return sum(self._run()[0])

    def log_likelihood(self, token_ids: list[int]) -> float:
        self._add([token_ids], 1, prompt_logprobs=0)
        (output,) = self._run()[1]
        rows = output.prompt_logprobs[1:]
        return float(sum(row[token_id].logprob for row, token_id in zip(rows, token_ids[1:], strict=True)))

    def _add(self, prompts: list[list[int]], new_tokens: int, prompt_logprobs: int | None = None) -> None:
        params = self._vllm.SamplingParams(
            temperature=0,
            max_tokens=new_tokens,
            min_tokens=new_tokens,
            ignore_eos=True,
            prompt_logprobs=prompt_logprobs,
            detokenize=False,
        )
        for prompt in prompts:
            self._engine.add_request(str(self._next_id), {"prompt_token_ids": prompt}, params)
            self._next_id += 1

    def _run(self) -> tuple[list[float], list[Any]]:
        """Seconds of each step until nothing is left to do, and the finished requests."""
        seconds, finished = [], []
        while self._engine.has_unfinished_requests():
            begin = time.perf_counter()
            outputs = self._engine.step()
            seconds.append(time.perf_counter() - begin)
            finished += [output for output in outputs if output.finished]
        return seconds, finished


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float16"))
    parser.add_argument("--eager", action="store_true", help="without torch.compile")


def make(parsed: argparse.Namespace) -> VLLM:
    if not parsed.model:
        raise MissingPeer("no --model for vLLM: a folder with config.json is needed")
    return VLLM(parsed.model, parsed.dtype, parsed.threads, parsed.eager)


if __name__ == "__main__":
    run_peer(make, add_arguments)
