"""What `resolve_model` finds, fetches and refuses, with a downloader that has no network."""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors

from phi_cluster.model.config import UnsupportedModel
from phi_cluster.model.gguf_file import GGUFError
from phi_cluster.model.hub import ModelNotFound, ProgressEvent, resolve_model

tiny = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_gguf.py"))))
HUB_ID = "microsoft/Phi-3-mini-4k-instruct"
CONFIG = {
    "architectures": ["Phi3ForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


class FakeHub:
    """Stands in for `snapshot_download`: one repository, or an error."""

    def __init__(self, folder: Path, config: dict[str, Any] | None = None, error: Exception | None = None) -> None:
        self.folder = folder
        self.config = config
        self.error = error
        self.calls: list[dict[str, Any]] = []

    def __call__(self, repo_id: str, *, tqdm_class: Any, **kwargs: Any) -> str:
        self.calls.append({"repo_id": repo_id, **kwargs})
        if self.error is not None:
            raise self.error
        if self.config is not None:
            (self.folder / "config.json").write_text(json.dumps(self.config))
        with tqdm_class(total=10, unit="B", desc="x", name="huggingface_hub.snapshot_download") as bar:
            bar.update(10)
        return str(self.folder)


def http_error(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("said so", response=response)


# What the HTTP library that huggingface_hub uses raises by itself.
TIMED_OUT = errors.HfHubHTTPError.__mro__[1]("it took too long")


@pytest.mark.parametrize("model", ["./nope", "nope", "", "/nope/x", "../a/b", "a/b/c", "a b/c", "nope.gguf"])
def test_nothing_found(tmp_path: Path, model: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        resolve_model(model, tmp_path)
    assert str(caught.value) == (
        f"no model at {model}: expected a folder with config.json, a .gguf file, "
        "or a hub id such as microsoft/Phi-3-mini-4k-instruct"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_config_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFound, match="expected a folder with config"):
        resolve_model(str(tmp_path / "empty"), tmp_path)


def test_a_folder_is_used_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path), tmp_path / "cache") == tmp_path
    assert not (tmp_path / "cache").exists()


def test_a_gguf_file_is_converted_once(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "mine.gguf")
    events: list[ProgressEvent] = []
    folder = resolve_model(str(path), tmp_path / "cache", events.append)
    assert {event.stage for event in events} == {"converting"}
    assert events[-1].done == events[-1].total
    assert folder.name.startswith("mine-")
    made = {file.name for file in folder.iterdir()}
    assert made >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    events.clear()
    assert resolve_model(str(path), tmp_path / "cache", events.append) == folder
    assert events == []
    # Another file of that name is another model.
    os.utime(path, ns=(1, 1))
    assert resolve_model(str(path), tmp_path / "cache") != folder


def test_a_broken_gguf_file_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(tiny.write(tmp_path / "good.gguf").read_bytes()[:-1000])
    with pytest.raises(GGUFError, match="truncated"):
        resolve_model(str(path), tmp_path / "cache")
    assert [
        file for file in (tmp_path / "cache").rglob("*") if not file.name.endswith(".lock") and file.is_file()
    ] == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(ModelNotFound, match=r"cannot prepare the model .*cache"):
        resolve_model(str(tiny.write(tmp_path / "m.gguf")), tmp_path / "cache")


def test_a_hub_model_is_fetched_config_first(tmp_path: Path) -> None:
    hub = FakeHub(tmp_path, CONFIG)
    events: list[ProgressEvent] = []
    assert resolve_model(HUB_ID, tmp_path / "cache", events.append, "secret", download=hub) == tmp_path
    first, second = hub.calls
    assert first["allow_patterns"] == ["config.json"]
    assert {"*.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(second["allow_patterns"])
    assert not any(pattern.endswith((".bin", ".py")) for pattern in second["allow_patterns"])
    assert [call["token"] for call in hub.calls] == ["secret", "secret"]
    assert events[-1] == ProgressEvent("downloading", 10, 10, HUB_ID)


def test_what_cannot_be_served_is_refused_before_its_weights_come(tmp_path: Path) -> None:
    hub = FakeHub(tmp_path, CONFIG | {"architectures": ["BertModel"]})
    with pytest.raises(UnsupportedModel, match="BertModel"):
        resolve_model(HUB_ID, tmp_path / "cache", download=hub)
    assert len(hub.calls) == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (http_error(errors.GatedRepoError, 403), "is gated: accept its terms"),
        (http_error(errors.RepositoryNotFoundError, 404), "no model at .* check the spelling, or set HF_TOKEN"),
        (http_error(errors.HfHubHTTPError, 401), "status 401 .* check HF_TOKEN"),
        (http_error(errors.HfHubHTTPError, 503), "status 503 .* try again later"),
        (errors.LocalEntryNotFoundError("no network"), "cannot reach the hub"),
        (errors.OfflineModeIsEnabled("offline"), "cannot reach the hub"),
        (errors.HFValidationError("bad"), "not a valid hub id"),
        (TIMED_OUT, "it took too long; try again"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_the_hubs_errors_are_one_sentence(tmp_path: Path, error: Exception, said: str) -> None:
    with pytest.raises(ModelNotFound, match=said) as caught:
        resolve_model(HUB_ID, tmp_path, token="secret", download=FakeHub(tmp_path, error=error))
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_repository_without_config_is_none_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"has no config\.json"):
        resolve_model(HUB_ID, tmp_path / "cache", download=FakeHub(tmp_path))
