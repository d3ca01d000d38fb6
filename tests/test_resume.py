"""Runs that are killed, in the middle of a step or of a checkpoint, and go on as if nothing had happened."""

import itertools
import json
import multiprocessing
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from safetensors.torch import load_file
from test_trainer import collate_uneven, uneven_samples
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from transfusion_hf import TransfusionEMACallback, TransfusionTrainer
from transfusion_hf.data.dataset import TransfusionDataset


class Unhurried(TrainerCallback):
    """Slows the training down: however fast the machine, all kills come before the end."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(self.seconds)


class Streamed(torch.utils.data.IterableDataset):
    """Without end: the Trainer counts no epochs of a stream and would skip beyond its end."""

    def __iter__(self):
        return itertools.cycle(uneven_samples())


def collate_unseeded(rows: list[dict]) -> dict:
    """
    t and ε are drawn by torch's global generator, whose state a checkpoint holds; the collator drops labels, as the
    project's own drops captions.
    """
    batch = collate_uneven(rows)
    batch.pop("noise_seeds", None)
    batch["labels"][torch.rand(batch["labels"].shape) < 0.3] = -100
    return batch


def train(folder: Path, data: str, num_steps: int, seconds: float = 0.05) -> None:
    """Begins, or goes on where a checkpoint is."""
    torch.set_num_threads(1)
    args = TrainingArguments(
        str(folder), max_steps=num_steps, save_steps=2, save_total_limit=3, logging_steps=1, learning_rate=1e-2,
        per_device_train_batch_size=2, remove_unused_columns=False, report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = TransfusionTrainer(
        tiny.model(std=0.1), args, train_dataset=Streamed() if data == "streaming" else uneven_samples(),
        data_collator=collate_unseeded, callbacks=[TransfusionEMACallback(decay=0.9), Unhurried(seconds)],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    trainer.save_model(folder / "final")


def last_checkpoint(folder: Path) -> str | None:
    return get_last_checkpoint(folder) if folder.exists() else None


def is_inside_a_save(folder: Path) -> bool:
    try:
        return any((folder / "_incomplete").glob("checkpoint-*/*"))
    except FileNotFoundError:  # renamed meanwhile
        return False


def kill_and_resume(folder: Path, data: str, num_steps: int, num_kills: int) -> int:
    """Number of kills that hit a save."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "datasets", "transfusion_hf.training.trainer"])
    rng, num_inside = random.Random(0), 0
    for i in range(num_kills):
        process = context.Process(target=train, args=(folder, data, num_steps))
        process.start()
        before = last_checkpoint(folder)
        while last_checkpoint(folder) == before:  # let it come a step further
            assert process.is_alive()
            time.sleep(0.001)
        if i % 2:
            time.sleep(rng.uniform(0, 0.1))
        else:
            while process.is_alive() and not is_inside_a_save(folder):
                pass
        process.kill()
        process.join()
        num_inside += is_inside_a_save(folder)
    train(folder, data, num_steps, seconds=0)
    return num_inside


def check_equal_runs(whole: Path, killed: Path, num_steps: int) -> None:
    checkpoint = f"checkpoint-{num_steps}"
    states = [json.loads((run / checkpoint / "trainer_state.json").read_text()) for run in (whole, killed)]
    losses = [[(e["step"], e.get("lm_loss"), e.get("diffusion_loss")) for e in s["log_history"]] for s in states]
    assert len(losses[0]) == num_steps and losses[1] == losses[0]
    for name in ("final/model.safetensors", f"{checkpoint}/ema.safetensors"):
        expected, weights = load_file(whole / name), load_file(killed / name)
        assert all(torch.equal(weights[key], value) for key, value in expected.items())
    assert not (killed / "_incomplete").exists()


@pytest.mark.parametrize(
    ("data", "num_kills"),
    [
        ("map", 2),
        pytest.param("map", 10, marks=pytest.mark.slow),
        pytest.param("streaming", 10, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(tmp_path, data, num_kills):
    num_steps = 8 + 5 * num_kills  # no whole number of epochs
    train(tmp_path / "whole", data, num_steps, seconds=0)
    assert kill_and_resume(tmp_path / "killed", data, num_steps, num_kills) >= 1
    check_equal_runs(tmp_path / "whole", tmp_path / "killed", num_steps)


def draw_text(row: dict) -> dict:
    return {"text": row["text"] and str(int(torch.randint(8, ())))}


def train_on_texts(folder: Path, data: str, texts: str, resume=None, callbacks=(), **kwargs) -> TransfusionTrainer:
    """Each letter stands for a sample; a space is a broken row, which a list does not have."""
    rows = Dataset.from_dict({"text": [text.strip() for text in texts]})
    if data == "list":
        dataset = [row for row in rows if row["text"]]
    else:
        rows = rows if data == "map" else rows.to_iterable_dataset(num_shards=2)
        rows = rows.map(draw_text) if data == "streaming what is drawn" else rows
        dataset = TransfusionDataset.from_text(rows, shuffle=True)

    def collate(batch: list[dict]) -> dict:
        if "text" not in batch[0]:  # of the evaluation
            return collate_unseeded(batch)
        drawn = int(torch.randint(8, ())) + random.randrange(8) + np.random.randint(8)
        return collate_unseeded([uneven_samples()[(int(row["text"]) + drawn) % 8] for row in batch])

    defaults = {"save_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 2}
    args = TrainingArguments(
        str(folder), learning_rate=1e-2, remove_unused_columns=False, report_to="none", disable_tqdm=True,
        use_cpu=True, **{**defaults, **kwargs},
    )  # fmt: skip
    trainer = TransfusionTrainer(
        tiny.model(std=0.1), args, train_dataset=dataset, eval_dataset=uneven_samples(), data_collator=collate,
        callbacks=list(callbacks),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def history(trainer: TransfusionTrainer) -> list[dict]:
    """Without what is timed, the summary of a call, and what is of the last step, which another call may have made."""
    timed = ("_per_second", "runtime", "flos", "grad_norm", "learning_rate")
    entries = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    return [{name: value for name, value in entry.items() if not name.endswith(timed)} for entry in entries]


WHOLE, BROKEN = "01234567", "0 1 234567"
ACCUMULATION = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1}
RARE_LOGS = {"logging_steps": 4}
EVALUATION = {"eval_strategy": "steps", "eval_steps": 3}
PASSES = {"eval_strategy": "epoch", "logging_strategy": "epoch"}
SAVED_AFTER_PASSES = {**PASSES, "save_strategy": "epoch"}
A_WORKER = {"dataloader_num_workers": 1}
WORKERS_THAT_STAY = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
# Passes of four or five steps of two, or of three or two (and micro-batches over) by accumulation.
RUNS = {
    "list, evaluation": ("list", WHOLE, EVALUATION),
    "list, accumulation, rare logs": ("list", WHOLE, ACCUMULATION | RARE_LOGS),
    "list, saved after passes": ("list", WHOLE, SAVED_AFTER_PASSES),
    "list, evaluation in workers that stay": ("list", WHOLE, EVALUATION | WORKERS_THAT_STAY),
    "map, passes": ("map", WHOLE, PASSES),
    "map, broken, rare logs, a worker": ("map", BROKEN, RARE_LOGS | A_WORKER),
    "map, broken, accumulation, evaluation": ("map", BROKEN, ACCUMULATION | EVALUATION),
    "map, broken, accumulation, saved after passes": ("map", BROKEN, ACCUMULATION | SAVED_AFTER_PASSES),
    "stream, accumulation": ("streaming", WHOLE, ACCUMULATION),
    "stream, broken, evaluation, rare logs": ("streaming", BROKEN, EVALUATION | RARE_LOGS),
    "stream, broken, accumulation, passes": ("streaming", BROKEN, ACCUMULATION | PASSES),
    "stream, broken, saved after passes": ("streaming", BROKEN, SAVED_AFTER_PASSES),
    "stream, broken, workers that stay": ("streaming", BROKEN, EVALUATION | WORKERS_THAT_STAY),
    "drawn stream, broken, workers": ("streaming what is drawn", BROKEN, {"dataloader_num_workers": 2}),
}


# Each setting is in one of the others, too.
SLOW_RUNS = {
    "list, evaluation", "list, accumulation, rare logs", "map, passes", "map, broken, accumulation, evaluation",
    "stream, broken, evaluation, rare logs", "list, evaluation in workers that stay",
}  # fmt: skip


@pytest.mark.parametrize(
    ("data", "texts", "kwargs"),
    [pytest.param(*run, id=name, marks=[pytest.mark.slow] * (name in SLOW_RUNS)) for name, run in RUNS.items()],
)
@pytest.mark.filterwarnings("ignore:Skipped")
def test_a_resumed_run_has_the_same_logs_and_weights(tmp_path, data, texts, kwargs):
    """Resumed within a pass and between two, a run takes as many passes as its steps need."""
    kwargs = {"max_steps": 11, **kwargs}
    whole = train_on_texts(tmp_path / "whole", data, texts, **kwargs)
    assert whole.state.global_step == 11 and whole.state.epoch > 2
    expected = whole.model.state_dict()
    folders = [tmp_path / "whole" / f"checkpoint-{step}" for step in (3, 4, 5)]
    folders = [folder for folder in folders if folder.exists()]
    assert folders
    for folder in folders:
        resumed = train_on_texts(tmp_path / "resumed", data, texts, str(folder), **{**kwargs, "save_strategy": "no"})
        assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items()), folder
        assert history(resumed) == history(whole), folder


@pytest.mark.parametrize("data", ["list", "streaming"])
def test_a_finished_run_that_is_resumed_trains_no_further(tmp_path, data):
    finished, resumed = (
        train_on_texts(tmp_path, data, WHOLE, resume, max_steps=2, save_steps=2) for resume in (None, True)
    )
    assert resumed.state.global_step == 2 and history(resumed) == history(finished)
    expected = finished.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())


def test_the_loss_in_the_end_is_that_of_the_steps_of_the_call(tmp_path):
    each = train_on_texts(tmp_path / "each", "list", WHOLE, max_steps=4, save_strategy="no")
    train_on_texts(tmp_path / "rare", "list", WHOLE, max_steps=4, save_steps=3, logging_steps=100)
    folder = str(tmp_path / "rare" / "checkpoint-3")
    resumed = train_on_texts(tmp_path / "rare", "list", WHOLE, folder, max_steps=4, logging_steps=100)
    losses = [entry["loss"] for entry in each.state.log_history if "loss" in entry]
    assert resumed.state.log_history[-1]["train_loss"] == pytest.approx(losses[3], rel=1e-4)


def test_a_run_that_skips_no_data_starts_its_pass_anew(tmp_path):
    train_on_texts(tmp_path, "list", WHOLE, max_steps=6, save_steps=2)
    seen, states = [], []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            states.append(torch.get_rng_state())

        def on_step_end(self, args, state, control, **kwargs):
            seen.append((state.global_step, state.epoch))

    folder = tmp_path / "checkpoint-2"
    train_on_texts(
        tmp_path / "resumed", "list", WHOLE, str(folder), [Watch()], ignore_data_skip=True, max_steps=6,
        save_strategy="no",
    )  # fmt: skip
    assert seen == [(3, 0.25), (4, 0.5), (5, 0.75), (6, 1.0)]
    assert torch.equal(states[0], torch.load(folder / "rng_state.pth", weights_only=False)["cpu"])


class LooksAtTheData(TrainerCallback):
    """As one does that shows samples."""

    trainer: TransfusionTrainer

    def on_step_end(self, args, state, control, **kwargs):
        next(iter(self.trainer.get_train_dataloader()))


def test_looking_at_the_data_changes_no_training(tmp_path):
    runs = []
    for looking in (False, True):
        watch = LooksAtTheData()
        args = TrainingArguments(
            str(tmp_path), max_steps=6, per_device_train_batch_size=2, remove_unused_columns=False, report_to="none",
            disable_tqdm=True, use_cpu=True, save_strategy="no",
        )  # fmt: skip
        run = TransfusionTrainer(
            tiny.model(std=0.1), args, train_dataset=uneven_samples(), data_collator=collate_unseeded,
            callbacks=[watch] if looking else [],
        )  # fmt: skip
        watch.trainer = run
        run.train()
        runs.append(run.model.state_dict())
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


class StartsWithoutGradient(TrainerCallback):
    num_seen = 0

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        assert not any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
        self.num_seen += 1


@pytest.mark.filterwarnings("ignore:Skipped")
def test_micro_batches_too_few_for_a_step_do_not_count_in_the_next_pass(tmp_path):
    watch = StartsWithoutGradient()
    train_on_texts(
        tmp_path, "map", "023 ", callbacks=[watch], max_steps=2, per_device_train_batch_size=1,
        gradient_accumulation_steps=2, save_strategy="no",
    )  # fmt: skip
    assert watch.num_seen == 3  # one step was cut short


def test_a_kill_inside_the_deletion_of_an_old_checkpoint_leaves_none_in_part(tmp_path, monkeypatch):
    deleted = shutil.rmtree

    def killed_while_deleting(folder, *args, **kwargs):
        parts = [file for file in Path(folder).rglob("*") if file.is_file()]
        if parts:
            parts[0].unlink()
            raise KeyboardInterrupt
        deleted(folder, *args, **kwargs)

    kwargs = {"max_steps": 4, "save_total_limit": 1}
    monkeypatch.setattr(shutil, "rmtree", killed_while_deleting)
    with pytest.raises(KeyboardInterrupt):
        train_on_texts(tmp_path, "map", WHOLE, **kwargs)
    monkeypatch.undo()
    files = {folder.name: len(list(folder.iterdir())) for folder in tmp_path.glob("checkpoint-*")}
    assert list(files) == ["checkpoint-2"]  # and the first, or a part of it, is not there
    train_on_texts(tmp_path, "map", WHOLE, resume=True, **kwargs)
    (last,) = tmp_path.glob("checkpoint-*")
    assert (last.name, len(list(last.iterdir()))) == ("checkpoint-4", files["checkpoint-2"])
    assert not (tmp_path / "_incomplete").exists()


@pytest.mark.parametrize("data", ["map", "streaming"])
@pytest.mark.filterwarnings("ignore:Skipped")
def test_passes_too_short_for_a_step_are_an_error_and_no_endless_loop(tmp_path, data):
    with pytest.raises(ValueError, match="a whole pass without a step: fewer than `gradient_accumulation_steps` = 4"):
        train_on_texts(
            tmp_path, data, "0 1 2", max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=4
        )
