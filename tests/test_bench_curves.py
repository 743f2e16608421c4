"""The kept losses of the BF16 baselines are found again: nothing that is at its default is part of their hash."""

from __future__ import annotations

from bench.curves import BASELINE, BASELINES, SMALL, config_hash


def test_the_kept_baselines_are_those_of_the_recipe_as_it_is():
    kept = {f"{BASELINE}_{config_hash(BASELINE, (*SMALL, f'train.seed={seed}'))}_seed{seed}.jsonl" for seed in range(3)}
    assert kept == {path.name for path in BASELINES.iterdir()}
    changed = config_hash(BASELINE, (*SMALL, "train.seed=0", "optimizer.lr=1e-3"))
    assert not [path for path in BASELINES.iterdir() if changed in path.name]
