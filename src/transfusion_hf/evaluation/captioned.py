"""Captioned pictures, such as COCO's: references for captions, prompts and references for drawings."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.dataset import decoded, hf_datasets, load_rows
from ..processing_transfusion import TransfusionProcessor
from .run import Result, Run, digest, open_picture

KARPATHY = "dataset_coco.json"
PROMPTS = "one caption of each picture, chosen with seed 0"
CAPTION_COLUMNS = ("text", "caption", "captions")
_HELP = (
    f"a folder with Karpathy's `{KARPATHY}` and COCO's pictures in `val2014`, a folder, pattern or Hub dataset with "
    "the columns `image` and `text`, or in Python a sequence of `{'image': ..., 'captions': [...]}`"
)


@dataclass
class CaptionedPictures(Sequence):
    """
    Pictures, each read when it is indexed, and what people wrote about them.

    Args:
        captions (`list[list[str]]`): One or more for each picture.
        pictures (`Callable`): From the index of `captions` to what [`read_picture`] takes.
        identities (`list`): Plain JSON for each picture, such as its file name and size.
        settings (`dict[str, Any]`): Where they come from, for the report.
    """

    captions: list[list[str]]
    pictures: Callable[[int], Any]
    identities: list[Any]
    settings: Result = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: Any) -> Any:
        picture = self.pictures(index)
        path = picture.get("path") if isinstance(picture, dict) else picture
        name = path if isinstance(path, (str, Path)) else f"with the caption {self.captions[index][0]!r}"
        return open_picture(decoded(picture), name)

    @property
    def digest(self) -> str:
        return digest(self.captions, self.identities)

    def sample(self, num_samples: int | None, seed: int = 0) -> "CaptionedPictures":
        """A seeded choice in the original order, or all if there are no more than `num_samples`."""
        if num_samples is None or num_samples >= len(self):
            return self
        if num_samples < 1:
            raise ValueError(f"`num_samples` must be at least 1; got {num_samples}.")
        chosen = sorted(np.random.default_rng(seed).permutation(len(self))[:num_samples].tolist())
        return replace(
            self,
            captions=[self.captions[i] for i in chosen],
            pictures=lambda index: self.pictures(chosen[index]),
            identities=[self.identities[i] for i in chosen],
            settings={
                **self.settings,
                "num_pictures": num_samples,
                "choice": f"{num_samples} of {len(self)} pictures, seed {seed}",
            },
        )

    def prompts(self, seed: int = 0) -> list[str]:
        """A seeded choice of one caption for each picture."""
        rng = np.random.default_rng(seed)
        return [captions[rng.integers(len(captions))] for captions in self.captions]


def draw_prompts(run: Run, prompts: Sequence[str]) -> tuple[list[Path], Result]:
    """Draws each once, in a folder that tasks with the same prompts share. Returns the files and their settings."""
    name = f"drawings-{digest(*prompts)}"
    return run.draw(name, prompts), run.drawn_with(name)


def as_the_model_sees(processor: TransfusionProcessor, pictures: Iterable[Image.Image]) -> Iterator[Image.Image]:
    """Resized and cropped by the model's image processor, in 8 bits again."""
    images = processor.image_processor
    for picture in pictures:
        yield images.postprocess(images(images=[picture], return_tensors="pt")["pixel_values"])[0]


def read_captioned(
    data: Any, task: str, split: str | None = None, coco_split: str = "test", are_read: bool = True
) -> CaptionedPictures:
    """
    Args:
        data (`str`, path or `Sequence`):
            - a folder with Karpathy's `dataset_coco.json` and the pictures in `val2014`
            - what [`load_rows`] reads, with the columns `image` and `text`, `caption` or `captions`: a string or a
              list of strings
            - a sequence of `{"image": what `read_picture` takes, "captions": [str, ...]}`
        task (`str`): For errors.
        split (`str`, *optional*): One of Karpathy's (`"val"`, `"test"` …), or `"val2014"` for all pictures of that
            folder; defaults to `coco_split`. Elsewhere one of `datasets`; defaults to `"train"`.
        are_read (`bool`, defaults to `True`): Whether COCO's pictures must be there, or captions are enough.

    Raises:
        ValueError, OSError: there is no data, or a row without a picture or a caption.
    """
    if data is None:
        raise ValueError(f"The task `{task}` needs `data`: {_HELP}.")
    if not isinstance(data, (str, os.PathLike)):
        found = _read_sequence(data)
        source, is_coco = "pictures passed in Python", False
    else:
        folder = Path(data)
        is_coco = folder.joinpath(KARPATHY).is_file() or folder.joinpath("val2014").is_dir()
        split = split or (coco_split if is_coco else "train")
        found, source = (
            (_read_coco(folder, split, are_read) if is_coco else _read_rows(str(data), task, split)),
            str(data),
        )
    for i, captions in enumerate(found.captions):
        if not captions or not all(isinstance(text, str) and text.strip() for text in captions):
            raise ValueError(f"Picture {i} of `data` ({source}) has an empty caption or none; add one or remove it.")
    if not found:
        raise ValueError(f"`data` ({source}, split {split!r}) of the task `{task}` holds no pictures; pass {_HELP}.")
    found.settings |= {
        "data": source,
        "split": split,
        "is_coco": is_coco,
        "num_pictures": len(found),
        "digest": found.digest,
    }
    return found


def _read_coco(folder: Path, split: str, are_read: bool) -> CaptionedPictures:
    file, pictures = folder / KARPATHY, folder / "val2014"
    for path, source in ((file, "Karpathy's `caption_datasets.zip`"), (pictures, "COCO's `val2014.zip`")):
        if not path.exists() and (are_read or path == file):
            raise FileNotFoundError(f"{path} is not there; unpack {source} into {folder}.")
    try:
        rows = [row for row in json.loads(file.read_text(encoding="utf-8"))["images"] if row["filepath"] == "val2014"]
        rows = [row for row in rows if split in ("val2014", row["split"])]
        names = [row["filename"] for row in rows]
        captions = [[sentence["raw"] for sentence in row["sentences"]] for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is not Karpathy's `{KARPATHY}` ({type(error).__name__}: {error}); unpack it again from "
            "`caption_datasets.zip`."
        ) from error
    if not are_read:
        return CaptionedPictures(captions, lambda i: pictures / names[i], [*names])
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(pictures)}
    if absent := [name for name in names if not sizes.get(name)]:
        raise FileNotFoundError(
            f"{len(absent)} of {len(names)} pictures are not in {pictures} or empty, the first is {absent[0]}; "
            "unpack all of COCO's `val2014.zip` there."
        )
    return CaptionedPictures(captions, lambda i: pictures / names[i], [[name, sizes[name]] for name in names])


def _read_rows(name: str, task: str, split: str) -> CaptionedPictures:
    try:
        rows = load_rows(name, split=split)
    except (OSError, ValueError) as error:
        raise ValueError(f"The task `{task}` cannot read `data` {name!r} ({error}); pass {_HELP}.") from error
    column = next((column for column in CAPTION_COLUMNS if column in rows.column_names), None)
    if column is None or "image" not in rows.column_names:
        raise ValueError(
            f"`data` {name!r} needs the columns `image` and one of {', '.join(CAPTION_COLUMNS)}; it has "
            f"{', '.join(rows.column_names)}."
        )
    if isinstance(rows.features["image"], hf_datasets.Image):
        rows = rows.cast_column("image", hf_datasets.Image(decode=False))
    identities = [_identity(row["image"]) for row in rows.select_columns(["image"])]  # row by row: may be gigabytes
    captions = [_listed(captions) for captions in rows[column]]
    return CaptionedPictures(captions, lambda i: rows[i]["image"], identities)


def _read_sequence(rows: Sequence[Any]) -> CaptionedPictures:
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not {"image", "captions"} <= {*row}:
            got = list(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"Row {i} of `data` must be {{'image': ..., 'captions': [...]}}; got {got}.")
    captions, identities = [_listed(row["captions"]) for row in rows], [_identity(row["image"]) for row in rows]
    return CaptionedPictures(captions, lambda i: rows[i]["image"], identities)


def _listed(captions: Any) -> list[str]:
    return list(captions) if isinstance(captions, (list, tuple)) else [captions]


def _identity(picture: Any) -> Any:
    """A name and a size, or a hash: two pictures with the same one are taken for equal."""
    if isinstance(picture, dict):
        picture = picture.get("bytes") or picture.get("path")
    if isinstance(picture, (str, os.PathLike)):
        return [os.path.basename(picture), os.path.getsize(picture) if os.path.isfile(picture) else None]
    if isinstance(picture, Image.Image):
        picture = f"{picture.mode} {picture.size}".encode() + picture.tobytes()
    return hashlib.sha256(picture).hexdigest()[:16] if isinstance(picture, bytes) else str(picture)[:80]
