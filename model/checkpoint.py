"""A Hugging Face folder's safetensors files: which tensors a network needs, and reading them one by one.

Owns: finding the files, and every check on them before the first number is read. Knows nothing of what the
tensors are for, of other file formats, or of how they are packed for sharing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from phi_cluster.model.config import Phi3Config

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = ("F32", "F16", "BF16")


class CheckpointError(ValueError):
    """The weights cannot be used; the message is one sentence that names the file or the tensor."""


def expected_tensors(config: Phi3Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all weights of the network, in its order, [out, in] for the linear ones. A tied head
    is not among them: it is the embedding.
    """
    hidden, intermediate = config.hidden_size, config.intermediate_size
    qkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}"
        tensors[f"{prefix}.input_layernorm.weight"] = (hidden,)
        tensors[f"{prefix}.self_attn.qkv_proj.weight"] = (qkv, hidden)
        tensors[f"{prefix}.self_attn.o_proj.weight"] = (hidden, hidden)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        tensors[f"{prefix}.mlp.gate_up_proj.weight"] = (2 * intermediate, hidden)
        tensors[f"{prefix}.mlp.down_proj.weight"] = (hidden, intermediate)
    tensors["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = (config.vocab_size, hidden)
    return tensors


def iter_tensors(folder: str | Path, config: Phi3Config) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every expected tensor, file by file, in the checkpoint's dtype (float32, float16,
    bfloat16).

    All files are checked before this returns (`check_checkpoint`), so nothing is read of a checkpoint that
    is broken. Raises CheckpointError.
    """
    return _read(check_checkpoint(folder, config))


def check_checkpoint(folder: str | Path, config: Phi3Config) -> dict[Path, list[str]]:
    """File -> the expected tensors in it. Reads headers only, so it is quick for any size.

    Raises CheckpointError when there are no weights, when a file is missing, truncated or not safetensors,
    when the index is broken, or when a tensor is missing, unexpected, of a wrong shape or of an unsupported
    dtype.
    """
    expected = expected_tensors(config)
    places: dict[str, Path] = {}
    for path in _weight_files(Path(folder)):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is not a dict)
                    if _is_ignored(name, config):
                        continue
                    if name not in expected:
                        raise CheckpointError(f"{path.name} holds the tensor {name}, which the network does not have")
                    if name in places:
                        raise CheckpointError(f"{path.name} and {places[name].name} both hold the tensor {name}")
                    part = file.get_slice(name)
                    if tuple(part.get_shape()) != expected[name]:
                        raise CheckpointError(
                            f"{name} in {path.name} has shape {list(part.get_shape())}, "
                            f"but config.json asks for {list(expected[name])}"
                        )
                    dtype = part.get_dtype()
                    if dtype not in _DTYPES:
                        raise CheckpointError(
                            f"{name} in {path.name} has dtype {dtype}: supported are {', '.join(_DTYPES)}"
                        )
                    places[name] = path
        except SafetensorError as error:
            raise CheckpointError(_describe(path, error)) from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    missing = [name for name in expected if name not in places]
    if missing:
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise CheckpointError(f"the weights in {folder} lack {missing[0]}{more}")
    files: dict[Path, list[str]] = {}
    for name, path in places.items():
        files.setdefault(path, []).append(name)
    return files


def _read(files: dict[Path, list[str]]) -> Iterator[tuple[str, Tensor]]:
    for path, names in files.items():
        with safe_open(path, framework="pt") as file:
            for name in names:
                yield name, file.get_tensor(name)


def _is_ignored(name: str, config: Phi3Config) -> bool:
    """Tensors that some checkpoints store though they are computed, or the same as another one."""
    return name.endswith(".rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings)


def _weight_files(folder: Path) -> list[Path]:
    """The single file if there is one (as transformers prefers it), else the shards of the index."""
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    index = folder / _INDEX
    if not index.is_file():
        if any(folder.glob("*.bin")):
            raise CheckpointError(f"{folder} holds weights as .bin only: convert them to safetensors")
        raise CheckpointError(f"{folder} holds no weights: {_SINGLE} or {_INDEX} is expected")
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is broken: {type(error).__name__} {error}") from None
    if not names:
        raise CheckpointError(f"{index} names no files")
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index} names the file {name!r}, which is not in its folder")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks the file {name}, which {_INDEX} names")
    return [folder / name for name in names]


def _describe(path: Path, error: SafetensorError) -> str:
    # The library tells them apart by message only: a header that ends early, or a body that does.
    if "incomplete" in str(error).lower():
        return f"{path} is truncated: {error}"
    return f"{path} is not a safetensors file: {error}"
