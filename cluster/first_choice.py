"""Which replica HAProxy asks first: the one with the fewest connections, or the one that a session's name stands for.

Owns: what Serve writes behind `balance` in HAProxy's configuration. Knows nothing of Serve, and of what a replica does
with a request that belongs to another one (forwarding.py): this saves the second hop, and decides nothing.

A session's turns come to the same replica, whichever node's HAProxy they reach, as long as the same replicas are there.
Requests without the header go round. A bound on a replica's load (`hash-balance-factor`) was tried: where there is
little to do it tears sessions off their replica, and where there is much placement.py sees to it.
"""

from __future__ import annotations

# Serve's own.
LEAST_CONNECTIONS = "leastconn"
# Serve writes it as it is, so it may be several lines.
_BY_SESSION = "hdr({header})\n    hash-type consistent sdbm avalanche"


def balance_lines(session_header: str | None) -> str:
    """For RAY_SERVE_HAPROXY_BALANCE_ALGORITHM; None: sessions do not matter."""
    return LEAST_CONNECTIONS if session_header is None else _BY_SESSION.format(header=session_header)
