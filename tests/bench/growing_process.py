"""A process that leaks on purpose: so many bytes of private memory for each line that it reads and answers.

    python tests/bench/growing_process.py 4096

The control of a measurement of leaks: started with a server's mark in its environment, it is found and measured like
the server's own processes, and must be told from them.
"""

from __future__ import annotations

import sys


def main() -> None:
    nbytes = int(sys.argv[1])
    kept = []
    for _ in sys.stdin:
        # Written to, so that the pages are really there.
        kept.append(bytearray(b"\1") * nbytes)
        print(flush=True)


if __name__ == "__main__":
    main()
