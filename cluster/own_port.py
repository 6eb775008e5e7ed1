"""Where this process listens: Serve opens a replica's port after the replica is built, and does not tell it which.

Owns: finding the port among the process's own sockets. Knows nothing of Serve and of what is said there.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

_LISTEN = "0A"


def listening_address(first_port: int, last_port: int, node_ip: str, proc: Path = Path("/proc/self")) -> str:
    """host:port of this process's first listening TCP port in the range, as other nodes reach it; "" while there is
    none. `node_ip` is said for one that listens on all interfaces."""
    inodes = set(_sockets(proc))
    for table in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            host, _, port = fields[1].partition(":")
            number = int(port, 16)
            if fields[3] == _LISTEN and first_port <= number <= last_port and fields[9] in inodes:
                return f"{_host(host, node_ip)}:{number}"
    return ""


def _sockets(proc: Path) -> Iterator[str]:
    """Inodes of the process's sockets."""
    folder = proc / "fd"
    for name in os.listdir(folder):
        try:
            target = os.readlink(folder / name)
        except OSError:
            # Closed since it was listed.
            continue
        if match := re.fullmatch(r"socket:\[(\d+)\]", target):
            yield match[1]


def _host(told: str, node_ip: str) -> str:
    """From the kernel's form: 32-bit words in the machine's order."""
    data = b"".join(bytes.fromhex(told[first : first + 8])[::-1] for first in range(0, len(told), 8))
    if not any(data):
        return f"[{node_ip}]" if ":" in node_ip else node_ip
    if len(data) == 4:
        return socket.inet_ntop(socket.AF_INET, data)
    return f"[{socket.inet_ntop(socket.AF_INET6, data)}]"
