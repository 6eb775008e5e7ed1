"""Which replica HAProxy asks first: the one with the fewest connections, or the one that a session's name stands for;
and when it takes one for gone.

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


# A connection to a replica whose machine is cut off would hang for as long as its client waits: it ends after 10 s.
_LOST_MACHINES = ("option srvtcpka", "srvtcpka-idle 4s", "srvtcpka-intvl 2s", "srvtcpka-cnt 3")


def balance_lines(session_header: str | None, *, has_nodes: bool = False) -> str:
    """For RAY_SERVE_HAPROXY_BALANCE_ALGORITHM; `session_header` None: sessions do not matter. `has_nodes`: replicas may
    be on other machines."""
    balance = LEAST_CONNECTIONS if session_header is None else _BY_SESSION.format(header=session_header)
    return "\n    ".join((balance, *(_LOST_MACHINES if has_nodes else ())))
