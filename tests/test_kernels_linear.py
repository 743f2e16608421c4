"""A linear as one operator, against its quantizers and GEMMs one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowprec import kernels
from lowprec.apply import Precision, RunFacts
from lowprec.formats import QuantSpec, resolve_spec
from lowprec.kernels import linear
from lowprec.policy import Policy, PrecisionConfig, Rule
from lowprec.slots import SLOT_AXES
from recipe import load_policy
from tests.kernel_cases import CASES, KEY, assert_same

pytestmark = pytest.mark.skipif(not kernels.available(), reason=str(kernels.unavailable_because()))

STREAMED = ("mxfp8", "nvfp4", "fp8_current", "fp8_block")
WHOLE = ("fp8_delayed", "mxfp4")  # a history of amaxes; a forward in BF16


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def close(y: Tensor, truth: Tensor) -> bool:
    """Within one BF16 ulp of the truth, or of FP32 sums where terms cancel."""
    ulp = torch.exp2(truth.abs().clamp_min(1e-30).log2().floor() - 7)
    return bool(((y.double() - truth).abs() <= ulp + 1e-6 * truth.abs().max()).all())


def uneven(rows: int, columns: int, seed: int) -> Tensor:
    """BF16 numbers of many magnitudes, and a row of zeros."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=random).ldexp(torch.randint(-6, 6, (rows, 1), generator=random))
    x[rows // 2] = 0.0
    return x.bfloat16()


def decoded(matrix: Tensor, spec: QuantSpec, slot: str) -> Tensor:
    found = kernels.operand(matrix, spec, axis=SLOT_AXES[slot][1], key=KEY, dtype=torch.float32)
    return found.values.double() * (1.0 if found.scale is None else found.scale.double())


@pytest.mark.parametrize("rows", ["many", "few"])
@pytest.mark.parametrize("name", CASES)
def test_products_of_every_spec(name: str, rows: str, threads: int) -> None:
    """Rows in several parts, the last one ragged, or too few for that; features that are no multiple of a block."""
    spec = CASES[name]
    reasons = [kernels.supports(spec, axis, torch.bfloat16, KEY) for axis in (-1, 0)]
    if any(reasons):
        pytest.skip(str(reasons))
    count = 128 * threads + 130 if rows == "many" else 90
    x, w, dy = uneven(count, 72, 1), uneven(40, 72, 2), uneven(count, 40, 3)
    bias = torch.randn(40).bfloat16() if rows == "many" else None
    stream = linear.Stream(dict.fromkeys(SLOT_AXES, spec))
    for tensor in (x, w, *([] if bias is None else [bias])):
        tensor.requires_grad_()
    weights = stream.weights(w.detach(), lambda _: KEY)
    y = stream(x, w, bias, weights, lambda _: KEY, torch.float32)
    w.grad_dtype = torch.float32
    y.backward(dy)
    number = {
        slot: decoded({"x": x, "w": w, "dy": dy}[kind].detach(), spec, slot) for slot, (kind, _) in SLOT_AXES.items()
    }
    want = number["fprop.a"] @ number["fprop.b"].T
    assert y.dtype == torch.bfloat16 and close(y.detach(), want if bias is None else want + bias.detach().double())
    assert close(x.grad, number["dgrad.a"] @ number["dgrad.b"])
    assert w.grad.dtype == torch.float32 and close(w.grad, number["wgrad.a"].T @ number["wgrad.b"])
    assert bias is None or torch.equal(bias.grad, dy.sum(0, dtype=torch.float32).bfloat16())
    assert stream.ran.tolist() == [1, 1, 1]


def test_packed_inputs_are_all_that_is_saved():
    stream, sizes = linear.Stream(dict.fromkeys(SLOT_AXES, resolve_spec("nvfp4"))), []
    x, w = uneven(512, 64, 1).requires_grad_(), uneven(32, 64, 2).requires_grad_()
    weights = stream.weights(w.detach(), lambda _: KEY)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        stream(x, w, None, weights, lambda _: KEY, torch.bfloat16)
    assert sizes == [512 * 64 // 2, 512 * 64 // 16]
    with torch.no_grad():
        assert not stream(x, w, None, weights, lambda _: KEY, torch.bfloat16).requires_grad
    assert stream.ran.tolist() == [2, 0, 0]


def test_operands_that_do_not_fit_are_refused():
    stream = linear.Stream(dict.fromkeys(SLOT_AXES, resolve_spec("mxfp8_e4m3")))
    x, w = uneven(256, 64, 1), uneven(32, 64, 2)
    fits, _ = stream.weights(w, lambda _: KEY)
    for wrong in (fits._replace(values=fits.values.T), fits._replace(values=fits.values.bfloat16())):
        with pytest.raises(RuntimeError, match="right must be FP32 with 64 rows"):
            stream(x, w, None, (wrong, fits), lambda _: KEY, torch.bfloat16)


class Outcome:
    """One forward and backward of a linear of 512 tokens."""

    def __init__(self, policy: str, streams: bool, *, split: bool = False, recompute: bool = False, **config) -> None:
        torch.manual_seed(0)
        model = nn.ModuleDict({"linear": nn.Linear(128, 192, bias=True, dtype=torch.bfloat16)})
        facts = RunFacts(seed=3, steps=10, tokens_per_step=512, gemm_dtype=torch.float32, swap_all=True)
        tree = load_policy(policy)
        tree = Policy(tree.schemes, (Rule("*", tree.rules[0].use),))
        precision = Precision([model], tree, PrecisionConfig(policy=policy, **config), facts)
        layer = self.layer = precision.layers["linear"]
        layer.streams = streams
        precision.begin_step(2)
        precision.shared.deferred = [] if split else None
        x = torch.randn(2, 256, 128).bfloat16().requires_grad_()
        y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        y.backward((torch.randn(2, 256, 192) * 1e-3).bfloat16())
        for weight, gradient in precision.shared.deferred or ():
            weight.grad = gradient()
        self.y, self.dx, self.dw, self.db = y.detach(), x.grad, layer.weight.grad, layer.bias.grad
        self.streamed = "CppNode" in y.grad_fn.name()
        self.copies = [layer.weight_operand(slot) for slot in ("fprop.b", "dgrad.b")]
        self.receipt = precision.receipt()
        precision.check_ran()

    def agrees(self, other: Outcome) -> bool:
        return (
            close(self.y, other.y.double())
            and close(self.dx, other.dx.double())
            and torch.equal(self.dw, other.dw)
            and torch.equal(self.db, other.db)
            and self.receipt == other.receipt
        )


@pytest.mark.parametrize("changes", [{}, {"recompute": True, "wgrad_output": "fp32"}, {"pack_saved": False}], ids=str)
@pytest.mark.parametrize("policy", STREAMED)
def test_a_linear_computes_the_same_in_one_operator(policy, changes, threads):
    """Weight gradients to the bit: what is quantized is the same, random bits included."""
    apart, whole = (Outcome(policy, streams, **changes) for streams in (False, True))
    assert (apart.streamed, whole.streamed) == (False, True) and whole.agrees(apart)
    for mine, theirs in zip(whole.copies, apart.copies, strict=True):
        assert_same(mine.values, theirs.values)
        assert_same(mine.scale, theirs.scale)


@pytest.mark.parametrize("policy", [*STREAMED, *WHOLE])
@pytest.mark.parametrize("change", [{"split": True}, {}], ids=str)
def test_what_one_operator_cannot_do_is_done_step_by_step(policy, change):
    whole = Outcome(policy, True, **change)
    assert whole.streamed == (not change and policy in STREAMED)
    assert whole.agrees(Outcome(policy, False, **change))
