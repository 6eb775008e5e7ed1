"""A process finds the port that somebody opened for it."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from phi_cluster.cluster.own_port import listening_address


@pytest.mark.parametrize(
    ("family", "bound", "expected"),
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
        (socket.AF_INET, "0.0.0.0", "10.1.2.3"),
        (socket.AF_INET6, "::1", "[::1]"),
        (socket.AF_INET6, "::", "10.1.2.3"),
    ],
)
def test_it_is_found_while_it_listens(family, bound, expected):
    with socket.socket(family) as one:
        try:
            one.bind((bound, 0))
        except OSError:
            pytest.skip("no such addresses here")
        port = one.getsockname()[1]
        assert listening_address(port, port, "10.1.2.3") == ""
        one.listen()
        assert listening_address(port, port, "10.1.2.3") == f"{expected}:{port}"
        assert listening_address(port + 1, port + 1, "10.1.2.3") == ""
    assert listening_address(port, port, "10.1.2.3") == ""


def test_an_ipv6_node_has_its_brackets():
    with socket.socket() as one:
        one.bind(("0.0.0.0", 0))
        one.listen()
        port = one.getsockname()[1]
        assert listening_address(port, port, "fd00::1") == f"[fd00::1]:{port}"


def test_another_process_s_port_is_not_ours():
    code = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        port = int(other.stdout.readline())
        assert listening_address(port, port, "10.1.2.3") == ""
        other.communicate("\n")
