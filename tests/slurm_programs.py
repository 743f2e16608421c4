"""Small programs that play Slurm, and the batch script among them; slurm_cluster.py starts a real one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.launch import ROOT

SCRIPT = ROOT / "slurm" / "train.sbatch"
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
        "sleep": '[ "$1" != 60 ]',  # which a requeue ends
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


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)
