"""
Drawing (§3, Inference, arXiv 2408.11039): from pure noise to images, behind prefixes that are read once.

Time runs from t = T − 1, noise, down to t = 0. Each step overwrites the patches of the step before, in the sequence
and in the cache. Guidance adds further contexts of the same images; all contexts go through one pass.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.guiders.guider_utils import rescale_noise_cfg
from diffusers.utils.torch_utils import randn_tensor
from torch.nn.functional import max_pool2d
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, CompileConfig, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.utils import logging

from .configuration_transfusion import TransfusionConfig, image_token_ids, is_rae
from .diffusion_transfusion import (
    at_least_float32,
    at_timestep,
    clip_x_0,
    guide,
    is_flow,
    limit_norm,
    make_sampling_scheduler,
    must_clip_x_0,
    sampling_step_kwargs,
    shift_timesteps,
)
from .masking_transfusion import attention_block_ids, create_transfusion_mask, share_positions

States = tuple[torch.Tensor, torch.Tensor]  # keys and values of a layer, `(rows, heads, columns, dim)` each


@dataclass
class DrawingArguments:
    """What `generate()` takes besides the library's own parameters; it says what each means. Checked by `validate`."""

    generation_mode: str | None = None
    num_inference_steps: int = 250
    image_guidance_scale: float = 3.0
    input_image_guidance_scale: float | None = None
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    guidance_rescale: float = 0.0
    guidance_type: str = "instruct_pix2pix"
    guidance_interval: Sequence[float] | None = None
    guidance_renorm: str | None = None
    guidance_renorm_min: float = 0.0
    timestep_shift: float | None = None
    strength: float = 1.0
    max_images: int | None = None
    progress_bar: bool = False
    height: int | Sequence[int] | None = None
    width: int | Sequence[int] | None = None
    scheduler: SchedulerMixin | str | None = None
    # These belong to one call; a generation config does not hold them.
    generator: torch.Generator | list[torch.Generator] | None = None
    callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None
    timesteps: Sequence[float] | torch.Tensor | None = None
    sigmas: Sequence[float] | torch.Tensor | None = None
    init_image: torch.Tensor | None = None
    mask_image: torch.Tensor | None = None
    init_noise: torch.Tensor | None = None
    negative_prompt_ids: torch.LongTensor | None = None
    negative_prompt_attention_mask: torch.Tensor | None = None

    @property
    def unconditional_scale(self) -> float:
        """How far the prediction is moved away from that of the unconditional context; 1 leaves nothing of it."""
        scale = self.input_image_guidance_scale
        return self.image_guidance_scale if scale is None else scale

    @property
    def has_guidance(self) -> bool:
        return not self.image_guidance_scale == 1 == self.unconditional_scale

    def validate(self) -> None:
        """Raises `ValueError` for values out of range and for options that contradict each other."""
        start, end = self.guidance_start, self.guidance_end
        if not 0 <= start <= end <= 1:
            raise ValueError(f"`guidance_start`, `guidance_end`: expected 0 ≤ start ≤ end ≤ 1; got {start} and {end}.")
        for name in ("init_image", "init_noise"):
            if getattr(self, name) is not None and self.generation_mode != "image":
                raise ValueError(f"`{name}` belongs to one drawing of each row; pass `generation_mode='image'`.")
        if self.init_image is None and (self.mask_image is not None or self.strength != 1):
            raise ValueError("`mask_image` and `strength` need an `init_image` to begin with.")
        if self.init_image is not None and self.mask_image is None and self.strength == 1:
            raise ValueError("`init_image` does nothing at a `strength` of 1; lower it, or pass a `mask_image`.")
        if not 0 < self.strength <= 1:
            raise ValueError(f"`strength` must lie above 0 and up to 1; got {self.strength}.")
        if self.max_images is not None and self.max_images < 0:
            raise ValueError(f"`max_images` must be 0 or more, or None; got {self.max_images}.")
        if not 0 <= self.guidance_rescale <= 1:
            raise ValueError(f"`guidance_rescale` must lie in 0 to 1; got {self.guidance_rescale}.")
        self._validate_guidance()
        scale = self.image_guidance_scale if self.guidance_type == "nested" else self.unconditional_scale
        if self.negative_prompt_ids is not None and scale == 1:
            raise ValueError("`negative_prompt_ids` does nothing at a guidance scale of 1; raise it or drop them.")

    def _validate_guidance(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {allowed}; got {getattr(self, name)!r}.")
        is_nested = self.guidance_type == "nested"
        if self.guidance_renorm is not None and not self.has_guidance:
            raise ValueError("`guidance_renorm` does nothing without guidance; raise `image_guidance_scale`.")
        if self.guidance_renorm == "text_channel" and not is_nested:
            raise ValueError(
                "`guidance_renorm='text_channel'` needs `guidance_type='nested'`, where text comes first."
            )
        interval = self.guidance_interval
        if interval is not None and not (len(interval) == 2 and 0 <= interval[0] <= interval[1] <= 1):
            raise ValueError(f"`guidance_interval` must be (low, high) with 0 ≤ low ≤ high ≤ 1; got {interval}.")
        if self.timestep_shift is not None and not self.timestep_shift > 0:
            raise ValueError(f"`timestep_shift` must be positive; got {self.timestep_shift}.")

    def is_guided(self, step: int, num_steps: int, t: torch.Tensor, num_train_timesteps: int) -> bool:
        """Whether guidance is on in this step, at t."""
        if self.guidance_interval is not None and not (
            self.guidance_interval[0] < float(t) / num_train_timesteps <= self.guidance_interval[1]
        ):
            return False
        return self.guidance_start <= step / num_steps < self.guidance_end

    def sampling_scheduler(self, noise_scheduler: SchedulerMixin) -> SchedulerMixin:
        """
        The scheduler, ready for the steps to take. They stay on the CPU, where the loop looks at them without a wait.
        Raises `ValueError` as [`make_sampling_scheduler`] does.
        """
        sigmas = self.sigmas
        if self.timestep_shift is not None:
            if not is_flow(noise_scheduler) or self.timesteps is not None or sigmas is not None:
                raise ValueError("`timestep_shift` is for flow matching, without `timesteps` and `sigmas`.")
            sigmas = shift_timesteps(
                1 - torch.arange(self.num_inference_steps) / self.num_inference_steps, self.timestep_shift
            )
        steps = (self.num_inference_steps, "cpu", self.timesteps, sigmas)
        return make_sampling_scheduler(noise_scheduler, self.scheduler, *steps)

    def sizes(self, config: TransfusionConfig, num_rows: int) -> list[tuple[int, int]]:
        """Height and width of the latents that each row draws. Raises `ValueError` if patches do not fill them."""
        unit, both = config.pixels_per_patch, []
        for name, default in zip(("height", "width"), config.latent_size, strict=True):
            given = getattr(self, name)
            sides = list(given) if isinstance(given, (list, tuple)) else [given] * num_rows
            are_patches = (x is None or (isinstance(x, int) and x > 0 and x % unit == 0) for x in sides)
            if len(sides) != num_rows or not all(are_patches):
                raise ValueError(
                    f"`{name}` must be a positive multiple of {unit} pixels (VAE factor × patch), or a list with one "
                    f"for each of {num_rows} rows; got {given!r}."
                )
            both.append([default if side is None else side // config.vae_scale_factor for side in sides])
        sizes = list(zip(*both, strict=True))
        if is_rae(config.vae_config) and set(sizes) != {config.latent_size}:
            pixels = " × ".join(str(side * config.vae_scale_factor) for side in config.latent_size)
            raise ValueError(
                f"`height` and `width` must be {pixels}, the one size of an `AutoencoderRAE`; leave them out."
            )
        return sizes


_CHOICES: dict[str, tuple] = {
    "guidance_type": ("instruct_pix2pix", "nested"),
    "guidance_renorm": (None, "global", "channel", "text_channel"),
}
# What `generation_config.json` may hold.
_NAMES = [field.name for field in fields(DrawingArguments)]
DRAWING_DEFAULTS = {name: getattr(DrawingArguments, name) for name in _NAMES[: _NAMES.index("generator")]}


def move_columns(layer: Any, length: int, rows: Any = slice(None), ends: torch.Tensor | None = None) -> States:
    """
    The `length` columns before `ends` (one for each of `rows`; by default the last) of keys and values. Columns that
    would lie before the first repeat it, or are 0 where there is none; they are padding.
    """
    states = (layer.keys[rows], layer.values[rows])
    keys, values = (x if x.shape[2] else x.new_zeros(*x.shape[:2], 1, x.shape[3]) for x in states)
    ends = torch.full((len(keys),), keys.shape[2]) if ends is None else ends
    columns = torch.arange(length, device=keys.device) + (ends.to(keys.device) - length)[:, None]
    columns = columns.clamp(min=0)[:, None, :, None]
    return tuple(part.gather(2, columns.expand(-1, part.shape[1], -1, part.shape[3])) for part in (keys, values))


@contextmanager
def undo_on_error(cache: Cache | None) -> Iterator[None]:
    """Restores a `DynamicCache` if the enclosed call raises, so that the same call can be made again."""
    layers: list[Any] = cache.layers if isinstance(cache, DynamicCache) else []
    # Keys and values are replaced, never written to: shallow copies keep them, and cost nothing.
    before = [copy.copy(layer) for layer in layers]
    try:
        yield
    except BaseException:
        layers[:] = before
        raise


def positions_of(ids: torch.LongTensor, mask: torch.Tensor, config: TransfusionConfig) -> torch.LongTensor:
    """Positions `(rows, columns)` that count from each row's first token, as the decoder takes them."""
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    if config.shared_image_position:
        positions, _ = share_positions(positions, attention_block_ids(ids, config))
    return positions


class DrawingLayer(CacheLayerMixin):
    """
    Keys and values of a prefix and, behind it, of an image: allocated once, never copied or grown. Each pass
    overwrites what is behind the prefix; a pass of fewer rows writes to the first ones.
    """

    is_sliding = False

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity
        self.prefix_length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        new = (key_states, value_states)
        self.keys, self.values = (x.new_zeros(*x.shape[:2], self.capacity, x.shape[-1]) for x in new)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> States:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, end = len(key_states), self.prefix_length + key_states.shape[2]
        self.keys[:rows, :, self.prefix_length : end] = key_states
        self.values[:rows, :, self.prefix_length : end] = value_states
        return self.keys[:rows, :, :end], self.values[:rows, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.prefix_length + query_length, 0

    def get_seq_length(self) -> int:
        return self.prefix_length

    def get_max_length(self) -> int:
        return self.capacity


@dataclass
class Prefixes:
    """
    What stands before the next image of each row, in one context.

    Args:
        ids (`list[torch.LongTensor]`): Without padding; the last one is `<BOI>`.
        latents (`list[list[torch.FloatTensor]]`): The images among the ids of each row that are not in `cache`.
        pad_token_id (`int`)
        seen (`list[list[torch.FloatTensor]]`, *optional*): The same for the vision encoder: pixels.
        cache (`DynamicCache`, *optional*):
            Keys and values of all ids but the last, pads at the left. Empty or `None`: they are still to be read.
        is_bos_alone (`bool`, defaults to `False`):
            Whether at most the first token of the conditional context, with its keys and values, is before `<BOI>`.
    """

    ids: list[torch.LongTensor]
    latents: list[list[torch.Tensor]]
    pad_token_id: int
    cache: DynamicCache | None = None
    is_bos_alone: bool = False
    seen: list[list[torch.Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.seen = self.seen or [[] for _ in self.ids]

    def forget_images(self) -> None:
        """Once they are in the cache."""
        self.latents, self.seen = [[] for _ in self.ids], [[] for _ in self.ids]

    def images(self, rows: Sequence[int]) -> dict[str, list[torch.Tensor]]:
        """Those of these rows, as arguments of the model."""
        given = {"latents": self.latents, "vision_pixel_values": self.seen}
        flat = {name: [image for row in rows for image in images[row]] for name, images in given.items()}
        return {name: images for name, images in flat.items() if images}

    @property
    def num_cached(self) -> int:
        return 0 if self.cache is None else self.cache.get_seq_length()

    @property
    def must_be_read(self) -> bool:
        """Whether anything stands before `<BOI>` that the conditional context has not."""
        return not self.is_bos_alone and any(len(row) > 1 for row in self.ids)

    def align(self, rows: list[torch.LongTensor], config: TransfusionConfig) -> tuple[torch.LongTensor, ...]:
        """Rows of ids as `(rows, columns)`, padded at the left, with their attention mask and their positions."""
        ids = pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id, padding_side="left")
        lengths = torch.tensor([len(row) for row in rows], device=ids.device)
        mask = torch.arange(ids.shape[1], device=ids.device) >= (ids.shape[1] - lengths)[:, None]
        return ids, mask.long(), positions_of(ids, mask, config)

    def read(self, model: PreTrainedModel) -> None:
        """Fills the cache of all rows, once, however many images are drawn."""
        if self.cache is None and self.must_be_read:
            ids, mask, _ = self.align([row[:-1] for row in self.ids], model.config)
            mask[mask.sum(dim=-1) == 0, -1] = 1  # a row without prefix sees a pad here; its drawing will not see it
            self.cache = DynamicCache()
            self.read_columns(model, ids, mask)

    def read_columns(self, model: PreTrainedModel, ids: torch.LongTensor, mask: torch.LongTensor) -> None:
        """Reads what the cache does not hold yet, of ids and mask `(rows, columns)` and the images."""
        start, positions = self.num_cached, positions_of(ids, mask, model.config)
        options = {"cache": self.cache, "use_cache": True, "logits_to_keep": 1, **self.images(range(len(ids)))}
        model(ids[:, start:], attention_mask=mask, position_ids=positions[:, start:], **options)


def guidance_prefixes(
    config: TransfusionConfig, arguments: DrawingArguments, prompts: Prefixes, sizes: list, bos_token_id: int | None
) -> list[Prefixes]:
    """
    The further contexts of guidance, for all rows: the images of the prompt without its text, with an
    `input_image_guidance_scale`, then the unconditional context. Nested: the prompt up to its last image, then its
    text without images. What the scales leave nothing of is left out.

    Args:
        prompts ([`Prefixes`]): The prompts, with or without `<BOI>` at their end, and all their images.
        sizes (`list[tuple[int, int]]`): Height and width of the latents that each row draws.
        bos_token_id (`int`, *optional*)

    Raises:
        ValueError: negative prompts of another number, with images or too long; no images to guide by.
    """
    boi = prompts.ids[0].new_tensor([config.image_start_token_id])
    bos = [row[:1] if row[:1].tolist() == [bos_token_id] else row[:0] for row in prompts.ids]
    is_nested, contexts = arguments.guidance_type == "nested", []
    image_ids = boi.new_tensor(image_token_ids(config))
    # Where the prompt itself asks for a drawing it ends with `<BOI>`.
    asked = [row[:-1] if len(row) and row[-1] == boi else row for row in prompts.ids]
    is_image = [torch.isin(row, image_ids) for row in asked]
    images, texts = ([row[i == keep] for row, i in zip(asked, is_image, strict=True)] for keep in (True, False))
    has_scale = arguments.input_image_guidance_scale not in (None, 1 if is_nested else arguments.image_guidance_scale)
    shown = [[*latents, *seen] for latents, seen in zip(prompts.latents, prompts.seen, strict=True)]
    for blocks, row in zip(images, shown, strict=True):
        is_hidden = int((blocks == boi).sum()) != len(row)
        if (has_scale and (is_hidden or not row)) or (is_nested and is_hidden):
            raise ValueError(
                f"`{'input_image_guidance_scale' if has_scale else 'guidance_type'}` guides by the images of the "
                "prompt, and a prompt has none (or they are in `cache`); leave it at its default."
            )
    texts = texts if has_scale else []
    if is_nested:
        nothing: list[list[torch.Tensor]] = [[] for _ in images]
        negative = _negative_prompts(config, arguments, sizes, boi)
        if negative is not None:
            if any(shown):
                raise ValueError("`negative_prompt_ids` has no images, and nested guidance would lose the prompt's.")
            contexts.append(Prefixes([torch.cat([row, boi]) for row in negative], nothing, prompts.pad_token_id))
        elif arguments.image_guidance_scale != 1:
            # Up to the last image: what stands behind it is the last text.
            ends = [
                int(i.nonzero()[-1]) + 1 if i.any() else len(start) for i, start in zip(is_image, bos, strict=True)
            ]
            rows = [torch.cat([row[:end], boi]) for row, end in zip(asked, ends, strict=True)]
            contexts.append(replace(prompts, ids=rows, is_bos_alone=not any(shown) and not texts))
        if texts:
            rows = [torch.cat([row, boi]) for row in texts]
            contexts.append(Prefixes(rows, nothing, prompts.pad_token_id))
        return contexts
    if texts:
        contexts.append(replace(prompts, ids=[torch.cat([*parts, boi]) for parts in zip(bos, images, strict=True)]))
    if arguments.unconditional_scale != 1:
        negative = _negative_prompts(config, arguments, sizes, boi)
        rows = [torch.cat([row, boi]) for row in (bos if negative is None else negative)]
        is_bos_alone = negative is None and not contexts
        contexts.append(Prefixes(rows, [[] for _ in rows], prompts.pad_token_id, is_bos_alone=is_bos_alone))
    return contexts


def _negative_prompts(config: TransfusionConfig, arguments: DrawingArguments, sizes: list, boi) -> list | None:
    """The ids of each row's negative prompt, without `<BOI>`."""
    ids, mask, num_rows = arguments.negative_prompt_ids, arguments.negative_prompt_attention_mask, len(sizes)
    if mask is not None and (ids is None or mask.shape != ids.shape):
        shape = None if ids is None else tuple(ids.shape)
        raise ValueError(
            "`negative_prompt_attention_mask` must have the shape of `negative_prompt_ids`; got "
            f"{tuple(mask.shape)} and {shape}."
        )
    if ids is None:
        return None
    if len(ids) not in (1, num_rows):
        raise ValueError(f"`negative_prompt_ids` has {len(ids)} rows for {num_rows} prompts; pass 1 or {num_rows}.")
    ids = ids.to(boi.device).expand(num_rows, -1)
    mask = torch.ones_like(ids) if mask is None else mask.to(boi.device).expand(num_rows, -1)
    if torch.isin(ids, ids.new_tensor(image_token_ids(config)[1:])).any():
        raise ValueError("`negative_prompt_ids` holds an image; a negative prompt is text.")
    rows = [row[keep.bool()] for row, keep in zip(ids, mask, strict=True)]
    rows = [row[:-1] if len(row) and row[-1] == boi else row for row in rows]
    num_positions = getattr(config.text_config, "max_position_embeddings", None)
    for i, (row, size) in enumerate(zip(rows, sizes, strict=True)):
        needed = len(row) + config.num_patches(*size) + 1  # <BOI>
        if num_positions is not None and needed > num_positions:
            raise ValueError(
                f"`negative_prompt_ids` has {len(row)} tokens for row {i}, which with <BOI> and the patches of an "
                f"image are {needed}, and `max_position_embeddings` is {num_positions}; shorten the negative prompt."
            )
    return rows


def combine(predictions: list[torch.Tensor], arguments: DrawingArguments, patch_size: int) -> torch.Tensor:
    """
    The guided prediction. With a scale s_I of the input image apart from the scale s (Eq. 3 of InstructPix2Pix, arXiv
    2211.09800): ε(∅) + s_I·(ε(image) − ε(∅)) + s·(ε(image, text) − ε(image)). Nested: ε' = ε(image) +
    s·(ε(image, text) − ε(image)), then ε(text) + s_I·(ε' − ε(text)). Then rescaled by φ (Eq. 16, arXiv 2305.08891).

    Args:
        predictions (`list[torch.Tensor]`): Of the conditional context, then of each context of guidance.
    """
    conditional, *others = predictions
    guided, renorm, is_nested = conditional, arguments.guidance_renorm, arguments.guidance_type == "nested"
    if not is_nested or arguments.image_guidance_scale != 1:
        other, *others = others
        guided = guide(conditional, other, arguments.image_guidance_scale)
    if renorm == "text_channel":
        guided = limit_norm(guided, conditional, arguments.guidance_renorm_min, patch_size)
    if others and is_nested:
        guided = guide(guided, others[0], arguments.unconditional_scale)
    elif others:
        guided = guided + (arguments.unconditional_scale - 1) * (other - others[0])
    if renorm in ("global", "channel"):
        size = patch_size if renorm == "channel" else None
        guided = limit_norm(guided, conditional, arguments.guidance_renorm_min, size)
    rescale = arguments.guidance_rescale
    return rescale_noise_cfg(guided, conditional, rescale) if rescale else guided


@dataclass
class Drawing:
    """
    The images of some rows, drawn together: every context of every row in one batch, the conditional ones first. The
    first pass reads whatever `contexts` do not hold in a cache; the others compute the image alone.

    Args:
        model (`TransfusionForCausalLMAndDiffusion`)
        arguments ([`DrawingArguments`])
        contexts (`list[Prefixes]`):
            The conditional one of all rows, then those of guidance. If the first has no cache, each pass computes all.
        rows (`list[int]`): The rows to draw for.
        size (`tuple[int, int]`): Height and width of their latents.
        compile_config (`CompileConfig`, *optional*): Compiles the steps behind the first.
    """

    model: PreTrainedModel
    arguments: DrawingArguments
    contexts: list[Prefixes]
    rows: list[int]
    size: tuple[int, int]
    compile_config: CompileConfig | None = None

    def __post_init__(self) -> None:
        model, contexts, rows, main = self.model, self.contexts, self.rows, self.contexts[0]
        config = model.config
        num_patches, has_markers = config.num_patches(*self.size), config.image_markers_in_block
        block = main.ids[0].new_full((num_patches + has_markers,), config.image_token_id)
        if has_markers:
            block[-1] = config.image_end_token_id
        all_ids = [torch.cat([context.ids[row], block]) for context in contexts for row in rows]
        self.ids, self.mask, self.positions = main.align(all_ids, config)
        # Each step computes the columns behind these: the patches, or `<BOI>`, patches and `<EOI>`.
        self.columns, is_cached = self.ids.shape[1] - num_patches - 2 * has_markers, main.num_cached > 0
        self.num_cached = self.ids.shape[1] - len(block) - 1 if is_cached else 0
        # Images that the first pass reads. Behind a cache, the contexts of guidance are in caches of their own.
        self.latents = [[] if is_cached else context.latents[row] for context in contexts for row in rows]
        self.seen = [[] if is_cached else context.seen[row] for context in contexts for row in rows]
        self.cache: Any = None
        if main.cache is not None:
            self.cache = Cache(layer_class_to_replicate=partial(DrawingLayer, self.ids.shape[1]))
        if is_cached:
            self._copy_prefixes()
        self._block_masks: dict[int, Any] = {}
        self._step_model = model.model
        if self.compile_config is not None:
            self._step_model = torch.compile(model.model, **self.compile_config.to_dict())

    def _copy_prefixes(self) -> None:
        main, *others = self.contexts
        assert main.cache is not None
        for context in others:
            context.read(self.model)
        rows = torch.tensor(self.rows, device=self.ids.device)
        lengths = self.mask[: len(self.rows), : self.num_cached].sum(dim=-1)
        # A context without a cache shows at most one token, the first of the conditional context.
        behind_first = (main.num_cached + 1 - lengths).clamp(max=main.num_cached)
        for number in range(len(main.cache.layers)):
            parts = []
            for context in self.contexts:
                cache, ends = (main.cache, behind_first) if context.cache is None else (context.cache, None)
                parts.append(move_columns(cache.layers[number], self.num_cached, rows, ends))
            self.cache.update(*(torch.cat(states) for states in zip(*parts, strict=True)), number)
        self._keep(self.num_cached)

    def _keep(self, num_columns: int) -> None:
        """Makes the first columns the prefix, behind which the next pass writes."""
        for layer in self.cache.layers:
            layer.prefix_length = num_columns

    def _given(self, name: str, channels: int, unit: int = 1) -> torch.Tensor | None:
        """The argument of that name, for each row or one for all; `unit` pixels of it are one of the latents."""
        given, shape = getattr(self.arguments, name), (len(self.rows), channels, *(side * unit for side in self.size))
        if given is None:
            return None
        if tuple(given.shape) not in (shape, (1, *shape[1:])):
            raise ValueError(f"`{name}` must have shape {shape}, or one row for all; got {tuple(given.shape)}.")
        return given.to(self.ids.device)

    def _known(self) -> tuple[Any, Any]:
        """The latents of `init_image`, and where they are to be redrawn, by `mask_image`."""
        config, vae = self.model.config, self.model.vae
        channels, unit = config.latent_channels, config.vae_scale_factor
        channels = channels if vae is None else vae.config.get("in_channels", 3)
        image, mask = self._given("init_image", channels, unit), self._given("mask_image", 1, unit)
        # A latent pixel is redrawn if one of its pixels is.
        redrawn = None if mask is None else max_pool2d((mask != 0).float(), unit) > 0
        return None if image is None else self.model.encode_images(image)[0], redrawn

    def _noise(self, generators: Any) -> torch.Tensor:
        shape = (len(self.rows), self.model.config.latent_channels, *self.size)
        given = self._given("init_noise", shape[1])
        if given is not None:
            return given.float().expand(shape)
        return randn_tensor(shape, generator=generators, device=self.ids.device, dtype=torch.float32)

    def run(self, streamer: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """
        From pure noise to x_0, float32 throughout. A `streamer` may get each step, for previews, and the first image.

        Returns:
            x_0, `torch.FloatTensor` of shape `(rows, channels, height, width)`, and the images.
        """
        arguments, num_contexts, generators = self.arguments, len(self.contexts), self.arguments.generator
        if isinstance(generators, list):
            generators = [generators[row] for row in self.rows]
        known, mask = self._known()
        scheduler = arguments.sampling_scheduler(self.model.noise_scheduler)
        step_kwargs = sampling_step_kwargs(scheduler, generators)
        clips = must_clip_x_0(scheduler, self.model.noise_scheduler)
        noise = self._noise(generators)
        x_t, timesteps = noise * getattr(scheduler, "init_noise_sigma", 1.0), scheduler.timesteps
        start = 0 if known is None else len(timesteps) - max(1, round(arguments.strength * len(timesteps)))
        if hasattr(scheduler, "set_begin_index"):  # else they look for t, and where steps repeat, find another one
            scheduler.set_begin_index(start)
        if start:
            timesteps = timesteps[start:]
            x_t = at_timestep(scheduler, known, noise, timesteps[0])
        num_steps, patch_size = len(timesteps), self.model.config.patch_size
        for i, t in enumerate(logging.tqdm(timesteps, desc="draw", leave=False, disable=not arguments.progress_bar)):
            # Some schedulers keep x_t at another scale than the model was trained on.
            x_in = scheduler.scale_model_input(x_t, t) if hasattr(scheduler, "scale_model_input") else x_t
            is_guided = arguments.is_guided(i, num_steps, t, self.model.config.num_train_timesteps)
            predictions = list(self._predict(x_in, t, num_contexts if is_guided else 1).split(len(x_t)))
            prediction = predictions[0] if len(predictions) == 1 else combine(predictions, arguments, patch_size)
            if hasattr(streamer, "put_step"):
                streamer.put_step(self.model, i + 1, num_steps, x_in, prediction, t)
            if clips:
                prediction = clip_x_0(self.model.noise_scheduler, x_in, prediction, t)
            x_t = scheduler.step(prediction, t, x_t, **step_kwargs).prev_sample
            if mask is not None:
                is_last = i + 1 == num_steps
                kept = known if is_last else at_timestep(scheduler, known, noise, timesteps[i + 1])
                x_t = torch.where(mask, x_t, kept)
            if arguments.callback_on_step_end is not None:
                changed = arguments.callback_on_step_end(self.model, i, t, {"latents": x_t}) or {}
                x_t = changed.get("latents", x_t)
                if changed.get("interrupt"):
                    break
        images = self.model.decode_latents(x_t)
        if hasattr(streamer, "put_image"):
            streamer.put_image(images[0], num_steps, num_steps)
        return x_t, images

    def _predict(self, x_t: torch.Tensor, t: torch.Tensor, num_contexts: int) -> torch.Tensor:
        """One pass: the prediction for every row in its first contexts, `(num_contexts · rows, …)`."""
        if self.cache is not None and self.cache.get_seq_length() == self.columns:
            x_in = x_t.repeat(num_contexts, 1, 1, 1)
            timesteps = torch.full((len(x_in),), t.item(), dtype=t.dtype, device=x_in.device)
            (prediction,) = self._block_pass(self._step_model, x_in, timesteps)
            return at_least_float32(prediction)
        # The first pass reads all contexts, whether its step is guided or not: later steps may be.
        num_rows = len(self.ids) if self.cache is not None else len(x_t) * num_contexts
        x_in = x_t.repeat(num_rows // len(x_t), 1, 1, 1)
        images = [[*row, x] for row, x in zip(self.latents[:num_rows], x_in, strict=True)]
        is_last = torch.tensor([i + 1 == len(row) for row in images for i in range(len(row))])
        new, options = (slice(num_rows), slice(self.num_cached, None)), {"cache": self.cache, "logits_to_keep": 1}
        options |= {"attention_mask": self.mask[:num_rows], "position_ids": self.positions[new]}
        options |= {"timesteps": torch.where(is_last, t, 0).to(x_t.device), "prediction_mask": is_last}
        options["latents"] = [image for row in images for image in row]
        options["vision_pixel_values"] = [image for row in self.seen[:num_rows] for image in row] or None
        output = self.model(self.ids[new], use_cache=self.cache is not None, **options)
        if self.cache is not None:
            self._keep(self.columns)
        return torch.stack(output.image_predictions[: len(x_t) * num_contexts])

    def _block_mask(self, num_rows: int) -> Any:
        """The mask of the image alone behind its prefix: the same for every step."""
        if num_rows not in self._block_masks:
            config = self.model.config
            block = self.ids[:num_rows, self.columns :]
            block_ids = attention_block_ids(block, config) if config.bidirectional_image_attention else None
            embeds = torch.empty(*block.shape, 0, dtype=self.model.dtype, device=block.device)
            behind = (self.mask[:num_rows], self.cache, self.positions[:num_rows, self.columns :])
            self._block_masks[num_rows] = create_transfusion_mask(config.text_config, embeds, block_ids, *behind)
        return self._block_masks[num_rows]

    def _block_pass(self, model: torch.nn.Module, x: torch.Tensor, timesteps: torch.Tensor | None) -> Any:
        block, options = (slice(len(x)), slice(self.columns, None)), {"cache": self.cache, "use_cache": True}
        options |= {"attention_mask": self._block_mask(len(x)), "position_ids": self.positions[block]}
        return model(self.ids[block], latents=x, timesteps=timesteps, **options).image_predictions

    def read_back(self, x_0: torch.Tensor) -> Cache:
        """Reads the finished images at t = 0. Returns the cache; its first rows hold each row's prefix and image."""
        self._block_pass(self.model.model, x_0, None)
        return self.cache
