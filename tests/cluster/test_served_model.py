"""What is settled once about the model: names, dtype, longest conversation."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from phi_cluster.cluster.config import Config
from phi_cluster.cluster.errors import StartError
from phi_cluster.cluster.served_model import choose_dtypes, compiled_ops_problem, describe_model
from phi_cluster.model.kv_layout import KVCacheLayout

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


def works() -> str | None:
    """The compiled kernels are there."""
    return None


def not_compiled() -> str | None:
    return "the kernels were not\ncompiled"


@pytest.mark.parametrize(
    ("dtype", "kv_cache_dtype", "kv", "itemsize", "scale_nbytes"),
    [
        ("float32", "auto", "float32", 4, 0),
        ("bfloat16", "auto", "bfloat16", 2, 0),
        ("bfloat16", "bfloat16", "bfloat16", 2, 0),
        ("int8", "auto", "bfloat16", 2, 0),
        ("int4", "bfloat16", "bfloat16", 2, 0),
        ("int8", "int8", "int8", 1, 4),
        ("int4", "int8", "int8", 1, 4),
    ],
)
def test_the_layout_follows_from_network_and_dtypes(
    dtype: Any, kv_cache_dtype: Any, kv: str, itemsize: int, scale_nbytes: int, tmp_path: Path
) -> None:
    config = Config(dtype=dtype, kv_cache_dtype=kv_cache_dtype, max_model_len=100)
    served = describe_model(config, checkpoint(tmp_path), works)
    assert (served.dtype, served.kv_cache_dtype) == (dtype, kv)
    assert served.layout.kv == KVCacheLayout(3, 2, 16, 100, itemsize, scale_nbytes)
    assert served.layout.max_model_len == 100


@pytest.mark.parametrize("dtype", ["auto", "int8", "int4"])
def test_activations_are_int16_unless_int8_is_asked_for(dtype: Any, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)

    def activations(**fields: Any) -> str:
        return describe_model(Config(dtype=dtype, **fields), folder, works).activation_dtype

    assert [activations(), activations(activation_dtype="int8")] == ["int16", "int8"]


def test_activations_of_other_networks_are_as_their_weights(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    for dtype in ("float32", "bfloat16"):
        assert describe_model(Config(dtype=dtype), folder, never_asked).activation_dtype == dtype


def test_the_dtype_is_not_part_of_the_fingerprint_but_the_network_is(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a")
    one, other = (describe_model(Config(dtype=dtype), folder) for dtype in ("float32", "bfloat16"))
    assert one.fingerprint == other.fingerprint
    deeper = describe_model(Config(dtype="float32"), checkpoint(tmp_path / "b", num_hidden_layers=4))
    assert deeper.fingerprint != one.fingerprint


def never_asked() -> str | None:
    raise AssertionError("the compiled kernels do not matter here")


def test_auto_is_int8_where_the_kernels_are_and_says_so_where_not(tmp_path: Path) -> None:
    told: list[str] = []
    folder = checkpoint(tmp_path)
    served = describe_model(Config(), folder, works, told.append)
    assert (served.dtype, served.kv_cache_dtype, told) == ("int8", "bfloat16", [])
    served = describe_model(Config(), folder, not_compiled, told.append)
    assert (served.dtype, served.kv_cache_dtype) == ("bfloat16", "bfloat16")
    assert told == [
        "dtype is bfloat16, as the kernels were not compiled; for int8, install a C++ compiler such as g++ and "
        "reinstall phi-cluster"
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_that_are_not_needed_are_not_asked_for(dtype: Any) -> None:
    assert choose_dtypes(Config(dtype=dtype), never_asked)[0] == dtype
    assert choose_dtypes(Config(device="cuda"), never_asked) == ("bfloat16", "bfloat16", "bfloat16")
    assert choose_dtypes(Config(device="cuda", dtype=dtype), never_asked)[0] == dtype


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"dtype": "int8"}, "dtype: int8 cannot be used, as the kernels were not compiled; install a C++ compiler"),
        ({"dtype": "int4"}, "dtype: int4 cannot be used, as the kernels were not compiled; install a C++ compiler"),
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype: int8 cannot be used, as the kernels were not compiled; install"),
        (
            {"device": "cuda", "dtype": "int8"},
            "dtype: int8 runs on the CPU only; with device: cuda set dtype: bfloat16",
        ),
        (
            {"dtype": "bfloat16", "activation_dtype": "int8"},
            "activation_dtype: int8 does not go with dtype bfloat16, whose activations are bfloat16; leave it out",
        ),
        ({"activation_dtype": "int8"}, "activation_dtype: int8 does not go with dtype bfloat16, whose activations"),
        ({"dtype": "bfloat16", "kv_cache_dtype": "int8"}, "kv_cache_dtype: int8 does not go with dtype bfloat16, "),
        ({"device": "cuda", "kv_cache_dtype": "int8"}, "kv_cache_dtype: int8 does not go with dtype bfloat16, "),
        ({"dtype": "float32", "kv_cache_dtype": "int8"}, "kv_cache_dtype: int8 does not go with dtype float32, "),
        (
            {"dtype": "float32", "kv_cache_dtype": "bfloat16"},
            "kv_cache_dtype: bfloat16 does not go with dtype float32, whose KV cache is float32; leave it at auto",
        ),
    ],
)
def test_dtypes_that_cannot_be_are_one_sentence(fields: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(StartError) as caught:
        describe_model(Config(**fields), checkpoint(tmp_path), not_compiled)
    assert caught.value.message.startswith(told)
    assert "\n" not in caught.value.message


def test_the_installed_kernels_are_there_or_it_is_said_why_not() -> None:
    problem = compiled_ops_problem()
    assert problem is None or len(problem) > 10


def test_the_longest_conversation(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "short")
    assert describe_model(Config(dtype="float32"), folder).max_model_len == 4096
    assert describe_model(Config(dtype="float32", max_model_len=512), folder).max_model_len == 512
    with pytest.raises(StartError, match=r"max_model_len: 8192 is more than .* 4096"):
        describe_model(Config(dtype="float32", max_model_len=8192), folder)
    endless = checkpoint(tmp_path / "long", max_position_embeddings=2**20)
    assert describe_model(Config(dtype="float32"), endless).max_model_len < 2**20
    assert describe_model(Config(dtype="float32", max_model_len=2**20), endless).max_model_len == 2**20


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
