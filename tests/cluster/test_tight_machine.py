"""A real server where memory and disk are short: in a cgroup with a hard limit, its state on a small file system.

What does not fit is refused by a typed error; nobody is killed, what is there stays, and it goes on when there is room.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

LIMIT_NBYTES = 2_900_000_000
DISK_NBYTES = 640 * 2**20
CONFIG = {
    "kv": {"reserve_wait": "2s", "hibernate_quota": "64MiB"},
    "engine": {"standby_engines": 0, "max_waiting": 16},
    "sessions": {"spawn_interval": "100ms"},
}
HOW = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
SHM_NBYTES = 640 * 2**20
# The server sees a /dev/shm of its own, and what enters a cgroup is what it becomes.
ENTER = ("unshare", "--mount", "sh", "-c")
ENTER_SCRIPT = f'mount -t tmpfs -o size={SHM_NBYTES} phi-test /dev/shm && echo $$ > "$0/cgroup.procs" && exec "$@"'


@dataclass
class HardLimit:
    """A memory cgroup below this process's own: what is in it is killed beyond LIMIT_NBYTES."""

    folder: Path

    def read(self, v2: str, v1: str) -> str:
        path = self.folder / v2
        return (path if path.exists() else self.folder / v1).read_text()

    @property
    def kills(self) -> int:
        events = dict(line.split() for line in self.read("memory.events", "memory.oom_control").splitlines())
        return int(events["oom_kill"])

    @property
    def peak_nbytes(self) -> int:
        return int(self.read("memory.peak", "memory.max_usage_in_bytes"))


@pytest.fixture(scope="module")
def hard_limit() -> Iterator[HardLimit]:
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    own = {controller: path for _, names, path in lines for controller in names.split(",")}
    root = Path("/sys/fs/cgroup")
    parent = root / "memory" / own["memory"].strip("/") if "memory" in own else root / own.get("", "/").strip("/")
    folder = parent / f"phi-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    try:
        limit = next((folder / n for n in ("memory.max", "memory.limit_in_bytes") if (folder / n).exists()), None)
        if limit is None:
            pytest.skip(f"the cgroup {folder} has no memory controller")
        limit.write_text(str(LIMIT_NBYTES))
        yield HardLimit(folder)
    finally:
        folder.rmdir()


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of DISK_NBYTES."""
    folder = tmp_path_factory.mktemp("disk")
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_NBYTES}", "phi-test", str(folder)]
    for needed in (["unshare", "--mount", "true"], command):
        done = subprocess.run(needed, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def server(launch, hard_limit: HardLimit, disk: Path):
    server = launch(CONFIG, state_dir=disk / "state", prefix=(*ENTER, ENTER_SCRIPT, str(hard_limit.folder)))
    yield server
    server.stop()


@contextlib.contextmanager
def full(folder: Path) -> Iterator[None]:
    """Not a byte is left on the file system of `folder`."""
    filler = folder / "filler"
    try:
        with filler.open("wb") as file, contextlib.suppress(OSError):
            # Page by page at the end: this is really all.
            for nbytes in (2**20, 4096):
                with contextlib.suppress(OSError):
                    while True:
                        os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, nbytes)
        assert os.statvfs(folder).f_bavail == 0
        yield
    finally:
        filler.unlink(missing_ok=True)


def test_the_server_knows_its_cgroup(client, hard_limit: HardLimit):
    """What it gives away, and what its processes take, is within the limit."""
    assert 32 * 2**20 <= client.metric("phi_kv_cache_budget_bytes") < LIMIT_NBYTES / 4
    assert hard_limit.peak_nbytes < LIMIT_NBYTES


def test_the_worst_load_is_refused_and_nobody_is_killed(client, server, hard_limit: HardLimit, refused, until):
    """More conversations at once than memory is there for, several times over."""
    before = {process.pid for process in server.processes() if "SessionActor" not in process.name}
    num_sessions = 48
    # So long that all of them together want four budgets.
    budget = client.metric("phi_kv_cache_budget_bytes")
    probe = client.conversation("probe")
    probe.say("Hi.", max_tokens=1)
    per_token = client.session("probe")["kv_cache_bytes"] / client.session("probe")["num_tokens"]
    num_words = int(4 * budget / num_sessions / per_token)

    def talk(number: int) -> tuple[int, str | None]:
        conversation = client.conversation(f"greedy-{number}")
        try:
            conversation.say(f"{number} " + "sea " * min(num_words, 1500), **HOW)
        except refused as refusal:
            return refusal.status, refusal.error["code"]
        return 200, None

    with ThreadPoolExecutor(num_sessions) as pool:
        answers = Counter(pool.map(talk, range(num_sessions)))
    assert {status for status, _ in answers} <= {200, 429, 503}, answers
    assert answers[200, None] > 0
    assert hard_limit.kills == 0
    assert hard_limit.peak_nbytes <= LIMIT_NBYTES
    assert before <= {process.pid for process in server.processes()}, "a process has died"
    # And it goes on.
    assert until(lambda: talk(0)[0] == 200, "a turn when all is quiet", 60)
    assert client.metric("phi_kv_cache_bytes") <= budget


def test_a_full_disk_is_told_and_nothing_is_lost(client, server, disk: Path, refused):
    sleeping, awake = client.conversation("sleeping"), client.conversation("awake")
    for one in (sleeping, awake):
        one.say("My name is Odalys.", **HOW)
    asleep = client.http.post("/v1/sessions/sleeping/hibernate").json()
    assert asleep["state"] == "hibernated"
    with full(disk):
        for session_id in ("awake", "sleeping", "new"):
            with pytest.raises(refused) as caught:
                (awake if session_id == "awake" else client.conversation(session_id)).say("Go on.", **HOW)
            assert (caught.value.status, caught.value.error["code"]) in {(503, "journal_full"), (507, "storage_full")}
            assert float(caught.value.headers.get("retry-after", 0)) > 0
        response = client.http.post("/v1/sessions/awake/hibernate")
        assert (response.status_code, response.json()["error"]["code"]) == (507, "storage_full")
        # What only reads goes on, and so does what needs no disk.
        assert client.http.get("/v1/sessions").status_code == 200
        assert client.session("awake")["turns"] == 1
        assert client.http.get("/v1/sessions/awake/export").status_code == 200
        assert client.conversation(None).say("Hi.", max_tokens=2).text
        assert server.is_ready()
    for one in (sleeping, awake):
        assert one.say("What is my name?", **HOW).cached >= one.replies[0].prompt
    assert client.http.post("/v1/sessions/awake/hibernate").json()["state"] == "hibernated"
    assert awake.say("Good night.", **HOW).cached > 0


def test_a_full_shared_memory_harms_nobody(client, server):
    """The object store took its pages at the start, and caches are not in /dev/shm."""
    talk = client.conversation("in-memory")
    talk.say("My name is Odalys.", **HOW)
    # As the server sees it.
    shm = Path(f"/proc/{server.main.pid}/root/dev/shm")
    assert os.statvfs(shm).f_blocks * os.statvfs(shm).f_frsize == SHM_NBYTES
    with full(shm):
        # An answer as long as this goes through the object store.
        talk.say("sea " * 400, **HOW)
        exported = client.http.get("/v1/sessions/in-memory/export").content
        for number in range(3):
            imported = client.http.post(f"/v1/sessions/import?id=copy-{number}", content=exported)
            assert imported.status_code == 200, imported.text
        # A new engine finds the weights, and new sessions have memory.
        [engine] = server.processes("ray::EngineActor")
        engine.kill()
        assert talk.say("What is my name?", **HOW).cached > 0
        assert client.conversation("born-meanwhile").say("Hi.", **HOW).text
