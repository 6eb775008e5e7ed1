"""Secrets that lie in files: 64 hexadecimal digits that only their owner may read.

Owns: reading one, and what is said of a file that is something else. Knows nothing of what the secret is for.
"""

from __future__ import annotations

from pathlib import Path

from phi_cluster.cluster.errors import StartError

_NBYTES = 32


def read_secret(path: Path, field: str) -> bytes:
    """32 bytes. `field` of the configuration names the file. Raises StartError."""
    try:
        if path.stat().st_mode & 0o077:
            raise StartError(f"{field} {path} may be read by others: chmod 600 it")
        secret = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except OSError as error:
        raise StartError(f"cannot read {field} {path}: {error.strerror}") from None
    except ValueError:
        secret = b""
    if len(secret) != _NBYTES:
        raise StartError(f"{field} {path} must hold {2 * _NBYTES} hexadecimal digits (openssl rand -hex {_NBYTES})")
    return secret
