"""A process of its own that writes and hashes a file in time that nobody else wants: standard input to standard output.

`hashed_file.HandedFile` starts it, as a script that imports nothing of this repository. Standard output is the file,
opened by who started it, so that nothing is created after that one's end. When the input ends it syncs the file and
says on standard error {"size": bytes, "sha256": hex}, or {"errno": number, "strerror": text} where it failed.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys

PIECE = 1 << 20  # bytes


def main() -> None:
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except (AttributeError, OSError):  # not Linux, or not allowed
        os.nice(19)
    try:
        found: dict[str, object] = copy(0, 1)
    except OSError as error:
        found = {"errno": error.errno, "strerror": error.strerror}
    print(json.dumps(found), file=sys.stderr)


def copy(source: int, target: int) -> dict[str, object]:
    """Size and hash of all that is read from one descriptor, once the other one's file holds it."""
    digest, size = hashlib.sha256(), 0
    while piece := os.read(source, PIECE):
        digest.update(piece)
        size += len(piece)
        rest = memoryview(piece)
        while rest:
            rest = rest[os.write(target, rest) :]
    os.fsync(target)
    return {"size": size, "sha256": digest.hexdigest()}


if __name__ == "__main__":
    main()
