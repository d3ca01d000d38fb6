"""From texts and images to training batches: order, noise limit, caption dropout, padding or packing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch.nn.functional import pad

from ..masking_transfusion import make_packed_plan
from ..processing_transfusion import TransfusionProcessor


def first_fit(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """
    Packs items, of at most `max_length` each, into rows of that length: from the longest on, each into the first row
    that has room. Returns the indices of the items in each row.
    """
    rows: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        free = max_length - lengths[item]
        row = next((row for row in rows if sum(lengths[i] for i in row) <= free), None)
        if row is None:
            rows.append(row := [])
        row.append(item)
    return rows


def images_of(sample: dict[str, Any]) -> list[Any]:
    """The images of a sample, from `images` or `image`, which are `None` where a dataset mixes in plain text."""
    image, images = sample.get("image"), sample.get("images")
    if image is not None and images is not None:
        raise ValueError("A sample holds its images in `image` or in `images`; got both.")
    return list(images) if images is not None else [] if image is None else [image]


def latents_of(sample: dict[str, Any]) -> list[torch.Tensor]:
    """The latents of a sample, from `latents`: a list of them, or one; as tensors, or as the nested lists of a row."""
    latents = sample.get("latents")
    tensors = [torch.as_tensor(x, dtype=torch.float32) for x in (() if latents is None else latents)]
    return [torch.stack(tensors)] if tensors and tensors[0].ndim == 2 else tensors


def text_of(sample: dict[str, Any]) -> str:
    """The text of a sample, from `text`."""
    text, keys = sample.get("text"), f"the sample's keys are {list(sample)}"
    if isinstance(text, str):
        return text
    if "text" in sample:
        raise ValueError(
            f"A sample's `text` must be a string; got {type(text).__name__}, and {keys}. Choose one of a list, for "
            "example by `dataset.map(lambda row: {'text': row['text'][0]})`; leave out samples without text by "
            "`dataset.filter`, or let `TransfusionDataset.from_captions` skip them."
        )
    raise ValueError(
        f"A sample has no `text`: {keys}. If the stock `Trainer` removed its columns, pass "
        "`remove_unused_columns=False` to `TrainingArguments`. If the text has another name, rename it "
        "(`dataset.rename_column('caption', 'text')`), or use `TransfusionDataset.from_captions(dataset, "
        "caption_column='caption')`."
    )


@dataclass
class TransfusionDataCollator:
    """
    Batches samples for [`TransfusionTrainer`], or the stock `Trainer` with `remove_unused_columns=False`. Each sample
    gets its own row, padded at the right. With `max_length`, samples are packed into rows of that length instead, by
    first-fit. Documents in a row do not see each other: their positions restart at 0, which transformers and
    `"transfusion_varlen"` understand.

    A sample is a dict with `text` and, in `image` or the list `images`, its images; or, in `latents`, one latent of
    shape `(latent_channels, height, width)` or a list of them. Optional keys with one value per image:
    `image_loss_mask` (`bool`, `False` for clean context) and `max_timesteps` (`int`).

    Text that marks the places of its images with the processor's image token stays as it is. Otherwise it is the
    caption of one image, and torch's global generator decides which comes first.

    Args:
        processor (`TransfusionProcessor`)
        caption_first_probability (`float`, defaults to 0.8): How often a caption precedes its image (§4.1).
        caption_dropout (`float`, defaults to 0.1): How often such a caption is dropped, which teaches the
            unconditional context of guidance. NOTE: the paper does not give a rate; 0.1 is the usual one.
        image_first_max_timesteps (`int`, defaults to 500): Limit of t for images before their caption (§4.3.4).
        num_train_timesteps (`int`, defaults to 1000): T of the model, the noise limit of all other images.
        max_length (`int`, *optional*): Pack samples into rows of this length.
        truncation (`bool`, defaults to `False`): Cut longer samples, before an image rather than within.
        return_varlen_plan (`bool`, defaults to `False`): Make the plan of packed rows for
            `attn_implementation="transfusion_varlen"` in the data loader's workers rather than in `forward`.

    Returns, when called, a dict of `input_ids` and `labels` of shape `(batch, seq)`; `attention_mask` of that shape
    or, when packed, `position_ids` (and `varlen_plan`); if there are images, `max_timesteps` and `image_loss_mask` of
    shape `(num_images,)`, and `pixel_values` of shape `(num_images, channels, height, width)` or `latents`.

    Raises:
        ValueError: images and latents in one batch, a probability outside of 0 to 1, several unmarked images, a
            sample without a string in `text`, a sample or an image longer than `max_length`.
    """

    processor: TransfusionProcessor
    caption_first_probability: float = 0.8
    caption_dropout: float = 0.1
    image_first_max_timesteps: int = 500
    num_train_timesteps: int = 1000
    max_length: int | None = None
    truncation: bool = False
    return_varlen_plan: bool = False
    # Tokens and places of the packed rows. Shared, so that the workers of a data loader count here, too.
    _filled: torch.Tensor = field(
        default_factory=lambda: torch.zeros(2, dtype=torch.long).share_memory_(), init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for name in ("return_varlen_plan", "truncation"):
            if getattr(self, name) and self.max_length is None:
                raise ValueError(f"`{name}` is for packs; pass `max_length` too.")
        for name in ("caption_first_probability", "caption_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in 0 to 1; got {getattr(self, name)}.")
        tokenizer = self.processor.tokenizer
        has_eos = tokenizer("").input_ids[-1:] == [tokenizer.eos_token_id]
        self._end = "" if has_eos else tokenizer.eos_token or ""

    @property
    def fill_rate(self) -> float:
        """Share of the packed rows so far that is not padding, counted in workers, too; NaN before the first row."""
        tokens, room = self._filled.tolist()
        return tokens / room if room else math.nan

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if not features:
            raise ValueError("`features` must hold at least one sample; got none.")
        texts, images, latents, limits, masks = zip(*map(self._read, features), strict=True)
        contents = {"text": list(texts), "images": [*chain(*images)], "latents": [*chain(*latents)]}
        batch = dict(self.processor(**contents, return_labels=True, padding=True, padding_side="right"))
        if any(limits):
            batch["max_timesteps"] = torch.tensor([*chain(*limits)])
            batch["image_loss_mask"] = torch.tensor([*chain(*masks)])
        return batch if self.max_length is None else self._pack(batch, [*map(len, limits)], self.max_length)

    def _read(self, feature: dict[str, Any]) -> tuple[str, list[Any], list[torch.Tensor], list[int], list[bool]]:
        """Text with its markers, images, latents, noise limits and loss mask of a sample."""
        images, latents, text = images_of(feature), latents_of(feature), text_of(feature)
        num_images, limit, marker = len(images) + len(latents), self.num_train_timesteps, self.processor.image_token
        if num_images and marker not in text:
            if num_images > 1:
                what = f"`text` marks no image but {num_images} images belong to it"
                raise ValueError(f"{what}; put one {marker} where each stands.")
            order, dropout = torch.rand(2).tolist()
            if order >= self.caption_first_probability:
                text, limit = marker + text, self.image_first_max_timesteps
            else:
                text = marker if dropout < self.caption_dropout else text + marker
        limits = _per_image(feature, "max_timesteps", num_images, limit)
        return text + self._end, images, latents, limits, _per_image(feature, "image_loss_mask", num_images, True)

    def _pack(self, batch: dict[str, Any], num_images: list[int], max_length: int) -> dict[str, Any]:
        """Packs whole samples into rows; the images follow the order of their samples."""
        is_real = batch["attention_mask"].bool()
        pairs = (zip(batch[name], is_real, strict=True) for name in ("input_ids", "labels"))
        ids, labels = ([row[mask] for row, mask in pair] for pair in pairs)
        images = list(torch.arange(sum(num_images)).split(num_images))  # the indices of each sample's images
        for i, sample in enumerate(ids):
            if len(sample) > max_length:
                end, num_kept = self._find_cut(i, sample, max_length)
                ids[i], labels[i], images[i] = sample[:end], labels[i][:end], images[i][:num_kept]
        packed: dict[str, list[torch.Tensor]] = {"input_ids": [], "labels": [], "position_ids": []}
        pad_token_id = self.processor.tokenizer.pad_token_id
        rows = first_fit([len(sample) for sample in ids], max_length)
        for row in rows:
            lengths = [len(ids[i]) for i in row]
            padding = max_length - sum(lengths)
            for name, samples, value in (("input_ids", ids, pad_token_id), ("labels", labels, -100)):
                packed[name].append(pad(torch.cat([samples[i] for i in row]), (0, padding), value=value))
            packed["position_ids"].append(torch.cat([torch.arange(length) for length in (*lengths, padding)]))
        result: dict[str, Any] = {name: torch.stack(tensors) for name, tensors in packed.items()}
        self._filled += torch.tensor([sum(map(len, ids)), len(rows) * max_length])
        if self.return_varlen_plan:
            token_id = self.processor.image_token_id
            result["varlen_plan"] = make_packed_plan(result["input_ids"], result["position_ids"], token_id)
        kept = torch.cat([images[i] for row in rows for i in row])
        for name in ("pixel_values", "latents", "max_timesteps", "image_loss_mask") if len(kept) else ():
            if (values := batch.get(name)) is not None:
                is_tensor = isinstance(values, torch.Tensor)
                result[name] = values[kept] if is_tensor else [values[i] for i in kept.tolist()]
        return result

    def _find_cut(self, index: int, ids: torch.Tensor, max_length: int) -> tuple[int, int]:
        """Where to cut a sample that is too long, before an image rather than within; and how many images remain."""
        edges = pad((ids == self.processor.image_token_id).int(), (1, 1)).diff()
        starts = ((edges == 1).nonzero()[:, 0] - 1).tolist()  # `<BOI>` and
        ends = (edges == -1).nonzero()[:, 0].tolist()  # `<EOI>`, which a text may also hold without an image
        longest = max((end - start + 1 for start, end in zip(starts, ends, strict=True)), default=0)
        if longest > max_length or not self.truncation:
            what = f"an image of {longest}" if longest > max_length else f"{len(ids)}"
            remedy = "raise it, shrink the image, or for text pass `truncation=True`"
            raise ValueError(f"`max_length` is {max_length}, but sample {index} has {what} tokens; {remedy}.")
        cut = next((s for s, end in zip(starts, ends, strict=True) if s < max_length <= end), max_length)
        return cut, sum(end < cut for end in ends)


def _per_image(feature: dict[str, Any], name: str, num_images: int, default: Any) -> list[Any]:
    values = [default] * num_images if feature.get(name) is None else feature[name]
    values = [values] if isinstance(values, (bool, int)) else list(values)
    if len(values) != num_images:
        raise ValueError(f"`{name}` must hold one value for each of {num_images} images; got {len(values)}.")
    return values
