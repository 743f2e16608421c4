"""Build and load the C++ kernels on first use.

The sources in `cpu/` become one shared library in torch's cache of extensions, under a name that carries a hash of the
sources, of the flags and of torch's version: a changed source is a new name, and an old library is never loaded. Each
instruction set has its own file, which asks the compiler for it by itself, so that one library serves every machine of
its architecture. Several ranks may start at once: the first one builds under a file lock, the others wait for it.

Flags: contraction into fused multiply-adds would change results; -fno-math-errno does not. Without -fopenmp torch's
parallel_for, which is a header, runs on one thread and says nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import shutil
import sys
import time
from functools import cache
from pathlib import Path

import torch
from torch.utils import cpp_extension

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "cpu"
# Apple's compiler has no OpenMP of its own.
OPENMP = ("-fopenmp",) if sys.platform == "linux" else ()
FLAGS = ("-O3", "-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi", *OPENMP)


def library_name() -> str:
    """Name of the library that the sources at hand would give."""
    digest = hashlib.sha256(repr((FLAGS, torch.__version__)).encode())
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".cpp", ".h"):
            digest.update(source.name.encode() + source.read_bytes())
    return f"lowprec_kernels_{digest.hexdigest()[:12]}"


def _build(name: str) -> None:
    """Load the library `name`, compiling it first if the cache has none. Raises what went wrong."""
    directory = Path(cpp_extension._get_build_directory(name, verbose=False))
    library = directory / f"{name}.so"
    with (directory / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            if shutil.which(cpp_extension.get_cxx_compiler()) is None:
                raise RuntimeError(f"there is no C++ compiler ({cpp_extension.get_cxx_compiler()}) on the PATH")
            log.warning(
                "building the CPU kernels with %s, once, one to three minutes", cpp_extension.get_cxx_compiler()
            )
            # Left behind by a build that was killed: we hold the lock of our own, so nobody builds.
            (directory / "lock").unlink(missing_ok=True)
            start = time.perf_counter()
            cpp_extension.load(
                name,
                [str(source) for source in sorted(SOURCES.glob("*.cpp"))],
                extra_cflags=list(FLAGS),
                extra_ldflags=list(OPENMP),
                build_directory=str(directory),
                is_python_module=False,
            )
            log.warning("built the CPU kernels in %.0f s: %s", time.perf_counter() - start, library)
            return
    torch.ops.load_library(str(library))


@cache
def load() -> str | None:
    """Load the kernels, building them if need be. None, or why they are not available (warned about once)."""
    try:
        _build(library_name())
    except (OSError, RuntimeError, ImportError) as error:
        lines = str(error).strip().splitlines()
        reason = next((line for line in lines if "error:" in line), lines[0])
        log.warning(
            "the fused CPU kernels are not available (%s); quantization takes the plain path, several times slower. "
            "Install a C++20 compiler (g++ 11 or newer) and ninja",
            reason,
        )
        return reason
    return None
