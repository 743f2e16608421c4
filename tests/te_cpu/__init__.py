"""Transformer Engine's own Python layers on a CPU, without its compiled part.

`install()` imports the real `transformer_engine.pytorch` of the wheel. Three things make that possible:

1. Transformer Engine's switch NVTE_PROJECT_BUILDING skips the loading of its shared libraries;
2. `tex` takes the place of the compiled module `transformer_engine_torch`;
3. `EDITS` replaces a few strings in the sources as they are imported: a CUDA device, a question to the driver. Each
   must be found exactly as often as it says. Another count means that upstream moved, and is an error that names the
   place.

What this tests: that our policies, quantizers and layers are what Transformer Engine's Python asks for, and that its
layers then multiply the operands that we mean. What it does not test: NVIDIA's kernels, whose place `tex` takes.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest

from tests.te_cpu import tex

VERSIONS = "2.20."
CAPABILITY = (10, 0)  # the GPU that the layers believe to run on: data-centre Blackwell, which has every recipe
PREFIX = "transformer_engine.pytorch."
DPA = "attention.dot_product_attention."

# module -> (what is replaced, by what, how often it is there)
EDITS: Mapping[str, tuple[tuple[str, str, int], ...]] = {
    f"{DPA}backends": (("device=torch.cuda.current_device(),", 'device="cpu",', 1),),
    f"{DPA}dot_product_attention": (("query_layer.is_cuda and key_layer.is_cuda and value_layer.is_cuda", "True", 1),),
    f"{DPA}softmax": (('device="cuda"', 'device="cpu"', 1),),
    f"{DPA}utils": (('device="cuda"', 'device="cpu"', 10), ("torch.cuda.current_device() == 0", "False", 3)),
    "cpp_extensions.gemm": (("torch.cuda.get_device_properties(torch.cuda.current_device()).major >= 9", "False", 1),),
    "distributed": (
        (
            "    # Debug case - call gather_along_first_dim on each tensor",
            "    if tex.is_native(quantizer):\n        return tex.gather(inp, process_group, quantizer), None",
            1,
        ),
        (
            "output = torch.empty(dim_size, dtype=inp.dtype, device=torch.cuda.current_device())",
            "output = torch.empty(dim_size, dtype=inp.dtype, device=inp.device)",
            1,
        ),
    ),
    "module.base": (
        ("if not torch.cuda.is_available():", "if False:", 1),
        ("if not inp.is_cuda:", "if False:", 1),
        ('device="cuda"', 'device="cpu"', 2),
    ),
    "module.layernorm_mlp": (
        ('dtype=ctx.activation_dtype, device="cuda"', 'dtype=ctx.activation_dtype, device="cpu"', 2),
        ("device=torch.cuda.current_device()", 'device="cpu"', 4),
    ),
    "quantization": (
        ('torch.device("cuda")', 'torch.device("cpu")', 6),
        ('1, dtype=torch.float32, device="cuda"', '1, dtype=torch.float32, device="cpu"', 1),
        ("torch.cuda.is_current_stream_capturing()", "False", 1),
        ("float(torch.version.cuda)", "13.0", 2),
    ),
    "quantized_tensor": (
        ("torch.cuda.current_device() if device is None else device", '"cpu" if device is None else device', 1),
    ),
    "tensor.nvfp4_tensor": (("torch.cuda.current_device()", '"cpu"', 2),),
    "utils": (
        ("return torch.Tensor().cuda()", "return torch.Tensor()", 1),
        ("return _get_device_compute_capability(torch.cuda.current_device())", f"return {CAPABILITY}", 1),
    ),
}
# Packages that Transformer Engine wants at import and that the tests do not: their users become placeholders.
OPTIONAL = {PREFIX + "onnx_extensions": "onnxscript", PREFIX + "triton": "triton"}


def edited(source: str, edits: tuple[tuple[str, str, int], ...], module: str) -> str:
    """`source` with all edits made. ImportError if one is not found as often as it says."""
    for old, new, count in edits:
        if (found := source.count(old)) != count:
            raise ImportError(f"{module} has {found} x {old!r} where {count} were; upstream moved: mend te_cpu.EDITS")
        source = source.replace(old, new)
    return source


class _EditingLoader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> types.CodeType:
        """Compile the edited source; never the cached code of the unedited one."""
        path = self.get_filename(fullname)
        source = edited(self.get_data(path).decode(), EDITS[fullname.removeprefix(PREFIX)], fullname)
        return self.source_to_code(source.encode(), path)


class _Placeholder(importlib.abc.Loader):
    """A module whose every name is a function that says what is missing."""

    def __init__(self, needs: str) -> None:
        self.needs = needs

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__path__ = []

        def missing(name: str):
            if name.startswith("__"):
                raise AttributeError(name)
            return tex.not_here(f"{spec.name}.{name} without {self.needs}")

        module.__getattr__ = missing
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        for prefix, needs in OPTIONAL.items():
            if (name == prefix or name.startswith(f"{prefix}.")) and importlib.util.find_spec(needs) is None:
                return importlib.machinery.ModuleSpec(name, _Placeholder(needs), is_package=True)
        if not name.startswith(PREFIX) or name.removeprefix(PREFIX) not in EDITS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None and spec.origin is not None
        spec.loader = _EditingLoader(name, spec.origin)
        return spec


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def require() -> None:
    """Skip what needs the wheel where it is not installed; a module, or one test."""
    try:
        importlib.metadata.version("transformer_engine")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("transformer_engine is not installed: pip install -e '.[test]'", allow_module_level=True)


def install() -> types.ModuleType:
    """`transformer_engine.pytorch`, running on the CPU from now on in this process."""
    if sys.modules.get("transformer_engine_torch") is tex:
        return sys.modules["transformer_engine.pytorch"]
    version = importlib.metadata.version("transformer_engine")
    if not version.startswith(VERSIONS):
        raise RuntimeError(
            f"te_cpu stands in for the compiled part of Transformer Engine {VERSIONS}*, not of {version}"
        )
    # With a framework of no name, the package's own attempt to import its layers stays silent.
    with _environment(NVTE_PROJECT_BUILDING="1", NVTE_FRAMEWORK="none"):
        common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: sys.modules.update(transformer_engine_torch=tex)
    sys.meta_path.insert(0, _Finder())
    return importlib.import_module("transformer_engine.pytorch")
