"""OpenVINO GenAI's continuous batching, as a peer.

    python -m peers.openvino_genai --export FOLDER IR --bits 8      # from tests/bench, with the peer's python
    python -m peers.openvino_genai --model IR                       # what a benchmark starts

Owns: driving `ContinuousBatchingPipeline` step by step, and the export to its format (with optimum-intel, in a process
of its own). Needs the packages openvino-genai, and optimum-intel and nncf for the export.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from peers.peer import MissingPeer, prompt_ids, run_peer


class OpenVINOGenAI:
    """Nothing is shared between prompts (no prefix cache); a step holds as many tokens as there are."""

    def __init__(self, model: Path, threads: int):
        try:
            import openvino
            import openvino_genai
        except ImportError as error:
            raise MissingPeer(f"OpenVINO GenAI is not installed ({error})") from None
        if not (model / "openvino_model.xml").is_file():
            raise MissingPeer(f"no openvino_model.xml in {model}: make it with --export")
        self._genai, self._openvino = openvino_genai, openvino
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = 8192
        scheduler.max_num_seqs = 256
        scheduler.cache_size = 2
        properties = {"INFERENCE_NUM_THREADS": threads}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
        self._vocab_size = 32000
        self._next_id = 0
        self.description = f"OpenVINO GenAI {openvino_genai.get_version()}, {model.name}, KV cache u8 (its default)"

    def decode(self, streams: int, context: int, tokens: int) -> list[float]:
        self._add([prompt_ids(i, context, self._vocab_size) for i in range(streams)], tokens + 1)
        return self._run()[-tokens:]

    def prefill(self, tokens: int) -> float:
        self._add([prompt_ids(0, tokens, self._vocab_size)], 1)
        return sum(self._run())

    def log_likelihood(self, token_ids: list[int]) -> float:
        self._add([token_ids], 1, echo=True)
        handle = self._handles[0]
        self._run()
        # Of the prompt's ids and the new one; there is nothing before the first.
        return float(sum(handle.read_all()[0].generated_log_probs[1 : len(token_ids)]))

    def _add(self, prompts: list[list[int]], new_tokens: int, echo: bool = False) -> None:
        import numpy as np

        config = self._genai.GenerationConfig()
        config.echo, config.logprobs = echo, int(echo)
        config.max_new_tokens = config.min_new_tokens = new_tokens
        config.ignore_eos = True
        config.do_sample = False
        self._handles = []
        for prompt in prompts:
            ids = self._openvino.Tensor(np.array([prompt], dtype=np.int64))
            self._handles.append(self._pipeline.add_request(self._next_id, ids, config))
            self._next_id += 1

    def _run(self) -> list[float]:
        """Seconds of each step until nothing is left to do."""
        seconds = []
        while self._pipeline.has_non_finished_requests():
            begin = time.perf_counter()
            self._pipeline.step()
            seconds.append(time.perf_counter() - begin)
        self._handles = []
        return seconds


def export(folder: Path, ir: Path, bits: int) -> None:
    """Writes `folder` as an IR with weights of 8 bits a channel or of 4 bits in groups of 32."""
    weights = ["--weight-format", "int8"]
    if bits == 4:
        weights = ["--weight-format", "int4", "--group-size", "32", "--ratio", "1.0"]
    command = ["optimum-cli", "export", "openvino", "--model", str(folder), "--task", "text-generation-with-past"]
    command[0] = str(Path(sys.executable).with_name("optimum-cli"))
    subprocess.run([*command, *weights, str(ir)], check=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="a folder that --export made")
    parser.add_argument("--export", type=Path, nargs=2, metavar=("FOLDER", "IR"))
    parser.add_argument("--bits", type=int, choices=(4, 8), default=8)


def make(parsed: argparse.Namespace) -> OpenVINOGenAI:
    if parsed.export:
        export(*parsed.export, parsed.bits)
        sys.exit(0)
    if not parsed.model:
        raise MissingPeer("no --model for OpenVINO GenAI: a folder that --export made is needed")
    return OpenVINOGenAI(parsed.model, parsed.threads)


if __name__ == "__main__":
    run_peer(make, add_arguments)
