"""From texts and images to training batches: order, noise limit, caption dropout, padding or packing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..masking_transfusion import make_packed_plan
from ..processing_transfusion import TransfusionProcessor


def first_fit(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """
    Packs items into rows: each, from the longest, into the first row that has room.

    Args:
        lengths (`list[int]`): Of the items, at most `max_length` each.
        max_length (`int`): Room of a row.

    Returns:
        `list[list[int]]`: The items of each row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, free in enumerate(room) if lengths[item] <= free), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max_length)
        rows[row].append(item)
        room[row] -= lengths[item]
    return rows


@dataclass
class TransfusionDataCollator:
    r"""
    Batches samples for the `Trainer` (with `remove_unused_columns=False`): each in a row of its own, padded at the
    right; or packed, with `max_length`, behind one another in as few rows of that length as first-fit finds. Documents
    in a row do not see each other: their positions begin anew, by which transformers and `"transfusion_varlen"` tell
    them apart.

    A sample is a dict with `text` and, in `image` or the list `images`, the images that belong to it. Where the text
    marks the places of its images with the processor's image token, it is taken as it stands. Otherwise it is a
    caption of one image, and chance decides, by torch's global generator: caption first with
    `caption_first_probability`, image first otherwise, then with t below `image_first_max_timesteps` (§3, §4.3.4); a
    caption that comes first is dropped with `caption_dropout`, which teaches the unconditional context of guidance.
    For an evaluation that is the same every time, mark the images, or evaluate by `TransfusionTrainer`.

    In place of images there may be latents, `(latent_channels, height, width)` each, in `latents`: a list, or the one.

    Optional further keys: `image_loss_mask` (list of `bool`, `False` for clean context) and `max_timesteps` (list of
    `int`), one value per image.

    Args:
        processor (`TransfusionProcessor`)
        caption_first_probability (`float`, defaults to 0.8)
        caption_dropout (`float`, defaults to 0.1):
            NOTE: the paper does not give a rate; 0.1 is the usual one.
        image_first_max_timesteps (`int`, defaults to 500)
        num_train_timesteps (`int`, defaults to 1000): T of the model, the limit of all other images.
        max_length (`int`, *optional*): Pack samples into rows of this length.
        truncation (`bool`, defaults to `False`):
            Whether a sample longer than `max_length` loses its end, an image at the cut as a whole; else an error.
        return_varlen_plan (`bool`, defaults to `False`):
            Whether packs come with the plan for `attn_implementation="transfusion_varlen"`, made in the data
            loader's workers rather than in `forward`.

    Returns, when called, a dict of `input_ids` and `labels` of shape `(batch, seq)`, `attention_mask` of that shape
    or, packed, `position_ids` (and `varlen_plan`), and, where there are images, `pixel_values` of shape
    `(num_images, channels, height, width)` or `latents`, `max_timesteps` and `image_loss_mask` of shape
    `(num_images,)`.

    Raises:
        ValueError: no samples, images and latents in one batch, a probability outside of 0 to 1, images without
            markers that are not one to a caption, a sample or an image longer than `max_length`.
    """

    processor: TransfusionProcessor
    caption_first_probability: float = 0.8
    caption_dropout: float = 0.1
    image_first_max_timesteps: int = 500
    num_train_timesteps: int = 1000
    max_length: int | None = None
    truncation: bool = False
    return_varlen_plan: bool = False
    # Tokens, and room for them. Shared, so that what the workers of a data loader count is seen here.
    _filled: torch.Tensor = field(
        default_factory=lambda: torch.zeros(2, dtype=torch.long), init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        self._filled.share_memory_()
        for name in ("return_varlen_plan", "truncation"):
            if getattr(self, name) and self.max_length is None:
                raise ValueError(f"`{name}` is for packs; pass `max_length` too.")
        for name in ("caption_first_probability", "caption_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in 0 to 1; got {getattr(self, name)}.")
        eos = self.processor.tokenizer.eos_token or ""
        has_eos = bool(eos) and self.processor.tokenizer("").input_ids[-1:] == [self.processor.tokenizer.eos_token_id]
        self._end = "" if has_eos else eos

    @property
    def fill_rate(self) -> float:
        """Share of the packed rows so far that is not padding, workers of a data loader included; NaN before any."""
        tokens, room = self._filled.tolist()
        return tokens / room if room else math.nan

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if not features:
            raise ValueError("`features` must hold at least one sample; got none.")
        texts: list[str] = []
        images: list[Any] = []
        max_timesteps: list[int] = []
        image_loss_mask: list[bool] = []
        num_images: list[int] = []
        kind = self._kind(features)
        for feature in features:
            pictures = self._images_of(feature, kind)
            text, limit = self._arrange(feature["text"], len(pictures))
            texts.append(text + self._end)
            images += pictures
            num_images.append(len(pictures))
            max_timesteps += self._per_image(feature, "max_timesteps", len(pictures), limit)
            image_loss_mask += self._per_image(feature, "image_loss_mask", len(pictures), True)
        given = {kind: images or None}
        batch = self.processor(text=texts, return_labels=True, padding=True, padding_side="right", **given)
        if images:
            batch["max_timesteps"] = torch.tensor(max_timesteps)
            batch["image_loss_mask"] = torch.tensor(image_loss_mask)
        return dict(batch) if self.max_length is None else self._pack(dict(batch), num_images)

    @staticmethod
    def _kind(features: Sequence[dict[str, Any]]) -> str:
        """Whether the images of a batch come as `"images"` or as `"latents"`."""
        kinds = {
            "latents" if name == "latents" else "images"
            for feature in features
            for name in ("image", "images", "latents")
            if feature.get(name) is not None
        }
        if len(kinds) == 2:
            raise ValueError(
                "`features` mix images and latents; pass the ones or the others in all samples of a batch."
            )
        return kinds.pop() if kinds else "images"

    @staticmethod
    def _images_of(feature: dict[str, Any], kind: str) -> list[Any]:
        # `None` where a data set mixes texts with and without images.
        image, several = feature.get("image"), feature.get(kind)
        if image is not None and several is not None:
            raise ValueError(f"A sample holds its images in `image` or in `{kind}`; got both.")
        if kind == "latents" and several is not None:
            # Data sets give nested lists.
            tensors = [torch.as_tensor(x, dtype=torch.float32) for x in several]
            return [torch.stack(tensors)] if tensors and tensors[0].ndim == 2 else tensors
        return list(several) if several is not None else [] if image is None else [image]

    def _arrange(self, text: str, num_images: int) -> tuple[str, int]:
        """The text with its marker, and the noise limit of its images."""
        marker = self.processor.image_token
        if num_images == 0 or marker in text:
            return text, self.num_train_timesteps
        if num_images != 1:
            raise ValueError(
                f"`text` marks no image but {num_images} images belong to it; put one {marker} where each stands."
            )
        order, dropout = torch.rand(2).tolist()
        if order >= self.caption_first_probability:
            return marker + text, self.image_first_max_timesteps
        return marker if dropout < self.caption_dropout else text + marker, self.num_train_timesteps

    def _pack(self, batch: dict[str, Any], num_images: list[int]) -> dict[str, Any]:
        """Rows of whole samples, first-fit from the longest; images follow their samples."""
        assert self.max_length is not None
        mask = batch.pop("attention_mask").bool()
        samples = [
            {name: batch[name][i][mask[i]] for name in ("input_ids", "labels")} | {"num_images": num_images[i]}
            for i in range(len(mask))
        ]
        samples = [self._fit(i, sample) for i, sample in enumerate(samples)]
        first_image = [sum(num_images[:i]) for i in range(len(num_images))]
        rows = first_fit([len(sample["input_ids"]) for sample in samples], self.max_length)
        fill = {"input_ids": self.processor.tokenizer.pad_token_id, "labels": -100}
        packed: dict[str, list[torch.Tensor]] = {"input_ids": [], "labels": [], "position_ids": []}
        kept_images: list[int] = []
        for row in rows:
            for i in row:
                kept_images += range(first_image[i], first_image[i] + samples[i]["num_images"])
            lengths = [len(samples[i]["input_ids"]) for i in row]
            padding = self.max_length - sum(lengths)
            for name, value in fill.items():
                packed[name].append(torch.cat([*(samples[i][name] for i in row), torch.full((padding,), value)]))
            packed["position_ids"].append(torch.cat([torch.arange(length) for length in (*lengths, padding)]))
        result: dict[str, Any] = {name: torch.stack(tensors) for name, tensors in packed.items()}
        ids = result["input_ids"]
        self._filled += torch.tensor([sum(len(sample["input_ids"]) for sample in samples), ids.numel()])
        if self.return_varlen_plan:
            result["varlen_plan"] = make_packed_plan(ids, result["position_ids"], self.processor.image_token_id)
        if kept_images:
            for name in ("max_timesteps", "image_loss_mask"):
                result[name] = batch[name][kept_images]
            name = "latents" if "latents" in batch else "pixel_values"
            pictures = batch[name]
            is_tensor = isinstance(pictures, torch.Tensor)
            result[name] = pictures[kept_images] if is_tensor else [pictures[i] for i in kept_images]
        return result

    def _fit(self, index: int, sample: dict[str, Any]) -> dict[str, Any]:
        """The sample, cut to `max_length` if that is allowed, but never through an image."""
        assert self.max_length is not None
        ids, limit = sample["input_ids"], self.max_length
        if len(ids) <= limit:
            return sample
        # An image is a run of placeholders between its two tokens, which a text may also hold by themselves.
        is_patch = ids == self.processor.image_token_id
        starts = (is_patch & ~is_patch.roll(1)).nonzero()[:, 0].tolist()
        ends = (is_patch & ~is_patch.roll(-1)).nonzero()[:, 0].tolist()
        starts, ends = [start - 1 for start in starts], [end + 1 for end in ends]
        longest = max((end - start + 1 for start, end in zip(starts, ends, strict=True)), default=0)
        if longest > limit or not self.truncation:
            what = f"an image of {longest}" if longest > limit else f"{len(ids)}"
            raise ValueError(
                f"`max_length` is {limit}, but sample {index} has {what} tokens; raise it, shrink the image, or for "
                "text pass `truncation=True`."
            )
        cut = next((start for start, end in zip(starts, ends, strict=True) if start < limit <= end), limit)
        return {
            "input_ids": ids[:cut],
            "labels": sample["labels"][:cut],
            "num_images": sum(end < cut for end in ends),
        }

    def _per_image(self, feature: dict[str, Any], name: str, num_images: int, default: Any) -> list[Any]:
        values = feature.get(name)
        if values is None:
            return [default] * num_images
        if isinstance(values, (bool, int)):
            values = [values]
        if len(values) != num_images:
            raise ValueError(f"`{name}` must hold one value for each of {num_images} images; got {len(values)}.")
        return list(values)


__all__ = ["TransfusionDataCollator", "first_fit"]
