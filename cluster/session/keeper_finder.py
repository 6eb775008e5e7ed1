"""Finding the keeper of a node, which may be in one of two places: one keeper follows another under the other's name.

Owns: the handle of the one that was found last, and which of the two places was right. Knows nothing of what the keeper
is asked, or of how one follows another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class KeeperFinder:
    """`find(name)` gives a handle; it raises ValueError where there is nobody. It is asked again only after `moved` or
    `lost`: each handle takes some 28 KB and a fraction of a millisecond."""

    def __init__(self, find: Callable[[str], Any], names: Sequence[str]):
        self._find = find
        self._names = list(names)
        self._found: Any = None

    def __call__(self) -> Any:
        """The one that was right last. Raises ValueError if there is none."""
        if self._found is None:
            self._found = self._look()
        return self._found

    def moved(self) -> None:
        """The one that was found last is not in charge."""
        self._found = None
        self._names.append(self._names.pop(0))

    def lost(self) -> None:
        """The one that was found last does not answer: it may be dead, and another one be in its place."""
        self._found = None

    def _look(self) -> Any:
        for name in list(self._names):
            try:
                return self._find(name)
            except ValueError:
                # The others first, from now on.
                self.moved()
        raise ValueError("this node has no keeper (yet)")
