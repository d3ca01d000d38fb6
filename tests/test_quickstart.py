"""The quickstart, as `make demo` runs it: real digits, learned, drawn and read through the public API."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, **environment: str) -> None:
    subprocess.run([sys.executable, *command], check=True, env={**os.environ, **environment})


def check(folder: Path) -> dict:
    results = json.loads((folder / "results.json").read_text())
    assert results["draw_accuracy"] >= 0.95
    assert results["caption_accuracy"] >= 0.95
    assert results["judge_accuracy"] >= 0.98
    assert results["train_steps"] <= 2000
    assert 0.8e6 <= results["parameters"] <= 1.2e6
    for name in ("grid.png", "losses.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 200
    return results


@pytest.mark.slow
def test_quickstart_draws_and_reads_digits(quickstart_folder):
    assert check(quickstart_folder)["draw_accuracy"] >= 0.97


@pytest.mark.slow
def test_quickstart_draws_and_reads_digits_in_the_latents_of_a_vae_trained_before(tmp_path):
    run(ROOT / "examples" / "train_vae.py", "--digits", "--output_dir", tmp_path / "vae", OMP_NUM_THREADS="1")
    assert json.loads((tmp_path / "vae" / "results.json").read_text())["digit_accuracy"] >= 0.97
    run(ROOT / "examples" / "quickstart.py", "--vae", tmp_path / "vae" / "vae", "--output_dir", tmp_path / "q")
    check(tmp_path / "q")
