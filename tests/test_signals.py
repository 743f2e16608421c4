"""Requests to stop: none is lost, a second one works at once, other processes of a job do not mind them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from parallel.checkpoint import newest
from run.signals import StopRequest
from tests.launch import ROOT, steps, tiny, train

PENDING = """
signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # as slurm.node leaves it to its workers
os.kill(os.getpid(), signal.SIGUSR1)
request = StopRequest()
while request.reason is None:
    time.sleep(0.01)
print(request.reason)
"""
IN_NATIVE_CODE = """
request = StopRequest()
print("ready", flush=True)
while True:
    ctypes.CDLL(None).sleep(60)
"""
PARENT = """
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=sys.stdout)
print(child.pid, flush=True)
time.sleep(60)
"""
ORPHAN = """
stop_with_parent()
request = StopRequest()
print("ready", flush=True)
while request.reason is None:
    time.sleep(0.01)
print(request.reason, flush=True)
"""
WITH_CHILD = """
request = StopRequest()
child = subprocess.Popen(["sleep", "60"])
for number in STOP_SIGNALS:
    child.send_signal(number)
time.sleep(0.2)
print(child.poll())
child.kill()
"""
HEADER = """
import ctypes, os, signal, subprocess, sys, threading, time
from run.signals import STOP_SIGNALS, StopRequest, stop_with_parent
"""


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", HEADER + script, *arguments]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_signal_that_came_before_the_run_was_ready_is_not_lost():
    output, errors = start(PENDING).communicate(timeout=30)
    assert output == "received SIGUSR1\n", errors


def test_a_second_signal_exits_at_once_even_from_native_code():
    process = start(IN_NATIVE_CODE)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM


def test_child_processes_ignore_what_slurm_sends_to_all():
    output, errors = start(WITH_CHILD).communicate(timeout=30)
    assert output == "None\n", errors


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal on a parent's death is Linux's")
def test_a_worker_whose_agent_is_killed_is_asked_to_stop():
    parent = start(PARENT, HEADER + ORPHAN)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
        assert parent.stdout.readline() == "received SIGTERM\n"
    finally:
        parent.wait(10)
        if os.path.exists(f"/proc/{child}"):
            os.kill(child, signal.SIGKILL)


def test_one_rank_whose_clock_says_that_the_time_is_over_stops_all(tmp_path):
    """Clocks of nodes differ: here one is past the end of the job, the other is not."""
    clocks = [{"SLURM_JOB_END_TIME": str(time.time() + shift)} for shift in (3600, -3600)]
    done = train(tiny(tmp_path), ranks=2, variables=clocks)
    assert done.returncode == 75, done.stderr
    assert "another rank was asked to stop: stopped after step 1" in done.stdout
    found, records = newest(tmp_path / "run"), steps(tmp_path / "run")
    assert found is not None and found.step == len(records) == 1


def test_no_deadline_is_never():
    given = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    try:
        assert StopRequest().reason is None
        assert StopRequest(time.time() + 60).reason is None
        assert StopRequest(time.time() - 1).reason == "the job's time is nearly over"
    finally:
        for number, handler in given.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, given)
