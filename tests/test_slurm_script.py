"""What slurm/train.sbatch does at the start of a job and when the run has ended; Slurm is played by small programs
(tests/slurm_programs.py), and real in tests/test_slurm_cluster.py."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.slurm_programs import ends, script

SAVES = 'mkdir -p "$RUN/checkpoints"; echo step-00000020 > "$RUN/checkpoints/latest"; '
REQUEUED = "requeue 42\n"


@pytest.mark.parametrize(
    ("node_does", "variables", "code", "calls"),
    [
        (ends(0, "done"), {}, 0, ""),
        (ends(75), {}, 75, REQUEUED),
        (ends(75), {"STATE": "CANCELLED"}, 75, ""),
        (ends(75), {"STATE": "COMPLETING"}, 75, ""),
        (ends(2) + "exit 1", {}, 2, ""),
        (ends(3) + SAVES + "exit 1", {}, 3, ""),
        (ends(4) + SAVES + "exit 1", {}, 4, ""),
        (ends(5) + SAVES + "exit 1", {}, 5, ""),
        (ends(1) + SAVES + "exit 1", {}, 1, REQUEUED),
        (ends(124) + "exit 1", {}, 124, ""),
        (ends(124) + SAVES + "exit 1", {}, 124, REQUEUED),
        (SAVES + "exit 137", {}, 1, REQUEUED),
        ("exit 137", {}, 1, ""),
    ],
    ids=[
        "done",
        "saved",
        "cancelled",
        "requeued by Slurm",
        "usage",
        "data",
        "checkpoint",
        "stuck",
        "crashed after a save",
    ]
    + ["hung", "hung after a save", "killed after a save", "killed"],
)
def test_what_follows_the_end_of_a_run(tmp_path, tools, node_does, variables, code, calls):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "exit.json").write_text('{"code": 75, "reason": "of the start before"}\n')
    done = script(tools, tmp_path / "run", variables | {"NODE": node_does})
    assert done.returncode == code, done.stdout + done.stderr
    assert (tools / "calls").read_text() == calls
    assert "cannot be requeued" not in done.stdout


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (2, 2), (3, 3), (4, 4), (5, 5), (130, 130)])
def test_a_run_that_is_done_or_wants_mending_is_not_started(tmp_path, tools, code, expected):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "exit.json").write_text(json.dumps({"code": code, "reason": "x"}) + "\n")
    done = script(tools, tmp_path / "run", {})
    assert done.returncode == expected and not (tools / "sruns").read_text(), done.stderr


def test_the_largest_number_of_nodes_that_it_can_use_is_used(tmp_path, tools):
    (tmp_path / "run").mkdir()
    end = {"END": "2026-11-26T08:00:00", "TZ": "UTC", "NODE": ends(0)}
    for sizes, expected in (("8 2 1", "--nodes=2 --ntasks=2 "), ("3", "--nodes=3 --ntasks=3 ")):
        (tmp_path / "run" / "exit.json").unlink(missing_ok=True)
        done = script(tools, tmp_path / "run", end, sizes=sizes)
        assert done.returncode == 0 and expected in (tools / "sruns").read_text(), done.stderr
    assert (tools / "sruns").read_text().rstrip().endswith(" 1795680000"), "the end of the job, for the run"
    (tmp_path / "run" / "exit.json").unlink()
    done = script(tools, tmp_path / "run", {}, sizes="8 4")
    assert done.returncode == 2 and "the run can use: 8 4" in done.stdout


def test_a_chain_leaves_it_to_the_next_job(tmp_path, tools):
    (tmp_path / "run").mkdir()
    done = script(tools, tmp_path / "run", {"NODE": ends(75)}, then="next")
    assert done.returncode == 75 and "next job" in done.stdout and not (tools / "calls").read_text()


def test_slurm_that_never_answers_is_said(tmp_path, tools):
    (tmp_path / "run").mkdir()
    done = script(tools, tmp_path / "run", {"NODE": ends(75) + f"echo exit 1 > {tools}/squeue"})
    assert done.returncode == 75 and "cannot ask Slurm how it stands, not requeued" in done.stdout
    assert not (tools / "calls").read_text()


ECC = "echo UNHEALTHY n2: GPU 0 has 3 uncorrected ECC errors; exit 1"
UNFIT = f'case "$*" in *nodelist=*n2*--check) {ECC};; *--check|*--ping) exit 0;; esac; '


def checked(tools: Path, run: Path, node: str, sizes: str = "3", **options) -> subprocess.CompletedProcess[str]:
    """The batch script with checks of its three nodes."""
    run.mkdir(exist_ok=True)
    variables = {"CHECK": "1", "NODE": node} | options.pop("variables", {})
    return script(tools, run, variables, sizes=sizes, **options)


@pytest.mark.parametrize("then", ["requeue", "next"])
@pytest.mark.parametrize(("excluded", "all_of_them"), [("", "n2"), ("n7", "n7,n2")])
def test_an_unfit_node_is_left_out(tmp_path, tools, then, excluded, all_of_them):
    done = checked(tools, tmp_path / "run", UNFIT, then=then, variables={"EXCLUDED": excluded})
    expected = ["requeuehold 42", f"update JobId=42 ExcNodeList={all_of_them}", "release 42"]
    assert (tools / "calls").read_text().splitlines() == expected, done.stdout
    assert (tmp_path / "run" / "unhealthy").read_text() == "n2\n"


def test_where_nothing_is_requeued_the_next_job_leaves_the_node_out(tmp_path, tools):
    done = checked(tools, tmp_path / "run", UNFIT, then="next", variables={"REFUSES": "requeuehold"})
    calls = (tools / "calls").read_text().splitlines()
    assert set(calls[:-1]) == {"requeuehold 42"} and calls[-1] == "update JobId=43 ExcNodeList=n2", done.stdout
    assert "cannot be requeued" in done.stdout and "the next job of the chain goes on" in done.stdout


def test_a_run_that_can_use_fewer_nodes_goes_on_without_the_unfit_one(tmp_path, tools):
    done = checked(tools, tmp_path / "run", UNFIT + ends(75), sizes="2 1")
    assert done.returncode == 75 and "goes on with 2 x 8 processes: n1 n3" in done.stdout
    first, second, ping, run = (tools / "sruns").read_text().splitlines()
    assert "--nodelist=n1,n2 " in first and "--kill-on-bad-exit=0" in first and "--check" in second
    assert "--nodelist=n1,n3 " in ping and "--ping" in ping and "--kill-on-bad-exit=1" in ping
    assert "--nodelist=n1,n3 " in run and "--ping" not in run
    assert "update JobId=42 ExcNodeList=n2" in (tools / "calls").read_text(), "nor is it given the node the next time"


ALIKE = "for n in n1 n2 n3; do echo UNHEALTHY $n: 4 GPUs for 8 processes; done; exit 1"


@pytest.mark.parametrize(
    ("check", "code", "expected"),
    [
        (ALIKE, 2, "all 3 nodes say: 4 GPUs for 8 processes; no node of them is left out"),
        (ends(4, "/run has 0.0 GiB free") + "echo SHARED PROBLEM, seen by n1: x; exit 4", 4, "no node is to blame"),
        ("echo SHARED PROBLEM, seen by n1: /run has 0.0 GiB free; exit 4", 4, "no node is to blame"),
    ],
    ids=["all alike", "shared", "shared and full"],
)
def test_no_node_is_left_out_for_what_all_share(tmp_path, tools, check, code, expected):
    done = checked(tools, tmp_path / "run", check)
    assert done.returncode == code and expected in done.stdout, done.stdout
    assert not (tools / "calls").read_text() and not (tmp_path / "run" / "unhealthy").exists()


@pytest.mark.parametrize("step", ["--check", "--ping"])
def test_a_signal_during_the_checks_is_a_request_to_stop(tmp_path, tools, step):
    node = f'case "$*" in *{step}) {ends(75, "received SIGUSR1 before the run began")};; *--check);; *) exit 9;; esac'
    done = checked(tools, tmp_path / "run", node)
    assert done.returncode == 75 and (tools / "calls").read_text() == REQUEUED, done.stdout


@pytest.mark.parametrize("step", ["--check", "--ping"])
def test_a_check_that_names_no_node_is_tried_three_times(tmp_path, tools, step):
    node = f'case "$*" in *{step}) exit 1;; *) {ends(0)};; esac'
    calls = []
    for _ in range(3):
        done = checked(tools, tmp_path / "run", f'rm -f "$RUN/exit.json"; {node}')
        calls.append((tools / "calls").read_text())
    assert calls == [REQUEUED, REQUEUED, ""] and done.returncode == 1 and "in 3 starts" in done.stdout
    checked(tools, tmp_path / "run", 'case "$*" in *--check|*--ping) ;; *) ' + ends(0) + ";; esac")
    assert not (tmp_path / "run" / "unmet").exists()
