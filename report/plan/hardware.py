"""What a plan assumes of a device and its links: peaks, memory, bandwidths, each with its source; guesses are marked.

Peaks are dense, in FLOP/s; the BF16 ones are those of report/flops.py. Bandwidths are bytes/s, those of links in one
direction. A kernel does not attain a data sheet's number: `attained` are the shares that a plan counts on, guesses
that hold for large matrices. Whoever has measured better says so in a YAML file:

    python train.py --recipe R --plan --gpu mine.yaml        # mine.yaml: {base: h100, attained_gemm: 0.62, inter: 25e9}
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from errors import UsageError
from report.flops import Peak, table_row
from strict_yaml import load_yaml

GUESS = "guessed"
# What Transformer Engine's kernels multiply natively (docs/hardware.md). It has none for MXFP6 and MXFP4, and none of
# this repository's paths are native on AMD.
ADA = frozenset({"fp8_tensor"})
HOPPER = ADA | {"fp8_block"}
BLACKWELL = HOPPER | {"mxfp8", "nvfp4"}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One device, and how it reaches the others.

    peaks:     dense FLOP/s by what is multiplied: bf16, fp8 and fp4 where kernels here take them; fp32 of vector units
    native:    kinds of operands (report/plan/copies.py) that kernels multiply here; others are emulated in BF16
    turns:     whether an FP8 GEMM reads either direction of an operand with one scale
    memory:    bytes; `usable` of them are for tensors: the rest is context, NCCL's buffers, fragmentation
    bandwidth: of its memory
    intra, inter: bytes/s that it sends within its node, and to other nodes
    domain:    devices that reach each other at `intra`; 0: those of a node
    latency:   seconds of one collective or message beside its bytes
    waiting:   measured only: seconds that tensor-parallel ranks wait for each other for each second of work
    launch:    seconds of one operation beside what it computes
    attained_gemm, attained_memory: shares of peaks and of bandwidth that are counted on
    rates:     measured only: kinds of operations -> (bytes or FLOPs of one, bytes/s or FLOP/s) at some sizes
               (report/plan/calibrate.py)
    cores:     measured only: processes that compute at the same time; ranks beyond them share. 0: each has its own
    sources:   field -> where its value is from; `guessed`, if nowhere
    """

    name: str
    device: str
    peaks: Mapping[str, float]
    native: frozenset[str] = frozenset()
    turns: bool = False
    memory: float
    usable: float = 0.9
    bandwidth: float
    intra: float
    inter: float = 50e9
    domain: int = 0
    latency: float = 1e-5
    waiting: float = 0.0
    launch: float = 3e-6
    attained_gemm: float = 0.7
    attained_memory: float = 0.8
    rates: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    cores: int = 0
    sources: Mapping[str, str] = field(default_factory=dict)

    def source(self, name: str) -> str:
        return self.sources.get(name, GUESS)

    def peak(self, element: str) -> Peak:
        """The peak for what is multiplied, with its source."""
        source = self.source("peaks")
        return Peak(self.peaks[element], f"dense {element.upper()} of {self.name}, {source}", source == GUESS)

    def multiplies(self, a: str | None, b: str | None) -> str:
        """What a GEMM of these kinds of operands runs as: bf16, or the wider of two native elements."""
        if a is None or b is None or not {a, b} <= self.native:
            return "bf16"
        return "fp4" if "fp4" in a and "fp4" in b else "fp8"

    def rate(self, name: str, size: float) -> float | None:
        """The measured rate of operations of a kind whose size is nearest; None where it was not measured."""
        measured = self.rates.get(name)
        if not measured:
            return None
        return min(measured, key=lambda pair: abs(math.log(max(pair[0], 1.0) / max(size, 1.0))))[1]


_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
_AMD = "https://www.amd.com/en/products/accelerators/instinct/"


def _gpu(
    name: str,
    device: str,
    sheet: str,
    times: Mapping[str, float],
    fp32_tera: float,
    memory_gb: float,
    bandwidth_tb: float,
    intra_gb: float,
    **more: Any,
) -> Machine:
    """times: peak of an element over BF16's, which report/flops.py has. fp32_tera: of the vector units."""
    row = table_row(device)
    assert row is not None, device
    sources = dict.fromkeys(("peaks", "memory", "bandwidth", "intra"), sheet) | more.pop("sources", {})
    return Machine(
        name=name,
        device=device,
        peaks={"bf16": row[0], "fp32": fp32_tera * 1e12}
        | {element: row[0] * factor for element, factor in times.items()},
        memory=memory_gb * 1e9,
        bandwidth=bandwidth_tb * 1e12,
        intra=intra_gb * 1e9,
        sources=sources,
        **more,
    )


_FP8 = {"fp8": 2.0}
_FP4 = {"fp8": 2.0, "fp4": 4.0}
_ULTRA = _FP4 | {"fp4": 6.0}

GPUS: Mapping[str, Machine] = MappingProxyType(
    {
        machine.name: machine
        for machine in (
            _gpu("a100", "NVIDIA A100", _NVIDIA + "a100/", {}, 19.5, 80, 2.039, 300, inter=25e9),
            _gpu("h100", "NVIDIA H100", _NVIDIA + "h100/", _FP8, 67, 80, 3.35, 450, native=HOPPER),
            _gpu("h200", "NVIDIA H200", _NVIDIA + "h200/", _FP8, 67, 141, 4.8, 450, native=HOPPER),
            _gpu(
                "h20", "NVIDIA H20", "no public page", _FP8, 44, 96, 4.0, 450, native=HOPPER,
                sources=dict.fromkeys(("peaks", "memory", "bandwidth", "intra"), GUESS),
            ),
            _gpu("gh200", "NVIDIA GH200", _NVIDIA + "grace-hopper-superchip/", _FP8, 67, 96, 4.0, 450, native=HOPPER),
            _gpu("b200", "NVIDIA B200", _NVIDIA + "hgx/", _FP4, 75, 180, 7.7, 900, native=BLACKWELL, turns=True),
            _gpu(
                "b300", "NVIDIA B300", _NVIDIA + "hgx/", _ULTRA, 77, 270, 7.7, 900, native=BLACKWELL, turns=True,
                inter=100e9,
            ),
            _gpu(
                "gb200", "NVIDIA GB200", _NVIDIA + "gb200-nvl72/", _FP4, 80, 186, 8.0, 900, native=BLACKWELL,
                turns=True, domain=72,
            ),
            _gpu(
                "gb300", "NVIDIA GB300", _NVIDIA + "gb300-nvl72/", _ULTRA, 80, 279, 8.0, 900, native=BLACKWELL,
                turns=True, domain=72, inter=100e9,
            ),
            _gpu("l40s", "NVIDIA L40S", _NVIDIA + "l40s/", _FP8, 91.6, 48, 0.864, 32, native=ADA, inter=12.5e9),
            _gpu("mi300x", "AMD Instinct MI300X", _AMD + "mi300/mi300x.html", {}, 163.4, 192, 5.3, 448),
            _gpu("mi325x", "AMD Instinct MI325X", _AMD + "mi300/mi325x.html", {}, 163.4, 256, 6.0, 448),
            _gpu("mi355x", "AMD Instinct MI355X", _AMD + "mi350/mi355x.html", {}, 157.3, 288, 8.0, 537),
        )
    }
)  # fmt: skip

# What a YAML file may say, and of which type.
_OWN = ("memory", "usable", "bandwidth", "intra", "inter", "domain", "latency", "launch", "attained_gemm")
_OWN = (*_OWN, "attained_memory", "peaks")


def find_machine(name: str) -> Machine:
    """The GPU `name`, or the one that a YAML file describes. Raises UsageError."""
    if Path(name).suffix in {".yaml", ".yml"}:
        return _from_file(Path(name))
    if name in GPUS:
        return GPUS[name]
    close = difflib.get_close_matches(name, GPUS, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UsageError(
        f"--gpu {name} is no GPU that is known here; {hint}use {', '.join(GPUS)}, or a YAML file (train.py --plan also "
        "takes cpu, which it measures)"
    )


def _from_file(path: Path) -> Machine:
    try:
        tree = load_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read --gpu {path}: {error}") from None
    if not isinstance(tree, dict) or tree.get("base") not in GPUS:
        raise UsageError(f"--gpu {path}: it is a map with `base`, one of {', '.join(GPUS)}, and what differs from it")
    base, own = GPUS[tree.pop("base")], tree
    if unknown := sorted(own.keys() - set(_OWN)):
        raise UsageError(f"--gpu {path}: unknown key {', '.join(unknown)}; there are base, {', '.join(_OWN)}")
    peaks = own.get("peaks", {})
    if not isinstance(peaks, dict) or peaks.keys() - base.peaks.keys():
        raise UsageError(f"--gpu {path}: peaks is {peaks!r}; it maps {', '.join(base.peaks)} to FLOP/s")
    numbers = {key: value for key, value in own.items() if key != "peaks"} | {f"peaks.{k}": v for k, v in peaks.items()}
    for key, value in numbers.items():
        share = key in ("usable", "attained_gemm", "attained_memory")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= (1 if share else 1e30):
            wanted = "a share above 0, at most 1" if share else "a positive number"
            raise UsageError(f"--gpu {path}: {key} is {value!r}; it must be {wanted}")
        if key == "domain" and not isinstance(value, int):
            raise UsageError(f"--gpu {path}: domain is {value!r}; it must be a whole number of devices")
    sources = dict(base.sources) | dict.fromkeys(own, str(path))
    return replace(base, name=path.stem, **(own | {"peaks": dict(base.peaks) | peaks}), sources=sources)
