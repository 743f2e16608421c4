"""Two nodes, as two network namespaces of this machine: torchrun's rendezvous, and the run of one node."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.launch import ROOT, environment, steps, tiny, train

NODES = (("lowprec-a", "lpa", "10.177.0.1"), ("lowprec-b", "lpb", "10.177.0.2"))


def _ip(*words: str) -> int:
    return subprocess.run(["ip", *words], capture_output=True).returncode


@pytest.fixture
def network() -> Iterator[None]:
    """Two namespaces joined by a cable; skipped where the user may not make them."""
    if shutil.which("ip") is None or os.geteuid() != 0 or _ip("netns", "add", NODES[0][0]):
        pytest.skip("needs iproute2 and the right to make network namespaces")
    try:
        assert _ip("netns", "add", NODES[1][0]) == 0
        assert _ip("link", "add", NODES[0][1], "type", "veth", "peer", "name", NODES[1][1]) == 0
        for space, link, address in NODES:
            assert _ip("link", "set", link, "netns", space) == 0
            assert _ip("-n", space, "addr", "add", f"{address}/24", "dev", link) == 0
            assert _ip("-n", space, "link", "set", link, "up") == 0
            assert _ip("-n", space, "link", "set", "lo", "up") == 0
        yield
    finally:
        for space, *_ in NODES:
            _ip("netns", "delete", space)


def _agent(number: int, arguments: list[str]) -> subprocess.Popen[str]:
    space, link, address = NODES[number]
    words = ["ip", "netns", "exec", space, sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
    words += ["--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={NODES[0][2]}:29531", "--rdzv-id=test"]
    words += [f"--rdzv-conf=is_host={int(number == 0)}", f"--local-addr={address}", *arguments]
    variables = environment() | {"GLOO_SOCKET_IFNAME": link}
    return subprocess.Popen(words, env=variables, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [("zero.stage=1",), ("parallel.pp=2",), ("parallel.tp=2", "parallel.sp=true")])
def test_two_nodes_train_as_one(tmp_path, network, layout):
    keys = ("train.steps=6", "checkpoint.interval=3", *layout)
    one = train(tiny(tmp_path, "one"), *keys, ranks=2)
    assert one.returncode == 0, one.stderr
    arguments = [str(ROOT / "train.py"), "--recipe", str(tiny(tmp_path, "two")), *keys]
    agents = [_agent(number, arguments) for number in range(2)]
    try:
        outputs = [agent.communicate(timeout=180)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    losses = [[record["loss"] for record in steps(tmp_path / run)] for run in ("one", "two")]
    assert losses[0] == losses[1]
