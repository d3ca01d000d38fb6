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
from transformers.generation import GenerationMode, LogitsProcessorList, StoppingCriteriaList
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import ModelOutput, logging
from transformers.utils.deprecation import deprecate_kwarg

from .configuration_transfusion import image_token_ids
from .denoising_transfusion import (
    Drawing,
    DrawingArguments,
    Prefixes,
    guidance_prefixes,
    move_columns,
    positions_of,
    undo_on_error,
)
from .masking_transfusion import check_num_images, image_block_ids
from .patching_transfusion import stack_images

logger = logging.get_logger(__name__)

_MODES = ("interleaved", "text", "image")
# Settings of the library that have no meaning beside images, why, and the values that do no harm.
_RECORDS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
_COUNTS = ("exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "begin_suppress_tokens")
_NO_COUNTS = "counts columns, which is meaningless once images are drawn"
_TEXT_ONLY = {
    **dict.fromkeys(_RECORDS, "records columns, which images break"),
    **dict.fromkeys(_COUNTS, _NO_COUNTS),
    "guidance_scale": "guides text, by a context without images; to guide images pass `image_guidance_scale`",
    "prefill_chunk_size": "could cut an image in two",
    "cache_implementation": "cannot give up the keys of a denoising step",
}
_HARMLESS = {"guidance_scale": 1, "cache_implementation": "dynamic"}
_OF_FORWARD = (
    "labels", "shift_labels", "max_timesteps", "image_loss_mask", "prediction_mask", "noise_seeds",
    "num_items_in_batch", "num_images_in_batch", "skip_logits", "varlen_plan",
    "batch_counts", "check_inputs",
)  # fmt: skip
_COLUMN_COUNTING = (
    generation.ExponentialDecayLengthPenalty, generation.ForcedBOSTokenLogitsProcessor,
    generation.ForcedEOSTokenLogitsProcessor, generation.SuppressTokensAtBeginLogitsProcessor,
    generation.UnbatchedClassifierFreeGuidanceLogitsProcessor,
)  # fmt: skip


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
            Keys and values of every row but for its last token, pads at the left; with `return_dict_in_generate=True`
            or where one was handed in.
    """

    sequences: torch.LongTensor | None = None
    images: list[list[torch.Tensor]] | None = None
    cache: Cache | None = None

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, tuple):
            raise TypeError("The output of `generate()` holds images, too; index its ids, `output.sequences[...]`.")
        return super().__getitem__(key)


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
            timesteps (`list[float]`, *optional*), sigmas (`list[float]`, *optional*):
                The denoising steps to take, in descending order, in place of `num_inference_steps`; as in diffusers,
                if the scheduler's `set_timesteps` has that argument.
            image_guidance_scale (`float`, defaults to 3.0):
                Classifier-free guidance of images; 1 is off and costs nothing. The unconditional context is `<BOI>`,
                after the beginning-of-sequence token if the prompt begins with it. (`guidance_scale` guides *text*.)
            input_image_guidance_scale (`float`, *optional*):
                How closely a drawing keeps to the images of the prompt (InstructPix2Pix, arXiv 2211.09800). Adds a
                third context, the images without the text, to each pass.
            negative_prompt_ids (`torch.LongTensor` of shape `(batch, seq)` or `(1, seq)`, *optional*):
                Replaces the unconditional context: what not to draw. With `negative_prompt_attention_mask`.
            guidance_start (`float`, defaults to 0.0), guidance_end (`float`, defaults to 1.0):
                The fractions of the steps between which guidance is on; the other steps cost one context.
            guidance_rescale (`float`, defaults to 0.0): φ of arXiv 2305.08891, against overexposure.
            guidance_type (`str`, defaults to `"instruct_pix2pix"`):
                How two scales go together. `"nested"`, as in BAGEL (arXiv 2505.14683): `image_guidance_scale` moves
                away from the prompt without the text behind its last image, or `negative_prompt_ids`, then
                `input_image_guidance_scale` from its text without the images.
            guidance_interval (`tuple[float, float]`, *optional*): Guidance is on where low < t/T ≤ high.
            guidance_renorm (`str`, *optional*), guidance_renorm_min (`float`, defaults to 0.0):
                Shrinks the guided prediction to the norm of the conditional one where it is longer, but to no less
                than this share: over the image (`"global"`), each patch (`"channel"`), or each patch of what text
                alone has guided (`"text_channel"`).
            timestep_shift (`float`, *optional*):
                With flow matching: steps evenly from 1 to 0, shifted by s·t / (1 + (s − 1)·t).
            init_image (`torch.FloatTensor` of shape `(batch, channels, height, width)` or `(1, …)`, *optional*):
                In `"image"` mode: what to begin with, in [−1, 1], in the size of the drawing. With `strength`: a
                variation of it. With `mask_image`: inpainting.
            mask_image (`torch.Tensor` of shape `(batch, 1, height, width)` or `(1, …)`, *optional*):
                Not 0 where to draw; elsewhere `init_image` stays as it is, latent pixel by latent pixel.
            strength (`float`, defaults to 1.0): Share of the steps to take, from `init_image` under noise; above 0.
            init_noise (`torch.FloatTensor` of shape `(batch, channels, height, width)` or `(1, …)`, *optional*):
                In `"image"` mode: the noise to begin with, N(0, 1), in the size of the latents.
            max_images (`int`, *optional*): Images that a row may draw; after that `<BOI>` is suppressed in it.
            progress_bar (`bool`, defaults to `False`): Whether to show one for the denoising steps.
            callback_on_step_end (`Callable`, *optional*):
                Called after each denoising step as in diffusers: with the model, the number of the step, t, and
                `{"latents": x_t}` of the rows that draw. Latents that it returns replace x_t; `{"interrupt": True}`
                ends the drawing with this step.
            height (`int` or `list[int]`, *optional*), width (`int` or `list[int]`, *optional*):
                Pixels, multiples of `config.pixels_per_patch`; default `config.sample_size`. A list has one per row.
            scheduler (`SchedulerMixin` or `str`, *optional*): Of diffusers, or its class name; default DDPM.
            compile_config (`CompileConfig`, *optional*): Compiles the single steps of text and of denoising.
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
        for name in _OF_FORWARD:
            if kwargs.get(name) is not None:
                raise ValueError(f"`{name}` is an argument of `forward`, which `generate()` does not use; drop it.")
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
        if given["guidance_renorm"] is None and not arguments.has_guidance:  # a default of the model
            arguments.guidance_renorm = None
        arguments.generation_mode = _resolved_mode(arguments, settings, kwargs.get("assistant_model"))
        settings.generation_mode = arguments.generation_mode

        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        num_rows = 1 if input_ids is None else self._expand_images(input_ids, settings, kwargs)
        generator = arguments.generator
        if isinstance(generator, list) and len(generator) != num_rows:
            raise ValueError(f"`generator` holds {len(generator)} generators for {num_rows} rows; pass one each.")
        # Placeholders and <EOI> are appended by the decoder, never sampled (§3).
        never = image_token_ids(self.config)
        if arguments.generation_mode != "text":
            never.remove(self.config.image_start_token_id)
        logits_processor = LogitsProcessorList([*(logits_processor or []), _never(never, self.device)])
        kwargs |= {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
        _take_stop_strings(settings, kwargs)
        with undo_on_error(kwargs.get("cache")):
            if arguments.generation_mode != "text":
                sizes = arguments.sizes(self.config, num_rows)
                return self._generate_interleaved(inputs, settings, arguments, sizes, kwargs)
            if self.config.shared_image_position and input_ids is not None and kwargs.get("position_ids") is None:
                mask = kwargs.get("attention_mask")
                mask = torch.ones_like(input_ids) if mask is None else mask
                kwargs["position_ids"] = positions_of(input_ids, mask, self.config)
            kwargs["negative_prompt_ids"] = arguments.negative_prompt_ids
            kwargs["negative_prompt_attention_mask"] = arguments.negative_prompt_attention_mask
            if generator is not None and settings.do_sample:
                if settings.output_scores:
                    raise ValueError("`output_scores` would show the token that `generator` drew; pass only one.")
                kwargs["custom_generate"] = self._with_generator(generator, kwargs)
            return super().generate(inputs, settings, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any):
        raise ValueError("Continuous batching is not supported: its loop cannot draw. Use `generate()`.")

    def _expand_images(self, input_ids: torch.LongTensor, settings: GenerationConfig, kwargs: dict[str, Any]) -> int:
        """Repeats the images of each prompt for the rows that beams or several sequences make of it; counts them."""
        patches = input_ids.new_tensor([self.config.image_token_id, self.config.vision_token_id or -1])
        if input_ids.ndim == 2 and input_ids.numel() and torch.isin(input_ids[:, -1], patches).any():
            raise ValueError("`input_ids` ends among the patches of an image; end a prompt with text, <EOI> or <BOI>.")
        expand_size = max(settings.num_beams or 1, settings.num_return_sequences or 1)
        for name in ("pixel_values", "latents", "vision_pixel_values"):  # the library would repeat them one by one
            if expand_size > 1 and kwargs.get(name) is not None:
                rows = self._split_by_row(kwargs[name], input_ids, name)
                kwargs[name] = [image for row in rows for _ in range(expand_size) for image in row]
        return len(input_ids) * expand_size

    def _generate_interleaved(self, inputs, settings: GenerationConfig, arguments: DrawingArguments, sizes, kwargs):
        arguments.validate()
        for name, why in _TEXT_ONLY.items():
            value = getattr(settings, name)
            if value is not None and value is not False and value != _HARMLESS.get(name):
                raise ValueError(f"`{name}={value!r}` {why}; use `generation_mode='text'`.")
        _refuse_adapter_names(self)
        # Before anything is read, and though perhaps nothing will be drawn.
        arguments.sampling_scheduler(self.noise_scheduler)
        if self._is_synced(kwargs):
            raise ValueError("`synced_gpus` keeps step with text only; use `generation_mode='text'`.")
        image_length = max((self.config.num_patches(*size) + 2 for size in sizes), default=0)
        if arguments.generation_mode == "image":
            settings.max_new_tokens = image_length
        elif settings.max_length is None and settings.max_new_tokens is None:
            settings.max_new_tokens = 20 + image_length
        keeps_cache = bool(settings.return_dict_in_generate) or kwargs.get("cache") is not None
        settings.return_dict_in_generate = False  # each stretch of text returns its ids alone
        if kwargs.get("cache") is None and settings.use_cache is not False:
            # Without the config every layer keeps its full length: a sliding layer could not give up a step's keys.
            kwargs["cache"], settings.cache_implementation = DynamicCache(), None
        decoder = _Decoder(arguments, sizes, keeps_cache, kwargs.get("streamer"))
        return super().generate(inputs, settings, custom_generate=decoder, **kwargs)

    def _is_synced(self, kwargs: dict[str, Any]) -> bool:
        """Whether processes wait for the longest of their texts, which the library does not tell `custom_generate`."""
        if (given := kwargs.get("synced_gpus")) is not None:
            return given
        is_sharded = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(self)
        return is_sharded and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1

    def _with_generator(self, generator: torch.Generator | list[torch.Generator], kwargs: dict[str, Any]) -> Callable:
        """Text that is sampled by the user's generator: the last of all rules, behind the temperature."""
        own = {"streamer": kwargs.get("streamer"), "synced_gpus": self._is_synced(kwargs)}

        def sample(model, input_ids, logits_processor, **model_kwargs):
            processors = LogitsProcessorList([*logits_processor, _drawn_by(generator)])
            return GenerationMixin._sample(model, input_ids, processors, **own, **model_kwargs)

        return sample

    def _split_by_row(self, images, input_ids: torch.LongTensor, name: str = "latents") -> list[list[torch.Tensor]]:
        """The images of each row, told by its image blocks."""
        images, is_seen = [image for stack in stack_images(images) for image in stack], name == "vision_pixel_values"
        token_id = self.config.vision_token_id if is_seen else self.config.image_token_id
        counts = (image_block_ids(input_ids, token_id).amax(dim=-1) + 1).tolist()
        check_num_images(len(images), sum(counts), *([f"`{name}`"] if is_seen else []))
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
            raise ValueError("`generate()` takes no `flex_attention` with a static cache; use `sdpa`.")
        if is_first_iteration:
            return attention_mask
        return create_masks_for_generate(config=config, attention_mask=attention_mask, **kwargs)

    # The library looks for `inputs_embeds` in this signature before it accepts them.
    def prepare_inputs_for_generation(self, input_ids, is_first_iteration=False, inputs_embeds=None, **kwargs):
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in ("latents", "vision_pixel_values"):  # as the library does with `pixel_values`: in the cache
                kwargs.pop(name, None)
            kwargs["check_inputs"] = False  # a new token is no placeholder, and a step waits for the device once
        return super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, inputs_embeds=inputs_embeds, **kwargs
        )


def _refuse_adapter_names(model: torch.nn.Module) -> None:
    """`ValueError` if PEFT's hooks pick an adapter for each row: the rows of a drawing are others."""
    found = []
    for module in model.modules():
        hooks = module._forward_pre_hooks
        found += [(hooks, key) for key, hook in hooks.items() if "adapter_names" in getattr(hook, "keywords", {})]
    for hooks, key in found:
        del hooks[key]  # PEFT leaves them behind after an error
    if found:
        raise ValueError(
            "`adapter_names` picks an adapter for each row, but a drawing computes rows in several contexts; call "
            "`model.set_adapter(name)` and generate each adapter's rows together, or pass `generation_mode='text'`."
        )


class _WithoutStopStrings(GenerationConfig):
    """Does not take stop strings back from the model's own generation config, which the library fills it up from."""

    def update(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        kwargs.pop("stop_strings", None)
        return super().update(*args, **kwargs)


def _take_stop_strings(settings: GenerationConfig, kwargs: dict[str, Any]) -> None:
    """Makes stop strings a criterion: the library passes no tokenizer for them on to `custom_generate`."""
    if settings.stop_strings is not None and kwargs.get("tokenizer") is not None:
        criterion = generation.StopStringCriteria(kwargs["tokenizer"], settings.stop_strings)
        kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs["stopping_criteria"] or []), criterion])
        settings.stop_strings = None
        settings.__class__ = _WithoutStopStrings


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
        raise ValueError(f"`generation_mode={mode!r}` draws, which {decoding.value} cannot; sample, or use 'text'.")
    return "text"


class _Rows(generation.StoppingCriteria):
    """
    What is known of each row across the stretches of text: new tokens and images, parked, finished. As a criterion
    it ends the stretch of a row at `<BOI>`, at its budget, or where the given criteria say so.
    """

    def __init__(self, prompts: torch.LongTensor, criteria: StoppingCriteriaList, max_new_tokens: int, boi: int):
        self.num_new, self.num_images = prompts.new_zeros(2, len(prompts))
        self.parked, self.finished = self.num_new > 0, self.num_new > 0
        self.criteria = criteria
        self.max_new_tokens = max_new_tokens
        self.eos_token_id = boi  # the library pads stopped rows if a criterion has this attribute

    @property
    def running(self) -> torch.BoolTensor:
        return ~(self.parked | self.finished)

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs: Any) -> torch.BoolTensor:
        running = self.running
        self.num_new += running
        ended = self.criteria(input_ids, scores, **kwargs) | (self.num_new >= self.max_new_tokens)
        self.finished |= running & ended
        self.parked |= running & ~ended & (input_ids[:, -1] == self.eos_token_id)
        return ~self.running


def _never(ids: list[int], device: torch.device, is_banned: Callable[[], torch.BoolTensor] | None = None) -> Callable:
    """Keeps ids out of all rows, or those in `is_banned()`. (`SuppressTokensLogitsProcessor` searches all words.)"""
    index = torch.tensor(ids, device=device)

    def process(input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        without = scores.index_fill(-1, index.to(scores.device), -torch.inf)
        return without if is_banned is None else torch.where(is_banned()[:, None], without, scores)

    return process


def _drawn_by(generator: torch.Generator | list[torch.Generator], rows: _Rows | None = None) -> Callable:
    """Draws the token itself, with the user's generator, and leaves the library no choice."""

    def process(input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        drawn = scores.argmax(dim=-1)
        for row in range(len(scores)) if rows is None else rows.running.nonzero()[:, 0].tolist():
            own = generator[row] if isinstance(generator, list) else generator
            drawn[row] = torch.multinomial(scores[row].softmax(dim=-1).to(own.device), 1, generator=own)[0]
        return torch.full_like(scores, -torch.inf).scatter(1, drawn[:, None], 0.0)

    return process


@dataclass
class _Decoder:
    """One call of `generate()` in a mode that draws; the library's `custom_generate`."""

    arguments: DrawingArguments
    sizes: list[tuple[int, int]]
    keeps_cache: bool
    streamer: Any

    def __call__(self, model, input_ids, generation_config, logits_processor, stopping_criteria, **model_kwargs):
        self.model, self.config, self.prompts, self.prompt_length = model, model.config, input_ids, input_ids.shape[-1]
        self.generation_config, self.model_kwargs = generation_config, model_kwargs
        self.image_lengths = [self.config.num_patches(*size) + 1 for size in self.sizes]  # with <EOI>
        self._take_inputs()
        self._take_rules(logits_processor, stopping_criteria)
        self._park_prompts()
        context, is_image_mode = self.context, self.arguments.generation_mode == "image"
        latents, seen = ([list(row) for row in images] for images in (context.latents, context.seen))
        prompts = Prefixes(list(context.ids), latents, context.pad_token_id, seen=seen)
        bos_token_id = generation_config.bos_token_id
        self.guidance = guidance_prefixes(self.config, self.arguments, prompts, self.sizes, bos_token_id)
        # Prefixes are read before the first drawing where it cannot keep them for the next one: images of several
        # sizes are drawn in turn, and what a first drawing reads of guidance's contexts is gone after it.
        is_needed = len(set(self.sizes)) > 1 or (not is_image_mode and any(one.must_be_read for one in self.guidance))
        if context.num_cached or (context.cache is not None and is_needed and self.rows.parked.all()):
            self._adopt_cache()

        while not self.rows.finished.all():
            if self.rows.running.any():
                self._write()
            parked = self.rows.parked.nonzero()[:, 0].tolist()
            for size in dict.fromkeys(self.sizes[row] for row in parked):
                self._draw([row for row in parked if self.sizes[row] == size], size)
        if self.streamer is not None:
            self.streamer.end()
        new = [row[len(row) - n :] for row, n in zip(context.ids, self.rows.num_new.tolist(), strict=True)]
        new = pad_sequence(new, batch_first=True, padding_value=context.pad_token_id)
        sequences, cache = torch.cat([input_ids, new], dim=-1), context.cache if self.keeps_cache else None
        return TransfusionGenerateOutput(sequences=sequences, images=self.images, cache=cache)

    def _take_inputs(self) -> None:
        prompts, model_kwargs = self.prompts, self.model_kwargs
        if not prompts.numel():
            raise ValueError(
                f"`input_ids` must hold at least one row of at least one token; got shape {tuple(prompts.shape)}. "
                "(`inputs_embeds` need `generation_mode='text'`.)"
            )
        pad_token_id = self.generation_config._pad_token_tensor
        if pad_token_id is None:
            raise ValueError("Neither `pad_token_id` nor `eos_token_id` is set, to fill up rows; pass `pad_token_id`.")
        mask = model_kwargs.pop("attention_mask", None)
        self.mask = mask = torch.ones_like(prompts) if mask is None else mask
        if mask.shape != prompts.shape or (mask[:, :-1] > mask[:, 1:]).any() or not mask[:, -1].all():
            raise ValueError("`attention_mask` of the ids must be 0 at left padding only; use `padding_side='left'`.")
        ids = [row[row_mask.bool()] for row, row_mask in zip(prompts, mask, strict=True)]
        cache = model_kwargs.pop("cache", None)
        if any(type(layer) is not DynamicLayer for layer in getattr(cache, "layers", [])):
            raise ValueError(f"`cache` must be a `DynamicCache()` without config, all full layers; got {cache!r}.")
        # What stands before the next token of each row; without a cache, all its images are read in every pass.
        self.context = Prefixes(ids, [[] for _ in ids], int(pad_token_id), cache)
        model_kwargs.pop("position_ids", None)
        images = [model_kwargs.pop(name, None) for name in ("pixel_values", "latents")]
        if stacks := self.model.latent_stacks(*images):
            self.context.latents = self.model._split_by_row(stacks, prompts[:, self.context.num_cached :])
        if (seen := model_kwargs.pop("vision_pixel_values", None)) is not None:
            new_ids = prompts[:, self.context.num_cached :]
            self.context.seen = self.model._split_by_row(seen, new_ids, "vision_pixel_values")
        self.images: list[list[torch.Tensor]] = [[] for _ in ids]

    def _take_rules(self, logits_processor: LogitsProcessorList, stopping_criteria: StoppingCriteriaList) -> None:
        """The rules given, with those of the library that count columns replaced: a row's own tokens count."""
        for rule in logits_processor:
            if isinstance(rule, _COLUMN_COUNTING):
                raise ValueError(f"`{type(rule).__name__}` {_NO_COUNTS}; use `generation_mode='text'`.")
        config, arguments, device = self.generation_config, self.arguments, self.prompts.device
        criteria = (c for c in stopping_criteria if not isinstance(c, generation.MaxLengthCriteria))
        boi, max_new_tokens = self.config.image_start_token_id, config.max_length - self.prompt_length
        rows = self.rows = _Rows(self.prompts, StoppingCriteriaList(criteria), max_new_tokens, boi)
        self.stopping_criteria = StoppingCriteriaList([rows])
        by_column = (generation.MinLengthLogitsProcessor, generation.MinNewTokensLengthLogitsProcessor)
        self.logits_processor = LogitsProcessorList(p for p in logits_processor if not isinstance(p, by_column))
        eos, min_new_tokens = config._eos_token_tensor, (config.min_length or 0) - self.prompt_length
        if min_new_tokens > 0 and eos is not None:
            self.logits_processor.append(_never(eos.tolist(), device, lambda: rows.num_new < min_new_tokens))
        if (most := arguments.max_images) is not None:
            self.logits_processor.append(_never([boi], device, lambda: rows.num_images >= most))
        if arguments.generator is not None and config.do_sample:
            self.logits_processor.append(_drawn_by(arguments.generator, rows))

    def _park_prompts(self) -> None:
        """Parks the rows that draw at once; in `"image"` mode all, behind a `<BOI>` if they have none."""
        boi = self.prompts.new_tensor([self.config.image_start_token_id])
        self.rows.parked |= self.prompts[:, -1] == boi
        if self.arguments.generation_mode == "image":
            for row in self.rows.running.nonzero()[:, 0].tolist():
                self._append(row, boi)
            self.rows.parked[:] = True
        for row in self.rows.parked.nonzero()[:, 0].tolist():
            if self.arguments.max_images == 0:
                raise ValueError(f"`max_images` is 0, but prompt {row} asks for an image; raise it, or pass no <BOI>.")
            if (shortage := self._shortage(row)) is not None:
                raise ValueError(f"{shortage}; prompt {row} asks for one.")

    def _append(self, row: int, new: torch.LongTensor) -> None:
        self.context.ids[row] = torch.cat([self.context.ids[row], new])
        self.rows.num_new[row] += len(new)
        if self.streamer is not None:
            self.streamer.put(new.cpu())

    def _write(self) -> None:
        """One stretch of text for all running rows, by the library's loop; then every row aligned again."""
        context = self.context
        ids, mask, positions = context.align(context.ids, self.config)
        columns, before = ids.shape[1], self.rows.num_new.clone()
        model_kwargs = {**self.model_kwargs, "position_ids": positions, "cache": context.cache}
        model_kwargs["attention_mask"] = None if mask.all() else mask
        self.generation_config._mask_length = columns  # the library looks up how long a mask of ones would be
        model_kwargs |= context.images(range(len(ids)))
        # The end of a stretch of text is not that of the generation.
        streamer = None if self.streamer is None else SimpleNamespace(put=self.streamer.put, end=lambda: None)
        rules = (self.logits_processor, self.stopping_criteria, self.generation_config)
        sequences = GenerationMixin._sample(self.model, ids, *rules, streamer=streamer, **model_kwargs)
        ends = columns + self.rows.num_new - before
        for row, end in enumerate(ends.tolist()):
            context.ids[row] = torch.cat([context.ids[row], sequences[row, columns:end]])
        self._align_cache(ends - 1)  # a row's last token counts as not yet cached
        for row in self.rows.parked.nonzero()[:, 0].tolist():
            if (shortage := self._shortage(row)) is not None:
                self.rows.parked[row], self.rows.finished[row] = False, True
                logger.warning(f"Row {row} ends at <BOI>: {shortage}.")

    def _shortage(self, row: int) -> str | None:
        """What is too small for the next image of a row."""
        needed, length = self.image_lengths[row], len(self.context.ids[row])
        image = f"an image needs {needed}, {needed - 1} patches and <EOI>"
        left = self.rows.max_new_tokens - int(self.rows.num_new[row])
        if needed > left:
            return f"`max_new_tokens` leaves {left} tokens, and {image}"
        num_positions = getattr(self.config.text_config, "max_position_embeddings", None)
        if num_positions is not None and length + needed > num_positions:
            return f"`max_position_embeddings` leaves {num_positions - length} positions, and {image}"
        return None

    def _align_cache(self, ends: torch.LongTensor) -> None:
        """Moves what ends at these columns to the last one. The cache then holds all images read so far."""
        if self.context.cache is not None:
            self.context.forget_images()
            length = max(len(row) for row in self.context.ids) - 1
            for layer in self.context.cache.layers:
                layer.keys, layer.values = move_columns(layer, length, ends=ends)

    def _adopt_cache(self) -> None:
        """Reads what of the prompts a cache handed in does not hold yet, and aligns it with the rows."""
        context, num_cached = self.context, self.context.num_cached
        if num_cached >= self.prompt_length:
            raise ValueError(
                f"`cache` holds {num_cached} tokens and `input_ids` only {self.prompt_length}; pass all ids so far, "
                "those in the cache included, and at least one new one."
            )
        if num_cached and not self.mask[:, 0].any():
            raise ValueError("`input_ids` begins with columns that are padding in every row; drop them for a `cache`.")
        context.read_columns(self.model, self.prompts, self.mask)
        # A row's last token, in the prompt or the <BOI> appended to it, counts as not yet cached.
        self._align_cache(self.prompt_length - 1 + self.rows.num_new)

    def _draw(self, rows: list[int], size: tuple[int, int]) -> None:
        """One denoising loop for rows of one size, the images read back in, `<EOI>`."""
        context, config = self.context, self.generation_config
        options = None if config.disable_compile else config.compile_config
        drawing = Drawing(self.model, self.arguments, [context, *self.guidance], rows, size, options)
        x_0, images = drawing.run(self.streamer)
        patches = [self.config.image_token_id] * (self.image_lengths[rows[0]] - 1)
        block = self.prompts.new_tensor([*patches, self.config.image_end_token_id])
        for i, row in enumerate(rows):
            self._append(row, block)
            self.images[row].append(images[i])
            context.latents[row].append(x_0[i])
        self.rows.num_images[rows] += 1
        self.rows.parked[rows] = False
        ends_here = self.arguments.generation_mode == "image"
        self.rows.finished[rows] |= ends_here | (self.rows.num_new[rows] >= self.rows.max_new_tokens)
        if context.cache is not None:
            context.forget_images()
            if self.keeps_cache or not (ends_here or self.rows.finished.all()):
                self._commit(rows, drawing.read_back(x_0))

    def _commit(self, rows: list[int], drawn: Cache) -> None:
        """Puts the keys and values of the rows drawn, images included, into the cache, every row aligned."""
        ids, cache = self.context.ids, self.context.cache
        assert cache is not None
        length = max(len(row) for row in ids) - 1
        for number, drawn_layer in enumerate(drawn.layers):
            # Without `<EOI>`, which is a row's last token.
            ends = torch.full((len(rows),), drawn_layer.keys.shape[2] - self.config.image_markers_in_block)
            states = move_columns(drawn_layer, length, slice(len(rows)), ends)
            if number == len(cache.layers):  # all rows, before anything was read
                cache.update(*states, number)
                continue
            layer: Any = cache.layers[number]
            if len(rows) < len(ids):
                aligned = move_columns(layer, length)
                for target, source in zip(aligned, states, strict=True):
                    target[rows] = source
                states = aligned
            layer.keys, layer.values = states
