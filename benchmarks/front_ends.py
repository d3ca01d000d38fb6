"""
Front ends against each other, as Table 5 of the paper has them: linear and U-Net, each causal and bidirectional inside
an image. Models of the quickstart's size, real digits, a fixed number of steps, several seeds.

    python benchmarks/front_ends.py [--max_steps 600] [--num_seeds 3] [--output_dir benchmarks/results]

Writes a table of mean and spread, and a picture of it. Results are kept run by run: a second call goes on.
"""

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from sklearn.svm import SVC
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm.auto import tqdm
from transformers import set_seed

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import quickstart

VARIANTS = {
    "linear, causal": {"patch_encoder": "linear", "bidirectional_image_attention": False},
    "linear, bidirectional": {"patch_encoder": "linear", "bidirectional_image_attention": True},
    "U-Net, causal": {"patch_encoder": "unet", "bidirectional_image_attention": False},
    "U-Net, bidirectional": {"patch_encoder": "unet", "bidirectional_image_attention": True},
}
METRICS = {"draw_accuracy": "drawn right", "caption_accuracy": "read right", "frechet_distance": "Fréchet distance"}


class DigitFeatures(torch.nn.Module):
    """A small classifier of real digits; its last hidden layer gives the features of the Fréchet distance."""

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
    return torch.from_numpy(quickstart.features(pictures)).view(-1, 1, 8, 8) / 255


def frechet_distance(features: DigitFeatures, real: list[Image.Image], drawn: list[Image.Image]) -> float:
    metric = FrechetInceptionDistance(feature=features, normalize=True, input_img_size=(1, 8, 8))
    metric.update(as_tensor(real), real=True)
    metric.update(as_tensor(drawn), real=False)
    return float(metric.compute())


def one_run(args, options: dict, seed: int, data, judge: SVC, features: DigitFeatures) -> dict:
    train_set, held_out = data
    set_seed(seed)
    model, processor = quickstart.build_model(quickstart.train_tokenizer(), **options)
    run = argparse.Namespace(max_steps=args.max_steps, learning_rate=args.learning_rate, seed=seed)
    results = quickstart.train(run, model, processor, train_set, held_out, args.output_dir / "front_ends" / "model")
    model.eval()
    start = time.perf_counter()
    drawn = quickstart.draw(model, processor, per_class=30)
    blank = Image.new("L", (8, 8))
    pictures = [picture or blank for _, picture in drawn]
    verdicts = judge.predict(quickstart.features(pictures))
    right = [picture is not None and v == label for (label, picture), v in zip(drawn, verdicts, strict=True)]
    captions = quickstart.read(model, processor, held_out)
    return {
        "draw_accuracy": float(np.mean(right)),
        "caption_accuracy": float(np.mean([c == s["text"] for c, s in zip(captions, held_out, strict=True)])),
        "frechet_distance": frechet_distance(features, [sample["image"] for sample in held_out], pictures),
        "eval_loss": results["eval_loss"],
        "parameters": results["parameters"],
        "train_seconds": results["train_seconds"],
        "generate_seconds": round(time.perf_counter() - start, 1),
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_steps", type=int, default=600)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--num_seeds", type=int, default=3)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmarks"))
    args = parser.parse_args()
    (args.output_dir / "front_ends").mkdir(parents=True, exist_ok=True)
    data = quickstart.load_split()
    train_set, held_out = data
    judge = SVC(gamma="scale").fit(
        quickstart.features([s["image"] for s in train_set]), [s["label"] for s in train_set]
    )
    features = DigitFeatures(train_set)

    runs: dict[str, list[dict]] = {name: [] for name in VARIANTS}
    grid = [(seed, name) for seed in range(args.num_seeds) for name in VARIANTS]  # in turn, as the machine varies
    for seed, name in tqdm(grid, desc="runs"):
        file = args.output_dir / "front_ends" / f"{args.max_steps}-{name.replace(', ', '-')}-{seed}.json"
        if not file.exists():
            file.write_text(json.dumps(one_run(args, VARIANTS[name], seed, data, judge, features), indent=2) + "\n")
        runs[name].append(json.loads(file.read_text()))

    real = frechet_distance(features, [s["image"] for s in held_out], [s["image"] for s in train_set[: len(held_out)]])
    text = (
        f"# Front ends\n\n{datetime.date.today()}, {platform.machine()} CPU, torch {torch.__version__}: "
        f"{args.max_steps} steps on real 8×8 digits, patches of 2, {args.num_seeds} seeds: mean (least–most). 300 "
        f"drawings, 50 DDPM steps, guidance 3; {len(held_out)} held-out digits read. The Fréchet distance is that of "
        "drawings to held-out digits, on the features of a classifier of real digits; that of as many training digits "
        f"is {real:.3f}.\n\n{table(runs)}\n"
    )
    (args.output_dir / "front_ends.md").write_text(text)
    plot(runs, args.output_dir / "front_ends.png")
    print(text)


if __name__ == "__main__":
    main()
