"""The environment in which a session actor's process wakes up rarely while it has nothing to do.

Owns: finding the compiled signal_timer.c, and having it loaded first. Knows nothing of actors. Without a compiler at
install, or on another system than Linux, processes wake up as Ray has it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

_EXTENSION = "phi_cluster.cluster.session._signal_timer"
_VARIABLE = "LD_PRELOAD"


def find_library() -> Path | None:
    """Where it lies, or None if it was not built."""
    spec = importlib.util.find_spec(_EXTENSION)
    return Path(spec.origin) if spec is not None and spec.origin else None


def rare_signal_checks(environ: Mapping[str, str], library: Path | None) -> dict[str, str]:
    """What a process is to have in its environment beside `environ`, whose preloaded libraries stay."""
    # The dynamic linker takes a blank or a colon for the end of a name.
    if library is None or set(str(library)) & set(" :"):
        return {}
    return {_VARIABLE: ":".join([str(library), *filter(None, [environ.get(_VARIABLE)])])}
