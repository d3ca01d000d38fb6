"""
`generate()` for Transfusion (§3, Inference, arXiv 2408.11039): a language model that draws when it says `<BOI>`.

Each stretch of text is the library's own `_sample`. A row that emits `<BOI>` is parked while the others go on; when
every row is parked or finished, all parked rows are drawn together in one denoising loop, the finished images are read
back in at t = 0, `<EOI>` is appended, and the text goes on.

Rows are kept *aligned*: their last tokens stand in one column and pads only at the left, in the ids and, for every
token but the last, in the cache. Time runs from t = T − 1, noise, down to t = 0.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation import (
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    GenerationMode,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import ModelOutput, logging

from .denoising_transfusion import DenoisingLoop, GuidanceBranches, align, move_columns, positions_of, undone_on_error
from .diffusion_transfusion import make_sampling_scheduler
from .masking_transfusion import image_block_ids
from .patching_transfusion import stack_images

logger = logging.get_logger(__name__)

# What `generate()` takes beside the library's own parameters, and what may stand in `generation_config.json` of it.
DRAWING_DEFAULTS: dict[str, Any] = {
    "generation_mode": None,
    "num_inference_steps": 250,
    "image_guidance_scale": 3.0,
    "input_image_guidance_scale": None,
    "guidance_start": 0.0,
    "guidance_end": 1.0,
    "guidance_rescale": 0.0,
    "strength": 1.0,
    "max_images": None,
    "progress_bar": False,
    "height": None,
    "width": None,
    "scheduler": None,
}
_MODES = ("interleaved", "text", "image")
# These count columns from the prompt's end; parked rows make columns and tokens two things.
_COLUMN_COUNTING = (
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
)


@dataclass
class TransfusionGenerateOutput(ModelOutput):
    """
    Args:
        sequences (`torch.LongTensor` of shape `(batch, seq)`):
            The prompts as they came, then the new ids, filled up with padding at the right. A drawn image is `<BOI>`,
            one placeholder per patch, `<EOI>`.
        images (`list[list[torch.FloatTensor]]`):
            For each row the images drawn, in order: `(channels, height, width)`, float32, about [−1, 1].
        past_key_values (`Cache`, *optional*):
            Keys and values of every row but for its last token, pads at the left; with `return_dict_in_generate=True`.
    """

    sequences: torch.LongTensor | None = None
    images: list[list[torch.Tensor]] | None = None
    past_key_values: Cache | None = None


class TransfusionGenerationMixin(GenerationMixin):
    """`generate()` that switches between text and diffusion."""

    def generate(self, *args: Any, **kwargs: Any) -> TransfusionGenerateOutput | ModelOutput | torch.LongTensor:
        r"""
        Writes text and draws images. Takes all that [`~transformers.GenerationMixin.generate`] takes, and:

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`, *optional*):
                The images of the prompts, of all rows in order; `latents` likewise.
            generation_mode (`str`, *optional*, defaults to `"interleaved"`):
                `"interleaved"`: text, and an image wherever the model says `<BOI>`. `"text"`: `<BOI>` is suppressed.
                `"image"`: one image for each prompt, at once. A prompt that ends at `<BOI>` draws at once, too. With
                `return_dict_in_generate=False` given, which asks for ids alone, the default is `"text"`.
            num_inference_steps (`int`, *optional*, defaults to 250): Denoising steps per image, 1 to T.
            image_guidance_scale (`float`, *optional*, defaults to 3.0):
                Classifier-free guidance of images; 1 is off and costs nothing. The unconditional context is `<BOI>`,
                behind the beginning-of-sequence token if the prompt begins with it. (`guidance_scale` is the
                library's guidance of *text*.)
            input_image_guidance_scale (`float`, *optional*):
                A scale of its own for the images of the prompt, as InstructPix2Pix has it (arXiv 2211.09800): how
                closely a drawing keeps to them, while `image_guidance_scale` says how closely it keeps to the text.
                A third context, the images without the text, goes through each pass. `None`: one scale for both.
            negative_prompt_ids (`torch.LongTensor` of shape `(batch, seq)` or `(1, seq)`, *optional*):
                Takes the place of the unconditional context: what not to draw. With `negative_prompt_attention_mask`.
            guidance_start (`float`, defaults to 0.0), guidance_end (`float`, defaults to 1.0):
                The fractions of the steps between which there is guidance; the others cost one context.
            guidance_rescale (`float`, defaults to 0.0): φ of arXiv 2305.08891, against overexposure.
            init_image (`torch.FloatTensor` of shape `(batch, channels, height, width)`, *optional*):
                In `"image"` mode: what to begin with, in [−1, 1], of the size of the drawing. With `strength`: a
                variation of it. With `mask_image`: inpainting.
            mask_image (`torch.Tensor` of shape `(batch, 1, height, width)` or `(1, 1, height, width)`, *optional*):
                Not 0 where to draw; elsewhere `init_image` stays as it is, latent pixel by latent pixel.
            strength (`float`, defaults to 1.0): Share of the steps to take, from `init_image` under noise; above 0.
            max_images (`int`, *optional*): Images that a row may draw; then `<BOI>` is suppressed in it.
            progress_bar (`bool`, defaults to `False`): Whether to show one for the denoising steps.
            callback_on_step_end (`Callable`, *optional*):
                Called after each denoising step, as diffusers does, with the model, the number of the step, t, and
                `{"latents": x_t}` of the rows that draw; what it returns under `"latents"` takes its place.
            height (`int` or `list[int]`, *optional*), width (`int` or `list[int]`, *optional*):
                Pixels of the drawn images, multiples of `config.pixels_per_patch`; default `config.sample_size`. A
                list has one for each row; rows of one size are drawn together.
            scheduler (`SchedulerMixin` or `str`, *optional*):
                A diffusers scheduler, or the name of one, as `"DDIMScheduler"`; default the paper's DDPM sampler.
            compile_config (`CompileConfig`, *optional*):
                Compiles the single steps of text and of denoising, on any device; prompts are read uncompiled. With
                `dynamic=True` further prompts and images compile nothing anew, and `mode="default"` records no CUDA
                graph for each new length.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One for all, or one per row: then each row comes out as it does alone. Draws noise, and text if
                `do_sample=True`.

        Every id that a row gains is a new token: text, `<BOI>`, patches and `<EOI>`. `max_new_tokens` and
        `min_new_tokens` count them row by row, whatever the other rows do. An image is drawn whole or not at all: a
        row whose remaining budget is too small for one ends at its `<BOI>`, with a warning, and so does one without
        positions left for it (`max_position_embeddings`). Without any limit given, a row may gain the library's 20
        tokens and one image, the largest of those asked for; `"image"` mode knows no limit. Rules that look at the
        history, as `no_repeat_ngram_size`, see all ids of a row. Beam search, assisted decoding and all others but
        greedy search and sampling run in `"text"` mode.

        Returns:
            In `"text"` mode what the library returns; otherwise a [`TransfusionGenerateOutput`].

        Raises:
            ValueError: an unknown mode or scheduler, steps or size out of range, a prompt that ends among patches, a
                budget or a range of positions that cannot hold an image asked for, or an option that has no meaning
                beside images.
        """
        with undone_on_error(kwargs.get("past_key_values")):
            return super().generate(*args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any):
        raise ValueError(
            f"Continuous batching is not supported by {type(self).__name__}: it has its own loop, which cannot draw. "
            "Use `generate()`."
        )

    # What follows overrides the library's preparation, in the order in which `generate()` calls it.

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs: Any):
        names = [*DRAWING_DEFAULTS, "generator", "callback_on_step_end", "init_image", "mask_image"]
        ours = {name: value for name in names if (value := kwargs.pop(name, None)) is not None}
        if kwargs.get("return_dict_in_generate") is False and "generation_mode" not in ours:
            # Whoever asks for a bare tensor, as transformers' image-text-to-text pipeline does, wants text.
            ours["generation_mode"] = "text"
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        for name in names:
            stored = getattr(generation_config, name, None)
            default = DRAWING_DEFAULTS.get(name) if stored is None else stored
            setattr(generation_config, name, ours.get(name, default))
        return generation_config, model_kwargs

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)
        mode = generation_config.generation_mode
        if mode is not None and mode not in _MODES:
            raise ValueError(f"`generation_mode` must be one of {', '.join(_MODES)}; got {mode!r}.")
        if generation_mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            generation_config.generation_mode = mode or "interleaved"
        elif generation_config.generator is not None:
            raise ValueError(f"`generator` is not used by {generation_mode.value}; seed torch's global generator.")
        elif mode in (None, "text"):
            generation_config.generation_mode = "text"
        else:
            raise ValueError(
                f"`generation_mode={mode!r}` draws, which {generation_mode.value} cannot; use greedy search or "
                "sampling, or `generation_mode='text'`."
            )
        if generation_config.generation_mode == "text":
            return
        for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
            if getattr(generation_config, name):
                raise ValueError(f"`{name}` records columns, which images break; use `generation_mode='text'`.")
        if generation_config.guidance_scale not in (None, 1):
            raise ValueError(
                f"`guidance_scale={generation_config.guidance_scale}` guides text, by a second language model context "
                "that knows no images; to guide images pass `image_guidance_scale`, to guide text "
                "`generation_mode='text'`."
            )
        if generation_config.prefill_chunk_size is not None:
            raise ValueError("`prefill_chunk_size` could cut an image in two; use `generation_mode='text'`.")

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        # Images belong to rows in groups; the library would repeat them one by one.
        for name in ("pixel_values", "latents"):
            if expand_size > 1 and model_kwargs.get(name) is not None:
                rows = self._split_by_row(model_kwargs.pop(name), input_ids)
                images = [image for row in rows for _ in range(expand_size) for image in row]
                input_ids_, model_kwargs = super()._expand_inputs_for_generation(
                    expand_size, is_encoder_decoder, input_ids, **model_kwargs
                )
                return input_ids_, {**model_kwargs, name: images}
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)

    def _split_by_row(self, images, input_ids: torch.LongTensor) -> list[list[torch.Tensor]]:
        """The images of each row, told by its image blocks."""
        images = [image for stack in stack_images(images) for image in stack]
        counts = (image_block_ids(input_ids, self.config.image_token_id).amax(dim=-1) + 1).tolist()
        if sum(counts) != len(images):
            raise ValueError(
                f"`pixel_values` or `latents` hold {len(images)} images but `input_ids` has {sum(counts)} image "
                "blocks; pass one image per block."
            )
        iterator = iter(images)
        return [[next(iterator) for _ in range(count)] for count in counts]

    def _prepare_generated_length(self, generation_config, has_default_max_length, input_ids_length, **kwargs):
        mode = generation_config.generation_mode
        sizes = [] if mode == "text" else self._drawn_sizes(generation_config)
        image_length = max((self.config.num_patches(*size) + 2 for size in sizes), default=0)
        if mode == "image":
            generation_config.max_new_tokens, has_default_max_length = image_length, True
        has_default = has_default_max_length and generation_config.max_new_tokens is None
        generation_config = super()._prepare_generated_length(
            generation_config=generation_config,
            has_default_max_length=has_default_max_length,
            input_ids_length=input_ids_length,
            **kwargs,
        )
        if has_default:
            generation_config.max_length += image_length
        return generation_config

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        wants_default = model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False
        if generation_config.generation_mode == "text" or not wants_default:
            return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"`cache_implementation={generation_config.cache_implementation!r}` cannot give up the keys of a "
                "denoising step; use 'dynamic', or `generation_mode='text'`."
            )
        # Without the config every layer keeps its full length: a sliding layer could not give up a step's keys.
        model_kwargs["past_key_values"] = DynamicCache()

    def _get_logits_processor(self, generation_config, *args, **kwargs):
        names = ("negative_prompt_ids", "negative_prompt_attention_mask")
        generation_config._negative_prompt = tuple(kwargs.get(name) for name in names)
        if generation_config.generation_mode != "text":
            self._check_guidance(generation_config)
            # Before anything is read, and though perhaps nothing will be drawn.
            steps = generation_config.num_inference_steps
            make_sampling_scheduler(self.noise_scheduler, generation_config.scheduler, steps, self.device)
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        # Placeholders and <EOI> are appended by the decoder, never sampled (§3). First of all, so that what is sampled
        # from is a distribution without them.
        never = [self.config.image_token_id, self.config.image_end_token_id]
        if generation_config.generation_mode == "text":
            never.append(self.config.image_start_token_id)
        processors.insert(0, _Never(never, kwargs.get("device") or "cpu"))
        return processors

    @staticmethod
    def _check_guidance(generation_config: GenerationConfig) -> None:
        start, end = generation_config.guidance_start, generation_config.guidance_end
        if not 0 <= start <= end <= 1:
            raise ValueError(
                "`guidance_start` and `guidance_end` must be fractions of the steps, 0 ≤ start ≤ end ≤ 1; got "
                f"{start} and {end}."
            )
        is_drawing = generation_config.generation_mode == "image"
        for name in ("init_image", "mask_image"):
            if getattr(generation_config, name) is not None and not is_drawing:
                raise ValueError(f"`{name}` belongs to one drawing of each row; pass `generation_mode='image'`.")
        if generation_config.init_image is None:
            if generation_config.mask_image is not None or generation_config.strength != 1:
                raise ValueError("`mask_image` and `strength` need an `init_image` to begin with.")
        elif generation_config.mask_image is None and generation_config.strength == 1:
            raise ValueError("`init_image` does nothing at a `strength` of 1; lower it, or pass a `mask_image`.")
        if not 0 < generation_config.strength <= 1:
            raise ValueError(f"`strength` must lie above 0 and up to 1; got {generation_config.strength}.")
        max_images = generation_config.max_images
        if max_images is not None and max_images < 0:
            raise ValueError(f"`max_images` must be 0 or more, or None; got {max_images}.")
        if not 0 <= generation_config.guidance_rescale <= 1:
            raise ValueError(f"`guidance_rescale` must lie in 0 to 1; got {generation_config.guidance_rescale}.")
        scale = generation_config.input_image_guidance_scale
        scale = generation_config.image_guidance_scale if scale is None else scale
        if generation_config._negative_prompt[0] is not None and scale == 1:
            raise ValueError("`negative_prompt_ids` does nothing at a guidance scale of 1; raise it or drop them.")

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config):
        if generation_config.generation_mode == "text":
            return super()._valid_auto_compile_criteria(model_kwargs, generation_config)
        # The library compiles for static caches only, by itself; here it is done where it was asked for.
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

    def _sample(
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer=None,
        **model_kwargs: Any,
    ):
        if input_ids.shape[1] and (input_ids[:, -1] == self.config.image_token_id).any():
            raise ValueError(
                "`input_ids` ends among the patches of an image; end a prompt with text, with `<EOI>` after an image, "
                "or with `<BOI>` to draw one."
            )
        generators = generation_config.generator
        if isinstance(generators, list) and len(generators) != len(input_ids):
            raise ValueError(
                f"`generator` holds {len(generators)} generators for {len(input_ids)} rows; pass one each."
            )
        if generation_config.generation_mode == "text":
            logits_processor = self._with_generator(logits_processor, generation_config, None)
            return super()._sample(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )
        if synced_gpus:
            raise ValueError("`synced_gpus` keeps step with text only; use `generation_mode='text'`.")
        decoder = _InterleavedDecoder(self, input_ids, generation_config, streamer, model_kwargs)
        return decoder.run(logits_processor, stopping_criteria)

    def _with_generator(self, logits_processor, generation_config, rows: "_Rows | None") -> LogitsProcessorList:
        if generation_config.generator is None or not generation_config.do_sample:
            return logits_processor
        if generation_config.output_scores:
            raise ValueError("`output_scores` would show the token that `generator` drew; pass only one of them.")
        return LogitsProcessorList([*logits_processor, _SampleWithGenerator(generation_config.generator, rows)])

    def _drawn_sizes(self, generation_config) -> list[tuple[int, int]]:
        """Height and width of the drawn latents: of each row, or one for all."""
        factor, num_sizes = self.config.vae_scale_factor, 1
        sides: list[list[int]] = []
        for name, default in zip(("height", "width"), self.config.latent_size, strict=True):
            given = getattr(generation_config, name)
            given = list(given) if isinstance(given, (list, tuple)) else [given]
            for side in given:
                is_whole = isinstance(side, int) and side > 0 and side % self.config.pixels_per_patch == 0
                if side is not None and not is_whole:
                    raise ValueError(
                        f"`{name}` must be a positive multiple of {self.config.pixels_per_patch} pixels (VAE factor × "
                        f"patch size); got {side!r}."
                    )
            sides.append([default if side is None else side // factor for side in given])
            num_sizes = max(num_sizes, len(given))
        heights, widths = (own * num_sizes if len(own) == 1 else own for own in sides)
        if not len(heights) == len(widths) == num_sizes:
            raise ValueError(
                f"`height` and `width` must be numbers, or lists with one for each row; got {len(sides[0])} and "
                f"{len(sides[1])}."
            )
        return list(zip(heights, widths, strict=True))


class _Rows:
    """What is known of each row across the stretches of text: new tokens, parked, finished."""

    def __init__(self, batch_size: int, device: torch.device):
        self.num_new = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.parked = torch.zeros(batch_size, dtype=torch.bool, device=device)
        self.finished = torch.zeros(batch_size, dtype=torch.bool, device=device)

    @property
    def running(self) -> torch.BoolTensor:
        return ~(self.parked | self.finished)


class _EndOfText(StoppingCriteria):
    """Ends the stretch of each row at `<BOI>`, at its budget, or where the given criteria say so; remembers which."""

    def __init__(self, criteria: StoppingCriteriaList, rows: _Rows, boi: int, max_new_tokens: int):
        self.criteria = criteria
        self.rows = rows
        self.max_new_tokens = max_new_tokens
        self.eos_token_id = boi  # `_sample` fills up stopped rows with padding if a criterion has this attribute

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs: Any) -> torch.BoolTensor:
        running = self.rows.running
        self.rows.num_new += running
        ended = self.criteria(input_ids, scores, **kwargs) | (self.rows.num_new >= self.max_new_tokens)
        self.rows.finished |= running & ended
        self.rows.parked |= running & ~ended & (input_ids[:, -1] == self.eos_token_id)
        return ~self.rows.running


class _Never(LogitsProcessor):
    """Keeps ids out; the library's `SuppressTokensLogitsProcessor` searches the vocabulary for them at each token."""

    def __init__(self, ids: list[int], device: torch.device | str):
        self.ids = torch.tensor(ids, device=device)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return scores.index_fill(-1, self.ids.to(scores.device), -torch.inf)


class _MinNewTokens(LogitsProcessor):
    """Keeps the end-of-sequence token out of rows that have gained fewer than `min_new_tokens`."""

    def __init__(self, rows: _Rows, min_new_tokens: int, eos_token_id: torch.Tensor):
        self.rows = rows
        self.min_new_tokens = min_new_tokens
        self.eos_token_id = eos_token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        too_short = self.rows.num_new < self.min_new_tokens
        scores = scores.clone()
        scores[:, self.eos_token_id] = scores[:, self.eos_token_id].masked_fill(too_short[:, None], -torch.inf)
        return scores


class _MaxImages(LogitsProcessor):
    """Keeps `<BOI>` out of rows that have drawn as many images as they may."""

    def __init__(self, images: list[list[torch.Tensor]], max_images: int, boi: int):
        self.images = images
        self.max_images = max_images
        self.boi = boi

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        has_all = torch.tensor([len(row) >= self.max_images for row in self.images], device=scores.device)
        scores = scores.clone()
        scores[:, self.boi] = scores[:, self.boi].masked_fill(has_all, -torch.inf)
        return scores


class _SampleWithGenerator(LogitsProcessor):
    """Draws the token itself, with the user's generator, and leaves `_sample` no choice."""

    def __init__(self, generator: torch.Generator | list[torch.Generator], rows: _Rows | None):
        self.generator = generator
        self.rows = rows

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        batch_size = len(scores)
        running = range(batch_size) if self.rows is None else self.rows.running.nonzero()[:, 0].tolist()
        drawn = scores.argmax(dim=-1)
        for row in running:
            generator = self.generator[row] if isinstance(self.generator, list) else self.generator
            probabilities = scores[row].softmax(dim=-1).to(generator.device)
            drawn[row] = torch.multinomial(probabilities, 1, generator=generator)[0]
        return torch.full_like(scores, -torch.inf).scatter(1, drawn[:, None], 0.0)


class _SegmentStreamer:
    """Hands tokens on and swallows the end of each stretch of text, which is not that of the generation."""

    def __init__(self, streamer):
        self.streamer = streamer

    def put(self, value: torch.Tensor) -> None:
        self.streamer.put(value)

    def end(self) -> None:
        pass


class _InterleavedDecoder:
    """One call of `generate()` in a mode that draws."""

    def __init__(self, model, input_ids, generation_config, streamer, model_kwargs):
        self.model = model
        self.config = model.config
        self.generation_config = generation_config
        self.streamer = streamer
        self.device = input_ids.device
        self.prompts = input_ids
        batch_size, self.prompt_length = input_ids.shape
        if not input_ids.numel():
            raise ValueError(
                f"`input_ids` must hold at least one row of at least one token; got shape {tuple(input_ids.shape)}. "
                "(`inputs_embeds` need `generation_mode='text'`.)"
            )
        if generation_config._pad_token_tensor is None:
            raise ValueError(
                "Neither `pad_token_id` nor `eos_token_id` is set: rows that stop have nothing to be filled up with. "
                "Pass `pad_token_id` or set it in `model.generation_config`."
            )
        self.pad_token_id = int(generation_config._pad_token_tensor)
        self.generators = generation_config.generator

        mask = model_kwargs.pop("attention_mask", None)
        mask = torch.ones_like(input_ids) if mask is None else mask
        if mask.shape != input_ids.shape or (mask[:, :-1] > mask[:, 1:]).any() or not mask[:, -1].all():
            raise ValueError(
                "`attention_mask` must have the shape of `input_ids` and be 0 at left padding only; use "
                "`padding_side='left'`."
            )
        self.mask = mask
        self.ids = [row[row_mask.bool()] for row, row_mask in zip(input_ids, mask, strict=True)]
        self.rows = _Rows(batch_size, self.device)

        model_kwargs.pop("position_ids", None)
        pixel_values, latents = model_kwargs.pop("pixel_values", None), model_kwargs.pop("latents", None)
        if pixel_values is not None:
            latents = model.encode_images(pixel_values)
        self.cache = model_kwargs.pop("past_key_values", None)
        self._check_cache()
        num_cached = 0 if self.cache is None else self.cache.get_seq_length()
        # The images of each row that are not in the cache; without one, all of them, read anew in every pass.
        self.latents = (
            [[] for _ in self.ids] if latents is None else model._split_by_row(latents, input_ids[:, num_cached:])
        )
        self.prompt_latents = list(self.latents)
        self.images: list[list[torch.Tensor]] = [[] for _ in self.ids]
        self.model_kwargs = model_kwargs

        self.sizes = model._drawn_sizes(generation_config)
        if len(self.sizes) == 1:
            self.sizes *= batch_size
        if len(self.sizes) != batch_size:
            raise ValueError(f"`height` or `width` holds {len(self.sizes)} for {batch_size} rows; pass one each.")
        self.image_lengths = [self.config.num_patches(*size) + 1 for size in self.sizes]  # with <EOI>
        self.known_latents, self.known_mask = self._known(generation_config.init_image, generation_config.mask_image)
        self.max_new_tokens = generation_config.max_length - self.prompt_length
        self.min_new_tokens = (generation_config.min_length or 0) - self.prompt_length

    def _known(self, image, mask) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What a drawing begins with, in latents, and where it is to be drawn anew."""
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
        # A latent pixel is drawn anew if one of its pixels is.
        mask = torch.nn.functional.max_pool2d((mask != 0).float().to(self.device), factor) > 0
        return known, mask.expand(batch_size, -1, -1, -1)

    def _check_cache(self) -> None:
        if self.cache is None:
            return
        is_dynamic = isinstance(self.cache, DynamicCache)
        if not is_dynamic or any(type(layer) is not DynamicLayer for layer in self.cache.layers):
            raise ValueError(
                "`past_key_values` must be a `DynamicCache()` without config, all of whose layers keep their full "
                f"length: the keys of a denoising step are given up again. Got {self.cache!r}."
            )

    def run(self, logits_processor: LogitsProcessorList, criteria: StoppingCriteriaList) -> TransfusionGenerateOutput:
        boi = self.config.image_start_token_id
        ends_at_boi = self.prompts[:, -1] == boi
        num_uncached = torch.ones_like(ends_at_boi, dtype=torch.long)
        if self.generation_config.generation_mode == "image":
            num_uncached -= (~ends_at_boi).long()  # the <BOI> appended is the uncached token then
            for row in (~ends_at_boi).nonzero()[:, 0].tolist():
                self._append(row, self.prompts.new_tensor([boi]))
            self.rows.parked[:] = True
        else:
            self.rows.parked |= ends_at_boi
        for row in self.rows.parked.nonzero()[:, 0].tolist():
            if self.generation_config.max_images == 0:
                raise ValueError(f"`max_images` is 0, but prompt {row} asks for an image; raise it, or pass no <BOI>.")
            if (shortage := self._shortage(row)) is not None:
                raise ValueError(f"{shortage}; prompt {row} asks for one.")
        num_cached = 0 if self.cache is None else self.cache.get_seq_length()
        self.branches = GuidanceBranches(self)
        # Prefixes are read before the first drawing where it cannot keep them for the next one: images of several
        # sizes are drawn in turn, and what a first drawing reads of guidance's contexts is gone after it.
        is_needed = len(set(self.sizes)) > 1 or (
            self.generation_config.generation_mode != "image" and self.branches.have_prefixes
        )
        reads_ahead = self.cache is not None and bool(self.rows.parked.all()) and is_needed
        if num_cached or reads_ahead:
            self._adopt_cache(num_uncached)
        logits_processor, criteria = self._per_row(logits_processor, criteria)

        while not self.rows.finished.all():
            if self.rows.running.any():
                self._write(logits_processor, criteria)
            parked = self.rows.parked.nonzero()[:, 0].tolist()
            if parked:
                self._draw(parked)
        if self.streamer is not None:
            self.streamer.end()
        return self._output()

    def _per_row(self, logits_processor, criteria) -> tuple[LogitsProcessorList, StoppingCriteriaList]:
        """The user's rules, with those that count columns replaced by ones that count the tokens of a row."""
        for processor in logits_processor:
            if isinstance(processor, (*_COLUMN_COUNTING, UnbatchedClassifierFreeGuidanceLogitsProcessor)):
                raise ValueError(
                    f"{type(processor).__name__} counts columns, which is meaningless once images are drawn; use "
                    "`generation_mode='text'`."
                )
        by_column = (MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor)
        processors = LogitsProcessorList(p for p in logits_processor if not isinstance(p, by_column))
        eos_token_id = self.generation_config._eos_token_tensor
        if self.min_new_tokens > 0 and eos_token_id is not None:
            processors.append(_MinNewTokens(self.rows, self.min_new_tokens, eos_token_id))
        if self.generation_config.max_images is not None:
            boi = self.config.image_start_token_id
            processors.append(_MaxImages(self.images, self.generation_config.max_images, boi))
        processors = self.model._with_generator(processors, self.generation_config, self.rows)
        criteria = StoppingCriteriaList(c for c in criteria if not isinstance(c, MaxLengthCriteria))
        end = _EndOfText(criteria, self.rows, self.config.image_start_token_id, self.max_new_tokens)
        return processors, StoppingCriteriaList([end])

    def prompt_ids(self) -> list[torch.LongTensor]:
        """The ids of each prompt without padding."""
        return [row[mask.bool()] for row, mask in zip(self.prompts, self.mask, strict=True)]

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
        # The loop's own: it returns the ids alone, and looks up how long a mask of ones would be.
        generation_config = copy.copy(self.generation_config)
        generation_config.return_dict_in_generate = False
        generation_config._mask_length = columns
        model_kwargs = {
            **self.model_kwargs,
            "attention_mask": None if mask.all() else mask,
            "position_ids": positions_of(mask),
            "past_key_values": self.cache,
        }
        if any(self.latents):
            model_kwargs["latents"] = [image for row in self.latents for image in row]
        sequences = GenerationMixin._sample(
            self.model,
            ids,
            logits_processor,
            criteria,
            generation_config,
            streamer=None if self.streamer is None else _SegmentStreamer(self.streamer),
            **model_kwargs,
        )
        taken = (self.rows.num_new - before).tolist()
        self.ids = [
            torch.cat([row, new[columns : columns + n]])
            for row, new, n in zip(self.ids, sequences, taken, strict=True)
        ]
        if self.cache is not None:
            self.latents = [[] for _ in self.ids]
            ends = columns + self.rows.num_new - before - 1  # the last token of a row counts as not yet cached
            self._align_cache(ends)
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
        for layer in self.cache.layers:
            layer.keys = move_columns(layer.keys, ends, length)
            layer.values = move_columns(layer.values, ends, length)

    def _adopt_cache(self, num_uncached: torch.LongTensor) -> None:
        """Reads what of the prompts a cache handed in does not hold yet, and aligns it with the rows."""
        num_cached = self.cache.get_seq_length()
        if num_cached >= self.prompt_length:
            raise ValueError(
                f"`past_key_values` holds {num_cached} tokens and `input_ids` only {self.prompt_length}; pass all "
                "ids so far, those in the cache included, and at least one new one."
            )
        if num_cached and not self.mask[:, 0].any():
            raise ValueError(
                "`input_ids` begins with columns that are padding in every row, which `past_key_values` may or may "
                "not hold; drop those columns."
            )
        self.model(
            self.prompts[:, num_cached:],
            latents=[image for row in self.latents for image in row] or None,
            attention_mask=self.mask,
            position_ids=positions_of(self.mask)[:, num_cached:],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.latents = [[] for _ in self.ids]
        self._align_cache(self.prompt_length - num_uncached)

    def _draw(self, parked: list[int]) -> None:
        """All parked rows, those of one size together."""
        for size in dict.fromkeys(self.sizes[row] for row in parked):
            self._draw_alike([row for row in parked if self.sizes[row] == size])

    def _draw_alike(self, rows: list[int]) -> None:
        """One denoising loop, the images read back in, `<EOI>`."""
        generators = [self.generators[row] for row in rows] if isinstance(self.generators, list) else self.generators
        loop = DenoisingLoop(self, rows)
        x_0 = loop.run(generators)
        images = self.model.decode_latents(x_0)
        image = self.ids[0].new_tensor(
            [self.config.image_token_id] * (self.image_lengths[rows[0]] - 1) + [self.config.image_end_token_id]
        )
        ends_here = self.generation_config.generation_mode == "image"
        if hasattr(self.streamer, "put_image"):
            self.streamer.put_image(images[0], loop.num_steps, loop.num_steps)
        for i, row in enumerate(rows):
            self._append(row, image)
            self.images[row].append(images[i])
            if self.cache is None:
                self.latents[row].append(x_0[i])
        self.rows.parked[rows] = False
        self.rows.finished[rows] |= ends_here | (self.rows.num_new[rows] >= self.max_new_tokens)
        if self.cache is None:
            return
        self.latents = [[] for _ in self.ids]
        is_wanted = self.generation_config.return_dict_in_generate or getattr(self.cache, "_is_user_defined", False)
        if is_wanted or not (ends_here or self.rows.finished.all()):
            loop.commit(x_0)

    def _output(self) -> TransfusionGenerateOutput:
        """The prompts as they came, and behind them what each row gained."""
        new = [row[len(row) - n :] for row, n in zip(self.ids, self.rows.num_new.tolist(), strict=True)]
        new = torch.nn.utils.rnn.pad_sequence(new, batch_first=True, padding_value=self.pad_token_id)
        return TransfusionGenerateOutput(
            sequences=torch.cat([self.prompts, new], dim=-1),
            images=self.images,
            past_key_values=self.cache if self.generation_config.return_dict_in_generate else None,
        )


__all__ = ["TransfusionGenerateOutput", "TransfusionGenerationMixin"]
