"""The model this server serves, as every process needs to know it.

Owns: what was decided once at start (folder, dtypes, longest conversation, names) and travels to all actors.
Knows nothing of weights, Ray or HTTP; no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from phi_cluster.cluster.config import Config
from phi_cluster.cluster.errors import StartError
from phi_cluster.cluster.session.segment import SegmentLayout
from phi_cluster.model.config import Phi3Config, UnsupportedModel, model_fingerprint
from phi_cluster.model.kv_layout import KVCacheLayout

# Without a limit in the configuration no session may grow beyond this, however long the model's context.
DEFAULT_MAX_MODEL_LEN = 131072
_QUANTISED = ("int8", "int4")
_REMEDY = "install a C++ compiler such as g++ and reinstall phi-cluster"
# Of a number, and of the scale that each head's numbers of a token share.
_KV_NBYTES = {"float32": (4, 0), "bfloat16": (2, 0), "int8": (1, 4)}


@dataclass(frozen=True)
class ServedModel:
    """`dtype`, of the weights, is float32, bfloat16, int8 or int4; `kv_cache_dtype` float32, bfloat16 or int8;
    `activation_dtype` int16 or int8 with int8 and int4 weights (of what meets int8 ones), else `dtype`; `fingerprint`
    names the checkpoint (not the dtype: ids that one dtype generated mean the same to the other)."""

    names: tuple[str, ...]
    folder: Path
    config: Phi3Config
    fingerprint: str
    dtype: str
    kv_cache_dtype: str
    activation_dtype: str
    max_model_len: int

    @property
    def layout(self) -> SegmentLayout:
        itemsize, scale_nbytes = _KV_NBYTES[self.kv_cache_dtype]
        return SegmentLayout(KVCacheLayout.for_config(self.config, self.max_model_len, itemsize, scale_nbytes))

    @property
    def regime_tokens(self) -> int | None:
        """Sequences of more tokens have other keys and values than shorter ones (LongRoPE); None: all have the same."""
        return None if self.config.rope_scaling is None else self.config.original_max_position_embeddings


def compiled_ops_problem() -> str | None:
    """Why the compiled kernels cannot be used, or None."""
    # Only where it is asked: this loads and tests a library.
    from phi_cluster.model.ops import library

    return library.problem()


class Dtypes(NamedTuple):
    """As ServedModel has them."""

    weights: str
    kv_cache: str
    activations: str


def choose_dtypes(
    config: Config,
    ops_problem: Callable[[], str | None] = compiled_ops_problem,
    noted: Callable[[str], None] = lambda text: None,
) -> Dtypes:
    """`ops_problem` is asked only where the answer matters; `noted` is told, in one line, where auto had to be less
    than it could. Raises StartError in one sentence.
    """
    dtype = config.dtype
    if config.device != "cpu":
        if dtype in _QUANTISED:
            raise StartError(
                f"dtype: {dtype} runs on the CPU only; with device: {config.device} set dtype: bfloat16 or float32"
            )
        dtype = "bfloat16" if dtype == "auto" else dtype
    elif dtype == "auto" or dtype in _QUANTISED:
        problem = " ".join((ops_problem() or "").split())
        if problem and dtype in _QUANTISED:
            raise StartError(f"dtype: {dtype} cannot be used, as {problem}; {_REMEDY}, or set dtype: bfloat16")
        if problem and config.kv_cache_dtype == "int8":
            raise StartError(f"kv_cache_dtype: int8 cannot be used, as {problem}; {_REMEDY}, or leave it at auto")
        if problem:
            noted(f"dtype is bfloat16, as {problem}; for int8, {_REMEDY}")
        if dtype == "auto":
            dtype = "bfloat16" if problem else "int8"
    activations = config.activation_dtype if dtype in _QUANTISED else dtype
    if config.activation_dtype == "int8" and dtype not in _QUANTISED:
        raise StartError(
            f"activation_dtype: int8 does not go with dtype {dtype}, whose activations are {dtype}; leave it out or "
            "set dtype: int8"
        )
    natural = "float32" if dtype == "float32" else "bfloat16"
    if config.kv_cache_dtype in ("auto", natural):
        return Dtypes(dtype, natural, activations)
    if config.kv_cache_dtype == "int8" and dtype in _QUANTISED:
        return Dtypes(dtype, "int8", activations)
    raise StartError(
        f"kv_cache_dtype: {config.kv_cache_dtype} does not go with dtype {dtype}, whose KV cache is {natural}; "
        "leave it at auto or set dtype: int8"
    )


def describe_model(
    config: Config,
    folder: Path,
    ops_problem: Callable[[], str | None] = compiled_ops_problem,
    noted: Callable[[str], None] = lambda text: None,
) -> ServedModel:
    """Reads the checkpoint's config and settles dtypes (as `choose_dtypes`) and limits. Raises StartError in one
    sentence."""
    try:
        model = Phi3Config.from_folder(folder)
        fingerprint = model_fingerprint(folder)
    except UnsupportedModel as error:
        raise StartError(f"{config.model}: {error}") from None
    dtypes = choose_dtypes(config, ops_problem, noted)
    max_model_len = min(config.max_model_len or DEFAULT_MAX_MODEL_LEN, model.max_position_embeddings)
    if config.max_model_len and config.max_model_len > model.max_position_embeddings:
        raise StartError(
            f"max_model_len: {config.max_model_len} is more than the model's max_position_embeddings "
            f"{model.max_position_embeddings}"
        )
    name = folder.name.rsplit("@", 1)[0] if config.model.endswith(".gguf") else config.model.rstrip("/").split("/")[-1]
    if config.model == "smollm2":
        name = "SmolLM2-135M-Instruct"
    return ServedModel(
        names=config.served_model_name or (name,),
        folder=folder,
        config=model,
        fingerprint=fingerprint,
        dtype=dtypes.weights,
        kv_cache_dtype=dtypes.kv_cache,
        activation_dtype=dtypes.activations,
        max_model_len=max_model_len,
    )
