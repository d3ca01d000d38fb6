"""
Fine-tunes a Transfusion to edit pictures as told (§4.5, arXiv 2408.11039), on triples of an input image, an
instruction and an output image. The input image is clean context: t = 0, no noise, no diffusion loss. The instruction
is text as any other, and the output image is noised and learned. (The paper took 8,000 triples.)

    python examples/finetune_editing.py

Without `--dataset` the triples are made here, pictures of colored shapes: "make the circle blue", "remove the
squares". Without `--model_name_or_path`, too, a model of about 1.4M parameters with random weights is made for them,
and trained from scratch: 50 minutes on two CPU cores, after which 200 of 200 edits were right (docs/training.md). The
judge is `transfusion_hf.data.shapes.check_scene`, the edits are held out: scenes never trained on, and combinations
of a look (color and kind) and what becomes of it that were never trained on either.

    torchrun --nproc_per_node 8 examples/finetune_editing.py --model_name_or_path MODEL \
        --dataset 'edits/*.parquet' --source_column input_image --instruction_column edit_prompt \
        --target_column edited_image --learning_rate 1e-5 --max_steps 5000 --bf16 --per_device_train_batch_size 16 \
        --output_dir outputs/editing

All arguments of transformers' `TrainingArguments` are taken; `--resume_from_checkpoint true` goes on.
"""

import glob
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from datasets import Dataset, Features, Image, Value, load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForMultimodalLM,
    AutoProcessor,
    HfArgumentParser,
    LlamaConfig,
    PreTrainedTokenizerFast,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from transfusion_hf import (
    TransfusionConfig,
    TransfusionDataCollator,
    TransfusionEMACallback,
    TransfusionForCausalLMAndDiffusion,
    TransfusionProcessor,
    TransfusionTrainer,
)
from transfusion_hf.data.dataset import TransfusionDataset
from transfusion_hf.data.shapes import COLORS, KINDS, Edit, check_scene, draw_scene, sample_edit

# By the first word of their instructions: those of `transfusion_hf.data.shapes` that change a picture in place.
EDITS = {"make": "recolor", "remove": "remove"}
COLUMNS = ("input_image", "edit_prompt", "edited_image")


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A Transfusion with its processor; none: a small one, random, for the shapes."}
    )


@dataclass
class DataArguments:
    dataset: str | None = field(
        default=None, metadata={"help": "Parquet files (a pattern), or a repository of the Hub; none: shapes."}
    )
    source_column: str = field(default=COLUMNS[0], metadata={"help": "The input image."})
    instruction_column: str = COLUMNS[1]
    target_column: str = field(default=COLUMNS[2], metadata={"help": "The output image."})
    streaming: bool = False
    num_train_edits: int = field(default=32_000, metadata={"help": "Of the shapes."})
    num_held_out: int = field(
        default=200, metadata={"help": "Edits to judge by. Of a dataset its first rows, which are not trained on."}
    )
    num_inference_steps: int = field(default=10, metadata={"help": "To draw a held-out edit."})


@dataclass
class EditingTrainingArguments(TrainingArguments):
    """`TrainingArguments` with defaults for the shapes. Large models want a learning rate of about 1e-5."""

    output_dir: str | None = "outputs/editing"
    learning_rate: float = 2e-3
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 100
    max_steps: int = 4000
    per_device_train_batch_size: int = 32
    adam_beta2: float = 0.95
    weight_decay: float = 0.1
    save_strategy: str = "no"
    logging_steps: float = 20
    report_to: str = "none"
    remove_unused_columns: bool = False
    ddp_find_unused_parameters: bool | None = False
    ema_decay: float | None = field(default=None, metadata={"help": "Average the weights, as with 0.999."})


def combination(edit: Edit) -> tuple[str, ...]:
    """The edit, the look that it names, and what becomes of it: `("recolor", "red", "circle", "blue")`."""
    name = EDITS[edit.instruction.split()[0]]
    if name == "remove":
        (group,) = (group for group in edit.source.groups if group not in edit.target.groups)
        return name, group.color, group.kind
    pairs = zip(edit.source.groups, edit.target.groups, strict=True)
    ((old, new),) = ((old, new) for old, new in pairs if old != new)
    return name, old.color, old.kind, new.color


def is_held_out(edit: Edit) -> bool:
    """One combination in six, spread evenly: every color, kind and edit is trained on, but not each with each."""
    places = {word: i for words in (COLORS, KINDS) for i, word in enumerate(words)}
    return sum(places[word] for word in combination(edit)[1:]) % len(COLORS) == 0


def make_edits(seed: int, size: tuple[int, int], held_out: bool) -> Iterator[Edit]:
    """Endless edits of shapes, either those that are held out or the others."""
    rng = np.random.default_rng(seed)
    while True:
        edit = sample_edit(rng, *size)
        if edit.instruction.split()[0] in EDITS and is_held_out(edit) == held_out:
            yield edit


def split_edits(num_train: int, num_held_out: int, size: tuple[int, int], seed: int) -> tuple[list[Edit], list[Edit]]:
    """Edits to train on, and others: combinations never trained on, in scenes never trained on."""
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
    """Rows as those of a data set of edits."""
    rows = {
        COLUMNS[0]: [draw_scene(edit.source) for edit in edits],
        COLUMNS[1]: [edit.instruction for edit in edits],
        COLUMNS[2]: [draw_scene(edit.target) for edit in edits],
    }
    return Dataset.from_dict(rows, Features({COLUMNS[0]: Image(), COLUMNS[1]: Value("string"), COLUMNS[2]: Image()}))


def train_tokenizer(instructions: list[str]) -> PreTrainedTokenizerFast:
    """Words as they stand; it begins every text with `<s>`."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special_tokens = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = trainers.WordLevelTrainer(special_tokens=special_tokens, show_progress=False)
    tokenizer.train_from_iterator(instructions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> tuple[TransfusionForCausalLMAndDiffusion, TransfusionProcessor]:
    """A model of about 1.4M parameters for pictures of 32×32, with random weights, and its processor."""
    vocab_size = len(tokenizer) + 3
    config = TransfusionConfig(
        text_config=LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=6,  # to find a shape, to know its kind, to compare it with the instruction
            num_attention_heads=4,
            max_position_embeddings=256,
            initializer_range=0.06,  # 0.02, the default, is meant for wider models
            tie_word_embeddings=True,
        ),
        latent_channels=3,
        sample_size=32,
        patch_size=4,
        # Most of an edited picture is the input image, to be copied: easy to say of x_0, and what is drawn in few
        # steps stays sharp. By row and column a patch finds its counterpart however long the instruction is.
        prediction_type="sample",
        # What to change can be learned only where the noise hides the answer. √ᾱ is below 0.15 at seven in ten of the
        # t of this schedule over 4,000 steps, at four in ten over 1,000, and at one in ten of the cosine schedule's.
        beta_schedule="linear",
        num_train_timesteps=4000,
        pos_embed_type="sincos",
        diffusion_loss_weight=20.0,
        image_start_token_id=vocab_size - 3,
        image_token_id=vocab_size - 2,
        image_end_token_id=vocab_size - 1,
    )
    model = TransfusionForCausalLMAndDiffusion(config)
    return model, TransfusionProcessor.for_model(model, tokenizer)


def load(name: str, streaming: bool) -> Any:
    files = sorted(glob.glob(name))
    if files:
        return load_dataset("parquet", data_files=files, split="train", streaming=streaming)
    return load_dataset(name, split="train", streaming=streaming)


def draw(model: Any, processor: Any, samples: list[dict], batch_size: int = 50) -> list[Any]:
    """
    What the model makes of input image and instruction, by plain `generate()`: it decides itself to draw (`None` where
    it did not). The sample's own output image is not shown to it.
    """
    max_new_tokens = model.config.num_patches(*model.config.latent_size) + 10  # the image, and a few words
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
    """The share of pictures that show the scene that should result, in all and by kind of edit."""
    is_right = [
        picture is not None and check_scene(picture, edit.target).correct
        for picture, edit in zip(drawn, edits, strict=True)
    ]
    names = [combination(edit)[0] for edit in edits]
    numbers, right = Counter(names), Counter(name for name, r in zip(names, is_right, strict=True) if r)
    return {
        "accuracy": round(float(np.mean(is_right)), 4),
        "by_edit": {name: round(right[name] / number, 4) for name, number in sorted(numbers.items())},
        "not_drawn": sum(picture is None for picture in drawn),
        "is_right": is_right,
    }


def plot_grid(
    samples: list[dict], drawn: list[Any], is_right: list[bool] | None, marker: str, file: Path, rows: int = 8
) -> None:
    """Input image, instruction, result, and the verdict, or without a judge the output image; two side by side."""
    last = "target" if is_right is None else "verdict"
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


def plot_losses(history: list[dict[str, float]], file: Path) -> None:
    figure, axis = plt.subplots(figsize=(6, 4))
    for name in ("lm_loss", "diffusion_loss"):
        entries = [entry for entry in history if "loss" in entry and name in entry]
        axis.semilogy([entry["step"] for entry in entries], [entry[name] for entry in entries], label=name)
    axis.set_xlabel("step")
    axis.set_ylabel("training loss")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(file, dpi=100, bbox_inches="tight")
    plt.close(figure)


def load_model(args: ModelArguments, instructions: list[str]) -> tuple[Any, Any]:
    if args.model_name_or_path is None:
        return build_model(train_tokenizer(instructions))
    model = AutoModelForMultimodalLM.from_pretrained(args.model_name_or_path)
    return model, AutoProcessor.from_pretrained(args.model_name_or_path)


def main(argv: list[str] | None = None) -> TransfusionTrainer:
    parser = HfArgumentParser((ModelArguments, DataArguments, EditingTrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses(args=argv)
    if data_args.dataset is not None and model_args.model_name_or_path is None:
        raise ValueError(
            "`dataset` is given but no `model_name_or_path`: the small model that is made here knows the words of the "
            "shapes alone. Pass a Transfusion, as `examples/train.py` makes one."
        )
    for name in ("num_train_edits", "num_held_out", "num_inference_steps"):
        if getattr(data_args, name) < 1:
            raise ValueError(f"`{name}` must be at least 1; got {getattr(data_args, name)}.")
    set_seed(training_args.seed)
    folder = Path(training_args.output_dir)
    columns = {
        "source_column": data_args.source_column,
        "instruction_column": data_args.instruction_column,
        "target_column": data_args.target_column,
    }
    edits: list[Edit] | None = None
    if data_args.dataset is None:
        size = (32, 32)
        if model_args.model_name_or_path is not None:
            config = AutoConfig.from_pretrained(model_args.model_name_or_path)
            size = tuple(side * config.vae_scale_factor for side in config.latent_size)
        train_edits, edits = split_edits(data_args.num_train_edits, data_args.num_held_out, size, training_args.seed)
        rows, held_out_rows = to_dataset(train_edits), to_dataset(edits)
        columns = dict(zip(columns, COLUMNS, strict=True))
        model, processor = load_model(model_args, [edit.instruction for edit in train_edits])
    else:
        rows = load(data_args.dataset, data_args.streaming)
        if not data_args.streaming and len(rows) <= data_args.num_held_out:
            raise ValueError(
                f"`num_held_out` is {data_args.num_held_out}, but `dataset` has only {len(rows)} rows; hold out fewer."
            )
        rows, held_out_rows = rows.skip(data_args.num_held_out), rows.take(data_args.num_held_out)
        model, processor = load_model(model_args, [])
    kwargs = {**columns, "image_token": processor.image_token}
    train_set = TransfusionDataset.from_edits(rows, **kwargs, shuffle=True, seed=training_args.seed)
    held_out = list(TransfusionDataset.from_edits(held_out_rows, **kwargs))
    if not held_out:
        raise ValueError("`dataset` has no row to hold out that can be read; look at its first rows.")

    trainer = TransfusionTrainer(
        model,
        training_args,
        train_dataset=train_set,
        eval_dataset=held_out,
        data_collator=TransfusionDataCollator(processor, num_train_timesteps=model.config.num_train_timesteps),
        processing_class=processor,
        callbacks=[] if training_args.ema_decay is None else [TransfusionEMACallback(decay=training_args.ema_decay)],
    )
    # No instruction is dropped here, so there is no context without one to guide away from.
    model.generation_config.update(image_guidance_scale=1.0, num_inference_steps=data_args.num_inference_steps)
    resume = training_args.resume_from_checkpoint
    if isinstance(resume, str) and resume.lower() in ("true", "false"):
        resume = resume.lower() == "true" and get_last_checkpoint(training_args.output_dir) is not None
    seconds = trainer.train(resume_from_checkpoint=resume).metrics["train_runtime"]
    eval_loss = trainer.evaluate()["eval_loss"]
    trainer.save_model()

    if training_args.process_index == 0:
        # From here on only what anybody can do with a checkpoint.
        model = AutoModelForMultimodalLM.from_pretrained(folder).eval()
        processor = AutoProcessor.from_pretrained(folder)
        drawn = draw(model, processor, held_out)
        verdicts = {} if edits is None else judge(drawn, edits)
        is_right = verdicts.pop("is_right", None)
        results = {
            **verdicts,
            "eval_loss": eval_loss,
            "num_held_out": len(held_out),
            "image_size": list(held_out[0]["images"][0].size[::-1]),
            "num_inference_steps": data_args.num_inference_steps,
            "train_steps": trainer.state.global_step,
            "train_seconds": round(seconds, 1),
            "parameters": sum(p.numel() for name, p in model.named_parameters() if not name.startswith("vae.")),
        }
        if edits is not None:
            results["num_train_edits"] = len(train_edits)
            results["combinations"] = {
                "trained": len({combination(edit) for edit in train_edits}),
                "held_out": len({combination(edit) for edit in edits}),
            }
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        plot_grid(held_out, drawn, is_right, processor.image_token, folder / "grid.png")
        plot_losses(trainer.state.log_history, folder / "losses.png")
        for name, value in results.items():
            print(f"{name:20} {value}")
        print(f"pictures in {folder}")
    return trainer


if __name__ == "__main__":
    main()
