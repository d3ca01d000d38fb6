"""
Compares front ends as in the paper's Table 5: linear and U-Net, each causal and bidirectional inside an image. Models
have the quickstart's size and train on real digits for a fixed number of steps, with several seeds.

    python benchmarks/front_ends.py [--max_steps 600] [--num_seeds 3] [--output_dir benchmarks/results]

Writes a table of means and ranges, and a picture of it. Each run's result is kept, so a second call continues.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from ratios import make_parser, setting, write
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm.auto import tqdm
from transformers import set_seed

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from common import Judge, build_model, caption, draw, load_split, plt, read, share_read, train, train_tokenizer

VARIANTS = {
    "linear, causal": {"patch_encoder": "linear", "bidirectional_image_attention": False},
    "linear, bidirectional": {"patch_encoder": "linear", "bidirectional_image_attention": True},
    "U-Net, causal": {"patch_encoder": "unet", "bidirectional_image_attention": False},
    "U-Net, bidirectional": {"patch_encoder": "unet", "bidirectional_image_attention": True},
}
METRICS = {"draw_accuracy": "drawn right", "caption_accuracy": "read right", "frechet_distance": "Fréchet distance"}


class DigitFeatures(torch.nn.Module):
    """A small classifier of real digits. Its last hidden layer gives the features for the Fréchet distance."""

    num_features = 32

    def __init__(self, samples: list[dict]):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.GELU(),
            torch.nn.Conv2d(16, 32, 3, padding=1, stride=2), torch.nn.GELU(),
            torch.nn.Flatten(), torch.nn.Linear(512, self.num_features), torch.nn.GELU(),
        )  # fmt: skip
        head = torch.nn.Linear(self.num_features, 10)
        pictures = as_tensor([sample["image"] for sample in samples])
        labels = torch.tensor([sample["label"] for sample in samples])
        optimizer = torch.optim.AdamW([*self.parameters(), *head.parameters()], lr=3e-3)
        for _ in range(40):
            for batch in torch.randperm(len(labels)).split(64):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(head(self(pictures[batch])), labels[batch]).backward()
                optimizer.step()
        self.eval().requires_grad_(False)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.body(pictures)


def as_tensor(pictures: list[Image.Image]) -> torch.Tensor:
    """`(num_images, 1, 8, 8)` in [0, 1]."""
    return torch.from_numpy(Judge.features(pictures)).view(-1, 1, 8, 8) / 255


def frechet_distance(features: DigitFeatures, real: list[Image.Image], drawn: list[Image.Image]) -> float:
    metric = FrechetInceptionDistance(feature=features, normalize=True, input_img_size=(1, 8, 8))
    metric.update(as_tensor(real), real=True)
    metric.update(as_tensor(drawn), real=False)
    return float(metric.compute())


def one_run(args: argparse.Namespace, options: dict, seed: int, data, judge: Judge, features: DigitFeatures) -> dict:
    train_set, held_out = data
    set_seed(seed)
    model, processor = build_model(train_tokenizer(), **options)
    folder = args.output_dir / "front_ends" / "model"
    results = train(model, processor, train_set, held_out, folder, args.max_steps, args.learning_rate, seed)
    model.eval()
    start = time.perf_counter()
    labels = [label for label in range(10) for _ in range(30)]
    drawn = draw(model, processor, [caption(label) for label in labels])
    captions = read(model, processor, held_out)
    seconds = round(time.perf_counter() - start, 1)
    pictures = [picture or Image.new("L", (8, 8)) for picture in drawn]
    return {
        "draw_accuracy": float(judge.is_right(drawn, labels).mean()),
        "caption_accuracy": share_read(captions, held_out),
        "frechet_distance": frechet_distance(features, [sample["image"] for sample in held_out], pictures),
        "generate_seconds": seconds,
        **{name: results[name] for name in ("eval_loss", "parameters", "train_seconds")},
    }


def table(runs: dict[str, list[dict]]) -> str:
    lines = [f"| front end | parameters | {' | '.join(METRICS.values())} |", "|---|---|" + "---|" * len(METRICS)]
    for name, results in runs.items():
        cells = []
        for metric in METRICS:
            values = [result[metric] for result in results]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f}–{max(values):.3f})")
        lines.append(f"| {name} | {results[0]['parameters']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(runs: dict[str, list[dict]], file: Path) -> None:
    figure, axes = plt.subplots(1, len(METRICS), figsize=(4 * len(METRICS), 3))
    for axis, (metric, label) in zip(axes, METRICS.items(), strict=True):
        for i, results in enumerate(runs.values()):
            values = [result[metric] for result in results]
            axis.bar(i, statistics.mean(values), color=f"C{i}", alpha=0.5)
            axis.plot([i] * len(values), values, "k.")
        axis.set_xticks(range(len(runs)), [name.replace(", ", "\n") for name in runs], fontsize=8)
        axis.set_title(label)
    figure.savefig(file, dpi=100, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--max_steps", type=int, default=600)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--num_seeds", type=int, default=3)
    args = parser.parse_args()
    (args.output_dir / "front_ends").mkdir(parents=True, exist_ok=True)
    data = train_set, held_out = load_split()
    judge, features = Judge(train_set), DigitFeatures(train_set)

    runs: dict[str, list[dict]] = {name: [] for name in VARIANTS}
    grid = [(seed, name) for seed in range(args.num_seeds) for name in VARIANTS]  # in turn: the machine's speed varies
    for seed, name in tqdm(grid, desc="runs"):
        file = args.output_dir / "front_ends" / f"{args.max_steps}-{name.replace(', ', '-')}-{seed}.json"
        if not file.exists():
            file.write_text(json.dumps(one_run(args, VARIANTS[name], seed, data, judge, features), indent=2) + "\n")
        runs[name].append(json.loads(file.read_text()))

    real = frechet_distance(features, [s["image"] for s in held_out], [s["image"] for s in train_set[: len(held_out)]])
    text = (
        f"# Front ends\n\n{setting(args.device)}: {args.max_steps} steps on real 8×8 digits, patches of 2, "
        f"{args.num_seeds} seeds: mean (least–most). 300 drawings, 50 DDPM steps, guidance 3; {len(held_out)} "
        "held-out digits read. The Fréchet distance is between drawings and held-out digits, on the features of a "
        f"classifier of real digits; between held-out and as many training digits it is {real:.3f}.\n\n{table(runs)}\n"
    )
    write(text, "front_ends", args)
    plot(runs, args.output_dir / "front_ends.png")


if __name__ == "__main__":
    main()
