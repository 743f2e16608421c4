"""precision.backend: which it takes, and that everything against Transformer Engine is said at once."""

from __future__ import annotations

import importlib.abc
import sys
from importlib.metadata import PackageNotFoundError, distributions

import pytest

from errors import UsageError
from lowprec import backend, te_sources
from lowprec.backend import Situation, choose
from lowprec.patching import Sources
from lowprec.policy import PrecisionConfig
from recipe import load_policy
from tests import te_cpu
from tests.layout_case import Case
from tests.spawn import run_ranks

NAMES = ["layers.0.mlp.up", "layers.1.mlp.up", "lm_head"]
POLICIES = ("mxfp8", "nvfp4", "mxfp4", "fp8_current", "fp8_block", "fp8_lm", "fp8_delayed")

SMALL = (
    "model.dtype=bf16",
    "model.hidden_size=128",
    "model.num_layers=2",
    "model.ffn_size=128",
    "model.num_kv_heads=4",
    "train.seq_len=64",
    "train.global_batch=4",
    "optimizer.lr=1e-2",
)


def situation(policy: str = "mxfp8", size: tuple[int, int] = (256, 128), tokens: int = 256, **config) -> Situation:
    return Situation(
        tables=[load_policy(policy).resolve(NAMES, 2)],
        shapes=dict.fromkeys(NAMES, size),
        tokens=tokens,
        device="cuda",
        config=PrecisionConfig(policy=policy, **config),
    )


class Gpu:
    """What Transformer Engine is told of the GPU and its libraries."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def be(self, capability: tuple[int, int], cublas: int = 130100, cuda: float = 13.0) -> None:
        from transformer_engine.pytorch import quantization

        self.monkeypatch.setattr(quantization, "get_device_compute_capability", lambda: capability)
        self.monkeypatch.setattr(te_cpu.tex, "get_cublasLt_version", lambda: cublas)
        self.monkeypatch.setattr(te_cpu.tex, "CUDA", cuda)
        for name in ("FP8", "MXFP8", "NVFP4", "FP8_BLOCK_SCALING"):
            self.monkeypatch.setattr(quantization, f"_{name}_SUPPORT", None)


@pytest.fixture
def blackwell(monkeypatch) -> Gpu:
    """A GPU of compute capability 10.0, as the stand-in has it; `.be` makes it another."""
    te_cpu.require()
    te_cpu.install()
    gpu = Gpu(monkeypatch)
    gpu.be((10, 0))
    return gpu


@pytest.mark.parametrize(
    ("policy", "recipe"),
    [
        ("mxfp8", "MXFP8BlockScaling(fp8_format=E4M3)"),
        (
            "nvfp4",
            "NVFP4BlockScaling(disable_rht=False, disable_stochastic_rounding=False, disable_2d_quantization=False)",
        ),
        ("fp8_current", "Float8CurrentScaling(fp8_format=HYBRID, power_2_scale=False)"),
        ("fp8_block", "Float8BlockScaling(fp8_format=E4M3, power_2_scale=True, w_block_scaling_dim=2)"),
        ("fp8_delayed", "DelayedScaling(fp8_format=HYBRID, amax_history_len=1024)"),
    ],
)
def test_auto_takes_native_recipes(blackwell, policy, recipe):
    found = choose(situation(policy))
    assert found is not None and found.te
    assert found.news == f"precision.backend auto: Transformer Engine, {recipe}"


def test_auto_emulates_what_would_be_emulated_anyway(blackwell):
    found = choose(situation("mxfp4"))
    assert found is not None and not found.te
    assert "scheme mxfp4 is none of its own recipes" in found.news
    asked = choose(situation("mxfp4", backend="te"))
    assert asked is not None and asked.news.endswith("Transformer Engine, CustomRecipe")


@pytest.mark.parametrize(
    ("capability", "policy", "reason"),
    [
        ((8, 0), "fp8_current", "Float8CurrentScaling: Device compute capability 8.9 or higher"),
        ((8, 0), "mxfp4", "CustomRecipe: Device compute capability 8.9 or higher"),
        ((8, 9), "fp8_block", "Float8BlockScaling: FP8 block scaled GEMM requires compute capability 9.0"),
        ((9, 0), "mxfp8", "MXFP8BlockScaling: Device compute capability 10.0 or higher"),
        ((9, 0), "nvfp4", "NVFP4BlockScaling: Device compute capability 10.0 or higher"),
        ((12, 0), "mxfp8", "MXFP8BlockScaling: MXFP8 .* is not supported on 12.0"),
    ],
)
def test_architectures_are_judged_by_its_own_checks(blackwell, capability, policy, reason):
    blackwell.be(capability)
    with pytest.raises(UsageError, match=reason):
        choose(situation(policy, backend="te"))


@pytest.mark.parametrize(
    ("capability", "cublas", "cuda", "policy", "reason"),
    [
        ((8, 9), 120102, 12.9, "fp8_current", "CublasLt version 12.1.3.x or higher required for FP8 execution on Ada"),
        ((8, 9), 120103, 12.0, "fp8_delayed", "Cuda version 12.1 or higher required for FP8 execution on Ada"),
        ((8, 9), 120102, 12.9, "mxfp4", "CustomRecipe: CublasLt version 12.1.3.x or higher"),
        ((9, 0), 130100, 12.8, "fp8_block", "Float8BlockScaling: FP8 block scaled GEMM .* CUDA >= 12.9"),
        ((8, 9), 120103, 12.1, "fp8_current", None),
        ((9, 0), 120000, 12.9, "fp8_block", None),
    ],
)
def test_cuda_and_cublas_are_judged_by_its_own_checks(blackwell, capability, cublas, cuda, policy, reason):
    blackwell.be(capability, cublas, cuda)
    if reason is None:
        assert choose(situation(policy, backend="te")).te
        return
    with pytest.raises(UsageError, match=reason):
        choose(situation(policy, backend="te"))
    found = choose(situation(policy, backend="auto"))
    assert found is not None and not found.te


def test_a_transformer_engine_that_has_moved_is_refused_with_every_difference(blackwell, monkeypatch):
    known = te_sources.KNOWN
    assert not te_sources.SOURCES.drifted(), "the fingerprints are those of the version that tests run"
    place = "transformer_engine.pytorch.module.linear"
    moved = {f"{place}:Linear.forward": ("0" * 12, "1" * 12), f"{place}:Linear.nothing|nobody": ("2" * 12,)}
    drift = Sources(dist="transformer_engine", of=moved).drifted()
    assert f"{place}:Linear.forward changed in transformer_engine" in drift[0]
    assert f"({'0' * 12} or {'1' * 12} -> {known['module.linear:Linear.forward'][0]})" in drift[0]
    assert f"{place}:Linear.nothing|nobody is gone in transformer_engine" in drift[1] and len(drift) == 2
    monkeypatch.setattr(te_sources, "drifted", lambda: tuple(drift))
    with pytest.raises(UsageError) as error:
        choose(situation(backend="te"))
    assert all(f"{line}; its layers were read and tested otherwise: pip install" in str(error.value) for line in drift)
    found = choose(situation(backend="auto"))
    assert found is not None and not found.te and drift[0] in found.news


def test_an_error_of_our_own_is_not_taken_for_one_of_its_installation(blackwell, monkeypatch):
    original = importlib.import_module

    def broken(name: str) -> object:
        if name == "lowprec.te":
            raise ImportError("a name that we misspelt")
        return original(name)

    monkeypatch.setattr(backend.importlib, "import_module", broken)
    with pytest.raises(ImportError, match="misspelt"):
        choose(situation(backend="auto"))


@pytest.mark.parametrize(
    ("policy", "multiple"), [("mxfp8", 32), ("nvfp4", 16), ("fp8_current", 16), ("fp8_block", 128), ("mxfp4", 16)]
)
def test_sizes_that_would_need_padding_are_refused(blackwell, policy, multiple):
    assert choose(situation(policy, (3 * multiple, multiple), 64 * multiple, backend="te"))
    half = multiple // 2
    with pytest.raises(UsageError) as error:
        choose(situation(policy, (multiple + half, 5 * half), 65 * half, backend="te"))
    text = str(error.value)
    assert f"layers.{{0-1}}.mlp.up: {multiple + half} out features on a rank, no multiple of {multiple}" in text
    assert f"layers.{{0-1}}.mlp.up: {5 * half} in features on a rank, no multiple of {multiple}" in text
    assert f"a micro-batch has {65 * half} tokens, no multiple of" in text
    assert "lm_head" not in text  # in BF16


def test_all_reasons_come_in_one_message(monkeypatch):
    monkeypatch.setattr(backend, "version", lambda name: "3.1.0")
    where = situation("fp8_delayed", (100, 128), backend="te", pack_saved=False)
    where = Situation(**{**vars(where), "device": "cpu", "refused": ["zero.stage is 3"]})
    with pytest.raises(UsageError) as error:
        choose(where)
    for words in (
        "zero.stage is 3",
        "device is cpu",
        "transformer_engine 3.1.0 is not one of <2.21,>=2.19",
        "pip install --no-build-isolation -c constraints.txt -e '.[te]'",
        "precision.pack_saved is false",
        "100 out features",
    ):
        assert words in str(error.value), words


def test_nothing_quantized_needs_no_backend():
    assert choose(situation("bf16")) is None
    with pytest.raises(UsageError, match="policy bf16 quantizes no linear"):
        choose(situation("bf16", backend="te"))


class Missing(importlib.abc.MetaPathFinder):
    """As if Transformer Engine had been uninstalled."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] in ("transformer_engine", "transformer_engine_torch"):
            raise ModuleNotFoundError(f"No module named {name!r}")


def _everything(rank: int, missing: bool) -> tuple[list[str], dict[str, list[float]]]:
    """The errors of `te` for every policy, and losses of emulated runs (where it is missing).

    Missing, or without its compiled part; `auto` looks for it, as it would on a GPU.
    """
    if missing:
        sys.meta_path.insert(0, Missing())

        def version(name: str) -> str:
            raise PackageNotFoundError(name)

        backend.version = version
    errors, losses = [], {}
    for policy in POLICIES:
        for wanted in ("emulate", "auto"):
            found = choose(situation(policy, backend=wanted))
            assert found is not None and not found.te
        try:
            choose(situation(policy, backend="te"))
        except UsageError as error:
            errors.append(str(error))
    backend.DEVICES = ("cpu",)
    for policy in POLICIES if missing else ():
        model = (*SMALL, f"precision.policy={policy}")
        losses[policy] = (
            Case((*model, f"precision.backend={'auto' if policy == 'mxfp8' else 'emulate'}")).run(0, 4).losses
        )
        try:
            Case((*model, "precision.backend=te"))
        except UsageError as error:
            errors.append(str(error))
    assert "transformer_engine.pytorch" not in sys.modules
    return errors, losses


@pytest.mark.parametrize(
    ("missing", "words"),
    [(True, "transformer_engine is not installed; pip install"), (False, "cannot be imported (Found empty")],
)
def test_without_it_everything_is_emulated_and_te_says_what_to_install(missing, words):
    """In a process that has not started it: not installed, and installed without its compiled part."""
    if not missing:
        te_cpu.require()
    if not missing and any(each.metadata["Name"] == "transformer_engine_torch" for each in distributions()):
        pytest.skip("its compiled part is installed")
    ((errors, losses),) = run_ranks(_everything, 1, missing)
    assert len(errors) == (2 if missing else 1) * len(POLICIES) and all(words in error for error in errors), errors
    for policy, curve in losses.items():
        assert curve[-1] < curve[0], policy
    assert len(losses) == (len(POLICIES) if missing else 0)
