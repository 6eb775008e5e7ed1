"""Who may talk to Ray, and that the command that prints its environment says what the server sets."""

from __future__ import annotations

from pathlib import Path

import pytest

from phi_cluster.cluster.cli import main
from phi_cluster.cluster.config import Config, NodesConfig
from phi_cluster.cluster.errors import StartError
from phi_cluster.cluster.ray_environment import environment, token_of

SEVERAL = Config(journal="redis://10.0.0.9/0", nodes=NodesConfig(address="10.0.0.5"))


def with_token(path: Path) -> Config:
    return SEVERAL.model_copy(update={"nodes": NodesConfig(address="10.0.0.5", token_file=path)})


def test_a_server_alone_has_a_token_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    assert len(token_of(Config())) == 64
    assert token_of(Config()) != token_of(Config())


def test_machines_that_others_reach_want_a_token_that_they_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    with pytest.raises(StartError, match=r"set nodes\.token_file .* or RAY_AUTH_TOKEN"):
        token_of(SEVERAL)
    token = tmp_path / "token"
    token.write_text("1f" * 32)
    token.chmod(0o600)
    assert token_of(with_token(token)) == "1f" * 32
    token.chmod(0o644)
    with pytest.raises(StartError, match="chmod 600"):
        token_of(with_token(token))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    assert token_of(SEVERAL) == "given"


def test_a_lost_machine_is_noticed_sooner_where_there_are_several(tmp_path: Path) -> None:
    alone, several = environment(Config(), tmp_path, "t"), environment(SEVERAL, tmp_path, "t")
    assert "RAY_health_check_period_ms" in several
    assert "RAY_health_check_period_ms" not in alone
    assert alone["RAY_AUTH_MODE"] == several["RAY_AUTH_MODE"] == "token"


def test_the_environment_is_printed_without_its_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("journal: redis://10.0.0.9/0")
    assert main(["environment", str(config), "--runtime-dir", "/run/phi"]) == 0
    printed = dict(line.split("=", 1) for line in capsys.readouterr().out.splitlines())
    assert printed.keys() == environment(SEVERAL, tmp_path, "t").keys() - {"RAY_AUTH_TOKEN"}
    assert printed["RAY_SERVE_HAPROXY_SOCKET_PATH"] == "/run/phi/h/a.sock"
