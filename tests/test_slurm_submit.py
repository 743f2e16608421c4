"""What is submitted to Slurm, and what is refused before; Slurm itself is played by small programs
(tests/slurm_programs.py), and real in tests/test_slurm_cluster.py."""

from __future__ import annotations

import errno
import json
import os
import shlex
from pathlib import Path

import pytest
import yaml

from errors import UsageError, UserError
from recipe import load
from report.plan.hardware import GPUS
from report.plan.plan import Planner
from slurm import jobs, submit
from slurm.snapshot import take_snapshot
from tests.launch import ROOT, tiny
from tests.slurm_programs import program, script

FORGOTTEN = "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1"


def call(capsys, *words: str) -> tuple[int, str, str]:
    code = submit.main(words)
    return code, *capsys.readouterr()


def test_a_dry_run_shows_the_run_and_writes_nothing(tmp_path, capsys):
    words = ("--recipe", str(tiny(tmp_path)), "--nodes=4", "--min-nodes=1", "--per-node=1", "--chain=2", "--dry-run")
    code, output, errors = call(capsys, *words, "--partition=gpu", "--time=1-0", "--exclusive", "train.micro_batch=1")
    assert code == 0, errors
    assert "39,072 parameters" in output and "nodes that it can use: 4 or 2 or 1, with 1 processes each" in output
    first, second = (shlex.split(line) for line in output.splitlines() if line.startswith("sbatch"))
    assert {"--nodes=1-4", "--gpus-per-node=1", "--partition=gpu", "--time=1-0", "--exclusive"} <= set(first)
    assert "--signal=USR1@120" in first and first[-1] == "next" and second[-1] == "requeue"
    assert second[1] == "--dependency=afterany:JOB"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--nodes=3"], "train.global_batch 8 is not divisible"),
        (["--nodes=1", "parallel.tp=3"], "does not divide"),
        (["--nodes=1", "train.stpes=3"], "did you mean train.steps"),
        (["--nodes=1", "-p", "gpu"], "--name=value"),
        (["--nodes=1", "--array=0-3"], "--seeds makes the array"),
        (["--nodes=1", "--time=3"], "run.stop_before_s=120"),
        (["--nodes=1", "--signal=USR1@5"], "run.stop_before_s says"),
        (["--nodes=1", "--seeds=0,0"], "--seeds is '0,0'"),
        (["--nodes=1", "--min-nodes=2"], "--min-nodes is 2"),
        (["--nodes=4", "--min-nodes=3"], "no number of nodes from 3 to 3 with 1 processes each; use --min-nodes=2"),
        (["--nodes=1", "--chain=2", "--dependency=afterok:7"], "--dependency with --chain"),
        (["--nodes=1", "run.dir=100%done"], "['%']"),
        (["--nodes=1", "--container-mounts=/a:/a"], "needs --container-image"),
        (["--nodes=1", "precision.policy=nvfp5"], "nvfp5"),
        (["--nodes=1", "--gpu=h10"], "did you mean h100?"),
        (["--nodes=1", "--gpu=cpu"], "--gpu cpu is no GPU"),
        (["--nodes=1", "--gpu=h100", "device=cpu"], "device is cpu"),
        (["--nodes=1", "--gpu=SMALL"], "does not fit: tp 1 pp 1 dp 1"),
    ],
)
def test_what_would_fail_is_refused_before_the_queue(tmp_path, capsys, words, expected):
    (tmp_path / "small.yaml").write_text("{base: h100, memory: 1e5}")
    words = [word.replace("SMALL", str(tmp_path / "small.yaml")) for word in words]
    code, output, errors = call(capsys, "--recipe", str(tiny(tmp_path)), "--per-node=1", *words)
    assert code == 2 and expected in errors and not output, errors
    assert not (tmp_path / "run").exists()


def test_with_a_gpu_only_numbers_of_nodes_on_which_the_layout_fits_are_used(tmp_path, capsys):
    """Masters and states are divided by the ranks: what four hold, one may not."""
    recipe = tiny(tmp_path)
    words = ("zero.stage=1", "train.micro_batch=1")
    planner = Planner(load(str(recipe), words, 4), GPUS["h100"], 1)
    peaks = [planner.in_bytes(planner.recipe, ranks).fullest.peak for ranks in (4, 2, 1)]
    assert peaks == sorted(peaks)
    gpu = tmp_path / "small.yaml"
    gpu.write_text(f"{{base: h100, usable: 1, memory: {peaks[1]}.5}}")
    asked = ("--recipe", str(recipe), "--nodes=4", "--min-nodes=1", "--per-node=1", f"--gpu={gpu}", "--dry-run")
    code, output, errors = call(capsys, *asked, *words)
    assert code == 0, errors
    assert "nodes that it can use: 4 or 2, with" in output and "planned on 4 small: 0.0 of 0.0 GiB" in output
    assert "--nodes=2-4" in output


def test_times_of_slurm():
    given = {"5": 300, "5:30": 330, "1:0:0": 3600, "2-3": 183600, "2-3:04": 183840, "1-0:0:1": 86401, "UNLIMITED": None}
    assert {text: submit.seconds_of(text) for text in given} == given


def test_no_value_of_a_recipe_reaches_a_shell(tmp_path, capsys, tools):
    """A name, a directory and a mount full of what a shell would act on arrive as single words."""
    program(tools, "sbatch", f'for word in "$@"; do printf "%s\\0" "$word"; done >> {tmp_path}/words; echo 77')
    program(tools, "squeue", FORGOTTEN)
    evil = "$(touch pwned);`touch pwned` &&"
    recipe = tmp_path / "evil.yaml"
    tree = yaml.safe_load(tiny(tmp_path).read_text()) | {"name": evil, "run": {"dir": f"{tmp_path}/{evil}"}}
    recipe.write_text(yaml.safe_dump(tree))
    code, output, errors = call(
        capsys, "--recipe", str(recipe), "--nodes=1", "--seeds=4,7", "--container-image=a b", "--per-node=1"
    )
    assert code == 0 and output == f"job 77: {tmp_path}/{evil}\n", errors
    words = (tmp_path / "words").read_text().split("\0")
    assert f"--job-name={evil}" in words and f"--output={tmp_path}/{evil}/slurm-%A_%a.log" in words
    assert "--array=4,7" in words and "--container-image=a b" in words and f"{tmp_path}/{evil}" in words
    for seed in (4, 7):
        resolved = yaml.safe_load((tmp_path / evil / f"seed-{seed}" / "resolved.yaml").read_text())
        assert resolved["train"]["seed"] == seed and resolved["run"]["dir"] == f"{tmp_path}/{evil}/seed-{seed}"
    jobs = json.loads((tmp_path / evil / "jobs.json").read_text())
    assert [job["id"] for job in jobs] == ["77"]
    program(tools, "squeue", "echo RUNNING")
    code, _, errors = call(capsys, "--recipe", str(recipe), "--nodes=1", "--seeds=4,7", "--per-node=1")
    assert code == 2 and "job 77 (RUNNING)" in errors
    code = (tmp_path / evil / "code").iterdir().__next__()
    run = script(tools, tmp_path / evil, {"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_JOB_ID": "77"}, code=code)
    assert run.returncode == 0, run.stdout + run.stderr
    assert not list(tmp_path.rglob("pwned")) and not Path("pwned").exists()


@pytest.mark.parametrize(("answer", "expected"), [("sleep 9", "within 0.2 s"), ("echo down >&2; exit 1", "down")])
def test_squeue_that_does_not_answer_is_one_message(tmp_path, capsys, tools, monkeypatch, answer, expected):
    """The job may run: it must not be thought to have ended."""
    program(tools, "sbatch", "echo 77")
    program(tools, "squeue", answer)
    words = ("--recipe", str(tiny(tmp_path)), "--nodes=1", "--per-node=1")
    assert call(capsys, *words)[0] == 0
    monkeypatch.setattr(jobs, "TIMEOUT_S", 0.2)
    code, _, errors = call(capsys, *words)
    assert code == 1 and expected in errors and "try again" in errors
    program(tools, "squeue", FORGOTTEN)
    assert call(capsys, *words)[0] == 0


def test_a_size_that_only_building_refuses_is_refused(tmp_path, capsys, monkeypatch):
    def build(recipe, world_size):
        if world_size == 2:
            raise UsageError("no")
        return "report"

    monkeypatch.setattr(submit, "dry_run", build)
    code, output, errors = call(capsys, "--recipe", str(tiny(tmp_path)), "--nodes=4", "--min-nodes=1", "--per-node=1")
    assert code == 2 and "on 2 nodes, which --min-nodes allows: no" in errors and not output


def test_a_chain_that_breaks_off_names_what_was_submitted(tmp_path, capsys, tools):
    program(tools, "squeue", FORGOTTEN)
    program(tools, "sbatch", 'case "$*" in *afterany*) echo limit >&2; exit 1;; *) echo 77; esac')
    words = ("--recipe", str(tiny(tmp_path)), "--nodes=1", "--per-node=1", "--chain=2")
    code, _, errors = call(capsys, *words)
    assert code == 1 and "limit (already submitted of the chain: 77)" in errors


def test_files_of_jobs_that_cannot_be_read_or_written(tmp_path):
    (tmp_path / "a" / "jobs.json").mkdir(parents=True)
    with pytest.raises(UserError, match="job 7 is submitted, but cannot be written to .*scancel 7"):
        jobs.remember_job(tmp_path / "a", "7", [])
    (tmp_path / "jobs.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="jobs.json is damaged"):
        jobs.read_jobs(tmp_path)


def test_sbatch_that_refuses_or_is_missing(tmp_path, capsys, tools, monkeypatch):
    program(tools, "sbatch", "echo 'sbatch: error: invalid partition specified: x' >&2; exit 1")
    words = ("--recipe", str(tiny(tmp_path)), "--nodes=1", "--per-node=1", "--partition=x")
    code, _, errors = call(capsys, *words)
    assert code == 1 and "invalid partition specified: x" in errors
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, errors = call(capsys, *words)
    assert code == 1 and "login node" in errors


def unreadable(path: Path) -> bytes:
    raise OSError(errno.EIO, os.strerror(errno.EIO), str(path / "train.py"))


def test_the_snapshot_is_the_code_and_is_named_by_it(tmp_path, monkeypatch):
    first = take_snapshot(tmp_path / "code")
    assert take_snapshot(tmp_path / "code") == first and len(list((tmp_path / "code").iterdir())) == 1
    for name in ("train.py", "slurm/train.sbatch", "recipes/precision/nvfp4.yaml", "data/corpus/sotu.jsonl.xz"):
        assert (first / name).read_bytes() == (ROOT / name).read_bytes()
    assert not (first / "tests").exists() and set(json.loads((first / "SNAPSHOT.json").read_text())) == {
        "commit",
        "dirty",
    }
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert {path.name for path in first.iterdir() if path.is_dir()} == packages | {"recipes"}
    (first / "train.py").write_text("")
    assert take_snapshot(tmp_path / "other", first) != first
    (first / "run" / "gone.py").symlink_to("nowhere")
    take_snapshot(tmp_path / "other", first)
    (first / "run" / "gone.py").unlink()
    monkeypatch.setattr(Path, "read_bytes", unreadable)
    with pytest.raises(UserError, match="cannot read the code: .*train.py: Input/output error"):
        take_snapshot(tmp_path / "other", first)
