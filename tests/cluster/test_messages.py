"""No representation shows what was said, and a session's digest is its own."""

from __future__ import annotations

import dataclasses
import random
import string
from typing import Any

import pytest

from phi_cluster.cluster.messages import BeginTurn, CommitTurn, ProcessId, SegmentRef, SessionKey, TurnGrant


def test_no_representation_shows_prompts_replies_or_ids() -> None:
    key, secret = SessionKey("tenant", "demo"), "my secret words"
    messages: list[Any] = [
        BeginTurn(key, "r", secret),
        CommitTurn(
            key, 1, "r", 0, 0, b"424242", secret, ((1, 1),), 1, 0, 1, "stop", {"logit_bias": [[424242, 1]]}, 0.0
        ),
    ]
    for message in messages:
        shown = repr(message)
        assert type(message).__name__ in shown
        assert "secret" not in shown
        assert "424242" not in shown


def test_messages_cannot_be_changed() -> None:
    grant = TurnGrant(SessionKey("t", "s"), 1, SegmentRef(1, 2, b"n"), 0, 0, None, 0, 0, 0, 0, 1)
    for message, name in ((grant, "epoch"), (ProcessId(1, 2), "pid"), (grant.key, "tenant")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(message, name, 0)


def test_digests_are_distinct_stable_and_fit_for_file_names() -> None:
    rng = random.Random(4)

    def word() -> str:
        return "".join(rng.choices(string.ascii_letters + "._:-/ é", k=rng.randrange(0, 6)))

    keys = {SessionKey(word(), word(), rng.random() < 0.5) for _ in range(5000)}
    digests = {key.digest for key in keys}
    assert len(digests) == len(keys)
    assert all(len(digest) == 32 and set(digest) <= set("0123456789abcdef") for digest in digests)
    # Names of files and actors that exist already depend on it.
    assert SessionKey("tenant", "demo").digest == "e17682c7f0b33cabba5c1544afade887"


def test_parts_of_a_key_do_not_run_into_each_other() -> None:
    assert SessionKey("ab", "c").digest != SessionKey("a", "bc").digest
    assert SessionKey("a", "b", ephemeral=True).digest != SessionKey("a", "b").digest
    assert SessionKey("", "nb").digest != SessionKey("n", "b").digest
