"""The stock `Trainer` and the exact one: micro-batches, reproducible evaluation, the average of the weights."""

import inspect
import math
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoProcessor, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import integration_utils

from transfusion_hf import (
    TransfusionEMACallback,
    TransfusionForCausalLMAndDiffusion,
    TransfusionSamplesCallback,
    TransfusionTrainer,
    make_labels,
    set_trainable,
)
from transfusion_hf.training.checkpoints import NotFiniteError
from transfusion_hf.training.trainer import _flops_per_token

IMAGE = [tiny.BOI] + [tiny.IMG] * 4 + [tiny.EOI]


def samples(count: int, num_words=lambda i: 3) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        ids = [tiny.BOS, *range(3 + i, 3 + i + num_words(i)), *IMAGE, tiny.EOS]
        rows.append({"input_ids": ids, "latents": torch.randn(2, 4, 4, generator=generator), "noise_seeds": 7 * i})
    return rows


def collate(rows: list[dict]) -> dict:
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    mask = (ids != tiny.PAD).long()
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": make_labels(ids, mask, tiny.BOI, tiny.IMG, tiny.EOI),
        "latents": torch.stack([row["latents"] for row in rows]),
        "noise_seeds": torch.tensor([row["noise_seeds"] for row in rows]),
    }


def collate_without_seeds(rows: list[dict]) -> dict:
    batch = collate(rows)
    del batch["noise_seeds"]
    return batch


def trainer(
    model, folder, dataset, callbacks=(), data_collator=collate, eval_dataset=None, kind=Trainer, **kwargs
) -> Trainer:
    defaults = {
        "output_dir": str(folder),
        "max_steps": 1,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 8,
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
    }
    args = TrainingArguments(**{**defaults, **kwargs})
    return kind(
        model,
        args,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        data_collator=data_collator,
        callbacks=list(callbacks),
    )


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> dict:
    """The change of each weight in one SGD step and the loss that is logged, by λ and number of micro-batches."""
    found = {}
    for weight in (0.0, 5.0):
        for parts in (1, 4):
            model = tiny.model(std=0.1, diffusion_loss_weight=weight)
            before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
            run = trainer(
                model, tmp_path_factory.mktemp("step"), samples(8), logging_steps=1,
                per_device_train_batch_size=8 // parts, gradient_accumulation_steps=parts,
            )  # fmt: skip
            run.train()
            moved = {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}
            found[weight, parts] = moved, next(entry["loss"] for entry in run.state.log_history if "loss" in entry)
    return found


@pytest.mark.parametrize("weight", [0.0, 5.0], ids=["lm loss alone", "both losses"])
def test_four_accumulation_steps_equal_one_batch(steps, weight):
    (whole, whole_loss), (parts, parts_loss) = steps[weight, 1], steps[weight, 4]
    largest = max(float(change.abs().max()) for change in whole.values())
    for name, change in whole.items():
        assert (parts[name] - change).abs().max() <= 1e-5 * largest, name
    assert parts_loss == pytest.approx(whole_loss, rel=1e-4)


def test_the_diffusion_term_alone_is_not_multiplied_by_the_number_of_micro_batches(steps):
    """The difference that λ makes to a step, whole and in parts: a plain mean would be four times as large."""
    name = "model.patch_decoder.proj.weight"
    moved = [steps[5.0, parts][0][name] - steps[0.0, parts][0][name] for parts in (1, 4)]
    assert float(moved[1].norm() / moved[0].norm()) == pytest.approx(1.0, abs=1e-4)


def test_with_unequal_micro_batches_the_diffusion_term_is_weighted_and_never_off_by_a_factor():
    """The documented approximation: each micro-batch's mean counts with its share of the labels."""
    model = tiny.model().train()
    parts = [collate(samples(8, num_words=lambda i: 1 + i)[i : i + 2]) for i in range(0, 8, 2)]
    labels = [int((part["labels"][:, 1:] != -100).sum()) for part in parts]
    assert len(set(labels)) == 4
    total = sum(model(**part, num_items_in_batch=torch.tensor(sum(labels))).diffusion_loss for part in parts)
    means = [model(**part).diffusion_loss for part in parts]
    expected = sum(mean * count / sum(labels) for mean, count in zip(means, labels, strict=True))
    torch.testing.assert_close(total, expected)
    assert min(means) <= total <= max(means)


def test_eval_loss_is_reproducible(tmp_path):
    model, dataset = tiny.model(), samples(6)
    losses = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        run = trainer(model, tmp_path, dataset, data_collator=collate_without_seeds, eval_dataset=dataset)
        losses.append(run.evaluate()["eval_loss"])
    assert losses[0] == losses[1]
    backwards = trainer(model, tmp_path, dataset, data_collator=collate_without_seeds, eval_dataset=dataset[::-1])
    assert backwards.evaluate()["eval_loss"] == pytest.approx(losses[0], rel=1e-5)


def test_a_tiny_model_overfits_both_losses(tmp_path):
    torch.manual_seed(0)
    model, dataset = tiny.model(std=0.05), samples(8)
    batch = collate(dataset)
    before = model(**batch)
    trainer(model, tmp_path, dataset, max_steps=100, optim="adamw_torch", learning_rate=1e-2).train()
    after = model.eval()(**batch)
    first_word = torch.tensor(8.0).log() / 5  # nothing tells which of 8 samples begins; 5 targets each
    assert after.lm_loss - first_word < 0.01 * before.lm_loss
    assert after.diffusion_loss < 0.3 * before.diffusion_loss


class AverageByHand(TrainerCallback):
    """What the average must be: d = min(decay, 1 − (1 + n)^−2/3) after the n-th step, from the second on."""

    def __init__(self, decay: float):
        self.decay, self.steps, self.average = decay, 0, None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.model = model
        self.average = [p.detach().clone() for p in model.parameters()]

    def on_step_end(self, args, state, control, **kwargs):
        decay = 0.0 if self.steps == 0 else min(self.decay, 1 - (1 + self.steps) ** (-2 / 3))
        self.steps += 1
        for average, parameter in zip(self.average, self.model.parameters(), strict=True):
            average.mul_(decay).add_(parameter.detach(), alpha=1 - decay)


def test_ema_is_the_average_takes_the_weights_place_at_the_end_and_survives_a_resumed_run(tmp_path):
    first, other = tmp_path / "first", tmp_path / "other"

    def train(folder, *callbacks, resume=None):
        model = tiny.model(std=0.1)
        kwargs = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
        trainer(model, folder, samples(8), callbacks, **kwargs).train(resume_from_checkpoint=resume)
        return [parameter.detach() for parameter in model.parameters()]

    by_hand, half = AverageByHand(decay=0.7), str(first / "checkpoint-3")
    found = [train(first, by_hand, TransfusionEMACallback(0.7))]
    stored = load_file(first / "checkpoint-6" / TransfusionEMACallback.FILE_NAME)
    found += [[stored[str(i)] for i in range(len(stored))]]
    found += [train(first, TransfusionEMACallback(0.7), resume=half)]
    # The Trainer does not tell a callback of another folder.
    found += [train(other, TransfusionEMACallback(0.7, resume_from_checkpoint=half), resume=half)]
    for averages in found:
        for average, expected in zip(averages, by_hand.average, strict=True):
            torch.testing.assert_close(average, expected, atol=1e-6, rtol=1e-5)


def test_ema_is_what_is_evaluated_and_the_training_goes_on_with_the_trained_weights(tmp_path):
    dataset = samples(8)

    class Watch(TrainerCallback):
        def __init__(self):
            self.trained = None

        def on_evaluate(self, args, state, control, model=None, **kwargs):
            self.trained = self.trained or [p.detach().clone() for p in model.parameters()]

    evaluated, watch = tiny.model(std=0.1), Watch()
    run = trainer(
        evaluated,
        tmp_path,
        dataset,
        callbacks=[TransfusionEMACallback(decay=0.7), watch],
        eval_dataset=dataset,
        eval_strategy="steps",
        eval_steps=4,
        max_steps=4,
    )
    run.train()
    in_training = next(entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry)
    assert in_training == pytest.approx(run.evaluate()["eval_loss"], rel=1e-6)  # the averaged weights, both times
    plain = tiny.model(std=0.1)
    trainer(plain, tmp_path, dataset, max_steps=4).train()
    for expected, trained in zip(plain.parameters(), watch.trained, strict=True):
        torch.testing.assert_close(trained, expected.detach(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("eval_strategy", ["no", "steps"])  # between steps, or before an evaluation
def test_ema_ends_with_an_interrupted_training(tmp_path, eval_strategy):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    dataset = samples(8)
    kwargs = {"eval_dataset": dataset, "kind": TransfusionTrainer, "eval_strategy": eval_strategy, "eval_steps": 2}
    kwargs["max_steps"] = 3
    run = trainer(tiny.model(), tmp_path, dataset, callbacks=[TransfusionEMACallback(0.7), Interrupt()], **kwargs)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    loss = run.evaluate()["eval_loss"]
    plain = tiny.model()
    with pytest.raises(KeyboardInterrupt):
        trainer(plain, tmp_path, dataset, callbacks=[Interrupt()], **kwargs).train()
    assert loss == pytest.approx(trainer(plain, tmp_path, dataset, **kwargs).evaluate()["eval_loss"], rel=1e-6)


def test_training_in_bfloat16_alone_is_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="are torch.bfloat16, which rounds away most updates; load the model with"):
        trainer(tiny.model().bfloat16(), tmp_path, samples(8), kind=TransfusionTrainer)


def test_ema_refuses_what_it_cannot_do(tmp_path):
    dataset = samples(8)
    kwargs = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer(tiny.model(), tmp_path, dataset, **kwargs).train()
    run = trainer(tiny.model(), tmp_path, dataset, callbacks=[TransfusionEMACallback()], **{**kwargs, "max_steps": 2})
    with pytest.raises(
        ValueError, match=r"checkpoint-1/ema.safetensors does not exist; pass `resume_from_checkpoint`"
    ):
        run.train(resume_from_checkpoint=True)
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    run = trainer(
        tiny.model(), tmp_path, dataset, callbacks=[TransfusionEMACallback()], eval_dataset=dataset, **kwargs, **best
    )
    with pytest.raises(ValueError, match="An average at the end and `load_best_model_at_end` exclude each other"):
        run.train()


def test_ema_refuses_several_evaluation_sets(tmp_path):
    dataset = samples(8)
    kwargs = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": {"a": dataset, "b": dataset}}
    run = trainer(tiny.model(), tmp_path, dataset, callbacks=[TransfusionEMACallback()], **kwargs)
    with pytest.raises(ValueError, match="the second set in `eval_dataset`"):
        run.train()


def test_an_evaluation_at_the_start_sees_the_average_and_leaves_the_weights(tmp_path):
    dataset, seen = samples(8), []
    callback = TransfusionEMACallback(decay=0.5)
    kwargs = {"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True, "max_steps": 3}
    run = trainer(tiny.model(std=0.1), tmp_path, dataset, [callback], eval_dataset=dataset, **kwargs)
    evaluate = run.evaluate

    def noted(*args, **kwargs):
        seen.append(
            all(torch.equal(*pair) for pair in zip(run.model.parameters(), callback._ema.shadow_params, strict=True))
        )
        return evaluate(*args, **kwargs)

    run.evaluate = noted
    run.train()
    assert seen == [True, True]
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("untied", [None, ["image"]])
def test_what_serves_images_alone_has_a_learning_rate_of_its_own(tmp_path, untied):
    moved = {}
    for rate in (None, 0.1, 0.3):
        model = tiny.model(std=0.1, untied_modalities=untied)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        args = TrainingArguments(
            str(tmp_path), max_steps=1, learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", use_cpu=True,
            max_grad_norm=0.0, weight_decay=0.5, report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        run = TransfusionTrainer(
            model, args, train_dataset=samples(8), data_collator=collate, image_learning_rate=rate
        )
        run.train()
        moved[rate] = {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}
        groups = run.optimizer.param_groups
        assert len({id(p) for group in groups for p in group["params"]}) == len(before)
    names = [name for name in moved[None] if "patch_encoder" in name or "patch_decoder" in name or ".image." in name]
    assert any(".image." in name for name in names) == (untied is not None) and len(names) < len(moved[None])
    for name, change in moved[None].items():
        torch.testing.assert_close(moved[0.1][name], change)
        torch.testing.assert_close(moved[0.3][name], (3 if name in names else 1) * change, atol=1e-6, rtol=1e-5)


def test_where_images_alone_are_trained_their_rate_is_logged(tmp_path):
    model = tiny.model()
    set_trainable(model, "image_parts")
    args = TrainingArguments(
        str(tmp_path), max_steps=1, learning_rate=0.1, logging_steps=1, lr_scheduler_type="constant", use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    run = TransfusionTrainer(model, args, train_dataset=samples(8), data_collator=collate, image_learning_rate=0.3)
    run.train()
    assert run.state.log_history[0]["learning_rate"] == 0.3
    assert all(group["params"] for group in run.optimizer.param_groups)


def test_a_learning_rate_of_images_needs_the_optimizer_of_the_trainer(tmp_path):
    model = tiny.model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="`image_learning_rate` is for the Trainer's own optimizer"):
        args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
        TransfusionTrainer(model, args, optimizers=(optimizer, None), image_learning_rate=0.1)


def test_label_smoothing_is_refused_for_it_takes_the_labels_away(tmp_path):
    def with_mask(rows):
        return {**collate(rows), "image_loss_mask": torch.ones(len(rows), dtype=torch.bool)}

    run = trainer(tiny.model(), tmp_path, samples(8), data_collator=with_mask, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="`image_loss_mask` is for training, but no `labels` came"):
        run.train()


def test_a_micro_batch_without_images_counts_as_zero_and_a_batch_without_labels_is_refused():
    """The documented limits of what one count of labels can weigh."""
    model = tiny.model().train()
    part = collate(samples(2))
    text = {"input_ids": torch.tensor([[tiny.BOS, *range(3, 13)]]), "labels": torch.tensor([[-100, *range(3, 13)]])}
    labels = [int((one["labels"][:, 1:] != -100).sum()) for one in (part, text)]
    assert labels[0] == labels[1]
    alone = model(**part).diffusion_loss
    total = sum(model(**one, num_items_in_batch=torch.tensor(sum(labels))).diffusion_loss for one in (part, text))
    torch.testing.assert_close(total, alone / 2)
    part["labels"] = torch.full_like(part["labels"], -100)
    with pytest.raises(ValueError, match="`num_items_in_batch` is 0: the Trainer counts labels"):
        model(**part, num_items_in_batch=torch.tensor(0))
    assert model(**part).diffusion_loss > 0  # without a Trainer there is nothing to weigh


def uneven_samples() -> list[dict]:
    """Rows of 0 to 2 images and 1 to 8 words; one image is clean context."""
    generator, rows = torch.Generator().manual_seed(1), []
    for i, num_images in enumerate([0, 0, 2, 1, 0, 1, 2, 0]):
        ids = [tiny.BOS, *range(5, 6 + i), *IMAGE * num_images, tiny.EOS]
        rows.append(
            {
                "input_ids": ids,
                "latents": torch.randn(num_images, 2, 4, 4, generator=generator),
                "noise_seeds": [10 * i + j for j in range(num_images)],
                "image_loss_mask": [not (i == 2 and j == 0) for j in range(num_images)],
            }
        )
    return rows


def collate_uneven(rows: list[dict]) -> dict:
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    mask = (ids != tiny.PAD).long()
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": make_labels(ids, mask, tiny.BOI, tiny.IMG, tiny.EOI),
    }
    if any(len(row["latents"]) for row in rows):
        batch["latents"] = torch.cat([row["latents"] for row in rows])
        for name in ("noise_seeds", "image_loss_mask"):
            batch[name] = torch.tensor([value for row in rows for value in row[name]])
    return batch


def exact_trainer(model, folder, dataset, **kwargs) -> TransfusionTrainer:
    stock = trainer(model, folder, dataset, data_collator=collate_uneven, eval_dataset=dataset, **kwargs)
    return TransfusionTrainer(
        model,
        stock.args,
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=collate_uneven,
        num_timestep_bands=5,
        peak_flops_per_second=1e12,
    )


def test_the_exact_trainer_does_not_mind_how_a_batch_is_cut(tmp_path):
    """Micro-batches with different numbers of labels and images, some without any."""
    moved, logged = [], []
    for size in (8, 1, 2):
        model = tiny.model(std=0.1)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        run = exact_trainer(
            model, tmp_path, uneven_samples(), logging_steps=1, per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
        )  # fmt: skip
        run.train()
        moved.append({name: parameter.detach() - before[name] for name, parameter in model.named_parameters()})
        logged.append(next(entry for entry in run.state.log_history if "loss" in entry))
    largest = max(float(change.abs().max()) for change in moved[0].values())
    for parts, logs in zip(moved[1:], logged[1:], strict=True):
        for name, change in moved[0].items():
            assert (parts[name] - change).abs().max() <= tiny.ROUNDING * largest, name
        for name in ("loss", "lm_loss", "diffusion_loss"):
            assert logs[name] == pytest.approx(logged[0][name], rel=1e-5)


def test_the_exact_trainer_logs_both_losses_their_bands_and_the_speed(tmp_path):
    model, dataset = tiny.model(std=0.1), uneven_samples()
    batch = collate_uneven(dataset)
    with torch.no_grad():
        expected = model.train()(**batch, num_images_in_batch=5)
    run = exact_trainer(model, tmp_path, dataset, logging_steps=1)
    run.train()
    logs = next(entry for entry in run.state.log_history if "loss" in entry)
    assert logs["lm_loss"] == pytest.approx(float(expected.lm_loss), rel=1e-5)
    assert logs["diffusion_loss"] == pytest.approx(float(expected.image_losses.mean()), rel=1e-5)
    assert logs["loss"] == pytest.approx(logs["lm_loss"] + 5 * logs["diffusion_loss"], rel=1e-5)
    of_band: dict[int, list[float]] = {}
    for t, loss in zip(expected.image_timesteps.tolist(), expected.image_losses.tolist(), strict=True):
        of_band.setdefault(int(t) // 200, []).append(loss)
    bands = {name: value for name, value in logs.items() if name.startswith("diffusion_loss/")}
    assert bands == {
        f"diffusion_loss/t_{200 * band}_{200 * band + 200}": pytest.approx(sum(losses) / len(losses), rel=1e-5)
        for band, losses in of_band.items()
    }
    seconds = batch["attention_mask"].sum().item() / logs["tokens_per_second"]
    assert logs["images_per_second"] * seconds == pytest.approx(6)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    flops = 6 * num_parameters * logs["tokens_per_second"]
    # Without a mask, as packed: padding counts for nothing.
    sums = run._new_sums()
    del batch["attention_mask"]
    sums.add(batch, expected, 1)
    assert sums.means(sums.totals)[1] == (batch["input_ids"] != tiny.PAD).sum()
    assert logs["model_tflops_per_second"] == pytest.approx(flops / 1e12)
    assert logs["mfu"] == pytest.approx(flops / 1e12)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_exact_evaluation_does_not_depend_on_the_size_of_its_batches(tmp_path, batch_size):
    model, dataset = tiny.model(std=0.1), uneven_samples()
    with torch.no_grad():
        expected = model(**collate_uneven(dataset))
    metrics = exact_trainer(model, tmp_path, dataset, per_device_eval_batch_size=batch_size).evaluate()
    assert metrics["eval_lm_loss"] == pytest.approx(float(expected.lm_loss), rel=1e-5)
    assert metrics["eval_diffusion_loss"] == pytest.approx(float(expected.diffusion_loss), rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(float(expected.loss), rel=1e-5)
    assert any(name.startswith("eval_diffusion_loss/t_") for name in metrics)


def test_an_exact_evaluation_takes_batches_without_labels(tmp_path):
    def collate_images(rows):
        batch = collate_uneven(rows)
        return {**batch, "labels": torch.full_like(batch["labels"], -100)}

    run = exact_trainer(tiny.model(std=0.1), tmp_path, uneven_samples(), per_device_eval_batch_size=3)
    run.data_collator = collate_images
    metrics = run.evaluate()
    assert "eval_lm_loss" not in metrics
    assert metrics["eval_loss"] == pytest.approx(5 * metrics["eval_diffusion_loss"])


def test_the_exact_trainer_refuses_what_makes_it_wrong(tmp_path):
    for kwargs, message in (
        ({"accelerator_config": {"dispatch_batches": True}}, "parts images from their texts"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` takes the labels away"),
    ):
        with pytest.raises(ValueError, match=message):
            exact_trainer(tiny.model(), tmp_path, uneven_samples(), **kwargs)


def test_several_gpus_of_one_process_are_refused(tmp_path):
    stock = trainer(tiny.model(), tmp_path, uneven_samples())
    stock.args._n_gpu = 2
    with pytest.raises(ValueError, match=r"One process has 2 GPUs.*parts images from their texts; .*`torchrun`"):
        TransfusionTrainer(tiny.model(), stock.args, train_dataset=uneven_samples())


def test_under_zero_3_the_average_is_refused_and_the_flops_are_counted_by_the_whole():
    model = tiny.model()
    whole = _flops_per_token(model)
    for parameter in model.parameters():  # as DeepSpeed leaves them
        parameter.ds_numel, parameter.data = parameter.numel(), torch.empty(0)
    assert _flops_per_token(model) == whole > 0
    args = SimpleNamespace(load_best_model_at_end=False)
    with pytest.raises(ValueError, match="ZeRO-3 leaves parameters empty; take ZeRO-2 or FSDP2"):
        TransfusionEMACallback().on_train_begin(args, None, None, model=model)


def test_samples_are_drawn_and_read_and_change_nothing(tmp_path):
    fixture = Path(__file__).parent / "fixtures" / "tiny-transfusion"
    processor, weights = AutoProcessor.from_pretrained(fixture), []
    dataset = [
        {**processor(text=["a<image>"], images=[Image.new("RGB", (8, 8), color)], return_labels=True)}
        for color in ("red", "green", "blue", "white")
    ]

    def collate_pictures(rows):
        return {name: torch.cat([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}

    for with_samples in (True, False):
        model = TransfusionForCausalLMAndDiffusion.from_pretrained(fixture)
        run = trainer(
            model, tmp_path / str(with_samples), dataset, data_collator=collate_pictures, max_steps=4,
            per_device_train_batch_size=2, report_to="tensorboard",
        )  # fmt: skip
        if with_samples:
            callback = TransfusionSamplesCallback(
                run, processor, ["a seven", "b"], images=[Image.new("RGB", (8, 8), "red")], interval=2,
                num_inference_steps=2, max_new_tokens=4,
            )  # fmt: skip
            run.add_callback(callback)
        run.train()
        weights.append(model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    folder = tmp_path / "True" / "samples"
    assert sorted(file.name for file in folder.iterdir()) == [
        f"step-{n}.{kind}" for n in (2, 4) for kind in ("png", "txt")
    ]
    assert Image.open(folder / "step-2.png").size == (16, 8)
    (events,) = (tmp_path / "True" / "runs").glob("*/events*")
    seen = EventAccumulator(str(events)).Reload()
    assert set(seen.Tags()["images"]) == {"samples/a seven", "samples/b", "samples/read 0"}
    assert "samples/read 0/text/text_summary" in seen.Tags()["tensors"]
    assert [event.step for event in seen.Images("samples/b")] == [2, 4]


def test_samples_go_to_weights_and_biases():
    """By a stand-in, under the name that transformers' callback has."""
    assert "self._wandb = " in inspect.getsource(integration_utils.WandbCallback)
    stand_in, image = MagicMock(), Image.new("RGB", (2, 2), "red")
    trackers = [SimpleNamespace(_wandb=stand_in), SimpleNamespace(_wandb=None), SimpleNamespace()]
    run = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=trackers))
    callback = TransfusionSamplesCallback(run, None, [])
    callback.log_pictures({"samples/a": (image, "a"), "samples/read 0": (image, "red")}, 3)
    stand_in.log.assert_called_once()
    (logged,) = stand_in.log.call_args.args
    assert set(logged) == {"samples/a", "samples/read 0", "train/global_step"} and logged["train/global_step"] == 3
    assert [made.kwargs for made in stand_in.Image.mock_calls] == [{"caption": "a"}, {"caption": "red"}]


def test_processes_that_would_each_train_alone_are_refused(tmp_path, monkeypatch):
    model, args = tiny.model(), trainer(tiny.model(), tmp_path, samples(2)).args
    monkeypatch.setenv("WORLD_SIZE", "2")  # as `torchrun` sets it, and the Trainer ignores it on a CPU
    with pytest.raises(ValueError, match="2 processes were started, but each would train alone; pass `use_cpu=True`"):
        TransfusionTrainer(model, args, train_dataset=samples(2), data_collator=collate_uneven)


def test_samples_need_an_interval(tmp_path):
    run = trainer(tiny.model(), tmp_path, samples(2))
    with pytest.raises(ValueError, match="`interval` must be at least 1 step; got 0"):
        TransfusionSamplesCallback(run, None, [], interval=0)


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_its_batch(tmp_path):
    model = tiny.model()
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    run = exact_trainer(model, tmp_path, uneven_samples())
    with pytest.raises(NotFiniteError, match=r"The loss is nan after step 0 \(`lm_loss` nan"):
        run.train()
    (file,) = tmp_path.glob("_not-finite-0-0.pt")
    assert sorted(map(tuple, torch.load(file)["input_ids"].tolist())) == sorted(
        map(tuple, collate_uneven(uneven_samples())["input_ids"].tolist())
    )
    dataset = uneven_samples()
    dataset[3]["latents"][0, 0, 0, 0] = torch.nan
    with pytest.raises(
        NotFiniteError, match=r"hold NaN or infinite values.*The batch is saved in .*_not-finite-0-0\.pt"
    ):
        exact_trainer(tiny.model(), tmp_path / "data", dataset).train()
    assert torch.load(tmp_path / "data" / "_not-finite-0-0.pt")["latents"].isnan().sum() == 1


def test_a_checkpoint_of_fsdp_is_pushed_without_what_is_pickled(tmp_path, monkeypatch):
    run = exact_trainer(tiny.model(), tmp_path, uneven_samples())
    run.args.push_to_hub, run.hub_model_id, run.push_in_progress = True, "someone/model", None
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    for name in ("model.safetensors", "config.json", "optimizer.bin", "pytorch_model_fsdp.bin", "scheduler.pt"):
        (folder / name).write_text("")
    uploaded = []

    def upload_folder(self, folder_path, ignore_patterns, **kwargs):
        uploaded.extend(path.name for path in Path(folder_path).iterdir() if path.is_file())
        return MagicMock()

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
    run._push_from_checkpoint(str(folder))
    assert sorted(uploaded) == ["config.json", "model.safetensors"]


def test_a_checkpoint_of_another_model_is_refused_and_that_of_the_same_is_not(tmp_path):
    def run(model):
        return exact_trainer(model, tmp_path, uneven_samples(), max_steps=2, save_strategy="steps", save_steps=1)

    run(tiny.model()).train()
    for other, message in (
        (tiny.model(prediction_type="sample"), "`prediction_type` is 'epsilon' there and 'sample' here"),
        (tiny.model(tiny.text_config(rms_norm_eps=1e-5)), "`text_config.rms_norm_eps` is 1e-06 there and 1e-05 here"),
    ):
        before = [parameter.clone() for parameter in other.parameters()]
        for folder in (True, str(tmp_path / "checkpoint-1")):
            with pytest.raises(ValueError, match=f"checkpoint-. is of another model: .*{message}"):
                run(other).train(resume_from_checkpoint=folder)
        assert all(torch.equal(*pair) for pair in zip(before, other.parameters(), strict=True))
    resumed = run(tiny.model(diffusion_loss_weight=1.0))  # the run's to choose
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.state.global_step == 2


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_the_best_checkpoint_is_kept_named_and_loaded_at_the_end(tmp_path, strategy):
    def run(model, max_steps):
        one = exact_trainer(
            model, tmp_path, uneven_samples(), max_steps=max_steps, eval_strategy="steps", eval_steps=1,
            save_strategy=strategy, save_steps=1, save_total_limit=2, load_best_model_at_end=True,
            metric_for_best_model="loss",
        )  # fmt: skip
        # Step 2 is the best one.
        one.evaluate = lambda *args, **kwargs: {"eval_loss": abs(one.state.global_step - 2)}
        return one

    model = tiny.model(std=0.1)
    trained = run(model, 6)
    trained.train()
    best, last = tmp_path / "checkpoint-2", tmp_path / f"checkpoint-{6 if strategy == 'steps' else 2}"
    for folder in {best, last}:
        assert TrainerState.load_from_json(str(folder / "trainer_state.json")).best_model_checkpoint == str(best)
    assert trained.state.best_model_checkpoint == str(best)
    stored = load_file(best / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in stored.items())
    resumed = tiny.model(std=0.1)
    run(resumed, 8).train(resume_from_checkpoint=True)
    assert best.exists()
    assert all(torch.equal(resumed.state_dict()[name], value) for name, value in stored.items())


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path, max_grad_norm):
    model = tiny.model(std=0.1)
    run = exact_trainer(
        model, tmp_path, uneven_samples(), max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1,
        max_grad_norm=max_grad_norm,
    )  # fmt: skip
    parameter = next(model.parameters())
    parameter.register_hook(lambda grad: grad * (math.inf if run.state.global_step == 2 else 1))
    with pytest.raises(
        NotFiniteError, match=r"The norm of the gradient is (nan|inf) after step 2\..*from the last checkpoi"
    ):
        run.train()
    (last,) = tmp_path.glob("checkpoint-*")
    assert last.name == "checkpoint-2"
    assert all(value.isfinite().all() for value in load_file(last / "model.safetensors").values())
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_model_init_is_refused_where_its_models_would_lack_something(tmp_path):
    args = exact_trainer(tiny.model(), tmp_path, samples(2)).args
    trained = TransfusionTrainer(
        model_init=lambda: tiny.model(), args=args, train_dataset=samples(8), data_collator=collate
    )
    trained.train()
    assert trained.state.global_step == 1
    args.use_liger_kernel = True
    with pytest.raises(ValueError, match="`model_init` makes models that know nothing of Liger"):
        TransfusionTrainer(model_init=lambda: tiny.model(), args=args, train_dataset=samples(8), data_collator=collate)


def test_nothing_keeps_a_deleted_trainer_alive(tmp_path):
    run = exact_trainer(tiny.model(), tmp_path, uneven_samples())
    run.train()
    gone = weakref.ref(run)
    del run
    assert gone() is None


class OwnLoader(TransfusionTrainer):
    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(self.train_dataset, batch_size=2, collate_fn=collate_uneven)


def test_a_loader_of_ones_own_is_taken(tmp_path):
    args = exact_trainer(tiny.model(), tmp_path, samples(2), max_steps=5).args
    run = OwnLoader(tiny.model(), args, train_dataset=uneven_samples())
    run.train()
    assert run.state.global_step == 5


def test_all_checkpoints_are_kept_where_there_is_no_limit(tmp_path):
    kwargs = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "logging_steps": 3}
    exact_trainer(tiny.model(), tmp_path, uneven_samples(), save_total_limit=-1, **kwargs).train()
    assert len(list(tmp_path.glob("checkpoint-*"))) == 3
    # With other bands a resumed run begins its sums anew.
    run = exact_trainer(tiny.model(), tmp_path, uneven_samples(), **kwargs)
    other = TransfusionTrainer(
        run.model, run.args, train_dataset=uneven_samples(), data_collator=collate_uneven, num_timestep_bands=3
    )
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert other.state.global_step == 3


def test_a_search_of_hyperparameters_keeps_images_with_their_texts(tmp_path):
    run = exact_trainer(tiny.model(), tmp_path, uneven_samples())
    run.create_accelerator_and_postprocess()  # as before each trial
    config = run.accelerator.dataloader_config
    assert (config.dispatch_batches, config.data_seed) == (False, run.args.seed)
