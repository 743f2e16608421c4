"""A real Slurm of several nodes on this machine: one slurmctld, a slurmd for each node, and munge, on the loopback.

    with Cluster(folder) as cluster:
        cluster.run("sbatch", "job.sh")

No systemd, no cgroups, no change of the machine: configuration, keys, state and logs are in `folder`, and the commands
find them by SLURM_CONF. Needs root (slurmd starts processes as users) and Debian's slurmctld, slurmd, slurm-client and
munge. A requeued job waits until the credential of its last start is void: 120 s by default,
cred_expire here.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import psutil

from tests.launch import ROOT, environment

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SwitchType=switch/none
MpiDefault=none
GresTypes=gpu
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=30
InactiveLimit=0
KillWait=5
JobRequeue=1
SlurmdParameters=config_overrides
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:8
"""


def missing() -> str | None:
    """Why no cluster can be started here; None if one can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs Linux and root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    return f"needs {', '.join(absent)} (Debian: slurmctld slurmd slurm-client munge)" if absent else None


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Cluster:
    """Nodes n1, n2, ...; `folder` must be reachable by anybody (munge refuses else)."""

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder, self.nodes = folder, [f"n{i + 1}" for i in range(nodes)]
        self.variables = environment() | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}

    def __enter__(self) -> Cluster:
        try:
            self._configure()
            munge = self.folder / "munge"
            files = [f"--{name}={munge / name}" for name in ("key-file", "pid-file", "log-file", "seed-file")]
            self.run("munged", "--force", f"--socket={munge / 'socket'}", *files)
            self.run("slurmctld")
            for node in self.nodes:
                self.bring_up(node)
            self.wait(lambda: self.run("sinfo", "-h", "-o", "%T").split() == ["idle"], 20)
            return self
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pid_files = [*self.folder.glob("*.pid"), self.folder / "munge" / "pid-file"]
        for node in self.nodes:
            self._end_steps(node)
        for path in pid_files:
            if path.is_file():
                self._end(int(path.read_text()))

    def _configure(self) -> None:
        host = socket.gethostname().partition(".")[0]
        controller, *ports = _free_ports(1 + len(self.nodes))
        text = CONFIGURATION.format(host=host, port=controller, folder=self.folder)
        common = f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=2000 Gres=gpu:1 State=UNKNOWN"
        places = zip(self.nodes, ports, strict=True)
        text += "\n".join(f"NodeName={node} Port={port} {common}" for node, port in places)
        (self.folder / "slurm.conf").write_text(text + "\n")
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        for name in ("state", "munge", *(f"spool-{node}" for node in self.nodes)):
            (self.folder / name).mkdir()
        key = self.folder / "munge" / "key-file"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)

    def run(self, *words: str, check: bool = True, **variables: str) -> str:
        """Standard output of a command of Slurm's, or of another one on a login node."""
        done = subprocess.run(
            words, env=self.variables | variables, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )
        assert not check or done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def wait(self, condition: Callable[[], object], seconds: float) -> None:
        """Until `condition` holds; AssertionError with the logs' ends after `seconds`."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited {seconds} s\n{self.describe()}"
            time.sleep(0.1)

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ...; of an array: those of all tasks, sorted."""
        return " ".join(sorted(self.run("squeue", "-h", "-t", "all", "-j", job, "-r", "-o", "%T").split()))

    def describe(self) -> str:
        """What to look at when something goes wrong."""
        logs = [*self.folder.glob("*.log")]
        ends = (f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in logs)
        return "\n".join([self.run("squeue", "-t", "all", check=False), *ends])

    def take_down(self, node: str) -> None:
        """The node dies: its daemon, and everything of its jobs."""
        self._end(int((self.folder / f"slurmd-{node}.pid").read_text()))
        self._end_steps(node)

    def bring_up(self, node: str) -> None:
        """Start a node's daemon, and so its jobs, on one CPU of this machine."""
        cpus = sorted(os.sched_getaffinity(0))
        self.run("taskset", "--cpu-list", str(cpus[self.nodes.index(node) % len(cpus)]), "slurmd", "-N", node)

    def _end_steps(self, node: str) -> None:
        """Kill the processes that run jobs on a node, slurmstepd's descendants."""
        for step in psutil.process_iter():
            try:
                if step.name() != "slurmstepd":
                    continue
                below = step.children(recursive=True)  # the step's own environment is empty
                where = {"SLURM_CONF": self.variables["SLURM_CONF"], "SLURMD_NODENAME": node}
                if any(where.items() <= each.environ().items() for each in below):
                    for process in [step, *below]:
                        process.kill()
            except psutil.Error:  # ended meanwhile
                continue

    def _end(self, pid: int) -> None:
        """SIGTERM, then SIGKILL; a zombie, whom nobody may wait for here, has ended."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            end = time.monotonic() + 5
            try:
                process = psutil.Process(pid)
                process.send_signal(number)
                while process.status() != psutil.STATUS_ZOMBIE:
                    if time.monotonic() > end:
                        break
                    time.sleep(0.02)
                else:
                    return
            except psutil.NoSuchProcess:
                return
