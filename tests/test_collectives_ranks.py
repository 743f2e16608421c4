"""Reduce-scatter and all-gather on 2 and 4 gloo ranks against one process that does the same sums."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lowprec.collectives import (
    all_gather,
    all_gather_two_level,
    next_mu,
    parse_payload,
    reduce_scatter,
    reduce_scatter_two_level,
)
from lowprec.payload import PAYLOADS
from lowprec.philox import RandomKey
from tests import collectives_truth as truth
from tests.spawn import RankError, run_ranks

pytestmark = pytest.mark.xdist_group("collectives")  # what its fixtures compute is computed once

NAMES = tuple(PAYLOADS)
# name -> (splits, segments); segments straddle destinations, some are empty
SHAPES: dict[int, dict[str, tuple[list[int], list[int]]]] = {
    2: {
        "even": ([4096, 4096], [8192]),
        "uneven": ([1000, 3333], [7, 0, 2000, 1, 2325, 0]),
        "one_empty": ([0, 129], [100, 29]),
        "large": ([2**18 + 1025, 2001], [200_000, 2**18 + 3026 - 200_000]),
    },
    4: {
        "even": ([512] * 4, [300, 1400, 348]),
        "uneven": ([77, 0, 4001, 1300], [2, 76, 5000, 300]),
        "nothing": ([0] * 4, [0]),
    },
}
BIG = 1 << 20
Results = Callable[[int], list[dict[Any, Any]]]


def numbers(rank: int, count: int, seed: int = 0) -> torch.Tensor:
    """Gradients of a rank: normal, with magnitudes that drift by 2^12 along the tensor, and a stretch of zeros."""
    x = torch.randn(count, generator=torch.Generator().manual_seed(100 * seed + rank))
    x *= torch.logspace(-12, 0, max(count, 1), base=2.0)[:count]
    x[count // 3 : count // 3 + 300] = 0.0
    return x


def even_numbers() -> torch.Tensor:
    """Normal numbers, the same on all ranks."""
    return torch.randn(512, generator=torch.Generator().manual_seed(0))


class Wire:
    """Counts in this process what leaves it through torch.distributed, from the arguments of each call."""

    def __init__(self) -> None:
        self.bytes = 0
        self._calls = {n: getattr(dist, n) for n in ("all_to_all_single", "all_gather_single", "all_reduce")}
        dist.all_to_all_single = self._all_to_all
        dist.all_gather_single = self._all_gather
        dist.all_reduce = self._all_reduce

    def _all_to_all(self, output, input, output_split_sizes, input_split_sizes, group=None):
        assert input.dtype == torch.uint8 and input.numel() == sum(input_split_sizes)
        self.bytes += input.numel() - input_split_sizes[dist.get_rank(group)]
        return self._calls["all_to_all_single"](output, input, output_split_sizes, input_split_sizes, group=group)

    def _all_gather(self, output, input, group=None):
        assert input.dtype == torch.uint8
        self.bytes += input.numel() * (dist.get_world_size(group) - 1)
        return self._calls["all_gather_single"](output, input, group=group)

    def _all_reduce(self, tensor, group=None, **options):
        size = dist.get_world_size(group)
        self.bytes += 2 * tensor.nbytes * (size - 1) // size
        return self._calls["all_reduce"](tensor, group=group, **options)

    def since(self) -> int:
        count, self.bytes = self.bytes, 0
        return count


def _plain(rank: int, group: Any, out: dict[Any, Any], wire: Wire) -> None:
    world = dist.get_world_size(group)
    for shape, (splits, segments) in SHAPES[world].items():
        x = numbers(rank, sum(splits))
        for name in NAMES:
            kept = x.clone()
            wire.since()
            found = reduce_scatter(x, splits, group, parse_payload(name), segments=segments)
            assert torch.equal(x, kept)
            out["reduce", world, shape, name] = found.result, found.sent_bytes, wire.since()
            gathered = all_gather(x[: splits[rank]], splits, group, parse_payload(name), segments=segments)
            out["gather", world, shape, name] = gathered.result, gathered.sent_bytes, wire.since()


def _alone(rank: int, group: Any, out: dict[Any, Any]) -> None:
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    x = numbers(rank, 1000)
    for name in NAMES:
        found = reduce_scatter(x, [1000], alone, parse_payload(name))
        gathered = all_gather(x, [1000], alone, parse_payload(name))
        assert found.sent_bytes == gathered.sent_bytes == 0
        out["alone", name] = found.result, gathered.result


def _not_finite(rank: int, group: Any, out: dict[Any, Any]) -> None:
    for name in NAMES:
        for bad in (torch.nan, torch.inf, -torch.inf):
            x = numbers(rank, 2000)
            if rank == 1:
                x[350] = bad
            error = torch.zeros(2000)
            found = reduce_scatter(x, [1000, 1000], group, parse_payload(name), segments=[700, 1300], error=error)
            gathered = all_gather(x[:1000], [1000, 1000], group, parse_payload(name), segments=[700, 1300])
            assert error.isfinite().all()
            out["bad", name, str(bad)] = found.result, gathered.result


def _feedback(rank: int, group: Any, out: dict[Any, Any]) -> None:
    """Sums over steps of what arrives with and without error feedback, and of what went in."""
    payload = parse_payload("int4_b32")
    for dtype in (torch.float32, torch.bfloat16):
        error, drift = torch.zeros(1024, dtype=dtype), 1e-3 * numbers(7, 1024, 7)
        sums = torch.zeros(2, 512, dtype=torch.float64)
        exact = torch.zeros(1024, dtype=torch.float64)
        for step in range(50):
            x = drift + 1e-2 * numbers(rank, 1024, step)  # the drift is below a quantization step
            exact += x
            fed = reduce_scatter(x, [512, 512], group, payload, error=error)
            sums[0] += fed.result
            sums[1] += reduce_scatter(x, [512, 512], group, payload).result
        out["feedback", str(dtype)] = sums, exact, error.double()


def _stochastic(rank: int, group: Any, out: dict[Any, Any]) -> None:
    x = even_numbers()
    payload = parse_payload("fp8_e4m3_b128")
    options: dict[str, Any] = {"rounding": "stochastic"}
    runs = [reduce_scatter(x, [256, 256], group, payload, key=RandomKey(seed=s), **options).result for s in range(200)]
    again = reduce_scatter(x, [256, 256], group, payload, key=RandomKey(seed=3), **options).result
    for name in NAMES[2:]:
        reduce_scatter(x, [256, 256], group, parse_payload(name), key=RandomKey(seed=3), **options)
    out["stochastic"] = torch.stack(runs), again


def _mu(rank: int, group: Any, out: dict[Any, Any]) -> None:
    x, payload, mu, trace = numbers(rank, 200_000), parse_payload("fp8_lm"), 64.0, []
    for _ in range(8):
        found = reduce_scatter(x, [100_000, 100_000], group, payload, segments=[150_000, 50_000], mu=mu)
        assert found.saturated is not None and found.elements == 400_000
        trace.append((mu, int(found.saturated)))
        mu = next_mu(mu, int(found.saturated) / found.elements)
    out["mu"] = trace, reduce_scatter(x, [100_000, 100_000], group, payload, segments=[150_000, 50_000], mu=mu).result


def _big(rank: int, group: Any, out: dict[Any, Any]) -> None:
    x = numbers(rank, BIG)
    for name in NAMES:
        found = reduce_scatter(x, [BIG // 2] * 2, group, parse_payload(name), segments=[BIG // 8] * 8)
        gathered = all_gather(x[: BIG // 2], [BIG // 2] * 2, group, parse_payload(name), segments=[BIG // 8] * 8)
        out["big", name] = found.sent_bytes, gathered.sent_bytes


def _bf16(rank: int, group: Any, out: dict[Any, Any]) -> None:
    x = numbers(rank, 4333).bfloat16()
    for name in NAMES:
        found = reduce_scatter(x, [1000, 3333], group, parse_payload(name), segments=[2000, 2333])
        gathered = all_gather(x[: [1000, 3333][rank]], [1000, 3333], group, parse_payload(name))
        as_fp32 = all_gather(
            x[: [1000, 3333][rank]].float(), [1000, 3333], group, parse_payload(name), dtype=torch.bfloat16
        )
        assert gathered.result.dtype == as_fp32.result.dtype == torch.bfloat16
        assert torch.equal(gathered.result, as_fp32.result)
        out["bf16", name] = found.result, gathered.result


def _two_level(rank: int, inside: Any, out: dict[Any, Any], wire: Wire) -> None:
    between = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])][rank % 2]
    splits, segments = SHAPES[4]["uneven"]
    x = numbers(rank, sum(splits))
    groups: dict[str, Any] = {"inside": inside, "between": between, "segments": segments}
    for name in NAMES:
        payload = parse_payload(name)
        wire.since()
        found = reduce_scatter_two_level(x, splits, payload, **groups)
        sent = wire.since()
        gathered = all_gather_two_level(x[: splits[rank]], splits, payload, **groups)
        out["two", name] = found.result, found.sent_bytes, sent, gathered.result, gathered.sent_bytes, wire.since()
    whole = torch.randint(-1000, 1000, (sum(splits),), generator=torch.Generator().manual_seed(rank)).float()
    fp32 = parse_payload("fp32")
    one = reduce_scatter(whole, splits, None, fp32).result
    out["two_fp32"] = one, reduce_scatter_two_level(whole, splits, fp32, **groups).result
    error = torch.zeros(sum(splits[rank % 2 :: 2]))
    bf16 = parse_payload("bf16")
    lm = reduce_scatter_two_level(
        x, splits, parse_payload("fp8_lm"), error=error, mu=8.0, inside_payload=bf16, **groups
    )
    out["two_lm"] = int(lm.saturated), lm.elements, bool(error.any()), lm.inside_bytes < lm.sent_bytes


def _all_cases(rank: int) -> dict[Any, Any]:
    """Cases of two ranks run in both pairs of the four."""
    out: dict[Any, Any] = {}
    pair = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])][rank // 2]
    wire = Wire()
    _plain(rank, None, out, wire)
    _plain(rank % 2, pair, out, wire)
    _two_level(rank, pair, out, wire)
    for case in (_alone, _not_finite, _feedback, _stochastic, _mu, _big, _bf16):
        case(rank % 2, pair, out)
    return out


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """results(world): of all cases, a dict a rank of the first `world`.

    The processes cost more than all that they do: they start once, for all of xdist's workers, which share a folder.
    """
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    done = folder / "collectives.pickle"
    try:
        (folder / "collectives.claim").touch(exist_ok=False)
    except FileExistsError:
        wait_for(done)
    else:
        try:
            outcome: Any = run_ranks(_all_cases, 4, timeout=600)
        except RankError as error:
            outcome = str(error)
        (folder / "collectives.part").write_bytes(pickle.dumps(outcome))
        (folder / "collectives.part").rename(done)
    found = pickle.loads(done.read_bytes())
    assert isinstance(found, list), found
    return lambda world: found[:world]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 150
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.2)


CASES = [(world, shape) for world, shapes in SHAPES.items() for shape in shapes]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("world", "shape"), CASES)
def test_reduce_scatter_equals_one_process(results, world, shape, name):
    splits, segments = SHAPES[world][shape]
    expected = truth.reduced([numbers(rank, sum(splits)) for rank in range(world)], splits, segments, name)
    for rank, found in enumerate(results(world)):
        result, sent, counted = found["reduce", world, shape, name]
        assert result.dtype == torch.float32 and torch.equal(result, expected[rank])
        assert sent == counted


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("world", "shape"), CASES)
def test_all_gather_equals_one_process(results, world, shape, name):
    splits, segments = SHAPES[world][shape]
    x = torch.cat([numbers(rank, sum(splits))[: splits[rank]] for rank in range(world)])
    scales = truth.shared_scales([x], segments, name) if name in truth.SHARED else None
    expected = truth.quantized(x, splits, segments, name, scales)
    for found in results(world):
        result, sent, counted = found["gather", world, shape, name]
        assert torch.equal(result, expected)
        assert sent == counted


@pytest.mark.parametrize("name", NAMES)
def test_a_group_of_one_quantizes(results, name):
    for rank, found in enumerate(results(2)):
        x = numbers(rank, 1000)
        (expected,) = truth.reduced([x], [1000], [1000], name)
        for result in found["alone", name]:
            assert torch.equal(result, expected)


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_arrives_so(results, name, bad):
    first, second = (found["bad", name, bad] for found in results(2))
    assert not first[0][350].isfinite() and not first[1][1350].isfinite()
    assert torch.equal(first[1].isfinite(), second[1].isfinite())
    shared = name in truth.SHARED
    assert bool(first[0][:300].isfinite().any()) != shared  # a whole tensor is lost with a shared scale
    assert second[0].isfinite().all()  # here lies another tensor, or other blocks


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_error_feedback_loses_nothing(results, dtype):
    found = [result["feedback", dtype] for result in results(2)]
    exact = found[0][1] + found[1][1]
    fed, plain = (torch.cat([sums[which] for sums, _, _ in found]) for which in (0, 1))
    assert (fed - exact).norm() < 0.25 * (plain - exact).norm()
    kept = found[0][2] + found[1][2]
    tolerance = 1e-6 if dtype == "torch.float32" else 1e-3
    torch.testing.assert_close(fed + kept, exact, rtol=0, atol=tolerance)


def test_stochastic_rounding_is_unbiased_and_a_function_of_the_key(results):
    for rank, found in enumerate(results(2)):
        runs, again = found["stochastic"]
        assert torch.equal(runs[3], again)
        x = even_numbers().split(256)[rank]
        step = 2.0 ** (torch.frexp(x)[1] - 4)  # of E4M3; in units of it a sum of two has a variance of at most 1/2
        bias = ((runs.mean(0) - 2 * x) / step)[x.abs() > 0.1]
        assert bias.numel() > 20 and bias.abs().max() < 5 * (0.5 / len(runs)) ** 0.5
        # ranks of equal numbers round apart: sums of one up and one down, odd multiples of a step
        odd = (runs / step).remainder(2.0) == 1.0
        assert odd[:, x.abs() > 0.1].any()


def test_mu_halves_until_nothing_saturates(results):
    trace, _ = results(2)[0]["mu"]
    assert trace == results(2)[1]["mu"][0]
    xs = [numbers(rank, 200_000) for rank in range(2)]
    scales = truth.shared_scales(xs, [150_000, 50_000], "fp8_lm").repeat_interleave(torch.tensor([150_000, 50_000]))
    for mu, count in trace:
        assert count == sum(int(((x * (scales * mu)).abs() >= 432).sum()) for x in xs)  # 432 rounds to 448
    mus = [mu for mu, _ in trace]
    assert mus[1] == 32.0 and trace[0][1] > 4
    for (mu, count), later in zip(trace, mus[1:], strict=False):
        assert later == (mu / 2 if count / 400_000 > 1e-5 else mu * 2 ** (1 / 1000))
    last = next_mu(*[(mu, count / 400_000) for mu, count in trace][-1])
    expected = truth.reduced(xs, [100_000, 100_000], [150_000, 50_000], "fp8_lm", last)
    for rank in range(2):
        assert torch.equal(results(2)[rank]["mu"][1], expected[rank])


@pytest.mark.parametrize("name", NAMES)
def test_bytes_on_the_wire(results, name):
    for which in (0, 1):
        fp32, bf16, here = (results(2)[0]["big", other][which] for other in ("fp32", "bf16", name))
        assert fp32 == 4 * BIG // 2 and bf16 == 2 * BIG // 2
        if "fp8" in name or "int" in name:
            assert here <= 0.27 * fp32 and here <= 0.53 * bf16
        if name == "int4_b32":
            assert here == 5 * BIG // 2 // 8


@pytest.mark.parametrize("name", NAMES)
def test_bf16_tensors(results, name):
    xs = [numbers(rank, 4333).bfloat16() for rank in range(2)]
    expected = truth.reduced(xs, [1000, 3333], [2000, 2333], name)
    found = [result["bf16", name] for result in results(2)]
    for rank in range(2):
        assert torch.equal(found[rank][0], expected[rank])
    assert torch.equal(found[0][1], found[1][1])
    if name in ("bf16", "fp32"):
        assert torch.equal(found[0][1], torch.cat([xs[0][:1000], xs[1][:3333]]))


@pytest.mark.parametrize("name", NAMES)
def test_two_levels_quantize_the_sums_of_nodes(results, name):
    splits, segments = SHAPES[4]["uneven"]
    xs = [numbers(rank, sum(splits)) for rank in range(4)]
    expected = truth.reduced([xs[0] + xs[1], xs[2] + xs[3]], splits, segments, name)
    one_level = results(4)[0]["gather", 4, "uneven", name][0]
    for rank, found in enumerate(results(4)):
        result, sent, counted, gathered, gather_sent, gather_counted = found["two", name]
        assert torch.equal(result, expected[rank])
        assert torch.equal(gathered, one_level)
        assert sent == counted and gather_sent == gather_counted


def test_two_levels_equal_one_in_fp32(results):
    for found in results(4):
        one, two = found["two_fp32"]
        assert torch.equal(one, two)


def test_two_levels_count_saturation_over_all_ranks_and_feed_errors_back(results):
    found = [result["two_lm"] for result in results(4)]
    assert len(set(found)) == 1
    saturated, elements, has_error, fewer_inside = found[0]
    assert saturated > 0 and elements == 2 * sum(SHAPES[4]["uneven"][0]) and has_error and fewer_inside
