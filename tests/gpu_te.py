"""Transformer Engine on a GPU, with its own kernels: `python -m tests.gpu_te [CHECK ...]`; all of them by default.

Prints the figures that docs/gpu.md asks for, and fails where a number is not what it should be. A process of its own:
the tests of tests/te_cpu put a stand-in in the place of the compiled module. What the GPU cannot do is said alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformer_engine.pytorch as te
from torch import Tensor, nn
from transformer_engine.common import recipe as recipes

from lowprec import te as ours
from lowprec import te_layers
from lowprec.linear import LowPrecisionLinear
from lowprec.native import native
from lowprec.policy import Slots
from tests.linear_truth import EXACT, NAME, ROUNDED, distance, draw, emulated, one_ulp, shared, slots_of

DEVICE = "cuda"
TOKENS, INPUTS, OUTPUTS = 1024, 512, 768
NATIVE = ("fp8_current", "fp8_lm", "fp8_delayed", "fp8_block", "mxfp8", "nvfp4")


def matrices() -> tuple[Tensor, Tensor, Tensor]:
    """x, w, dy."""
    x, w, dy = draw(TOKENS, INPUTS), draw(OUTPUTS, INPUTS, spread=0.05), draw(TOKENS, OUTPUTS, spread=1e-3)
    return x.to(DEVICE), w.to(DEVICE), dy.to(DEVICE)


def swapped(slots: Slots, weight: Tensor) -> Any:
    """Transformer Engine's linear in the place of a plain one, under the recipe of `slots`."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype, device=DEVICE)
    with torch.no_grad():
        linear.weight.copy_(weight)
    model = nn.ModuleDict({"linear": linear})
    te_layers.TeSwap(())(model, ["linear"], [{"linear": slots}], shared(), {})
    return model["linear"]


def outcome(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    inputs = x[None].clone().requires_grad_()
    y = layer(inputs)
    y.backward(dy[None])
    assert inputs.grad is not None
    return {"y": y.detach()[0], "dx": inputs.grad[0], "dw": layer.weight.grad}  # pyright: ignore[reportReturnType]


def custom() -> Iterator[str]:
    """te.Linear over our quantizers, against the same operands multiplied in FP64."""
    x, w, dy = matrices()
    for policy in (*EXACT, *ROUNDED):
        slots = slots_of(policy)
        layer = te.Linear(INPUTS, OUTPUTS, bias=False, params_dtype=torch.bfloat16, device=DEVICE, name=NAME)
        with torch.no_grad():
            layer.weight.copy_(w)
        small = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16, device=DEVICE)
        linears = {NAME: LowPrecisionLinear(small, NAME, slots, shared())}
        with te.autocast(recipe=recipes.CustomRecipe(qfactory=ours.Factory(linears))):
            found = outcome(layer, x, dy)
        truth = emulated(w, None, x, dy, slots)
        for name, value in found.items():
            good = one_ulp(value, truth[name]) if policy in EXACT else distance(value, truth[name]) < 3.2e-3
            assert good, (policy, name, distance(value, truth[name]))
        yield f"{policy:12} " + "  ".join(f"{name} {distance(found[name], truth[name]):.1e}" for name in found)


def own_recipes() -> Iterator[str]:
    """Native GEMMs, against the operands that the policy means, multiplied in FP64."""
    x, w, dy = matrices()
    for policy in NATIVE:
        slots = slots_of(policy, rounding="nearest") if policy == "nvfp4" else slots_of(policy)
        recipe = native(slots)
        assert recipe is not None
        if why := ours.why_not(recipe.recipe):
            yield f"{policy:12} not on this GPU: {why}"
            continue
        layer = swapped(slots, w)
        found, truth = outcome(layer, x, dy), emulated(w, None, x, dy, slots, "linear")
        far = {name: distance(found[name], truth[name]) for name in found}
        assert max(far.values()) < 6e-3, (policy, far)  # Hopper adds up a forward in FP8 with fewer bits than FP32 has
        yield f"{policy:12} " + "  ".join(f"{name} {value:.1e}" for name, value in far.items())


def defects() -> Iterator[str]:
    """What lowprec/te_layers.py walks around is still so; where not, the detour may go."""
    x, w, dy = matrices()
    before, after = recipes.Float8CurrentScaling(), recipes.Float8CurrentScaling(fp8_format=recipes.Format.E4M3)
    layer = te.Linear(INPUTS, OUTPUTS, bias=False, params_dtype=torch.bfloat16, device=DEVICE)
    for recipe in (before, after):
        with te.autocast(recipe=recipe):
            layer(x).sum().backward()
    stale = layer.quantizers["scaling_bwd"][0].dtype == te.DType.kFloat8E5M2
    yield f"a recipe of the same class with other switches is {'ignored' if stale else 'taken'}"
    layer = te.Linear(
        INPUTS, OUTPUTS, bias=False, params_dtype=torch.bfloat16, device=DEVICE, fuse_wgrad_accumulation=True
    )
    layer.weight.main_grad = torch.ones(OUTPUTS, INPUTS, device=DEVICE)
    y = layer(x, is_first_microbatch=True)
    y.backward(dy)
    kept = (layer.weight.main_grad - dy.float().T @ x.float()).mean() > 0.5
    yield f"is_first_microbatch=True {'adds to' if kept else 'overwrites'} main_grad"
    assert stale or not kept, "both detours of lowprec/te_layers.py may go"


def training(steps: int = 20) -> Iterator[str]:
    """Losses of a recipe under Transformer Engine and under our linears, on this GPU."""
    for policy in (*NATIVE, "mxfp4"):
        losses = []
        for wanted in ("emulate", "te"):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "train.py", "--recipe", "mxfp8_10m", f"precision.policy={policy}"]
                command += [
                    "device=cuda",
                    f"precision.backend={wanted}",
                    f"train.steps={steps}",
                    f"run.dir={folder}/run",
                ]
                done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
                if done.returncode == 2:
                    yield f"{policy:12} {wanted}: {done.stderr.strip()}"
                    break
                assert done.returncode == 0, done.stderr[-3000:]
                lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
                losses.append([line["loss"] for line in map(json.loads, lines) if line["kind"] == "step"])
        if len(losses) == 2:
            gaps = [abs(one / other - 1) for one, other in zip(*losses, strict=True)]
            assert max(gaps) < 1e-2, (policy, losses)
            yield f"{policy:12} largest gap {max(gaps):.1e}, last losses {losses[0][-1]:.4f} and {losses[1][-1]:.4f}"


def _milliseconds(step: Callable[[], None], repeats: int = 20) -> float:
    for _ in range(3):
        step()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / repeats


def throughput() -> Iterator[str]:
    """Forward and backward of one linear, 8192 tokens, 4096 in, 4096 out: BF16, our linear, Transformer Engine."""
    tokens, size = 8192, 4096
    x = torch.randn(1, tokens, size, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    dy, flops = torch.randn_like(x), 6 * tokens * size * size
    plain = nn.Linear(size, size, bias=False, dtype=torch.bfloat16, device=DEVICE)

    def line(words: str, layer: nn.Module) -> str:
        taken = _milliseconds(lambda: layer(x).backward(dy))
        return f"{words:24} {taken:7.3f} ms  {flops / taken / 1e9:7.1f} TFLOP/s"

    yield line("bf16, torch", plain)
    for policy in (*NATIVE, "mxfp4"):
        slots, recipe = slots_of(policy), native(slots_of(policy))
        mine = nn.Linear(size, size, bias=False, dtype=torch.bfloat16, device=DEVICE)
        layer = LowPrecisionLinear(mine, "linear", slots, shared())
        layer.prepare()
        yield line(f"{policy}, our linear", layer)
        if why := ours.why_not(recipe.recipe if recipe else "CustomRecipe"):
            yield f"{policy}, TE: not on this GPU: {why}"
        else:
            yield line(f"{policy}, TE {'native' if recipe else 'custom'}", swapped(slots, plain.weight.detach()))


CHECKS = {each.__name__: each for each in (custom, own_recipes, defects, training, throughput)}


def main(names: list[str]) -> None:
    have = torch.cuda.get_device_capability()
    print(
        f"{torch.cuda.get_device_name()} (compute capability {have[0]}.{have[1]}), torch {torch.__version__}, ", end=""
    )
    print(f"CUDA {torch.version.cuda}, Transformer Engine {version('transformer_engine')}")
    for name in names or CHECKS:
        print(f"\n{name}: {(CHECKS[name].__doc__ or '').strip()}")
        for line in CHECKS[name]():
            print(f"  {line}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
