"""
Training data from `datasets`: rows to samples for `TransfusionDataCollator`, split over workers, resumable, broken
images left out. All of it lazy: nothing is read before it is asked for.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from traceback import walk_tb
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

try:
    import datasets as hf_datasets
    from datasets.distributed import split_dataset_by_node
except ImportError as error:
    raise ImportError("`transfusion_hf.data.dataset` needs datasets; run `pip install datasets`.") from error

# Counters in shared memory have a place for each worker, so that none overwrites another's.
NUM_SLOTS = 256


class _BrokenRowError(ValueError):
    """A row that gives no sample."""


def images_of(sample: dict[str, Any]) -> list[Any]:
    """The images of a sample, be they in `images`, in `image` or absent."""
    return list(sample.get("images") or [image for image in [sample.get("image")] if image is not None])


def _read_text(row: dict[str, Any], column: str, image_token: str) -> str:
    text = row[column]
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise ValueError(f"`{column}` must hold strings; got {type(text).__name__}. Choose or make such a column.")
    if not text.strip():
        raise _BrokenRowError(f"`{column}` is empty")
    if image_token in text:
        raise _BrokenRowError(f"`{column}` holds {image_token}, which stands for an image")
    return text


def _read_image(value: Any, column: str) -> Any:
    if isinstance(value, (bytes, str)):
        is_path = isinstance(value, str)
        value = {"bytes": None if is_path else value, "path": value if is_path else None}
    try:
        if isinstance(value, Image.Image):
            value.load()
        image = None if value is None else hf_datasets.Image().decode_example(value)
    except Exception as error:  # what PIL raises depends on the format: OSError, SyntaxError, struct.error …
        raise _BrokenRowError(f"`{column}` cannot be read: {type(error).__name__}: {error}") from error
    if image is None:
        raise _BrokenRowError(f"`{column}` is empty")
    if image.mode == "F":
        raise _BrokenRowError(f"`{column}` is of floating-point mode 'F', which has no known range")
    return image


def _text_sample(row: dict[str, Any], text_column: str, image_token: str) -> dict[str, Any]:
    return {"text": _read_text(row, text_column, image_token)}


def _caption_sample(row: dict[str, Any], image_column: str, caption_column: str, image_token: str) -> dict[str, Any]:
    caption = _read_text(row, caption_column, image_token)
    return {"text": caption, "image": _read_image(row[image_column], image_column)}


def _interleaved_sample(
    row: dict[str, Any], texts_column: str, images_column: str, image_token: str
) -> dict[str, Any]:
    texts, images = row[texts_column] or [], row[images_column] or []
    if len(texts) != len(images) or any((t is None) == (i is None) for t, i in zip(texts, images, strict=True)):
        raise _BrokenRowError(
            f"`{texts_column}` and `{images_column}` must be as long as each other, and at each place one of them None"
        )
    if any(image_token in (text or "") for text in texts):
        raise _BrokenRowError(f"`{texts_column}` holds {image_token}, which stands for an image")
    sample: dict[str, Any] = {"text": "".join(image_token if text is None else text for text in texts)}
    if not sample["text"].strip():
        raise _BrokenRowError(f"`{texts_column}` and `{images_column}` are empty")
    if pictures := [_read_image(image, images_column) for image in images if image is not None]:
        sample["images"] = pictures
    return sample


def _edit_sample(
    row: dict[str, Any], source_column: str, instruction_column: str, target_column: str, image_token: str
) -> dict[str, Any]:
    instruction = _read_text(row, instruction_column, image_token)
    return {
        "text": f"{image_token}{instruction}{image_token}",
        "images": [_read_image(row[column], column) for column in (source_column, target_column)],
        "image_loss_mask": [False, True],
    }


def _latents_sample(row: dict[str, Any], text_column: str, latents_column: str) -> dict[str, Any]:
    latents = [torch.as_tensor(latent, dtype=torch.float32) for latent in row[latents_column] or []]
    return {"text": row[text_column], "latents": latents} | {
        name: row[name] for name in ("image_loss_mask", "max_timesteps") if row.get(name) is not None
    }


def _without_decoding(dataset: Any) -> Any:
    """Images as bytes or paths, so that a broken one is ours to catch."""
    if isinstance(dataset, hf_datasets.IterableDataset):
        return dataset if dataset.features is None else dataset.decode(False)
    bare = hf_datasets.Image(decode=False)
    for name, feature in dataset.features.items():
        if isinstance(feature, hf_datasets.Image):
            dataset = dataset.cast_column(name, bare)
        elif isinstance(getattr(feature, "feature", None), hf_datasets.Image):
            dataset = dataset.cast_column(name, hf_datasets.List(bare))
    return dataset


def _read_rows(stream: Any) -> Iterator[dict[str, Any]]:
    """Of a stream whose steps want images, `datasets` decodes them before they come here."""
    try:
        yield from stream
    except Exception as error:
        decoding = hf_datasets.Image.decode_example.__code__
        if all(frame.f_code is not decoding for frame, _ in walk_tb(error.__traceback__)):
            raise
        raise ValueError(
            "`dataset` holds an image that cannot be read, and a `map`, `filter` or `rename_column` of it met it "
            f"before it could be left out ({type(error).__name__}: {error}). Pass the stream as it was before (the "
            "columns' names are arguments, rows are made into samples by `to_sample`), or let `stream.decode(False)` "
            "come first."
        ) from error


class ResumableDataset(IterableDataset):
    """A pass through samples that can be left and resumed on exactly the next one."""

    def __init__(self) -> None:
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()  # also for workers that outlive an epoch
        self._state: dict[str, Any] | None = None
        self._is_loaded = False

    def set_epoch(self, epoch: int) -> None:
        """Another order for the next pass, with `shuffle`."""
        self._epoch.fill_(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the last pass stands: behind the last sample that it gave. In a worker, its own."""
        return dict(self._state or self._first_state())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The next pass continues there, in the epoch of the state."""
        self._state, self._is_loaded = dict(state_dict), True

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # Not in a generator, which does not run before the first sample: until then, too, the state must be right.
        if not self._is_loaded:
            self._state = self._first_state()
        self._is_loaded = False
        return self._samples()

    def _first_state(self) -> dict[str, Any]:
        raise NotImplementedError

    def _samples(self) -> Iterator[dict[str, Any]]:
        raise NotImplementedError


class TransfusionDataset(ResumableDataset):
    r"""
    Samples for `TransfusionDataCollator` from a data set of `datasets`, map-style or streamed. Make it by `from_text`,
    `from_captions`, `from_interleaved`, `from_edits` or `from_latents`.

    Workers of a `DataLoader` share the rows: of a map-style set they take turns, of a stream they get whole shards
    (`dataset.num_shards`). For several processes see `datasets.distributed.split_dataset_by_node`, to be called on
    `dataset` first, and docs/data.md.

    With `shuffle`, `set_epoch` gives each epoch an order of its own. Map-style sets are shuffled as a whole; of
    streams the order of the shards, and then the rows within blocks of `buffer_size`. Unlike the buffer of
    `datasets`' own `shuffle`, whose content is lost, a block is read again when a run resumes: `state_dict` and
    `load_state_dict` continue on exactly the next sample.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`)
        to_sample (`Callable`): From a row to a sample, a dict; see `TransfusionDataCollator`.
        shuffle (`bool`, defaults to `False`)
        seed (`int`, defaults to 0): Of the order.
        buffer_size (`int`, defaults to 1000): Rows of a block, undecoded, in the memory of each worker.
        on_error (`str`, defaults to `"skip"`):
            What to do with a row whose image cannot be read, whose text is missing or empty, or holds the image token:
            `"skip"` it, with a warning at the first, second, fourth, eighth … of a worker, or `"raise"`.
        rows_per_turn (`int`, defaults to 1):
            How many rows of a map-style set a worker takes before the next one's turn. With the rows of one batch of
            all processes, and no broken rows, only the last batch is partial. `TransfusionTrainer` sets it to that.

    Raises:
        ValueError: at once for an unknown column or option; for a broken row when it comes, with `on_error="raise"`.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> captions = load_dataset("parquet", data_files="captions-*.parquet", split="train", streaming=True)
    >>> pairs = TransfusionDataset.from_captions(captions, caption_column="caption", shuffle=True)
    ```"""

    def __init__(
        self,
        dataset: "hf_datasets.Dataset | hf_datasets.IterableDataset",
        to_sample: Callable[[dict[str, Any]], dict[str, Any]],
        shuffle: bool = False,
        seed: int = 0,
        buffer_size: int = 1000,
        on_error: str = "skip",
        rows_per_turn: int = 1,
    ) -> None:
        super().__init__()
        if not isinstance(dataset, (hf_datasets.Dataset, hf_datasets.IterableDataset)):
            raise ValueError(
                f"`dataset` must be a `Dataset` or `IterableDataset` of datasets; got {type(dataset).__name__}. Of a "
                "dictionary of splits, pass one."
            )
        if on_error not in ("skip", "raise"):
            raise ValueError(f"`on_error` must be 'skip' or 'raise'; got {on_error!r}.")
        for name, value in (("buffer_size", buffer_size), ("rows_per_turn", rows_per_turn)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1; got {value}.")
        self.dataset = _without_decoding(dataset)
        self.to_sample = to_sample
        self.shuffle = shuffle
        self.seed = seed
        self.buffer_size = buffer_size
        self.on_error = on_error
        self.rows_per_turn = rows_per_turn
        self._skipped = torch.zeros(NUM_SLOTS, dtype=torch.long).share_memory_()

    @classmethod
    def from_text(
        cls, dataset: Any, text_column: str = "text", image_token: str = "<image>", **kwargs: Any
    ) -> "TransfusionDataset":
        """
        A text corpus: `{"text": …}`. `image_token` is the processor's; further arguments are the class's.
        """
        to_sample = partial(_text_sample, image_token=image_token)
        return cls._from_columns(dataset, to_sample, kwargs, text_column=text_column)

    @classmethod
    def from_captions(
        cls,
        dataset: Any,
        image_column: str = "image",
        caption_column: str = "text",
        image_token: str = "<image>",
        **kwargs: Any,
    ) -> "TransfusionDataset":
        """
        Images with captions: `{"text": …, "image": PIL.Image}`. Which comes first is the collator's to decide (§3).
        """
        to_sample = partial(_caption_sample, image_token=image_token)
        return cls._from_columns(dataset, to_sample, kwargs, image_column=image_column, caption_column=caption_column)

    @classmethod
    def from_interleaved(
        cls,
        dataset: Any,
        texts_column: str = "texts",
        images_column: str = "images",
        image_token: str = "<image>",
        **kwargs: Any,
    ) -> "TransfusionDataset":
        """
        Documents as OBELICS has them: two lists of one length, at each place a text or an image, and `None` in the
        other list: `texts=["A cat:", None, "asleep."]`, `images=[None, image, None]`. The texts are put behind one
        another as they stand. A document with one broken image is broken.
        """
        to_sample = partial(_interleaved_sample, image_token=image_token)
        return cls._from_columns(dataset, to_sample, kwargs, texts_column=texts_column, images_column=images_column)

    @classmethod
    def from_edits(
        cls,
        dataset: Any,
        source_column: str = "input_image",
        instruction_column: str = "edit_prompt",
        target_column: str = "edited_image",
        image_token: str = "<image>",
        **kwargs: Any,
    ) -> "TransfusionDataset":
        """
        Image, instruction, edited image (§4.5), the columns InstructPix2Pix's: `{"text": "<image>…<image>", "images":
        [source, target], "image_loss_mask": [False, True]}`. The source is clean context, without diffusion loss.
        """
        to_sample = partial(_edit_sample, image_token=image_token)
        columns = {"source_column": source_column, "instruction_column": instruction_column}
        return cls._from_columns(dataset, to_sample, kwargs, **columns, target_column=target_column)

    @classmethod
    def from_latents(
        cls, dataset: Any, text_column: str = "text", latents_column: str = "latents", **kwargs: Any
    ) -> "TransfusionDataset":
        """
        What `transfusion_hf.data.latents.write_latents` wrote: `{"text": …, "latents": [tensor, …]}`, each a
        `torch.FloatTensor` of shape `(latent_channels, height, width)`.
        """
        columns = {"text_column": text_column, "latents_column": latents_column}
        return cls._from_columns(dataset, _latents_sample, kwargs, **columns)

    @classmethod
    def _from_columns(
        cls, dataset: Any, to_sample: Callable[..., dict[str, Any]], kwargs: dict[str, Any], **columns: str
    ) -> "TransfusionDataset":
        made = cls(dataset, partial(to_sample, **columns), **kwargs)
        names = made.dataset.column_names
        if names is None:  # a stream that does not know them: its first row does
            names = list(next(_read_rows(made.dataset), {}))
        for argument, column in columns.items():
            if column not in names:
                raise ValueError(f"`{argument}` is {column!r}, but the columns of `dataset` are {names}; name one.")
        return made

    @property
    def num_skipped(self) -> int:
        """Broken rows left out so far, in all passes, workers of a data loader included."""
        return int(self._skipped.sum())

    def __len__(self) -> int:
        """Rows, broken ones included; of a stream unknown."""
        return len(self.dataset)

    def _first_state(self) -> dict[str, Any]:
        return {"epoch": int(self._epoch), "position": 0, "block": None}

    def _samples(self) -> Iterator[dict[str, Any]]:
        is_stream = isinstance(self.dataset, hf_datasets.IterableDataset)
        for index, row in self._streamed_rows() if is_stream else self._indexed_rows():
            try:
                sample = self.to_sample(row)
            except _BrokenRowError as error:
                self._skip(index, row, error)
            else:
                yield sample

    def _indexed_rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        assert self._state is not None
        epoch, length = self._state["epoch"], len(self.dataset)
        order = np.random.default_rng([self.seed, epoch]).permutation(length) if self.shuffle else np.arange(length)
        if (worker := get_worker_info()) is not None:
            turns = np.arange(length) // self.rows_per_turn
            order = order[turns % worker.num_workers == worker.id]
        for position in range(self._state["position"], len(order)):
            self._state = {"epoch": epoch, "position": position + 1, "block": None}
            yield int(order[position]), self.dataset[int(order[position])]

    def _streamed_rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Block after block, each in a random order; its state is that of the stream at its start, and how much is
        taken of it. `datasets` gives each worker its shards."""
        assert self._state is not None
        epoch, position, state = (self._state[name] for name in ("epoch", "position", "block"))
        size = self.buffer_size if self.shuffle else 1
        # A new stream, with a state and an epoch of its own.
        stream = split_dataset_by_node(self.dataset, rank=0, world_size=1)
        if self.shuffle:
            stream.set_epoch(int(np.random.default_rng([self.seed, epoch]).integers(1, 2**31)))  # 0: as they come
        if state is not None:
            stream.load_state_dict(state)
        rows = _read_rows(stream)
        while block := list(islice(rows, size)):
            number, taken = divmod(position, size)
            order = np.random.default_rng([self.seed, epoch, number]).permutation(len(block))
            for i in order[taken:]:
                position += 1
                if position % size == 0:
                    state = stream.state_dict()
                self._state = {"epoch": epoch, "position": position, "block": state}
                yield number * size + int(i), block[i]

    def _skip(self, index: int, row: dict[str, Any], error: _BrokenRowError) -> None:
        """Counts, and says which: by its number, in a stream the worker's, and by what else the row holds."""
        known = {name: value.get("path") if isinstance(value, dict) else value for name, value in row.items()}
        known = {name: str(value)[:80] for name, value in known.items() if isinstance(value, (int, str)) and value}
        what = f"row {index} of `dataset` {known}: {error}"
        if self.on_error == "raise":
            raise ValueError(f"Broken {what}. Repair it, or pass `on_error='skip'`.") from error
        worker = get_worker_info()
        slot = 0 if worker is None else worker.id % NUM_SLOTS
        self._skipped[slot] += 1
        count = int(self._skipped[slot])
        if count & (count - 1) == 0:
            warnings.warn(f"Skipped {count} broken rows so far, the last {what}.", stacklevel=2)


__all__ = ["TransfusionDataset"]
