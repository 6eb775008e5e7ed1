"""How replicas of one cluster know each other: by a proof made from the cluster's token, which every process has.

Owns: the proof of a request (of its path, its receiver, its moment and a digest of its body, so that a stranger's body
is not even read), its one use, and the proof of the answer. Knows nothing of HTTP servers and of what is asked.

The key is made from Ray's token and from our version: a replica of another version is a stranger, too.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

HEADER = "x-phi-peer"
# A request is good for so long after it was made, and so long before (clocks differ).
_WINDOW_SECONDS = 60.0
_NUM_PARTS = 4


@dataclass(frozen=True)
class Proven:
    """A request of a peer's. `digest`: of the body that belongs to it."""

    nonce: str
    digest: str


class ClusterKey:
    """`clock` is wall time in seconds."""

    def __init__(self, token: str, version: str, clock: Callable[[], float] = time.time):
        """Raises ValueError on an empty token: it would be everybody's."""
        if not token:
            raise ValueError("there is no token to make a key from")
        self._key = hmac.digest(token.encode(), b"phi-cluster peers " + version.encode(), "sha256")
        self._clock = clock

    def prove(self, receiver: str, path: str, body: bytes) -> tuple[str, str]:
        """The value of HEADER for a request of this body to the replica named so, and the answer's that will prove that
        it came from there."""
        moment, nonce = str(int(self._clock())), os.urandom(16).hex()
        digest = digest_of(body)
        return " ".join((moment, nonce, digest, self._mac("ask", receiver, path, moment, nonce, digest))), self.answer(
            receiver, nonce
        )

    def answer(self, receiver: str, nonce: str) -> str:
        """The value of HEADER in the answer."""
        return self._mac("answer", receiver, nonce)

    def check(self, receiver: str, path: str, value: str) -> Proven | None:
        """None: it is no proof, or not for this receiver and path, or not of now."""
        parts = value.split(" ")
        if len(parts) != _NUM_PARTS or not value.isascii():
            return None
        moment, nonce, digest, mac = parts
        if not hmac.compare_digest(mac, self._mac("ask", receiver, path, moment, nonce, digest)):
            return None
        if abs(self._clock() - int(moment)) > _WINDOW_SECONDS:
            return None
        return Proven(nonce, digest)

    def _mac(self, *parts: str) -> str:
        return hmac.new(self._key, "\n".join(parts).encode(), "sha256").hexdigest()


class Guard:
    """A replica's: lets each proof in once. For one event loop."""

    def __init__(self, key: ClusterKey, receiver: str, clock: Callable[[], float] = time.monotonic):
        """`receiver`: this replica. `clock` is monotonic, in seconds."""
        self._key = key
        self._receiver = receiver
        self._clock = clock
        # Only of requests with a proof, so no stranger fills it.
        self._used: OrderedDict[str, float] = OrderedDict()

    def admit(self, path: str, value: str | None) -> Proven | None:
        """None: a stranger, or somebody who repeats what a peer has sent."""
        proven = None if value is None else self._key.check(self._receiver, path, value)
        now = self._clock()
        while self._used and next(iter(self._used.values())) <= now:
            self._used.popitem(last=False)
        if proven is None or proven.nonce in self._used:
            return None
        # As long as it could be good, by whichever clock.
        self._used[proven.nonce] = now + 2 * _WINDOW_SECONDS + 1.0
        return proven

    def answer(self, proven: Proven) -> str:
        return self._key.answer(self._receiver, proven.nonce)


def digest_of(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
