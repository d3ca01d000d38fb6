"""
Fine-tunes a Transfusion by LoRA (PEFT): low-rank adapters on the linear layers of the decoder, and beside them the two
linear layers between images and decoder. Both losses, both directions; what is saved is the adapter.

    make demo
    python examples/finetune_lora.py --model_name_or_path outputs/quickstart/model [--merge]

Without `--dataset` it teaches the quickstart's model, in minutes on a CPU, a new style of captions: "digit: seven" in
place of "a handwritten seven". The adapter is then loaded anew onto the model, and judged on held-out digits, reading
and drawing.

    torchrun --nproc_per_node 8 examples/finetune_lora.py --model_name_or_path MODEL --dataset 'pictures/*.parquet' \
        --caption_column caption --lora_r 16 --lora_alpha 32 --learning_rate 2e-4 --max_steps 5000 --bf16 \
        --gradient_checkpointing --per_device_train_batch_size 16 --output_dir outputs/lora

All arguments of transformers' `TrainingArguments` are taken; `--resume_from_checkpoint true` goes on.
"""

import glob
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from transformers import AutoModelForMultimodalLM, AutoProcessor, HfArgumentParser, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from transfusion_hf import TransfusionDataCollator, TransfusionEMACallback, TransfusionTrainer
from transfusion_hf.data.dataset import TransfusionDataset

# Trained as they are, not by LoRA, and saved with the adapter.
PATCH_PARTS = {
    "projections": ["patch_encoder.proj", "patch_decoder.proj"],
    "all": ["patch_encoder", "patch_decoder"],
    "none": None,
}
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OLD_STYLE, NEW_STYLE = "a handwritten {}", "digit: {}"
NUM_TRAIN = 1500


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "A Transfusion, as `make demo` or `examples/train.py` makes."})
    lora_r: int = field(default=4, metadata={"help": "Rank."})
    lora_alpha: int = field(default=8, metadata={"help": "The adapters' output is scaled by lora_alpha / lora_r."})
    lora_dropout: float = 0.0
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Of the decoder, by name, as 'q_proj v_proj'."}
    )
    train_patch_parts: str = field(
        default="projections",
        metadata={
            "help": "Of the patch encoder and decoder: 'projections', their linear layers to and from the decoder; "
            "'all', with the timestep embedding and the whole of a U-Net, 0.27B parameters; or 'none'."
        },
    )
    merge: bool = field(default=False, metadata={"help": "Also save the model with the adapter merged into it."})


@dataclass
class DataArguments:
    dataset: str | None = field(
        default=None, metadata={"help": "Parquet files (a pattern), or a repository of the Hub; none: digits."}
    )
    image_column: str = "image"
    caption_column: str = "text"
    streaming: bool = False
    caption_dropout: float = 0.1
    caption_first_probability: float = field(default=0.5, metadata={"help": "Draws so often; otherwise reads."})


@dataclass
class LoraTrainingArguments(TrainingArguments):
    """`TrainingArguments` with defaults for the digits. Large models want a learning rate of 1e-4 or 2e-4."""

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
    ema_decay: float | None = field(default=None, metadata={"help": "Average the adapter, as with 0.99."})


def add_lora(model: Any, args: ModelArguments) -> PeftModel:
    """LoRA on the decoder, patch parts beside it; everything else is frozen."""
    if args.train_patch_parts not in PATCH_PARTS:
        raise ValueError(
            f"`train_patch_parts` must be one of {', '.join(PATCH_PARTS)}; got {args.train_patch_parts!r}."
        )
    targets = args.target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        # Else linear layers of the image parts would be targets, too.
        exclude_modules=r"(model\.patch_(encoder|decoder)|vae)\..*",
        modules_to_save=PATCH_PARTS[args.train_patch_parts],
    )
    return get_peft_model(model, config)


def count_parameters(model: PeftModel) -> dict[str, int]:
    """Of the model without adapter and VAE, of the LoRA matrices, and of the patch parts that are trained."""
    counts = {"parameters": 0, "lora_parameters": 0, "patch_parameters": 0}
    for name, parameter in model.named_parameters():
        kind = "lora_" if ".lora_" in name else "patch_" if ".modules_to_save." in name else ""
        if ".vae." not in name:
            counts[f"{kind}parameters"] += parameter.numel()
    return counts


def load(name: str, streaming: bool) -> Any:
    files = sorted(glob.glob(name))
    if files:
        return load_dataset("parquet", data_files=files, split="train", streaming=streaming)
    return load_dataset(name, split="train", streaming=streaming)


def load_digit_samples() -> tuple[list[dict], list[dict]]:
    """The quickstart's digits in its order, 1,500 to train and 297 that its model has not seen, in the new style."""
    digits = load_digits()
    samples = [
        {
            "text": NEW_STYLE.format(WORDS[digits.target[i]]),
            "image": Image.fromarray(np.round(digits.images[i] * 255 / 16).astype(np.uint8)),
            "label": int(digits.target[i]),
        }
        for i in np.random.default_rng(0).permutation(len(digits.images))
    ]
    return samples[:NUM_TRAIN], samples[NUM_TRAIN:]


def read(model: Any, processor: Any, samples: list[dict]) -> list[str]:
    """Captions of images, without sampling."""
    inputs = processor(text=[processor.image_token] * len(samples), images=[sample["image"] for sample in samples])
    output = model.generate(**inputs.to(model.device), generation_mode="text", max_new_tokens=32)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def draw(model: Any, processor: Any, style: str, per_class: int) -> list[Image.Image | None]:
    """Images of each digit in turn, by plain `generate()`: the model itself decides to draw (`None`: it did not)."""
    inputs = processor(text=[style.format(word) for word in WORDS for _ in range(per_class)]).to(model.device)
    output = model.generate(**inputs, generator=torch.Generator(model.device).manual_seed(0))
    return [processor.image_processor.postprocess(row[:1])[0] if row else None for row in output.images]


class Judge:
    """Reading and drawing on held-out digits, in a style of captions."""

    def __init__(self, processor: Any, train_set: list[dict], held_out: list[dict], per_class: int = 10):
        self.processor, self.held_out, self.per_class = processor, held_out, per_class
        self.classifier = SVC(gamma="scale").fit(
            self._features([sample["image"] for sample in train_set]), [sample["label"] for sample in train_set]
        )

    @staticmethod
    def _features(pictures: list[Image.Image]) -> np.ndarray:
        small = [picture.convert("L").resize((8, 8), Image.Resampling.BOX) for picture in pictures]
        return np.stack([np.asarray(picture, dtype=np.float32).ravel() for picture in small])

    def __call__(self, model: Any, style: str) -> dict[str, float]:
        captions = read(model, self.processor, self.held_out)
        expected = [style.format(WORDS[sample["label"]]) for sample in self.held_out]
        drawn = draw(model, self.processor, style, self.per_class)
        labels = np.repeat(np.arange(10), self.per_class)
        verdicts = self.classifier.predict(self._features([picture or Image.new("L", (8, 8)) for picture in drawn]))
        is_right = (verdicts == labels) & [picture is not None for picture in drawn]
        return {
            "read_accuracy": round(float(np.mean([a == b for a, b in zip(captions, expected, strict=True)])), 4),
            "draw_accuracy": round(float(np.mean(is_right)), 4),
        }


def main(argv: list[str] | None = None) -> TransfusionTrainer:
    parser = HfArgumentParser((ModelArguments, DataArguments, LoraTrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses(args=argv)
    set_seed(training_args.seed)
    folder = Path(training_args.output_dir)
    model = AutoModelForMultimodalLM.from_pretrained(model_args.model_name_or_path)
    processor = AutoProcessor.from_pretrained(model_args.model_name_or_path)
    judge, results = None, {}
    if data_args.dataset is None:
        train_set, held_out = load_digit_samples()
        judge = Judge(processor, train_set, held_out)
        results["before, new style"] = judge(model.eval(), NEW_STYLE)
        results["before, old style"] = judge(model, OLD_STYLE)
    else:
        train_set = TransfusionDataset.from_captions(
            load(data_args.dataset, data_args.streaming),
            image_column=data_args.image_column,
            caption_column=data_args.caption_column,
            shuffle=True,
            seed=training_args.seed,
            image_token=processor.image_token,
        )

    model = add_lora(model, model_args)
    counts = count_parameters(model)
    num_trained = counts["lora_parameters"] + counts["patch_parameters"]
    print(
        f"trains {num_trained:,} parameters, {num_trained / counts['parameters']:.2%} of the model's "
        f"{counts['parameters']:,}: {counts['lora_parameters']:,} of LoRA, {counts['patch_parameters']:,} of patch "
        "parts"
    )
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
        callbacks=[] if training_args.ema_decay is None else [TransfusionEMACallback(decay=training_args.ema_decay)],
    )
    resume = training_args.resume_from_checkpoint
    if isinstance(resume, str) and resume.lower() in ("true", "false"):
        resume = resume.lower() == "true" and get_last_checkpoint(training_args.output_dir) is not None
    seconds = trainer.train(resume_from_checkpoint=resume).metrics["train_runtime"]
    trainer.save_model()

    if training_args.process_index == 0 and (judge is not None or model_args.merge):
        # From here on only what anybody can do with an adapter.
        base = AutoModelForMultimodalLM.from_pretrained(model_args.model_name_or_path)
        model = PeftModel.from_pretrained(base, folder).eval()
        if judge is not None:
            results["new style"] = judge(model, NEW_STYLE)
            with model.disable_adapter():
                results["adapter off, old style"] = judge(model, OLD_STYLE)
            results |= {"trained_share": round(num_trained / counts["parameters"], 4), **counts}
            results |= {"train_steps": trainer.state.global_step, "train_seconds": round(seconds, 1)}
            (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
            for name, value in results.items():
                print(f"{name:24} {value}")
        if model_args.merge:
            merged = model.merge_and_unload()
            merged.save_pretrained(folder / "merged")
            processor.save_pretrained(folder / "merged")
    return trainer


if __name__ == "__main__":
    main()
