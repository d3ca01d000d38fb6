"""
Compares schedulers on a trained quickstart model: which digits each draws from equal prompts and seeds, and how many
of them a classifier of real digits accepts.

    python benchmarks/schedulers.py outputs/quickstart/model [--per_class 30] [--output_dir benchmarks/results]

Writes a table and a picture with a row for each scheduler and a column for each digit.
"""

import sys
import time
from pathlib import Path

import torch
from ratios import make_parser, setting, write
from tqdm.auto import tqdm
from transformers import AutoModelForMultimodalLM, AutoProcessor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from common import Judge, caption, load_split, plt

SCHEDULERS = {
    "DDPMScheduler": 250,
    "DDIMScheduler": 50,
    "EulerDiscreteScheduler": 50,
    "DPMSolverMultistepScheduler": 20,
    "UniPCMultistepScheduler": 20,
}


def draw(model, processor, labels: list[int], scheduler: str, batch_size: int = 100) -> list[torch.Tensor]:
    images: list[torch.Tensor] = []
    for first in tqdm(range(0, len(labels), batch_size), desc=scheduler, leave=False):
        part = labels[first : first + batch_size]
        output = model.generate(
            **processor(text=[caption(label) for label in part]),
            generation_mode="image",
            scheduler=scheduler,
            num_inference_steps=SCHEDULERS[scheduler],
            generator=[torch.Generator().manual_seed(first + i) for i in range(len(part))],
        )
        images += [image for row in output.images for image in row]
    return images


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("model", type=Path, help="folder of a trained quickstart model")
    parser.add_argument("--per_class", type=int, default=30, help="digits to draw of each class")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)

    model = AutoModelForMultimodalLM.from_pretrained(args.model)
    processor = AutoProcessor.from_pretrained(args.model)
    train_set, held_out = load_split()
    judge = Judge(train_set)
    labels = [label for _ in range(args.per_class) for label in range(10)]
    lines = ["| scheduler | steps | drawn right | share | values outside of ±1 | s |", "|---|---|---|---|---|---|"]
    figure, axes = plt.subplots(len(SCHEDULERS), 10, figsize=(8, 0.8 * len(SCHEDULERS)), squeeze=False)
    for (scheduler, num_steps), row in zip(SCHEDULERS.items(), axes, strict=True):
        start = time.perf_counter()
        images = draw(model, processor, labels, scheduler)
        seconds = time.perf_counter() - start
        outside = (torch.stack(images).abs() > 1.001).float().mean()
        pictures = processor.image_processor.postprocess(images)
        is_right = judge.is_right(pictures, labels)
        lines.append(
            f"| {scheduler} | {num_steps} | {is_right.sum()} of {len(labels)} | {is_right.mean():.3f} | "
            f"{outside:.3f} | {seconds:.1f} |"
        )
        for axis, picture in zip(row, pictures, strict=False):
            axis.imshow(picture.convert("L"), cmap="gray_r", vmin=0, vmax=255)
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(f"{scheduler.removesuffix('Scheduler')}, {num_steps}", rotation=0, ha="right")
    figure.savefig(args.output_dir / "schedulers.png", dpi=100, bbox_inches="tight")
    plt.close(figure)

    text = (
        f"# Schedulers\n\n{setting(args.device)}, `python benchmarks/schedulers.py MODEL --per_class "
        f"{args.per_class}`: digits of the quickstart, guidance 3, equal prompts and seeds; the judge itself is right "
        f"on {judge.accuracy(held_out):.3f} of held-out digits.\n\n" + "\n".join(lines) + "\n"
    )
    write(text, "schedulers", args)


if __name__ == "__main__":
    main()
