"""The promises that are kept whatever dies, and what it is to break one.

Owns: their names. Knows nothing of how they are checked.
"""

from __future__ import annotations

from dataclasses import dataclass

PROMISES = {
    "C1": "acknowledged tokens survive",
    "C2": "every position exactly once",
    "C3": "one writer a session",
    "C4": "nothing of one session in another",
    "C5": "one terminal event, in time",
    "C6": "nothing is left behind",
    "C7": "ready means steps",
    "C8": "two engines, not a third",
}


@dataclass(frozen=True)
class Breach:
    """A promise that was broken, and how."""

    promise: str
    what: str
