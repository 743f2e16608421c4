"""One fault of each kind, as `python -m tests.chaos` does it thirty times."""

from __future__ import annotations

import sys

import pytest

from tests.chaos import FAULTS, run_chaos


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes as Linux shows them")
def test_one_fault_of_each_kind_loses_nothing_and_changes_nothing(tmp_path):
    outcomes, wrong = run_chaos(tmp_path, len(FAULTS), 1, FAULTS)
    assert not wrong and len(outcomes) >= len(FAULTS) - 1, "a full disk needs root"
