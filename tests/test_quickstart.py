"""The quickstart, as `make demo` runs it: real digits, learned, drawn and read through the public API."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import common

from transfusion_hf.training.checkpoints import resume_from

ROOT = Path(__file__).parents[1]


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


def test_the_judge_knows_digits_from_other_digits_and_from_no_picture():
    train_set, held_out = common.load_split()
    assert (len(train_set), len(held_out)) == (1500, 297)
    judge = common.Judge(train_set)
    assert judge.accuracy(held_out) >= 0.98
    labels = [sample["label"] for sample in held_out]
    larger = [sample["image"].resize((32, 32), Image.Resampling.NEAREST).convert("RGB") for sample in held_out]
    assert judge.is_right(larger, labels).mean() == judge.accuracy(held_out)
    assert judge.is_right(larger, [(label + 1) % 10 for label in labels]).mean() <= 0.02
    blank = judge.classifier.predict(judge.features([Image.new("L", (8, 8))]))[0]
    assert not judge.is_right([None], [blank]).any()


def test_a_run_is_resumed_where_there_is_a_checkpoint(tmp_path):
    def resumed(value):
        return resume_from(SimpleNamespace(resume_from_checkpoint=value, output_dir=str(tmp_path)))

    assert [resumed(value) for value in ("true", "false", None, "some/folder")] == [False, False, None, "some/folder"]
    (tmp_path / "checkpoint-3").mkdir()
    assert resumed("True") is True and resumed("False") is False


def test_shares_count_whole_captions():
    samples = [{"text": "a handwritten one"}, {"text": "a handwritten two"}]
    assert np.isclose(common.share_read(["a handwritten one", "two"], samples), 0.5)


@pytest.mark.slow
def test_quickstart_draws_and_reads_digits(quickstart_folder):
    assert check(quickstart_folder)["draw_accuracy"] >= 0.97


@pytest.mark.slow
def test_the_evaluation_reads_as_many_digits_as_the_quickstart(quickstart_folder):
    file = quickstart_folder.parent / "evaluation" / "digits" / "results.json"
    if not file.is_file():
        pytest.skip("`make evaluate` has not run")
    scores = json.loads(file.read_text())["tasks"]["captions"]["scores"]
    found = scores["equal to a reference"]
    assert found["num_items"] == 297
    expected = json.loads((quickstart_folder / "results.json").read_text())["caption_accuracy"]
    assert found["value"] == pytest.approx(expected, abs=0.004)  # one digit, by rounding


@pytest.mark.slow
def test_quickstart_draws_and_reads_digits_in_the_latents_of_a_vae_trained_before(tmp_path):
    run(ROOT / "examples" / "train_vae.py", "--digits", "--output_dir", tmp_path / "vae", OMP_NUM_THREADS="1")
    assert json.loads((tmp_path / "vae" / "results.json").read_text())["digit_accuracy"] >= 0.97
    run(ROOT / "examples" / "quickstart.py", "--vae", tmp_path / "vae" / "vae", "--output_dir", tmp_path / "q")
    check(tmp_path / "q")
