"""Noise of real pairs, fitted and drawn anew; and how often the comparison errs on it: `python -m tests.curve_noise`.

The fit: 10 recipes x 3 seeds of tests/data/paired_losses.npz, gaps in percent of the baseline after the warm-up, each
less its recipe's mean over the seeds (times sqrt(3/2), for the mean is estimated). Their pooled autocovariance C has
three parts:

    offset   one number a seed: variance = mean C at lags 200 to 300 (a chaotic run ends where it ends)
    slow     an autoregression of the rest of C(1), with the lag at which that has fallen to 1/e
    fast     the rest of C(0), drawn from what is left after a moving mean of 21 steps: heavy tails as they are
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from report.compare.analysis import Comparison, Settings, analyse
from report.compare.curves import Curve
from report.compare.limits import Limit
from report.compare.pairing import pair

FILE = Path(__file__).parent / "data" / "paired_losses.npz"
WARMUP = 25
NO_GAP = Limit(percent=0.0, unit="loss", source="test")


@dataclass(frozen=True)
class Noise:
    """offset, slow, fast: standard deviations in percent; tau: steps; pool (n,): fast noise, of unit variance."""

    offset: float
    slow: float
    tau: float
    fast: float
    pool: np.ndarray

    def draw(self, rng: np.random.Generator, steps: int, drift: float = 1.0) -> np.ndarray:
        """(steps,) of a seed, in percent; drift scales the offset and the slow part."""
        keep = np.exp(-1 / self.tau)
        shocks = rng.standard_normal(steps) * np.sqrt(1 - keep**2)
        shocks[0] = rng.standard_normal()
        slow = np.empty(steps)
        last = 0.0
        for i, shock in enumerate(shocks):
            last = slow[i] = keep * last + shock
        offset = self.offset * rng.standard_normal()
        return drift * (offset + self.slow * slow) + self.fast * rng.choice(self.pool, steps)


def baselines() -> np.ndarray:
    """(3, 500) losses of BF16, nats a token."""
    return np.load(FILE)["baseline"] / 5e4


def residuals() -> np.ndarray:
    """(30, 475) gaps in percent, without what a recipe's seeds have in common."""
    data = np.load(FILE)
    gaps = 100 * data["behind"][:, :, WARMUP:].astype(np.float64) / data["baseline"][:, WARMUP:]
    return ((gaps - gaps.mean(axis=1, keepdims=True)) * np.sqrt(1.5)).reshape(-1, gaps.shape[-1])


def fit() -> Noise:
    """The noise of the real pairs."""
    rows = residuals()
    n = rows.shape[1]
    covariance = np.array([(rows[:, : n - k] * rows[:, k:]).mean() for k in range(301)])
    offset = covariance[200:].mean()
    slow = covariance[1] - offset
    tau = int(np.argmax(covariance[1:] - offset < slow / np.e)) + 1
    rough = np.stack([row[10:-10] - np.convolve(row, np.ones(21) / 21, "valid") for row in rows])
    pool = (rough / rough.std(axis=1, keepdims=True)).ravel()
    return Noise(np.sqrt(offset), np.sqrt(slow), float(tau), np.sqrt(covariance[0] - covariance[1]), pool)


def curve(losses: np.ndarray, seed: int, side: str) -> Curve:
    """A curve of these losses (n,), one a step."""
    unknown, none = np.full(len(losses), np.nan), np.zeros(len(losses))
    return Curve(
        source=f"{side}/seed{seed}",
        kind="test",
        step=np.arange(1, len(losses) + 1),
        loss=losses,
        grad_norm=unknown,
        seconds=unknown,
        tokens=unknown,
        samples=unknown,
        skipped=none,
        nan=none,
        validation={},
    )


def compare(gaps: np.ndarray, limit: Limit = NO_GAP) -> Comparison:
    """Compare real baselines with candidates whose gaps are (seeds, 500), in percent of the loss."""
    losses = baselines()
    base = [losses[i % len(losses)] for i in range(len(gaps))]
    pairs = pair(
        [curve(b, i, "baseline") for i, b in enumerate(base)],
        [curve(b * (1 + g / 100), i, "candidate") for i, (b, g) in enumerate(zip(base, gaps, strict=True))],
    )
    return analyse(pairs, Settings(limit=limit))


def found(gap: float, *, seeds: int = 3, drift: float = 1.0, trials: int = 200, stream: int = 0) -> float:
    """Share of `trials` in which a true gap (percent) is found: the interval of the final steps lies above 0."""
    noise, rng = fit(), np.random.default_rng(stream)
    outside = 0
    for _ in range(trials):
        gaps = gap + np.stack([noise.draw(rng, 500, drift) for _ in range(seeds)])
        outside += compare(gaps).verdict == "outside"
    return outside / trials


def main() -> None:
    noise = fit()
    print(f"offset {noise.offset:.2f} %, slow {noise.slow:.2f} % over {noise.tau:.0f} steps, fast {noise.fast:.2f} %")
    print(f"kurtosis of the fast noise {(noise.pool**4).mean():.2f}, largest {np.abs(noise.pool).max():.1f}")
    print("seeds  drift  found at a gap of 0, 0.3, 1, 2 %")
    for seeds in (3, 10):
        for share in (1.0, 0.3, 0.1):
            rates = [found(gap, seeds=seeds, drift=share) for gap in (0.0, 0.3, 1.0, 2.0)]
            print(f"{seeds:5d}  {share:5.1f}  " + "  ".join(f"{100 * rate:5.1f} %" for rate in rates))


if __name__ == "__main__":
    main()
