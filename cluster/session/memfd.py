"""Anonymous sealed memory files: shared memory without a name, freed by the kernel with its last holder.

Owns: the system calls (memfd, seals, punching holes, opening another process's descriptor). Knows nothing of
what the bytes mean. Linux only.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat

PAGE_NBYTES = 4096

# Neither resized by anybody nor unsealed: a mapping can never fault for want of file behind it.
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02
_MAP_FIXED = 0x10


class SegmentGone(OSError):
    """Nothing can be opened at the reference (any more): its holder has ended or let go."""


class SegmentMismatch(ValueError):
    """Something else is at the reference, or a segment of another kind: it must not be touched."""


def create(name: str, nbytes: int) -> int:
    """A new sealed file of `nbytes` zero bytes, none of them in memory yet. Returns its descriptor (the
    caller's to close). `name` is a label that /proc shows, nothing to open it by."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_foreign(pid: int, fd: int, *, writable: bool) -> int:
    """A descriptor of our own on the sealed file that process `pid` holds as `fd`.

    Raises SegmentGone if there is no such process or descriptor (or it became somebody else's), and
    SegmentMismatch if it is not a sealed memory file. Which one it is, the caller must check.
    """
    path = f"/proc/{pid}/fd/{fd}"
    try:
        # Looked at before it is opened: opening a reused descriptor may have effects (a device) or block.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise SegmentMismatch("the descriptor is not a memory file")
        flags = os.O_RDWR if writable else os.O_RDONLY
        own = os.open(path, flags | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as error:
        raise SegmentGone(error.errno, "the KV segment's holder is gone") from None
    try:
        if fcntl.fcntl(own, fcntl.F_GET_SEALS) != SEALS:
            raise SegmentMismatch("the descriptor is a memory file with other seals")
    except OSError:
        os.close(own)
        raise SegmentMismatch("the descriptor is an ordinary file") from None
    except BaseException:
        os.close(own)
        raise
    return own


def nbytes_resident(fd: int) -> int:
    """Bytes of memory (or swap) that the file has: exact, in whole pages."""
    return os.fstat(fd).st_blocks * 512


def read_into(fd: int, view: memoryview, offset: int) -> None:
    """Fill `view` with the file's bytes from `offset` on. Raises OSError, also at the file's end."""
    while len(view):
        count = os.preadv(fd, [view], offset)
        if count == 0:
            raise OSError(errno.EIO, "the memory file ends too early")
        view, offset = view[count:], offset + count


def write_from(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`. Raises OSError, where a store into a mapping would kill the process."""
    while len(data):
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def map_over(view: memoryview, fd: int, offset: int) -> None:
    """In the place of `view`, whole pages of a mapping, there are from now on those of another file, from `offset` on,
    to be read only. They go with the mapping. Raises OSError: then the mapping is to be given up."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    flags = mmap.MAP_SHARED | _MAP_FIXED
    if _mmap(address, len(view), mmap.PROT_READ, flags, fd, offset) != address:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def punch(fd: int, offset: int, length: int) -> None:
    """Give the pages of a range back; it reads as zeros after. Mappings stay valid. Raises OSError."""
    while _fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def _load(name: str) -> ctypes._NamedFuncPointer:
    libc = ctypes.CDLL(None, use_errno=True)
    # musl and 64-bit glibc have off_t of 64 bits under the plain name; glibc has the other name everywhere.
    function: ctypes._NamedFuncPointer = getattr(libc, f"{name}64", None) or getattr(libc, name)
    return function


_fallocate = _load("fallocate")
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fallocate.restype = ctypes.c_int
_mmap = _load("mmap")
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_mmap.restype = ctypes.c_void_p
