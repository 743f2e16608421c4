"""What is submitted to Slurm, what is refused before, and how the script reads a run's end; Slurm itself is played by
small programs here, and real in tests/test_slurm_cluster.py."""

from __future__ import annotations

import errno
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import recipe as recipes
from errors import UsageError, UserError
from run import exits
from run.records import write_resolved
from slurm import health, jobs, node, submit
from slurm.snapshot import take_snapshot
from tests.launch import ROOT, run_script, tiny

SCRIPT = ROOT / "slurm" / "train.sbatch"
FORGOTTEN = "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1"


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
        (["--nodes=4", "--min-nodes=3"], "no number of nodes from 3 to 3 with 1 processes each; use --min-nodes=2"),
        (["--nodes=1", "--chain=2", "--dependency=afterok:7"], "--dependency with --chain"),
        (["--nodes=1", "run.dir=100%done"], "['%']"),
        (["--nodes=1", "--container-mounts=/a:/a"], "needs --container-image"),
        (["--nodes=1", "precision.policy=nvfp5"], "nvfp5"),
    ],
)
def test_what_would_fail_is_refused_before_the_queue(tmp_path, capsys, words, expected):
    code, output, errors = call(capsys, "--recipe", str(tiny(tmp_path)), "--per-node=1", *words)
    assert code == 2 and expected in errors and not output, errors
    assert not (tmp_path / "run").exists()


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


# --- slurm/train.sbatch


SCONTROL = """
[ "$1" = show ] || { echo "$@" >> TOOLS/calls; [ "$1" != "${REFUSES:-}" ]; exit; }
case "$2" in
hostnames) printf "n1\\nn2\\nn3\\n" ;;
job) echo "   ReqNodeList=(null) ExcNodeList=${EXCLUDED:-(null)}" ;;
*) echo "   NodeAddr=10.0.0.1 NodeHostName=n1" ;;
esac
"""
SQUEUE = """  # does not answer the first time
[ -e TOOLS/answers ] || { touch TOOLS/answers; exit 1; }
case "$*" in
*%T) echo ${STATE:-RUNNING} ;;
*%E) printf "43 afterany:42(unfulfilled)\\n44 afterany:421(unfulfilled)\\n" ;;
*) echo ${END:-NONE} ;;
esac
"""


def script(tools: Path, run: Path, variables: dict[str, str], *, code: Path = ROOT, sizes: str = "2 1", then="requeue"):
    """The batch script in a job of three nodes, with what Slurm would answer."""
    for name, text in {
        "scontrol": SCONTROL.replace("TOOLS", str(tools)),
        "squeue": SQUEUE.replace("TOOLS", str(tools)),
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
    done = checked(tools, tmp_path / "run", UNFIT + ends(0), sizes="2 1")
    assert done.returncode == 0 and "goes on with 2 x 8 processes: n1 n3" in done.stdout
    first, second, ping, run = (tools / "sruns").read_text().splitlines()
    assert "--nodelist=n1,n2 " in first and "--kill-on-bad-exit=0" in first and "--check" in second
    assert "--nodelist=n1,n3 " in ping and "--ping" in ping and "--kill-on-bad-exit=1" in ping
    assert "--nodelist=n1,n3 " in run and "--ping" not in run and not (tools / "calls").read_text()


ALIKE = "for n in n1 n2 n3; do echo UNHEALTHY $n: 4 GPUs for 8 processes; done; exit 1"


@pytest.mark.parametrize(
    ("check", "code", "expected"),
    [
        (ALIKE, 2, "all 3 nodes say: 4 GPUs for 8 processes; no node of them is left out"),
        (ends(4, "/run has 0.0 GiB free") + "echo SHARED PROBLEM, seen by n1: x; exit 4", 4, "no node is to blame"),
        ("echo SHARED PROBLEM, seen by n1: /run has 0.0 GiB free; exit 4", 4, "no node is to blame"),
        ("exit 1", 1, "and not of a node"),
    ],
    ids=["all alike", "shared", "shared and full", "nobody knows"],
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


def test_processes_that_do_not_meet_get_other_nodes_twice(tmp_path, tools):
    node = 'case "$*" in *--ping) exit 1;; esac'
    calls = []
    for _ in range(3):
        done = checked(tools, tmp_path / "run", node)
        calls.append((tools / "calls").read_text())
    assert calls == [REQUEUED, REQUEUED, ""] and done.returncode == 1 and "for the 3. time" in done.stdout
    checked(tools, tmp_path / "run", ends(0))
    assert not (tmp_path / "run" / "unmet").exists()


# --- slurm/node.py and slurm/health.py


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
