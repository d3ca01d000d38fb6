"""Runs, metrics and tables of the comparisons, on tiny stand-ins: measured, resumed, and judged by the claims."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_experiments import make_packages, save_untrained
from transformers import Trainer

sys.path.append(str(Path(__file__).parents[1] / "experiments"))
import runs
import tables
from data import Data
from metrics import Judge, ShapesFeatures
from models import num_flops
from runs import Settings, build, run
from tables import SCALES, TABLES, TOY_JUDGE, Claim, Table, folder_of, lines_of, write_table

SIZES = {"max_steps": 4, "tokens_per_step": 200, "max_length": 128, "num_measurements": 2}
FAMILIES = {
    "llama": Settings("llama", "0.3M", 1e-3, **SIZES),
    "stability": Settings("chameleon", "0.3M", 1e-3, **SIZES, with_images=False),
    "chameleon": Settings("chameleon", "0.3M", 1e-3, **SIZES),
    "transfusion": Settings("transfusion", "0.3M", 1e-3, **SIZES, options={"patch_size": 2}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Data:
    for name in [name for name in sys.modules if name.split(".")[0] == "gensim"]:
        del sys.modules[name]
    packages = make_packages(tmp_path_factory.mktemp("packages"))
    data = Data(tmp_path_factory.mktemp("data"), packages, num_pictures=30, num_held_out=10, vocab_size=400)
    save_untrained(data)
    return data


@pytest.fixture(scope="module")
def judge(data) -> Judge:
    return Judge(data, 128, **TOY_JUDGE)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_trained_and_measured(data, judge, tmp_path, family):
    settings = FAMILIES[family]
    result = run(settings, data, judge, tmp_path)
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [2, 4] and result["last"] == lines[-1]
    assert lines[0]["perplexity"] != lines[1]["perplexity"]
    has_images = family in ("chameleon", "transfusion")
    assert ("drawn" in lines[0]) == ("captioned" in lines[0]) == has_images
    assert ("drawn@5" in lines[1]) == has_images and "drawn@5" not in lines[0]
    model, *_ = build(settings, data)
    assert lines[1]["flops"] == num_flops(model, lines[1]["num_tokens"])
    tokens = lines[1]["num_tokens"] / 4
    low, high = {"llama": (80, 230), "stability": (80, 230), "chameleon": (250, 900)}.get(family, (150, 420))
    assert low < tokens < high, "tokens of a step, without padding"
    assert not (tmp_path / "checkpoints").exists()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("family", ["llama", pytest.param("transfusion", marks=pytest.mark.slow)])
def test_a_run_that_was_killed_goes_on_to_the_same_measurements(data, judge, tmp_path, family, monkeypatch):
    settings = FAMILIES[family]
    run(settings, data, judge, tmp_path / "whole")
    step = Trainer.training_step
    calls = []

    def dies(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "training_step", dies)
        run(settings, data, judge, tmp_path / "killed")
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as lines:  # of a step behind the checkpoint
        lines.write('{"step": 4, "perplexity": 0}\n')
    run(settings, data, judge, tmp_path / "killed")
    whole, killed = lines_of(tmp_path / "whole"), lines_of(tmp_path / "killed")
    for before, after in zip(whole, killed, strict=True):
        assert {**before, "num_tokens": 0, "flops": 0} == {**after, "num_tokens": 0, "flops": 0}


def test_a_folder_of_other_settings_and_unknown_ones_are_refused(data, judge, tmp_path):
    settings = FAMILIES["llama"]
    run(settings, data, judge, tmp_path)
    with pytest.raises(ValueError, match=r"is of a run with `learning_rate` 0\.001, not 0\.002"):
        run(replace(settings, learning_rate=2e-3), data, judge, tmp_path)
    with pytest.raises(ValueError, match="`family` must be one of llama, chameleon, transfusion; got 'gpt'"):
        replace(settings, family="gpt")
    with pytest.raises(ValueError, match="`max_steps` must be a multiple of `num_measurements`; got 5, 2"):
        replace(settings, max_steps=5)


def test_a_run_that_diverges_is_kept_as_such(data, judge, tmp_path):
    for family in ("llama", "transfusion"):
        result = run(replace(FAMILIES[family], learning_rate=1e30), data, judge, tmp_path / family)
        assert result["has_diverged"] and len(lines_of(tmp_path / family)) < 2


def test_real_pictures_are_drawn_right_and_true_captions_are_right(data):
    judge = Judge(data, 128, num_drawings=3, num_captions=10)
    from transfusion_hf.data.shapes import draw_scene

    drawn = [draw_scene(scene) for _, scene in judge._scenes]
    metrics = judge._judged(drawn)
    assert all(value == 1 for name, value in metrics.items() if name != "frechet_distance")
    real = data.pictures("held_out")
    same = judge._judged([real[i % 10]["image"] for i in range(18)])["frechet_distance"]
    assert same < metrics["frechet_distance"] < judge._judged([drawn[0]] * 18)["frechet_distance"]
    captions = data.captions("held_out")
    assert judge._judged_captions(captions) == {"captioned": 1.0, "cider": pytest.approx(1000, rel=0.5)}
    assert judge._judged_captions(captions[1:] + captions[:1])["captioned"] < 0.2


def test_the_features_are_those_of_a_classifier_and_always_the_same(data):
    first, second = (ShapesFeatures.trained(data, num_epochs=2) for _ in range(2))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(first(x), second(x)) and first(x).shape == (2, 32)
    with torch.no_grad():  # as a measurement calls it
        assert torch.equal(ShapesFeatures.trained(data, num_epochs=2)(x), first(x))


@pytest.mark.parametrize("scale", SCALES)
def test_tables_have_the_papers_rows_and_share_their_runs(scale, tmp_path):
    made = {name: table(SCALES[scale]) for name, table in TABLES.items()}
    folders = {folder_of(row, tmp_path) for table in made.values() for row in table.rows.values()}
    num_rows = sum(len(table.rows) for table in made.values())
    assert len(folders) < num_rows, "some rows are the same run"
    for table in made.values():
        assert {*table.paper} <= {*table.rows}
        assert {claim.better for claim in table.claims} | {claim.worse for claim in table.claims} <= {*table.rows}
    assert len(made["table5"].rows) == 4 and len(made["table6"].rows) == 7 and len(made["table8"].rows) == 2


def made_run(folder: Path, values: list[float], has_diverged: bool = False) -> Path:
    folder.mkdir(parents=True)
    lines = [{"step": i, "num_tokens": 9, "flops": 54, "drawn": x, "perplexity": 9 - x} for i, x in enumerate(values)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = {"num_parameters": 5, "seconds": 1.0, "has_diverged": has_diverged, "last": lines[-1]}
    (folder / "done.json").write_text(json.dumps(done))
    return folder


def test_a_claim_holds_only_outside_of_the_spread(tmp_path):
    last = {"a": (0.8, 0.9), "b": (0.5, 0.7), "c": (0.6, 0.95), "d": (0.1, 0.2)}
    folders = {
        name: [made_run(tmp_path / name / str(seed), [0.0, x]) for seed, x in enumerate(values)]
        for name, values in last.items()
    }
    folders["d"].append(made_run(tmp_path / "d" / "2", [0.0, 5.0], has_diverged=True))
    claims = [Claim("a", "b", ("drawn", "perplexity")), Claim("a", "c", ("drawn",)), Claim("d", "b", ("drawn",))]
    table = Table("A table", dict.fromkeys(last, FAMILIES["llama"]), {"a": {"drawn": 0.99}}, claims)
    file = write_table("tableX", table, folders, tmp_path / "results", "python tables.py tableX", {"kl": 1})
    text = file.read_text()
    assert "| a | 8.15 (8.1–8.2) | 0.85 (0.8–0.9) [0.99] | 5 | 9 | 5.40e+01 | 1 |" in text
    assert "| a beats b | holds | holds |" in text
    assert "| a beats c |  | within the spread |" in text
    assert "| d beats b |  | does not hold |" in text
    assert "Diverged, and left out of the means: 2." in text and "| d | 8.85 (8.8–8.9) | 0.15" in text
    assert (tmp_path / "results" / "tableX.png").stat().st_size > 5000
    folders["a"].pop()
    assert "one seed" in write_table("tableX", table, folders, tmp_path / "results", "x", {}).read_text()


def test_a_table_is_one_command(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "Data", lambda *args, **kwargs: data)
    monkeypatch.setitem(SCALES, "toy", replace(SCALES["toy"], tokens_per_step=200))
    words = ["table8", "--scale", "toy", "--seeds", "1", "--num_processes", "1"]
    words += ["--output_dir", str(tmp_path), "--results_dir", str(tmp_path / "results")]
    file = tables.main(words)
    assert "| no limit |" in file.read_text() and "Ceilings of the autoencoders" in file.read_text()
    monkeypatch.setattr(runs, "build", lambda *_: pytest.fail("a second call makes no run"))
    assert tables.main(words) == file
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            tables.main(["table8", "--scale", "paper"])
        assert "--scale paper needs GPUs" in capsys.readouterr().err


def test_the_noise_limit_reaches_the_batches(data):
    rows = {}
    for name, settings in TABLES["table8"](SCALES["toy"]).rows.items():
        _, _, collate = build(settings, data)
        rows[name] = collate.image_first_max_timesteps
    assert rows == {"no limit": 1000, "t ≤ 500": 500}
    assert np.isfinite(data.latents("train")).all()
