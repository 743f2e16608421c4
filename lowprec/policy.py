"""Which operand of which GEMM of which linear gets which format: six slots, rules over names, a schedule over steps.

    GEMM    computes        a    b
    fprop   y  = x  w^T     x    w
    dgrad   dx = dy w       dy   w
    wgrad   dw = dy^T x     dy   x

A policy is data (recipes/precision/*.yaml): schemes say *how* (six slots by name), rules say *where* (globs over module
names, first match wins). It resolves once, against all linears of the whole model, to {name: Slots}: a rule that
reaches no linear (but "*", the rest), a linear that no rule covers and an unknown scheme are errors. `None` in a slot
is BF16.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from errors import UsageError
from lowprec.formats import QuantSpec, resolve_spec

GEMMS = ("fprop", "dgrad", "wgrad")
HIGH = "bf16"  # the scheme and the operand that is not quantized


@dataclass(frozen=True)
class Gemm:
    """Formats of the two operands of one GEMM, in the order in which it multiplies them; None: BF16."""

    a: QuantSpec | None = None
    b: QuantSpec | None = None


@dataclass(frozen=True)
class Slots:
    """The three GEMMs of one linear, and the name of the scheme that they come from."""

    scheme: str
    fprop: Gemm = Gemm()
    dgrad: Gemm = Gemm()
    wgrad: Gemm = Gemm()

    @property
    def quantized(self) -> bool:
        """Whether any operand is not BF16."""
        return any(gemm != Gemm() for gemm in (self.fprop, self.dgrad, self.wgrad))


@dataclass(frozen=True, kw_only=True)
class Phase:
    """From a point of the run on, other slots for every linear that the policy quantizes.

    start:  first step of the phase: a step, or a fraction of train.steps if below 1
    tokens: instead of start: the phase begins at the step that starts with this many tokens consumed
    fprop, dgrad, wgrad: scheme whose GEMM is used from then on (bf16: not quantized); null: as before
    """

    start: float | None = None
    tokens: int | None = None
    fprop: str | None = None
    dgrad: str | None = None
    wgrad: str | None = None

    def first_step(self, steps: int, tokens_per_step: int) -> int:
        """The 0-based step at which it begins."""
        if self.tokens is not None:
            return -(-self.tokens // tokens_per_step)
        assert self.start is not None, "refused by PrecisionConfig.problems"
        return round(self.start * steps) if self.start < 1 else round(self.start)


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Linears whose name matches the glob `match` keep these GEMMs in BF16, whatever the policy and its phases say."""

    match: str
    gemms: tuple[Literal["fprop", "dgrad", "wgrad"], ...] = GEMMS

    def reaches(self, table: Mapping[str, Slots]) -> list[str]:
        """The linears of `table` of which it changes something."""
        return [
            name
            for name, slots in table.items()
            if fnmatchcase(name, self.match) and any(getattr(slots, gemm) != Gemm() for gemm in self.gemms)
        ]


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Precision of the linears' GEMMs.

    policy:       a name in recipes/precision/ or the path of such a file
    backend:      emulate: quantize and dequantize around BF16 GEMMs; te: Transformer Engine's layers, or an error with
                  all reasons; auto: te where it has native GEMMs for every quantized linear, else emulate
    bf16_first:   this many first blocks stay in BF16
    bf16_last:    this many last blocks stay in BF16
    keep:         linears, or GEMMs of them, that stay in BF16 (what `python -m report.probe` proposes)
    schedule:     phases with other slots, in order
    wgrad_output: precision in which a weight gradient leaves its GEMM; it is accumulated in FP32 either way; with te
                  and fp32 the GEMM adds to the accumulator itself
    pack_saved:   keep the wgrad copy of each linear's input packed (codes and scales) until the backward
    """

    policy: str = HIGH
    backend: Literal["auto", "te", "emulate"] = "auto"
    bf16_first: int = 0
    bf16_last: int = 0
    keep: tuple[Keep, ...] = ()
    schedule: tuple[Phase, ...] = ()
    wgrad_output: Literal["bf16", "fp32"] = "bf16"
    pack_saved: bool = True

    def problems(self) -> list[str]:
        found = [
            f"{key} is {getattr(self, key)}; it must not be negative"
            for key in ("bf16_first", "bf16_last")
            if getattr(self, key) < 0
        ]
        if self.policy == HIGH:
            found += [
                f"{key} is set, but policy {HIGH} quantizes nothing that it could apply to; choose a policy, or drop it"
                for key in ("bf16_first", "bf16_last", "keep", "schedule")
                if getattr(self, key)
            ]
            if not self.pack_saved:
                found.append(f"pack_saved is false, but policy {HIGH} packs nothing; choose a policy, or drop it")
        for index, phase in enumerate(self.schedule):
            if (phase.start is None) == (phase.tokens is None):
                found.append(f"schedule[{index}] needs either start or tokens")
            if not any(getattr(phase, gemm) for gemm in GEMMS):
                found.append(f"schedule[{index}] changes nothing; name a scheme for fprop, dgrad or wgrad")
        return found


@dataclass(frozen=True)
class Rule:
    """Linears whose name matches the glob `match` use the scheme `use`; first, last: only within those blocks."""

    match: str
    use: str
    first: int | None = None
    last: int | None = None

    def covers(self, name: str, num_blocks: int) -> bool:
        if not fnmatchcase(name, self.match):
            return False
        if self.first is None and self.last is None:
            return True
        block = re.match(r"layers\.(\d+)\.", name)
        if block is None:
            return False
        index = int(block[1])
        return index < (self.first or 0) or index >= num_blocks - (self.last or 0)


@dataclass(frozen=True)
class Policy:
    """Schemes by name, and ordered rules."""

    schemes: Mapping[str, Slots]
    rules: tuple[Rule, ...]

    def resolve(self, names: Sequence[str], num_blocks: int) -> dict[str, Slots]:
        """{name of a linear: its slots}. Raises UsageError for a gap, a dead rule or an unknown scheme."""
        if unknown := sorted({rule.use for rule in self.rules} - self.schemes.keys()):
            raise UsageError(f"precision rules use unknown schemes {unknown}; there are {sorted(self.schemes)}")
        used: set[int] = set()
        table: dict[str, Slots] = {}
        for name in names:
            found = next((i for i, rule in enumerate(self.rules) if rule.covers(name, num_blocks)), None)
            if found is None:
                raise UsageError(f"no precision rule covers {name!r}; end the list with match: '*'")
            used.add(found)
            table[name] = self.schemes[self.rules[found].use]
        # A last "*" is for the rest, which may be nothing; every other rule was meant for something.
        rests = [rule for rule in self.rules if rule.match == "*" and rule.first is None and rule.last is None]
        meant = self.rules[:-1] if len(rests) == 1 and rests[0] is self.rules[-1] else self.rules
        if dead := [str(asdict(rule)) for i, rule in enumerate(meant) if i not in used]:
            raise UsageError(f"precision rules that reach no linear (mend or delete them): {'; '.join(dead)}")
        return table

    def with_bf16_blocks(self, first: int, last: int) -> Policy:
        """The same policy with the first and last blocks kept in BF16, before any other rule."""
        keep = (Rule("layers.*", HIGH, first=first, last=last),) if first or last else ()
        return Policy(self.schemes, (*keep, *self.rules))

    def at(self, table: Mapping[str, Slots], phase: Phase) -> dict[str, Slots]:
        """`table` from the beginning of `phase` on: its GEMMs replaced in every linear that is quantized."""
        changes = {gemm: use for gemm in GEMMS if (use := getattr(phase, gemm)) is not None}
        if unknown := sorted(set(changes.values()) - self.schemes.keys()):
            raise UsageError(f"precision.schedule uses unknown schemes {unknown}; there are {sorted(self.schemes)}")
        label = ", ".join(f"{gemm} {use}" for gemm, use in changes.items())
        return {
            name: Slots(
                f"{slots.scheme} ({label})",
                *(getattr(self.schemes[changes[g]] if g in changes else slots, g) for g in GEMMS),
            )
            if slots.quantized
            else slots
            for name, slots in table.items()
        }


def kept(table: Mapping[str, Slots], keeps: Iterable[Keep]) -> dict[str, Slots]:
    """`table` with the GEMMs of `keeps` in BF16."""
    found = dict(table)
    for keep in keeps:
        for name in keep.reaches(table):
            slots = replace(found[name], **{gemm: Gemm() for gemm in keep.gemms})
            high = [g for g in GEMMS if getattr(slots, g) == Gemm() != getattr(table[name], g)]
            scheme = f"{table[name].scheme} ({', '.join(high)} {HIGH})" if slots.quantized else HIGH
            found[name] = replace(slots, scheme=scheme)
    return found


def parse(tree: Any, source: str) -> Policy:
    """A policy from the content of its YAML file.

        schemes:
          mine:
            fprop: {a: mxfp8_e4m3, b: mxfp8_e4m3}       # a GEMM that is left out is BF16
            dgrad: {a: {spec: mxfp8_e5m2, rounding: stochastic}, b: mxfp8_e4m3}
        rules:
          - {match: lm_head, use: bf16}
          - {match: "*", use: mine}

    Raises UsageError naming the file and the place.
    """
    _only(tree, {"description", "schemes", "rules"}, source)
    schemes = {HIGH: Slots(HIGH)}
    for name, gemms in (tree.get("schemes") or {}).items():
        where = f"{source}: schemes.{name}"
        _only(gemms, set(GEMMS), where)
        if name == HIGH:
            raise UsageError(f"{where}: this name means not quantized; choose another")
        schemes[name] = Slots(name, **{gemm: _gemm(slots, f"{where}.{gemm}") for gemm, slots in gemms.items()})
    rules = []
    for index, rule in enumerate(tree.get("rules") or ()):
        where = f"{source}: rules[{index}]"
        _only(rule, {"match", "use", "first", "last"}, where)
        if not {"match", "use"} <= rule.keys():
            raise UsageError(f"{where} needs match and use")
        for key, kind in (("match", str), ("use", str), ("first", int), ("last", int)):
            if type(rule.get(key)) not in (kind, type(None)):
                raise UsageError(f"{where}.{key} is {rule[key]!r}; it must be {kind.__name__}")
        rules.append(Rule(**rule))
    return Policy(schemes, tuple(rules))


def _gemm(tree: Any, where: str) -> Gemm:
    _only(tree, {"a", "b"}, where)
    gemm = Gemm(**{slot: _spec(value, f"{where}.{slot}") for slot, value in tree.items()})
    turns = [(spec.hadamard, spec.signs) if spec and spec.hadamard else None for spec in (gemm.a, gemm.b)]
    if turns[0] != turns[1]:
        raise UsageError(
            f"{where} rotates a by {turns[0]} and b by {turns[1]} (hadamard size, signs); both operands need the same"
        )
    return gemm


def _spec(value: Any, where: str) -> QuantSpec | None:
    try:
        if isinstance(value, str):
            return None if value == HIGH else resolve_spec(value)
        if isinstance(value, dict) and isinstance(value.get("spec"), str):
            return resolve_spec(value["spec"], **{key: item for key, item in value.items() if key != "spec"})
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    raise UsageError(f"{where} is {value!r}; write the name of a format, or {{spec: NAME, option: value}}")


def _only(tree: Any, keys: set[str], where: str) -> None:
    if not isinstance(tree, dict):
        raise UsageError(f"{where} is {tree!r}; it must be a map with {', '.join(sorted(keys))}")
    if unknown := sorted(tree.keys() - keys):
        raise UsageError(f"{where}: unknown key {', '.join(unknown)}; there are {', '.join(sorted(keys))}")


def table_to_dict(table: Mapping[str, Slots]) -> dict[str, Any]:
    """A resolved table as JSON would give it back: saved in each checkpoint, compared on resume."""
    return {name: json.loads(json.dumps(asdict(slots))) for name, slots in table.items()}


def describe(table: Mapping[str, Slots]) -> str:
    """The resolved table for people: linears of one scheme together, then what each slot of a scheme is."""
    lines = []
    for scheme, slots in {slots.scheme: slots for slots in table.values()}.items():
        names = [name for name, each in table.items() if each.scheme == scheme]
        lines.append(f"{scheme}: {len(names)} of {len(table)} linears: {brief(names)}")
        if slots.quantized:
            lines += [
                f"    {gemm}  a {words_of(g.a)}  b {words_of(g.b)}" for gemm in GEMMS for g in [getattr(slots, gemm)]
            ]
    return "\n".join(lines)


def brief(names: Iterable[str]) -> str:
    """layers.0.mlp.down, layers.1.mlp.down, lm_head -> layers.{0-1}.mlp.down, lm_head."""
    blocks: dict[str, list[int]] = {}
    for name in names:
        found = re.match(r"layers\.(\d+)\.(.*)", name)
        blocks.setdefault(f"layers.{{}}.{found[2]}" if found else name, []).append(int(found[1]) if found else 0)
    return ", ".join(pattern.replace("{}", _ranges(indices)) for pattern, indices in blocks.items())


def together(problems: Iterable[tuple[str, str]]) -> list[str]:
    """(name, what is wrong with it) pairs -> a line for each thing that is wrong, with all names that it is said of."""
    names: dict[str, dict[str, None]] = {}
    for name, problem in problems:
        names.setdefault(problem, {})[name] = None
    return [f"{brief(members)}: {problem}" for problem, members in names.items()]


def _ranges(indices: list[int]) -> str:
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "}"


def words_of(spec: QuantSpec | None) -> str:
    """A specification in a few words, e.g. "e2m1 e4m3/1x16 stochastic"."""
    if spec is None:
        return HIGH
    block = spec.block if isinstance(spec.block, str) else f"{spec.block[0]}x{spec.block[1]}"
    words = [spec.element, f"{spec.scale}/{block}"]
    words += [spec.scale_rule] if spec.scale_rule != "amax" else []
    words += [spec.rounding] if spec.rounding != "nearest" else []
    words += [f"{spec.random_bits} bits"] if spec.rounding == "stochastic" and spec.random_bits != 8 else []
    words += [f"hadamard{spec.hadamard} {spec.signs} signs"] if spec.hadamard else []
    words += ["3/4"] if spec.three_quarters else []
    words += ["an amax a line"] if spec.row_amax else []
    words += [f"4over6 {spec.four_over_six}"] if spec.four_over_six else []
    words += [f"history {spec.amax_history}"] if spec.amax_history else []
    return " ".join(words)
