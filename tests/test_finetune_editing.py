"""`examples/finetune_editing.py`: input image and instruction to output image, on shapes and on rows of one's own."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForMultimodalLM, AutoProcessor

from transfusion_hf import TransfusionTrainer
from transfusion_hf.data.shapes import COLORS, KINDS, draw_scene

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import finetune_editing as editing

TINY = str(Path(__file__).parent / "fixtures" / "tiny-transfusion")
NUM_HELD_OUT = 4


def arguments(folder: Path, *extra: str) -> list[str]:
    return [
        "--output_dir", str(folder), "--num_held_out", str(NUM_HELD_OUT), "--num_inference_steps", "2",
        "--per_device_train_batch_size", "4", "--logging_steps", "1", "--disable_tqdm", "true", "--use_cpu", *extra,
    ]  # fmt: skip


def rows_of_noise(number: int) -> dict[str, list]:
    """Pictures of 8×8, each another, under names of one's own."""
    rows: dict[str, list] = {"before": [], "words": [], "after": []}
    generator = torch.Generator().manual_seed(0)
    for i in range(number):
        for column in ("before", "after"):
            pixels = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8).numpy()
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "png")
            rows[column].append({"bytes": buffer.getvalue(), "path": None})
        rows["words"].append(f"edit {i}")
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    Dataset.from_dict(rows_of_noise(16)).to_parquet(folder / "edits-0.parquet")
    return [
        "--model_name_or_path", TINY, "--dataset", str(folder / "edits-*.parquet"), "--source_column", "before",
        "--instruction_column", "words", "--target_column", "after",
    ]  # fmt: skip


class Recorder(TransfusionTrainer):
    """Keeps what each training step was given, what the patch encoder got, and what came of it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = []
        self.encoded = []
        self.model.model.patch_encoder.register_forward_pre_hook(lambda _, args: self.encoded.append(args[:2]))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self.steps.append((inputs, outputs, *self.encoded[-1]))
        return (loss, outputs) if return_outputs else loss


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run on the shapes: the trainer and its folder."""
    folder = tmp_path_factory.mktemp("run")
    extra = ("--num_train_edits", "24", "--max_steps", "15", "--warmup_steps", "2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(editing, "TransfusionTrainer", Recorder)
        return editing.main(arguments(folder, *extra)), folder


def test_both_losses_fall(run):
    history = [entry for entry in run[0].state.log_history if "loss" in entry]
    assert len(history) == 15
    for name in ("lm_loss", "diffusion_loss"):
        losses = [entry[name] for entry in history]
        assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_the_input_image_stays_clean_and_has_no_loss(run):
    assert len(run[0].steps) == 15
    for inputs, outputs, (stack,), timesteps in run[0].steps:
        number = len(inputs["input_ids"])
        assert inputs["image_loss_mask"].tolist() == [False, True] * number
        torch.testing.assert_close(stack[::2], inputs["pixel_values"][::2], rtol=0, atol=0)
        assert (timesteps[::2] == 0).all()
        assert all(not torch.equal(x, y) for x, y in zip(stack[1::2], inputs["pixel_values"][1::2], strict=True))
        assert len(outputs["image_losses"]) == number
        assert outputs["diffusion_loss"].item() == pytest.approx(outputs["image_losses"].mean().item())
    drawn_timesteps = torch.cat([timesteps[1::2] for *_, timesteps in run[0].steps])
    assert drawn_timesteps.max() > 900  # the noise limit of captions is not for edits


def test_images_come_in_their_order_and_at_their_own_size(run):
    _, edits = editing.split_edits(24, NUM_HELD_OUT, (32, 32), run[0].args.seed)
    batch = run[0].data_collator(run[0].eval_dataset)
    pictures = run[0].processing_class.image_processor.postprocess(batch["pixel_values"])
    tokenizer = run[0].processing_class.tokenizer
    texts = tokenizer.batch_decode(batch["input_ids"])
    for i, edit in enumerate(edits):
        assert pictures[2 * i].tobytes() == draw_scene(edit.source).tobytes()
        assert pictures[2 * i + 1].tobytes() == draw_scene(edit.target).tobytes()
        # As the tokenizer says it: of 24 edits it does not know all words.
        words = tokenizer.decode(tokenizer(edit.instruction, add_special_tokens=False).input_ids)
        assert texts[i].index("<EOI>") < texts[i].index(words) < texts[i].rindex("<BOI>")


def test_results_pictures_and_a_model_that_draws_are_left_behind(run):
    trainer, folder = run
    results = json.loads((folder / "results.json").read_text())
    assert results["image_size"] == [32, 32] and results["train_steps"] == 15 and results["num_held_out"] == 4
    assert results["num_train_edits"] == 24 and 1.2e6 < results["parameters"] < 1.6e6
    assert 0 <= results["accuracy"] <= 1 and set(results["by_edit"]) <= {"recolor", "remove"}
    for name in ("grid.png", "losses.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 200
    model, processor = AutoModelForMultimodalLM.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert model.generation_config.image_guidance_scale == 1 and model.generation_config.num_inference_steps == 2
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    inputs = processor(text=["<image>remove the square"], images=[Image.new("RGB", (32, 32), "white")])
    assert model.generate(**inputs, generation_mode="image").images[0][0].shape == (3, 32, 32)


def test_an_edit_is_drawn_from_input_image_and_instruction_alone(run, monkeypatch):
    trainer, folder = run
    model, processor = AutoModelForMultimodalLM.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    # So little trained a model may not say <BOI> by itself.
    model.generation_config.generation_mode = "image"
    samples = trainer.eval_dataset
    blank = Image.new("RGB", (32, 32), "white")

    def pixels(i: int, image: Image.Image) -> list[bytes]:
        changed = [{**s, "images": [image if j == i else x for j, x in enumerate(s["images"])]} for s in samples]
        return [picture.tobytes() for picture in editing.draw(model, processor, changed)]

    expected = [picture.tobytes() for picture in editing.draw(model, processor, samples)]
    assert pixels(1, blank) == expected
    assert pixels(0, blank) != expected


def test_held_out_are_scenes_and_combinations_that_are_not_trained_on():
    train_set, held_out = editing.split_edits(600, 100, (32, 32), seed=0)
    assert (len(train_set), len(held_out)) == (600, 100)
    assert not {edit.source for edit in train_set} & {edit.source for edit in held_out}
    combinations = [{editing.combination(edit) for edit in edits} for edits in (train_set, held_out)]
    assert not combinations[0] & combinations[1]
    assert {c[0] for c in combinations[1]} == {c[0] for c in combinations[0]} == {"recolor", "remove"}
    # Nothing is held out that does not occur at all, in each of the places of an instruction.
    recolored = [c for c in combinations[0] if c[0] == "recolor"]
    assert {c[1] for c in recolored} == {c[3] for c in recolored} == set(COLORS)
    removed = [c for c in combinations[0] if c[0] == "remove"]
    assert {c[2] for c in removed} == set(KINDS) and {c[1] for c in removed} == set(COLORS)
    assert editing.split_edits(5, 5, (32, 32), seed=0)[0] == train_set[:5]
    assert editing.split_edits(5, 5, (32, 32), seed=1)[0] != train_set[:5]


def test_a_combination_is_what_the_instruction_says():
    _, held_out = editing.split_edits(1, 60, (32, 32), seed=3)
    for edit in held_out:
        name, color, kind, *rest = editing.combination(edit)
        words = edit.instruction.split()
        assert words[0] == {"recolor": "make", "remove": "remove"}[name]
        assert kind in edit.instruction and rest == ([words[-1]] if name == "recolor" else [])
        assert (color, kind) in {(group.color, group.kind) for group in edit.source.groups}
        assert (color, kind) not in {(group.color, group.kind) for group in edit.target.groups}


def test_the_judge_tells_what_was_asked_for_from_what_was_there():
    _, edits = editing.split_edits(1, 40, (32, 32), seed=0)
    right = editing.judge([draw_scene(edit.target) for edit in edits], edits)
    assert right["accuracy"] == 1 and set(right["by_edit"].values()) == {1} and right["not_drawn"] == 0
    assert editing.judge([draw_scene(edit.source) for edit in edits], edits)["accuracy"] == 0
    half = editing.judge([draw_scene(edit.target) if i % 2 else None for i, edit in enumerate(edits)], edits)
    assert half["accuracy"] == 0.5 and half["not_drawn"] == 20
    assert half["is_right"] == [bool(i % 2) for i in range(40)]


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_any_model_learns_from_rows_of_any_columns(tmp_path, data, streaming, monkeypatch):
    monkeypatch.setattr(editing, "TransfusionTrainer", Recorder)
    trainer = editing.main(arguments(tmp_path, *data, "--max_steps", "3", "--streaming", streaming))
    results = json.loads((tmp_path / "results.json").read_text())
    assert "accuracy" not in results and results["num_held_out"] == 4 and results["image_size"] == [8, 8]
    assert results["eval_loss"] > 0 and (tmp_path / "grid.png").exists()
    held_out = trainer.data_collator(trainer.eval_dataset)["pixel_values"]
    assert len(held_out) == 8
    seen = torch.cat([inputs["pixel_values"] for inputs, *_ in trainer.steps])
    assert len(seen) == 24  # 12 rows of two pictures, once
    assert len({image.numpy().tobytes() for image in seen}) == 24
    assert not {image.numpy().tobytes() for image in seen} & {image.numpy().tobytes() for image in held_out}


def test_a_run_goes_on_where_it_was(tmp_path, data):
    flags = (*data, "--max_steps", "6", "--save_strategy", "steps", "--save_steps", "2", "--ema_decay", "0.9")
    flags = (*flags, "--resume_from_checkpoint", "true")
    whole = editing.main(arguments(tmp_path / "whole", *flags))
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "parts" / "checkpoint-4")
    parts = editing.main(arguments(tmp_path / "parts", *flags))
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in parts.model.state_dict().items())
    # It did go on: the steps before are of the other run.
    assert parts.state.log_history[0] == whole.state.log_history[0]
    assert not (tmp_path / "parts" / "checkpoint-2").exists() and (tmp_path / "parts" / "checkpoint-6").exists()


def test_what_does_not_fit_is_refused_before_anything_is_trained(tmp_path, data):
    with pytest.raises(ValueError, match="`dataset` is given but no `model_name_or_path`"):
        editing.main(arguments(tmp_path, *data[2:]))
    with pytest.raises(ValueError, match=r"`target_column` is 'edited', but the columns of `dataset` are"):
        editing.main(arguments(tmp_path, *data, "--target_column", "edited"))
    with pytest.raises(ValueError, match="`num_held_out` must be at least 1; got 0"):
        editing.main([*arguments(tmp_path), "--num_held_out", "0"])
    with pytest.raises(ValueError, match=r"`num_held_out` is 16, but `dataset` has only 16 rows"):
        editing.main([*arguments(tmp_path, *data), "--num_held_out", "16"])
    with pytest.raises(ValueError, match=r"at least 32 pixels; got \(8, 8\)"):
        editing.main([*arguments(tmp_path), "--model_name_or_path", TINY])
    assert not (tmp_path / "results.json").exists()
