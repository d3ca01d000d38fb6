"""
Fine-tunes a Transfusion to edit pictures by instruction (§4.5, arXiv 2408.11039), on triples of an input image, an
instruction and an output image. The input image is clean context: t = 0, no noise, no diffusion loss. The instruction
is ordinary text, and the output image is noised and learned. (The paper used 8,000 triples.)

    python examples/finetune_editing.py

Without `--dataset` it makes its own triples from pictures of colored shapes: "make the circle blue", "remove the
squares". Without `--model_name_or_path` it also trains a new model of about 1.4M parameters on them from scratch, in
50 minutes on two CPU cores; 200 of 200 edits were right after that (docs/editing.md). `transfusion_hf.data.shapes.
check_scene` judges edits that are held out: scenes that were never trained on, and combinations of a look (color and
kind) and its change that were never trained on.

    torchrun --nproc_per_node 8 examples/finetune_editing.py --model_name_or_path MODEL \
        --dataset 'edits/*.parquet' --source_column input_image --instruction_column edit_prompt \
        --target_column edited_image --learning_rate 1e-5 --max_steps 5000 --bf16 --per_device_train_batch_size 16 \
        --output_dir outputs/editing

It takes all arguments of transformers' `TrainingArguments`; `--resume_from_checkpoint true` continues a run.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ShapesTrainingArguments, build_shapes_model, ema_callbacks, plot_losses, plt, say_next
from datasets import Dataset, Features, Image, Value
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForMultimodalLM,
    AutoProcessor,
    HfArgumentParser,
    set_seed,
)

from transfusion_hf import (
    TransfusionDataCollator,
    TransfusionTrainer,
)
from transfusion_hf.data.dataset import TransfusionDataset, load_rows
from transfusion_hf.data.shapes import COLORS, KINDS, Edit, check_scene, draw_scene, sample_edit
from transfusion_hf.training.checkpoints import resume_from

# Kinds of edit by the first word of their instructions.
EDITS = {"make": "recolor", "remove": "remove"}
COLUMNS = ("input_image", "edit_prompt", "edited_image")


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A Transfusion with its processor; default: a new small one for the shapes."}
    )


@dataclass
class DataArguments:
    dataset: str | None = field(
        default=None,
        metadata={"help": "A folder of pictures, files (a pattern) or a repository of the Hub; default: shapes."},
    )
    source_column: str = field(default=COLUMNS[0], metadata={"help": "The input image."})
    instruction_column: str = COLUMNS[1]
    target_column: str = field(default=COLUMNS[2], metadata={"help": "The output image."})
    streaming: bool = False
    num_train_edits: int = field(default=32_000, metadata={"help": "Edits of shapes to train on."})
    num_held_out: int = field(
        default=200, metadata={"help": "Edits to judge; with `dataset`, its first rows, which are not trained on."}
    )
    num_inference_steps: int = field(default=10, metadata={"help": "Denoising steps for a held-out edit."})

    def __post_init__(self) -> None:
        for name in ("num_train_edits", "num_held_out", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1; got {getattr(self, name)}.")


@dataclass
class EditingTrainingArguments(ShapesTrainingArguments):
    """Large models need a learning rate of about 1e-5."""

    output_dir: str | None = "outputs/editing"
    max_steps: int = 4000
    ema_decay: float | None = field(default=None, metadata={"help": "Average the weights, for example with 0.999."})


def combination(edit: Edit) -> tuple[str, ...]:
    """The edit, the look it names, and the new color if any: `("recolor", "red", "circle", "blue")`."""
    name = EDITS[edit.instruction.split()[0]]
    if name == "remove":
        (group,) = (group for group in edit.source.groups if group not in edit.target.groups)
        return name, group.color, group.kind
    pairs = zip(edit.source.groups, edit.target.groups, strict=True)
    ((old, new),) = ((old, new) for old, new in pairs if old != new)
    return name, old.color, old.kind, new.color


def is_held_out(edit: Edit) -> bool:
    """One combination in six, spread so that every color, kind and edit is still trained on."""
    places = {word: i for words in (COLORS, KINDS) for i, word in enumerate(words)}
    return sum(places[word] for word in combination(edit)[1:]) % len(COLORS) == 0


def make_edits(seed: int, size: tuple[int, int], held_out: bool) -> Iterator[Edit]:
    """Endless edits of shapes, either held-out ones or the others."""
    rng = np.random.default_rng(seed)
    while True:
        if is_held_out(edit := sample_edit(rng, *size)) == held_out:
            yield edit


def split_edits(num_train: int, num_held_out: int, size: tuple[int, int], seed: int) -> tuple[list[Edit], list[Edit]]:
    """Edits to train on, and held-out ones whose combinations and scenes are not among them."""
    stream = make_edits(2 * seed, size, held_out=False)
    train_set = [next(stream) for _ in tqdm(range(num_train), desc="edits")]
    seen = {edit.source for edit in train_set}
    held_out: list[Edit] = []
    stream = make_edits(2 * seed + 1, size, held_out=True)
    while len(held_out) < num_held_out:
        if (edit := next(stream)).source not in seen:
            held_out.append(edit)
    return train_set, held_out


def to_dataset(edits: list[Edit]) -> Dataset:
    rows = {
        COLUMNS[0]: [draw_scene(edit.source) for edit in edits],
        COLUMNS[1]: [edit.instruction for edit in edits],
        COLUMNS[2]: [draw_scene(edit.target) for edit in edits],
    }
    return Dataset.from_dict(rows, Features({COLUMNS[0]: Image(), COLUMNS[1]: Value("string"), COLUMNS[2]: Image()}))


def load_model(args: ModelArguments, instructions: list[str]) -> tuple[Any, Any]:
    if args.model_name_or_path is None:
        return build_shapes_model(instructions)
    model = AutoModelForMultimodalLM.from_pretrained(args.model_name_or_path, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(args.model_name_or_path)


def load_edits(
    model_args: ModelArguments, args: DataArguments, seed: int
) -> tuple[Any, Any, TransfusionDataset, list[dict], list[Edit] | None]:
    """Model, processor, training set, held-out samples and, of the shapes, the held-out edits themselves."""
    columns, edits = (args.source_column, args.instruction_column, args.target_column), None
    if args.dataset is None:
        size = (32, 32)
        if model_args.model_name_or_path is not None:
            config = AutoConfig.from_pretrained(model_args.model_name_or_path)
            size = tuple(side * config.vae_scale_factor for side in config.latent_size)
        train_edits, edits = split_edits(args.num_train_edits, args.num_held_out, size, seed)
        rows, held_out_rows, columns = to_dataset(train_edits), to_dataset(edits), COLUMNS
        model, processor = load_model(model_args, [edit.instruction for edit in train_edits])
    else:
        if model_args.model_name_or_path is None:
            raise ValueError(
                "`dataset` is given but no `model_name_or_path`: the small model that is made here knows only the "
                "words of the shapes. Pass a Transfusion, for example one from `examples/train.py`."
            )
        rows = load_rows(args.dataset, args.streaming)
        if not args.streaming and len(rows) <= args.num_held_out:
            raise ValueError(
                f"`num_held_out` is {args.num_held_out}, but `dataset` has only {len(rows)} rows; hold out fewer."
            )
        rows, held_out_rows = rows.skip(args.num_held_out), rows.take(args.num_held_out)
        model, processor = load_model(model_args, [])
    names = ("source_column", "instruction_column", "target_column")
    kwargs = {**dict(zip(names, columns, strict=True)), "image_token": processor.image_token}
    train_set = TransfusionDataset.from_edits(rows, **kwargs, shuffle=True, seed=seed)
    held_out = list(TransfusionDataset.from_edits(held_out_rows, **kwargs))
    if not held_out:
        raise ValueError("None of the rows of `dataset` to hold out can be read; look at its first rows.")
    return model, processor, train_set, held_out, edits


def draw(model: Any, processor: Any, samples: list[dict], batch_size: int = 50) -> list[Any]:
    """
    Edits each sample's input image with `generate()`; `None` where the model wrote no `<BOI>`. The sample's output
    image is not shown to the model.
    """
    max_new_tokens = model.config.num_patches(*model.config.latent_size) + 10  # the image and a few words
    drawn: list[Any] = []
    for start in tqdm(range(0, len(samples), batch_size), desc="edit"):
        batch = samples[start : start + batch_size]
        inputs = processor(
            text=[sample["text"].removesuffix(processor.image_token) for sample in batch],
            images=[sample["images"][0] for sample in batch],
        )
        generator = torch.Generator(model.device).manual_seed(start)
        output = model.generate(
            **inputs.to(model.device), max_images=1, max_new_tokens=max_new_tokens, generator=generator
        )
        drawn += [processor.image_processor.postprocess(row[:1])[0] if row else None for row in output.images]
    return drawn


def judge(drawn: list[Any], edits: list[Edit]) -> dict[str, Any]:
    """The share of pictures that show the right scene, over all edits and by kind of edit."""
    pairs = zip(drawn, edits, strict=True)
    is_right = [picture is not None and check_scene(picture, edit.target).correct for picture, edit in pairs]
    names = [combination(edit)[0] for edit in edits]
    right = Counter(name for name, r in zip(names, is_right, strict=True) if r)
    return {
        "accuracy": round(float(np.mean(is_right)), 4),
        "by_edit": {name: round(right[name] / number, 4) for name, number in sorted(Counter(names).items())},
        "not_drawn": sum(picture is None for picture in drawn),
        "is_right": is_right,
    }


def plot_grid(samples: list[dict], drawn: list[Any], is_right: list[bool] | None, marker: str, file: Path) -> None:
    """Two samples per row: input image, instruction, result, and the verdict (without a judge, the output image)."""
    rows, last = min(8, (len(samples) + 1) // 2), "target" if is_right is None else "verdict"
    figure, axes = plt.subplots(rows, 8, figsize=(13, 1.5 * rows), width_ratios=[1, 1.7, 1, 1] * 2, squeeze=False)
    for axis in axes.ravel():
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_frame_on(False)
    for i, (sample, picture) in enumerate(zip(samples[: 2 * rows], drawn, strict=False)):
        source, text, result, verdict = axes[i // 2, 4 * (i % 2) : 4 * (i % 2) + 4]
        source.imshow(sample["images"][0])
        text.text(0.5, 0.5, sample["text"].replace(marker, ""), ha="center", va="center", wrap=True, fontsize=9)
        if picture is not None:
            result.imshow(picture)
        for axis in (source, result):
            axis.set_frame_on(True)
        if is_right is None:
            verdict.imshow(sample["images"][1])
        else:
            word, color = ("right", "g") if is_right[i] else ("wrong", "r")
            verdict.text(0.5, 0.5, word, ha="center", va="center", color=color)
    for column in range(8):
        axes[0, column].set_title(("source", "instruction", "result", last)[column % 4], fontsize=9)
    figure.savefig(file, dpi=100, bbox_inches="tight")
    plt.close(figure)


def report(folder: Path, held_out: list[dict], edits: list[Edit] | None, figures: dict, num_steps: int) -> None:
    """Judges the saved model as anybody could, and writes results and a grid of pictures."""
    model = AutoModelForMultimodalLM.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    drawn = draw(model, processor, held_out)
    verdicts = {} if edits is None else judge(drawn, edits)
    is_right = verdicts.pop("is_right", None)
    results = {
        **verdicts,
        **figures,
        "num_held_out": len(held_out),
        "image_size": list(held_out[0]["images"][0].size[::-1]),
        "num_inference_steps": num_steps,
        "parameters": sum(p.numel() for name, p in model.named_parameters() if not name.startswith("vae.")),
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    plot_grid(held_out, drawn, is_right, processor.image_token, folder / "grid.png")
    for name, value in results.items():
        print(f"{name:20} {value}")
    print(f"pictures in {folder}")


def main(argv: list[str] | None = None) -> TransfusionTrainer:
    parser = HfArgumentParser((ModelArguments, DataArguments, EditingTrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses(args=argv)
    set_seed(training_args.seed)
    folder, num_steps = Path(training_args.output_dir), data_args.num_inference_steps
    model, processor, train_set, held_out, edits = load_edits(model_args, data_args, training_args.seed)
    trainer = TransfusionTrainer(
        model,
        training_args,
        train_dataset=train_set,
        eval_dataset=held_out,
        data_collator=TransfusionDataCollator(processor, num_train_timesteps=model.config.num_train_timesteps),
        processing_class=processor,
        callbacks=ema_callbacks(training_args.ema_decay),
    )
    # The training drops no instructions, so guidance has no context without instruction to steer away from.
    model.generation_config.update(image_guidance_scale=1.0, num_inference_steps=num_steps)
    seconds = trainer.train(resume_from_checkpoint=resume_from(training_args)).metrics["train_runtime"]
    eval_loss = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    if training_args.process_index == 0:
        figures = {
            "eval_loss": eval_loss,
            "train_steps": trainer.state.global_step,
            "train_seconds": round(seconds, 1),
            "num_train_edits": None if edits is None else data_args.num_train_edits,
        }
        report(folder, held_out, edits, figures, num_steps)
        plot_losses(trainer.state.log_history, ("lm_loss", "diffusion_loss"), folder / "losses.png")
        instruction = held_out[0]["text"].split(processor.image_token)[1]
        say_next(folder, "transfusion", "edit", folder, "picture.png", instruction)
    return trainer


if __name__ == "__main__":
    main()
