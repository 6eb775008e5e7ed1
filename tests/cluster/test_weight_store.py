"""Weights are on a node once: engines map them, cannot write to them, and pay next to nothing for large ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from phi_cluster.cluster.config import Config
from phi_cluster.cluster.errors import StartError
from phi_cluster.cluster.served_model import ServedModel, describe_model
from phi_cluster.cluster.weight_store import ensure_packed, packed_paths
from phi_cluster.model.checkpoint import expected_tensors
from phi_cluster.model.config import Phi3Config

_SMALL = {
    "architectures": ["Phi3ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "original_max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
    "bos_token_id": 1,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}
# About 200 million bytes of weights in bfloat16.
_LARGE = _SMALL | {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 5}


def make_model(folder: Path, config: dict[str, Any]) -> ServedModel:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    shapes = expected_tensors(Phi3Config.from_dict(config))
    save_file(
        {
            name: np.ones(shape, np.float32) if "norm" in name else rng.standard_normal(shape, np.float32) * 0.02
            for name, shape in shapes.items()
        },
        folder / "model.safetensors",
    )
    return describe_model(Config(model=str(folder), dtype="bfloat16"), folder)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_packing_happens_once_and_reports_its_progress(dtype: str, tmp_path: Path) -> None:
    model = replace(make_model(tmp_path / "small", _SMALL), dtype=dtype)
    seen: list[tuple[int, int]] = []
    weights, index = ensure_packed(model, tmp_path / "cache", lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    assert weights.stat().st_size == json.loads(index.read_text())["nbytes"]
    assert json.loads(index.read_text())["dtype"] == dtype
    assert {path.name for path in weights.parent.iterdir()} == {weights.name, index.name}
    seen.clear()
    assert ensure_packed(model, tmp_path / "cache", lambda done, total: seen.append((done, total))) == (weights, index)
    assert seen == []


def test_a_broken_checkpoint_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    model = make_model(tmp_path / "small", _SMALL)
    weights = model.folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(StartError, match=r"model\.safetensors") as caught:
        ensure_packed(model, tmp_path / "cache")
    assert "\n" not in caught.value.message
    assert "Traceback" not in caught.value.message
    assert list((tmp_path / "cache" / "packed").iterdir()) == []


def test_dtypes_are_packed_apart_and_quantised_formats_have_versions(tmp_path: Path) -> None:
    model = make_model(tmp_path / "small", _SMALL)
    names = [packed_paths(replace(model, dtype=dtype), tmp_path)[0].name for dtype in ("bfloat16", "int8", "int4")]
    assert names == [f"{model.fingerprint}-{end}.bin" for end in ("bfloat16", "int8-2", "int4-2")]
    # Keys and values are no part of it.
    assert packed_paths(replace(model, kv_cache_dtype="int8"), tmp_path) == packed_paths(model, tmp_path)


def test_weights_that_cannot_be_quantised_are_one_sentence(tmp_path: Path) -> None:
    model = replace(make_model(tmp_path / "small", _SMALL), dtype="int4")
    tensors = load_file(model.folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = np.inf
    save_file(tensors, model.folder / "model.safetensors")
    with pytest.raises(StartError, match=r"^model\.layers\.0\.mlp\.down_proj\.weight holds numbers that are not fin"):
        ensure_packed(model, tmp_path / "cache")
    assert list((tmp_path / "cache" / "packed").iterdir()) == []


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=600 * 10**6,
        log_to_driver=False,
        configure_logging=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=str(tmp_path_factory.mktemp("ray")),
    )
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore")
def test_engines_map_the_weights_and_cannot_write_to_them(local_ray: None, tmp_path: Path) -> None:
    import ray

    from phi_cluster.cluster.engine.actor import EngineActor
    from phi_cluster.cluster.engine.settings import EngineSettings
    from phi_cluster.cluster.processes import private_bytes
    from phi_cluster.cluster.weight_store import WeightStore

    private: dict[str, list[int]] = {}
    nbytes = {}
    for name, config in (("small", _SMALL), ("large", _LARGE)):
        model = make_model(tmp_path / name, config)
        store = WeightStore.remote(model, tmp_path / "cache", 0)  # type: ignore[attr-defined]
        index, buffers = ray.get(store.weights.remote())
        nbytes[name] = index["nbytes"]
        engines, private[name] = [], []
        for i in range(2):
            settings = EngineSettings(2, 16, 1, "cpu", str(tmp_path / f"{name}{i}.sock"))
            engine = EngineActor.options(num_cpus=0).remote(model, settings)  # type: ignore[attr-defined]
            engines.append(engine)
            private[name].append(private_bytes(ray.get(engine.start.remote(index, buffers)).pid))
        if name == "large":
            address = ray.get(engines[0].weights_address.remote())
            victim = ray.get(engines[0].process.remote())
            maps = Path(f"/proc/{victim.pid}/maps").read_text().splitlines()
            assert [protection(line) for line in maps if holds(line, address)] == ["r--s"]
        for engine in [*engines, store]:
            ray.kill(engine)
    assert nbytes["large"] > 200 * 10**6
    # Of the second engine: the first one may have paid for something once.
    assert private["large"][1] - private["small"][1] < 20 * 10**6


def holds(line: str, address: int) -> bool:
    begin, end = (int(part, 16) for part in line.split()[0].split("-"))
    return begin <= address < end


def protection(line: str) -> str:
    return line.split()[1]
