"""Scoped, verified substitution of a name inside a third-party module.

Behaviour in somebody else's class is never edited. We write an ordinary subclass and substitute only the
*name that a constructor looks up*, only while that constructor runs:

    with applied(Patch(dist="deepspeed", requires=">=0.19.8,<0.20", ...)):
        engine, *_ = deepspeed.initialize(...)

Afterwards the module is as it was and the behaviour lives in the subclass. Versions lie (development builds,
forks), source does not: each patch also carries a fingerprint of every upstream method that it relies on, and
a drifted upstream is an error that says what to read again, never a silent fallback to unpatched behaviour.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from packaging.specifiers import SpecifierSet

from errors import UsageError

log = logging.getLogger(__name__)


class PatchError(UsageError):
    """A patch does not fit the installed library. Never downgraded to a warning."""


@dataclass(frozen=True, kw_only=True)
class Patch:
    """Replace `module.name` by `build(original)`; nothing happens until it is entered.

    dist:       distribution whose version is checked, e.g. "deepspeed"
    requires:   PEP 440 specifier that the patch was tested with
    module:     module whose namespace is looked up at call time
    name:       attribute to substitute
    build:      original -> replacement (a subclass or a wrapper)
    relies_on:  method of the original -> `fingerprint` of its source when the patch was written
    why:        one sentence for the run's log
    """

    dist: str
    requires: str
    module: str
    name: str
    build: Callable[[Any], Any]
    why: str
    relies_on: dict[str, str] = field(default_factory=dict)

    def check(self) -> Any:
        """Return the original, or raise PatchError saying exactly what drifted."""
        target = f"{self.module}.{self.name}"
        have = version(self.dist)
        if not SpecifierSet(self.requires, prereleases=True).contains(have):
            raise PatchError(
                f"{target} is patched for {self.dist} {self.requires}, found {have}; install a version in that range"
            )
        original = getattr(importlib.import_module(self.module), self.name, None)
        if original is None:
            raise PatchError(f"{target} is gone in {self.dist} {have}; the patch must be written anew")
        for member, expected in self.relies_on.items():
            method = getattr(original, member, None)
            found = "absent" if method is None else fingerprint(method)
            if found != expected:
                raise PatchError(
                    f"{target}.{member} changed upstream in {self.dist} {have} ({expected} -> {found}): "
                    "read it again, test the patch, then update its fingerprint"
                )
        return original


def fingerprint(function: Callable[..., Any]) -> str:
    """First 12 hex digits of the SHA-1 of a function's source text."""
    return hashlib.sha1(inspect.getsource(_undecorated(function)).encode()).hexdigest()[:12]


def _undecorated(function: Callable[..., Any]) -> Callable[..., Any]:
    """The one function that a decorator without functools.wraps closes over (DeepSpeed's instrument_w_nvtx)."""
    cells = getattr(function, "__closure__", None) or ()
    hidden = [cell.cell_contents for cell in cells if inspect.isfunction(cell.cell_contents)]
    return _undecorated(hidden[0]) if len(hidden) == 1 else function


@contextmanager
def applied(*patches: Patch) -> Iterator[None]:
    """Check every patch, then substitute all names; restore them in reverse order, whatever happens."""
    targets = [(patch.module, patch.name) for patch in patches]
    if twice := sorted({f"{m}.{n}" for m, n in targets if targets.count((m, n)) > 1}):
        raise PatchError(f"two patches claim the same name: {', '.join(twice)}")
    originals = [patch.check() for patch in patches]  # all or nothing: no half-patched process
    with ExitStack() as stack:
        for patch, original in zip(patches, originals, strict=True):
            module = importlib.import_module(patch.module)
            stack.callback(setattr, module, patch.name, original)
            setattr(module, patch.name, patch.build(original))
            log.debug("patched %s.%s: %s", patch.module, patch.name, patch.why)
        yield
