"""Interleaved text and images to model inputs, and model outputs back to text and images."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby, takewhile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken
from transformers import BatchFeature, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.utils import PROCESSOR_NAME, cached_file, find_adapter_config_file

from .image_processing_transfusion import TransfusionImageProcessor


def make_labels(
    input_ids,
    attention_mask,
    image_start_token_id: int,
    image_token_id: int,
    image_end_token_id: int,
    vision_token_id: int | None = None,
) -> torch.LongTensor:
    """
    Labels for `forward`: the ids, with −100 where there is no LM loss (§3, footnote 8). That is at patches, which are
    denoised or read; at `<EOI>`, which `generate()` appends; at the token after `<BOI>`; at padding; and at a row's
    first token, which nothing predicts. `<BOI>` is a target like any other. Ids and mask have shape `(batch, seq)`.
    """
    is_real = attention_mask.bool()
    has_loss = is_real & (input_ids != image_token_id) & (input_ids != image_end_token_id)
    if vision_token_id is not None:
        has_loss &= input_ids != vision_token_id
    has_loss[:, 1:] &= is_real[:, :-1] & (input_ids[:, :-1] != image_start_token_id)
    has_loss[:, :1] = False
    return input_ids.masked_fill(~has_loss, -100)


def chat_parts(messages: Iterable[dict[str, Any]]) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """Role and part of the messages of a chat, in order, without what is `None`; `ValueError` for unknown parts."""
    for message in messages:
        content = message.get("content") or ""
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind not in ("text", "image", "image_url") or not isinstance(part.get("text") or "", str):
                raise ValueError(
                    f"`conversation` holds a part of type {kind!r}; a part is {{'type': 'text', 'text': ...}} or "
                    "{'type': 'image', 'image': ...}."
                )
            yield message.get("role"), {name: value for name, value in part.items() if value is not None}


IMAGE_TOKENS = {"image_token": "<image>", "image_start_token": "<BOI>", "image_end_token": "<EOI>"}
VISION_TOKEN = {"vision_token": "<vision>"}


def add_image_tokens(tokenizer: PreTrainedTokenizerBase, tokens: dict[str, str]) -> None:
    """Adds those of `tokens` that a tokenizer lacks, and `<pad>` if it has no padding token."""
    vocabulary = tokenizer.get_vocab()
    new = [AddedToken(t, special=True, normalized=False) for t in tokens.values() if t not in vocabulary]
    tokenizer.add_tokens(new, special_tokens=True)
    if tokenizer.pad_token is None:
        # Not the end of sequence: logits processors that read the history would see it in every padded row.
        tokenizer.add_special_tokens({"pad_token": "<pad>"})


_PLAIN_CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '' if loop.first else '\n' }}{{ message['role'] }}: "
    "{%- if message['role'] == 'assistant' -%}"
    "{% generation %}{{ ' ' + message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{%- else -%}{{ ' ' + message['content'] }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '\nassistant:' }}{%- endif -%}"
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
# What is done to ids once there are some, rather than by the tokenizer.
_TEXT_OPTIONS = (
    "padding", "padding_side", "truncation", "max_length", "pad_to_multiple_of", "return_tensors",
    "add_special_tokens",
)  # fmt: skip
# What the tokenizer returns for each token: its value at a special token, and at padding.
_PER_TOKEN = {
    "attention_mask": (1, 0), "token_type_ids": (0, 0), "special_tokens_mask": (1, 1), "mm_token_type_ids": (0, 0),
    "offset_mapping": ((0, 0), (0, 0)),
}  # fmt: skip


def _ids_alone(token_ids: Any) -> Any:
    if hasattr(token_ids, "sequences"):
        raise TypeError(
            "The output of `generate()` holds text and images; decode its ids, `output.sequences`, or call "
            "`post_process_multimodal_output(output)`."
        )
    return token_ids


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
        vision_token (`str`, *optional*):
            The placeholder for a patch of the vision encoder. An image that is read as `"both"` becomes a block of
            latents and one of these.
        text_format (`str`, *optional*):
            For a model that expects each stretch of text between images in a form of its own, such as
            `"<|im_start|>{}<|im_end|>"`. A stretch that holds what comes before `{}` stays as it is.
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
        vision_token: str | None = None,
        text_format: str | None = None,
    ):
        self.pixels_per_patch = pixels_per_patch
        self.patch_size = pixels_per_patch if patch_size is None else patch_size
        self.image_token, self.image_start_token, self.image_end_token = tokens = (
            image_token, image_start_token, image_end_token,
        )  # fmt: skip
        self.vision_token, vocabulary = vision_token, tokenizer.get_vocab()
        if missing := [token for token in (*tokens, vision_token) if token and token not in vocabulary]:
            raise ValueError(
                f"`tokenizer` lacks {', '.join(missing)}; `TransfusionProcessor.for_model(model, tokenizer)` adds "
                "them and resizes the model's embeddings, `new_transfusion(tokenizer)` makes a model."
            )
        self.image_token_id, self.image_start_token_id, self.image_end_token_id = (vocabulary[t] for t in tokens)
        self.vision_token_id = vocabulary.get(vision_token)
        self.text_format = text_format
        if text_format is not None and (text_format.count("{}") != 1 or text_format.startswith("{}")):
            raise ValueError(
                f"`text_format` must hold one {{}} where the text goes, after what begins a text; got {text_format!r}."
            )
        if (vision_token is None) != (image_processor.vision_size is None):
            raise ValueError("`vision_token` and the image processor's `vision_size` belong together; pass both.")
        if chat_template is None:
            flatten = _FLATTEN_CONTENT.replace("IMAGE", repr(image_token))
            own: Any = getattr(tokenizer, "chat_template", None) or _PLAIN_CHAT_TEMPLATE
            is_named = isinstance(own, dict)
            chat_template = {name: flatten + one for name, one in own.items()} if is_named else flatten + own
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """As for any processor. For an adapter without a processor, loads the base model's."""
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
        config = model.config
        names = IMAGE_TOKENS if config.vision_config is None else {**IMAGE_TOKENS, **VISION_TOKEN}
        tokens = {name: kwargs.pop(name, default) for name, default in names.items()}
        add_image_tokens(tokenizer, tokens)
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
            vision: Any = {}
            if config.vision_config is not None:
                longest, side = config.vision_config.image_size, config.vision_config.patch_size
                edges = {"shortest_edge": min(224, longest), "longest_edge": longest}
                vision = {"vision_size": edges, "vision_size_divisor": side}
            means = {"image_mean": half, "image_std": half}
            image_processor = TransfusionImageProcessor(
                size=size, crop_size=crop_size, do_convert_rgb=channels == 3, **means, **vision
            )
        sides = {"pixels_per_patch": config.pixels_per_patch, "patch_size": config.patch_size}
        return cls(image_processor, tokenizer, **sides, **tokens, **kwargs)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        latents: Sequence[torch.Tensor] | None = None,
        return_labels: bool | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Each row begins with the tokenizer's beginning-of-sequence token if it adds one, and only once, whether the
        text holds it or not. A prompt ends as its text does, though the tokenizer may add an end-of-sequence token;
        with `return_labels` it ends with one. An empty text without beginning-of-sequence token becomes
        `image_start_token`: the unconditional drawing.

        Args:
            images (`ImageInput`, *optional*): One per marker in the texts, in order.
            text (`str` or `list[str]`): With an `image_token` for each image.
            latents (`list[torch.FloatTensor]` of shapes `(latent_channels, height, width)`, *optional*):
                Output of `model.encode_images`, instead of `images`. `kwargs` then go to the tokenizer.
            return_labels (`bool`, *optional*): Whether to add the labels for training.
            kwargs: As for any processor. Texts are padded on the left unless `padding_side` is passed.

        Returns:
            `BatchFeature` with `input_ids` and `attention_mask` of shape `(batch, seq)`, `pixel_values` of shape
            `(num_images, channels, height, width)` in [−1, 1] (a list if sizes differ) or `latents`, and `labels`.

        Raises:
            ValueError: images in another number than markers, sides that are no multiple of a patch, a `max_length`
                that cuts an image, both images and latents.
        """
        options = self._pop_text_options(kwargs, is_batch=not isinstance(text, str))
        if text is None:
            return self._to_tensors(super().__call__(images=images, **kwargs), options["return_tensors"])
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ValueError("`text` must hold at least one text; got an empty list.")
        images = None if isinstance(images, (list, tuple)) and len(images) == 0 else images
        if self.text_format is not None:
            texts = [self._formatted(one, self.text_format) for one in texts]
        if not (options["add_special_tokens"] and self.missing_ends([])[0]):
            texts = [one or self.image_start_token for one in texts]
        if latents is None or len(latents) == 0:
            features = super().__call__(images, texts, add_special_tokens=False, padding=False, **kwargs)
        else:
            if images is not None:
                raise ValueError("Pass `images` or `latents`, not both.")
            self._check_markers(texts, "latents", latents)
            blocks = [self.replace_image_token({"latents": latents}, i) for i in range(len(latents))]
            texts, offsets = self.get_text_with_replacements(texts, blocks)
            returns_offsets = kwargs.pop("return_text_replacement_offsets", False)
            features = BatchFeature(dict(self.tokenizer(texts, add_special_tokens=False, **kwargs)))
            features.update({"text_replacement_offsets": offsets} if returns_offsets else {})
            is_stack = len({latent.shape for latent in latents}) == 1
            features["latents"] = torch.stack(list(latents)) if is_stack else list(latents)
        features.update(self._finish_rows(features, options, is_prompt=not return_labels))
        self._to_tensors(features, options["return_tensors"])
        if return_labels:
            ids, mask = (torch.as_tensor(features[name]) for name in ("input_ids", "attention_mask"))
            tokens = (self.image_start_token_id, self.image_token_id, self.image_end_token_id, self.vision_token_id)
            features["labels"] = make_labels(ids, mask, *tokens)
        return features

    def _formatted(self, text: str, text_format: str) -> str:
        start, end = text_format.split("{}")
        markers = "|".join(re.escape(token) for token in (self.image_token, self.image_start_token))

        def put(part: str) -> str:
            is_done = part in ("", end, self.image_token, self.image_start_token) or start in part
            return part if is_done else start + part.removesuffix(end) + end

        return "".join(put(part) for part in re.split(f"({markers})", text))

    def _to_tensors(self, features: BatchFeature, kind: str | None) -> BatchFeature:
        """Converts all but lists of images, which have several sizes: the library would stack them and fail."""
        names = ("pixel_values", "vision_pixel_values", "latents")
        lists = [name for name in names if isinstance(features.get(name), list)]
        features.skip_tensor_conversion = [*self.skip_tensor_conversion, *lists]
        return features.convert_to_tensors(kind)

    def validate_inputs(self, images=None, text=None, **kwargs: Any) -> None:
        """Raises `ValueError` unless each marker has its image. The library calls it with what it has fetched."""
        if text is None:
            return super().validate_inputs(images=images, text=text, **kwargs)
        nested = [] if images is None else images
        self._check_markers(text, "images", make_flat_list_of_images(nested))
        if isinstance(nested, list) and any(isinstance(row, list) for row in nested):
            counts = [len(row) if isinstance(row, list) else 1 for row in nested]
            if counts != (marked := [one.count(self.image_token) for one in text]):
                raise ValueError(f"`images` has {counts} images by row, but `text` marks {marked}; nest them alike.")

    def _check_markers(self, texts: list[str], name: str, images: Sequence[Any]) -> None:
        if (num_markers := "".join(texts).count(self.image_token)) != len(images):
            raise ValueError(
                f"`text` has {num_markers} markers {self.image_token} but `{name}` holds {len(images)} images; the "
                f"number of {self.image_token} tokens in the prompts should be the same as the number of images."
            )

    def _pop_text_options(self, kwargs: dict[str, Any], is_batch: bool) -> dict[str, Any]:
        """Takes `_TEXT_OPTIONS` out of `kwargs` and the dicts in it; the tokenizer's own come after, then ours."""
        # The padding side is not the tokenizer's: a prompt ends where generation begins.
        options = {"return_tensors": "pt", "add_special_tokens": True, "padding": is_batch, "padding_side": "left"}
        init = self.tokenizer.init_kwargs
        options |= {name: init[name] for name in ("padding", "truncation", "max_length") if name in init}
        for group in ("common_kwargs", "text_kwargs"):
            given = dict(kwargs.pop(group, {}))
            twice = [name for name in _TEXT_OPTIONS if name in given and name in kwargs]
            if twice and group == "text_kwargs":
                raise ValueError(f"`{twice[0]}` was passed twice, alone and in `{group}`; pass it once.")
            options |= {name: given.pop(name) for name in _TEXT_OPTIONS if name in given}
            kwargs |= {group: given} if given else {}
        return options | {name: kwargs.pop(name) for name in _TEXT_OPTIONS if name in kwargs}

    def missing_ends(self, ids: list[int], is_prompt: bool = False) -> tuple[list[int], list[int]]:
        """What the tokenizer adds before and behind a text and `ids` lack; behind a prompt nothing is added."""
        probe = self.tokenizer("a", return_special_tokens_mask=True)
        pairs = list(zip(probe["input_ids"], probe["special_tokens_mask"], strict=True))
        ends = (takewhile(lambda pair: pair[1], order) for order in (pairs, pairs[::-1]))
        before, after = ([token for token, _ in end] for end in ends)
        after = [] if is_prompt or ids[len(ids) - len(after) :] == after[::-1] else after[::-1]
        return [] if ids[: len(before)] == before else before, after

    def _finish_rows(self, features, options: dict[str, Any], is_prompt: bool) -> dict[str, Any]:
        """Adds the special tokens that a row does not have yet, truncates and pads."""
        strategy, limit, truncation = options["padding"], options.get("max_length"), options.get("truncation")
        if truncation is None:  # as tokenizers do
            truncation = limit is not None and strategy in (False, "do_not_pad")
        if truncation in (False, "do_not_truncate"):
            limit = None
        elif limit is None:
            limit = self.tokenizer.model_max_length
        rows: dict[str, list[list[Any]]] = {name: [] for name in ("input_ids", *_PER_TOKEN) if name in features}
        for i, ids in enumerate(features["input_ids"]):
            first, last = self.missing_ends(ids, is_prompt) if options["add_special_tokens"] else ([], [])
            kept = slice(0, len(ids))
            if limit is not None and (room := max(0, limit - len(first) - len(last))) < len(ids):
                kept = self._truncated(i, ids, room, limit)
            rows["input_ids"].append(first + ids[kept] + last)
            for name, (added, _) in _PER_TOKEN.items():
                if name in rows:
                    rows[name].append([added] * len(first) + list(features[name][i][kept]) + [added] * len(last))
        by_hand = {name: rows.pop(name) for name in ("mm_token_type_ids", "offset_mapping") if name in rows}
        pad_options = {name: options.get(name) for name in ("pad_to_multiple_of", "padding_side")}
        if strategy == "max_length":
            pad_options["max_length"] = options.get("max_length")
        padded = dict(self.tokenizer.pad(rows, padding=strategy, **pad_options))
        for name, values in by_hand.items():
            for row, ids in zip(values, padded["input_ids"], strict=True):
                padding = [_PER_TOKEN[name][1]] * (len(ids) - len(row))
                row[:] = padding + row if options["padding_side"] == "left" else row + padding
        return padded | by_hand

    def _truncated(self, index: int, ids: list[int], room: int, max_length: int) -> slice:
        """The `room` ids that truncation keeps; `ValueError` if it drops any part of an image."""
        is_left = self.tokenizer.truncation_side == "left"
        cut = len(ids) - room if is_left else room
        # An image goes along with the ids on both its sides, which may be all that is cut off of it.
        dropped = ids[: cut + 1] if is_left else ids[max(0, cut - 1) :]
        if self.image_token_id in dropped or self.vision_token_id in dropped:
            raise ValueError(
                f"`max_length` is {max_length}, which cuts an image of row {index}; raise it, or pass "
                "`truncation=False`."
            )
        return slice(cut, None) if is_left else slice(cut)

    def apply_chat_template(self, conversation, chat_template: str | None = None, **kwargs: Any) -> Any:
        """
        As for any processor. Content is text: with `tokenize=True`, an `image_token` or another special token that
        somebody typed is encoded as plain text. Images are parts of their own, `{"type": "image", "image": ...}`, with
        what [`read_picture`] takes under `image`, `url` or `path`.

        Raises:
            ValueError: a part that is neither text nor image; special tokens in the content, which
                `return_assistant_tokens_mask` would take for those of the template.
        """
        chats, is_batch = self._normalize_conversations(conversation)
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        typed: set[str] = set()
        for message in chain(*chats):
            parts = [part for _, part in chat_parts([message])]
            typed |= {token for token in special for part in parts if token in part.get("text", "")}
            if not isinstance(message.get("content"), (str, type(None))):
                message["content"] = parts
        if typed and kwargs.get("return_assistant_tokens_mask"):
            raise ValueError(
                f"`conversation` holds {', '.join(sorted(typed))} as text, which "
                "`return_assistant_tokens_mask` cannot tell from the template's; remove it."
            )
        if typed and kwargs.get("tokenize"):
            kwargs.setdefault("sanitize_control_tokens", True)
        return super().apply_chat_template(chats if is_batch else chats[0], chat_template=chat_template, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, read_images_as=None, **kwargs: Any) -> str:
        """
        `<BOI>`, a placeholder for each patch, `<EOI>`; or two such blocks. `image_inputs` holds `latents`, or
        `pixel_values` and `vision_pixel_values` of the images that are read so.
        """
        if "latents" in image_inputs:
            return self._block(image_inputs["latents"], image_idx, "latents", self.patch_size, self.image_token)
        if not isinstance(read_images_as, (list, tuple)):
            kinds = self.image_processor.kinds(read_images_as, image_idx + 1)
        else:
            kinds = list(read_images_as)
        ways: list[Any] = [("latents", "pixel_values", self.pixels_per_patch, self.image_token)]
        ways.append(("vision", "vision_pixel_values", self.image_processor.vision_size_divisor, self.vision_token))
        blocks = ""
        for kind, name, side, token in ways:
            if kinds[image_idx] in (kind, "both"):
                index = sum(one in (kind, "both") for one in kinds[:image_idx])
                blocks += self._block(image_inputs[name], index, "images", side, token)
        return blocks

    def _block(self, images: Sequence[torch.Tensor], image_idx: int, name: str, side: int, token: str) -> str:
        height, width = images[image_idx].shape[-2:]
        if height % side or width % side:
            raise ValueError(
                f"`{name}`: image {image_idx} is {height} × {width} pixels as the model takes it; its sides must be "
                f"multiples of {side}, one patch. Resize or crop it."
            )
        num_patches = (height // side) * (width // side)
        return self.image_start_token + token * num_patches + self.image_end_token

    def batch_decode(self, sequences, *args: Any, **kwargs: Any) -> list[str]:
        return super().batch_decode(_ids_alone(sequences), *args, **kwargs)

    def decode(self, token_ids, *args: Any, **kwargs: Any) -> str | list[str]:
        return super().decode(_ids_alone(token_ids), *args, **kwargs)

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
