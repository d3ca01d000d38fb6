"""Several processes, over gloo: the same step as one process makes on the same global batch."""

import gc
import multiprocessing
import multiprocessing.connection
import os
import runpy
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file

SCRIPTS = Path(__file__).parent / "fixtures"
CONTEXT = multiprocessing.get_context("forkserver")  # what is imported, is imported once


def run_script(script: str, arguments: list[str], environment: dict[str, str], log: Path) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    gc.freeze()  # as in conftest.py
    multiprocessing.set_start_method("fork", force=True)  # for workers, which otherwise import all again
    sys.argv = [script, *arguments]
    runpy.run_path(str(SCRIPTS / script), run_name="__main__")


def launch(folder: Path, num_processes: int, script: str, *arguments: str) -> None:
    """As `torchrun` starts a script; what they print is in `folder`."""
    CONTEXT.set_forkserver_preload(
        ["torch", "transformers", "datasets", "transfusion_hf", "transfusion_hf.training.trainer"]
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, logs = [], [folder / f"{script}-{rank}.log" for rank in range(num_processes)]
    for rank, log in enumerate(logs):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
        environment |= {"LOCAL_WORLD_SIZE": str(num_processes), "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        argv = [*arguments, str(num_processes)]
        processes.append(CONTEXT.Process(target=run_script, args=(script, argv, environment, log)))
        processes[-1].start()
    try:
        running = {process.sentinel: i for i, process in enumerate(processes)}
        while running:
            ended = multiprocessing.connection.wait(running, timeout=300)
            assert ended, f"{script} does not end"
            for i in (running.pop(sentinel) for sentinel in ended):
                processes[i].join()
                assert processes[i].exitcode == 0, logs[i].read_text()[-3000:]
    finally:
        for process in processes:
            process.kill()


KINDS = ("map", "streaming", "tensor_parallel", "fsdp2", "fsdp2_bf16")


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> dict[str, dict]:
    folder, found = tmp_path_factory.mktemp("steps"), {}
    (folder / "one").mkdir()
    launch(folder, 1, "one_step.py", "map", str(folder / "one"))
    launch(folder, 2, "one_step.py", ",".join(KINDS), str(folder))
    for kind in ("one/map", *KINDS):
        found[kind] = torch.load(folder / kind / "found.pt")
        for file in ("model.safetensors", "ema.safetensors"):
            found[kind][file] = load_file(folder / kind / "checkpoint-1" / file)
    return found


@pytest.mark.parametrize("data", KINDS)
def test_two_processes_make_the_step_of_one(steps, data):
    """Unequal numbers of labels and images in each micro-batch of each process, some without images."""
    one, two = steps["one/map"], steps[data]
    tolerance, tolerance_of_logs = (1e-2, 1e-3) if "bf16" in data else (1e-5, 1e-5)
    if data in ("map", "streaming"):
        tolerance = tiny.ROUNDING
    for name in ("loss", "lm_loss", "diffusion_loss", "tokens_per_second", "images_per_second"):
        assert two["logs"][name] == pytest.approx(one["logs"][name], rel=tolerance_of_logs)
    assert {name for name in two["logs"] if "/t_" in name} == {name for name in one["logs"] if "/t_" in name}
    start, weights = tiny.model(std=0.1, vae_config=tiny.VAE).state_dict(), one["model.safetensors"]
    largest = max(float((weights[name] - value).abs().max()) for name, value in start.items())
    assert largest > 0
    for file in ("model.safetensors", "ema.safetensors"):
        assert two[file].keys() == one[file].keys()
        for name, value in one[file].items():
            assert (two[file][name] - value).abs().max() <= tolerance * largest, name
    if data == "tensor_parallel":
        # When accelerate takes it on the CPU, this and what is said of it in docs/training.md can go.
        assert "ParallelismConfig is only compatible DistributedType.FSDP" in two["refusal"]


@pytest.fixture(scope="module")
def draws(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("draws")
    launch(folder, 2, "two_draws.py", str(folder))
    return folder


@pytest.mark.parametrize("data", ["map", "streaming"])
def test_each_process_has_samples_and_noise_of_its_own(draws, data):
    first, second = (torch.load(draws / data / f"{rank}.pt") for rank in range(2))
    for start in range(0, 16, 4):
        seen = set(first["seen"][start : start + 4] + second["seen"][start : start + 4])
        assert len(seen) == 8 and seen < set(range(3, 12))
    assert len(first["timesteps"]) == len(second["timesteps"]) == 16
    assert all(a != b for a, b in zip(first["timesteps"], second["timesteps"], strict=True))


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("split")
    launch(folder, 2, "tensor_parallel.py", str(folder))
    return folder


@pytest.mark.parametrize(("family", "head"), [("llama", "own"), ("qwen3", "tied")])
def test_a_model_split_by_tensor_parallelism_is_the_whole_one(split, family, head):
    """In what it says, in its gradients, in what it writes and draws, and in what it saves."""
    for rank in range(2):
        found = torch.load(split / family / f"{rank}.pt")
        whole, part = found["whole"], found["split"]
        assert found["is_tied"] == (head == "tied")
        tolerance = {"rtol": 0, "atol": 1e-5}
        for name in ("loss", "logits", "image_predictions", "images"):
            torch.testing.assert_close(part[name], whole[name], **tolerance)
        assert torch.equal(part["sequences"], whole["sequences"]) and len(whole["images"]) >= 1
        assert part["gradients"].keys() == whole["gradients"].keys()
        for name, gradient in whole["gradients"].items():
            assert (part["gradients"][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
        # Half of each matrix of the decoder and of the head; the image parts and the norms are whole.
        sizes = found["sizes"]
        matrices = {name for name in sizes if "norm" not in name and name.startswith(("model.language", "lm_head"))}
        embedding = "model.language_model.embed_tokens.weight"
        assert found["local"] == {name: sizes[name] / 2 for name in matrices | {embedding}}
    before, after = (load_file(split / family / name / "model.safetensors") for name in ("model", "saved"))
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_family_without_a_plan_is_not_split_by_halves():
    assert tiny.model(tiny.text_config("stablelm", tie_word_embeddings=True)).tp_plan == {}
    assert tiny.model().tp_plan["lm_head"] == "colwise_gather_output"


@pytest.fixture(scope="module")
def gradients(tmp_path_factory) -> dict[str, list[dict]]:
    folder = tmp_path_factory.mktemp("gradients")
    launch(folder, 2, "one_gradient_fsdp2.py", str(folder))
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "untied"])
def test_fsdp2_has_the_gradients_of_one_process(gradients, kind):
    """Also of the image parts, and of weights for images alone, in a process without any image."""
    tolerance, (one, two) = 2e-2 if kind == "bfloat16" else 1e-5, gradients[kind]
    torch.testing.assert_close(two["loss"], one["loss"], rtol=tolerance, atol=0)
    assert any(".image." in name for name in one["gradients"]) == (kind == "untied")
    assert two["gradients"].keys() == one["gradients"].keys()
    largest = max(float(gradient.abs().max()) for gradient in one["gradients"].values())
    for name, gradient in one["gradients"].items():
        assert (two["gradients"][name] - gradient).abs().max() <= tolerance * largest, name


def test_under_fsdp2_samples_are_those_of_one_process_and_a_model_in_shards_is_refused(tmp_path):
    for num_processes in (1, 2):
        (tmp_path / str(num_processes)).mkdir()
        launch(tmp_path, num_processes, "samples_fsdp2.py", str(tmp_path / str(num_processes)))
    one, two = (tmp_path / name / "samples" for name in "12")
    pixels = [np.asarray(Image.open(folder / "step-1.png")).astype(int) for folder in (one, two)]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1
    assert (one / "step-1.txt").read_text() == (two / "step-1.txt").read_text()
    refusal = (tmp_path / "2" / "refusal").read_text()
    assert refusal.startswith("`fsdp_state_dict_type` is SHARDED_STATE_DICT") and "FULL_STATE_DICT" in refusal
