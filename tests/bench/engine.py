"""Our network without HTTP: tokens a second, how far that is from what the machine can do, and peers beside it.

    python tests/bench/engine.py --dtype int8 int4 --batch 1 8 16
    python tests/bench/engine.py --peers --peer-python llama_cpp=/venvs/llama/bin/python \\
        --peer-model llama_cpp=/models/SmolLM2-Q8_0.gguf --peer-model "vllm_cpu=/models/SmolLM2 --dtype float32"

Every contestant (each dtype of ours, each peer's model) is a process of its own. For each case they are measured in
turn, `--repeat` times, and medians are reported. A sample during which other processes (or the hypervisor) took more
than `--others` cores is taken again, up to three times as many; an asterisk marks a figure that was never undisturbed.
The limit is what reading the weights and the KV caches once, or the multiplications, take at least on this machine (see
machine.py). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from machine import Machine, Meter
from peers.process import Answer, PeerProcess, wait_until_quiet

PEERS = ("llama_cpp", "openvino_genai", "vllm_cpu")
_TEXTS = Path(__file__).with_name("texts")
_LONGEST_TEXT = 4096
# Tokens of one sample of prompts: a short one alone would be over before anything about it can be believed.
_PREFILLED = 2048


@dataclass(frozen=True)
class Case:
    """`streams` sequences generate `tokens` tokens after `size` tokens of context; streams 0: a prompt of `size`."""

    streams: int
    size: int
    tokens: int

    def __str__(self) -> str:
        if self.streams:
            return f"decode, {self.streams} x context {self.size}"
        return f"prefill {self.size}"

    def rate(self, contestant: PeerProcess) -> Answer:
        """Tokens a second: of decoding by the median step, so that a hiccup does not count."""
        if not self.streams:
            answers = [contestant.ask("prefill", tokens=self.size) for _ in range(max(1, _PREFILLED // self.size))]
            seconds = statistics.median(answer.result for answer in answers)
            return Answer(self.size / seconds, statistics.mean(answer.others for answer in answers))
        answer = contestant.ask("decode", streams=self.streams, context=self.size, tokens=self.tokens)
        return Answer(self.streams / statistics.median(answer.result), answer.others)

    def limit(self, costs: dict[str, Any], machine: Machine) -> float:
        """Tokens a second that cannot be passed with these costs (see OwnEngine.costs)."""
        rows = self.streams or self.size
        logits = self.streams or 1
        context = self.streams * (self.size + self.tokens / 2) if self.streams else 0
        seconds = (costs["weight_bytes"] + context * costs["kv_bytes_per_token"]) / machine.read_bandwidth
        if costs["products"] in machine.peak_ops:
            layers = rows * costs["ops_per_token"] / machine.peak_ops[costs["products"]]
            head = logits * costs["ops_per_logits"] / machine.peak_ops[costs["products_of_head"]]
            seconds = max(seconds, layers + head)
        return rows / seconds


@dataclass(frozen=True)
class Rate:
    """The median tokens a second of `num` samples; `quiet` if nothing disturbed them; `others` cores at the median."""

    rate: float
    lowest: float
    highest: float
    num: int
    quiet: bool
    others: float


def measure(
    contestants: dict[str, Callable[[], Answer]],
    repeat: int,
    max_others: float,
    wait: Callable[[], None],
    noted: Callable[[str], None],
) -> dict[str, Rate]:
    """Asks all in turn, in alternating order, until each has `repeat` undisturbed samples or 3 * `repeat` samples;
    calls `wait` before each. One that raises RuntimeError is left out, and `noted` told."""
    samples: dict[str, list[Answer]] = {name: [] for name in contestants}
    for n in range(3 * repeat):
        names = [
            name
            for name in samples
            if n < repeat or sum(sample.others <= max_others for sample in samples[name]) < repeat
        ]
        for name in names if n % 2 == 0 else reversed(names):
            wait()
            try:
                samples[name].append(contestants[name]())
            except RuntimeError as error:
                noted(str(error))
                del samples[name]
    rates = {}
    for name, taken in samples.items():
        best = sorted(taken, key=lambda sample: sample.others)
        kept = [sample for sample in best if sample.others <= max_others] or best[:repeat]
        values = [sample.result for sample in kept]
        others = statistics.median(sample.others for sample in kept)
        rates[name] = Rate(
            statistics.median(values), min(values), max(values), len(values), others <= max_others, others
        )
    return rates


def perplexity(contestant: PeerProcess, texts: list[list[int]]) -> float:
    """Over all texts, as quality.py measures it. Raises RuntimeError."""
    total = sum(contestant.ask("log_likelihood", token_ids=ids).result for ids in texts)
    return math.exp(-total / sum(len(ids) - 1 for ids in texts))


def read_texts(folder: Path) -> list[list[int]]:
    """The token ids of the texts of quality.py; what stands above a text's first empty line is about it."""
    from phi_cluster.model.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(folder)
    texts = (path.read_text(encoding="utf-8").split("\n\n", 1)[1] for path in sorted(_TEXTS.glob("*.txt")))
    return [tokenizer.encode_prompt(text) for text in texts]


def start(parsed: argparse.Namespace) -> dict[str, PeerProcess]:
    """All contestants that come up, ours first; a line for each that does not."""
    wanted: list[tuple[str, str, str, list[str]]] = []
    common = ["--threads", str(parsed.threads)]
    texts = [_LONGEST_TEXT] if parsed.perplexity else []
    longest = max([*parsed.context, *parsed.prefill, *texts]) + parsed.tokens
    for label in parsed.dtype:
        dtype, _, activations = label.partition(":")
        arguments = ["--model", parsed.model, "--dtype", dtype, "--kv-cache-dtype", parsed.kv_cache_dtype]
        arguments += ["--activation-dtype", activations or "int16"]
        arguments += ["--chunk", str(parsed.chunk), "--max-model-len", str(longest)]
        if parsed.cache_dir:
            arguments += ["--cache-dir", str(parsed.cache_dir.absolute())]
        wanted.append((label, sys.executable, "own_engine", arguments))
        for isa in parsed.isa:
            wanted.append((f"{label} {isa}", sys.executable, "own_engine", [*arguments, "--isa", isa]))
    pythons = dict(item.split("=", 1) for item in parsed.peer_python)
    models = [item.split("=", 1) for item in parsed.peer_model]
    if parsed.peers:
        models += [[name, ""] for name in PEERS if name not in (given for given, _ in models)]
    for name, model in models:
        words = shlex.split(model)
        arguments = ["--model", str(Path(words[0]).absolute()), *words[1:]] if words else []
        label = " ".join([name, *(Path(word).stem if "/" in word else word for word in words)])
        wanted.append((label, pythons.get(name, sys.executable), f"peers.{name}", arguments))
    contestants = {}
    for name, python, module, arguments in wanted:
        try:
            contestants[name] = PeerProcess(name, python, module, [*arguments, *common], parsed.log)
        except RuntimeError as error:
            print(f"{name}: left out: {error}", flush=True)
        else:
            print(f"{name}: {contestants[name].description}", flush=True)
    return contestants


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints everything; the same as JSON-able values."""
    wait = partial(wait_until_quiet, parsed.others, parsed.patience)
    wait()
    meter = Meter(parsed.threads)
    machine = meter.machine()
    print(machine.describe(), flush=True)
    contestants = start(parsed)
    own = [name for name in contestants if name.split()[0] in parsed.dtype]
    costs = {name: contestants[name].ask("costs").result for name in own}
    results: dict[str, Any] = {"machine": vars(machine), "cases": []}
    try:
        if parsed.perplexity:
            texts = read_texts(parsed.perplexity)
            results["perplexity"] = {}
            for name, contestant in contestants.items():
                try:
                    results["perplexity"][name] = round(perplexity(contestant, texts), 3)
                    print(f"perplexity {results['perplexity'][name]:>8.3f}  {name}", flush=True)
                except RuntimeError as error:
                    print(f"perplexity of {name}: {error}", flush=True)
        cases = [Case(streams, context, parsed.tokens) for context in parsed.context for streams in parsed.batch]
        cases += [Case(0, size, 1) for size in parsed.prefill]
        for case in cases:
            load = Path("/proc/loadavg").read_text().split()[0]
            asks = {name: partial(case.rate, contestant) for name, contestant in contestants.items()}
            before = meter.read_bandwidth()
            rates = measure(asks, parsed.repeat, parsed.others, wait, lambda text: print(text, flush=True))
            machine = replace(machine, read_bandwidth=(before + meter.read_bandwidth()) / 2)
            print(f"\n{case}   (load {load}, {machine.read_bandwidth / 1e9:.1f} GB/s)")
            for name, rate in rates.items():
                print(line(name, rate, rates, own, costs, case, machine), flush=True)
            results["cases"].append(
                {
                    "case": str(case),
                    "load": load,
                    "read_bandwidth": machine.read_bandwidth,
                    "rates": {n: vars(r) for n, r in rates.items()},
                }
            )
    finally:
        meter.close()
        for contestant in contestants.values():
            contestant.close()
    return results


def line(
    name: str,
    rate: Rate,
    rates: dict[str, Rate],
    own: list[str],
    costs: dict[str, dict[str, Any]],
    case: Case,
    machine: Machine,
) -> str:
    """A row of the table: the rate, its spread, and the limit (ours) or how many times as fast the first of ours is."""
    shown = f"  {name:<48} {rate.rate:>8.1f} tok/s{' ' if rate.quiet else '*'} [{rate.lowest:.1f}..{rate.highest:.1f}]"
    if case.streams:
        shown += f"  {1000 * case.streams / rate.rate:.1f} ms a step"
    if name in costs:
        limit = case.limit(costs[name], machine)
        shown += f"  {rate.rate / limit:.0%} of the limit {limit:.0f}"
    elif own and own[0] in rates:
        shown += f"  {own[0]} is {rates[own[0]].rate / rate.rate:.2f} x"
    if not rate.quiet:
        shown += f"  ({rate.others:.1f} cores used by others)"
    return shown


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument(
        "--dtype",
        nargs="*",
        default=["auto"],
        help="of ours, as int8, or as int8:int8 with that of activations; none: peers only",
    )
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--isa", nargs="*", default=[], help="beside the best instruction set, e.g. avx512_vnni avx2")
    parser.add_argument("--chunk", type=int, default=256, help="tokens of a prompt in one step of ours")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--context", type=int, nargs="*", default=[128, 2048])
    parser.add_argument("--prefill", type=int, nargs="*", default=[128, 512, 2048])
    parser.add_argument("--tokens", type=int, default=64, help="tokens a stream generates in a sample")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--others", type=float, default=0.15, help="cores that others may use in a sample that counts")
    parser.add_argument("--patience", type=float, default=5, help="seconds a sample waits for a quiet moment")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cache-dir", type=Path, help="as in the server's configuration")
    parser.add_argument("--peers", action="store_true", help=f"try {', '.join(PEERS)}, each in its python")
    parser.add_argument("--peer-python", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--peer-model", action="append", default=[], metavar="NAME=PATH [ARGUMENTS]")
    parser.add_argument("--perplexity", type=Path, metavar="FOLDER", help="also of each; a folder with tokenizer.json")
    parser.add_argument("--log", type=Path, default=Path("/tmp/phi-bench-peers.log"), help="what the processes print")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    print(json.dumps(run(parse())))
