"""Finding the keeper of a node, which may be in one of two places: one keeper follows another under the other's name.

Owns: which of the two was right last. Knows nothing of what the keeper is asked, or of how one follows another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class KeeperFinder:
    """`find(name)` gives a handle; it raises ValueError where there is nobody."""

    def __init__(self, find: Callable[[str], Any], names: Sequence[str]):
        self._find = find
        self._names = list(names)

    def __call__(self) -> Any:
        """The one that was right last, if it is still there. Raises ValueError if there is none."""
        for name in list(self._names):
            try:
                return self._find(name)
            except ValueError:
                # The others first, from now on.
                self.moved()
        raise ValueError("this node has no keeper (yet)")

    def moved(self) -> None:
        """The one that was found last is not in charge."""
        self._names.append(self._names.pop(0))
