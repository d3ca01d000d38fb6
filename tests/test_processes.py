"""Several processes, over gloo: the same step as one process makes on the same global batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

SCRIPTS = Path(__file__).parent / "fixtures"


def launch(num_processes: int, script: str, *args: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={num_processes}"]
    command += ["--master_addr=127.0.0.1", f"--master_port={port}", str(SCRIPTS / script), *args, str(num_processes)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("data", ["map", "streaming"])
def test_two_processes_make_the_step_of_one(tmp_path, data):
    """Unequal numbers of labels and images in each micro-batch of each process, some without images."""
    launch(1, "one_step.py", data, str(tmp_path / "one.pt"))
    launch(2, "one_step.py", data, str(tmp_path / "two.pt"))
    one, two = (torch.load(tmp_path / name) for name in ("one.pt", "two.pt"))
    for name in ("loss", "lm_loss", "diffusion_loss"):
        assert two["logs"][name] == pytest.approx(one["logs"][name], rel=1e-5)
    assert {name for name in two["logs"] if "/t_" in name} == {name for name in one["logs"] if "/t_" in name}
    start = tiny.model(std=0.1).state_dict()
    largest = max(float((one["state"][name] - value).abs().max()) for name, value in start.items())
    assert largest > 0
    for name, value in one["state"].items():
        assert (two["state"][name] - value).abs().max() <= 1e-5 * largest, name


def test_fsdp2_has_the_gradients_of_one_process(tmp_path):
    """Also of the image parts, in a process without any image."""
    for num_processes, name in ((1, "one.pt"), (2, "two.pt")):
        launch(num_processes, "one_gradient_fsdp2.py", str(tmp_path / name))
    one, two = (torch.load(tmp_path / name) for name in ("one.pt", "two.pt"))
    torch.testing.assert_close(two["loss"], one["loss"], rtol=1e-5, atol=0)
    assert two["gradients"].keys() == one["gradients"].keys()
    largest = max(float(gradient.abs().max()) for gradient in one["gradients"].values())
    for name, gradient in one["gradients"].items():
        assert (two["gradients"][name] - gradient).abs().max() <= 1e-5 * largest, name
