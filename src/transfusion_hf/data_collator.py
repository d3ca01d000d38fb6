"""From texts and images to training batches: the paper's order, noise limit and caption dropout."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .processing_transfusion import TransfusionProcessor


@dataclass
class TransfusionDataCollator:
    r"""
    Batches samples for the `Trainer` (with `remove_unused_columns=False`), padded at the right.

    A sample is a dict with `text` and, in `image` or the list `images`, the images that belong to it. Where the text
    marks the places of its images with the processor's image token, it is taken as it stands. Otherwise it is a
    caption of one image, and chance decides, by torch's global generator: caption first with
    `caption_first_probability`, image first otherwise, then with t below `image_first_max_timesteps` (§3, §4.3.4); a
    caption that comes first is dropped with `caption_dropout`, which teaches the unconditional context of guidance.
    For an evaluation that is the same every time, mark the images.

    Optional further keys: `image_loss_mask` (list of `bool`, `False` for clean context) and `max_timesteps` (list of
    `int`), one value per image.

    Args:
        processor (`TransfusionProcessor`)
        caption_first_probability (`float`, defaults to 0.8)
        caption_dropout (`float`, defaults to 0.1):
            NOTE: the paper does not give a rate; 0.1 is the usual one.
        image_first_max_timesteps (`int`, defaults to 500)
        num_train_timesteps (`int`, defaults to 1000): T of the model, the limit of all other images.

    Returns, when called, a dict of `input_ids`, `attention_mask` and `labels` of shape `(batch, seq)`, and, where
    there are images, `pixel_values` of shape `(num_images, channels, height, width)`, `max_timesteps` and
    `image_loss_mask` of shape `(num_images,)`.

    Raises:
        ValueError: no samples, a probability outside of 0 to 1, images without markers that are not one to a caption.
    """

    processor: TransfusionProcessor
    caption_first_probability: float = 0.8
    caption_dropout: float = 0.1
    image_first_max_timesteps: int = 500
    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        for name in ("caption_first_probability", "caption_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in 0 to 1; got {getattr(self, name)}.")
        eos = self.processor.tokenizer.eos_token or ""
        has_eos = bool(eos) and self.processor.tokenizer("").input_ids[-1:] == [self.processor.tokenizer.eos_token_id]
        self._end = "" if has_eos else eos

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if not features:
            raise ValueError("`features` must hold at least one sample; got none.")
        texts: list[str] = []
        images: list[Any] = []
        max_timesteps: list[int] = []
        image_loss_mask: list[bool] = []
        for feature in features:
            image = feature.get("image")  # `None` where a data set mixes texts with and without images
            pictures = list(feature.get("images") or ([] if image is None else [image]))
            text, limit = self._arrange(feature["text"], len(pictures))
            texts.append(text + self._end)
            images += pictures
            max_timesteps += self._per_image(feature, "max_timesteps", len(pictures), limit)
            image_loss_mask += self._per_image(feature, "image_loss_mask", len(pictures), True)
        batch = self.processor(
            images=images or None, text=texts, return_labels=True, padding=True, padding_side="right"
        )
        if images:
            batch["max_timesteps"] = torch.tensor(max_timesteps)
            batch["image_loss_mask"] = torch.tensor(image_loss_mask)
        return dict(batch)

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

    def _per_image(self, feature: dict[str, Any], name: str, num_images: int, default: Any) -> list[Any]:
        values = feature.get(name)
        if values is None:
            return [default] * num_images
        if len(values) != num_images:
            raise ValueError(f"`{name}` must hold one value for each of {num_images} images; got {len(values)}.")
        return list(values)


__all__ = ["TransfusionDataCollator"]
