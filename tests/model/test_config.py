"""config.json: what is understood, what is refused, and the folder's fingerprint."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time

import pytest

from phi_cluster.model.config import Phi3Config, UnsupportedModel, model_fingerprint

PHI3_MINI = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32064,
}
FACTORS = [1.0 + i / 48 for i in range(48)]
LONGROPE = {"type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS}
PHI3_128K = PHI3_MINI | {"max_position_embeddings": 131072, "rope_scaling": LONGROPE}


def without(field: str) -> dict:
    return {name: value for name, value in PHI3_MINI.items() if name != field}


def longrope(**changes) -> dict:
    return PHI3_128K | {"rope_scaling": LONGROPE | changes}


def test_a_plain_config():
    config = Phi3Config.from_dict(PHI3_MINI)
    assert (config.head_dim, config.rotary_dim) == (96, 96)
    assert config.eos_token_id == (32000,)
    assert config.bos_token_id == 1
    assert config.sliding_window == 2047
    assert config.rope_scaling is None
    assert config.torch_dtype == "bfloat16"


@pytest.mark.parametrize("name", ["longrope", "su"])
def test_longrope_under_both_names(name):
    config = Phi3Config.from_dict(longrope(type=name))
    assert config.rope_scaling == {"rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS}
    assert config.original_max_position_embeddings == 4096


def test_both_spellings_of_the_rotary_fields_are_the_same():
    old = PHI3_128K | {"partial_rotary_factor": 0.75, "rope_theta": 5e5}
    old["rope_scaling"] = LONGROPE | {"short_factor": FACTORS[:36], "long_factor": FACTORS[:36]}
    new = {name: v for name, v in old.items() if name not in ("rope_scaling", "rope_theta", "partial_rotary_factor")}
    new["rope_parameters"] = {
        "rope_type": "longrope",
        "rope_theta": 5e5,
        "partial_rotary_factor": 0.75,
        "short_factor": FACTORS[:36],
        "long_factor": FACTORS[:36],
        "original_max_position_embeddings": 4096,
    }
    new["dtype"] = new.pop("torch_dtype")
    config = Phi3Config.from_dict(new)
    assert config == Phi3Config.from_dict(old)
    assert config.rotary_dim == 72
    assert config.rope_theta == 5e5


def test_defaults_are_those_of_transformers():
    fields = dict(PHI3_MINI)
    for name in ("num_key_value_heads", "rope_theta", "sliding_window", "tie_word_embeddings", "torch_dtype"):
        del fields[name]
    config = Phi3Config.from_dict(fields)
    assert config.num_key_value_heads == 32
    assert (config.rope_theta, config.sliding_window, config.tie_word_embeddings) == (10000.0, None, False)
    assert config.torch_dtype == "float32"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (PHI3_MINI | {"architectures": ["LlamaForCausalLM"]}, r"architectures is \['LlamaForCausalLM'\]"),
        (without("architectures"), "architectures is None"),
        (PHI3_MINI | {"model_type": "phi4mm"}, "model_type is 'phi4mm'"),
        (PHI3_MINI | {"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'"),
        (PHI3_MINI | {"attention_bias": True}, "attention_bias is True"),
        (PHI3_MINI | {"mlp_bias": True}, "mlp_bias is True"),
        (PHI3_MINI | {"lm_head_bias": True}, "lm_head_bias is True"),
        (PHI3_MINI | {"quantization_config": {"quant_method": "awq"}}, "quantization_config is 'awq'"),
        (PHI3_MINI | {"num_local_experts": 16}, "num_local_experts is 16"),
        (PHI3_MINI | {"layer_types": ["full_attention"] * 32}, "layer_types is"),
        (PHI3_MINI | {"head_dim": 128}, "head_dim is 128"),
        (PHI3_MINI | {"torch_dtype": "float8_e4m3fn"}, "torch_dtype is 'float8_e4m3fn'"),
        (longrope(type="yarn"), "rope_scaling.type is 'yarn'"),
        (longrope(type="linear"), "rope_scaling.type is 'linear'"),
        (PHI3_MINI | {"rope_scaling": "longrope"}, "rope_scaling is 'longrope'"),
        (longrope(long_factor=FACTORS[:-1]), "rope_scaling.long_factor holds 47 numbers: 48"),
        (longrope(short_factor=None), "rope_scaling.short_factor holds None"),
        (longrope(short_factor=[*FACTORS[:-1], math.nan]), "rope_scaling.short_factor is nan"),
        (longrope(short_factor=[*FACTORS[:-1], "1"]), "rope_scaling.short_factor is '1'"),
        (longrope(factor=-1), "rope_scaling.factor is -1"),
        (longrope(attention_factor=math.inf), "rope_scaling.attention_factor is inf"),
        (longrope(original_max_position_embeddings=8192), "original_max_position_embeddings is 4096"),
        (PHI3_128K | {"original_max_position_embeddings": None}, "no original_max_position_embeddings"),
        (PHI3_128K | {"original_max_position_embeddings": 1}, "original_max_position_embeddings is 1"),
        (PHI3_MINI | {"hidden_size": 3000}, "hidden_size is 3000: not divisible by num_attention_heads 32"),
        (PHI3_MINI | {"hidden_size": -3072}, "hidden_size is -3072"),
        (PHI3_MINI | {"hidden_size": 1 << 40}, "hidden_size is 1099511627776"),
        (PHI3_MINI | {"num_key_value_heads": 5}, "num_key_value_heads is 5"),
        (PHI3_MINI | {"num_key_value_heads": 64}, "num_key_value_heads is 64"),
        (PHI3_MINI | {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        (PHI3_MINI | {"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
        (PHI3_MINI | {"num_attention_heads": True}, "num_attention_heads is True"),
        (PHI3_MINI | {"vocab_size": "32064"}, "vocab_size is '32064'"),
        (PHI3_MINI | {"sliding_window": 0}, "sliding_window is 0"),
        (PHI3_MINI | {"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
        (PHI3_MINI | {"rope_theta": 0}, "rope_theta is 0"),
        (PHI3_MINI | {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
        (PHI3_MINI | {"partial_rotary_factor": 0.33}, "partial_rotary_factor is 0.33"),
        (PHI3_MINI | {"partial_rotary_factor": 0.001}, "partial_rotary_factor is 0.001"),
        (PHI3_MINI | {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        (PHI3_MINI | {"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        (PHI3_MINI | {"bos_token_id": -1}, "bos_token_id is -1"),
        (without("vocab_size"), "no vocab_size"),
        (without("hidden_size"), "no hidden_size"),
        (without("rms_norm_eps"), "no rms_norm_eps"),
        ([], "list, not an object"),
    ],
)
def test_what_is_not_supported_is_refused_by_field_and_value(fields, message):
    with pytest.raises(UnsupportedModel, match=message) as refusal:
        Phi3Config.from_dict(fields)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 200


def write(folder, config=PHI3_MINI, generation=None):
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))


def test_end_tokens_of_both_files_are_merged(tmp_path):
    write(tmp_path, generation={"eos_token_id": [32001, 32000, 32007]})
    assert Phi3Config.from_folder(tmp_path).eos_token_id == (32000, 32001, 32007)


def test_end_tokens_beyond_the_vocabulary_are_left_out(tmp_path):
    write(tmp_path, generation={"eos_token_id": [32064, 32007]})
    assert Phi3Config.from_folder(tmp_path).eos_token_id == (32000, 32007)


def test_folders_that_hold_no_config(tmp_path):
    with pytest.raises(UnsupportedModel, match=r"there is no config\.json in"):
        Phi3Config.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnsupportedModel, match=r"config\.json cannot be read"):
        Phi3Config.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("3")
    with pytest.raises(UnsupportedModel, match="holds int"):
        Phi3Config.from_folder(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UnsupportedModel, match=r"config\.json cannot be read"):
        Phi3Config.from_folder(tmp_path)


def test_what_transformers_writes_is_understood(checkpoint):
    config = checkpoint("longrope").config
    assert config.rope_theta == 500.0
    assert config.rope_scaling is not None
    assert len(config.rope_scaling["long_factor"]) == 8
    assert checkpoint("partial").config.rotary_dim == 12
    assert checkpoint("tied").config.tie_word_embeddings


def test_fingerprint_is_of_the_network_only(tiny_folder, sharded_folder, checkpoint):
    first = model_fingerprint(tiny_folder)
    assert len(first) == 32
    # A copy elsewhere is the same network, whatever its tokens or text files.
    assert first == model_fingerprint(checkpoint("gqa").folder)
    config = json.loads((tiny_folder / "config.json").read_text())
    (tiny_folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 7, "transformers_version": "0"}))
    assert model_fingerprint(tiny_folder) == first
    assert first not in (model_fingerprint(checkpoint("mha").folder), model_fingerprint(sharded_folder))
    (tiny_folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    assert model_fingerprint(tiny_folder) != first


def test_fingerprint_changes_with_the_weights(tiny_folder):
    first = model_fingerprint(tiny_folder)
    path = tiny_folder / "model.safetensors"
    weights = bytearray(path.read_bytes())
    weights[-3] ^= 1
    path.write_bytes(weights)
    assert model_fingerprint(tiny_folder) != first


def test_fingerprint_needs_weights(tmp_path):
    write(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"holds no \.safetensors files"):
        model_fingerprint(tmp_path)
    # A header that claims to be endless is not read endlessly.
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    assert model_fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert model_fingerprint(tmp_path)


def test_fingerprint_of_many_gigabytes_is_quick(tmp_path):
    write(tmp_path)
    for i in range(3):
        with (tmp_path / f"model-{i}.safetensors").open("wb") as file:
            file.truncate(5 << 30)  # a hole: no disk is used
    began = time.monotonic()
    model_fingerprint(tmp_path)
    assert time.monotonic() - began < 1.0


def test_no_torch_is_imported():
    code = "import sys, phi_cluster.model.config, phi_cluster.model.kv_layout; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
