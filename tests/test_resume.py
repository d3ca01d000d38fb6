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

STEPS = 58  # no whole number of epochs


class Unhurried(TrainerCallback):
    """However fast the machine, ten kills come before the end."""

    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(0.05)


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


def train(folder: Path, data: str) -> TransfusionTrainer:
    """Begins, or goes on where a checkpoint is."""
    torch.set_num_threads(1)
    args = TrainingArguments(
        str(folder), max_steps=STEPS, save_steps=2, save_total_limit=3, logging_steps=1, learning_rate=1e-2,
        per_device_train_batch_size=2, remove_unused_columns=False, report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    dataset = Streamed() if data == "streaming" else uneven_samples()
    trainer = TransfusionTrainer(
        tiny.model(std=0.1), args, train_dataset=dataset, data_collator=collate_unseeded,
        callbacks=[TransfusionEMACallback(decay=0.9), Unhurried()],
    )  # fmt: skip
    has_checkpoint = folder.exists() and get_last_checkpoint(folder) is not None
    trainer.train(resume_from_checkpoint=has_checkpoint)
    trainer.save_model(folder / "final")
    return trainer


def is_inside_a_save(folder: Path) -> bool:
    try:
        return any((folder / "incomplete").glob("checkpoint-*/*"))
    except FileNotFoundError:  # renamed meanwhile
        return False


def kill_and_resume(folder: Path, data: str, num_kills: int) -> int:
    """Number of kills that hit a save."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "transfusion_hf"])
    rng, num_inside = random.Random(0), 0
    for i in range(num_kills):
        process = context.Process(target=train, args=(folder, data))
        process.start()
        before = get_last_checkpoint(folder) if folder.exists() else None
        while (get_last_checkpoint(folder) if folder.exists() else None) == before:  # let it come a step further
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
    process = context.Process(target=train, args=(folder, data))
    process.start()
    process.join()
    assert process.exitcode == 0
    return num_inside


def losses(folder: Path) -> list[tuple]:
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [tuple(entry.get(name) for name in ("step", "lm_loss", "diffusion_loss")) for entry in state["log_history"]]


@pytest.mark.parametrize(
    ("data", "num_kills"),
    [
        ("map", 2),
        pytest.param("map", 10, marks=pytest.mark.slow),
        pytest.param("streaming", 10, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(tmp_path, data, num_kills):
    kill_and_resume(tmp_path / "whole", data, 0)
    assert kill_and_resume(tmp_path / "killed", data, num_kills) >= 1
    assert len(losses(tmp_path / "whole")) == STEPS
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    for name in ("final/model.safetensors", f"checkpoint-{STEPS}/ema.safetensors"):
        whole, killed = (load_file(tmp_path / run / name) for run in ("whole", "killed"))
        assert all(torch.equal(killed[key], value) for key, value in whole.items())
    assert not (tmp_path / "killed" / "incomplete").exists()


@pytest.mark.parametrize("data", ["map", "streaming"])
def test_a_finished_run_that_is_resumed_trains_no_further(tmp_path, data):
    finished, resumed = (train(tmp_path, data) for _ in range(2))
    assert resumed.state.global_step == STEPS == len(losses(tmp_path))
    expected = finished.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())


def draw_text(row: dict) -> dict:
    return {"text": row["text"] and str(int(torch.randint(8, ())))}


def train_on_texts(
    folder: Path, data: str, texts: list[str], resume=None, callbacks=(), **kwargs
) -> TransfusionTrainer:
    """Each text stands for a sample; empty ones are broken rows, which a list has not."""
    rows = Dataset.from_dict({"text": texts})
    if data == "list":
        dataset = [row for row in rows if row["text"]]
    else:
        rows = rows if data == "map" else rows.to_iterable_dataset(num_shards=2)
        rows = rows.map(draw_text) if data == "streaming what is drawn" else rows
        dataset = TransfusionDataset.from_text(rows, shuffle=True)

    def collate(batch: list[dict]) -> dict:
        drawn = int(torch.randint(8, ())) + random.randrange(8) + np.random.randint(8)
        return collate_unseeded([uneven_samples()[(int(row["text"]) + drawn) % 8] for row in batch])

    def collate_any(batch: list[dict]) -> dict:
        return collate(batch) if "text" in batch[0] else collate_unseeded(batch)  # of the evaluation

    args = TrainingArguments(
        str(folder), learning_rate=1e-2, remove_unused_columns=False, report_to="none", disable_tqdm=True,
        use_cpu=True, **{"save_steps": 1, "per_device_train_batch_size": 2, **kwargs},
    )  # fmt: skip
    trainer = TransfusionTrainer(
        tiny.model(std=0.1), args, train_dataset=dataset, eval_dataset=uneven_samples(), data_collator=collate_any,
        callbacks=list(callbacks),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    ("data", "num_workers", "persistent"),
    [
        *((data, 0, False) for data in ("list", "map", "streaming")),
        *((data, 1, False) for data in ("list", "map", "streaming")),
        *((data, 2, True) for data in ("list", "map", "streaming")),
        ("streaming what is drawn", 2, False),
    ],
)
@pytest.mark.filterwarnings("ignore:Skipped")
def test_a_run_takes_as_many_passes_as_its_steps_need_and_goes_on_in_any_of_them(
    tmp_path, data, num_workers, persistent
):
    texts = ["0", "", "1", "2", "3", "4", "", "5", "6", "7"]  # five batches of two, of which four come
    kwargs = {"dataloader_num_workers": num_workers, "dataloader_persistent_workers": persistent, "max_steps": 16}
    whole = train_on_texts(tmp_path / "whole", data, texts, **kwargs)
    assert whole.state.global_step == 16 and whole.state.epoch > 3
    expected = whole.model.state_dict()
    for step in (8, 9, 10):  # between two passes of four batches or five, and within one
        folder = str(tmp_path / "whole" / f"checkpoint-{step}")
        resumed = train_on_texts(tmp_path / "resumed", data, texts, folder, save_strategy="no", **kwargs)
        assert resumed.state.global_step == 16
        assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items()), step


def history(trainer: TransfusionTrainer) -> list[dict]:
    """Without what is timed, the summary of a call, and what is of the last step, which another call may have made."""
    timed = ("_per_second", "runtime", "flos", "grad_norm", "learning_rate")
    entries = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    return [{name: value for name, value in entry.items() if not name.endswith(timed)} for entry in entries]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1},
        {"logging_steps": 4},
        {"eval_strategy": "steps", "eval_steps": 3},
        {
            "eval_strategy": "steps",
            "eval_steps": 3,
            "dataloader_num_workers": 1,
            "dataloader_persistent_workers": True,
        },
        {"eval_strategy": "epoch", "logging_strategy": "epoch"},
        {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"},
    ],
    ids=["accumulation", "rare logs", "evaluation", "evaluation in workers that stay", "passes", "saved after passes"],
)
@pytest.mark.parametrize("data", ["list", "map", "streaming"])
@pytest.mark.parametrize("texts", ["01234567", "0 1 234567"], ids=["whole", "broken"])
@pytest.mark.filterwarnings("ignore:Skipped")
def test_a_resumed_run_has_the_same_logs_and_weights(tmp_path, data, texts, kwargs):
    texts = [text.strip() for text in texts]
    kwargs = {"max_steps": 10, "logging_steps": 1, **kwargs}
    if "" in texts:  # and micro-batches are left over at the end of a pass
        kwargs |= {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1}
    whole = train_on_texts(tmp_path / "whole", data, texts, **kwargs)
    expected = whole.model.state_dict()
    folders = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    for folder in [folder for folder in folders if folder.name.split("-")[1] in "23456"]:
        resumed = train_on_texts(tmp_path / "resumed", data, texts, str(folder), **{**kwargs, "save_strategy": "no"})
        assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items()), folder
        assert history(resumed) == history(whole), folder


def test_the_loss_in_the_end_is_that_of_the_steps_of_the_call(tmp_path):
    texts = list("01234567")
    each = train_on_texts(tmp_path / "each", "list", texts, max_steps=4, logging_steps=1, save_strategy="no")
    train_on_texts(tmp_path / "rare", "list", texts, max_steps=4, logging_steps=100)
    folder = str(tmp_path / "rare" / "checkpoint-3")
    resumed = train_on_texts(tmp_path / "rare", "list", texts, folder, max_steps=4, logging_steps=100)
    losses = [entry["loss"] for entry in each.state.log_history if "loss" in entry]
    assert resumed.state.log_history[-1]["train_loss"] == pytest.approx(losses[3], rel=1e-4)


def test_a_run_that_skips_no_data_starts_its_pass_anew(tmp_path):
    kwargs = {"max_steps": 6, "logging_steps": 1}
    train_on_texts(tmp_path, "list", list("01234567"), **kwargs)
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(state.global_step)

    folder = str(tmp_path / "checkpoint-2")
    train_on_texts(tmp_path / "resumed", "list", list("01234567"), folder, [Watch()], ignore_data_skip=True, **kwargs)
    assert seen == [3, 4, 5, 6]


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
        tmp_path, "map", ["0", "2", "3", ""], callbacks=[watch], max_steps=2, per_device_train_batch_size=1,
        gradient_accumulation_steps=2, save_strategy="no",
    )  # fmt: skip
    assert watch.num_seen == 3  # of one step there was but half


def test_a_kill_inside_the_deletion_of_an_old_checkpoint_leaves_none_in_part(tmp_path, monkeypatch):
    deleted = shutil.rmtree

    def killed_while_deleting(folder, *args, **kwargs):
        parts = [file for file in Path(folder).rglob("*") if file.is_file()]
        if parts:
            parts[0].unlink()
            raise KeyboardInterrupt
        deleted(folder, *args, **kwargs)

    texts, kwargs = list("01234567"), {"max_steps": 4, "save_total_limit": 1}
    monkeypatch.setattr(shutil, "rmtree", killed_while_deleting)
    with pytest.raises(KeyboardInterrupt):
        train_on_texts(tmp_path, "map", texts, **kwargs)
    monkeypatch.undo()
    files = {folder.name: len(list(folder.iterdir())) for folder in tmp_path.glob("checkpoint-*")}
    assert list(files) == ["checkpoint-2"]  # and the first, or a part of it, is not there
    train_on_texts(tmp_path, "map", texts, resume=True, **kwargs)
    (last,) = tmp_path.glob("checkpoint-*")
    assert (last.name, len(list(last.iterdir()))) == ("checkpoint-4", files["checkpoint-2"])
    assert not (tmp_path / "incomplete").exists()


@pytest.mark.parametrize("data", ["map", "streaming"])
@pytest.mark.filterwarnings("ignore:Skipped")
def test_passes_too_short_for_a_step_are_an_error_and_no_endless_loop(tmp_path, data):
    with pytest.raises(ValueError, match="a whole pass without a step: fewer than `gradient_accumulation_steps` = 4"):
        train_on_texts(
            tmp_path, data, ["0", "", "1", "", "2"], max_steps=2, per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
        )  # fmt: skip
