"""One fault of each kind, as `python -m tests.chaos` does it thirty times; and its verdicts find what they look for."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from tests.chaos import FAULTS, run_chaos
from tests.chaos_verdict import Outcome, judge

CURVE = [(step, 5.0 - step) for step in range(1, 20)]
GOOD = Outcome(
    number=1,
    fault="kill",
    target="rank 1",
    at=11,
    newest=10,
    damaged=None,
    resumed=10,
    ends=[(1, "another rank is gone")],
    said=[(1, "another rank is gone")],
    seconds=9.0,
)
LOG = "resumed"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes as Linux shows them")
def test_one_fault_of_each_kind_loses_nothing_and_changes_nothing(tmp_path):
    outcomes, wrong = run_chaos(tmp_path, len(FAULTS), 1, FAULTS)
    assert not wrong and len(outcomes) >= len(FAULTS) - 1, "a full disk needs root"


def test_what_should_come_of_a_fault_is_not_wrong():
    assert judge(GOOD, 0, LOG, CURVE[:12], CURVE) == []
    stopped = replace(GOOD, fault="stop", said=[(124, "no progress")], ends=[])
    assert judge(stopped, 800, LOG, CURVE[:12], CURVE) == []
    damaged = replace(GOOD, fault="flip", newest=10, damaged=12)
    assert judge(damaged, 0, f"DAMAGED CHECKPOINT\n{LOG}", CURVE[:12], CURVE) == []
    full = replace(GOOD, fault="disk", ends=[(4, "No space left on device")])
    assert judge(full, 0, f"No space left on device\n{LOG}", CURVE, CURVE) == []


@pytest.mark.parametrize(
    ("changes", "stacks", "curve", "expected"),
    [
        ({"newest": 12}, 0, CURVE, "lost a completed save"),
        ({"fault": "flip", "damaged": 10}, 0, CURVE, "from the damaged checkpoint of step 10"),
        ({"ends": [(4, "cannot write")]}, 0, CURVE, "the job would have ended: 4 cannot write"),
        ({"fault": "disk", "ends": [(3, "data")]}, 0, CURVE, "the job would have ended: 3 data"),
        ({"fault": "disk"}, 0, CURVE, "the disk is full"),
        ({"fault": "stop", "said": [(124, "hung")]}, 0, CURVE, "no watchdog"),
        ({"fault": "stop"}, 800, CURVE, "no watchdog"),
        ({"fault": "agent", "said": [(75, "received SIGTERM")]}, 0, CURVE, "did not save and stop"),
        ({"fault": "flip", "damaged": 12}, 0, CURVE, "no word of the damage"),
        (
            {},
            0,
            [*CURVE[:11], (12, -7.5)],
            "1 losses differ",
        ),
    ],
)
def test_what_should_not_come_of_a_fault_is_found(changes, stacks, curve, expected):
    assert expected in "; ".join(judge(replace(GOOD, **changes), stacks, LOG, curve, CURVE))
