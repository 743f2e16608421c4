"""Building the kernels, doing without them, and their operators in compiled graphs and on the meta device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowprec import kernels
from lowprec.formats import resolve_spec
from lowprec.philox import RandomKey

ROOT = Path(__file__).parent.parent
needs_kernels = pytest.mark.skipif(not kernels.available(), reason=str(kernels.unavailable_because()))


def test_without_a_compiler(tmp_path: Path) -> None:
    program = (
        "import logging; logging.basicConfig(level=logging.INFO, format='%(levelname)s %(message)s')\n"
        "import torch\n"
        "from lowprec import kernels\n"
        "from lowprec.formats import resolve_spec\n"
        "print(kernels.available(), kernels.available())\n"
        "print(kernels.supports(resolve_spec('nvfp4'), -1, torch.bfloat16))\n"
    )
    environment = {"PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("False False\nno kernels: there is no C++ compiler"), done.stdout
    assert done.stderr.count("WARNING") == 1 and "plain path" in done.stderr, done.stderr


@needs_kernels
def test_meta_shapes_are_the_real_ones() -> None:
    key = RandomKey(seed=1)
    for name in ("mxfp8_e4m3", "mxfp4", "nvfp4", "nvfp4_2d", "fp8_e4m3", "fp8_block_1x128"):
        for axis in (-1, 0):
            spec = resolve_spec(name, hadamard=16 if name == "nvfp4" else 0)
            x = torch.ones(50, 70, dtype=torch.bfloat16)
            real, meta = (kernels.operand(t, spec, axis=axis, key=key).values for t in (x, x.to("meta")))
            assert meta.is_meta and (meta.shape, meta.dtype) == (real.shape, real.dtype)
            for upright in (False, True):
                packed, shadow = (
                    kernels.quantize(t, spec, axis=axis, key=key, upright=upright) for t in (x, x.to("meta"))
                )
                assert (packed.codes.shape, packed.scales.shape) == (shadow.codes.shape, shadow.scales.shape)
                assert packed.scales.dtype == shadow.scales.dtype
                assert kernels.unpack(packed).values.shape == kernels.unpack(shadow).values.shape


@needs_kernels
@pytest.mark.slow
def test_compiled_graph() -> None:
    spec = resolve_spec("mxfp8_e4m3")

    def function(x: torch.Tensor) -> torch.Tensor:
        return kernels.operand(x * 2, spec).values.float().sum(1)

    x = torch.randn(64, 64).bfloat16()
    torch.testing.assert_close(torch.compile(function, fullgraph=True)(x), function(x))


@needs_kernels
def test_operator_registrations() -> None:
    """torch's own checks of schemas and fake versions."""
    spec = list(kernels.integers(resolve_spec("mxfp8_e4m3"), -1, "operand"))
    x = torch.randn(32, 64).bfloat16()
    torch.library.opcheck(
        torch.ops.lowprec_cpu.operand.default,
        (x, None, None, None, None, spec, torch.bfloat16),
        test_utils=("test_schema", "test_faketensor"),
    )
