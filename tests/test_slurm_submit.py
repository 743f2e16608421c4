"""What is submitted to Slurm, what is refused before, and how the script reads a run's end; Slurm itself is played by
small programs here, and real in tests/test_slurm_cluster.py."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from recipe import load
from report.plan.hardware import GPUS
from report.plan.plan import Planner
from slurm import health, node, submit
from slurm.snapshot import take_snapshot
from tests.launch import ROOT, tiny

SCRIPT = ROOT / "slurm" / "train.sbatch"


@pytest.fixture
def tools(tmp_path, monkeypatch) -> Path:
    """A folder of programs that stand before all others in PATH."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


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
    program(tools, "squeue", "exit 1")
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


def test_sbatch_that_refuses_or_is_missing(tmp_path, capsys, tools, monkeypatch):
    program(tools, "sbatch", "echo 'sbatch: error: invalid partition specified: x' >&2; exit 1")
    words = ("--recipe", str(tiny(tmp_path)), "--nodes=1", "--per-node=1", "--partition=x")
    code, _, errors = call(capsys, *words)
    assert code == 1 and "invalid partition specified: x" in errors
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, errors = call(capsys, *words)
    assert code == 1 and "login node" in errors


def test_the_snapshot_is_the_code_and_is_named_by_it(tmp_path):
    first = take_snapshot(tmp_path / "code")
    assert take_snapshot(tmp_path / "code") == first and len(list((tmp_path / "code").iterdir())) == 1
    for name in ("train.py", "slurm/train.sbatch", "recipes/precision/nvfp4.yaml", "data/corpus/sotu.jsonl.xz"):
        assert (first / name).read_bytes() == (ROOT / name).read_bytes()
    assert not (first / "tests").exists() and set(json.loads((first / "SNAPSHOT.json").read_text())) == {
        "commit",
        "dirty",
    }
    (first / "train.py").write_text("")
    assert take_snapshot(tmp_path / "other", first) != first


# --- slurm/train.sbatch


def script(tools: Path, run: Path, variables: dict[str, str], *, code: Path = ROOT, sizes: str = "2 1", then="requeue"):
    """The batch script in a job of three nodes, with what Slurm would answer."""
    for name, text in {
        "scontrol": f'[ "$1" = show ] || {{ echo "$@" >> {tools}/calls; exit 0; }}\n'
        '[ "$2" = hostnames ] && printf "n1\\nn2\\nn3\\n" || echo "   NodeAddr=10.0.0.1 NodeHostName=n1"',
        "squeue": 'case "$*" in *%T) echo ${STATE:-RUNNING};; *) echo ${END:-NONE};; esac',
        "sleep": "",
        "srun": f'printf "%s " "$@" >> {tools}/sruns; echo "$SLURM_JOB_END_TIME" >> {tools}/sruns; eval "$NODE"',
    }.items():
        program(tools, name, text)
    (tools / "calls").write_text("")
    (tools / "sruns").write_text("")
    job = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "n[1-3]", "RUN": str(run)}
    job |= {"NODE": 'echo "{\\"code\\": 0, \\"reason\\": \\"done\\"}" > "$RUN/seed-4/exit.json"'} | variables
    words = ["bash", str(SCRIPT), str(run), str(code), "python3", "8", sizes, "3", variables.get("CHECK", "0"), then]
    return subprocess.run(words, env=os.environ | job, capture_output=True, text=True, timeout=30, check=False)


def ends(code: int, reason: str = "why") -> str:
    return f"""echo '{{"code": {code}, "reason": "{reason}"}}' > "$RUN/exit.json"; """


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
        (ends(1) + SAVES + "exit 1", {}, 1, REQUEUED),
        (ends(124) + "exit 1", {}, 124, ""),
        (ends(124) + SAVES + "exit 1", {}, 124, REQUEUED),
        (SAVES + "exit 137", {}, 1, REQUEUED),
        ("exit 137", {}, 1, ""),
    ],
    ids=["done", "saved", "cancelled", "requeued by Slurm", "usage", "data", "checkpoint", "crashed after a save"]
    + ["hung", "hung after a save", "killed after a save", "killed"],
)
def test_what_follows_the_end_of_a_run(tmp_path, tools, node_does, variables, code, calls):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "exit.json").write_text('{"code": 75, "reason": "of the start before"}\n')
    done = script(tools, tmp_path / "run", variables | {"NODE": node_does})
    assert done.returncode == code, done.stdout + done.stderr
    assert (tools / "calls").read_text() == calls


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (2, 2), (3, 3), (4, 4), (130, 130)])
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


def test_a_chain_leaves_it_to_the_next_job_and_an_unfit_node_is_excluded(tmp_path, tools):
    run = tmp_path / "run"
    run.mkdir()
    done = script(tools, run, {"NODE": ends(75)}, then="next")
    assert done.returncode == 75 and "next job" in done.stdout and not (tools / "calls").read_text()
    unfit = 'echo n2 >> "$RUN/unhealthy"; exit 1'
    done = script(tools, run, {"NODE": unfit, "CHECK": "1"})
    expected = ["requeuehold 42", "update JobId=42 ExcNodeList=n2", "release 42"]
    assert (tools / "calls").read_text().splitlines() == expected, done.stdout
    done = script(tools, run, {"NODE": "exit 1", "CHECK": "1"})
    assert done.returncode == 1 and not (tools / "calls").read_text(), "no new node is to blame"


# --- slurm/node.py and slurm/health.py


def test_the_agent_of_a_node():
    options = ["/run", "--host=n1", "--address=10.0.0.1", "--port=20042", "--nodes=2", "--per-node=8", "--restarts=3"]
    job = {"SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": "1", "SLURM_STEP_ID": "1"}
    first, second = (node.agent(node.parse(options), job | {"SLURMD_NODENAME": name}) for name in ("n1", "n2"))
    assert "--rdzv-conf=is_host=1" in first and "--rdzv-conf=is_host=0" in second
    assert {"--rdzv-id=42.1.1", "--nnodes=2", "--nproc-per-node=8", "--max-restarts=3"} <= set(first)
    check = node.agent(node.parse([*options, "--check"]), job)
    assert check[-2:] == [str(ROOT / "slurm" / "ping.py"), "/run"] and "--max-restarts=0" in check
    assert node.environment({"NCCL_DEBUG": "INFO"})["NCCL_DEBUG"] == "INFO"


def test_gpus_and_room():
    assert health.gpu_problems("0, 0\n1, [N/A]\n", 2) == []
    assert health.gpu_problems("0, 0\n1, 3\n", 4) == ["2 GPUs for 4 processes", "GPU 1 has 3 uncorrected ECC errors"]
    assert health.gpu_problems("", 1) == ["0 GPUs for 1 processes"]


def test_a_place_without_room_or_rights(tmp_path):
    assert health.room_problems(tmp_path, 1, "n1") == []
    assert "GiB are needed" in health.room_problems(tmp_path, 1 << 60, "n1")[0]
    assert "No such file" in health.room_problems(tmp_path / "absent", 1, "n1")[0]
    assert not list(tmp_path.iterdir())
