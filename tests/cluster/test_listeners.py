"""What a real server listens on is what README's table says, and no more; Ray's ports refuse whoever has no token."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest

pytestmark = pytest.mark.cluster

README = (Path(__file__).parent.parent.parent / "README.md").read_text()
# Calls of what Ray's and Serve's processes offer each other; each port knows some of them.
CALLS = (
    "/ray.rpc.CoreWorkerService/Exit",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.ReporterService/HealthCheck",
    "/ray.serve.ASGIService/HandleRequest",
)


class Row(NamedTuple):
    """Of the table: whose name begins so, from which port to which (None: any), and at which address."""

    processes: tuple[str, ...]
    first: int | None
    last: int | None
    address: str


class Listener(NamedTuple):
    process: str
    pid: int
    address: str
    port: int

    def fits(self, row: Row) -> bool:
        is_its = any(self.process.startswith(name) for name in row.processes)
        in_range = row.first is None or row.last is None or row.first <= self.port <= row.last
        return is_its and in_range and self.address == row.address


def listeners(processes: list[Any]) -> list[Listener]:
    """Of these processes, each port once."""
    owners: dict[str, Any] = {}
    for process in processes:
        for link in Path(f"/proc/{process.pid}/fd").iterdir():
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("socket:["):
                owners.setdefault(target[8:-1], process)
    found = []
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in owners:
                address, _, port = fields[1].partition(":")
                process = owners[fields[9]]
                found.append(Listener(_name(process.name), process.pid, _address(address), int(port, 16)))
    return found


def _address(words: str) -> str:
    """As the kernel writes it: 32-bit words in the machine's order."""
    data = b"".join(bytes.fromhex(words[i : i + 8])[::-1] for i in range(0, len(words), 8))
    if not any(data):
        return "all"
    address = ipaddress.ip_address(data)
    return str(address) if address.is_loopback else "the machine's"


def _name(command: str) -> str:
    return Path(command.split()[0]).name if not command.startswith("ray::") else command


def table(server: Any) -> list[Row]:
    """README's, for this server."""
    values = {
        "server.port": server.port,
        "server.metrics_port": server.metrics_port,
        "server.internal_ports": server.internal_ports,
        "server.host": "127.0.0.1",
        "server.metrics_host": "127.0.0.1",
        "loopback": "127.0.0.1",
    }
    section = README.partition("### What listens where")[2].partition("\n### ")[0]
    rows = []
    for line in section.splitlines():
        if not line.startswith("| `"):
            continue
        who, ports, address = (cell.strip() for cell in line.strip("|").split("|")[:3])
        named = re.findall(r"`([^`]+)`", who)
        if "on several machines only" in who:
            continue
        first: Any = None
        last: Any = None
        if ports.isdigit():
            first = last = int(ports)
        elif ports != "any":
            match = re.fullmatch(r"`([^`]+)`(?: (\+|to \+) (\d+))?", ports)
            assert match, ports
            first = last = values[match[1]]
            if match[2]:
                last = first + int(match[3])
                first = first if match[2] == "to +" else last
        rows.append(Row(tuple(named), first, last, str(values.get(address.strip("`"), address))))
    return rows


@pytest.fixture(scope="module")
def server(launch: Callable[..., Any]) -> Iterator[Any]:
    server = launch({"engine": {"num_threads": 1, "standby_engines": 0}})
    yield server
    server.stop()


def test_what_listens_is_what_readme_says(server: Any, client: Any) -> None:
    # All kinds of processes are there.
    client.conversation("listened").say("Hello.", max_tokens=2)
    client.with_actor("listened")
    found, rows = listeners(server.processes()), table(server)
    unknown = [one for one in found if not any(one.fits(row) for row in rows)]
    assert not unknown, unknown
    # And nothing is in the table that is not so.
    missing = [row for row in rows if not any(one.fits(row) for one in found)]
    # Another Ray of this machine may have the agent's and the autoscaler's port.
    missing = [row for row in missing if row.processes not in (("ray::DashboardAgent",), ("python",))]
    assert not missing, missing


def test_rays_ports_refuse_whoever_has_no_token(server: Any) -> None:
    anyones = [row for row in table(server) if row.first is not None]
    ports = [one for one in listeners(server.processes()) if not any(one.fits(row) for row in anyones)]
    ports = [one for one in ports if one.address == "all"]
    assert len(ports) > 5
    for one in ports:
        answers = [_code(one.port, call) for call in CALLS]
        if set(answers) == {grpc.StatusCode.UNAVAILABLE} and one not in listeners(server.processes()):
            # An idle worker of Ray's has ended meanwhile.
            continue
        assert grpc.StatusCode.UNAUTHENTICATED in answers, (one, answers)
        assert set(answers) <= {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED}, (one, answers)


def _code(port: int, call: str) -> grpc.StatusCode:
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=(("grpc.enable_http_proxy", 0),)) as channel:
        try:
            channel.unary_unary(call)(b"", timeout=20)
        except grpc.RpcError as error:
            code = error.code()  # type: ignore[attr-defined]
            assert isinstance(code, grpc.StatusCode)
            return code
    return grpc.StatusCode.OK
