"""An output directory that appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from errors import UsageError


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A temporary directory beside `out` that becomes `out` if the body succeeds, and is removed if it does not.

    Raises UsageError if `out` exists and is not an empty directory.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} exists and is not an empty directory; remove it or choose another one")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary)
        raise


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write one indented JSON object."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
