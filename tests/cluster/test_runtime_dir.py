"""What a killed server left is cleared away, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from phi_cluster.cluster.errors import StartError
from phi_cluster.cluster.processes import process_id
from phi_cluster.cluster.runtime_dir import (
    MAX_PATH_NBYTES,
    RUNTIME_DIR_VARIABLE,
    clear_dead_servers,
    create_runtime_dir,
    open_runtime_dir,
    remove_runtime_dir,
)

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """`start(*arguments, server=...)`: a process with these arguments that waits, of the server of that folder; ended
    with the test."""
    started: list[subprocess.Popen[bytes]] = []

    def run(*arguments: str, server: Path | None = None) -> subprocess.Popen[bytes]:
        environment = os.environ | ({RUNTIME_DIR_VARIABLE: str(server)} if server else {})
        code = "import sys; print('up', flush=True); sys.stdin.read()"
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        return process

    yield run
    for process in started:
        process.kill()
        with process:
            pass


def folder_of(base: Path, pid: int, start_ticks: int) -> Path:
    folder = base / f"phi-{pid}-{start_ticks}"
    (folder / "ray").mkdir(parents=True)
    (folder / "engine.sock").write_text("")
    return folder


@pytest.fixture
def dead(tmp_path: Path) -> Path:
    """The folder of a server that is gone: another process has its pid now."""
    return folder_of(tmp_path, os.getpid(), process_id().start_ticks - 1)


def test_the_longest_name_leaves_room_for_the_sockets_of_haproxy() -> None:
    folder = "/tmp/phi-4194304-99999999999"
    assert len(folder) <= MAX_PATH_NBYTES
    assert len(f"{folder}/h/{'f' * 56}/a.sock") <= 97


def test_a_long_temporary_folder_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("x" * 60)))
    path = create_runtime_dir()
    assert path.parent == Path("/tmp")
    remove_runtime_dir(path)


def test_a_new_folder_is_private_and_names_its_process(tmp_path: Path) -> None:
    path = create_runtime_dir(tmp_path)
    assert path == tmp_path / f"phi-{os.getpid()}-{process_id().start_ticks}"
    assert path.stat().st_mode & 0o777 == 0o700
    with pytest.raises(FileExistsError):
        create_runtime_dir(tmp_path)
    (path / "file").write_text("")
    remove_runtime_dir(path)
    assert not path.exists()
    remove_runtime_dir(path)


def test_the_paths_of_sockets_in_it_are_short_enough() -> None:
    path = create_runtime_dir()
    try:
        assert len(str(path)) < 107 - 70
    finally:
        remove_runtime_dir(path)


def test_a_dead_servers_folder_is_removed(tmp_path: Path, dead: Path) -> None:
    assert clear_dead_servers(tmp_path) == []
    assert not dead.exists()


def test_a_living_servers_folder_stays_with_its_processes(tmp_path: Path, start: Start) -> None:
    mine = create_runtime_dir(tmp_path)
    child = start(server=mine)
    other = folder_of(tmp_path, child.pid, process_id(child.pid).start_ticks)
    assert clear_dead_servers(tmp_path) == []
    assert mine.is_dir()
    assert other.is_dir()
    assert child.poll() is None


def test_orphans_of_a_dead_server_are_ended(tmp_path: Path, dead: Path, start: Start) -> None:
    first, second = start(server=dead), start("-f", f"{dead}/haproxy/haproxy.cfg", server=dead)
    # Another server whose name begins alike, and a user who reads the dead one's logs.
    alike = start(server=Path(f"{dead}5"))
    stranger = start(f"{dead}/ray/log")
    done = clear_dead_servers(tmp_path)
    assert sorted(done) == sorted(f"ended process {p.pid} of a server that was killed" for p in (first, second))
    assert first.wait(5) == second.wait(5) == -9
    assert alike.poll() is None
    assert stranger.poll() is None
    assert not dead.exists()


def test_other_names_are_not_touched(tmp_path: Path) -> None:
    for name in ("phi-x-1", "phi-1-2-3", "phi-1", "other-1-2", "phi-1-2x"):
        (tmp_path / name).mkdir()
    before = sorted(tmp_path.iterdir())
    clear_dead_servers(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    """Anyone may put a link with such a name into the temporary folder, and let it point to what is ours."""
    precious, base = tmp_path / "precious", tmp_path / "base"
    base.mkdir()
    folder_of(tmp_path, 1, 1).rename(precious)
    (base / "phi-999999999-1").symlink_to(precious)
    clear_dead_servers(base)
    assert (precious / "engine.sock").exists()
    assert (base / "phi-999999999-1").is_symlink()


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="t") as path:
        yield Path(path)


def test_the_folder_of_a_node_that_others_started_is_made_private(short: Path) -> None:
    path = short / "a" / "b"
    open_runtime_dir(path)
    assert path.stat().st_mode & 0o777 == 0o700
    # HAProxy made it before us, for everybody.
    path.chmod(0o755)
    open_runtime_dir(path)
    assert path.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_may_be_somebody_elses_is_refused(short: Path) -> None:
    (short / "theirs").mkdir()
    (short / "link").symlink_to(short / "theirs")
    with pytest.raises(StartError, match="not a folder of the user who runs Ray"):
        open_runtime_dir(short / "link")
    (short / "theirs").chmod(0o755)
    if os.getuid() == 0:
        os.chown(short / "theirs", 12345, 12345)
        with pytest.raises(StartError, match="not a folder of the user who runs Ray"):
            open_runtime_dir(short / "theirs")
        assert (short / "theirs").stat().st_mode & 0o777 == 0o755


def test_a_folder_with_too_long_a_name_for_sockets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="too long for sockets"):
        open_runtime_dir(tmp_path / ("x" * MAX_PATH_NBYTES))
