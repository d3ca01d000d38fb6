"""A run on two processes whose machine dies, in the middle of a step or of a checkpoint, and which then goes on."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from resumed_run import STEPS
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

SCRIPT = Path(__file__).parent / "fixtures" / "resumed_run.py"


def start(folder: Path, data: str) -> subprocess.Popen:
    """In a session of its own, so that launcher and processes can be killed at once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
    command += [f"--master_port={port}", str(SCRIPT), str(folder), data]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, env=environment, start_new_session=True)


def is_inside_a_save(folder: Path) -> bool:
    try:
        return any((folder / "_incomplete").glob("checkpoint-*/*"))
    except FileNotFoundError:  # renamed meanwhile
        return False


def last_checkpoint(folder: Path) -> str | None:
    return get_last_checkpoint(folder) if folder.exists() else None


def kill_processes_of(session: int) -> None:
    """torchrun gives each process a session of its own, so the tree is read before its root dies."""
    children, found = {}, [session]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, fields = int(stat.parent.name), stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(int(fields[1]), []).append(pid)
    for pid in found:
        found += children.get(pid, [])
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("data", ["map", "streaming"])
def test_two_processes_that_are_killed_end_as_if_they_had_not_been(tmp_path, data):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole, data).wait(300) == 0
    rng, num_inside = random.Random(0), 0
    for i in range(3):
        before, process = last_checkpoint(killed), start(killed, data)
        while last_checkpoint(killed) == before:  # let it come a step further
            assert process.poll() is None
            time.sleep(0.001)
        if i % 2:
            time.sleep(rng.uniform(0, 0.3))
        else:
            while process.poll() is None and not is_inside_a_save(killed):
                pass
        kill_processes_of(process.pid)
        process.wait()
        num_inside += is_inside_a_save(killed)
    assert num_inside >= 1
    assert start(killed, data).wait(300) == 0
    states = [json.loads((run / f"checkpoint-{STEPS}" / "trainer_state.json").read_text()) for run in (whole, killed)]
    losses = [[(e["step"], e.get("lm_loss"), e.get("diffusion_loss")) for e in s["log_history"]] for s in states]
    assert len(losses[0]) == STEPS and losses[1] == losses[0]
    for name in ("final/model.safetensors", f"checkpoint-{STEPS}/ema.safetensors"):
        expected, weights = load_file(whole / name), load_file(killed / name)
        assert all(torch.equal(weights[key], value) for key, value in expected.items())
    assert not (killed / "_incomplete").exists()
