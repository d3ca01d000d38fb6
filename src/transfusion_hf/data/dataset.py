"""Samples from `datasets`: read lazily, shared among workers, resumable, with broken rows skipped and counted."""

import os
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from glob import escape, glob
from itertools import islice
from pathlib import Path
from traceback import walk_tb
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from ..image_processing_transfusion import read_picture

try:
    import datasets as hf_datasets
    from datasets.distributed import split_dataset_by_node
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
except ImportError as error:
    raise ImportError("`transfusion_hf.data.dataset` needs datasets; run `pip install datasets`.") from error

# Counters in shared memory have one place per worker, so that workers never overwrite each other's.
NUM_SLOTS = 256
_Row = dict[str, Any]  # or a sample


_SPLITS = {"train", "training", "test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev"}


def load_rows(name: str, streaming: bool = False, split: str = "train", config: str | None = None) -> Any:
    """
    Reads a dataset by `datasets`, map-style or, with `streaming` and if not of pictures, as a stream.

    Args:
        name (`str`):
            - a folder of pictures, or a pattern such as `'photos/*.png'`: column `image`, and the columns of its
              `metadata.jsonl` or `.csv` (with `file_name`), or else `text` from the `.txt` beside each picture
            - files of data (a pattern): Parquet, JSON, CSV …
            - another folder, or a repository of the Hub
        streaming (`bool`, defaults to `False`), split (`str`, defaults to `"train"`)
        config (`str`, *optional*): Of a repository that has several, such as `"en"`.

    Raises:
        ValueError, FileNotFoundError: nothing matches `name`.
    """
    is_folder = Path(name).is_dir()
    files = sorted(map(str, Path(name).rglob("*")) if is_folder else glob(name, recursive=True))
    data = [file for file in files if Path(file).name not in ImageFolder.METADATA_FILENAMES]
    suffixes = {Path(file).suffix.lower() for file in data or [name]}
    if suffixes & {*ImageFolder.EXTENSIONS} and ".parquet" not in suffixes:
        if not data:
            raise ValueError(f"No file matches {name!r}; pass a folder of pictures, or a pattern in quotes.")
        # `datasets` would take the names of files, too, for those of splits, and brackets for patterns.
        if is_folder and any(path.is_dir() and path.name.lower() in _SPLITS for path in Path(name).iterdir()):
            return _load_pictures(split, {"data_dir": escape(name)})
        pictures = [file for file in data if Path(file).suffix.lower() in ImageFolder.EXTENSIONS]
        folders = {Path(file).parent for file in files} | {Path(file).parent for file in pictures}
        metadata = {str(path) for name in ImageFolder.METADATA_FILENAMES for f in folders for path in f.glob(name)}
        found = [escape(file) for file in (*pictures, *sorted(metadata))]
        return _load_pictures(split, {"data_files": {split: found}}, pictures)
    kwargs: dict[str, Any] = {"split": split, "streaming": streaming}
    if not is_folder and suffixes == {".parquet"}:
        return hf_datasets.load_dataset("parquet", data_files={split: [*map(escape, files)] or [name]}, **kwargs)
    if not is_folder and files:
        kwargs["data_files"] = {split: [escape(os.path.abspath(file)) for file in files]}
        return hf_datasets.load_dataset(os.path.dirname(os.path.abspath(files[0])), **kwargs)
    return hf_datasets.load_dataset(name, config, **kwargs)


def _load_pictures(split: str, where: dict[str, Any], pictures: list[str] | None = None) -> Any:
    rows = hf_datasets.load_dataset("imagefolder", split=split, drop_labels=True, **where)
    if "image" not in rows.column_names:  # metadata may name several pictures a row
        return rows
    paths = [Path(image["path"]) for image in rows.cast_column("image", hf_datasets.Image(decode=False))["image"]]
    if pictures is not None:  # metadata name others too
        wanted = {Path(file).absolute() for file in pictures}
        kept = [i for i, path in enumerate(paths) if path.absolute() in wanted]
        rows, paths = rows.select(kept), [paths[i] for i in kept]
    captions = [path.with_suffix(".txt") for path in paths]
    if rows.column_names == ["image"] and any(file.exists() for file in captions):
        texts = [file.read_text(encoding="utf-8-sig").strip() if file.exists() else None for file in captions]
        rows = rows.add_column("text", texts)
    return rows


class _BrokenRowError(ValueError):
    """The row gives no sample."""


def _read_text(row: _Row, column: str, image_token: str) -> str:
    text = "" if row.get(column) is None else row[column]  # shards may lack a column
    if not isinstance(text, str):
        what = f"`{column}` must hold strings; got {type(text).__name__}, and the columns are {list(row)}"
        remedy = f"choose one of a list by `dataset.map(lambda row: {{{column!r}: row[{column!r}][0]}})`"
        raise ValueError(f"{what}. Name a column of strings, or {remedy}.")
    if not text.strip():
        raise _BrokenRowError(f"`{column}` is empty")
    if image_token in text:
        raise _BrokenRowError(f"`{column}` holds {image_token}, which stands for an image")
    return text


def decoded(value: Any) -> Any:
    """An image column's value for `read_picture`, also one in an archive, or somewhere else that `datasets` reads."""
    row = {"bytes": None, "path": value} if isinstance(value, str) else value
    if isinstance(row, dict) and row.get("bytes") is None and not os.path.isfile(row["path"]):
        return hf_datasets.Image().decode_example(row)
    return row


def _read_image(value: Any, column: str) -> Image.Image:
    if value is None:
        raise _BrokenRowError(f"`{column}` is empty")
    try:
        image = read_picture(decoded(value))
    except Exception as error:
        cause = error.__cause__ or error
        raise _BrokenRowError(f"`{column}` cannot be read: {type(cause).__name__}: {cause}") from error
    if image.mode == "F":
        raise _BrokenRowError(f"`{column}` is of floating-point mode 'F', which has no known range")
    return image


def _text_sample(row: _Row, text_column: str, image_token: str) -> _Row:
    return {"text": _read_text(row, text_column, image_token)}


def _caption_sample(row: _Row, image_column: str, caption_column: str, image_token: str) -> _Row:
    text = _read_text(row, caption_column, image_token)
    return {"text": text, "image": _read_image(row.get(image_column), image_column)}


def _interleaved_sample(row: _Row, texts_column: str, images_column: str, image_token: str) -> _Row:
    texts, images = row[texts_column] or [], row[images_column] or []
    columns = f"`{texts_column}` and `{images_column}`"
    if len(texts) != len(images) or any((t is None) == (i is None) for t, i in zip(texts, images, strict=True)):
        raise _BrokenRowError(f"{columns} must have the same length, and exactly one of them a value at each place")
    if any(image_token in (text or "") for text in texts):
        raise _BrokenRowError(f"`{texts_column}` holds {image_token}, which stands for an image")
    text = "".join(image_token if text is None else text for text in texts)
    if not text.strip():
        raise _BrokenRowError(f"{columns} are empty")
    pictures = [_read_image(image, images_column) for image in images if image is not None]
    return {"text": text, "images": pictures} if pictures else {"text": text}


def _edit_sample(row: _Row, source_column: str, instruction_column: str, target_column: str, image_token: str) -> _Row:
    text = f"{image_token}{_read_text(row, instruction_column, image_token)}{image_token}"
    images = [_read_image(row.get(column), column) for column in (source_column, target_column)]
    return {"text": text, "images": images, "image_loss_mask": [False, True]}


def _latents_sample(row: _Row, text_column: str, latents_column: str, image_token: str) -> _Row:
    latents = [torch.as_tensor(latent, dtype=torch.float32) for latent in row[latents_column] or []]
    given = {name: row[name] for name in ("image_loss_mask", "max_timesteps") if row.get(name) is not None}
    return {"text": row[text_column], "latents": latents, **given}


def _without_decoding(dataset: Any) -> Any:
    """Leaves images as bytes or paths, so that a broken one raises in `_read_image`."""
    if isinstance(dataset, hf_datasets.IterableDataset):
        return dataset if dataset.features is None else dataset.decode(False)
    bare = hf_datasets.Image(decode=False)
    for name, feature in dataset.features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, hf_datasets.Image):
            dataset = dataset.cast_column(name, bare if inner is feature else hf_datasets.List(bare))
    return dataset


def _read_rows(stream: Any) -> Iterator[_Row]:
    """Explains the error of a stream that decodes its images itself, because of a `map` or `filter`."""
    try:
        yield from stream
    except Exception as error:
        decoding = hf_datasets.Image.decode_example.__code__
        if all(frame.f_code is not decoding for frame, _ in walk_tb(error.__traceback__)):
            raise
        raise ValueError(
            "A `map`, `filter` or `rename_column` of `dataset` decoded an image that cannot be read before it could "
            f"be left out ({type(error).__name__}: {error}). Pass the stream without these steps (columns and "
            "`to_sample` are arguments), or let `stream.decode(False)` come first."
        ) from error


class ResumableDataset(IterableDataset):
    """
    A pass through samples that can be interrupted and resumed at exactly the next one. Subclasses are dataclasses that
    define `_first_state()` and `_samples()`, which continues behind `_state` and updates it in place.
    """

    def __post_init__(self) -> None:
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()  # reaches workers that outlive an epoch
        self._state: dict[str, Any] = {}  # of the last pass; empty before the first
        self._loaded: dict[str, Any] = {}  # where the next pass begins

    def set_epoch(self, epoch: int) -> None:
        """With `shuffle`, gives the next pass another order."""
        self._epoch.fill_(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last sample of the last pass; each worker has its own."""
        return deepcopy(self._loaded or self._state or self._first_state())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Makes the next pass continue there, in the epoch of the state."""
        self._loaded = deepcopy(state_dict)

    def __iter__(self) -> Iterator[_Row]:
        # Not a generator, which would set the state only with the first sample.
        self._state, self._loaded = self._loaded or self._first_state(), {}
        return self._samples()


@dataclass(eq=False)
class TransfusionDataset(ResumableDataset):
    r"""
    Samples for `TransfusionDataCollator` from a map-style or streamed dataset of `datasets`. The methods `from_…` take
    column names, the processor's `image_token` and the arguments below. docs/data.md explains shuffling and resuming.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`)
        to_sample (`Callable`): From a row to a sample, see `TransfusionDataCollator`.
        shuffle (`bool`, defaults to `False`), seed (`int`, defaults to 0): In another order for each `set_epoch`.
        buffer_size (`int`, defaults to 1000): A stream is shuffled by shards, then within blocks of so many rows.
        on_error (`str`, defaults to `"skip"`): `"skip"` a broken row, with a warning at a worker's first, second,
            fourth …, or `"raise"`. Its image cannot be read, or its text is empty or contains the image token.
        rows_per_turn (`int`, defaults to 1): Rows of a map-style dataset that a worker takes before the next one's
            turn. `TransfusionTrainer` sets it to batch size times processes: only the last batch is partial.

    Raises:
        ValueError: an unknown column or option, at once; with `on_error="raise"`, a broken row when it is read.
    """

    dataset: "hf_datasets.Dataset | hf_datasets.IterableDataset"
    to_sample: Callable[[_Row], _Row]
    shuffle: bool = False
    seed: int = 0
    buffer_size: int = 1000
    on_error: str = "skip"
    rows_per_turn: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.dataset, (hf_datasets.Dataset, hf_datasets.IterableDataset)):
            got = f"{type(self.dataset).__name__}. If it is a dictionary of splits, pass one of them"
            raise ValueError(f"`dataset` must be a `Dataset` or `IterableDataset`; got {got}.")
        if self.on_error not in ("skip", "raise"):
            raise ValueError(f"`on_error` must be 'skip' or 'raise'; got {self.on_error!r}.")
        for name in ("buffer_size", "rows_per_turn"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1; got {getattr(self, name)}.")
        self.dataset = _without_decoding(self.dataset)
        self._skipped = torch.zeros(NUM_SLOTS, dtype=torch.long).share_memory_()

    @classmethod
    def from_text(cls, dataset: Any, text_column: str = "text", **kwargs: Any) -> Self:
        """A text corpus: `{"text": …}`."""
        return cls._build(dataset, _text_sample, kwargs, text_column=text_column)

    @classmethod
    def from_captions(
        cls, dataset: Any, image_column: str = "image", caption_column: str = "text", **kwargs: Any
    ) -> Self:
        """Images with captions: `{"text": …, "image": PIL.Image}`. The collator decides which comes first (§3)."""
        return cls._build(dataset, _caption_sample, kwargs, image_column=image_column, caption_column=caption_column)

    @classmethod
    def from_interleaved(
        cls, dataset: Any, texts_column: str = "texts", images_column: str = "images", **kwargs: Any
    ) -> Self:
        """
        Documents in the format of OBELICS, two lists of equal length with a value in exactly one at each place:
        `texts=["A cat:", None, "asleep."]`, `images=[None, image, None]`. Texts are joined without separator.
        """
        return cls._build(dataset, _interleaved_sample, kwargs, texts_column=texts_column, images_column=images_column)

    @classmethod
    def from_edits(
        cls,
        dataset: Any,
        source_column: str = "input_image",
        instruction_column: str = "edit_prompt",
        target_column: str = "edited_image",
        **kwargs: Any,
    ) -> Self:
        """
        Source image, instruction, edited image (§4.5), in the columns of InstructPix2Pix: `{"text": "<image>…<image>",
        "images": [source, target], "image_loss_mask": [False, True]}`. The source is clean context.
        """
        columns = {"source_column": source_column, "instruction_column": instruction_column}
        return cls._build(dataset, _edit_sample, kwargs, **columns, target_column=target_column)

    @classmethod
    def from_latents(
        cls, dataset: Any, text_column: str = "text", latents_column: str = "latents", **kwargs: Any
    ) -> Self:
        """Of [`write_latents`]: `{"text": …, "latents": [tensor, …]}`, float32 `(latent_channels, height, width)`."""
        return cls._build(dataset, _latents_sample, kwargs, text_column=text_column, latents_column=latents_column)

    @classmethod
    def _build(cls, dataset: Any, to_sample: Callable[..., _Row], kwargs: dict[str, Any], **columns: str) -> Self:
        image_token = kwargs.pop("image_token", "<image>")
        made = cls(dataset, partial(to_sample, **columns, image_token=image_token), **kwargs)
        # A stream may not declare its columns: look at its first row.
        names = made.dataset.column_names or list(next(_read_rows(made.dataset), {}))
        for argument, column in columns.items():
            if column not in names:
                hint = " Or put captions into `metadata.jsonl` (`file_name`, `text`), or a .txt beside each picture."
                what = f"`{argument}` is {column!r}, but the columns of `dataset` are {names}; name one."
                raise ValueError(what + hint * (names == ["image"]))
        return made

    @property
    def num_skipped(self) -> int:
        """Broken rows skipped so far, in all passes and in the workers of a data loader."""
        return int(self._skipped.sum())

    def __len__(self) -> int:
        """The number of rows, with broken ones; a stream has none."""
        return len(self.dataset)

    def _first_state(self) -> dict[str, Any]:
        return {"epoch": int(self._epoch), "position": 0, "block": None}

    def _samples(self) -> Iterator[_Row]:
        is_stream = isinstance(self.dataset, hf_datasets.IterableDataset)
        for index, row in self._streamed_rows() if is_stream else self._indexed_rows():
            try:
                yield self.to_sample(row)
            except _BrokenRowError as error:
                self._skip(index, row, error)

    def _skip(self, index: int, row: _Row, error: _BrokenRowError) -> None:
        """Counts the row and reports its number (in a stream, the worker's) and its strings, numbers and paths."""
        known = {name: value.get("path") if isinstance(value, dict) else value for name, value in row.items()}
        known = {name: str(value)[:80] for name, value in known.items() if isinstance(value, (int, str)) and value}
        what = f"row {index} of `dataset` {known}: {error}"
        if self.on_error == "raise":
            raise ValueError(f"Broken {what}. Repair it, or pass `on_error='skip'`.") from error
        slot = 0 if (worker := get_worker_info()) is None else worker.id % NUM_SLOTS
        self._skipped[slot] += 1
        if (count := int(self._skipped[slot])).bit_count() == 1:
            warnings.warn(f"Skipped {count} broken rows so far, the last {what}.", stacklevel=2)

    def _indexed_rows(self) -> Iterator[tuple[int, _Row]]:
        state, order = self._state, np.arange(len(self.dataset))
        if self.shuffle:
            order = np.random.default_rng([self.seed, state["epoch"]]).permutation(order)
        if (worker := get_worker_info()) is not None:
            turns = np.arange(len(order)) // self.rows_per_turn
            order = order[turns % worker.num_workers == worker.id]
        for index in map(int, order[state["position"] :]):
            state["position"] += 1
            yield index, self.dataset[index]

    def _streamed_rows(self) -> Iterator[tuple[int, _Row]]:
        """Shuffles block by block; the state holds the stream's at the start of a block. Workers share the shards."""
        state, size = self._state, self.buffer_size if self.shuffle else 1
        seeds = [self.seed, state["epoch"]]
        stream = split_dataset_by_node(self.dataset, rank=0, world_size=1)  # a copy with its own state and epoch
        if self.shuffle:
            stream.set_epoch(int(np.random.default_rng(seeds).integers(1, 2**31)))  # 0 does not shuffle
        if state["block"] is not None:
            stream.load_state_dict(state["block"])
        rows = _read_rows(stream)
        while block := list(islice(rows, size)):
            number, taken = divmod(state["position"], size)
            for i in np.random.default_rng([*seeds, number]).permutation(len(block))[taken:].tolist():
                state["position"] += 1
                if state["position"] % size == 0:
                    state["block"] = stream.state_dict()
                yield number * size + i, block[i]
