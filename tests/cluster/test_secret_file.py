"""A secret is 64 hexadecimal digits in a file that nobody else may read; whatever else it is, is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from phi_cluster.cluster.errors import StartError
from phi_cluster.cluster.secret_file import read_secret


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text("0a" * 32 + "\n")
    path.chmod(0o600)
    return path


def test_it_is_read(path: Path) -> None:
    assert read_secret(path, "a.field") == b"\n" * 32


@pytest.mark.parametrize("text", ["", "0a" * 31, "0a" * 33, "zz" * 32, "ä" * 64])
def test_what_is_no_secret(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(StartError, match=r"a\.field .* must hold 64 hexadecimal digits"):
        read_secret(path, "a.field")


def test_one_that_others_may_read(path: Path) -> None:
    path.chmod(0o640)
    with pytest.raises(StartError, match="chmod 600"):
        read_secret(path, "a.field")


def test_one_that_is_not_there(path: Path) -> None:
    path.unlink()
    with pytest.raises(StartError, match=r"cannot read a\.field"):
        read_secret(path, "a.field")
