"""
Learns real digits, draws them and reads them, on a CPU in minutes.

The 1,797 handwritten digits of scikit-learn and captions in words train a model of about 1M parameters with the stock
`Trainer`. The model is saved, loaded again with the Auto classes, and judged through the public API alone.

    python examples/quickstart.py [--output_dir outputs/quickstart] [--max_steps 1600]

With `--vae FOLDER`, made by `examples/train_vae.py --digits`, the model learns the VAE's latents of enlarged digits.
Model, training, drawing and reading are short functions in `examples/common.py`.
"""

import argparse
import json
from pathlib import Path

from common import (
    WORDS,
    Judge,
    build_model,
    caption,
    draw,
    load_split,
    plot_losses,
    plt,
    read,
    save_pictures,
    say_next,
    share_read,
    train,
    train_tokenizer,
)
from tqdm.auto import tqdm
from transformers import AutoModelForMultimodalLM, AutoProcessor, set_seed


def with_latents(model, processor, samples: list[dict], batch_size: int = 100) -> list[dict]:
    """Replaces images by latents. The VAE is frozen, so encoding once is enough."""
    encoded = []
    for start in tqdm(range(0, len(samples), batch_size), desc="encode"):
        batch = samples[start : start + batch_size]
        pixel_values = processor.image_processor([sample["image"] for sample in batch])["pixel_values"]
        (latents,) = model.encode_images(pixel_values)
        encoded += [{"text": sample["text"], "latents": x} for sample, x in zip(batch, latents, strict=True)]
    return encoded


def plot_grid(drawn, per_class: int, samples, captions, file: Path, columns: int = 10) -> None:
    """Ten rows of drawn digits, one per class; then held-out digits above the last word that the model read."""
    figure, axes = plt.subplots(12, columns, figsize=(columns, 13.5))
    for axis in axes.ravel():
        axis.set_xticks([])
        axis.set_yticks([])
    for label in range(10):
        for axis, picture in zip(axes[label], drawn[label * per_class :][: min(per_class, columns)], strict=False):
            if picture is not None:
                axis.imshow(picture.convert("L"), cmap="gray_r", vmin=0, vmax=255)
        axes[label, 0].set_ylabel(WORDS[label], rotation=0, ha="right", va="center")
    for axis, sample, text in zip(axes[10:].ravel(), samples, captions, strict=False):
        axis.imshow(sample["image"], cmap="gray_r", vmin=0, vmax=255)
        word = (text.split() or ["-"])[-1]
        axis.set_xlabel(word, fontsize=8, color="k" if text == sample["text"] else "r")
    axes[0, columns // 2].set_title("drawn from captions", fontsize=10)
    axes[10, 0].set_ylabel("read", rotation=0, ha="right", va="center")
    figure.savefig(file, dpi=100, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--max_steps", type=int, default=1600)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--vae", type=Path, help="folder of an `AutoencoderKL` that encodes a digit to 8×8 latents")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per_class", type=int, default=30, help="digits to draw of each class")
    args = parser.parse_args()
    folder = args.output_dir / "model"
    args.output_dir.mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)

    train_set, held_out = load_split()
    model, processor = build_model(train_tokenizer(), args.vae)
    save_pictures(held_out, args.output_dir / "held_out")
    sets = [train_set, held_out]
    if args.vae is not None:
        sets = [with_latents(model, processor, samples) for samples in sets]
    training = train(model, processor, *sets, folder, args.max_steps, args.learning_rate, args.seed)
    plot_losses(training.pop("history"), ("loss",), args.output_dir / "losses.png")

    # From here on, only what anybody can do with a checkpoint.
    model = AutoModelForMultimodalLM.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    labels = [label for label in range(10) for _ in range(args.per_class)]
    drawn = draw(model, processor, [caption(label) for label in labels])
    captions = read(model, processor, held_out)
    plot_grid(drawn, args.per_class, held_out, captions, args.output_dir / "grid.png")
    set_seed(0)
    output = model.generate(**processor(text=[caption(3)]))
    (document,) = processor.decode_interleaved(output.sequences, output.images)
    print("\ninterleaved document:", document)

    judge = Judge(train_set)
    results = {
        "draw_accuracy": round(float(judge.is_right(drawn, labels).mean()), 4),
        "caption_accuracy": round(share_read(captions, held_out), 4),
        "judge_accuracy": round(float(judge.accuracy(held_out)), 4),
        "not_drawn": sum(picture is None for picture in drawn),
        **training,
    }
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    for name, value in results.items():
        print(f"{name:18} {value}")
    print(f"pictures in {args.output_dir}")
    say_next(folder, "transfusion", "draw", folder, caption(7))


if __name__ == "__main__":
    main()
