"""`python -m phi_cluster.model.pack FOLDER DTYPE WEIGHTS INDEX`: packs a checkpoint in a process that then ends.

Owns: the command. It prints `done total` (bytes) as it goes, writes the flat buffer and its index (see
flat_weights.py), and on failure one line `error: ...` with exit status 1. Knows nothing of who called it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from phi_cluster.model.config import Phi3Config
from phi_cluster.model.flat_weights import pack_weights


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    folder, dtype, weights, index = arguments
    last_percent = -1

    def progress(done: int, total: int) -> None:
        nonlocal last_percent
        percent = done * 100 // total
        if percent != last_percent:
            last_percent = percent
            print(done, total, flush=True)

    try:
        config = Phi3Config.from_folder(Path(folder))
        # Threads of our own work on pieces that are too small for torch's.
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        _, packed = pack_weights(Path(folder), config, dtype, progress, Path(weights), num_threads)
        aside = Path(f"{weights}.json")
        aside.write_text(json.dumps(packed.to_dict()))
        aside.rename(index)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: cannot pack {folder} into {weights}: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
