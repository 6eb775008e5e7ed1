"""What each dtype costs in quality: perplexity, and the distance of its predictions from float32's, on fixed texts.

    python tests/bench/quality.py [--model smollm2] [--dtypes bfloat16 int8 int4] [--activations int16 int8]
        [--kv auto int8] [--check]

Every network reads the same texts (those in `texts/`), beside the float32 network, in chunks as a server's prefill. The
table is for the README; the last line is JSON. With --check the exit status is 1 if a bound of LIMITS does not hold.
Knows nothing of speed: the benchmarks beside it do.

* perplexity: exp of the mean negative log likelihood of each token given all before it, over all texts.
* to float32: how much larger that is than float32's, with one standard error of the paired difference.
* KL: the mean over all tokens of KL(float32 || x), in nats: what the choice of dtype adds to the cross entropy of
  whoever draws from float32's predictions.
* top-1: for how many tokens the most probable next one is the same.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from phi_cluster.cluster.config import Config
from phi_cluster.model.config import Phi3Config
from phi_cluster.model.flat_weights import pack_weights, view_weights
from phi_cluster.model.hub import resolve_model
from phi_cluster.model.kv_cache import KVCache
from phi_cluster.model.kv_layout import KVCacheLayout
from phi_cluster.model.ops.library import load
from phi_cluster.model.phi3 import Phi3ForCausalLM, SequenceChunk
from phi_cluster.model.quantized_phi3 import QuantizedPhi3ForCausalLM
from phi_cluster.model.tokenizer import Tokenizer

TEXTS = Path(__file__).with_name("texts")
# Promised for the default model, with either activations. Perplexity as a ratio to another dtype's, both with a KV
# cache of bfloat16.
LIMITS = {"int8 to float32": 1.01, "int8 KL": 0.01, "int4 to int8": 1.01}
# (dtype, bytes of a number, bytes of a scale) of the KV cache.
_KV = {"float32": (torch.float32, 4, 0), "bfloat16": (torch.bfloat16, 2, 0), "int8": (torch.int8, 1, 4)}


@dataclass(frozen=True)
class Variant:
    """A network's dtype, its KV cache's, where "auto" is what the server takes by itself, and that of what meets int8
    weights, if there are any."""

    dtype: str
    kv: str = "auto"
    activations: str = "int16"

    @property
    def kv_dtype(self) -> str:
        if self.kv != "auto":
            return self.kv
        return "float32" if self.dtype == "float32" else "bfloat16"

    @property
    def possible(self) -> bool:
        return self.dtype in ("int8", "int4") or (self.kv, self.activations) == ("auto", "int16")


@dataclass(frozen=True)
class Quality:
    """How one variant did. `ratio` (with `ratio_error`, a standard error) is its perplexity's to float32's, `kl` and
    `kl_max` are nats a token, `top1` is a share; `by_text` has perplexity and ratio for each text."""

    dtype: str
    kv: str
    activations: str
    perplexity: float
    ratio: float
    ratio_error: float
    kl: float
    kl_max: float
    top1: float
    by_text: dict[str, tuple[float, float]]


class Network:
    """A variant of a checkpoint with one KV cache, for texts of up to `max_tokens` tokens, one after the other."""

    def __init__(
        self, config: Phi3Config, weights: Mapping[str, Tensor], variant: Variant, max_tokens: int, threads: int
    ):
        """`weights` as packed for the variant's dtype. Raises OpsUnavailable for int8 and int4 without the compiled
        kernels."""
        kv_dtype, itemsize, scale_nbytes = _KV[variant.kv_dtype]
        layout = KVCacheLayout.for_config(config, max_tokens, itemsize, scale_nbytes)
        self._cache = KVCache(layout, kv_dtype)
        self._network: Phi3ForCausalLM | QuantizedPhi3ForCausalLM
        if variant.dtype in ("int8", "int4"):
            self._network = QuantizedPhi3ForCausalLM(
                config, weights, layout, variant.kv_dtype, variant.activations, load(), threads
            )
        else:
            self._network = Phi3ForCausalLM(config, weights, getattr(torch, variant.dtype))

    def log_probs(self, ids: Tensor, start: int, end: int) -> Tensor:
        """float32 [end - start, vocab] for the tokens that follow those of `ids` from `start` to `end`; those before
        `start` were computed already."""
        long_rope = self._network.rope.regime_for(len(ids)) == "long"
        logits = self._network.forward_all(SequenceChunk(ids[start:end], start, self._cache, long_rope))
        return torch.log_softmax(logits, -1)


@dataclass
class _Sums:
    """What is collected of one variant: per token, in order; `extra` is its negative log likelihood less float32's."""

    extra: dict[str, list[Tensor]] = field(default_factory=dict)
    kl: list[Tensor] = field(default_factory=list)
    same_top: list[Tensor] = field(default_factory=list)


def read_texts(tokenizer: Tokenizer, max_tokens: int | None = None) -> dict[str, Tensor]:
    """Name -> the first `max_tokens` token ids, int64, of each text. A file's first line says where it is from."""
    return {
        path.stem: torch.tensor(tokenizer.encode_prompt(path.read_text(encoding="utf-8").split("\n\n", 1)[1]))[
            :max_tokens
        ]
        for path in sorted(TEXTS.glob("*.txt"))
    }


def measure(
    folder: Path, variants: Sequence[Variant], texts: Mapping[str, Tensor], threads: int, chunk: int = 256
) -> list[Quality]:
    """One answer for float32, then one for each variant, in order. Texts are read in steps of `chunk` tokens. Holds all
    networks at once, and a step's logits. Raises OpsUnavailable as `Network` does."""
    config = Phi3Config.from_folder(folder)
    max_tokens = max(len(ids) for ids in texts.values())
    everyone = [Variant("float32"), *variants]
    packed = {dtype: _pack(folder, config, dtype, threads) for dtype in {variant.dtype for variant in everyone}}
    networks = [Network(config, packed[variant.dtype], variant, max_tokens, threads) for variant in everyone]
    all_sums = [_Sums({name: [] for name in texts}) for _ in everyone]
    nll: dict[str, list[Tensor]] = {name: [] for name in texts}
    for name, ids in texts.items():
        for start in range(0, len(ids) - 1, chunk):
            end = min(start + chunk, len(ids) - 1)
            truth = networks[0].log_probs(ids, start, end)
            following = ids[start + 1 : end + 1, None]
            nll[name].append(-truth.gather(1, following)[:, 0].double())
            for network, sums in zip(networks, all_sums, strict=True):
                guess = truth if network is networks[0] else network.log_probs(ids, start, end)
                sums.extra[name].append((truth - guess).gather(1, following)[:, 0].double())
                sums.kl.append(F.kl_div(guess, truth, reduction="none", log_target=True).sum(-1))
                sums.same_top.append(truth.argmax(-1) == guess.argmax(-1))
    nlls = {name: torch.cat(parts) for name, parts in nll.items()}
    return [_quality(variant, nlls, sums) for variant, sums in zip(everyone, all_sums, strict=True)]


def failures(results: Sequence[Quality]) -> list[str]:
    """Which of LIMITS do not hold; those of variants that were not measured are left out."""
    found = {(result.dtype, result.activations): result for result in results if result.kv == "bfloat16"}
    problems = []
    for activations in ("int16", "int8"):
        int8, int4 = (found.get((dtype, activations)) for dtype in ("int8", "int4"))
        figures: dict[str, float] = {}
        if int8:
            figures |= {"int8 to float32": int8.ratio, "int8 KL": int8.kl}
        if int8 and int4:
            figures["int4 to int8"] = int4.perplexity / int8.perplexity
        problems += [
            f"{name} is {figure:.4f} with {activations} activations, at most {LIMITS[name]} is promised"
            for name, figure in figures.items()
            if not figure <= LIMITS[name]
        ]
    return problems


def table(results: Sequence[Quality]) -> str:
    """Markdown."""
    lines = [
        "| dtype | activations | KV cache | perplexity | to float32 | KL to float32 | same top-1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        start = f"| {result.dtype} | {result.activations} | {result.kv} | {result.perplexity:.2f} |"
        if result.dtype == "float32":
            lines.append(f"{start} | | |")
        else:
            percent, error = (result.ratio - 1) * 100, result.ratio_error * 100
            lines.append(f"{start} {percent:+.2f} ± {error:.2f} % | {result.kl:.5f} | {result.top1:.1%} |")
    return "\n".join(lines)


def _pack(folder: Path, config: Phi3Config, dtype: str, threads: int) -> dict[str, Tensor]:
    # It has threads of its own, and works on pieces too small for torch's.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return view_weights(*pack_weights(folder, config, dtype, num_threads=threads))
    finally:
        torch.set_num_threads(before)


def _quality(variant: Variant, nlls: dict[str, Tensor], sums: _Sums) -> Quality:
    extras = {name: torch.cat(parts) for name, parts in sums.extra.items()}
    extra, kl = torch.cat(list(extras.values())), torch.cat(sums.kl)
    ratio = math.exp(extra.mean())
    return Quality(
        dtype=variant.dtype,
        kv=variant.kv_dtype,
        activations=variant.activations if variant.dtype in ("int8", "int4") else variant.dtype,
        perplexity=math.exp(torch.cat(list(nlls.values())).mean()) * ratio,
        ratio=ratio,
        ratio_error=ratio * float(extra.std()) / math.sqrt(len(extra)),
        kl=float(kl.mean()),
        kl_max=float(kl.max()),
        top1=float(torch.cat(sums.same_top).double().mean()),
        by_text={name: (math.exp((nlls[name] + more).mean()), math.exp(more.mean())) for name, more in extras.items()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "int8", "int4"], help="float32 is always there")
    parser.add_argument("--activations", nargs="+", default=["int16", "int8"], choices=["int16", "int8"])
    parser.add_argument("--kv", nargs="+", default=["auto", "int8"], choices=["auto", "int8"])
    parser.add_argument("--tokens", type=int, help="of each text; default: all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cache-dir", type=Path, help="where the server's cache_dir is, if not in its usual place")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound does not hold")
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    folder = resolve_model(parsed.model, parsed.cache_dir or Config().cache_path)
    limit = min(parsed.tokens or sys.maxsize, Phi3Config.from_folder(folder).max_position_embeddings)
    texts = read_texts(Tokenizer.from_folder(folder), limit)
    variants = [
        Variant(dtype, kv, activations)
        for dtype in parsed.dtypes
        if dtype != "float32"
        for activations in parsed.activations
        for kv in parsed.kv
    ]
    results = measure(folder, [variant for variant in variants if variant.possible], texts, parsed.threads)
    print(table(results), flush=True)
    for name, ids in texts.items():
        parts = [
            f"{result.dtype}/{result.activations}/{result.kv} {result.by_text[name][1] - 1:+.2%}"
            for result in results[1:]
        ]
        print(f"{name}, {len(ids)} tokens: float32 {results[0].by_text[name][0]:.2f}, {', '.join(parts)}")
    problems = failures(results)
    for problem in problems:
        print(f"NOT HELD: {problem}")
    answer: dict[str, Any] = {"model": parsed.model, "tokens": {name: len(ids) for name, ids in texts.items()}}
    print(json.dumps(answer | {"results": [asdict(result) for result in results], "not_held": problems}))
    if parsed.check and problems:
        sys.exit(1)


if __name__ == "__main__":
    main()
