"""The examples on the packages with real weights and pictures, for a few steps: `make test-real`."""

import json
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import emoji
import fashion_mnist
import judge_emoji
import smollm2_emoji
from emoji_data import load_emoji

pytestmark = pytest.mark.slow
FEW = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--logging_steps", "1", "--use_cpu", "true"]


@pytest.fixture(autouse=True)
def skip_without_packages():
    """A package that cannot be had is the reason of a skip."""
    try:
        yield
    except ImportError as error:
        pytest.skip(str(error))


def test_an_emoji_model_is_trained_and_judged(tmp_path, monkeypatch):
    some = load_emoji(categories=("Activities",))
    monkeypatch.setattr(judge_emoji, "load_emoji", lambda *args: some)  # all take minutes
    folder = tmp_path / "model"
    emoji.main(["--output_dir", str(folder), *FEW, "--hidden_size", "64", "--num_hidden_layers", "1"])
    few = ["--categories", "Activities", "--num_drawings", "5", "--num_inference_steps", "2"]
    results = judge_emoji.main([str(folder), *few, "--judge", str(tmp_path / "judge.joblib")])
    assert results["chance"] == pytest.approx(1 / len(some))
    assert results["real pictures, moved"]["first"] > 0.5 < results["real pictures, Twemoji"]["among five"]
    assert results["drawn"]["first"] < 0.5
    judge_emoji.add_to_card(folder / "README.md", results)  # once more
    card = ModelCard.load(folder / "README.md")
    assert card.text.count("## Emoji") == card.text.count("| 5 names, drawn |") == card.text.count("## Training") == 1
    assert card.data.license == "apache-2.0" and (folder / "drawn.png").is_file()


def test_fashion_mnist_is_drawn_read_and_judged(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist.Classifier.trained.__func__, "__defaults__", (1,))  # epochs
    few = ["--output_dir", str(tmp_path / "run"), *FEW, "--num_drawings", "20", "--num_read", "20"]
    results = fashion_mnist.main([*few, "--num_inference_steps", "2"])
    assert results["classifier_accuracy"] > 0.85 and results["drawn_right"] < 0.5
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results


def test_smollm2_keeps_its_text(tmp_path):
    results = smollm2_emoji.main(["--output_dir", str(tmp_path), *FEW])
    assert results["text_logits_are_equal"] is True
    assert all(answer["before"] == answer["after"] != "" for answer in results["chat"])
    assert "Paris" in results["chat"][0]["before"]
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_the_notebook_runs_and_keeps_the_text(tmp_path, capsys):
    cells = json.loads(Path(emoji.__file__).with_name("learn_to_draw.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for printed, less in {
        "max_steps = 200": "max_steps = 2",
        "per_device_train_batch_size=16": "per_device_train_batch_size=2",
        "num_inference_steps=25": "num_inference_steps=2",
        "outputs/learn_to_draw": str(tmp_path),
    }.items():
        assert code.count(printed) == 1
        code = code.replace(printed, less)
    names: dict = {}
    exec(compile(code, "<notebook>", "exec"), names)
    assert len(names["foods"]) == len(names["names"]) == len(names["output"].images) == 16
    assert names["trainer"].state.global_step == 2
    printed = capsys.readouterr().out
    assert "bit: True\n" in printed and "the same: True\n" in printed and "Bananas" in printed
