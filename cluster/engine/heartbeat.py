"""An engine's sign of life, also in the middle of a step: a thread that tells how far the computing one has come.

Owns: the thread, and sending frames whole from two threads. Knows nothing of what is computed.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

from phi_cluster.cluster.frames import Frame, Heartbeat, encode_frame

HEARTBEAT_SECONDS = 0.5


class FrameSender:
    """The sending half of a connection. For any thread: a frame is sent whole before the next one."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, frame: Frame) -> None:
        """Raises OSError if nobody reads any more."""
        data = encode_frame(frame)
        with self._lock:
            self._connection.sendall(data)


class Pulse:
    """Sends heartbeats until it is stopped, or until nobody reads them, which `on_gone` is told."""

    def __init__(
        self,
        sender: FrameSender,
        look: Callable[[], Heartbeat],
        on_gone: Callable[[], None],
        interval: float = HEARTBEAT_SECONDS,
    ):
        """`look` and `on_gone` are called in the pulse's own thread."""
        self._sender = sender
        self._look = look
        self._on_gone = on_gone
        self._interval = interval
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        # It may be sending something that nobody reads.
        self._thread.join(1.0)

    def _beat(self) -> None:
        while not self._stopped.wait(self._interval):
            try:
                self._sender.send(self._look())
            except OSError:
                self._on_gone()
                return
