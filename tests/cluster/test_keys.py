"""The file of API keys: what it may say, who a key is, and what happens when it changes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from phi_cluster.cluster.errors import StartError, Unauthorized
from phi_cluster.cluster.keys import KeyFile, append_entry, entry_text, hash_of, new_key, read_keys
from phi_cluster.cluster.messages import TenantLimits
from phi_cluster.cluster.turn_api import Identity

ALICE, BOB, OLD = "phi-alice", "phi-bob", "phi-old"
HASH = hash_of(ALICE)
EXPIRES = 1_800_000_000.0  # 2027-01-15T08:00:00Z

TEXT = f"""
keys:
  - name: alice
    hash: [{HASH}, {hash_of(OLD)}]
    scopes: [admin]
  - name: bob
    hash: {hash_of(BOB)}
    expires: 2027-01-15T08:00:00
    limits: {{requests_per_minute: 60, tokens_per_minute: 20000, concurrent_turns: 4, sessions: 100, kv_bytes: 2GiB}}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    path.write_text(TEXT)
    return path


@pytest.fixture
def rewrite(path: Path) -> Callable[[str], None]:
    """Changes the file, as seen by whoever looks at its time."""
    times = iter(range(1, 100))

    def rewrite(text: str) -> None:
        path.write_text(text)
        os.utime(path, (0, next(times)))

    return rewrite


def test_who_a_key_is(path: Path) -> None:
    keys = KeyFile(path, lambda: EXPIRES - 1)
    assert keys.identify(ALICE) == keys.identify(OLD) == Identity("alice", frozenset({"admin"}))
    assert keys.identify(BOB) == Identity("bob")
    assert keys.names == ["alice", "bob"]
    assert keys.limits_of("bob") == TenantLimits(60, 20000, 4, 100, 2 * 2**30)
    assert keys.limits_of("alice") == keys.limits_of("nobody") == TenantLimits()


@pytest.mark.parametrize("wrong", ["", "phi-", ALICE + "x", ALICE.upper(), HASH, "\x00", "ä", "\udce4", "x" * 20_000])
def test_what_is_no_key(path: Path, wrong: str) -> None:
    with pytest.raises(Unauthorized, match="not valid") as caught:
        KeyFile(path).identify(wrong)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    assert not wrong or wrong not in caught.value.message


def test_a_key_ends_with_its_time(path: Path) -> None:
    now = EXPIRES - 0.001
    keys = KeyFile(path, lambda: now)
    assert keys.identify(BOB).tenant == "bob"
    now = EXPIRES
    with pytest.raises(Unauthorized, match="expired"):
        keys.identify(BOB)
    assert keys.identify(ALICE).tenant == "alice"


def test_all_hashes_are_compared_whichever_it_is(path: Path) -> None:
    """How long it takes must not tell how near a guess was."""
    compared: list[bytes] = []

    def compare(known: bytes, given: bytes) -> bool:
        compared.append(known)
        return known == given

    keys = KeyFile(path, lambda: 0.0, compare)
    for key in (ALICE, BOB):
        keys.identify(key)
    with pytest.raises(Unauthorized):
        keys.identify("phi-nobody")
    assert len(compared) == 9


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "Input should be"),
        ("keys:", "keys: Input should be a valid tuple"),
        ("keys: {}", "keys: "),
        ("- a", "Input should be"),
        ("key: []", "keys: Field required"),
        ("keys: [{hash: x}]", "keys.0.name: Field required"),
        ("keys: [{name: a}]", "keys.0.hash: Field required"),
        ("keys: [{name: 'a b', hash: HASH}]", "keys.0.name: a name is 1 to 64"),
        ("keys: [{name: '', hash: HASH}]", "keys.0.name: a name is"),
        ("keys: [{name: 5, hash: HASH}]", "keys.0.name: a name is"),
        ("keys: [{name: a/../b, hash: HASH}]", "keys.0.name: a name is"),
        ("keys: [{name: a, hash: phi-secret}]", "keys.0.hash: a hash is sha256: and 64"),
        ("keys: [{name: a, hash: []}]", "keys.0.hash: a hash, or a list"),
        ("keys: [{name: a, hash: HASH, scopes: [root]}]", "keys.0.scopes.0: Input should be 'admin'"),
        ("keys: [{name: a, hash: HASH, expires: soon}]", "keys.0.expires: a date such as 2027-01-31"),
        ("keys: [{name: a, hash: HASH, expires: 20270131}]", "keys.0.expires: a date"),
        ("keys: [{name: a, hash: HASH, limits: {sessions: 0}}]", "keys.0.limits.sessions: "),
        ("keys: [{name: a, hash: HASH, limits: {kv_bytes: lots}}]", "keys.0.limits.kv_bytes: 'lots' is not a size"),
        ("keys: [{name: a, hash: HASH, limits: {tokens: 5}}]", "keys.0.limits.tokens: Extra inputs"),
        ("keys: [{name: a, hash: HASH}, {name: a, hash: sha256:00}]", "keys.1.hash"),
        ("keys: [{name: a, hash: HASH}, {name: b, hash: HASH}]", "is there twice"),
        ("keys: [{name: a, hash: [HASH, HASH]}]", "is there twice"),
        ("keys: [", "is not valid YAML"),
        ("\x00", "is not valid YAML"),
        ("keys: &a [*a]", "keys"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text.replace("HASH", HASH))
    with pytest.raises(StartError) as caught:
        read_keys(path)
    assert str(path) in caught.value.message
    assert told in caught.value.message
    assert "\n" not in caught.value.message


def test_what_everybody_may_write_is_not_trusted(path: Path) -> None:
    path.chmod(0o666)
    with pytest.raises(StartError, match="chmod o-w"):
        read_keys(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"cannot read the keys in .*: No such file"):
        KeyFile(tmp_path / "none.yaml")


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": [{"name": "a", "hash": HASH, "expires": "2027-01-31"}]}))
    assert KeyFile(path, lambda: 0.0).identify(ALICE).tenant == "a"
    path.write_text("{'keys': []}")
    with pytest.raises(StartError, match="is not valid JSON"):
        read_keys(path)


def test_a_changed_file_is_read_once_it_rests(path: Path, rewrite: Callable[[str], None]) -> None:
    keys = KeyFile(path, lambda: 0.0)
    assert keys.refresh() is None
    rewrite(f"keys: [{{name: carol, hash: {hash_of('phi-carol')}}}]")
    # Somebody may be writing still.
    assert keys.refresh() is None
    assert keys.identify(ALICE)
    told = keys.refresh()
    assert told is not None
    assert "read again: 1 in" in told
    assert keys.refresh() is None
    assert keys.identify("phi-carol").tenant == "carol"
    with pytest.raises(Unauthorized):
        keys.identify(ALICE)
    rewrite("keys: []")
    keys.refresh()
    assert keys.refresh()
    with pytest.raises(Unauthorized):
        keys.identify("phi-carol")


def test_a_broken_version_changes_nothing_and_says_so_once(path: Path, rewrite: Callable[[str], None]) -> None:
    keys = KeyFile(path, lambda: 0.0)
    rewrite(TEXT[:60])
    said = [keys.refresh() for _ in range(4)]
    assert [one is not None for one in said] == [False, True, False, False]
    assert said[1] is not None
    assert said[1].startswith("the former API keys stay valid: ")
    assert keys.identify(ALICE)
    path.unlink()
    said = [keys.refresh() for _ in range(3)]
    assert [one is not None for one in said] == [False, True, False]
    assert keys.identify(BOB)
    rewrite(TEXT)
    keys.refresh()
    assert keys.refresh()
    assert keys.identify(ALICE)


def test_new_keys_are_long_and_differ() -> None:
    made = {new_key() for _ in range(50)}
    assert len(made) == 50
    assert all(len(key) == 47 and key.startswith("phi-") for key in made)


def test_an_entry_holds_no_key(tmp_path: Path) -> None:
    key = new_key()
    text = entry_text("alice", key, ("admin",))
    assert key not in text
    path = tmp_path / "keys.yaml"
    append_entry(path, text)
    assert path.stat().st_mode & 0o777 == 0o600
    assert KeyFile(path).identify(key) == Identity("alice", frozenset({"admin"}))
    with pytest.raises(StartError, match="cannot be the name of a key"):
        entry_text("../alice", key)


@pytest.mark.parametrize("name", ["no", "1.5", "null", "2027-01-31", "-", "a.b_c-D"])
def test_names_that_yaml_would_take_for_something_else(tmp_path: Path, name: str) -> None:
    path = tmp_path / "keys.yaml"
    append_entry(path, entry_text(name, ALICE))
    append_entry(path, entry_text("other", BOB) + "    limits: {sessions: 5}\n")
    assert KeyFile(path).identify(ALICE).tenant == name
    assert KeyFile(path).limits_of("other").sessions == 5


def test_entries_are_added_behind_what_is_there(path: Path) -> None:
    path.chmod(0o640)
    append_entry(path, entry_text("carol", "phi-carol"))
    assert path.read_text().startswith(TEXT)
    assert path.stat().st_mode & 0o777 == 0o640
    assert [entry.name for entry in read_keys(path)] == ["alice", "bob", "carol"]
    before = path.read_text()
    with pytest.raises(StartError, match="carol is there twice"):
        append_entry(path, entry_text("carol", "phi-other"))
    assert path.read_text() == before
    assert [one.name for one in path.parent.iterdir()] == ["keys.yaml"]


def test_where_an_entry_does_not_fit_nothing_changes(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    text = yaml.safe_dump({"keys": []})
    path.write_text(text)
    with pytest.raises(StartError, match="put it there by hand"):
        append_entry(path, entry_text("carol", "phi-carol"))
    assert path.read_text() == text
    with pytest.raises(StartError, match="YAML files only"):
        append_entry(tmp_path / "keys.json", entry_text("carol", "phi-carol"))
