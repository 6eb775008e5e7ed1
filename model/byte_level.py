"""GPT-2's spelling of bytes as printable characters, which byte-level BPE vocabularies are written in.

Owns: that one table. Knows nothing of vocabularies.
"""

from __future__ import annotations


def _table() -> dict[str, int]:
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


# The byte that a character of a byte-level token stands for; 256 entries.
BYTE_OF_CHAR: dict[str, int] = _table()
