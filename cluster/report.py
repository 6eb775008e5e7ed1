"""What a start tells whoever watches.

Owns: the interface. Knows nothing of how it looks, and of what is done.
"""

from __future__ import annotations

from phi_cluster.cluster.preflight import Machine
from phi_cluster.model.model_cache import ProgressEvent


class Report:
    """The methods may be overridden."""

    def checked(self, machine: Machine) -> None:
        """The machine and the configuration are fit."""

    def cleared(self, what: str) -> None:
        """Something that a killed server left was removed."""

    def noted(self, text: str) -> None:
        """Nothing is wrong, but the user may want to know."""

    def progress(self, event: ProgressEvent) -> None:
        """Long work goes on."""

    def started(self, part: str, seconds: float) -> None:
        """A part is up."""
