"""
`generate()` for Transfusion (§3, Inference, arXiv 2408.11039): a language model that draws when it says `<BOI>`.

Each stretch of text is the library's own sampling. A row that emits `<BOI>` is parked while the others go on; when
every row is parked or finished, all parked rows are drawn together in one denoising loop, the finished images are read
back in at t = 0, `<EOI>` is appended, and the text goes on.

Rows are kept *aligned*: their last tokens stand in one column and pads only at the left, in the ids and, for every
token but the last, in the cache. Time runs from t = T − 1, noise, down to t = 0.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig, GenerationMixin, generation
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation import GenerationMode, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import ModelOutput, logging
from transformers.utils.deprecation import deprecate_kwarg

from .denoising_transfusion import (
    Drawing,
    DrawingArguments,
    Prefixes,
    align,
    guidance_prefixes,
    move_columns,
    positions_of,
    read_prefixes,
    undone_on_error,
)
from .diffusion_transfusion import make_sampling_scheduler
from .masking_transfusion import check_num_images, image_block_ids
from .patching_transfusion import stack_images

logger = logging.get_logger(__name__)

_MODES = ("interleaved", "text", "image")
# These count columns from the prompt's end; parked rows make columns and tokens two things.
_COLUMN_COUNTING = (
    generation.ExponentialDecayLengthPenalty,
    generation.ForcedBOSTokenLogitsProcessor,
    generation.ForcedEOSTokenLogitsProcessor,
    generation.SuppressTokensAtBeginLogitsProcessor,
    generation.UnbatchedClassifierFreeGuidanceLogitsProcessor,
)


@dataclass
class TransfusionGenerateOutput(ModelOutput):
    """
    Args:
        sequences (`torch.LongTensor` of shape `(batch, seq)`):
            The prompts as they came, then the new ids, padded at the right. A drawn image is `<BOI>`, one placeholder
            per patch, `<EOI>`.
        images (`list[list[torch.FloatTensor]]`):
            The images drawn for each row, in order: `(channels, height, width)`, float32, about [−1, 1].
        cache (`Cache`, *optional*):
            Keys and values of every row but for its last token, pads at the left; with `return_dict_in_generate=True`.
    """

    sequences: torch.LongTensor | None = None
    images: list[list[torch.Tensor]] | None = None
    cache: Cache | None = None


class TransfusionGenerationMixin(GenerationMixin):
    """`generate()` that switches between text and diffusion."""

    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        **kwargs: Any,
    ) -> TransfusionGenerateOutput | ModelOutput | torch.LongTensor:
        r"""
        Writes text and draws images. Takes all that [`~transformers.GenerationMixin.generate`] takes, and:

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`, *optional*):
                The images of the prompts, of all rows in order; or `latents`.
            generation_mode (`str`, *optional*, defaults to `"interleaved"`):
                `"interleaved"`: text, and an image wherever the model says `<BOI>`. `"text"`: `<BOI>` is suppressed.
                `"image"`: one image for each prompt, at once. A prompt that ends at `<BOI>` draws at once, too. With
                `return_dict_in_generate=False`, which asks for ids alone, the default is `"text"`.
            num_inference_steps (`int`, defaults to 250): Denoising steps per image, 1 to T.
            image_guidance_scale (`float`, defaults to 3.0):
                Classifier-free guidance of images; 1 is off and costs nothing. The unconditional context is `<BOI>`,
                after the beginning-of-sequence token if the prompt begins with it. (`guidance_scale` guides *text*.)
            input_image_guidance_scale (`float`, *optional*):
                A separate scale for the images of the prompt (InstructPix2Pix, arXiv 2211.09800): how closely a
                drawing keeps to them. Adds a third context, the images without the text, to each pass.
            negative_prompt_ids (`torch.LongTensor` of shape `(batch, seq)` or `(1, seq)`, *optional*):
                Replaces the unconditional context: what not to draw. With `negative_prompt_attention_mask`.
            guidance_start (`float`, defaults to 0.0), guidance_end (`float`, defaults to 1.0):
                The fractions of the steps between which guidance is on; the other steps cost one context.
            guidance_rescale (`float`, defaults to 0.0): φ of arXiv 2305.08891, against overexposure.
            init_image (`torch.FloatTensor` of shape `(batch, channels, height, width)`, *optional*):
                In `"image"` mode: what to begin with, in [−1, 1], in the size of the drawing. With `strength`: a
                variation of it. With `mask_image`: inpainting.
            mask_image (`torch.Tensor` of shape `(batch, 1, height, width)` or `(1, 1, height, width)`, *optional*):
                Not 0 where to draw; elsewhere `init_image` stays as it is, latent pixel by latent pixel.
            strength (`float`, defaults to 1.0): Share of the steps to take, from `init_image` under noise; above 0.
            max_images (`int`, *optional*): Images that a row may draw; after that `<BOI>` is suppressed in it.
            progress_bar (`bool`, defaults to `False`): Whether to show one for the denoising steps.
            callback_on_step_end (`Callable`, *optional*):
                Called after each denoising step as in diffusers: with the model, the number of the step, t, and
                `{"latents": x_t}` of the rows that draw. Latents that it returns replace x_t.
            height (`int` or `list[int]`, *optional*), width (`int` or `list[int]`, *optional*):
                Pixels of the drawn images, multiples of `config.pixels_per_patch`; default `config.sample_size`. A
                list has one for each row; rows of one size are drawn together.
            scheduler (`SchedulerMixin` or `str`, *optional*):
                A diffusers scheduler, or its class name, such as `"DDIMScheduler"`; default the paper's DDPM sampler.
            compile_config (`CompileConfig`, *optional*):
                Compiles the single steps of text and of denoising, on any device; prompts are read uncompiled. With
                `dynamic=True` nothing is recompiled for further prompts and images.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                For noise, and for text with `do_sample=True`. One per row: then each row comes out as it does alone.

        `max_new_tokens` and `min_new_tokens` count every id that a row gains (text, `<BOI>`, patches, `<EOI>`), row by
        row. An image is drawn whole or not at all: a row whose budget or positions (`max_position_embeddings`) cannot
        hold one ends at its `<BOI>`, with a warning. Without a limit, a row may gain 20 tokens and one image;
        `"image"` mode ignores token limits. Beam search and assisted decoding run in `"text"` mode.

        Returns:
            In `"text"` mode what the library returns; otherwise a [`TransfusionGenerateOutput`].

        Raises:
            ValueError: an unknown mode or scheduler, steps or size out of range, a prompt that ends among patches, a
                budget or positions that cannot hold an image asked for, an option without meaning beside images.
        """
        given = {field.name: kwargs.pop(field.name, None) for field in fields(DrawingArguments)}
        # transformers' image-text-to-text pipeline asks for a bare tensor.
        wants_ids = kwargs.get("return_dict_in_generate") is False or kwargs.get("custom_generate") is not None
        if given["generation_mode"] is None and wants_ids:
            given["generation_mode"] = "text"
        # The library's order: what the call says, then `generation_config`, then `self.generation_config`.
        settings = GenerationConfig() if generation_config is None else copy.deepcopy(generation_config)
        settings.update(**self.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
        kwargs = settings.update(**kwargs)
        stored = {name: getattr(settings, name, None) if value is None else value for name, value in given.items()}
        arguments = DrawingArguments(**{name: value for name, value in stored.items() if value is not None})
        arguments.generation_mode = _resolved_mode(arguments, settings, kwargs.get("assistant_model"))
        settings.generation_mode = arguments.generation_mode

        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        num_rows = 1 if input_ids is None else self._expand_images(input_ids, settings, kwargs)
        if isinstance(arguments.generator, list) and len(arguments.generator) != num_rows:
            raise ValueError(
                f"`generator` holds {len(arguments.generator)} generators for {num_rows} rows; pass one each."
            )
        # Placeholders and <EOI> are appended by the decoder, never sampled (§3).
        never = [self.config.image_token_id, self.config.image_end_token_id]
        never += [self.config.image_start_token_id] if arguments.generation_mode == "text" else []
        logits_processor = LogitsProcessorList([*(logits_processor or []), _Never(never)])
        kwargs |= {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
        with undone_on_error(kwargs.get("cache")):
            if arguments.generation_mode != "text":
                sizes = arguments.sizes(self.config, num_rows)
                return self._generate_interleaved(inputs, settings, arguments, sizes, kwargs)
            kwargs["negative_prompt_ids"] = arguments.negative_prompt_ids
            kwargs["negative_prompt_attention_mask"] = arguments.negative_prompt_attention_mask
            if arguments.generator is not None and settings.do_sample:
                if settings.output_scores:
                    raise ValueError("`output_scores` would show the token that `generator` drew; pass only one.")
                kwargs["custom_generate"] = self._with_generator(arguments.generator, kwargs)
            return super().generate(inputs, settings, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any):
        raise ValueError(
            f"Continuous batching is not supported by {type(self).__name__}: its loop cannot draw. Use `generate()`."
        )

    def _expand_images(self, input_ids: torch.LongTensor, settings: GenerationConfig, kwargs: dict[str, Any]) -> int:
        """Repeats the images of each prompt for the rows that beams or several sequences make of it; counts them."""
        if input_ids.ndim == 2 and input_ids.numel() and (input_ids[:, -1] == self.config.image_token_id).any():
            raise ValueError(
                "`input_ids` ends among the patches of an image; end a prompt with text, with `<EOI>` after an image, "
                "or with `<BOI>` to draw one."
            )
        expand_size = max(settings.num_beams or 1, settings.num_return_sequences or 1)
        for name in ("pixel_values", "latents"):  # the library would repeat them one by one
            if expand_size > 1 and kwargs.get(name) is not None:
                rows = self._split_by_row(kwargs[name], input_ids)
                kwargs[name] = [image for row in rows for _ in range(expand_size) for image in row]
        return len(input_ids) * expand_size

    def _generate_interleaved(self, inputs, settings: GenerationConfig, arguments: DrawingArguments, sizes, kwargs):
        _check_drawing(settings, arguments)
        # Before anything is read, and though perhaps nothing will be drawn.
        make_sampling_scheduler(self.noise_scheduler, arguments.scheduler, arguments.num_inference_steps, self.device)
        if _is_synced(self, kwargs.get("synced_gpus")):
            raise ValueError("`synced_gpus` keeps step with text only; use `generation_mode='text'`.")
        image_length = max((self.config.num_patches(*size) + 2 for size in sizes), default=0)
        if arguments.generation_mode == "image":
            settings.max_new_tokens = image_length
        elif settings.max_length is None and settings.max_new_tokens is None:
            settings.max_new_tokens = 20 + image_length
        # The cache is returned, or was handed in.
        keeps_cache = bool(settings.return_dict_in_generate) or kwargs.get("cache") is not None
        if kwargs.get("cache") is None and settings.use_cache is not False:
            # Without the config every layer keeps its full length: a sliding layer could not give up a step's keys.
            kwargs["cache"], settings.cache_implementation = DynamicCache(), None
        if settings.stop_strings is not None and kwargs.get("tokenizer") is not None:
            # The library has no tokenizer for them where it hands over to `custom_generate`.
            criterion = generation.StopStringCriteria(kwargs["tokenizer"], settings.stop_strings)
            kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs["stopping_criteria"] or []), criterion])
            settings.stop_strings = None

        def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
            own = (arguments, sizes, keeps_cache, kwargs.get("streamer"), model_kwargs)
            return _Decoder(model, input_ids, generation_config, *own).run(logits_processor, stopping_criteria)

        return super().generate(inputs, settings, custom_generate=decode, **kwargs)

    def _with_generator(self, generator: torch.Generator | list[torch.Generator], kwargs: dict[str, Any]) -> Callable:
        """Text that is sampled by the user's generator: the last of all rules, behind the temperature."""

        def sample(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
            processors = LogitsProcessorList([*logits_processor, _SampleWithGenerator(generator)])
            own = {"streamer": kwargs.get("streamer"), "synced_gpus": _is_synced(model, kwargs.get("synced_gpus"))}
            return GenerationMixin._sample(
                model, input_ids, processors, stopping_criteria, generation_config, **own, **model_kwargs
            )

        return sample

    def _split_by_row(self, images, input_ids: torch.LongTensor) -> list[list[torch.Tensor]]:
        """The images of each row, told by its image blocks."""
        images = [image for stack in stack_images(images) for image in stack]
        counts = (image_block_ids(input_ids, self.config.image_token_id).amax(dim=-1) + 1).tolist()
        check_num_images(len(images), sum(counts))
        iterator = iter(images)
        return [[next(iterator) for _ in range(count)] for count in counts]

    # The library compiles for static caches only, by itself; drawing compiles where it was asked for.
    def _valid_auto_compile_criteria(self, model_kwargs, generation_config):
        if getattr(generation_config, "generation_mode", "text") == "text":
            return super()._valid_auto_compile_criteria(model_kwargs, generation_config)
        return generation_config.compile_config is not None and not generation_config.disable_compile

    @staticmethod
    def create_masks_for_generate(config, attention_mask, is_first_iteration=False, **kwargs):
        # Asked for with static caches. The library knows no image blocks here: `forward` makes the mask of a prompt.
        if config.get_text_config()._attn_implementation == "flex_attention":
            raise ValueError(
                "transformers' `generate()` takes no `flex_attention` with a static cache; use `sdpa`, or a "
                "`DynamicCache()`."
            )
        if is_first_iteration:
            return attention_mask
        return create_masks_for_generate(config=config, attention_mask=attention_mask, **kwargs)

    # The library looks for `inputs_embeds` in this signature before it accepts them.
    def prepare_inputs_for_generation(self, input_ids, is_first_iteration=False, inputs_embeds=None, **kwargs):
        if not is_first_iteration and kwargs.get("use_cache", True):
            kwargs.pop("latents", None)  # as the library does with `pixel_values`: they are in the cache
        return super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, inputs_embeds=inputs_embeds, **kwargs
        )


def _resolved_mode(arguments: DrawingArguments, settings: GenerationConfig, assistant_model: Any) -> str:
    """The mode asked for; by default `"interleaved"` where the library searches greedily or samples, else `"text"`."""
    mode, decoding = arguments.generation_mode, settings.get_generation_mode(assistant_model)
    if mode is not None and mode not in _MODES:
        raise ValueError(f"`generation_mode` must be one of {', '.join(_MODES)}; got {mode!r}.")
    if decoding in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return mode or "interleaved"
    if arguments.generator is not None:
        raise ValueError(f"`generator` is not used by {decoding.value}; seed torch's global generator.")
    if mode not in (None, "text"):
        raise ValueError(
            f"`generation_mode={mode!r}` draws, which {decoding.value} cannot; use greedy search or sampling, or "
            "`generation_mode='text'`."
        )
    return "text"


def _check_drawing(settings: GenerationConfig, arguments: DrawingArguments) -> None:
    """Raises `ValueError` for what has no meaning beside images."""
    arguments.validate()
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(settings, name):
            raise ValueError(f"`{name}` records columns, which images break; use `generation_mode='text'`.")
    if settings.guidance_scale not in (None, 1):
        raise ValueError(
            f"`guidance_scale={settings.guidance_scale}` guides text, by a second language model context that knows "
            "no images; to guide images pass `image_guidance_scale`, to guide text `generation_mode='text'`."
        )
    if settings.prefill_chunk_size is not None:
        raise ValueError("`prefill_chunk_size` could cut an image in two; use `generation_mode='text'`.")
    if settings.cache_implementation not in (None, "dynamic"):
        raise ValueError(
            f"`cache_implementation={settings.cache_implementation!r}` cannot give up the keys of a denoising step; "
            "use 'dynamic', or `generation_mode='text'`."
        )


def _is_synced(model: torch.nn.Module, synced_gpus: bool | None) -> bool:
    """Whether processes wait for the longest of their texts: the library does not tell `custom_generate`."""
    if synced_gpus is not None:
        return synced_gpus
    is_sharded = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)
    return is_sharded and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


class _Rows:
    """What is known of each row across the stretches of text: new tokens, parked, finished."""

    def __init__(self, batch_size: int, device: torch.device):
        self.num_new = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.parked, self.finished = self.num_new > 0, self.num_new > 0

    @property
    def running(self) -> torch.BoolTensor:
        return ~(self.parked | self.finished)


class _EndOfText(generation.StoppingCriteria):
    """Ends the stretch of each row at `<BOI>`, at its budget, or where the given criteria say so; remembers which."""

    def __init__(self, criteria: StoppingCriteriaList, rows: _Rows, boi: int, max_new_tokens: int):
        self.criteria = criteria
        self.rows = rows
        self.max_new_tokens = max_new_tokens
        self.eos_token_id = boi  # the library pads stopped rows if a criterion has this attribute

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs: Any) -> torch.BoolTensor:
        running = self.rows.running
        self.rows.num_new += running
        ended = self.criteria(input_ids, scores, **kwargs) | (self.rows.num_new >= self.max_new_tokens)
        self.rows.finished |= running & ended
        self.rows.parked |= running & ~ended & (input_ids[:, -1] == self.eos_token_id)
        return ~self.rows.running


class _Never(LogitsProcessor):
    """
    Keeps ids out of all rows, or of those for which `is_banned`, called at each token, is `True`. (The library's
    `SuppressTokensLogitsProcessor` searches the whole vocabulary each time.)
    """

    def __init__(self, ids: list[int], is_banned: Callable[[], torch.BoolTensor] | None = None):
        self.ids = torch.tensor(ids)
        self.is_banned = is_banned

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.ids = self.ids.to(scores.device)
        without = scores.index_fill(-1, self.ids, -torch.inf)
        return without if self.is_banned is None else torch.where(self.is_banned()[:, None], without, scores)


class _SampleWithGenerator(LogitsProcessor):
    """Draws the token itself, with the user's generator, and leaves the library no choice."""

    def __init__(self, generator: torch.Generator | list[torch.Generator], rows: _Rows | None = None):
        self.generator = generator
        self.rows = rows

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        running = range(len(scores)) if self.rows is None else self.rows.running.nonzero()[:, 0].tolist()
        drawn = scores.argmax(dim=-1)
        for row in running:
            generator = self.generator[row] if isinstance(self.generator, list) else self.generator
            probabilities = scores[row].softmax(dim=-1).to(generator.device)
            drawn[row] = torch.multinomial(probabilities, 1, generator=generator)[0]
        return torch.full_like(scores, -torch.inf).scatter(1, drawn[:, None], 0.0)


@dataclass
class _Decoder:
    """One call of `generate()` in a mode that draws."""

    model: Any  # of the class that `TransfusionGenerationMixin` becomes part of
    prompts: torch.LongTensor
    generation_config: GenerationConfig
    arguments: DrawingArguments
    sizes: list[tuple[int, int]]
    keeps_cache: bool
    streamer: Any
    model_kwargs: dict[str, Any]

    def __post_init__(self) -> None:
        self.config, self.device = self.model.config, self.prompts.device
        input_ids, model_kwargs = self.prompts, self.model_kwargs
        batch_size, self.prompt_length = input_ids.shape
        if not input_ids.numel():
            raise ValueError(
                f"`input_ids` must hold at least one row of at least one token; got shape {tuple(input_ids.shape)}. "
                "(`inputs_embeds` need `generation_mode='text'`.)"
            )
        if self.generation_config._pad_token_tensor is None:
            raise ValueError(
                "Neither `pad_token_id` nor `eos_token_id` is set: rows that stop have nothing to be filled up with. "
                "Pass `pad_token_id` or set it in `model.generation_config`."
            )
        self.pad_token_id = int(self.generation_config._pad_token_tensor)

        mask = model_kwargs.pop("attention_mask", None)
        self.mask = mask = torch.ones_like(input_ids) if mask is None else mask
        if mask.shape != input_ids.shape or (mask[:, :-1] > mask[:, 1:]).any() or not mask[:, -1].all():
            raise ValueError(
                "`attention_mask` must have the shape of `input_ids` and be 0 at left padding only; use "
                "`padding_side='left'`."
            )
        self.ids = [row[row_mask.bool()] for row, row_mask in zip(input_ids, mask, strict=True)]
        self.rows = _Rows(batch_size, self.device)

        model_kwargs.pop("position_ids", None)
        pixel_values, latents = model_kwargs.pop("pixel_values", None), model_kwargs.pop("latents", None)
        if pixel_values is not None:
            latents = self.model.encode_images(pixel_values)
        self.cache: DynamicCache | None = model_kwargs.pop("cache", None)
        layers = [] if self.cache is None else getattr(self.cache, "layers", [None])
        if any(type(layer) is not DynamicLayer for layer in layers):
            raise ValueError(
                "`cache` must be a `DynamicCache()` without config, all of whose layers keep their full length: the "
                f"keys of a denoising step are given up again. Got {self.cache!r}."
            )
        # The images of each row that are not in the cache; without one, all of them are read in every pass.
        self.latents: list[list[torch.Tensor]] = [[] for _ in self.ids]
        if latents is not None:
            self.latents = self.model._split_by_row(latents, input_ids[:, self.num_cached :])
        self.images: list[list[torch.Tensor]] = [[] for _ in self.ids]
        self.image_lengths = [self.config.num_patches(*size) + 1 for size in self.sizes]  # with <EOI>
        self.known_latents, self.known_mask = self._known(self.arguments.init_image, self.arguments.mask_image)
        self.max_new_tokens = self.generation_config.max_length - self.prompt_length

    @property
    def num_cached(self) -> int:
        return 0 if self.cache is None else self.cache.get_seq_length()

    def _known(self, image, mask) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The latents that a drawing begins with, and where they are to be redrawn."""
        if image is None:
            return None, None
        factor, batch_size = self.config.vae_scale_factor, len(self.ids)
        if len(set(self.sizes)) > 1:
            raise ValueError("`init_image` is of one size for all rows; pass one `height` and `width`.")
        size = tuple(side * factor for side in self.sizes[0])
        vae = self.model.vae
        wanted = (batch_size, self.config.latent_channels if vae is None else vae.config.in_channels, *size)
        if tuple(image.shape) != wanted:
            raise ValueError(
                f"`init_image` must have shape {wanted}, one image for each row in the size of the drawing; got "
                f"{tuple(image.shape)}."
            )
        (known,) = self.model.encode_images(image.to(self.device))
        if mask is None:
            return known, None
        if mask.ndim != 4 or mask.shape[0] not in (1, batch_size) or tuple(mask.shape[1:]) != (1, *size):
            raise ValueError(
                f"`mask_image` must have shape ({batch_size}, 1, {size[0]}, {size[1]}), that of `init_image` with one "
                f"channel; got {tuple(mask.shape)}."
            )
        # A latent pixel is redrawn if one of its pixels is.
        mask = torch.nn.functional.max_pool2d((mask != 0).float().to(self.device), factor) > 0
        return known, mask.expand(batch_size, -1, -1, -1)

    def run(self, logits_processor: LogitsProcessorList, criteria: StoppingCriteriaList) -> TransfusionGenerateOutput:
        is_image_mode = self.arguments.generation_mode == "image"
        num_uncached = self._park_prompts(is_image_mode)
        bos = self.generation_config._bos_token_tensor
        prompts = Prefixes(list(self.ids), [list(row) for row in self.latents], self.pad_token_id)
        bos_token_id = None if bos is None else int(bos)
        guidance = guidance_prefixes(self.config, self.arguments, prompts, self.sizes, bos_token_id)
        # Prefixes are read before the first drawing where it cannot keep them for the next one: images of several
        # sizes are drawn in turn, and what a first drawing reads of guidance's contexts is gone after it.
        is_needed = len(set(self.sizes)) > 1 or (not is_image_mode and any(one.must_be_read for one in guidance))
        reads_ahead = self.cache is not None and bool(self.rows.parked.all()) and is_needed
        if self.num_cached or reads_ahead:
            self._adopt_cache(num_uncached)
        logits_processor, criteria = self._per_row(logits_processor, criteria)

        while not self.rows.finished.all():
            if self.rows.running.any():
                self._write(logits_processor, criteria)
            parked = self.rows.parked.nonzero()[:, 0].tolist()
            for size in dict.fromkeys(self.sizes[row] for row in parked):
                self._draw([row for row in parked if self.sizes[row] == size], size, guidance)
        if self.streamer is not None:
            self.streamer.end()
        new = [row[len(row) - n :] for row, n in zip(self.ids, self.rows.num_new.tolist(), strict=True)]
        new = pad_sequence(new, batch_first=True, padding_value=self.pad_token_id)
        return TransfusionGenerateOutput(
            sequences=torch.cat([self.prompts, new], dim=-1),
            images=self.images,
            cache=self.cache if self.generation_config.return_dict_in_generate else None,
        )

    def _park_prompts(self, is_image_mode: bool) -> torch.LongTensor:
        """Parks the rows that draw at once. Returns how many of each prompt's tokens stay out of the cache."""
        boi = self.config.image_start_token_id
        ends_at_boi = self.prompts[:, -1] == boi
        num_uncached = torch.ones_like(ends_at_boi, dtype=torch.long)
        self.rows.parked |= ends_at_boi
        if is_image_mode:
            num_uncached -= (~ends_at_boi).long()  # the <BOI> appended is the uncached token then
            for row in (~ends_at_boi).nonzero()[:, 0].tolist():
                self._append(row, self.prompts.new_tensor([boi]))
            self.rows.parked[:] = True
        for row in self.rows.parked.nonzero()[:, 0].tolist():
            if self.arguments.max_images == 0:
                raise ValueError(f"`max_images` is 0, but prompt {row} asks for an image; raise it, or pass no <BOI>.")
            if (shortage := self._shortage(row)) is not None:
                raise ValueError(f"{shortage}; prompt {row} asks for one.")
        return num_uncached

    def _per_row(self, logits_processor, criteria) -> tuple[LogitsProcessorList, StoppingCriteriaList]:
        """The user's rules, with those that count columns replaced by ones that count the tokens of a row."""
        for processor in logits_processor:
            if isinstance(processor, _COLUMN_COUNTING):
                raise ValueError(
                    f"{type(processor).__name__} counts columns, which is meaningless once images are drawn; use "
                    "`generation_mode='text'`."
                )
        by_column = (generation.MinLengthLogitsProcessor, generation.MinNewTokensLengthLogitsProcessor)
        processors = LogitsProcessorList(p for p in logits_processor if not isinstance(p, by_column))
        arguments, rows, eos = self.arguments, self.rows, self.generation_config._eos_token_tensor
        min_new_tokens = (self.generation_config.min_length or 0) - self.prompt_length
        if min_new_tokens > 0 and eos is not None:
            processors.append(_Never(eos.tolist(), lambda: rows.num_new < min_new_tokens))
        if (most := arguments.max_images) is not None:

            def have_drawn():
                return torch.tensor([len(row) >= most for row in self.images], device=self.device)

            processors.append(_Never([self.config.image_start_token_id], have_drawn))
        if arguments.generator is not None and self.generation_config.do_sample:
            processors.append(_SampleWithGenerator(arguments.generator, rows))
        criteria = StoppingCriteriaList(c for c in criteria if not isinstance(c, generation.MaxLengthCriteria))
        end = _EndOfText(criteria, rows, self.config.image_start_token_id, self.max_new_tokens)
        return processors, StoppingCriteriaList([end])

    def _append(self, row: int, new: torch.LongTensor) -> None:
        self.ids[row] = torch.cat([self.ids[row], new])
        self.rows.num_new[row] += len(new)
        if self.streamer is not None:
            self.streamer.put(new.cpu())

    def _write(self, logits_processor: LogitsProcessorList, criteria: StoppingCriteriaList) -> None:
        """One stretch of text for all running rows, by the library's loop; then every row aligned again."""
        ids, mask = align(self.ids, self.pad_token_id)
        columns = ids.shape[1]
        before = self.rows.num_new.clone()
        # Its own copy: it returns the ids alone, and the library looks up how long a mask of ones would be.
        config = copy.copy(self.generation_config)
        config.return_dict_in_generate, config._mask_length = False, columns
        model_kwargs = {**self.model_kwargs, "position_ids": positions_of(mask), "cache": self.cache}
        model_kwargs["attention_mask"] = None if mask.all() else mask
        if any(self.latents):
            model_kwargs["latents"] = [image for row in self.latents for image in row]
        # The end of a stretch of text is not that of the generation.
        streamer = None if self.streamer is None else SimpleNamespace(put=self.streamer.put, end=lambda: None)
        sequences = GenerationMixin._sample(
            self.model, ids, logits_processor, criteria, config, streamer=streamer, **model_kwargs
        )
        ends = columns + self.rows.num_new - before
        for row, end in enumerate(ends.tolist()):
            self.ids[row] = torch.cat([self.ids[row], sequences[row, columns:end]])
        if self.cache is not None:
            self.latents = [[] for _ in self.ids]
            self._align_cache(ends - 1)  # a row's last token counts as not yet cached
        for row in self.rows.parked.nonzero()[:, 0].tolist():
            if (shortage := self._shortage(row)) is not None:
                self.rows.parked[row], self.rows.finished[row] = False, True
                logger.warning(f"Row {row} ends at <BOI>: {shortage}.")

    def _shortage(self, row: int) -> str | None:
        """What is too small for the next image of a row."""
        needed = self.image_lengths[row]
        image = f"an image needs {needed}, {needed - 1} patches and <EOI>"
        left = self.max_new_tokens - int(self.rows.num_new[row])
        if needed > left:
            return f"`max_new_tokens` leaves {left} tokens, and {image}"
        num_positions = getattr(self.config.text_config, "max_position_embeddings", None)
        if num_positions is not None and len(self.ids[row]) + needed > num_positions:
            return f"`max_position_embeddings` leaves {num_positions - len(self.ids[row])} positions, and {image}"
        return None

    def _align_cache(self, ends: torch.LongTensor) -> None:
        length = max(len(row) for row in self.ids) - 1
        assert self.cache is not None
        for layer in self.cache.layers:
            layer.keys, layer.values = move_columns(layer, length, ends=ends)

    def _adopt_cache(self, num_uncached: torch.LongTensor) -> None:
        """Reads what of the prompts a cache handed in does not hold yet, and aligns it with the rows."""
        num_cached = self.num_cached
        if num_cached >= self.prompt_length:
            raise ValueError(
                f"`cache` holds {num_cached} tokens and `input_ids` only {self.prompt_length}; pass all ids so far, "
                "those in the cache included, and at least one new one."
            )
        if num_cached and not self.mask[:, 0].any():
            raise ValueError(
                "`input_ids` begins with columns that are padding in every row, which `cache` may or may not hold; "
                "drop those columns."
            )
        read_prefixes(self.model, self.prompts, self.mask, self.latents, self.cache)
        self.latents = [[] for _ in self.ids]
        self._align_cache(self.prompt_length - num_uncached)

    def _draw(self, rows: list[int], size: tuple[int, int], guidance: list[Prefixes]) -> None:
        """One denoising loop for rows of one size, the images read back in, `<EOI>`."""
        generators = self.arguments.generator
        if isinstance(generators, list):
            generators = [generators[row] for row in rows]
        options = None if self.generation_config.disable_compile else self.generation_config.compile_config
        main = Prefixes(self.ids, self.latents, self.pad_token_id, self.cache)
        drawing = Drawing(self.model, self.arguments, [main, *guidance], rows, size, self.cache is not None, options)
        # In "image" mode only, where all rows draw at once.
        x_0 = drawing.run(generators, self.known_latents, self.known_mask, self.streamer)
        images = self.model.decode_latents(x_0)
        if hasattr(self.streamer, "put_image"):
            self.streamer.put_image(images[0], drawing.num_steps, drawing.num_steps)
        patches = [self.config.image_token_id] * (self.image_lengths[rows[0]] - 1)
        block = self.ids[0].new_tensor([*patches, self.config.image_end_token_id])
        for i, row in enumerate(rows):
            self._append(row, block)
            self.images[row].append(images[i])
            if self.cache is None:
                self.latents[row].append(x_0[i])
        self.rows.parked[rows] = False
        ends_here = self.arguments.generation_mode == "image"
        self.rows.finished[rows] |= ends_here | (self.rows.num_new[rows] >= self.max_new_tokens)
        if self.cache is None:
            return
        self.latents = [[] for _ in self.ids]
        if self.keeps_cache or not (ends_here or self.rows.finished.all()):
            self._commit(rows, drawing.read_back(x_0))

    def _commit(self, rows: list[int], drawn: Cache) -> None:
        """Puts the keys and values of the rows drawn, images included, into the cache, every row aligned."""
        length, all_rows, has_prefixes = max(len(row) for row in self.ids) - 1, len(self.ids), self.num_cached > 0
        assert self.cache is not None
        for number, drawn_layer in enumerate(drawn.layers):
            drawn_part = moved = move_columns(drawn_layer, length, slice(len(rows)))
            layer: Any = self.cache.layers[number] if number < len(self.cache.layers) else None
            if len(rows) < all_rows:
                if has_prefixes:
                    moved = move_columns(layer, length)
                else:  # none of any token but <BOI>
                    moved = tuple(part.new_zeros(all_rows, *part.shape[1:]) for part in moved)
                for target, source in zip(moved, drawn_part, strict=True):
                    target[rows] = source
            if layer is None:
                self.cache.update(*moved, number)
            else:
                layer.keys, layer.values = moved
