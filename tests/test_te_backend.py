"""precision.backend: which it takes, and that everything against Transformer Engine is said at once."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distributions

import pytest

from errors import UsageError
from lowprec import backend
from lowprec.backend import Situation, choose
from lowprec.policy import PrecisionConfig
from recipe import load_policy
from tests import te_cpu
from tests.spawn import run_ranks

NAMES = ["layers.0.mlp.up", "layers.1.mlp.up", "lm_head"]
POLICIES = ("mxfp8", "nvfp4", "mxfp4", "fp8_current", "fp8_block", "fp8_lm", "fp8_delayed")


def situation(policy: str = "mxfp8", size: tuple[int, int] = (256, 128), tokens: int = 256, **config) -> Situation:
    return Situation(
        tables=[load_policy(policy).resolve(NAMES, 2)],
        shapes=dict.fromkeys(NAMES, size),
        tokens=tokens,
        device="cuda",
        config=PrecisionConfig(policy=policy, **config),
    )


@pytest.fixture
def blackwell(monkeypatch):
    """A GPU of compute capability 10.0, as the stand-in has it; `.capability` sets another."""
    te_cpu.require()
    te_cpu.install()
    from transformer_engine.pytorch import quantization

    class Gpu:
        def __setattr__(self, key: str, value: tuple[int, int]) -> None:
            assert key == "capability"
            monkeypatch.setattr(quantization, "get_device_compute_capability", lambda: value)
            for name in ("FP8", "MXFP8", "NVFP4", "FP8_BLOCK_SCALING"):
                monkeypatch.setattr(quantization, f"_{name}_SUPPORT", None)

    gpu = Gpu()
    gpu.capability = (10, 0)
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
    blackwell.capability = capability
    with pytest.raises(UsageError, match=reason):
        choose(situation(policy, backend="te"))


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


def _everything(rank: int, missing: bool) -> list[str]:
    """The errors of `te` for every policy, where Transformer Engine is missing or has no compiled part."""
    if missing:
        sys.modules["transformer_engine"] = None  # pyright: ignore[reportArgumentType]

        def version(name: str) -> str:
            raise PackageNotFoundError(name)

        backend.version = version
    errors = []
    for policy in POLICIES:
        for wanted in ("emulate", "auto"):
            found = choose(situation(policy, backend=wanted))
            assert found is not None and not found.te
        try:
            choose(situation(policy, backend="te"))
        except UsageError as error:
            errors.append(str(error))
    assert "transformer_engine.pytorch" not in sys.modules
    return errors


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
    (errors,) = run_ranks(_everything, 1, missing)
    assert len(errors) == len(POLICIES) and all(words in error for error in errors), errors
