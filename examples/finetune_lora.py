"""
Fine-tunes a Transfusion with LoRA (PEFT): low-rank adapters on the decoder's linear layers, and full training of the
two linear layers between images and decoder. It trains both losses and both directions, and saves the adapter only.

    make demo
    python examples/finetune_lora.py --model_name_or_path outputs/quickstart/model [--merge]

Without `--dataset` it teaches the quickstart's model a new style of captions: "digit: seven" instead of "a handwritten
seven", in minutes on a CPU. It then loads the adapter onto the model again and judges it on held-out digits, by
reading and drawing.

    torchrun --nproc_per_node 8 examples/finetune_lora.py --model_name_or_path MODEL --dataset 'pictures/*.parquet' \
        --caption_column caption --lora_r 16 --lora_alpha 32 --learning_rate 2e-4 --max_steps 5000 --bf16 \
        --activation_checkpointing --per_device_train_batch_size 16 --output_dir outputs/lora

It takes all arguments of transformers' `TrainingArguments`; `--resume_from_checkpoint true` continues a run.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import WORDS, Judge, draw, ema_callbacks, load_split, read, say_next, share_read
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForMultimodalLM, AutoProcessor, HfArgumentParser, TrainingArguments, set_seed

from transfusion_hf import TransfusionDataCollator, TransfusionTrainer
from transfusion_hf.data.dataset import TransfusionDataset, load_rows
from transfusion_hf.training.checkpoints import resume_from

# Trained in full, without LoRA, and saved with the adapter.
PATCH_PARTS = {
    "projections": ["patch_encoder.proj", "patch_decoder.proj"],
    "all": ["patch_encoder", "patch_decoder"],
    "none": None,
}
OLD_STYLE, NEW_STYLE = "a handwritten {}", "digit: {}"
PER_CLASS = 10  # digits to draw of each class


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "A Transfusion from `make demo` or `examples/train.py`."})
    lora_r: int = field(default=4, metadata={"help": "Rank."})
    lora_alpha: int = field(default=8, metadata={"help": "The adapters' output is scaled by lora_alpha / lora_r."})
    lora_dropout: float = 0.0
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Layers of the decoder by name: 'q_proj v_proj'."}
    )
    train_patch_parts: str = field(
        default="projections",
        metadata={
            "help": "What to train of the patch encoder and decoder: 'projections', the linear layers to and from "
            "the decoder; 'all', with the timestep embedding and the whole U-Net (0.27B parameters); or 'none'."
        },
    )
    merge: bool = field(default=False, metadata={"help": "Also save the model with the adapter merged into it."})


@dataclass
class DataArguments:
    dataset: str | None = field(
        default=None,
        metadata={"help": "A folder of pictures, files (a pattern) or a repository of the Hub; default: digits."},
    )
    image_column: str = "image"
    caption_column: str = "text"
    streaming: bool = False
    caption_dropout: float = 0.1
    caption_first_probability: float = field(
        default=0.5, metadata={"help": "Share of the samples that train drawing; the others train reading."}
    )


@dataclass
class LoraTrainingArguments(TrainingArguments):
    """`TrainingArguments` with defaults for the digits. Large models need a learning rate of 1e-4 to 2e-4."""

    output_dir: str | None = "outputs/lora"
    learning_rate: float = 3e-3
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 20
    max_steps: int = 400
    per_device_train_batch_size: int = 32
    adam_beta2: float = 0.95
    save_strategy: str = "no"
    logging_steps: float = 20
    report_to: str = "none"
    remove_unused_columns: bool = False
    ddp_find_unused_parameters: bool | None = False
    ema_decay: float | None = field(default=None, metadata={"help": "Average the adapter, for example with 0.99."})


def add_lora(model: Any, args: ModelArguments) -> PeftModel:
    """Puts LoRA on the decoder, makes the chosen patch parts trainable, and freezes everything else."""
    if args.train_patch_parts not in PATCH_PARTS:
        raise ValueError(
            f"`train_patch_parts` must be one of {', '.join(PATCH_PARTS)}; got {args.train_patch_parts!r}."
        )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules="all-linear" if args.target_modules == ["all-linear"] else args.target_modules,
        # Without this, linear layers of the image parts and of a vision encoder would be targets too.
        exclude_modules=r"(model\.(patch_encoder|patch_decoder|vision_encoder)|vae)\..*",
        modules_to_save=PATCH_PARTS[args.train_patch_parts],
    )
    return get_peft_model(model, config)


def count_parameters(model: PeftModel) -> dict[str, int]:
    """Parameters of the model without adapter and VAE, of the LoRA matrices, and of the trained patch parts."""
    counts = {"parameters": 0, "lora_parameters": 0, "patch_parameters": 0}
    for name, parameter in model.named_parameters():
        kind = "lora_" if ".lora_" in name else "patch_" if ".modules_to_save." in name else ""
        if ".vae." not in name:
            counts[f"{kind}parameters"] += parameter.numel()
    return counts


def in_style(samples: list[dict], style: str) -> list[dict]:
    return [{**sample, "text": style.format(WORDS[sample["label"]])} for sample in samples]


def assess(model: Any, processor: Any, judge: Judge, held_out: list[dict], style: str) -> dict[str, float]:
    """Share of held-out digits that are read in this style, and share of drawings from its captions that are right."""
    captions = read(model, processor, held_out, generation_mode="text", max_new_tokens=32)
    labels = [label for label in range(10) for _ in range(PER_CLASS)]
    drawn = draw(model, processor, [style.format(WORDS[label]) for label in labels])
    return {
        "read_accuracy": round(share_read(captions, in_style(held_out, style)), 4),
        "draw_accuracy": round(float(judge.is_right(drawn, labels).mean()), 4),
    }


def report(model: PeftModel, processor: Any, judge: Judge, held_out: list[dict], results: dict, folder: Path) -> None:
    """Judges with and without the adapter, prints the results and writes them."""
    new = assess(model, processor, judge, held_out, NEW_STYLE)
    with model.disable_adapter():
        old = assess(model, processor, judge, held_out, OLD_STYLE)
    results = {**results, "new style": new, "adapter off, old style": old}
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    for name, value in results.items():
        print(f"{name:24} {value}")


def main(argv: list[str] | None = None) -> TransfusionTrainer:
    parser = HfArgumentParser((ModelArguments, DataArguments, LoraTrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses(args=argv)
    set_seed(training_args.seed)
    folder = Path(training_args.output_dir)
    model = AutoModelForMultimodalLM.from_pretrained(model_args.model_name_or_path)
    processor = AutoProcessor.from_pretrained(model_args.model_name_or_path)
    results: dict[str, Any] = {}
    if data_args.dataset is None:
        digits, held_out = load_split()
        judge, train_set = Judge(digits), in_style(digits, NEW_STYLE)
        for name, style in (("before, new style", NEW_STYLE), ("before, old style", OLD_STYLE)):
            results[name] = assess(model.eval(), processor, judge, held_out, style)
    else:
        train_set = TransfusionDataset.from_captions(
            load_rows(data_args.dataset, data_args.streaming),
            image_column=data_args.image_column,
            caption_column=data_args.caption_column,
            shuffle=True,
            seed=training_args.seed,
            image_token=processor.image_token,
        )

    model = add_lora(model, model_args)
    counts = count_parameters(model)
    share = (counts["lora_parameters"] + counts["patch_parameters"]) / counts["parameters"]
    print(f"trains {share:.2%} of the model's parameters: {counts}")
    trainer = TransfusionTrainer(
        model,
        training_args,
        train_dataset=train_set,
        data_collator=TransfusionDataCollator(
            processor,
            caption_first_probability=data_args.caption_first_probability,
            caption_dropout=data_args.caption_dropout,
            num_train_timesteps=model.config.num_train_timesteps,
        ),
        processing_class=processor,
        callbacks=ema_callbacks(training_args.ema_decay),
    )
    seconds = trainer.train(resume_from_checkpoint=resume_from(training_args)).metrics["train_runtime"]
    trainer.save_model()

    if training_args.process_index == 0:
        # From here on, only what anybody can do with an adapter.
        base = AutoModelForMultimodalLM.from_pretrained(model_args.model_name_or_path)
        model = PeftModel.from_pretrained(base, folder).eval()
        if data_args.dataset is None:
            results |= {"trained_share": round(share, 4), **counts}
            results |= {"train_steps": trainer.state.global_step, "train_seconds": round(seconds, 1)}
            report(model, processor, judge, held_out, results, folder)
        if model_args.merge:
            model.merge_and_unload().save_pretrained(folder / "merged")
            processor.save_pretrained(folder / "merged")
        say_next(
            folder, "transfusion", "draw", folder, NEW_STYLE.format(WORDS[7]) if data_args.dataset is None else "…"
        )
    return trainer


if __name__ == "__main__":
    main()
