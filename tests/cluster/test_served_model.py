"""What is settled once about the model: names, dtype, longest conversation."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from phi_cluster.cluster.config import Config
from phi_cluster.cluster.errors import StartError
from phi_cluster.cluster.served_model import describe_model

FIELDS: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}


def checkpoint(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(FIELDS | changes))
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder


@pytest.mark.parametrize(
    ("model", "folder", "name"),
    [
        ("smollm2", "smollm2-0.1.2", "SmolLM2-135M-Instruct"),
        ("microsoft/Phi-3-mini-4k-instruct", "models--x", "Phi-3-mini-4k-instruct"),
        ("/models/mine/", "mine", "mine"),
        ("/models/Some-Q8.gguf", "Some-Q8@0123456789", "Some-Q8"),
    ],
)
def test_the_models_own_name(model: str, folder: str, name: str, tmp_path: Path) -> None:
    served = describe_model(Config(model=model, dtype="float32"), checkpoint(tmp_path / folder))
    assert served.names == (name,)


def test_configured_names_replace_it(tmp_path: Path) -> None:
    config = Config(served_model_name=("phi", "gpt-4o"), dtype="float32")
    assert describe_model(config, checkpoint(tmp_path)).names == ("phi", "gpt-4o")


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_the_layout_follows_from_network_and_dtype(dtype: Any, itemsize: int, tmp_path: Path) -> None:
    served = describe_model(Config(dtype=dtype, max_model_len=100), checkpoint(tmp_path))
    assert (served.dtype, served.itemsize) == (dtype, itemsize)
    kv = served.layout.kv
    assert (kv.num_layers, kv.num_kv_heads, kv.head_dim, kv.max_model_len, kv.itemsize) == (3, 2, 16, 100, itemsize)
    assert served.layout.max_model_len == 100


def test_the_dtype_is_not_part_of_the_fingerprint_but_the_network_is(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a")
    one, other = (describe_model(Config(dtype=dtype), folder) for dtype in ("float32", "bfloat16"))
    assert one.fingerprint == other.fingerprint
    deeper = describe_model(Config(dtype="float32"), checkpoint(tmp_path / "b", num_hidden_layers=4))
    assert deeper.fingerprint != one.fingerprint


def test_auto_is_bfloat16(tmp_path: Path) -> None:
    assert describe_model(Config(), checkpoint(tmp_path)).dtype == "bfloat16"


def test_the_longest_conversation(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "short")
    assert describe_model(Config(), folder).max_model_len == 4096
    assert describe_model(Config(max_model_len=512), folder).max_model_len == 512
    with pytest.raises(StartError, match=r"max_model_len: 8192 is more than .* 4096"):
        describe_model(Config(max_model_len=8192), folder)
    endless = checkpoint(tmp_path / "long", max_position_embeddings=2**20)
    assert describe_model(Config(), endless).max_model_len < 2**20
    assert describe_model(Config(max_model_len=2**20), endless).max_model_len == 2**20


def test_an_unsupported_network_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"^mine: architectures is .*Llama"):
        describe_model(Config(model="mine"), checkpoint(tmp_path, architectures=["LlamaForCausalLM"]))
    (tmp_path / "config.json").unlink()
    with pytest.raises(StartError, match=r"^mine: .*config\.json"):
        describe_model(Config(model="mine"), tmp_path)


def test_a_folder_without_weights_is_one_sentence(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(StartError, match=r"holds no \.safetensors files"):
        describe_model(Config(dtype="float32"), folder)


def test_it_travels(tmp_path: Path) -> None:
    served = describe_model(Config(dtype="float32"), checkpoint(tmp_path))
    assert pickle.loads(pickle.dumps(served)) == served
