"""What multiplies the linears: Transformer Engine's kernels, or our emulation; and every reason against the former.

    precision.backend   takes Transformer Engine
    emulate             never, and does not look for it
    auto                where every quantized linear is one of its own recipes (lowprec/native.py) and it can run here:
                        a policy that it would emulate, too, gains nothing
    te                  for any policy; what stands against it is one error

Versions, architectures, CUDA and cuBLAS are judged by Transformer Engine's own checks. Shapes, and features of this
repository that its layers do not join in, are judged here.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from packaging.specifiers import SpecifierSet

from errors import UsageError
from lowprec.apply import Swap, own_layers
from lowprec.joints import Joint
from lowprec.native import native
from lowprec.policy import PrecisionConfig, Slots, together

VERSIONS = SpecifierSet(">=2.19,<2.21")
INSTALL = "pip install --no-build-isolation -c constraints.txt -e '.[te]'"
DEVICES = ("cuda",)
CUSTOM_MULTIPLE = 16  # what Transformer Engine asks of any GEMM under `autocast`


@dataclass(frozen=True)
class Situation:
    """What a backend is chosen for.

    tables:   resolved slots of every linear, for each phase
    shapes:   linear -> (out features, in features) of the part that a rank has
    tokens:   rows that enter a linear in one micro-batch
    device:   "cuda" or "cpu"
    config:   of the run's precision
    refused:  settings of the recipe outside `precision` that need our own linear, with the reason
    """

    tables: Sequence[Mapping[str, Slots]]
    shapes: Mapping[str, tuple[int, int]]
    tokens: int
    device: str
    config: PrecisionConfig
    refused: Sequence[str] = ()

    def schemes(self) -> dict[Slots, list[str]]:
        """Every distinct quantized six slots of any phase -> its linears."""
        found: dict[Slots, list[str]] = {}
        for table in self.tables:
            for name, slots in table.items():
                if slots.quantized and name not in found.setdefault(slots, []):
                    found[slots].append(name)
        return found


@dataclass(frozen=True)
class Backend:
    """te: whether layers are Transformer Engine's; news: the decision in words, for the log."""

    te: bool
    news: str

    def swap(self, joints: Sequence[Joint], sp: bool) -> Swap:
        """What puts its layers into a model with these `joints`. sp: sequence parallelism."""
        return importlib.import_module("lowprec.te_layers").TeSwap(joints, sp) if self.te else own_layers


def choose(situation: Situation) -> Backend | None:
    """The backend of a run; None where nothing is quantized. Raises UsageError where `te` is asked for in vain."""
    wanted = situation.config.backend
    if not situation.schemes():
        if wanted == "te":
            raise UsageError(
                f"precision.backend is te, but policy {situation.config.policy} quantizes no linear; "
                "choose a policy that does, or backend auto"
            )
        return None
    if wanted == "emulate":
        return Backend(False, "precision.backend emulate: our linears")
    if wanted == "auto" and situation.device not in DEVICES:  # nothing slow is imported in vain
        return Backend(False, f"precision.backend auto: our linears, emulated: {_device(situation)}")
    reasons = not_supported_reasons(situation)
    if not reasons:
        recipes = sorted({str(native(slots) or "CustomRecipe") for slots in situation.schemes()})
        return Backend(True, f"precision.backend {wanted}: Transformer Engine, {', '.join(recipes)}")
    if wanted == "te":
        raise UsageError("\n".join(["precision.backend te cannot run here:", *(f"  {line}" for line in reasons)]))
    return Backend(
        False,
        "\n".join(["precision.backend auto: our linears, emulated, because", *(f"  {line}" for line in reasons)]),
    )


def not_supported_reasons(situation: Situation) -> list[str]:
    """Everything that stands against Transformer Engine, in words; empty if nothing does."""
    found = reasons_of_the_recipe(situation)
    if situation.device not in DEVICES:
        found.append(_device(situation))
    module, problem = load()
    if module is None:
        return [*found, problem]
    recipes = [own.recipe if (own := native(slots)) else "CustomRecipe" for slots in situation.schemes()]
    return [*found, *(f"{recipe}: {why}" for recipe in dict.fromkeys(recipes) if (why := module.why_not(recipe)))]


def reasons_of_the_recipe(situation: Situation) -> list[str]:
    """Those that no machine would change."""
    found, config, misfits = list(situation.refused), situation.config, []
    if not config.pack_saved:
        found.append("precision.pack_saved is false; its layers decide themselves what they keep: use true")
    for slots, names in situation.schemes().items():
        own = native(slots)
        if own is None and config.backend == "auto":
            found.append(f"scheme {slots.scheme} is none of its own recipes; it would be emulated there, too")
        multiple = own.multiple if own else CUSTOM_MULTIPLE
        misfits += _misfits(slots, names, multiple, situation)
        rotated = (spec.hadamard for spec in (slots.wgrad.a,) if spec is not None and spec.hadamard)
        if situation.tokens % (groups := math.lcm(multiple, *rotated)):
            found.append(
                f"a micro-batch has {situation.tokens} tokens, no multiple of {groups} ({slots.scheme}); "
                "change train.micro_batch or train.seq_len"
            )
    return [*found, *together(misfits)]


def load() -> tuple[ModuleType | None, str]:
    """lowprec.te, or why it cannot be imported and what to do about it."""
    try:
        here = version("transformer_engine")
    except PackageNotFoundError:
        return None, f"transformer_engine is not installed; {INSTALL}"
    if not VERSIONS.contains(here, prereleases=True):
        return None, f"transformer_engine {here} is not one of {VERSIONS}, which its quantizers are known of; {INSTALL}"
    try:
        return importlib.import_module("lowprec.te"), ""
    except Exception as error:  # it raises what it likes: no driver, no compiled part, an older cuDNN
        why = (str(error).splitlines() or [type(error).__name__])[0]
        return None, f"transformer_engine {here} cannot be imported ({why}); {INSTALL}"


def _device(situation: Situation) -> str:
    return f"device is {situation.device}; Transformer Engine runs on {' and '.join(DEVICES)}"


def _misfits(slots: Slots, names: Sequence[str], multiple: int, situation: Situation) -> list[tuple[str, str]]:
    """(linear, what a recipe's quantizers would have to pad)."""
    return [
        (
            name,
            f"{size} {side} features on a rank, no multiple of {multiple} ({slots.scheme}); "
            "choose other sizes or a smaller parallel.tp",
        )
        for name in names
        for side, size in zip(("out", "in"), situation.shapes[name], strict=True)
        if size % multiple
    ]
