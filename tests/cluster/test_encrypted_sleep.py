"""Hibernated caches under a key, and sessions that nobody uses any more, on a real server that is started twice.

The first start has one key. The second one has another, and a limit to how long unused sessions are kept.
"""

from __future__ import annotations

import io
import os
import secrets
import time
from array import array
from contextlib import closing
from dataclasses import replace

import pytest

from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.session.hibernation_file import TAG_NBYTES, PieceCipher, read_header
from phi_cluster.cluster.session.sqlite_journal import SQLiteJournal
from tests.cluster.stored_bytes import digest_of, files_with, memory_file, read_data

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

HOW = [{"temperature": 0.0, "max_tokens": 16}, {"temperature": 1.0, "seed": 11, "max_tokens": 16}]
DAY = 86400.0
# Of a memory: so many pieces of so many bytes, from all over it.
PROBES, PROBE_NBYTES = 200, 24


def test_what_sleeps_is_nobodys_without_the_key_and_what_is_unused_goes(
    launch, make_client, tokenizer, until, tmp_path
):
    key = os.urandom(32)
    secret, forgotten = (Canary(tokenizer) for _ in range(2))
    server = launch({"kv": {"hibernate_key_file": key_file(tmp_path / "key", key)}})
    state_dir = server.state_dir
    with closing(make_client(server)) as client:
        talk, twin = client.conversation("sleeper"), client.conversation("twin")
        for one in (talk, twin):
            one.say(f"Remember {secret.digits}.", **HOW[0])
        memory = next(data for path in client.segments().values() if secret.ids in (data := read_data(path)))
        probes = pieces_of(memory)
        assert len(set(probes)) > PROBES / 2
        sleep(client, talk)
        # Whoever has the key finds all of it there, so the search would find it if it were not encrypted.
        plain = opened(memory_file(state_dir, "sleeper").read_bytes(), key)
        assert all(probe in plain for probe in [secret.ids, *probes])
        assert files_with(state_dir, *probes) == []
        # Only journals know what was said.
        assert {name.partition(".")[2].partition("-")[0] for name in secret.places(state_dir)} == {"sqlite"}

        reply = talk.say("Go on.", **HOW[1])
        assert reply.cached >= talk.replies[0].prompt + talk.replies[0].completion - 1
        assert reply.text == twin.say("Go on.", **HOW[1]).text
        sleep(client, talk)
        expected = twin.say("And then?", **HOW[1]).text
        unused = client.conversation("unused")
        unused.say(f"Remember {forgotten.digits}.", **HOW[0])
        sleep(client, unused)
    server.stop()
    assert memory_file(state_dir, "unused").exists()
    make_older(state_dir, "unused", 40 * DAY)
    assert forgotten.places(state_dir) == [f"{digest_of('unused')}.sqlite"]

    another = {"kv": {"hibernate_key_file": key_file(tmp_path / "another", os.urandom(32))}}
    server = launch({**another, "sessions": {"retention": "30d"}}, state_dir)
    with closing(make_client(server)) as client:
        until(lambda: client.http.get("/v1/sessions/unused").status_code == 404, "the unused session's end")
        assert not list(state_dir.rglob(f"{digest_of('unused')}*"))
        assert forgotten.places(state_dir) == []
        assert sorted(client.sessions()) == ["sleeper", "twin"]
        until(lambda: client.metric("phi_session_retention_deletions_total") == 1, "the metric to count it")

        talk = client.resumed(talk)
        assert client.session("sleeper")["state"] == "hibernated"
        reply = talk.say("And then?", **HOW[1])
        assert (reply.cached, reply.text) == (0, expected)
        assert not memory_file(state_dir, "sleeper").exists()
        until(lambda: client.metric("phi_session_hibernation_failures_total") == 1, "the metric to count it")
        # It sleeps under the new key from now on.
        sleep(client, talk)
        assert talk.say("Good.", **HOW[0]).cached >= reply.prompt + reply.completion - 1
    server.stop()


class Canary:
    """Digits that are nowhere else, and their token ids as they are stored."""

    def __init__(self, tokenizer):
        self.digits = "".join(secrets.choice("123456789") for _ in range(24))
        self.ids = array("i", tokenizer.encode(self.digits)).tobytes()

    def places(self, folder):
        return files_with(folder, self.digits.encode(), self.ids)


def key_file(path, key):
    path.write_text(key.hex())
    path.chmod(0o600)
    return str(path)


def sleep(client, talk):
    asleep = client.http.post(f"/v1/sessions/{talk.session_id}/hibernate").json()
    assert asleep["state"] == "hibernated", asleep
    assert asleep["disk_bytes"] > 0


def pieces_of(memory):
    """Some that are no zeros: those would be found anywhere."""
    step = len(memory) // PROBES
    pieces = [memory[start : start + PROBE_NBYTES] for start in range(step, len(memory) - PROBE_NBYTES, step)]
    return [piece for piece in pieces if len(set(piece)) > PROBE_NBYTES / 2]


def opened(stored, key):
    """All that an encrypted file holds."""
    file = io.BytesIO(stored)
    header, packed = read_header(file)
    assert header.is_encrypted
    cipher, found, number = PieceCipher(key), b"", 0
    while sealed := file.read(header.piece_nbytes + TAG_NBYTES):
        found += cipher.open(packed, header.nonce, number, memoryview(sealed))
        number += 1
    return found


def make_older(state_dir, session_id, seconds):
    """The session of a stopped server as if its turns had been so long ago."""
    at = time.time() - seconds
    journal = SQLiteJournal(state_dir, SessionKey("default", session_id), "", lambda: at)
    turns = [replace(turn, committed_at=at) for turn in journal.load()]
    fingerprint = journal.info().fingerprint
    journal.delete()
    journal.fill(turns, fingerprint)
    journal.close()
