"""Runs, metrics and tables of the comparisons, on tiny stand-ins: measured, resumed, and judged by the claims."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from tiny_experiments import make_packages, save_untrained
from transformers import Trainer
from transformers.utils.logging import is_progress_bar_enabled

sys.path.append(str(Path(__file__).parents[1] / "experiments"))
import parity
import runs
import tables
from data import Data
from metrics import ASPECTS, Judge, ShapesFeatures
from models import num_flops
from report import Claim, Table, write_figure5, write_table
from runs import Settings, build, read_lines, run
from tables import SCALES, TABLES, folder_of

SIZES = {"max_steps": 4, "tokens_per_step": 200, "max_length": 128, "num_measurements": 2}
FAMILIES = {
    "llama": Settings("llama", "0.3M", 1e-3, **SIZES),
    "stability": Settings("chameleon", "0.3M", 1e-3, **SIZES, with_images=False),
    "chameleon": Settings("chameleon", "0.3M", 1e-3, **SIZES),
    "transfusion": Settings("transfusion", "0.3M", 1e-3, **SIZES, options={"patch_size": 2}),
}


def lines_of(folder: Path) -> list[dict]:
    return read_lines(folder / "metrics.jsonl")


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
    return Judge(data, 128, **SCALES["toy"].judge)


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
    assert is_progress_bar_enabled(), "who calls it keeps the bars of the library"


class Killed(BaseException):
    pass


@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES)])
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
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as lines:  # a step behind the checkpoint, and half a line
        lines.write('{"step": 4, "perplexity": 0}\n{"step"')
    (tmp_path / "killed" / "checkpoints" / "checkpoint-3").mkdir()  # killed while it was saving
    run(settings, data, judge, tmp_path / "killed")
    whole, killed = lines_of(tmp_path / "whole"), lines_of(tmp_path / "killed")
    for before, after in zip(whole, killed, strict=True):
        assert {**before, "seconds": 0} == {**after, "seconds": 0}


def test_a_folder_of_other_settings_and_unknown_ones_are_refused(data, judge, tmp_path):
    settings = FAMILIES["llama"]
    run(settings, data, judge, tmp_path)
    with pytest.raises(ValueError, match=r"holds a run with `learning_rate` 0\.001; expected 0\.002. Delete it"):
        run(replace(settings, learning_rate=2e-3), data, judge, tmp_path)
    with pytest.raises(ValueError, match=r"holds a run with `data` .*'num_pictures': 30.*; expected .*31"):
        run(settings, replace(data, num_pictures=31), judge, tmp_path)
    with pytest.raises(ValueError, match="holds a run with `judge`"):
        run(settings, data, replace(judge, num_texts=1), tmp_path)
    with FileLock(tmp_path / "lock"), pytest.raises(ValueError, match="Another process is at work in"):
        run(settings, data, judge, tmp_path)
    with pytest.raises(ValueError, match="`family` must be one of llama, chameleon, transfusion; got 'gpt'"):
        replace(settings, family="gpt")
    with pytest.raises(ValueError, match="`max_steps` must be a multiple of `num_measurements`, 2; got 5"):
        replace(settings, max_steps=5)
    with pytest.raises(ValueError, match="`tokens_per_step` must be a multiple of `gradient_accumulation_steps`, 3"):
        replace(settings, gradient_accumulation_steps=3)


def test_a_run_that_diverges_is_kept_as_such(data, judge, tmp_path):
    for family in ("llama", "transfusion"):
        result = run(replace(FAMILIES[family], learning_rate=1e30), data, judge, tmp_path / family)
        assert result["has_diverged"] and len(lines_of(tmp_path / family)) < 2


def test_a_run_whose_gradient_is_not_finite_has_diverged(data, judge, tmp_path, monkeypatch):
    norm = Trainer._get_grad_norm
    monkeypatch.setattr(Trainer, "_get_grad_norm", lambda self, *args: norm(self, *args) * float("nan"))
    assert run(FAMILIES["transfusion"], data, judge, tmp_path)["has_diverged"]


def test_real_pictures_are_drawn_right_and_true_captions_are_right(data):
    judge = Judge(data, 128, num_pictures=10)
    real, captions = judge._pictures, data.captions("held_out")
    metrics = judge._judged(real)
    assert metrics.pop("frechet_distance") == pytest.approx(0, abs=1e-6)
    assert {*metrics} == {"drawn", *ASPECTS} and all(value == 1 for value in metrics.values())
    others = judge._judged(real[1:] + real[:1])
    assert others["drawn"] < 0.2 and others["frechet_distance"] == pytest.approx(0, abs=1e-6)
    train = [data.pictures("train")[i]["image"] for i in range(10)]
    distance = judge._judged(train)["frechet_distance"]
    assert 1e-4 < distance < judge._judged([real[0]] * 10)["frechet_distance"]
    assert judge._judged_captions(captions) == {"captioned": 1.0, "cider": pytest.approx(1000, rel=0.5)}
    assert judge._judged_captions(captions[1:] + captions[:1])["captioned"] < 0.2


def test_the_features_are_those_of_a_classifier_and_always_the_same(data):
    first, second = (ShapesFeatures.trained(data, num_epochs=2) for _ in range(2))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(first(x), second(x)) and first(x).shape == (2, 32)
    with torch.no_grad():  # as a measurement calls it
        assert torch.equal(ShapesFeatures.trained(data, num_epochs=2)(x), first(x))


def power_law(intercept: float, slope: float, flops: tuple[float, ...], noise: float = 0.0) -> parity.Points:
    rng = np.random.default_rng(0)
    return {
        f"{f:g}": [(f, float(np.exp(intercept + slope * np.log(f) + noise * x))) for x in rng.standard_normal(3)]
        for f in flops
    }


@pytest.mark.parametrize(("sign", "slope"), [(1, 0.3), (-1, -0.2)])
def test_the_parity_ratio_is_that_of_exact_power_laws(sign, slope):
    points, other = power_law(1.0, slope, (1e9, 1e10, 1e11)), power_law(1.0, slope, (3e9, 3e10, 3e11))
    assert parity.parity_ratio(points, other, sign) == pytest.approx(1)
    # With the metric better by a factor c at the same FLOPs, c^(-1 / |slope|) of the FLOPs are enough.
    shifted = power_law(1.0 + sign * 0.25, slope, (1e9, 1e10, 1e11))
    assert parity.parity_ratio(shifted, other, sign) == pytest.approx(np.exp(-0.25 / abs(slope)))
    assert parity.interval(shifted, other, sign)[2] == 0
    noisy = [power_law(1.0, slope, (1e9, 1e10, 1e11), noise) for noise in (0.02, 0.1)]
    (low, high, _), (lower, higher, _) = (parity.interval(points, other, sign) for points in noisy)
    assert lower < low < 1.1 and 0.9 < high < higher
    _, fitted, error = parity.fit(noisy[0])
    assert 0 < abs(fitted - slope) < 3 * error


def test_a_metric_that_does_not_improve_with_compute_has_no_parity_ratio():
    worse, other = power_law(1.0, -0.2, (1e9, 1e10)), power_law(1.0, 0.2, (1e9, 1e10))
    assert [*parity.row(worse, other, 1)][2] == "none: more compute does not help"
    zero = {**other, "1e+10": [(1e10, 0.0)]}
    assert next(iter(parity.row(zero, other, 1))) == "no fit"
    assert np.isnan(parity.parity_ratio({"a": [(1.0, 1.0)] * 3}, other, 1)), "one size has no slope"


@pytest.mark.parametrize("scale", SCALES)
def test_tables_have_the_papers_rows_and_share_their_runs(scale, tmp_path):
    made = {name: table(SCALES[scale]) for name, table in TABLES.items()}
    folders = {folder_of(row, tmp_path) for table in made.values() for row in table.rows.values()}
    num_rows = sum(len(table.rows) for table in made.values())
    settings = {str(row) for table in made.values() for row in table.rows.values()}
    assert len(folders) == len(settings) < num_rows, "the same folder for the same run alone"
    size = SCALES[scale].size
    shared = [made["table3"].rows[f"Transfusion {size}"], made["table8"].rows["t ≤ 500"]]
    shared += [made["table5"].rows["linear, bidirectional"], made["table6"].rows["linear, 2×2"]]
    assert shared == [made["table7"].rows[f"linear, {size}"]] * 4 == [made["weight"].rows["λ = 5"]] * 4
    assert made["steps"].rows[f"Transfusion, {SCALES[scale].max_steps:,} steps"] == shared[0]
    assert all(row in made["steps"].rows.values() for row in made["table5"].rows.values())
    assert sum(row.max_steps == 2 * SCALES[scale].max_steps for row in made["steps"].rows.values()) == 6
    for table in made.values():
        assert {*table.paper} <= {*table.rows}
        assert {claim.better for claim in table.claims} | {claim.worse for claim in table.claims} <= {*table.rows}
    assert len(made["table5"].rows) == 4 and len(made["table6"].rows) == 7 and len(made["table8"].rows) == 2


def made_run(folder: Path, values: list[float], flops: int = 54, has_diverged: bool = False) -> Path:
    folder.mkdir(parents=True)
    others = {"captioned": 1.0, "cider": 1.0, "frechet_distance": 1.0} if flops != 54 else {}
    lines = [
        {"step": i, "num_tokens": 9, "flops": flops, "seconds": 1.0, "drawn": x, "perplexity": 9 - x, **others}
        for i, x in enumerate(values)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = {"num_parameters": 5, "has_diverged": has_diverged, "last": lines[-1]}
    done |= {"date": "2026-01-01", "hardware": "2 CPU cores", "torch": "2"}
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
    ceilings = {"kl": {"psnr": 30.0}}
    file = write_table("tableX", table, folders, tmp_path / "results", "python tables.py tableX", ceilings)
    text = file.read_text()
    assert "| a | 8.15 (8.1–8.2) | 0.85 (0.8–0.9) [0.99] |" in text and "| a | 5 | 9 | 5.40e+01 | 1 |" in text
    assert "| a beats b | holds | holds |" in text
    assert "| a beats c |  | within the spread |" in text
    assert "| d beats b |  | does not hold |" in text
    assert "Diverged, and left out of the means: 2." in text and "| d | 8.85 (8.8–8.9) | 0.15" in text
    assert "Ceiling of the `kl` autoencoder: psnr 30." in text and "2026-01-01, 2 CPU cores, torch 2, 9 runs" in text
    assert (tmp_path / "results" / "tableX.png").stat().st_size > 5000
    folders["a"].pop()
    assert "one seed" in write_table("tableX", table, folders, tmp_path / "results", "x", {}).read_text()


def test_a_row_without_pictures_leaves_the_other_rows_their_metrics(tmp_path):
    folders = {"text": [made_run(tmp_path / "text", [1.0])], "both": [made_run(tmp_path / "both", [1999.9])]}
    for name, removed in (("metrics.jsonl", '"drawn": 1.0, '), ("done.json", '"drawn": 1.0, ')):
        file = folders["text"][0] / name
        file.write_text(file.read_text().replace(removed, ""))
    table = Table("A table", dict.fromkeys(folders, FAMILIES["llama"]), {}, [])
    text = write_table("tableX", table, folders, tmp_path, "x", {}).read_text()
    assert "| text | 8 (8–8) |  |" in text and "2000 (2000–2000) |" in text and "claim" not in text


def test_figure_5_has_a_fit_for_each_family(tmp_path):
    folders, rows = {}, {}
    for i, size in enumerate(("0.1M", "0.3M", "0.8M")):
        for family, better in (("transfusion", 2.0), ("chameleon", 1.0)):
            values = [better * 2**i * (1 + seed / 50) for seed in range(3)]
            runs = [made_run(tmp_path / family / size / str(seed), [0.0, x], 10**i) for seed, x in enumerate(values)]
            folders[name := f"{family} {size}"] = runs
            rows[name] = replace(FAMILIES[family], size=size)
    folders["equal"] = [made_run(tmp_path / "equal", [0.0, 99.0], 50)]
    rows["equal"] = replace(FAMILIES["chameleon"], size="0.8M", max_steps=2)
    table = Table("A table", rows, {}, [])
    text = write_figure5(table, folders, tmp_path, "python tables.py figure5").read_text()
    drawn = next(line for line in text.splitlines() if line.startswith("| drawn right"))
    # Ten times the FLOPs double the metric, so twice the metric is a tenth of the FLOPs.
    slope = r"0\.301 ± 0\.00\d"
    assert re.match(rf"\| drawn right ↑ \| {slope} \| {slope} \| 0\.1 \(0\.0\d+–0\.1\d*\) \|", drawn), drawn
    assert "none: more compute does not help" in next(line for line in text.splitlines() if "captions right" in line)
    assert "| .489, .526 |" in text
    assert (tmp_path / "figure5.png").stat().st_size > 5000


def stops(*args):
    raise ValueError("no luck")


@pytest.mark.slow
def test_a_run_that_fails_stops_the_others_and_is_named(data, judge, tmp_path, monkeypatch):
    """In processes, where the runs that wait would otherwise be made first."""
    table = Table("A table", {f"{i}": replace(FAMILIES["llama"], seed=i) for i in range(6)}, {}, [])
    table.rows.update({name: replace(row, learning_rate=float(name)) for name, row in table.rows.items()})
    monkeypatch.setattr(tables, "run", stops)
    with pytest.raises(ValueError, match="no luck") as caught:
        tables.make_runs([table], 1, data, judge, tmp_path, 2)
    assert "in " in caught.value.__notes__[0] and "llama-0.3M" in caught.value.__notes__[0]


def test_a_table_is_one_command(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "Data", lambda *args, **kwargs: data)
    monkeypatch.setitem(SCALES, "toy", replace(SCALES["toy"], tokens_per_step=200))
    words = ["table8", "--scale", "toy", "--seeds", "1", "--num_processes", "1"]
    words += ["--output_dir", str(tmp_path), "--results_dir", str(tmp_path / "results")]
    tables.main(words)
    file = tmp_path / "results" / "table8.md"
    written = file.read_text()
    assert "| no limit |" in written and "Ceiling of the `kl` autoencoder" in written
    with Image.open(next((tmp_path / "runs").glob("*/drawn.png"))) as drawn:
        assert drawn.size == (4 * 32, 32)
    assert (tmp_path / "results" / "table8-drawn.png").stat().st_size > 5000
    monkeypatch.setattr(runs, "build", lambda *_: pytest.fail("a second call makes no run"))
    shutil.rmtree(tmp_path / "runs")
    shutil.move(tmp_path / "results" / "runs", tmp_path / "runs")  # what is kept of runs is enough
    file.unlink()
    tables.main(words)
    assert file.read_text() == written
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            tables.main(["table8", "--scale", "paper"])
        assert "--scale paper needs GPUs" in capsys.readouterr().err
    for wrong, message in ((["--max_steps", "7"], "multiple of 6; got 7"), (["--seeds", "0"], "at least 1; got 0")):
        with pytest.raises(SystemExit):
            tables.main(["table8", *wrong])
        assert message in capsys.readouterr().err


def test_the_noise_limit_reaches_the_batches(data):
    rows = {}
    for name, settings in TABLES["table8"](SCALES["toy"]).rows.items():
        _, _, collate = build(settings, data)
        rows[name] = collate.image_first_max_timesteps
    assert rows == {"no limit": 1000, "t ≤ 500": 500}
