"""The totals on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from phi_cluster.cluster.session.accounts import UsageTotals
from phi_cluster.cluster.session.usage_file import UsageFile

ALICE, BOB = UsageTotals("alice", 1.5, 1, 2, 3, 4, 5), UsageTotals("bob", 2.0)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite"
    file = UsageFile(path)
    assert file.load() == []
    assert not path.exists()
    file.save([ALICE, BOB])
    newer = UsageTotals("alice", 1.5, 9, 9, 9, 9, 9)
    file.save([newer])
    assert sorted(UsageFile(path).load(), key=lambda one: one.tenant) == [newer, BOB]
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_cannot_be_used_is_an_oserror(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite"
    path.write_bytes(b"not a database, but long enough to be taken for one" * 40)
    with pytest.raises(OSError, match="usage file"):
        UsageFile(path).load()
    with pytest.raises(OSError, match="No such file"):
        UsageFile(tmp_path / "none" / "usage.sqlite").save([ALICE])
