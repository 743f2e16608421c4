"""What a job does on each node: its checks, its agent, and the meeting of all processes (slurm/node.py, ping.py)."""

from __future__ import annotations

import json
import subprocess
import sys

import recipe as recipes
from run import exits
from run.records import write_resolved
from slurm import health, node
from tests.launch import ROOT, run_script, tiny, train
from tests.slurm_programs import program


def test_the_agent_of_a_node():
    options = ["/run", "--host=n1", "--address=10.0.0.1", "--port=20042", "--nodes=2", "--per-node=8", "--restarts=3"]
    job = {"SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": "1", "SLURM_STEP_ID": "1"}
    first, second = (node.agent(node.parse(options), job | {"SLURMD_NODENAME": name}) for name in ("n1", "n2"))
    assert "--rdzv-conf=is_host=1" in first and "--rdzv-conf=is_host=0" in second
    assert {"--rdzv-id=42.1.1", "--nnodes=2", "--nproc-per-node=8", "--max-restarts=3"} <= set(first)
    ping = node.agent(node.parse([*options, "--ping"]), job)
    assert ping[-2:] == [str(ROOT / "slurm" / "ping.py"), "/run"] and "--max-restarts=0" in ping
    assert node.environment({"NCCL_DEBUG": "INFO"})["NCCL_DEBUG"] == "INFO"


def texts(found: list[health.Problem]) -> list[tuple[str, int | None]]:
    return [(problem.text, problem.code) for problem in found]


def test_gpus_and_room():
    assert health.gpu_problems("0, 0\n1, [N/A]\n", 2) == []
    expected = [("2 GPUs for 4 processes", None), ("GPU 1 has 3 uncorrected ECC errors", None)]
    assert texts(health.gpu_problems("0, 0\n1, 3\n", 4)) == expected
    assert texts(health.gpu_problems("", 1)) == [("0 GPUs for 1 processes", None)]


def test_a_place_without_room_or_rights(tmp_path):
    assert health.room_problems(tmp_path, 1, "n1") == []
    (own,), (shared,) = (health.room_problems(tmp_path, 1 << 60, "n1", code) for code in (None, 4))
    assert "GiB are needed" in own.text and own.code is None and shared.code == 4
    (absent,) = health.room_problems(tmp_path / "absent", 1, "n1", 4)
    assert "No such file" in absent.text and absent.code is None, "not mounted here: this node's own"
    assert not list(tmp_path.iterdir())


def test_what_a_node_finds_and_says(tmp_path, capsys, tools, monkeypatch):
    """Its own problems, and those of the recipe or of the disk, which end the job."""
    run = tmp_path / "run"
    write_resolved(run, recipes.load(str(tiny(tmp_path)), ("device=auto",)))
    program(tools, "nvidia-smi", "echo 0, 7")
    place = {"SLURMD_NODENAME": "n1", "SLURM_GPUS_ON_NODE": "1"}
    assert node.check(run, 1, place) == 1
    assert capsys.readouterr().out == "UNHEALTHY n1: GPU 0 has 7 uncorrected ECC errors\n"
    assert not (run / "exit.json").exists()
    assert node.check(run, 4, place) == 2
    assert "SHARED PROBLEM, seen by n1: Slurm gave the job 1 GPUs a node for 4" in capsys.readouterr().out
    assert json.loads((run / "exit.json").read_text())["code"] == 2
    exits.clear(run)
    monkeypatch.setattr(health, "STATE_BYTES", 1 << 50)
    assert node.check(run, 1, place) == 4, "the disk that all share comes first"
    assert "UNHEALTHY n1: GPU 0" in (said := capsys.readouterr().out) and "SHARED PROBLEM, seen by n1: " in said
    (run / "resolved.yaml").unlink()
    exits.clear(run)
    assert node.check(run, 1, place) == 2


BLOCKED = """
import os, signal, sys
from pathlib import Path
from run import exits
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
assert not exits.stopped_before(Path(sys.argv[1]))
os.kill(os.getpid(), signal.SIGUSR1)
assert exits.stopped_before(Path(sys.argv[1]))
"""


def test_a_signal_before_the_run_is_recorded_as_its_end(tmp_path):
    subprocess.run([sys.executable, "-c", BLOCKED, str(tmp_path)], cwd=ROOT, check=True)
    expected = {"code": 75, "reason": "received SIGUSR1 before the run began"}
    assert json.loads((tmp_path / "exit.json").read_text()) == expected


def test_a_worker_restarted_after_a_final_code_ends_with_it(tmp_path):
    """torchrun restarts workers whatever they ended with; only those of the same start of the same job are told."""
    run = tmp_path / "run"
    run.mkdir()
    exits.record(run, 5, "stuck", 0, "42.0.2")
    assert [exits.settled(run, name) for name in ("42.0.2", "42.1.2", None)] == [5, None, None]
    said = train(tiny(tmp_path), "train.steps=2", variables=[{node.ATTEMPT: "42.0.2"}])
    assert said.returncode == 5 and not (run / "metrics.jsonl").exists(), said.stderr
    assert json.loads((run / "exit.json").read_text()) == {"code": 5, "reason": "stuck"}
    exits.clear(run)
    exits.record(run, 1, "crashed", 0, "42.0.2")
    assert exits.settled(run, "42.0.2") is None
    with open(run / "exits.jsonl", "a") as torn:
        torn.write('{"time": "2026')
    assert exits.settled(run, "42.0.2") is None


# --- slurm/ping.py

SKEWED = """
import os, runpy, sys, time
if os.environ["RANK"] == "1":
    right = time.time
    time.time = lambda: right() - 100
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_processes_meet_add_up_and_compare_clocks(tmp_path):
    (tmp_path / "resolved.yaml").write_text("device: cpu\n")
    met = run_script(str(ROOT / "slurm" / "ping.py"), str(tmp_path), ranks=2)
    assert met.returncode == 0 and "2 ranks reach each other" in met.stdout, met.stderr
    assert "MORE THAN" not in met.stdout
    (tmp_path / "skewed.py").write_text(SKEWED)
    words = (str(tmp_path / "skewed.py"), str(ROOT / "slurm" / "ping.py"), str(tmp_path))
    skewed = run_script(*words, ranks=2)
    assert skewed.returncode == 0 and "MORE THAN 5 s: set the clock of " in skewed.stdout, skewed.stderr
    (tmp_path / "resolved.yaml").write_text("name: x\n")
    failed = run_script(str(ROOT / "slurm" / "ping.py"), str(tmp_path), ranks=2)
    assert failed.returncode == 2 and "cannot read the device in" in failed.stderr
    assert "Traceback" not in failed.stderr
