"""A descriptor of a session's memory that its actor owns: so that the memory outlives the actor.

Owns: the descriptor. Knows nothing of what the memory holds; never maps or writes it.
"""

from __future__ import annotations

import os

from phi_cluster.cluster.messages import SegmentRef
from phi_cluster.cluster.session import memfd
from phi_cluster.cluster.session.segment import peek


class HeldMemory:
    """Holds what `ref` names until `close`. Raises SegmentGone or SegmentMismatch."""

    # Nothing to close before it is open.
    _fd = -1

    def __init__(self, ref: SegmentRef):
        self._fd = memfd.open_foreign(ref.pid, ref.fd, writable=True)
        self._nonce = ref.nonce
        try:
            peek(self.ref)
        except BaseException:
            self.close()
            raise

    @property
    def ref(self) -> SegmentRef:
        """How the memory is opened while this process lives and holds it."""
        return SegmentRef(os.getpid(), self._fd, self._nonce)

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        # A descriptor that was forgotten must not keep a conversation's memory.
        self.close()
