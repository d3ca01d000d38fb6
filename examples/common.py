"""What the examples and benchmarks share: real digits with a small model for them, and the handling of flags."""

import json
import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# How long an OpenMP thread spins before it sleeps. By default two threads spin so long that a step takes 30 times as
# long with one core busy (benchmarks/results/busy.md). torch reads this when it is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm.auto import tqdm
from transformers import LlamaConfig, PreTrainedTokenizerFast, Trainer, TrainingArguments

from transfusion_hf import (
    TransfusionDataCollator,
    TransfusionEMACallback,
    TransfusionForCausalLMAndDiffusion,
    TransfusionProcessor,
    new_transfusion,
)

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUM_TRAIN = 1500


def ema_callbacks(decay: float | None) -> list[TransfusionEMACallback]:
    return [] if decay is None else [TransfusionEMACallback(decay=decay)]


def say_next(folder: Path, *command: Any) -> None:
    """What to do with what a training has saved."""
    print(f"Saved in {folder}. Next:\n    {shlex.join(map(str, command))}")


def caption(label: int) -> str:
    return f"a handwritten {WORDS[label]}"


def load_split() -> tuple[list[dict], list[dict]]:
    """scikit-learn's 1,797 digits of 8×8 pixels in a fixed random order: 1,500 to train on, 297 held out."""
    digits = load_digits()
    pictures = [Image.fromarray(np.round(picture * 255 / 16).astype(np.uint8)) for picture in digits.images]
    samples = [
        {"text": caption(digits.target[i]), "image": pictures[i], "label": int(digits.target[i])}
        for i in np.random.default_rng(0).permutation(len(pictures))
    ]
    return samples[:NUM_TRAIN], samples[NUM_TRAIN:]


def save_pictures(samples: list[dict], folder: Path) -> None:
    """A folder of pictures with their captions, as `datasets` reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, sample in enumerate(samples):
        sample["image"].save(folder / f"{i:06d}.png")
        lines.append(json.dumps({"file_name": f"{i:06d}.png", "text": sample["text"]}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))


def with_special_tokens(tokenizer: Tokenizer, **kwargs: str) -> PreTrainedTokenizerFast:
    """Makes a trained tokenizer, whose first tokens are `<pad>`, `<s>` and `</s>`, begin every text with `<s>`."""
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    kwargs = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", **kwargs}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **kwargs)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of the captions."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([caption(label) for label in range(10)] * 10, trainer)
    return with_special_tokens(tokenizer)


def small_decoder(num_layers: int = 4, dropout: float = 0.0) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.06,  # the default of 0.02 suits wider models
        attention_dropout=dropout,
        tie_word_embeddings=True,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, vae: Path | None = None, **kwargs: Any
) -> tuple[TransfusionForCausalLMAndDiffusion, TransfusionProcessor]:
    """A model of about 1M parameters for the digits, and its processor."""
    # Without a VAE the image is its own latent. Either way there are 8×8 of them.
    kwargs = {"sample_size": 8, "patch_size": 2, **kwargs}
    if vae is None:
        kwargs["latent_channels"] = 1
    else:
        # At high noise an error in ε grows in x_0. Pixels are clipped to [−1, 1] but latents are not, and the errors
        # of so small a model are too large. Predicting v avoids this.
        kwargs.setdefault("prediction_type", "v_prediction")
    return new_transfusion(tokenizer, small_decoder(dropout=0.05), vae, **kwargs)  # 1,500 pictures are few


@dataclass
class SmallTrainingArguments(TrainingArguments):
    """`TrainingArguments` with defaults for small models."""

    learning_rate: float = 2e-3
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 100
    per_device_train_batch_size: int = 32
    adam_beta2: float = 0.95
    weight_decay: float = 0.1
    logging_steps: float = 20
    report_to: str = "none"
    remove_unused_columns: bool = False
    ddp_find_unused_parameters: bool | None = False


@dataclass
class ShapesTrainingArguments(SmallTrainingArguments):
    """The same for shapes."""

    output_dir: str | None = "outputs/shapes"
    max_steps: int = 2000
    save_strategy: str = "no"


def build_shapes_model(
    texts: list[str], patch_size: int = 4, num_train_timesteps: int = 4000
) -> tuple[TransfusionForCausalLMAndDiffusion, TransfusionProcessor]:
    """A new model of about 1.4M parameters for pictures of 32×32, and its processor. Its tokens are whole words."""
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special_tokens = ["<pad>", "<s>", "</s>", "<unk>"]
    words.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special_tokens, show_progress=False))
    tokenizer: PreTrainedTokenizerFast = with_special_tokens(words, unk_token="<unk>")
    return new_transfusion(
        tokenizer,
        small_decoder(num_layers=6),  # to find a shape, recognise its kind, and compare it with the instruction
        latent_channels=3,
        sample_size=32,
        patch_size=patch_size,
        # Most of an edited picture is a copy of the input image. That is easy to predict as x_0, and pictures drawn in
        # few steps stay sharp. With row and column embeddings a patch finds its counterpart at any instruction length.
        prediction_type="sample",
        # The model can learn what to change only where the noise hides the answer: √ᾱ is below 0.15 at 70 % of this
        # schedule's 4,000 timesteps, at 40 % of 1,000, and at 10 % of the cosine schedule's.
        beta_schedule="linear",
        num_train_timesteps=num_train_timesteps,
        pos_embed_type="sincos",
        diffusion_loss_weight=20.0,
    )


def train(
    model: TransfusionForCausalLMAndDiffusion,
    processor: TransfusionProcessor,
    train_set: list[dict],
    eval_set: list[dict],
    folder: Path,
    max_steps: int = 1600,
    learning_rate: float = 2e-3,
    seed: int = 0,
    caption_first_probability: float = 0.65,  # the paper's 0.8 is too little reading for 1,500 pictures
) -> dict:
    """Trains on digits with the stock `Trainer` and saves model and processor to `folder`."""
    arguments = TrainingArguments(
        output_dir=str(folder.parent / "trainer"),
        max_steps=max_steps,
        per_device_train_batch_size=64,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,  # the collator needs texts and images
        seed=seed,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train_set,
        # With the image's place marked, so that every evaluation sees the same sequences.
        eval_dataset=[{**sample, "text": sample["text"] + processor.image_token} for sample in eval_set],
        data_collator=TransfusionDataCollator(processor, caption_first_probability=caption_first_probability),
        callbacks=ema_callbacks(0.995),
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    model.generation_config.update(num_inference_steps=50, image_guidance_scale=3.0, max_new_tokens=24)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return {
        "train_seconds": round(seconds, 1),
        "train_steps": trainer.state.global_step,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "eval_loss": trainer.evaluate()["eval_loss"],
        "history": trainer.state.log_history,
    }


def draw(
    model: Any, processor: Any, captions: list[str], batch_size: int = 100, **kwargs: Any
) -> list[Image.Image | None]:
    """Draws each caption with `generate()`; `None` where the model wrote no `<BOI>`."""
    drawn: list[Image.Image | None] = []
    for start in tqdm(range(0, len(captions), batch_size), desc="draw"):
        inputs = processor(text=captions[start : start + batch_size]).to(model.device)
        generator = torch.Generator(model.device).manual_seed(start)
        output = model.generate(**inputs, generator=generator, **kwargs)
        drawn += [processor.image_processor.postprocess(row[:1])[0] if row else None for row in output.images]
    return drawn


def read(model: Any, processor: Any, samples: list[dict], batch_size: int = 100, **kwargs: Any) -> list[str]:
    """The captions that `generate()` gives the samples' images, without sampling."""
    captions: list[str] = []
    for start in tqdm(range(0, len(samples), batch_size), desc="read"):
        images = [sample["image"] for sample in samples[start : start + batch_size]]
        inputs = processor(text=[processor.image_token] * len(images), images=images).to(model.device)
        output = model.generate(**inputs, **kwargs)
        sequences = getattr(output, "sequences", output)
        captions += processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return captions


class Judge:
    """A classifier of real digits, which tells whether drawn digits are the right ones."""

    def __init__(self, samples: list[dict]):
        pictures, labels = [sample["image"] for sample in samples], [sample["label"] for sample in samples]
        self.classifier = SVC(gamma="scale").fit(self.features(pictures), labels)

    @staticmethod
    def features(pictures: list[Image.Image]) -> np.ndarray:
        """`(num_images, 64)` gray values of 0 to 255, averaged down to 8×8 pixels."""
        small = [picture.convert("L").resize((8, 8), Image.Resampling.BOX) for picture in pictures]
        return np.stack([np.asarray(picture, dtype=np.float32).ravel() for picture in small])

    def is_right(self, pictures: list[Image.Image | None], labels: list[int]) -> np.ndarray:
        """`(num_images,)` booleans; a missing picture is wrong."""
        verdicts = self.classifier.predict(self.features([picture or Image.new("L", (8, 8)) for picture in pictures]))
        return (verdicts == np.array(labels)) & [picture is not None for picture in pictures]

    def accuracy(self, samples: list[dict]) -> float:
        """On real digits, the upper bound for drawn ones."""
        return self.is_right([s["image"] for s in samples], [s["label"] for s in samples]).mean()


def share_read(captions: list[str], samples: list[dict]) -> float:
    return float(np.mean([text == sample["text"] for text, sample in zip(captions, samples, strict=True)]))


def plot_losses(history: list[dict[str, float]], names: tuple[str, ...], file: Path) -> None:
    """Training losses from the Trainer's `log_history`."""
    figure, axis = plt.subplots(figsize=(6, 4))
    for name in names:
        entries = [entry for entry in history if "loss" in entry and name in entry]
        axis.semilogy([entry["step"] for entry in entries], [entry[name] for entry in entries], label=name)
    axis.set_xlabel("step")
    axis.set_ylabel("training loss")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(file, dpi=100, bbox_inches="tight")
    plt.close(figure)
