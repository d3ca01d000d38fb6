"""
Draws and reads Fashion-MNIST: 60,000 real pictures of 28×28 pixels in ten classes (MIT, from Debian's package
`dataset-fashion-mnist`), judged on its 10,000 test pictures by a classifier that has seen no drawing.

    OMP_NUM_THREADS=2 python examples/fashion_mnist.py --size 1M
    OMP_NUM_THREADS=2 python examples/fashion_mnist.py --size 3M --patch_encoder unet --resume_from_checkpoint true

It takes all arguments of transformers' `TrainingArguments`, and writes `results.json` and `grid.png`.
"""

import gzip
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from common import SmallTrainingArguments, draw, ema_callbacks, plt, read, say_next, with_special_tokens
from package_data import fetch_debian
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import HfArgumentParser, LlamaConfig, set_seed

from transfusion_hf import (
    TransfusionDataCollator,
    TransfusionForCausalLMAndDiffusion,
    TransfusionProcessor,
    TransfusionTrainer,
    new_transfusion,
)
from transfusion_hf.evaluation.fid import frechet_distance
from transfusion_hf.training.checkpoints import resume_from

PACKAGE = ("dataset-fashion-mnist", "0.0~git20200523.55506a9")
CLASSES = (
    "a t-shirt", "trousers", "a pullover", "a dress", "a coat", "a sandal", "a shirt", "a sneaker", "a bag", "a boot",
)  # fmt: skip
SIZES = {"1M": (5, 128, 4), "3M": (6, 192, 4), "10M": (8, 320, 5)}  # layers, hidden size, heads


@dataclass
class Arguments(SmallTrainingArguments):
    output_dir: str | None = None
    learning_rate: float | None = field(default=None, metadata={"help": "Default: 2e-3, and a quarter for a U-Net."})
    warmup_steps: float = 200
    max_steps: int = 4000
    per_device_train_batch_size: int = 64
    save_steps: float = 500
    save_total_limit: int | None = 1
    size: str = field(default="1M", metadata={"help": "Parameters of the transformer: 1M, 3M or 10M."})
    patch_encoder: str = field(default="linear", metadata={"help": "Or 'unet'."})
    ema_decay: float = 0.999
    num_drawings: int = field(default=1000, metadata={"help": "To be judged, as many of each class."})
    num_read: int = field(default=1000, metadata={"help": "Test pictures to be read."})
    num_inference_steps: int = 50
    image_guidance_scale: float = 2.0
    packages: str = field(default="outputs/packages", metadata={"help": "Folder for the package."})

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"`size` must be one of {', '.join(SIZES)}; got {self.size!r}.")
        self.output_dir = self.output_dir or f"outputs/fashion-mnist/{self.size}-{self.patch_encoder}"
        if self.learning_rate is None:  # a U-Net at a high rate does not learn to listen (docs/front_ends.md)
            self.learning_rate = 5e-4 if self.patch_encoder == "unet" else 2e-3
        super().__post_init__()


class FashionMNIST:
    """`{"text", "image", "label"}` of `split`, `"train"` or `"t10k"` (for tests)."""

    def __init__(self, packages: Path, split: str):
        folder = fetch_debian(packages, *PACKAGE) / "usr" / "share" / "datasets" / "fashion-mnist"
        pixels = gzip.decompress((folder / f"{split}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((folder / f"{split}-labels-idx1-ubyte.gz").read_bytes())
        self.pixels = np.frombuffer(bytearray(pixels), np.uint8, offset=16).reshape(-1, 28, 28)  # behind the header
        self.labels = np.frombuffer(bytearray(labels), np.uint8, offset=8)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        label = int(self.labels[index])
        return {"text": CLASSES[label], "image": Image.fromarray(self.pixels[index]), "label": label}


class Classifier(nn.Module):
    """A small CNN; its last hidden layer gives the features of a Fréchet distance, which is not FID."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 49, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, len(CLASSES))

    def forward(self, pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Features `(num_images, 64)` and logits `(num_images, 10)` of `(num_images, 28, 28)` gray values to 255."""
        features = self.body(torch.from_numpy(pixels).float()[:, None] / 255)
        return features, self.head(features)

    @classmethod
    def trained(cls, data: FashionMNIST, file: Path, num_epochs: int = 4) -> "Classifier":
        """Kept in `file`, which is made if it does not exist; one core makes it in some minutes."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = cls()
            if not file.is_file():
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
                batches = [batch for _ in range(num_epochs) for batch in torch.randperm(len(data)).split(128)]
                schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=len(batches))
                for batch in tqdm(batches, desc="classifier"):
                    _, logits = model(data.pixels[batch])
                    optimizer.zero_grad()
                    cross_entropy(logits, torch.from_numpy(data.labels[batch]).long()).backward()
                    optimizer.step()
                    schedule.step()
                file.parent.mkdir(parents=True, exist_ok=True)
                torch.save(model.state_dict(), file)
        model.load_state_dict(torch.load(file))
        return model.eval()

    @torch.no_grad()
    def judged(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features in float64 and classes."""
        parts = [self(pixels[start : start + 500]) for start in range(0, len(pixels), 500)]
        features, logits = (torch.cat(each) for each in zip(*parts, strict=True))
        return features.double().numpy(), logits.argmax(1).numpy()


def build_model(args: Arguments) -> tuple[TransfusionForCausalLMAndDiffusion, TransfusionProcessor]:
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special_tokens = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = trainers.WordLevelTrainer(special_tokens=special_tokens, show_progress=False)
    words.train_from_iterator(CLASSES, trainer)
    num_layers, hidden_size, num_heads = SIZES[args.size]
    decoder = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=-(-hidden_size * 8 // 3 // 64) * 64,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        max_position_embeddings=256,
        initializer_range=0.05,
        tie_word_embeddings=True,
    )
    return new_transfusion(
        with_special_tokens(words, unk_token="<unk>"),
        decoder,
        latent_channels=1,
        sample_size=28,
        patch_size=4,
        patch_encoder=args.patch_encoder,
        prediction_type="v_prediction",
    )


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return features.mean(0), np.cov(features, rowvar=False)


def plot(drawn: list[Image.Image], test: FashionMNIST, captions: list[str], file: Path) -> None:
    """Ten columns of drawings, a class each; below them test pictures with what was read, in red if it is wrong."""
    figure, axes = plt.subplots(8, 10, figsize=(11, 9.6))
    for axis in axes.ravel():
        axis.set(xticks=[], yticks=[])
    for axis, picture in zip(axes[:6].ravel(), drawn, strict=False):
        axis.imshow(picture.convert("L"), cmap="gray_r", vmin=0, vmax=255)
    for axis, title in zip(axes[0], CLASSES, strict=True):
        axis.set_title(title, fontsize=9)
    for i, (axis, text) in enumerate(zip(axes[6:].ravel(), captions, strict=False)):
        axis.imshow(test[i]["image"], cmap="gray_r", vmin=0, vmax=255)
        axis.set_xlabel(text, fontsize=8, color="k" if text == test[i]["text"] else "r")
    figure.savefig(file, dpi=100, bbox_inches="tight")
    plt.close(figure)


def judge(model, processor, args: Arguments, train: FashionMNIST, test: FashionMNIST) -> dict:
    classifier = Classifier.trained(train, Path(args.output_dir).parent / "classifier.pt")
    labels = np.arange(args.num_drawings) % len(CLASSES)
    steps = {"num_inference_steps": args.num_inference_steps, "image_guidance_scale": args.image_guidance_scale}
    drawn = draw(model, processor, [CLASSES[i] for i in labels], generation_mode="image", **steps)
    samples = [test[i] for i in range(args.num_read)]
    captions = [text.strip() for text in read(model, processor, samples, max_new_tokens=8, do_sample=False)]
    plot(drawn, test, captions, Path(args.output_dir) / "grid.png")
    features, found = classifier.judged(np.stack([np.asarray(picture.convert("L")) for picture in drawn]))
    real, classes = classifier.judged(test.pixels)
    some, _ = classifier.judged(train.pixels[: args.num_drawings])
    return {
        "drawn_right": float((found == labels).mean()),
        "frechet_distance": frechet_distance(*moments(features), *moments(real)),
        "read_right": float(np.mean([text == sample["text"] for text, sample in zip(captions, samples, strict=True)])),
        "classifier_accuracy": float((classes == test.labels).mean()),
        "frechet_distance_of_as_many_training_pictures": frechet_distance(*moments(some), *moments(real)),
    }


def main(argv: list[str] | None = None) -> dict:
    (args,) = HfArgumentParser((Arguments,)).parse_args_into_dataclasses(args=argv)
    set_seed(args.seed)
    train, test = (FashionMNIST(Path(args.packages), split) for split in ("train", "t10k"))
    model, processor = build_model(args)
    trainer = TransfusionTrainer(
        model,
        args,
        train_dataset=train,
        data_collator=TransfusionDataCollator(processor, caption_first_probability=0.7),
        processing_class=processor,
        callbacks=ema_callbacks(args.ema_decay),
    )
    seconds = trainer.train(resume_from_checkpoint=resume_from(args)).metrics["train_runtime"]
    trainer.save_model()
    model = model.eval()
    results = {
        "parameters": model.num_parameters(),
        "steps": trainer.state.global_step,
        "seed": args.seed,
        "seconds_since_the_last_start": seconds,
        **judge(model, processor, args, train, test),
    }
    (Path(args.output_dir) / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    say_next(Path(args.output_dir), "transfusion", "draw", args.output_dir, CLASSES[0])
    return results


if __name__ == "__main__":
    main()
