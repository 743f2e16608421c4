"""Statistics asked for in the shape of Transformer Engine's debug YAML (nvdlfw_inspect), on any hardware.

    anything:
      enabled: true
      layers: {layer_name_regex_pattern: ".*fc1.*"}         # or layer_types: [fc1, qkv]: parts of names
      transformer_engine:
        LogTensorStats:       {enabled: true, tensors: [activation], stats: [max, std], freq: 10, start_step: 100}
        LogFp8TensorStats:    {enabled: true, tensors_struct: [{tensor: gradient, stats: [underflows%, mxfp8_mse]}]}
        LogNvfp4TensorStats:  {enabled: true, tensors: [weight], stats: [mse]}

Layers go by our names and by Megatron-LM's and Transformer Engine's (`aliases`). LogFp8TensorStats without a recipe's
name in a statistic looks at what the GEMM really multiplies, whatever its format; with one (mxfp8_,
fp8_current_scaling_, fp8_block_scaling_) at what that recipe would make of the tensor; `_columnwise` is the copy along
the other axis. fp8_delayed_scaling_ and LogNvfp4TensorStats need a run that quantizes so. Features that change a run
are refused by name: here the recipe does that.

Two things differ: a statistic is of the held micro-batch, and underflow is a share of the numbers that are not zero.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from errors import UsageError
from lowprec.formats import SPECS, QuantSpec
from lowprec.policy import Slots
from lowprec.probe.lab import PRODUCTS, TENSORS, Sample, Wanted
from lowprec.probe.statistics import OperandSums
from lowprec.slots import specs_of

PLAIN = ("min", "max", "mean", "std", "l1_norm", "l2_norm", "cur_amax", "dynamic_range")
BLOCKWISE = "max_blockwise_dynamic_range"
QUANTIZED = {"underflows%": "underflow", "overflows%": "overflow", "mse": "mse"}
QUANTIZED |= {"scale_inv_min": "scale_min", "scale_inv_max": "scale_max"}
COLUMNWISE = {"activation": "wgrad.b", "weight": "dgrad.b", "gradient": "wgrad.a"}
RECIPES: Mapping[str, Mapping[str, str]] = {
    "mxfp8": dict.fromkeys(TENSORS, "mxfp8_e4m3"),
    "fp8_current_scaling": {"activation": "fp8_e4m3", "weight": "fp8_e4m3", "gradient": "fp8_e5m2"},
    "fp8_block_scaling": {
        "activation": "fp8_block_1x128",
        "weight": "fp8_block_128x128",
        "gradient": "fp8_block_1x128",
    },
}
DELAYED = "fp8_delayed_scaling"
FEATURES = ("LogTensorStats", "LogFp8TensorStats", "LogNvfp4TensorStats")
RULES = "a rule in the policy, or precision.keep, decides what is quantized"
REFUSED = {
    "DisableQuantizationGEMM": RULES,
    "DisableQuantizationLayer": RULES,
    "DisableFP8GEMM": RULES,
    "DisableFP8Layer": RULES,
    "DisableFp8Gemm": RULES,
    "DisableFp8Layer": RULES,
    "PerTensorScaling": "a scheme of the policy decides how an operand is scaled (fp8_e4m3)",
    "FakeQuant": "every format is emulated: name it in a scheme of the policy",
    "FakeQuantFp8": "every format is emulated: name it in a scheme of the policy",
    "DumpTensors": "tensors are not written to disk",
    "AutoswitchGemm": "precision.schedule switches GEMMs, at steps that are known beforehand",
}
_OPTIONS = {"enabled", "stats", "tensors", "tensors_struct", "freq", "start_step", "end_step", "start_end_list"}


@dataclass(frozen=True)
class When:
    """Steps (counted from 1, as everywhere here) at which a statistic is recorded."""

    every: int
    windows: tuple[tuple[float, float], ...]

    def due(self, step: int) -> bool:
        return step % self.every == 0 and any(first <= step <= last for first, last in self.windows)


@dataclass(frozen=True)
class Request:
    """One statistic of one tensor of the layers of a section."""

    where: str
    feature: str
    tensor: str
    stat: str
    block: tuple[int, int] | None  # size and dims of BLOCKWISE
    when: When
    matches: Callable[[str], bool]


@dataclass(frozen=True)
class Bound:
    """A request for one layer. name: as Transformer Engine logs it; read: its value from a sample."""

    layer: str
    name: str
    when: When
    read: Callable[[Sample], float | None]


def parse(tree: Any, source: str) -> tuple[Request, ...]:
    """Requests of the content of a YAML file. Raises UsageError naming section, feature and option."""
    if not isinstance(tree, dict):
        raise UsageError(f"{source}: a debug configuration is a map of sections, found {type(tree).__name__}")
    return tuple(request for name, section in tree.items() for request in _section(section, f"{source}: {name}"))


def _section(section: Any, where: str) -> Iterator[Request]:
    _only(section, {"enabled", "layers", "transformer_engine"}, where)
    if not section.get("enabled", True):
        return
    features = section.get("transformer_engine")
    if not isinstance(features, dict):
        raise UsageError(f"{where} has no transformer_engine with features; use {', '.join(FEATURES)}")
    matches = _selector(section.get("layers"), where)
    for name, options in features.items():
        if isinstance(options, dict) and not options.get("enabled", True):
            continue
        if name in REFUSED:
            raise UsageError(f"{where}: {name} is not built; {REFUSED[name]}")
        if name not in FEATURES:
            raise UsageError(f"{where}: unknown feature {name}; there are {', '.join(FEATURES)}")
        _only(options, _OPTIONS, f"{where}.{name}")
        yield from _feature(name, options, f"{where}.{name}", matches)


def _selector(layers: Any, where: str) -> Callable[[str], bool]:
    _only(layers, {"layer_name_regex_pattern", "layer_types"}, f"{where}.layers")
    if len(layers) != 1:
        raise UsageError(f"{where}.layers needs either layer_name_regex_pattern or layer_types")
    if "layer_types" in layers:
        kinds = _strings(layers["layer_types"], f"{where}.layers.layer_types")
        return lambda name: any(kind in alias for kind in kinds for alias in aliases(name))
    try:
        pattern = re.compile(str(layers["layer_name_regex_pattern"]))
    except re.error as error:
        raise UsageError(f"{where}.layers.layer_name_regex_pattern: {error}") from None
    return lambda name: any(pattern.search(alias) for alias in aliases(name))


def aliases(name: str) -> tuple[str, ...]:
    """A linear's name, and what Megatron-LM and Transformer Engine call it."""
    kinds = {
        "attention.qkv": ("self_attention.linear_qkv", "self_attention.layernorm_linear_qkv"),
        "attention.out": ("self_attention.linear_proj", "self_attention.proj"),
        "mlp.gate_up": ("mlp.linear_fc1", "layernorm_mlp.fc1"),
        "mlp.up": ("mlp.linear_fc1", "layernorm_mlp.fc1"),
        "mlp.down": ("mlp.linear_fc2", "layernorm_mlp.fc2"),
        "mamba.in_proj": ("mixer.in_proj",),
        "mamba.out_proj": ("mixer.out_proj",),
    }
    found = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
    if found is None:
        return (name, "output_layer") if name == "lm_head" else (name,)
    return (name, *(f"decoder.layers.{found[1]}.{kind}" for kind in kinds.get(found[2], ())))


def _feature(name: str, options: dict[str, Any], where: str, matches: Callable[[str], bool]) -> Iterator[Request]:
    structs = options.get("tensors_struct")
    if (structs is None) == ("tensors" not in options):
        raise UsageError(f"{where} needs either tensors or tensors_struct")
    if structs is None:
        structs = [{"tensor": tensor} for tensor in _strings(options["tensors"], f"{where}.tensors")]
    allowed = (*TENSORS, *PRODUCTS) if name == "LogTensorStats" else tuple(TENSORS)
    if not isinstance(structs, list):
        raise UsageError(
            f"{where}.tensors_struct is {structs!r}; it must be a list of maps with tensor and its options"
        )
    for struct in structs:
        _only(struct, _OPTIONS - {"enabled", "tensors", "tensors_struct"} | {"tensor"}, f"{where}.tensors_struct")
        merged = {**options, **struct}
        if (tensor := merged.get("tensor")) not in allowed:
            raise UsageError(f"{where}: tensor {tensor!r} has no {name}; use {', '.join(allowed)}")
        stats = merged.get("stats")
        if not isinstance(stats, list) or not stats:
            raise UsageError(f"{where}: stats of {tensor} is {stats!r}; name some")
        for stat in stats:
            word, block = _stat(name, stat, where)
            yield Request(where, name, tensor, word, block, _when(merged, where), matches)


def _stat(feature: str, stat: Any, where: str) -> tuple[str, tuple[int, int] | None]:
    """The name of a statistic, and block size and dims of a blockwise one."""
    if feature == "LogTensorStats":
        if isinstance(stat, dict) and list(stat) == [BLOCKWISE]:
            given = stat[BLOCKWISE] or {}
            _only(given, {"block_size", "dims"}, f"{where}: {BLOCKWISE}")
            size, dims = given.get("block_size", 32), given.get("dims", 1)
            if not (isinstance(size, int) and size > 0 and dims in (1, 2)):
                raise UsageError(
                    f"{where}: {BLOCKWISE} has block_size {size!r}, dims {dims!r}; use a size, and dims 1 or 2"
                )
            return BLOCKWISE, (size, dims)
        if stat in PLAIN:
            return stat, None
        raise UsageError(f"{where}: unknown statistic {stat!r}; there are {', '.join((*PLAIN, BLOCKWISE))}")
    _, word, _ = split(str(stat))
    known = ("underflows%", "mse") if feature == "LogNvfp4TensorStats" else tuple(QUANTIZED)
    if word not in known or feature == "LogNvfp4TensorStats" and word != stat:
        raise UsageError(f"{where}: unknown statistic {stat!r}; there are {', '.join(known)}")
    return stat, None


def split(stat: str) -> tuple[str | None, str, bool]:
    """A statistic's name -> (recipe, bare name, whether it is of the column-wise copy)."""
    bare, columnwise = stat.removesuffix("_columnwise"), stat.endswith("_columnwise")
    recipe = next((name for name in (*RECIPES, DELAYED) if bare.startswith(f"{name}_")), None)
    return recipe, bare.removeprefix(f"{recipe}_") if recipe else bare, columnwise


def _when(options: Mapping[str, Any], where: str) -> When:
    every, pairs = options.get("freq", 1), options.get("start_end_list")
    if pairs is None:
        first, last = options.get("start_step"), options.get("end_step")
        pairs = [(0 if first is None else first, float("inf") if last is None else last)]
    wrong = UsageError(f"{where}: freq is {every!r}, steps {pairs!r}; use a positive number and [start, end] pairs")
    if not isinstance(every, int) or every < 1:
        raise wrong
    try:
        return When(every, tuple((float(first), float(last)) for first, last in pairs))
    except (TypeError, ValueError):
        raise wrong from None


def bind(
    requests: Sequence[Request], names: Sequence[str], tables: Sequence[Mapping[str, Slots]]
) -> tuple[list[Bound], Wanted]:
    """Requests for the linears `names`; and what a sample must hold for them.

    tables: the slots of each linear, phase by phase. While a layer is not quantized as its statistic wants, that is
            None.

    Raises UsageError for a section that reaches no linear, and for a statistic of a format that none has in any phase.
    """
    bounds: list[Bound] = []
    tensors, ranges = set(), set()
    others: dict[tuple[str, str, str], QuantSpec] = {}
    for request in requests:
        reached = [name for name in names if request.matches(name)]
        if not reached:
            raise UsageError(f"{request.where}: layers reach no linear; they are called {', '.join(names[:4])}, ...")
        before = len(bounds)
        for layer in reached:
            if request.block is not None:
                key = (layer, request.tensor, *request.block)
                ranges.add(key)
                bounds.append(_bound(request, layer, lambda sample, key=key: float(sample.ranges[key])))
            elif request.feature == "LogTensorStats":
                tensors.add((layer, request.tensor))
                bounds.append(_bound(request, layer, _tensor_reader(layer, request)))
            elif (reader := _quantized_reader(request, layer, [table[layer] for table in tables], others)) is not None:
                bounds.append(_bound(request, layer, reader))
        if len(bounds) == before:
            raise UsageError(
                f"{request.where}: {request.stat} of {request.tensor}: none of the {len(reached)} layers quantizes it "
                "so; choose a statistic of the policy's own format, or one with a recipe's name (mxfp8_mse)"
            )
    return bounds, Wanted(frozenset(tensors), frozenset(ranges), others, frozenset(bound.layer for bound in bounds))


def _bound(request: Request, layer: str, read: Callable[[Sample], float | None]) -> Bound:
    suffix = "" if request.block is None else f"_block_size_{request.block[0]}_dims_{request.block[1]}"
    return Bound(layer, f"{layer}_{request.tensor}_{request.stat}{suffix}", request.when, read)


def _tensor_reader(layer: str, request: Request) -> Callable[[Sample], float | None]:
    return lambda sample: sample.tensors[layer, request.tensor].record()[request.stat]


def _quantized_reader(
    request: Request, layer: str, phases: Sequence[Slots], others: dict[tuple[str, str, str], QuantSpec]
) -> Callable[[Sample], float | None] | None:
    """None if the layer quantizes the tensor in the format that is asked for in no phase."""
    recipe, word, columnwise = split(request.stat)
    slot = (COLUMNWISE if columnwise else TENSORS)[request.tensor]
    field, percent = QUANTIZED[word], 100.0 if word.endswith("%") else 1.0

    def value_of(sums: OperandSums) -> float | None:
        value = sums.record()[field]
        return percent * float(value) if isinstance(value, (int, float)) else None

    def fits(spec: QuantSpec | None) -> bool:
        if spec is None or recipe == DELAYED and not spec.amax_history:
            return False
        return request.feature != "LogNvfp4TensorStats" or spec.element == "e2m1" and spec.two_level

    if recipe is not None and recipe != DELAYED:
        other = RECIPES[recipe][request.tensor]
        others[layer, slot, other] = SPECS[other]
        return lambda sample: value_of(sample.others[layer, slot, other])
    if not any(fits(specs_of(slots)[slot]) for slots in phases):
        return None
    return lambda sample: value_of(sample.operands[layer, slot]) if fits(sample.specs.get((layer, slot))) else None


def _strings(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise UsageError(f"{where} is {value!r}; it must be a list of names")
    return value


def _only(tree: Any, keys: set[str], where: str) -> None:
    if not isinstance(tree, dict):
        raise UsageError(f"{where} is {tree!r}; it must be a map with {', '.join(sorted(keys))}")
    if unknown := sorted(tree.keys() - keys):
        raise UsageError(f"{where}: unknown key {', '.join(map(str, unknown))}; there are {', '.join(sorted(keys))}")
