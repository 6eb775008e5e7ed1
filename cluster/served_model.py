"""The model this server serves, as every process needs to know it.

Owns: what was decided once at start (folder, dtype, longest conversation, names) and travels to all actors.
Knows nothing of weights, Ray or HTTP; no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from phi_cluster.cluster.config import Config
from phi_cluster.cluster.errors import StartError
from phi_cluster.cluster.session.segment import SegmentLayout
from phi_cluster.model.config import Phi3Config, UnsupportedModel, model_fingerprint
from phi_cluster.model.kv_layout import KVCacheLayout

# Without a limit in the configuration no session may grow beyond this, however long the model's context.
DEFAULT_MAX_MODEL_LEN = 131072


@dataclass(frozen=True)
class ServedModel:
    """`dtype` is float32 or bfloat16, of weights and KV cache; `fingerprint` names the checkpoint (not the dtype: ids
    that one dtype generated mean the same to the other)."""

    names: tuple[str, ...]
    folder: Path
    config: Phi3Config
    fingerprint: str
    dtype: str
    max_model_len: int

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def layout(self) -> SegmentLayout:
        return SegmentLayout(KVCacheLayout.for_config(self.config, self.max_model_len, self.itemsize))


def describe_model(config: Config, folder: Path) -> ServedModel:
    """Reads the checkpoint's config and settles dtype and limits. Raises StartError in one sentence."""
    try:
        model = Phi3Config.from_folder(folder)
        fingerprint = model_fingerprint(folder)
    except UnsupportedModel as error:
        raise StartError(f"{config.model}: {error}") from None
    dtype = "bfloat16" if config.dtype == "auto" else config.dtype
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
        dtype=dtype,
        max_model_len=max_model_len,
    )
