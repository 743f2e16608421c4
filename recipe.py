"""Recipes: strict YAML -> overrides -> one frozen tree of dataclasses, every violation listed at once.

    base: base/llama_10m.yaml      # single inheritance: maps merge key by key, everything else is replaced
    optimizer: {lr: 3e-3}          # a key that no section knows is an error with the nearest valid one

Precedence: base < recipe < `a.b=c` on the command line. Each section's dataclass lives beside the code that it
configures and says itself what is invalid (`problems()`); those of the run as a whole are in sections.py.
The resolved tree is written to the run directory as resolved.yaml; `--recipe RUN/resolved.yaml` is the same run.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from data.loader import DataConfig
from errors import UsageError
from lowprec.gradients import GradientsConfig
from lowprec.optim import OptimizerConfig
from lowprec.policy import Policy, PrecisionConfig, parse
from lowprec.probe.config import ProbeConfig
from lowprec.zero import ZeroConfig
from model.config import ModelConfig
from parallel.mesh import ParallelConfig, Sizes
from parallel.saver import CheckpointConfig, ResumeConfig
from report.metrics import MetricsConfig
from sections import EvalConfig, RunConfig, ScheduleConfig, SpikesConfig, TrainConfig, WatchConfig, in_steps
from strict_yaml import load_yaml, merge, override

RECIPES = Path(__file__).parent / "recipes"
POLICIES = RECIPES / "precision"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what a run computes.

    name:        of the run; by default the file's name
    description: one line for `train.py --list`
    device:      auto (CUDA if there is one), cpu (gloo) or cuda (NCCL)
    """

    name: str
    description: str = ""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    gradients: GradientsConfig = field(default_factory=GradientsConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    spikes: SpikesConfig = field(default_factory=SpikesConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    def problems(self, world_size: int) -> list[str]:
        """Every violation, of one section or across sections, on `world_size` ranks; empty when it can run."""
        across = (
            lambda: self._layout_problems(world_size),
            self._schedule_problems,
            self._storage_problems,
            self._spike_problems,
        )
        return self.section_problems() or [problem for find in across for problem in find()]

    def section_problems(self) -> list[str]:
        """The violations within single sections; whatever looks across sections needs none of these."""
        return [
            f"{section.name}.{message}"
            for section in dataclasses.fields(self)
            if dataclasses.is_dataclass(value := getattr(self, section.name))
            for message in value.problems()  # pyright: ignore[reportAttributeAccessIssue]
        ]

    def _layout_problems(self, world_size: int) -> list[str]:
        tp, pp = self.parallel.tp, self.parallel.pp
        if world_size % (tp * pp):
            return [
                f"parallel.tp x parallel.pp = {tp} x {pp} does not divide {world_size} processes; start a multiple of "
                f"{tp * pp}, or choose other degrees"
            ]
        found = []
        dp, train = world_size // (tp * pp), self.train
        if train.global_batch % (train.micro_batch * dp):
            found.append(
                f"train.global_batch {train.global_batch} is not divisible by train.micro_batch x data-parallel ranks "
                f"= {train.micro_batch} x {dp}; change one of them, or the number of processes"
            )
        else:
            found += self.parallel.misfits(
                Sizes(
                    num_heads=self.model.num_heads,
                    num_kv_heads=self.model.kv_heads,
                    ffn_size=self.model.ffn_size,
                    mamba_groups=self.model.mamba.groups * ("M" in self.model.blocks),
                    vocab_size=self.model.vocab_size,
                    num_layers=self.model.num_layers,
                    seq_len=train.seq_len,
                    micro_batches=train.global_batch // (train.micro_batch * dp),
                    zero_stage=self.zero.stage,
                )
            )
        if self.train.compile is True and self.zero.stage == 3:
            found.append(
                "train.compile is true with zero.stage 3, which gathers weights inside the compiled region; "
                "use train.compile=auto or zero.stage=2"
            )
        return found

    def _storage_problems(self) -> list[str]:
        """Combinations of zero, gradients and optimizer that mean nothing or are not built."""
        found, stage, optimizer, gradients = [], self.zero.stage, self.optimizer, self.gradients
        if gradients.two_level and stage not in (1, 2):
            found.append(f"gradients.two_level is true at zero.stage {stage}; use stage 1 or 2, or false")
        if stage == 0 and gradients.payload != "fp32":
            found.append(f"gradients.payload {gradients.payload} at zero.stage 0; use stage 1 or 2, or payload fp32")
        if stage == 3:
            found += [
                f"{key} {value} at zero.stage 3, where DeepSpeed adds up and reduces FP32 gradients; use stage 1 or 2, "
                "or fp32"
                for key, value in (
                    ("gradients.payload", gradients.payload),
                    ("gradients.accumulate", gradients.accumulate),
                )
                if value != "fp32"
            ]
        if self.model.dtype == "fp32" and optimizer.master in ("bf16", "none"):
            found.append(f"optimizer.master {optimizer.master} needs model.dtype bf16, it is fp32")
        if self.zero.gather != "exact" and optimizer.master == "none":
            found.append(
                f"zero.gather {self.zero.gather} with optimizer.master none would round the only copy of the weights; "
                "use exact, or a master"
            )
        return found

    def _schedule_problems(self) -> list[str]:
        steps, schedule = self.train.steps, self.schedule
        warmup = in_steps(schedule.warmup, steps)
        decay = in_steps(schedule.decay, steps) if schedule.kind == "wsd" else 0
        found = []
        if warmup + decay > steps:
            found.append(f"schedule.warmup ({warmup} steps) and schedule.decay ({decay}) exceed train.steps ({steps})")
        begins = self.data_phases()
        borders = [0, *begins, steps * self.train.global_batch]
        if begins and any(high <= low for low, high in zip(borders, borders[1:], strict=False)):
            found.append(
                f"data.phases begin at steps {[begin // self.train.global_batch for begin in begins]}; each must lie "
                f"after the one before it, the first after 0 and the last before train.steps ({steps})"
            )
        return found

    def _spike_problems(self) -> list[str]:
        if self.spikes.action == "rollback" and not self.checkpoint.interval:
            return ["spikes.action is rollback, but checkpoint.interval is 0: nothing to go back to; set an interval"]
        return []

    def data_phases(self) -> list[int]:
        """The sample with which each of data.phases begins: always the first one of a step."""
        train = self.train
        tokens_per_step = train.global_batch * train.seq_len
        return [phase.first_step(train.steps, tokens_per_step) * train.global_batch for phase in self.data.phases]


def find(name: str) -> Path:
    """The file of a recipe: a path, or a name in recipes/."""
    path = Path(name)
    if path.suffix in {".yaml", ".yml"} or path.parent != Path("."):
        if path.is_file():
            return path
        raise UsageError(f"no recipe file {path}")
    if (RECIPES / f"{name}.yaml").is_file():
        return RECIPES / f"{name}.yaml"
    names = sorted(p.stem for p in RECIPES.glob("*.yaml"))
    raise UsageError(f"no recipe {name!r}{_nearest(name, names)}; `python train.py --list` shows all {len(names)}")


def read(path: Path, inheriting: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The keys of a recipe file merged over those of its `base`."""
    if path.resolve() in inheriting:
        raise UsageError(f"{path}: `base` leads back to itself")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read recipe {path}: {error}") from None
    tree = load_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: a recipe is a map of sections, found {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UsageError(f"{path}: base is {base!r}; it must be one file name")
    for candidate in (path.parent / base, RECIPES / base, RECIPES / f"{base}.yaml"):
        if candidate.is_file():
            return merge(read(candidate, (*inheriting, path.resolve())), tree)
    raise UsageError(f"{path}: base {base!r} is neither beside it nor in recipes/")


def load(name: str, overrides: tuple[str, ...] = (), world_size: int = 1) -> Recipe:
    """The validated recipe `name` (a name in recipes/ or a path) with overrides, for `world_size` ranks.

    Raises UsageError listing everything that is wrong.
    """
    recipe = resolve(name, overrides)
    refuse(recipe, recipe.problems(world_size))
    return recipe


def refuse(recipe: Recipe, problems: Sequence[str]) -> None:
    """Raise UsageError listing what is wrong, if anything is."""
    if problems:
        raise UsageError(f"recipe {recipe.name}:\n" + "\n".join(f"  {problem}" for problem in problems))


def resolve(name: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """The recipe `name` with overrides: every key known and of its type, values not yet checked. Raises UsageError."""
    path = find(name)
    tree = {"name": path.stem} | read(path)
    for assignment in overrides:
        tree = override(tree, assignment)
    recipe = from_dict(tree, str(path))
    run = dataclasses.replace(recipe.run, dir=recipe.run.dir.replace("{name}", recipe.name))
    return dataclasses.replace(recipe, run=run)


def policy_file(name: str) -> Path:
    """Where the precision policy `name` is: a name in recipes/precision/, or the path of such a file."""
    return Path(name) if Path(name).suffix in {".yaml", ".yml"} else POLICIES / f"{name}.yaml"


def load_policy(name: str) -> Policy:
    """The precision policy `name`: a name in recipes/precision/, or the path of such a file. Raises UsageError."""
    path = policy_file(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = sorted(p.stem for p in POLICIES.glob("*.yaml"))
        raise UsageError(f"cannot read precision policy {name!r}{_nearest(name, known)} ({error})") from None
    return parse(load_yaml(text, str(path)), str(path))


def from_dict(tree: dict[str, Any], source: str) -> Recipe:
    """Check keys and types, and of values that they are finite. Raises UsageError."""
    if wrong := [*_unknown_keys(tree, Recipe, ()), *_not_finite(tree, ())]:
        raise UsageError(f"{source}:\n" + "\n".join(f"  {message}" for message in wrong))
    try:
        # JSON mode is the strict one that takes lists for tuples: "3" is no integer, 1 is no boolean.
        return _adapter().validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        raise UsageError(f"{source}:\n" + "\n".join(f"  {line}" for line in _type_errors(error))) from None


@functools.cache
def _adapter() -> TypeAdapter[Recipe]:
    return TypeAdapter(Recipe)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain nested dict of the whole resolved recipe: YAML- and JSON-able, accepted by `from_dict`."""
    return json.loads(_adapter().dump_json(recipe))


def to_yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, width=120)


def names() -> list[tuple[str, str]]:
    """(name, description) of every recipe in recipes/."""
    return [(path.stem, read(path).get("description", "")) for path in sorted(RECIPES.glob("*.yaml"))]


def _unknown_keys(tree: dict[str, Any], cls: type, path: tuple[str, ...]):
    hints = get_type_hints(cls)
    for key, value in tree.items():
        here = (*path, key)
        if key not in hints:
            yield f"unknown key {'.'.join(here)}{_nearest('.'.join(here), list(_paths(Recipe)))}"
        elif dataclasses.is_dataclass(hints[key]) and isinstance(value, dict):
            yield from _unknown_keys(value, hints[key], here)
        elif isinstance(value, list):
            item = next(filter(dataclasses.is_dataclass, get_args(hints[key])), None)
            for index, each in enumerate(value):
                if item and isinstance(each, dict):
                    known = {field.name for field in dataclasses.fields(item)}
                    for name in sorted(each.keys() - known):
                        where = f"{'.'.join(here)}[{index}].{name}"
                        yield f"unknown key {where}{_nearest(name, sorted(known))}"


def _not_finite(value: Any, path: tuple[str, ...]):
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{'.'.join(path)} is {value}: numbers are finite"
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from _not_finite(child, (*path, str(key)))


def _paths(cls: Any, prefix: str = ""):
    for name, hint in get_type_hints(cls).items():
        yield prefix + name
        if dataclasses.is_dataclass(hint):
            yield from _paths(hint, f"{prefix}{name}.")


def _nearest(key: str, valid: list[str]) -> str:
    """`; did you mean ...?`: the same last part in another section first, then the nearest spelling."""
    last = key.rpartition(".")[2]
    same = [path for path in valid if path.rpartition(".")[2] == last]
    close = same[:1] or difflib.get_close_matches(key, valid, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _type_errors(error: ValidationError):
    """One line a key: pydantic reports each member of a union separately."""
    reported = set()
    hints = set(_paths(Recipe))
    for item in error.errors():
        parts = [str(part) for part in item["loc"]]
        while parts and ".".join(parts) not in hints:
            parts.pop()  # what remains names a key, without the union member or list index
        key = ".".join(parts)
        if key in reported:
            continue
        reported.add(key)
        if item["type"] in {"missing", "missing_argument", "missing_keyword_only_argument"}:
            yield f"{'.'.join(str(part) for part in item['loc'])} is missing; it has no default"
        else:
            yield f"{key} is {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"
