"""
Noto's emoji with their names: 64×64 pictures that people know, from the package `emoji-datasource-google` of npm
(code MIT, pictures Apache-2.0). The same emoji in two other hands are for judges: OpenMoji (CC-BY-SA 4.0) and Twemoji
(CC-BY 4.0).

    python examples/emoji_data.py outputs/emoji

writes two folders of pictures with captions, `train` and `held_out`, as `transfusion train --caption_dataset` reads
them. A tenth of the names is held out.
"""

import argparse
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from common import save_pictures
from package_data import fetch_npm
from PIL import Image

PACKAGES = Path("outputs/packages")
NPM = {
    "noto": ("emoji-datasource-google", "16.0.0", "emoji.json", "img/google/64/"),
    "twemoji": ("emoji-datasource-twitter", "16.0.0", "img/twitter/64/"),
    "openmoji": ("openmoji", "17.0.0", "data/openmoji.json", "color/svg/"),
}
# Without flags, symbols, and people, of whom there are hundreds that differ in a detail.
CATEGORIES = (
    "Activities", "Animals & Nature", "Food & Drink", "Objects", "Smileys & Emotion", "Travel & Places",
)  # fmt: skip
# Of captions; each wording may stand in each.
PHRASES = ("{}", "{}", "a {}", "an emoji of a {}", "a picture of a {}", "{category}: {}")


@dataclass(frozen=True)
class Emoji:
    """`wordings` are names of it, the first one in Unicode's words; `codes` its code points, `1F34E`."""

    wordings: tuple[str, ...]
    category: str
    codes: str
    file: str

    @property
    def name(self) -> str:
        return self.wordings[0]


def load_emoji(packages: Path = PACKAGES, categories: tuple[str, ...] = CATEGORIES) -> list[Emoji]:
    """
    The emoji of these categories, in Unicode's order of code points.

    Raises:
        ValueError: an unknown category, a name of two emoji, another version of the package.
        ImportError: the package cannot be had.
    """
    entries = json.loads((fetch_npm(packages, *NPM["noto"]) / "emoji.json").read_text())
    if unknown := {*categories} - {entry["category"] for entry in entries}:
        known = ", ".join(sorted({entry["category"] for entry in entries}))
        raise ValueError(f"`categories` must be some of {known}; got {', '.join(sorted(unknown))}.")
    found = [
        Emoji(tuple(dict.fromkeys(_wordings(entry))), entry["category"], entry["unified"], entry["image"])
        for entry in entries
        if entry["category"] in categories
    ]
    owners: dict[str, Emoji] = {}
    for emoji in found:
        if (other := owners.setdefault(emoji.name, emoji)) is not emoji:
            raise ValueError(f"{emoji.name!r} is the name of two emoji, {other.codes} and {emoji.codes}.")
    return found


def _wordings(entry: dict[str, Any]) -> Iterator[str]:
    yield entry["name"].lower()
    for name in entry["short_names"]:
        yield name.replace("_", " ").replace("-", " ").rstrip("0123456789 ")


def split(emoji: list[Emoji], seed: int = 0) -> tuple[list[Emoji], list[Emoji]]:
    """Those to train on, and a tenth that is held out."""
    order = np.random.default_rng(seed).permutation(len(emoji))
    held_out = {*order[: len(emoji) // 10].tolist()}
    return [one for i, one in enumerate(emoji) if i not in held_out], [emoji[i] for i in sorted(held_out)]


def load_picture(emoji: Emoji, size: int = 32, hand: str = "noto", packages: Path = PACKAGES) -> Image.Image:
    """
    A picture of `size` × `size` pixels on white, in Noto's hand, or as `"twemoji"` or `"openmoji"` have it.

    Raises:
        ValueError: a drawing that cannot be rendered.
        FileNotFoundError: the package lacks this emoji.
    """
    folder = fetch_npm(packages, *NPM[hand])
    if hand == "openmoji":
        # Its file names leave out the variation selector in most places.
        names = (emoji.codes, emoji.codes.replace("-FE0F", ""))
        file = next((f for name in names if (f := folder / "color" / "svg" / f"{name}.svg").is_file()), None)
        if file is None:
            raise FileNotFoundError(f"{folder} has no picture of {emoji.name} ({emoji.codes}).")
        try:
            data = resvg_py.svg_to_bytes(svg_path=str(file), width=64, height=64)
        except ValueError as error:
            raise ValueError(f"{file} cannot be rendered: {error}") from error
        picture = Image.open(io.BytesIO(bytes(data)))
    else:
        picture = Image.open(folder / NPM[hand][-1] / emoji.file)
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture.convert("RGBA"))
    return white.convert("RGB").resize((size, size), Image.Resampling.BOX)


def captioned(emoji: list[Emoji], size: int, packages: Path = PACKAGES) -> list[dict[str, Any]]:
    """`{"text", "image"}` for each wording."""
    return [
        {"text": wording, "image": picture}
        for one in emoji
        for picture in [load_picture(one, size, packages=packages)]
        for wording in one.wordings
    ]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--image_size", type=int, default=32, choices=(16, 32, 64))
    parser.add_argument("--packages", type=Path, default=PACKAGES, help="folder for the packages")
    parser.add_argument("--categories", nargs="+", default=CATEGORIES)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    emoji = load_emoji(args.packages, tuple(args.categories))
    for name, part in zip(("train", "held_out"), split(emoji), strict=True):
        samples = captioned(part, args.image_size, args.packages)
        save_pictures(samples, args.output_dir / name)
        print(f"{args.output_dir / name}: {len(part)} emoji, {len(samples)} captions")


if __name__ == "__main__":
    main()
