"""The Triton kernels: under Triton's interpreter in a process of its own, on a GPU, as PTX, and without Triton.

What is compared stands in tests/triton_cases.py and tests/triton_adamw_cases.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import optim_case
import pytest
import torch

from lowprec import dispatch
from lowprec.adamw import Update
from lowprec.codecs import Extent
from lowprec.formats import SPECS, QuantSpec, resolve_spec
from lowprec.kernels.adamw import Job
from lowprec.philox import RandomKey
from lowprec.quantized import Axis

ROOT = Path(__file__).parent.parent
CASES = ("tests/triton_cases.py", "tests/triton_adamw_cases.py")
has_triton = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import triton"], capture_output=True).returncode != 0,
    reason="Triton is not installed",
)


def run_cases(*arguments: str, interpreted: bool) -> None:
    """Run the files of cases; all that is selected has to pass."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpreted:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    plain = ("-o", "addopts=", "-p", "no:cacheprovider", "-q")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plain, *CASES, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and re.search(r"\d\d+ passed", done.stdout), done.stdout[-5000:] + done.stderr[-2000:]


@has_triton
def test_interpreted() -> None:
    run_cases("-m", "not slow", interpreted=True)


@has_triton
@pytest.mark.slow
@pytest.mark.parametrize("which", ["mx", "nvfp4", "fp8 and not mx", "not mx and not nvfp4 and not fp8"])
def test_more_interpreted(which: str) -> None:
    run_cases("-m", "slow", "-k", which, interpreted=True)


@has_triton
@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """Compiling is most of it, about ten seconds a case, on every core at once."""
    run_cases("-n", str(os.cpu_count()), interpreted=False)


@pytest.mark.parametrize("installed", [pytest.param(True, marks=has_triton), False])
def test_without_a_gpu(installed: bool, tmp_path: Path) -> None:
    """The reason is a sentence, and the reference goes on."""
    if not installed:
        (tmp_path / "triton.py").write_text("raise ImportError('No module named triton')")
    program = (
        "import torch\n"
        "from lowprec import dispatch\n"
        "from lowprec.kernels import gpu\n"
        "from lowprec.formats import resolve_spec\n"
        "print(gpu.available(), gpu.supports(resolve_spec('nvfp4'), -1, torch.bfloat16))\n"
        "print(dispatch.path(resolve_spec('nvfp4'), -1, torch.bfloat16, 'cuda'))\n"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    why = "there is no CUDA device" if installed else "Triton cannot be imported"
    assert done.stdout.startswith(f"False no Triton kernels: {why}"), done.stdout
    assert done.stdout.endswith("\nplain\n") and done.stderr.count("takes the plain path") == 1, done.stderr


def test_gpu_matrices_take_these_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice alone: `supports` says yes here as it would on a GPU."""
    monkeypatch.setattr(dispatch.gpu, "supports", lambda *_: None)
    dispatch.path.cache_clear()
    assert dispatch.path(SPECS["nvfp4"], -1, torch.bfloat16, "cuda") == dispatch.TRITON == "triton"
    assert dispatch.path(SPECS["nvfp4"], -1, torch.bfloat16, "xpu") == dispatch.PLAIN
    dispatch.path.cache_clear()


class _Driver:
    """Enough of a Triton driver to compile for a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it compiled, and for what, by device

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture(params=[80, 90, 100])
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    from triton.runtime import driver

    monkeypatch.setattr(driver, "_active", _Driver(request.param))
    return request.param


COMPILED = {
    "mxfp8_e4m3": SPECS["mxfp8_e4m3"],
    "nvfp4": resolve_spec("nvfp4", rounding="stochastic", hadamard=16),
    "nvfp4_2d": SPECS["nvfp4_2d"],
    "fp8_e5m2": resolve_spec("fp8_e5m2", amax_history=4),
    "fp8_block_128x128": SPECS["fp8_block_128x128"],
    "mxfp4": resolve_spec("mxfp4", rounding="stochastic", hadamard=64, three_quarters=True),
}


def compiled(spec: QuantSpec, axis: Axis, packed: bool, words: list[int], shape: tuple[int, int]) -> Any:
    """The quantizer for a BF16 matrix, compiled as a launch would."""
    from lowprec.kernels.gpu.programs import quantize_kernel
    from lowprec.kernels.gpu.support import job

    work = job(spec, axis, torch.bfloat16, None if packed else torch.bfloat16)
    delayed = spec.amax_history > 0
    scalar, found = torch.ones(()), torch.zeros((), dtype=torch.int32)
    whole = (
        None if delayed or not (spec.two_level or work.per_tensor) else scalar,
        scalar if delayed else None,
        scalar,
        found if delayed else None,
    )
    kind = torch.float32 if spec.scale in ("fp32", "pow2") else torch.uint8
    return quantize_kernel.warmup(
        torch.empty(shape, dtype=torch.int16),
        torch.empty(shape, dtype=torch.uint8 if packed else torch.int16),
        torch.empty((1, 1), dtype=kind) if packed else None,
        *(whole, shape, shape, *words, work),
        grid=(1,),
        num_warps=work.warps,
        enable_fp_fusion=False,
    )


def assert_exact(kernel: Any) -> None:
    """No contraction, no approximate division or root, no flush but where floor may: its inputs have the same floor."""
    found = set(re.findall(r"^\s+(?:@%p\d+ )?([a-z]+\.[\w.:]*f32[\w.]*)", kernel.asm["ptx"], re.MULTILINE))
    assert {i for i in found if i.startswith("mul")}, found
    assert not [i for i in found if re.match(r"fma|.*approx|.*full", i)], found
    assert {i for i in found if "ftz" in i} <= {"cvt.rmi.ftz.f32.f32"}, found
    assert {i for i in found if i.startswith("div")} <= {"div.rn.f32"}, found
    assert {i for i in found if i.startswith("sqrt")} <= {"sqrt.rn.f32"}, found


@has_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_for_gpus_without_inexact_instructions(name: str, capability: int) -> None:
    for axis in (-1, 0):
        for packed in (False, True):
            for shape in ((256, 512), (1, 7)):
                kernel = compiled(COMPILED[name], axis, packed, [5, 7, 9, -3, 11], shape)
                assert_exact(kernel)


@has_triton
@pytest.mark.slow
def test_words_do_not_compile_anew(capability: int) -> None:
    """Steps and keys that are 1, multiples of 16, negative or wide give one kernel."""
    words = ([5, 7, 9, -3, 11], [1, 16, 0, 1, 1], [2**62, 2**40, -(2**60), -1, 0])
    assert len({compiled(COMPILED["nvfp4"], -1, False, w, (256, 512)).hash for w in words}) == 1


class _Compiling:
    """In the place of a kernel: compiles what would be launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.found = kernel, []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **options: self.found.append(self.kernel.warmup(*arguments, grid=(1,), **options))


@has_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    "update",
    [
        Update(exp_avg="fp8_e4m3", exp_avg_sq="fp16_scaled", master="fp16_scaled"),
        Update(exp_avg="dynamic4_b128", exp_avg_sq="linear4_rank1", master="none", update="stochastic"),
        Update(exp_avg="fp8_e4m3_b256", exp_avg_sq="dynamic8_b256", master="bf16", update="kahan"),
        Update(exp_avg="bf16", exp_avg_sq="bf16", master="none", update="collage_plus"),
    ],
    ids=optim_case.name_of,
)
def test_optimizer_compiles_without_inexact_instructions(
    update: Update, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowprec.kernels.gpu import adamw, adamw_programs

    kernels = [_Compiling(adamw_programs.maxima_kernel), _Compiling(adamw_programs.adamw_kernel)]
    monkeypatch.setattr(adamw_programs, "maxima_kernel", kernels[0])
    monkeypatch.setattr(adamw_programs, "adamw_kernel", kernels[1])
    for step, shape in ((1, (64, 256)), (2, (70, 90))):
        extent = Extent.whole(shape)
        (tensors,) = optim_case.start(update, shape, [extent])
        hyper = replace(optim_case.HYPER, step=step)
        grad = torch.zeros(extent.count)
        job = Job(update.codecs(shape), update.update, extent, tensors, grad, hyper.numbers)
        found = adamw.statistics(job) if update.statistics_length(shape) else None
        key = RandomKey(seed=1, step=step) if update.update == "stochastic" else None
        adamw.apply(job, found, key, measure=True)
    assert len(kernels[1].found) == 2 and all("sqrt.rn.f32" in kernel.asm["ptx"] for kernel in kernels[1].found)
    for kernel in (each for part in kernels for each in part.found):
        assert_exact(kernel)
