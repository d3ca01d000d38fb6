"""From texts and images to training batches: order, noise limit, caption dropout, padding or packing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, compress, groupby, islice
from typing import Any

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from ..diffusion_transfusion import BatchCounts
from ..masking_transfusion import image_block_ids, make_packed_plan
from ..processing_transfusion import TransfusionProcessor, chat_parts


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
    """
    The images of a sample, from `images` or `image`, which are `None` where a dataset mixes in plain text, or from the
    parts of `messages`.
    """
    image, images = sample.get("image"), sample.get("images")
    if image is not None and images is not None:
        raise ValueError("A sample holds its images in `image` or in `images`; got both.")
    if image is not None:
        return [image]
    if images is not None:
        return list(images)
    found = []
    for _, part in chat_parts(sample.get("messages") or ()):
        url = part.get("image_url")
        given = {**part, "url": url["url"] if isinstance(url, dict) else url} if url else part
        found += [given[key] for key in ("image", "url", "path") if key in given]
    return found


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


def tokenized_text(sample: dict[str, Any], processor: TransfusionProcessor) -> str:
    """The text of a sample as it is tokenized, with an end of sequence."""
    text, end = text_of(sample), processor.tokenizer.eos_token or ""
    return text if text.rstrip().endswith(end) else text + end


@dataclass
class _Sample:
    text: str
    images: list[Any]  # as they came, and then pixels
    latents: list[torch.Tensor]
    max_timesteps: list[int]
    image_loss_mask: list[bool]
    read_images_as: list[str]
    seen: list[torch.Tensor] = field(default_factory=list)  # pixels for the vision encoder
    input_ids: Any = None
    labels: Any = None


@dataclass
class TransfusionDataCollator:
    """
    Batches samples for [`TransfusionTrainer`], or the stock `Trainer` with `remove_unused_columns=False`. Each sample
    gets its own row, padded at the right. With `max_length`, samples are packed into rows of that length instead, by
    first-fit. Documents in a row do not see each other: their positions restart at 0, which transformers and
    `"transfusion_varlen"` understand.

    A sample is a dict with `text` and, in `image` or the list `images`, its images; or, in `latents`, one latent of
    shape `(latent_channels, height, width)` or a list of them. Optional keys with one value per image:
    `image_loss_mask` (`bool`, `False` for clean context), `max_timesteps` (`int`), and `read_images_as` (`str`), which
    for images to be drawn is `"latents"` by default, and for clean context the processor's default.

    Instead of `text`, a sample may hold a chat in `messages`, with its images in the parts or, in their order, in
    `images` or `latents` (and `tools`); the processor's chat template writes it.

    Text that marks the places of its images with the processor's image token stays as it is. Otherwise it is the
    caption of one image, and torch's global generator decides which comes first.

    Args:
        processor (`TransfusionProcessor`)
        caption_first_probability (`float`, defaults to 0.8): How often a caption precedes its image (§4.1).
        caption_dropout (`float`, defaults to 0.1): How often such a caption is dropped, which teaches the
            unconditional context of guidance. NOTE: the paper does not give a rate; 0.1 is the usual one.
        image_first_max_timesteps (`int`, *optional*): Limit of t for images before their caption; by default half
            of `num_train_timesteps`, as in the paper (500 of 1,000, §4.3.4).
        num_train_timesteps (`int`, defaults to 1000): T of the model, the noise limit of all other images.
        max_length (`int`, *optional*): Pack samples into rows of this length.
        assistant_only_loss (`bool`, defaults to `False`): In chats, train only on what the assistant says and draws;
            other images are clean context. The template must enclose it in `{% generation %}`, `{% endgeneration %}`.
        truncation (`bool`, defaults to `False`): Cut longer samples, before an image rather than within.
        return_varlen_plan (`bool`, defaults to `False`): Make the plan of packed rows for
            `attn_implementation="transfusion_varlen"` in the data loader's workers rather than in `forward`.

    Returns, when called, a dict of `input_ids` and `labels` of shape `(batch, seq)`; `attention_mask` of that shape
    or, when packed, `position_ids` (and `varlen_plan`); if there are images, `max_timesteps` and `image_loss_mask` of
    shape `(num_images,)`, and `pixel_values` of shape `(num_images, channels, height, width)` or `latents`; and
    `batch_counts`, with which a training step does not wait for the device.

    Raises:
        ValueError: images and latents in one batch, a probability outside of 0 to 1, several unmarked images, a
            sample without a string in `text`, a sample or an image longer than `max_length`.
    """

    processor: TransfusionProcessor
    caption_first_probability: float = 0.8
    caption_dropout: float = 0.1
    image_first_max_timesteps: int | None = None
    num_train_timesteps: int = 1000
    max_length: int | None = None
    assistant_only_loss: bool = False
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
        if self.image_first_max_timesteps is None:
            self.image_first_max_timesteps = max(1, self.num_train_timesteps // 2)
        if not 1 <= self.image_first_max_timesteps <= self.num_train_timesteps:
            what = f"1 to `num_train_timesteps`, {self.num_train_timesteps}"
            raise ValueError(f"`image_first_max_timesteps` must lie in {what}; got {self.image_first_max_timesteps}.")

    @property
    def fill_rate(self) -> float:
        """Share of the packed rows so far that is not padding, counted in workers, too; NaN before the first row."""
        tokens, room = self._filled.tolist()
        return tokens / room if room else math.nan

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if not features:
            raise ValueError("`features` must hold at least one sample; got none.")
        samples = [self._read(feature) for feature in features]
        if any(sample.images for sample in samples) and any(sample.latents for sample in samples):
            raise ValueError("Pass `images` or `latents`, not both.")
        self._tokenize([sample for sample in samples if sample.input_ids is None])
        batch = self._pad(samples) if self.max_length is None else self._pack(samples, self.max_length)
        for name, attribute in (("pixel_values", "images"), ("latents", "latents"), ("vision_pixel_values", "seen")):
            if tensors := [x for sample in samples for x in getattr(sample, attribute)]:
                batch[name] = torch.stack(tensors) if len({x.shape for x in tensors}) == 1 else tensors
        num_noised_images: list[int] = []
        if "pixel_values" in batch or "latents" in batch:
            for name in ("max_timesteps", "image_loss_mask"):
                batch[name] = torch.tensor([*chain(*(getattr(sample, name) for sample in samples))])
            images = batch["pixel_values"] if "pixel_values" in batch else batch["latents"]
            pairs = zip(images, batch["image_loss_mask"].tolist(), strict=True)
            runs = groupby(pairs, key=lambda pair: pair[0].shape)
            num_noised_images = [sum(is_noised for _, is_noised in run) for _, run in runs]
        batch["batch_counts"] = BatchCounts(int((batch["labels"][:, 1:] != -100).sum()), num_noised_images)
        return batch

    def _sample(self, feature: dict[str, Any], text: str, limits: list[int], masks: list[bool]) -> _Sample:
        """A sample whose `max_timesteps` and `image_loss_mask` are, unless it says otherwise, these."""
        images, latents = images_of(feature), latents_of(feature)
        masks = per_image(feature, "image_loss_mask", masks)
        limits = per_image(feature, "max_timesteps", limits)
        (default,) = self.processor.image_processor.kinds(None, 1)
        kinds = ["latents" if latents or mask else default for mask in masks]
        kinds = per_image(feature, "read_images_as", kinds)
        if any(mask and kind == "vision" for mask, kind in zip(masks, kinds, strict=True)):
            raise ValueError("`read_images_as` is 'vision' for an image with a loss; set its `image_loss_mask` False.")
        if latents and set(kinds) != {"latents"}:
            raise ValueError("`read_images_as`: a vision encoder reads images, and the sample holds latents.")
        has_latents = [kind != "vision" for kind in kinds]
        if not all(1 <= limit <= self.num_train_timesteps for limit in limits):
            raise ValueError(f"`max_timesteps` must lie in 1 to {self.num_train_timesteps}; got {limits}.")
        per_latent = ([*compress(limits, has_latents)], [*compress(masks, has_latents)])
        return _Sample(text, images, latents, *per_latent, kinds)

    def _read(self, feature: dict[str, Any]) -> _Sample:
        """A sample whose images have their markers, or parts of a chat, which has its ids then."""
        if feature.get("messages"):
            return self._read_chat(feature)
        images, latents, text = images_of(feature), latents_of(feature), text_of(feature)
        num_images, marker = len(images) + len(latents), self.processor.image_token
        limit: Any = self.num_train_timesteps
        if num_images and marker not in text:
            if num_images > 1:
                what = f"`text` marks no image but {num_images} images belong to it"
                raise ValueError(f"{what}; put one {marker} where each stands.")
            order, dropout = torch.rand(2).tolist()
            if order >= self.caption_first_probability:
                text, limit = marker + text, self.image_first_max_timesteps
            else:
                text = marker if dropout < self.caption_dropout else text + marker
        text = tokenized_text({"text": text}, self.processor)
        return self._sample(feature, text, [limit] * num_images, [True] * num_images)

    def _read_chat(self, feature: dict[str, Any]) -> _Sample:
        is_masked, parts = self.assistant_only_loss, list(chat_parts(feature["messages"]))
        roles = [role for role, part in parts if part["type"] != "text"]
        masks = [not is_masked or role == "assistant" for role in roles]
        sample = self._sample(feature, "", [self.num_train_timesteps] * len(roles), masks)
        contents: dict[str, Any] = {}
        if sample.latents:
            contents = {"latents": sample.latents}
        elif sample.images:
            contents = {"images": sample.images, "read_images_as": sample.read_images_as}
        row = self.processor.apply_chat_template(
            feature["messages"],
            tools=feature.get("tools"),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=is_masked,
            processor_kwargs={"return_labels": True, **contents},
        )
        labels = row["labels"][0]
        if is_masked:
            is_assistant = torch.tensor(row["assistant_masks"][0]).bool()
            if not is_assistant.any() and any(role == "assistant" for role, _ in parts):
                raise ValueError(
                    "`assistant_only_loss` needs a chat template that encloses what the assistant says in "
                    "`{% generation %}` and `{% endgeneration %}`; pass one to the processor as `chat_template`."
                )
            labels = labels.masked_fill(~is_assistant, -100)
        sample.images, sample.seen = (list(row.get(name, ())) for name in ("pixel_values", "vision_pixel_values"))
        sample.input_ids, sample.labels = row["input_ids"][0], labels
        return sample

    def _tokenize(self, samples: list[_Sample]) -> None:
        """Gives samples their ids, labels and pixels."""
        if not samples:
            return
        images, latents = ([*chain(*(getattr(s, name) for s in samples))] for name in ("images", "latents"))
        texts = [sample.text for sample in samples]
        contents: dict[str, Any] = {"text": texts, "images": images, "latents": latents}
        if images:
            contents["read_images_as"] = [*chain(*(sample.read_images_as for sample in samples))]
        batch = self.processor(**contents, return_labels=True, padding=True, padding_side="right")
        pixels, seen = (iter(batch.get(name, ())) for name in ("pixel_values", "vision_pixel_values"))
        rows = zip(samples, batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True)
        for sample, ids, labels, is_real in rows:
            sample.input_ids, sample.labels = ids[is_real], labels[is_real]
            if sample.images:
                sample.images = list(islice(pixels, sum(kind != "vision" for kind in sample.read_images_as)))
                sample.seen = list(islice(seen, sum(kind != "latents" for kind in sample.read_images_as)))

    def _pad(self, samples: list[_Sample]) -> dict[str, Any]:
        rows = [sample.input_ids for sample in samples]
        pad_token_id = self.processor.tokenizer.pad_token_id
        return {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in rows], batch_first=True),
            "labels": pad_sequence([s.labels for s in samples], batch_first=True, padding_value=-100),
        }

    def _pack(self, samples: list[_Sample], max_length: int) -> dict[str, Any]:
        """Packs whole samples into rows, and brings them into the order of the rows."""
        for i, sample in enumerate(samples):
            if len(sample.input_ids) > max_length:
                end = self._find_cut(i, sample.input_ids, max_length)
                sample.input_ids, sample.labels = sample.input_ids[:end], sample.labels[:end]
                num_kept, num_seen = (int(self._blocks(sample.input_ids, kind).amax()) + 1 for kind in range(2))
                for name in ("images", "latents", "max_timesteps", "image_loss_mask"):
                    setattr(sample, name, getattr(sample, name)[:num_kept])
                sample.seen = sample.seen[:num_seen]
        packed: dict[str, list[torch.Tensor]] = {"input_ids": [], "labels": [], "position_ids": []}
        pad_token_id = self.processor.tokenizer.pad_token_id
        rows = first_fit([len(sample.input_ids) for sample in samples], max_length)
        for row in rows:
            lengths = [len(samples[i].input_ids) for i in row]
            padding = max_length - sum(lengths)
            for name, value in (("input_ids", pad_token_id), ("labels", -100)):
                ids = torch.cat([getattr(samples[i], name) for i in row])
                packed[name].append(pad(ids, (0, padding), value=value))
            packed["position_ids"].append(torch.cat([torch.arange(length) for length in (*lengths, padding)]))
        result: dict[str, Any] = {name: torch.stack(tensors) for name, tensors in packed.items()}
        self._filled += torch.tensor([sum(len(sample.input_ids) for sample in samples), len(rows) * max_length])
        if self.return_varlen_plan:
            ids, positions = result["input_ids"], result["position_ids"]
            result["varlen_plan"] = make_packed_plan(ids, positions, *self._token_ids)
        samples[:] = [samples[i] for row in rows for i in row]
        return result

    @property
    def _token_ids(self) -> list[int]:
        """The ids of the placeholders: for latents, and for what a vision encoder sees."""
        ids = (self.processor.image_token_id, self.processor.vision_token_id)
        return [token_id for token_id in ids if token_id is not None]

    def _blocks(self, ids: torch.Tensor, kind: int) -> torch.Tensor:
        return image_block_ids(ids[None], *(self._token_ids[kind : kind + 1] or [-1]))

    def _find_cut(self, index: int, ids: torch.Tensor, max_length: int) -> int:
        """Where to cut a sample that is too long: before an image rather than within."""
        edges = pad(torch.isin(ids, torch.tensor(self._token_ids)).int(), (1, 1)).diff()
        starts = ((edges == 1).nonzero()[:, 0] - 1).tolist()  # `<BOI>` and
        ends = (edges == -1).nonzero()[:, 0].tolist()  # `<EOI>`, which a text may also hold without an image
        longest = max((end - start + 1 for start, end in zip(starts, ends, strict=True)), default=0)
        if longest > max_length or not self.truncation:
            what = f"an image of {longest}" if longest > max_length else f"{len(ids)}"
            remedy = "raise it, shrink the image, or for text pass `truncation=True`"
            raise ValueError(f"`max_length` is {max_length}, but sample {index} has {what} tokens; {remedy}.")
        return next((s for s, end in zip(starts, ends, strict=True) if s < max_length <= end), max_length)


def per_image(feature: dict[str, Any], name: str, defaults: list[Any]) -> list[Any]:
    """What a sample has in `name`, one value or a list, for each of its images, which have these defaults."""
    values = defaults if feature.get(name) is None else feature[name]
    values = [values] if isinstance(values, (bool, int, str)) else list(values)
    if len(values) != len(defaults):
        raise ValueError(f"`{name}` must hold one value for each of {len(defaults)} images; got {len(values)}.")
    return values
