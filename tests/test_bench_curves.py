"""The kept losses of the BF16 baselines are found again: nothing that is at its default is part of their hash."""

from __future__ import annotations

from bench.curves import BASELINE, BASELINES, SMALL, config_hash

EPOCH = ("train.steps=1500", "eval.interval=1500")


def test_the_kept_baselines_are_those_of_the_recipe_as_it_is():
    runs = [((*SMALL, f"train.seed={seed}"), seed) for seed in range(3)]
    runs += [((*SMALL, *EPOCH, f"train.seed={seed}"), seed) for seed in range(3)]  # docs/numerics.md
    kept = {f"{BASELINE}_{config_hash(BASELINE, overrides)}_seed{seed}.jsonl" for overrides, seed in runs}
    assert kept == {path.name for path in BASELINES.iterdir()}
    changed = config_hash(BASELINE, (*SMALL, "train.seed=0", "optimizer.lr=1e-3"))
    assert not [path for path in BASELINES.iterdir() if changed in path.name]
