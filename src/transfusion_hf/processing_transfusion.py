"""Interleaved text and images to model inputs, and model outputs back to text and images."""

import json
import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken
from transformers import BatchFeature, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_utils import make_flat_list_of_images
from transformers.utils import PROCESSOR_NAME, cached_file, find_adapter_config_file

from .image_processing_transfusion import TransfusionImageProcessor


def make_labels(
    input_ids, attention_mask, image_start_token_id: int, image_token_id: int, image_end_token_id: int
) -> torch.LongTensor:
    """
    Labels for `forward`: the ids, with −100 where there is no LM loss (§3, footnote 8). That is at patches, which are
    denoised; at `<EOI>`, which `generate()` appends; at the token after `<BOI>`; at padding; and at a row's first
    token, which nothing predicts. `<BOI>` is a target like any token. Ids and mask have the shape `(batch, seq)`.
    """
    is_real = attention_mask.bool()
    has_loss = is_real & (input_ids != image_token_id) & (input_ids != image_end_token_id)
    has_loss[:, 1:] &= is_real[:, :-1] & (input_ids[:, :-1] != image_start_token_id)
    has_loss[:, :1] = False
    return input_ids.masked_fill(~has_loss, -100)


IMAGE_TOKENS = {"image_token": "<image>", "image_start_token": "<BOI>", "image_end_token": "<EOI>"}
_PLAIN_CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ message['role'] }}: {{ message['content'] }}\n{% endfor -%}"
    "{%- if add_generation_prompt -%}assistant: {%- endif -%}"
)
# In front of a template for text: messages may then hold a list of texts and images.
_FLATTEN_CONTENT = (
    "{%- set flat = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- set given, content = message['content'], namespace(text='') -%}"
    "{%- for part in ([{'type': 'text', 'text': given}] if given is string else given) -%}"
    "{%- set content.text = content.text + (IMAGE if part['type'] == 'image' else part['text']) -%}{%- endfor -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=content.text)] -%}"
    "{%- endfor -%}{%- set messages = flat.messages -%}"
)


class TransfusionProcessor(ProcessorMixin):
    r"""
    Wraps a tokenizer and a [`TransfusionImageProcessor`].

    In the text, each `image_token` marks one image and becomes `<BOI>`, one placeholder per patch, `<EOI>`. If a text
    ends with `image_start_token`, generation begins with an image.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Needs the three tokens; [`TransfusionProcessor.for_model`] adds them.
        pixels_per_patch (`int`, defaults to 2): Side of a patch in pixels, `config.pixels_per_patch`.
        patch_size (`int`, *optional*): The same in latent pixels, `config.patch_size`; default: `pixels_per_patch`.
        image_token, image_start_token, image_end_token (`str`): Default to `"<image>"`, `"<BOI>"` and `"<EOI>"`.
        chat_template (`str`, or `dict[str, str]` by name, *optional*):
            Defaults to the tokenizer's, extended by images in the messages of both roles, or to plain `role: content`
            lines if it has none.
    """

    _auto_class = "AutoProcessor"  # the library saves its code

    def __init__(
        self,
        image_processor: TransfusionImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        pixels_per_patch: int = 2,
        patch_size: int | None = None,
        image_token: str = "<image>",
        image_start_token: str = "<BOI>",
        image_end_token: str = "<EOI>",
        chat_template: str | dict[str, str] | None = None,
    ):
        self.pixels_per_patch = pixels_per_patch
        self.patch_size = pixels_per_patch if patch_size is None else patch_size
        self.image_token, self.image_start_token, self.image_end_token = tokens = (
            image_token, image_start_token, image_end_token,
        )  # fmt: skip
        vocabulary = tokenizer.get_vocab()
        if missing := [token for token in tokens if token not in vocabulary]:
            raise ValueError(
                f"`tokenizer` lacks {', '.join(missing)}; `TransfusionProcessor.for_model(model, tokenizer)` adds "
                "them and resizes the model's embeddings."
            )
        self.image_token_id, self.image_start_token_id, self.image_end_token_id = (vocabulary[t] for t in tokens)
        if chat_template is None:
            flatten = _FLATTEN_CONTENT.replace("IMAGE", repr(image_token))
            own: Any = getattr(tokenizer, "chat_template", None) or _PLAIN_CHAT_TEMPLATE
            is_named = isinstance(own, dict)
            chat_template = {name: flatten + one for name, one in own.items()} if is_named else flatten + own
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """As for any processor. Of an adapter without a processor, that of its base model."""
        names = ("cache_dir", "force_download", "local_files_only", "revision", "token", "subfolder")
        where: dict[str, Any] = {name: kwargs[name] for name in names if name in kwargs}
        adapter = find_adapter_config_file(str(pretrained_model_name_or_path), **where)
        missing_is_none = {"_raise_exceptions_for_missing_entries": False}
        if adapter and not cached_file(pretrained_model_name_or_path, PROCESSOR_NAME, **missing_is_none, **where):
            pretrained_model_name_or_path = json.loads(Path(adapter).read_text())["base_model_name_or_path"]
            # These are about the adapter's repository.
            kwargs = {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def for_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: TransfusionImageProcessor | None = None,
        pad_to_multiple_of: int | None = None,
        **kwargs: Any,
    ) -> "TransfusionProcessor":
        """
        Fits tokenizer and model to each other and returns the processor for both. Adds the missing image tokens, and
        `<pad>` if there is no padding token, to the tokenizer. Grows the model's embeddings if they are too few; a new
        row is the mean of the old ones. Writes the ids into `model.config` and `model.generation_config`.

        Args:
            model (`TransfusionForCausalLMAndDiffusion`), tokenizer (`PreTrainedTokenizerBase`)
            image_processor (`TransfusionImageProcessor`, *optional*): Defaults to one for the model's images.
            pad_to_multiple_of (`int`, *optional*): Pad a resized vocabulary to a multiple of this.
            kwargs: Further arguments of the constructor, such as `image_token`.
        """
        tokens = {name: kwargs.pop(name, default) for name, default in IMAGE_TOKENS.items()}
        vocabulary = tokenizer.get_vocab()
        new = [AddedToken(t, special=True, normalized=False) for t in tokens.values() if t not in vocabulary]
        tokenizer.add_tokens(new, special_tokens=True)
        if tokenizer.pad_token is None:
            # Not the end of sequence: logits processors that read the history would see it in every padded row.
            tokenizer.add_special_tokens({"pad_token": "<pad>"})

        config = model.config
        if len(tokenizer) > config.text_config.vocab_size:
            model.grow_vocabulary(len(tokenizer), pad_to_multiple_of)
        for name, token in tokens.items():
            setattr(config, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
        config.validate_transfusion()
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(tokenizer, name)
            for target in (config.text_config, model.generation_config):
                several = getattr(target, name, None)  # chat models have several
                if not (isinstance(several, list) and value in several):
                    setattr(target, name, value)

        if image_processor is None:
            height, width = (side * config.vae_scale_factor for side in config.latent_size)
            crop_size = {"height": height, "width": width}
            channels = (config.vae_config or {"in_channels": config.latent_channels}).get("in_channels", 3)
            size, half = {"shortest_edge": height} if height == width else crop_size, [0.5] * channels
            image_processor = TransfusionImageProcessor(
                size=size, crop_size=crop_size, do_convert_rgb=channels == 3, image_mean=half, image_std=half
            )
        sides = {"pixels_per_patch": config.pixels_per_patch, "patch_size": config.patch_size}
        return cls(image_processor, tokenizer, **sides, **tokens, **kwargs)

    def __call__(
        self, images=None, text=None, latents: Sequence[torch.Tensor] | None = None, return_labels=False, **kwargs: Any
    ) -> BatchFeature:
        """
        Args:
            images (`ImageInput`, *optional*): One per marker in the texts, in order.
            text (`str` or `list[str]`): With an `image_token` for each image.
            latents (`list[torch.FloatTensor]` of shapes `(latent_channels, height, width)`, *optional*):
                Output of `model.encode_images`, instead of `images`. `kwargs` then go to the tokenizer.
            return_labels (`bool`, defaults to `False`): Whether to add the labels for training.
            kwargs: As for any processor. Texts are padded on the left unless `padding_side` is passed.

        Returns:
            `BatchFeature` with `input_ids` and `attention_mask` of shape `(batch, seq)`, `pixel_values` of shape
            `(num_images, channels, height, width)` in [−1, 1] (a list if sizes differ) or `latents`, and `labels`.
        """
        # Not in the library's `text_kwargs`, which the tokenizer's init arguments override.
        kwargs = {"return_tensors": "pt", "padding_side": "left", "padding": not isinstance(text, str), **kwargs}
        if isinstance(text, (list, tuple)) and len(text) == 0:
            raise ValueError("`text` must hold at least one text; got an empty list.")
        nested = [] if images is None else self.image_processor.fetch_images(images)
        images = make_flat_list_of_images(nested)
        texts = [text] if isinstance(text, str) else list(text or [])
        latents = [] if latents is None else list(latents)
        if images and latents:
            raise ValueError("Pass `images` or `latents`, not both.")
        name, given = ("latents", latents) if latents else ("images", images)
        num_markers = "".join(texts).count(self.image_token)
        if num_markers != len(given):
            raise ValueError(
                f"`text` has {num_markers} markers {self.image_token} but `{name}` holds {len(given)} images; pass "
                "one image per marker."
            )
        if isinstance(nested, list) and any(isinstance(row, list) for row in nested):
            counts = [len(row) if isinstance(row, list) else 1 for row in nested]
            if counts != (marked := [one.count(self.image_token) for one in texts]):
                raise ValueError(f"`images` has {counts} images by row, but `text` marks {marked}; nest them alike.")
        if latents:
            blocks = [self.replace_image_token({"latents": latents}, i) for i in range(len(latents))]
            texts, _ = self.get_text_with_replacements(texts, blocks)
            features = BatchFeature(dict(self.tokenizer(texts[0] if isinstance(text, str) else texts, **kwargs)))
            features["latents"] = torch.stack(latents) if len({x.shape for x in latents}) == 1 else latents
        else:
            features = super().__call__(images=images or None, text=text, **kwargs)
        if return_labels:
            ids, mask = (torch.as_tensor(features[name]) for name in ("input_ids", "attention_mask"))
            tokens = (self.image_start_token_id, self.image_token_id, self.image_end_token_id)
            features["labels"] = make_labels(ids, mask, *tokens)
        return features

    # The library would stack images of several sizes and fail.
    skip_tensor_conversion = [*ProcessorMixin.skip_tensor_conversion, "pixel_values"]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """`<BOI>`, a placeholder for each patch, `<EOI>`; `image_inputs` holds `pixel_values` or `latents`."""
        if "latents" in image_inputs:
            name, side, images = "latents", self.patch_size, image_inputs["latents"]
        else:
            name, side, images = "images", self.pixels_per_patch, image_inputs["pixel_values"]
        height, width = images[image_idx].shape[-2:]
        if height % side or width % side:
            raise ValueError(
                f"`{name}`: image {image_idx} is {height} × {width} pixels as the model takes it; its sides must be "
                f"multiples of {side}, one patch. Resize or crop it."
            )
        num_patches = (height // side) * (width // side)
        return self.image_start_token + self.image_token * num_patches + self.image_end_token

    def post_process_multimodal_output(
        self, generated_outputs, skip_special_tokens: bool = True, generation_mode: str | None = None, **kwargs: Any
    ) -> list[str] | list[Image.Image] | list[list[str | Image.Image]]:
        """
        Decodes the output of `generate()`, a `TransfusionGenerateOutput` or ids (or one image per row), by
        `generation_mode`: `"text"` or `None`: one string per row; `"image"`: the one image of each row;
        `"interleaved"`: see [`decode_interleaved`].
        """
        sequences = getattr(generated_outputs, "sequences", generated_outputs)
        if generation_mode in (None, "text"):
            return self.batch_decode(sequences, skip_special_tokens=skip_special_tokens, **kwargs)
        images = getattr(generated_outputs, "images", None)
        if generation_mode == "image":
            if isinstance(generated_outputs, list) or getattr(generated_outputs, "ndim", 0) == 4:
                images = [[image] for image in generated_outputs]
            if images is None or any(len(row) != 1 for row in images):
                found = "no images" if images is None else f"{[len(row) for row in images]} images"
                raise ValueError(
                    f"`generation_mode='image'` needs one image per row; got {found}. Generate with "
                    "`generation_mode='image'`, or decode with 'interleaved'."
                )
            return self.image_processor.postprocess([row[0] for row in images])
        if generation_mode == "interleaved":
            return self.decode_interleaved(sequences, images, skip_special_tokens=skip_special_tokens, **kwargs)
        raise ValueError(f"`generation_mode` must be 'text', 'image' or 'interleaved'; got {generation_mode!r}.")

    def decode_interleaved(
        self, sequences: torch.LongTensor, images: Sequence | None, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[list[str | Image.Image]]:
        """
        Each row of ids `(batch, seq)` as an ordered list of strings and PIL images. `images` holds a list for each
        row, with a tensor or PIL image per image block; `kwargs` go to the tokenizer.
        """
        if images is None or len(images) != len(sequences):
            raise ValueError(f"`images` must hold one list for each of {len(sequences)} rows; got {images!r}.")
        kwargs["skip_special_tokens"] = skip_special_tokens
        rows = []
        for ids, row in zip(sequences.tolist(), images, strict=True):
            runs = [(is_image, list(run)) for is_image, run in groupby(ids, key=lambda i: i == self.image_token_id)]
            num_blocks = sum(is_image for is_image, _ in runs)
            if num_blocks != len(row):
                raise ValueError(
                    f"A row has {num_blocks} image blocks but `images` holds {len(row)}; pass the prompt's images "
                    "before the generated ones, or cut the prompt off: `sequences[:, prompt_length:]`."
                )
            pictures = (self.image_processor.postprocess([x])[0] if isinstance(x, torch.Tensor) else x for x in row)
            parts = [next(pictures) if is_image else self.tokenizer.decode(run, **kwargs) for is_image, run in runs]
            rows.append([part for part in parts if part != ""])
        return rows
