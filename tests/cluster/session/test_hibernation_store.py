"""Hibernated memories as files: all or nothing, private, within their quota; and the key they are encrypted with."""

from __future__ import annotations

import os
import resource

import pytest

from phi_cluster.cluster.errors import StartError
from phi_cluster.cluster.session.hibernation_file import BadHibernation, Mark
from phi_cluster.cluster.session.hibernation_store import FileHibernationStore, StorageFull, check_key, read_key
from phi_cluster.cluster.session.segment import Segment

MARK = Mark(5, 1)
DIGESTS = [letter * 32 for letter in "abcd"]


@pytest.fixture
def segment(layout, kit):
    segment = Segment.create(layout, kit.fingerprint)
    segment.append_tokens(range(100))
    kit.compute(segment, 7)
    yield segment
    segment.close()


@pytest.fixture
def make_store(tmp_path):
    return lambda quota=2**30, **options: FileHibernationStore(tmp_path, quota, **{"reserve_nbytes": 0, **options})


@pytest.fixture
def taken(layout, kit):
    """Takes into new memory; returns how many tokens came."""

    def take(store, digest, mark=MARK):
        segment = Segment.create(layout, kit.fingerprint)
        try:
            store.take(digest, segment, mark)
            return segment.num_computed_tokens
        finally:
            segment.close()

    return take


def files(tmp_path):
    return sorted(path.name for path in tmp_path.rglob("*.kv*"))


def test_a_memory_is_kept_until_it_is_taken(make_store, segment, taken, tmp_path):
    store = make_store()
    written = store.write(DIGESTS[0], segment, 100, MARK)
    [path] = tmp_path.rglob("*.kv")
    assert path == tmp_path / "sessions" / "aa" / f"{DIGESTS[0]}.kv"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert written.nbytes == path.stat().st_size
    # Another process finds it.
    assert {digest: one.nbytes for digest, one in make_store().scan().items()} == {DIGESTS[0]: written.nbytes}
    assert taken(store, DIGESTS[0]) == 100
    assert files(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        taken(store, DIGESTS[0])


def test_what_cannot_be_used_is_not_kept(make_store, segment, taken, tmp_path):
    store = make_store()
    store.write(DIGESTS[0], segment, 100, MARK)
    with pytest.raises(BadHibernation, match="stale"):
        taken(store, DIGESTS[0], Mark(6, 1))
    assert files(tmp_path) == []


def test_deleting_is_idempotent(make_store, segment, tmp_path):
    store = make_store()
    store.write(DIGESTS[0], segment, 100, MARK)
    store.delete(DIGESTS[0])
    store.delete(DIGESTS[0])
    assert files(tmp_path) == []


def test_a_scan_clears_what_is_half_written_damaged_or_misnamed(make_store, segment, tmp_path):
    store = make_store()
    for digest in DIGESTS[:3]:
        store.write(digest, segment, 100, MARK)
    folder = tmp_path / "sessions"
    (folder / "aa" / f"{DIGESTS[0]}.kv").rename(folder / "aa" / ("ab" * 16 + ".kv"))
    (folder / "bb" / f"{DIGESTS[1]}.kv").write_bytes(b"phiKV")
    (folder / "cc" / f"{DIGESTS[3]}.kv.tmp").write_bytes(b"half")
    assert store.scan().keys() == {DIGESTS[2]}
    assert files(tmp_path) == [f"{DIGESTS[2]}.kv"]


def test_the_oldest_make_room(make_store, segment, tmp_path):
    nbytes = make_store().write(DIGESTS[0], segment, 100, MARK).nbytes
    store = make_store(3 * nbytes + 4096)
    for age, digest in zip((10, 30, 20), DIGESTS, strict=False):
        store.write(digest, segment, 100, MARK)
        os.utime(tmp_path / "sessions" / digest[:2] / f"{digest}.kv", (1000 - age, 1000 - age))
    # As one that is started later finds them.
    store = make_store(3 * nbytes + 4096)
    store.write(DIGESTS[3], segment, 100, MARK)
    assert store.scan().keys() == {DIGESTS[0], DIGESTS[2], DIGESTS[3]}


def test_what_can_never_fit_pushes_nobody_out(make_store, segment, tmp_path):
    make_store().write(DIGESTS[0], segment, 10, MARK)
    with pytest.raises(StorageFull) as refused:
        make_store(8000).write(DIGESTS[1], segment, 100, MARK)
    assert (refused.value.status, refused.value.code) == (507, "storage_full")
    assert files(tmp_path) == [f"{DIGESTS[0]}.kv"]


def test_room_is_left_for_the_journals(make_store, segment, tmp_path):
    with pytest.raises(StorageFull):
        make_store(reserve_nbytes=2**60).write(DIGESTS[0], segment, 100, MARK)
    assert files(tmp_path) == []


def test_a_write_that_fails_in_the_middle_leaves_nothing(make_store, segment, tmp_path, taken):
    """The kernel refuses to let a file grow beyond a limit, as a full disk would."""
    store = make_store()
    store.write(DIGESTS[0], segment, 100, MARK)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            store.write(DIGESTS[1], segment, 100, MARK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path) == [f"{DIGESTS[0]}.kv"]
    # Once there is room again, all is as before.
    store.write(DIGESTS[1], segment, 100, MARK)
    assert taken(store, DIGESTS[0]) == taken(store, DIGESTS[1]) == 100


def test_with_a_key_only_with_that_key(make_store, segment, taken):
    make_store(key=bytes(32)).write(DIGESTS[0], segment, 100, MARK)
    assert taken(make_store(key=bytes(32)), DIGESTS[0]) == 100


def test_a_keys_file(tmp_path):
    path = tmp_path / "key"
    path.write_text("ab" * 32 + "\n")
    path.chmod(0o600)
    assert read_key(path) == bytes([0xAB]) * 32
    check_key(path)
    path.chmod(0o640)
    with pytest.raises(StartError, match="chmod 600"):
        read_key(path)
    path.chmod(0o600)
    for text in ("", "ab" * 31, "zz" * 32):
        path.write_text(text)
        with pytest.raises(StartError, match="64 hexadecimal digits"):
            read_key(path)
    with pytest.raises(StartError, match="No such file"):
        read_key(tmp_path / "nowhere")
