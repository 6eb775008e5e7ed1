"""What a hibernated session's file holds, read in any order: for whoever sends it elsewhere.

Owns: finding and checking the pieces that a range lies in. Knows nothing of where files lie, or of who asks; the format
is hibernation_file.py's.
"""

from __future__ import annotations

import io
import os

from phi_cluster.cluster.session import memfd
from phi_cluster.cluster.session.hibernation_file import (
    START_NBYTES,
    TAG_NBYTES,
    Mark,
    PieceCipher,
    check_header,
    check_kept,
    payload_nbytes,
    read_header,
)
from phi_cluster.cluster.session.segment_layout import SegmentLayout


class HibernatedPayload:
    """Several threads may read. Attributes: `header`; `nbytes`, of the used ranges of the segment, joined."""

    # Nothing to close before it is ours.
    _fd = -1

    def __init__(self, fd: int, layout: SegmentLayout, fingerprint: str, digest: str, mark: Mark, cipher: PieceCipher):
        """Takes `fd` over unless it raises: BadHibernation (also if it is of another session, model, layout or state)
        and OSError."""
        self.header, self._packed = read_header(io.FileIO(fd, closefd=False))
        check_header(self.header, layout, layout.identity(fingerprint), digest)
        check_kept(self.header, mark, cipher)
        self.nbytes = payload_nbytes(layout, self.header)
        self._cipher = cipher
        self._start = START_NBYTES + len(self._packed)
        self._fd = fd

    def read_into(self, start: int, into: memoryview) -> None:
        """So many bytes from `start` on. Blocks. Raises BadHibernation and OSError."""
        each = self.header.piece_nbytes
        while len(into):
            number, skip = divmod(start, each)
            length = min(each, self.nbytes - number * each)
            sealed = memoryview(bytearray(length + TAG_NBYTES))
            memfd.read_into(self._fd, sealed, self._start + number * (each + TAG_NBYTES))
            piece = memoryview(self._cipher.open(self._packed, self.header.nonce, number, sealed))
            count = min(length - skip, len(into))
            into[:count] = piece[skip : skip + count]
            start, into = start + count, into[count:]

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        # A descriptor that was forgotten must not keep a deleted file's bytes.
        self.close()
