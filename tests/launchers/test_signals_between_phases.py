"""Signals that come while a job becomes that of the next phase, in a process whose other threads take signals, too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

BEFORE = """
import os, signal, sys, threading, time
from pathlib import Path
from encdec.files import RunPaths
from launchers.nodes import agent, chain, forkserver
from launchers.nodes.parts import NodeJob

number = signal.Signals[sys.argv[2]]
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()  # nobody blocks signals there
forkserver.listen_early()
paths = RunPaths(Path(sys.argv[1]))
paths.make()
attempt = paths.attempt(paths.claim_attempt())
agent.choose_supervisor = lambda job: lambda watcher, logs: True
job = NodeJob(
    run_dir=str(paths.root), attempt=0, nodes=1, node_rank=0, ranks=1, endpoint="localhost:0", rendezvous_id="x",
    max_restarts=0, launcher="torchrun", engine="fsdp2",
)
agent.NodeAgent(job, attempt).run()
if sys.argv[3] == "handled":  # by the other thread: this one has it blocked
    os.kill(os.getpid(), number)
    time.sleep(0.2)
    assert forkserver.early_signals == [number.name], forkserver.early_signals
else:  # by nobody
    signal.pthread_kill(threading.get_ident(), number)
execve, environment = os.execve, dict(os.environ)
os.execve = lambda path, words, _: execve(sys.executable, [sys.executable, "-c", sys.argv[4]], environment)
chain.go_on(paths)
"""
AFTER = """
import signal
from launchers.nodes import forkserver
forkserver.listen_early()
print(*forkserver.early_signals, *(signal.Signals(number).name for number in signal.sigpending()))
"""


@pytest.mark.parametrize("taken", ["handled", "pending"])
@pytest.mark.parametrize("name", ["SIGUSR2", "SIGTERM"])
def test_signal_outlives_the_change_of_phases(name: str, taken: str, tmp_path: Path):
    command = [sys.executable, "-c", BEFORE, str(tmp_path / "run"), name, taken, AFTER]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, [name]), done.stderr
