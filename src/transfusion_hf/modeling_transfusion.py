"""Transfusion (Zhou et al., arXiv 2408.11039): a transformers decoder, light image parts around it, two losses."""

from collections.abc import Sequence
from dataclasses import dataclass
from json import JSONDecodeError
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel, Cache, PreTrainedConfig, PreTrainedModel, initialization
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from .attention_transfusion import VarlenPlan
from .configuration_transfusion import IMAGE_TOKEN_IDS, TransfusionConfig
from .denoising_transfusion import DRAWING_DEFAULTS
from .diffusion_transfusion import (
    BatchCounts,
    at_least_float32,
    check_per_image,
    check_timesteps,
    chosen_images,
    content_seeds,
    image_loss_weights,
    image_losses,
    make_noise_scheduler,
    mean_image_loss,
    noise_images,
    places_of,
    scale_logits,
    sum_cross_entropy_,
    sum_cross_entropy_by_liger,
)
from .generation_transfusion import TransfusionGenerationMixin
from .masking_transfusion import (
    attention_block_ids,
    check_attn_implementation,
    check_image_blocks,
    check_vision_blocks,
    create_transfusion_mask,
    image_block_ids,
    is_prepared,
    no_mask,
    positions_of_images,
    share_positions,
)
from .modality_transfusion import ModalityRouter, image_parameters, untie_modalities
from .patching_transfusion import (
    FrozenLinear,
    TransfusionVisionEncoder,
    apply_by_size,
    make_patch_parts,
    make_vae,
    rae_positions,
    sincos_positions,
    stack_images,
)

# Decoders whose logits are `scale_logits(lm_head(model(x)))`, with softmax attention in all layers under a mask that
# the model takes prepared: a test holds each to its own `...ForCausalLM`.
SUPPORTED_TEXT_MODELS = (
    "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "granite",
    "helium", "llama", "ministral", "mistral", "olmo", "olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen3", "seed_oss",
    "smollm3", "stablelm", "starcoder2",
)  # fmt: skip


def check_text_config(text_config: PreTrainedConfig) -> None:
    """Raises `ValueError` unless the config is that of a causal decoder of a supported family."""
    if text_config.model_type not in SUPPORTED_TEXT_MODELS:
        raise ValueError(
            f"`text_config.model_type` {text_config.model_type!r} is not supported: unverified, or not possible "
            f"(recurrent, mixture-of-experts, encoder-decoder); use one of {', '.join(SUPPORTED_TEXT_MODELS)}."
        )
    if getattr(text_config, "use_bidirectional_attention", False) or not getattr(text_config, "is_causal", True):
        raise ValueError("`text_config` is that of an encoder, bidirectional over text; pass a causal decoder's.")


def mean_row(rows: torch.Tensor) -> torch.Tensor:
    """The mean of `(num_rows, ...)` over its rows, summed in float32 without a float32 copy of all of them."""
    return (sum(part.float().sum(0) for part in rows.split(4096)) / len(rows)).to(rows.dtype)


@dataclass
class TransfusionModelOutputWithPast(BaseModelOutputWithPast):
    """`image_predictions`, with `timesteps`: ε, or what `config.prediction_type` says, in stacks like the latents."""

    image_predictions: list[torch.Tensor] | None = None


@dataclass
class TransfusionCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*): `lm_loss + λ · diffusion_loss` (Eq. 4).
        logits (`torch.FloatTensor` of shape `(batch, seq, vocab)`, *optional*): `None` with `skip_logits`.
        lm_loss (`torch.FloatTensor` of shape `()`, *optional*): L_LM, as it enters `loss`.
        diffusion_loss (`torch.FloatTensor` of shape `()`, *optional*): L_DDPM, as it enters `loss`.
        image_predictions (`list[torch.FloatTensor]`, *optional*):
            With `labels` or `timesteps`: the prediction (ε, or what `config.prediction_type` says) for each image in
            `image_loss_mask` or `prediction_mask`, `(channels, height, width)`, float32.
        image_losses (`torch.FloatTensor` of shape `(num_noised_images,)`, *optional*):
            With `labels`: the mean squared error of each image that was noised, by `diffusion_loss_weighting`.
        image_timesteps (`torch.Tensor` of shape `(num_noised_images,)`, *optional*): t of those.
    """

    lm_loss: torch.Tensor | None = None
    diffusion_loss: torch.Tensor | None = None
    image_predictions: list[torch.Tensor] | None = None
    image_losses: torch.Tensor | None = None
    image_timesteps: torch.Tensor | None = None


@dataclass
class _Patches:
    """The encoded images of a batch, in stacks, and where they stand in it."""

    states: list[torch.Tensor]  # (images, patches, hidden)
    sizes: list[tuple[int, int]]  # height and width of latents
    skips: list[tuple[torch.Tensor, ...]] | None  # what the patch decoder needs of the encoder
    is_patch: torch.Tensor  # (batch, seq)

    def __post_init__(self) -> None:
        self.lengths = [states.shape[0] * states.shape[1] for states in self.states]
        # A denoising step is all patches. The images say how many there are: the device need not be asked.
        self.is_everything = sum(self.lengths) == self.is_patch.numel()
        self.positions = None if self.is_everything else places_of(self.is_patch, sum(self.lengths))

    def put_into(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`hidden_states` of shape `(batch, seq, hidden)` with the patches in place of the placeholders."""
        flat = torch.cat([states.flatten(0, 1) for states in self.states]).to(hidden_states.dtype)
        if self.is_everything:
            return flat.view_as(hidden_states)
        return hidden_states.flatten(0, 1).index_copy(0, self.positions, flat).view_as(hidden_states)

    def taken_from(
        self, hidden_states: torch.Tensor, mask: torch.BoolTensor | None, counts: Sequence[int] | None = None
    ) -> tuple[list, list, list | None]:
        """What the patch decoder takes, for the images that `mask` chooses; stacks without any are left out."""
        flat = hidden_states.flatten(0, 1)
        flat = flat if self.positions is None else flat.index_select(0, self.positions)
        states = [f.view_as(s) for f, s in zip(flat.split(self.lengths), self.states, strict=True)]
        chosen = [(i, row) for i, row in enumerate(chosen_images(states, mask, counts)) if row is not None]
        skips = None if self.skips is None else [tuple(s[row] for s in self.skips[i]) for i, row in chosen]
        return [states[i][row] for i, row in chosen], [self.sizes[i] for i, _ in chosen], skips


class TransfusionPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about every Transfusion model."""

    config: TransfusionConfig
    config_class = TransfusionConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    output_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    # The decoder adds its own layers at construction.
    _no_split_modules: set[str] | list[str] = [
        "TransfusionLinearPatchEncoder", "TransfusionLinearPatchDecoder", "TransfusionUNetPatchEncoder",
        "TransfusionUNetPatchDecoder", "TransfusionVAE", "TransfusionRAE",
        "SiglipEncoderLayer",
    ]  # fmt: skip
    _keep_in_fp32_modules_strict: set[str] | list[str] = ["timestep_embedding"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: TransfusionConfig):
        for one in (config, config.text_config):  # before the library looks for the kernels
            check_attn_implementation(one._attn_implementation)
        super().__init__(config)

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False) -> None:
        check_attn_implementation(attn_implementation)
        super().set_attn_implementation(attn_implementation, allow_all_kernels)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As for any model; `ValueError` for a weight file that is cut off."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        except (SafetensorError, JSONDecodeError, EOFError) as error:  # the latter two: index and pickled weights
            adapter = (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path")
            names = " or of its adapter ".join(str(name) for name in (pretrained_model_name_or_path, adapter) if name)
            cause = f"{type(error).__name__}: {error}"
            raise ValueError(f"A weight file of {names} is cut off or damaged; get it again. {cause}") from error

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True) -> nn.Module:
        """As for any model; `ValueError`, before anything changes, for a vocabulary without the image tokens."""
        unit = pad_to_multiple_of or 1
        last, name = max((getattr(self.config, name), name) for name in IMAGE_TOKEN_IDS)
        if new_num_tokens is not None and -(-new_num_tokens // unit) * unit <= last:
            raise ValueError(
                f"`new_num_tokens` must be above the ids of the image tokens, up to {name}={last}; got "
                f"{new_num_tokens}. Pass {last + 1} or more, or give the tokens lower ids in the config first."
            )
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Conv2d, FrozenLinear)):
            module.reset_parameters()  # by fan-in: the decoder's one standard deviation would suit no convolution
        elif isinstance(module, RAEDecoder):
            initialization.copy_(module.decoder_pos_embed, rae_positions(module))
        else:
            super()._init_weights(module)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        # Image weights that a checkpoint does not have begin as copies of the text's.
        named = [(name.rpartition(".")[0], image, text) for name, image, text in image_parameters(self)]
        new = [pair for module, *pair in named if not getattr(self.get_submodule(module), "_is_hf_initialized", False)]
        super().initialize_weights()
        for image, text in new:
            initialization.copy_(image, text)  # leaves what was loaded


class TransfusionModel(TransfusionPreTrainedModel):
    """The single transformer with its patch encoder and decoder, without LM head."""

    def __init__(self, config: TransfusionConfig):
        super().__init__(config)
        config.validate_transfusion()
        check_text_config(config.text_config)
        self.language_model = AutoModel.from_config(config.text_config)
        if config.untied_modalities:
            untie_modalities(self.language_model, config.untied_final_norm)
        self.patch_encoder, self.patch_decoder = make_patch_parts(config)
        self.vision_encoder: Any = None if config.vision_config is None else TransfusionVisionEncoder(config)
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        latents: torch.Tensor | Sequence[torch.Tensor] | None = None,
        timesteps: torch.Tensor | None = None,
        prediction_mask: torch.BoolTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        varlen_plan: VarlenPlan | None = None,
        vision_pixel_values: torch.Tensor | Sequence[torch.Tensor] | None = None,
        num_predicted_images: Sequence[int] | None = None,
        check_inputs: bool | None = None,
        **kwargs: Any,
    ) -> TransfusionModelOutputWithPast:
        r"""
        Embeds text and patches, attends, and predicts the noise of the images with a t.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, seq)`, *optional*):
                Text tokens, and `image_token_id` where a patch stands.
            latents (`torch.FloatTensor` of shape `(num_images, channels, height, width)`, *optional*):
                The images of all rows in order, as the transformer shall see them; or, where sizes differ, a list of
                images `(channels, height, width)`.
            timesteps (`torch.Tensor` of shape `(num_images,)`, *optional*):
                t of each image, 0 to T − 1 (T with flow matching), whose noise is predicted. `None`: all images are
                clean (t = 0) and only read.
            prediction_mask (`torch.BoolTensor` of shape `(num_images,)`, *optional*):
                With `timesteps`: the images to predict the noise of; the others are only encoded. Default: all.
            attention_mask (`torch.Tensor` of shape `(batch, past + seq)`, *optional*):
                0 at padding; or a mask prepared by `create_transfusion_mask`.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, seq, hidden)`, *optional*):
                In place of `input_ids`, for text alone.
            varlen_plan (`VarlenPlan`, *optional*):
                In place of `attention_mask`, for `"transfusion_varlen"`: the plan that the collator makes.
            vision_pixel_values (`torch.FloatTensor` of shape `(num_images, 3, height, width)`, *optional*):
                With `config.vision_config`: the images, in [−1, 1], that stand at runs of `vision_token_id`, of all
                rows in order; or, where sizes differ, a list of them.
            num_predicted_images (`list[int]`, *optional*):
                With `prediction_mask`: how many images it chooses among each run of images of one size; spares a wait
                for the device.
            check_inputs (`bool`, *optional*, defaults to `True` outside of compilation):
                Whether to look for values that do not fit, which waits for the device a few times.
            position_ids, cache, use_cache, kwargs: As the decoder takes them.

        Raises:
            ValueError: images that do not match the image blocks or are not finite, a plan of another batch.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        if input_ids is not None and input_ids.numel() == 0:
            raise ValueError(f"`input_ids` must hold at least one token; got shape {tuple(input_ids.shape)}.")
        text_config, stacks = self.config.text_config, None if latents is None else stack_images(latents) or None
        block_ids: Any = None if input_ids is None else image_block_ids(input_ids, self.config.image_token_id)
        seen = None if vision_pixel_values is None else stack_images(vision_pixel_values) or None
        if seen is not None and (self.vision_encoder is None or input_ids is None):
            raise ValueError("`vision_pixel_values` need `input_ids` and a `config.vision_config`; drop them.")
        if check_inputs is None:
            check_inputs = not torch.compiler.is_compiling()
        # Under a prepared mask, in a step of generation, there is nothing left to check.
        if check_inputs and not is_prepared(attention_mask):
            count, last = check_image_blocks(stacks, block_ids, self.config), self.config.num_train_timesteps - 1
            if count and prediction_mask is not None and timesteps is None:
                raise ValueError("`prediction_mask` chooses images to predict the noise of; pass `timesteps`, too.")
            if count and timesteps is not None:
                check_per_image(count, prediction_mask=prediction_mask)
                check_timesteps(timesteps, count, last + self.config.first_timestep)
            if self.vision_encoder is not None and input_ids is not None:
                check_vision_blocks(seen, input_ids, self.config)

        # Before the embedding of the text, where `_encode_blank` is too: FSDP2 wants one order in all processes.
        patches = None if stacks is None else self._encode(stacks, timesteps, block_ids >= 0)
        hidden_states: Any = inputs_embeds if input_ids is None else self.get_input_embeddings()(input_ids)
        if patches is not None:
            hidden_states = patches.put_into(hidden_states)
        is_learning = self.training and torch.is_grad_enabled()
        if seen is not None or (self.vision_encoder is not None and is_learning):
            hidden_states = self._put_seen(hidden_states, input_ids, seen)

        has_images = patches is not None or seen is not None
        if has_images and (self.config.image_markers_in_block or seen is not None):
            block_ids = attention_block_ids(input_ids, self.config)
        counted = position_ids
        if self.config.shared_image_position and has_images:
            position_ids, counted = self._shared_positions(block_ids, position_ids, cache)
        if varlen_plan is not None or not is_prepared(attention_mask):
            # Text alone needs no blocks, and then transformers can use the faster causal kernels.
            blocks = block_ids if has_images and self.config.bidirectional_image_attention else None
            hidden = None
            if self.config.hide_noised_images and patches is not None and timesteps is not None:
                is_noised = timesteps > 0 if prediction_mask is None else prediction_mask & (timesteps > 0)
                hidden = positions_of_images(attention_block_ids(input_ids, self.config, False), is_noised)
            attention_mask = create_transfusion_mask(
                text_config, hidden_states, blocks, attention_mask, cache, counted, varlen_plan, hidden, check_inputs
            )
        if isinstance(attention_mask, VarlenPlan):
            kwargs["varlen_plan"], attention_mask = attention_mask, no_mask(text_config, hidden_states)
        # Text alone runs as if there were no image weights, except that in training these get a gradient of 0: another
        # process may have images.
        if self.config.untied_modalities and (patches is not None or is_learning):
            where = (None, 0) if patches is None else (patches.is_patch, sum(patches.lengths))
            kwargs["modality_router"] = ModalityRouter(text_config.model_type, hidden_states.shape[:2], *where)
        if use_cache is None:
            use_cache = text_config.use_cache and not self.training
        kwargs |= {"position_ids": position_ids, "cache": cache, "use_cache": use_cache}
        outputs = self.language_model(inputs_embeds=hidden_states, attention_mask=attention_mask, **kwargs)

        image_predictions = None
        if patches is not None and timesteps is not None:
            chosen = patches.taken_from(outputs.last_hidden_state, prediction_mask, num_predicted_images)
            image_predictions = self.patch_decoder(*chosen) if chosen[0] else []
        return TransfusionModelOutputWithPast(**outputs, image_predictions=image_predictions)

    def _put_seen(self, hidden_states: torch.Tensor, input_ids: Any, stacks: Any) -> torch.Tensor:
        """`hidden_states` with what the vision encoder sees; without images, with a 0 for the sake of gradients."""
        if stacks is None:
            side = self.config.vision_config.patch_size
            (blank,) = self.vision_encoder([hidden_states.new_zeros(1, 3, side, side)])
            return hidden_states + 0.0 * blank.sum()
        flat = torch.cat([states.flatten(0, 1) for states in self.vision_encoder(stacks)]).to(hidden_states.dtype)
        return hidden_states.masked_scatter((input_ids == self.config.vision_token_id)[..., None], flat)

    def _shared_positions(self, block_ids: Any, position_ids: Any, cache: Cache | None) -> tuple[torch.Tensor, ...]:
        if position_ids is None:
            if cache is not None and cache.get_seq_length():
                raise ValueError("`shared_image_position`: pass `position_ids` behind a `cache`, which hides images.")
            position_ids = torch.arange(block_ids.shape[1], device=block_ids.device)
        return share_positions(position_ids.expand(block_ids.shape), block_ids)

    def _encode(self, stacks: list[torch.Tensor], timesteps: torch.Tensor | None, is_patch: torch.Tensor) -> _Patches:
        if timesteps is None:
            timesteps = stacks[0].new_zeros(sum(len(stack) for stack in stacks))
        states, skips = self.patch_encoder(stacks, timesteps)
        sizes = [tuple(stack.shape[2:]) for stack in stacks]
        if self.config.pos_embed_type == "sincos":
            side, hidden_size = self.config.patch_size, self.config.text_config.hidden_size
            grids = [sincos_positions(height // side, width // side, hidden_size) for height, width in sizes]
            states = [state + grid.to(state) for state, grid in zip(states, grids, strict=True)]
        return _Patches(states, sizes, skips, is_patch)


class TransfusionForCausalLMAndDiffusion(TransfusionPreTrainedModel, TransfusionGenerationMixin):
    """
    Transfusion with its LM head and both losses: reads text and images, writes text and draws images.
    `ValueError` for a decoder of an unsupported family, or on a stock flash implementation.

    Attributes:
        noise_scheduler (`SchedulerMixin`):
            That of the training. Other samplers come from its config: `DDIMScheduler.from_config(scheduler.config)`.
        use_liger_loss (`bool`): Where the LM head runs only at labels, whether Liger computes it and the LM loss.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: TransfusionConfig):
        super().__init__(config)
        text_config = config.text_config
        self.model = TransfusionModel(config)
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=text_config.model_type == "phi")
        self.use_liger_loss = False
        with torch.device("cpu"):  # `from_pretrained` makes the model on the meta device
            self.noise_scheduler = make_noise_scheduler(config)
        # Otherwise the library ignores custom entries of `generation_config.json` on loading.
        self.generation_config._from_model_config = False
        self.generation_config.update(**DRAWING_DEFAULTS, allow_custom_entries=True)
        self.post_init()
        if not self.model.tp_plan:  # a family without one (StableLM): then not the head alone, which may be tied
            self.tp_plan = None
        # Last: `post_init` would initialise it again, and `dtype` and `device` are those of the first parameters.
        self.vae = None if config.vae_config is None else make_vae(config.vae_config)
        if self.vae is not None:
            self._keep_in_fp32_modules_strict = {*self._keep_in_fp32_modules_strict, "vae"}
        # FSDP takes its classes from here by default, and expects to find each.
        self._no_split_modules = set(self._no_split_modules) & {type(module).__name__ for module in self.modules()}

    def encode_images(self, pixel_values: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """
        Images `(num_images, channels, height, width)` or a list of them, in [−1, 1], to latents, in stacks of at least
        float32. Without a VAE the image is its own latent. `ValueError` for channels or sides that do not fit it.
        """
        stacks, vae = [at_least_float32(stack) for stack in stack_images(pixel_values)], self.vae
        if vae is None:
            return stacks
        channels, side = vae.config.get("in_channels", 3), self.config.pixels_per_patch
        for stack in stacks:
            if stack.ndim != 4 or stack.shape[1] != channels or stack.shape[2] % side or stack.shape[3] % side:
                raise ValueError(
                    f"`pixel_values` must have shape (num_images, {channels}, height, width), height and width "
                    f"multiples of {side} (VAE factor × `patch_size`); got {tuple(stack.shape)}. Use the model's "
                    "processor, or pass `latents`."
                )
        encoded = apply_by_size(lambda images: (vae.to_latents(images),), [(stack,) for stack in stacks])
        return [latents for (latents,) in encoded]

    def latent_stacks(self, pixel_values: Any = None, latents: Any = None) -> list[torch.Tensor]:
        """Stacks, of at least float32, of whichever was given."""
        if pixel_values is not None and latents is not None:
            raise ValueError("Pass `pixel_values` or `latents`, not both.")
        given = latents if pixel_values is None else self.encode_images(pixel_values)
        return [] if given is None else [at_least_float32(stack) for stack in stack_images(given)]

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents `(num_images, latent_channels, height, width)` to images in [−1, 1]; undoes [`encode_images`]."""
        return latents if self.vae is None else self.vae.to_images(latents)

    def grow_vocabulary(self, num_tokens: int, pad_to_multiple_of: int | None = None) -> None:
        """Grows the vocabulary to at least `num_tokens`. New rows of embedding and head are the mean of the others."""
        before = self.config.text_config.vocab_size
        if num_tokens <= before and pad_to_multiple_of is None:
            return
        self.resize_token_embeddings(max(num_tokens, before), pad_to_multiple_of, mean_resizing=False)
        head = self.get_output_embeddings()
        with torch.no_grad():
            for rows in (self.get_input_embeddings().weight, head.weight, head.bias):
                if rows is not None:
                    rows[before:] = mean_row(rows[:before])

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | Sequence[torch.Tensor] | None = None,
        latents: torch.Tensor | Sequence[torch.Tensor] | None = None,
        timesteps: torch.Tensor | None = None,
        prediction_mask: torch.BoolTensor | None = None,
        max_timesteps: torch.LongTensor | None = None,
        image_loss_mask: torch.BoolTensor | None = None,
        noise_seeds: Sequence[int] | torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        num_images_in_batch: torch.Tensor | int | None = None,
        skip_logits: bool | None = None,
        vision_pixel_values: torch.Tensor | Sequence[torch.Tensor] | None = None,
        batch_counts: BatchCounts | None = None,
        check_inputs: bool | None = None,
        **kwargs: Any,
    ) -> TransfusionCausalLMOutputWithPast:
        r"""
        With `labels`, images are noised and both losses computed; without, images are taken as they are.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`, *optional*):
                The images of all rows in order, in [−1, 1]; or a list of them where sizes differ. A VAE encodes them.
            latents (`torch.FloatTensor` of shape `(num_images, latent_channels, height, width)`, *optional*):
                In place of `pixel_values`: latents, or a list of them.
            timesteps (`torch.LongTensor` of shape `(num_images,)`, *optional*):
                With `labels`: the t to noise each image to; default: drawn. Without: the t that the given latents
                have, whose noise is predicted; `None`: all are clean, t = 0.
            prediction_mask (`torch.BoolTensor` of shape `(num_images,)`, *optional*):
                Without `labels`: the images to predict the noise of. Default: all.
            max_timesteps (`torch.LongTensor` of shape `(num_images,)`, *optional*):
                Each t is drawn below it (§4.3.4). Default: T.
            image_loss_mask (`torch.BoolTensor` of shape `(num_images,)`, *optional*):
                `False`: the image is clean context, with t = 0, no noise and no loss. Default: all `True`.
            noise_seeds (`list[int]` or `torch.LongTensor` of shape `(num_images,)`, *optional*):
                Seeds of t and ε. Default: in training the global generator; in evaluation the image's own values, so
                that an evaluation loss is the same every time.
            input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache, vision_pixel_values:
                As in `TransfusionModel.forward`.
            labels (`torch.LongTensor` of shape `(batch, seq)`, *optional*):
                The input ids, with −100 wherever there is no LM loss: patches, `<EOI>`, padding (footnote 8). They are
                shifted here and masked no further; `shift_labels` are shifted already.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0):
                Number of last positions, or the positions, to compute logits for; 0: all.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                Number of labels in the whole batch, over micro-batches and processes, as the `Trainer` counts it: for
                an exact `lm_loss`. The mean over this micro-batch's images is weighted by its share of the labels.
            num_images_in_batch (`torch.Tensor` or `int`, *optional*):
                Number of noised images in the whole batch, as [`TransfusionTrainer`] counts it: for an exact
                `diffusion_loss`, whatever each micro-batch holds.
            skip_logits (`bool`, *optional*, defaults to `True` in training with `labels`):
                Whether to run the LM head only where there is a label, and to return no logits.
            batch_counts (`BatchCounts`, *optional*):
                What the collator has counted, so that a training step does not wait for the device.
            check_inputs (`bool`, *optional*):
                Whether to look for values that do not fit, which waits for the device a few times. Default: outside of
                compilation, on the CPU or without `batch_counts`. Without it the loss is NaN where numbers do not fit.
            kwargs: `varlen_plan`, as in [`TransfusionModel.forward`], and what the decoder takes.

        Raises:
            ValueError: as [`TransfusionModel.forward`]; arguments that exclude each other.
        """
        if check_inputs is None:
            is_waiting = batch_counts is None or self.device.type == "cpu"
            check_inputs = is_waiting and not torch.compiler.is_compiling()
        num_targets, num_noised_images = None, None
        if batch_counts is not None:
            num_targets, num_noised_images = batch_counts.num_targets, batch_counts.num_noised_images
        stacks: Any = self.latent_stacks(pixel_values, latents)
        # Not a parameter: the Trainer takes each one with "label" in its name for required.
        shift_labels = kwargs.pop("shift_labels", None)
        labels = shift_labels if labels is None else labels
        targets: Sequence[torch.Tensor] = []
        if labels is None and (max_timesteps is not None or image_loss_mask is not None):
            name = "max_timesteps" if image_loss_mask is None else "image_loss_mask"
            raise ValueError(
                f"`{name}` is for training, but no `labels` came, without which images are clean and no loss is "
                "computed. (The Trainer takes them away with `label_smoothing_factor`.)"
            )
        if labels is not None and prediction_mask is not None:
            raise ValueError("`prediction_mask` is for inference; in training pass `image_loss_mask`.")
        if shift_labels is None and labels is not None:
            shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        num_labels, fits = None if shift_labels is None else (shift_labels != -100).sum(), None
        if num_labels is not None:
            fits = self._fits(
                batch_counts, check_inputs, input_ids, stacks, num_labels, image_loss_mask, max_timesteps
            )
        blank, num_predicted = None if labels is None or stacks else self._encode_blank(), None
        if labels is not None and stacks:
            if noise_seeds is None and not self.training:
                noise_seeds = content_seeds(stacks)
            stacks, timesteps, prediction_mask, num_predicted, targets = noise_images(
                self.noise_scheduler, stacks, timesteps, max_timesteps, image_loss_mask, noise_seeds,
                self.config.timestep_distribution, self.config.train_timestep_shift, num_noised_images, check_inputs,
            )  # fmt: skip
        rest = {"position_ids": position_ids, "cache": cache, "inputs_embeds": inputs_embeds, "use_cache": use_cache}
        rest |= {"vision_pixel_values": vision_pixel_values, "check_inputs": check_inputs}
        rest["num_predicted_images"] = num_predicted
        outputs = self.model(input_ids, stacks, timesteps, prediction_mask, attention_mask, **rest, **kwargs)
        predictions = outputs.image_predictions if blank is None else self.model.patch_decoder(*blank)
        if predictions is not None:
            predictions = [at_least_float32(stack) for stack in predictions]

        num_items = num_labels if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        what = (outputs.last_hidden_state, labels, shift_labels, num_items)
        logits, lm_loss = self._predict_text(*what, logits_to_keep, skip_logits, num_targets)
        own: dict[str, Any] = {"logits": logits, "lm_loss": lm_loss}
        diffusion_loss: Any = None
        if targets:
            losses = image_losses(predictions, targets)
            assert timesteps is not None
            if prediction_mask is not None:
                timesteps = timesteps[places_of(prediction_mask, len(losses))]
            if self.config.diffusion_loss_weighting is not None:
                weighting = self.config.diffusion_loss_weighting
                losses = losses * image_loss_weights(self.noise_scheduler, timesteps, weighting)
            own |= {"image_losses": losses.detach(), "image_timesteps": timesteps}
            diffusion_loss = mean_image_loss(losses, num_labels, num_items_in_batch, num_images_in_batch)
        elif labels is not None:
            # Without images to learn from, each image part still gets a gradient of 0, and in its turn: without it, or
            # in another order than in other processes, DDP, FSDP2 and ZeRO-3 would wait for it.
            diffusion_loss, predictions = 0.0 * predictions[0].sum(), None
        if labels is not None:
            loss = lm_loss + self.config.diffusion_loss_weight * diffusion_loss
            own["loss"] = loss if fits is None else loss * torch.where(fits, 1.0, torch.nan)
        # A list of images in a graph would tie it to their number.
        if predictions is not None and (labels is None or not torch.compiler.is_compiling()):
            own["image_predictions"] = [image for stack in predictions for image in stack]
        own |= {name: getattr(outputs, name) for name in ("cache", "hidden_states", "attentions")}
        return TransfusionCausalLMOutputWithPast(diffusion_loss=diffusion_loss, **own)

    def _fits(self, counts, check_inputs, input_ids, stacks, num_labels, mask, max_timesteps) -> torch.Tensor | None:
        """
        Whether numbers fit the batch, as a tensor that nobody waits for; `None` if there is nothing to compare. With
        `check_inputs`, which waits, a `ValueError` where `counts` do not.
        """
        if check_inputs:
            if counts is not None:
                counts.check(num_labels, mask)
            return None
        pairs = [] if counts is None else counts.pairs(num_labels, mask)
        if stacks:  # otherwise each is looked at
            num_patches = sum(len(stack) * self.config.num_patches(*stack.shape[2:]) for stack in stacks)
            pairs.append((num_patches, (input_ids == self.config.image_token_id).sum()))
            if max_timesteps is not None:
                pairs.append((0, ((max_timesteps < 1) | (max_timesteps > self.config.num_train_timesteps)).sum()))
        return torch.stack([found == count for count, found in pairs]).all() if pairs else None

    def _encode_blank(self) -> tuple:
        """The arguments of the patch decoder for an image of one empty patch."""
        side = self.config.patch_size
        stack = torch.zeros(1, self.config.latent_channels, side, side, device=self.device)
        hidden_states, skips = self.model.patch_encoder([stack], stack.new_zeros(1))
        return hidden_states, [(side, side)], skips

    def _predict_text(
        self, hidden_states, labels, shift_labels, num_items, logits_to_keep, skip_logits, num_targets=None
    ) -> tuple:
        """The logits (`None` with `skip_logits`) and L_LM (Eq. 1; `None` without `labels`)."""
        text_config, targets = self.config.text_config, None
        if labels is not None and shift_labels.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"`labels` must have the shape of `input_ids`, {tuple(hidden_states.shape[:2])}; got "
                f"{tuple(shift_labels.shape)}. Pass the ids themselves, with -100 where there is no loss: the model "
                "shifts them."
            )
        if num_items is not None:
            num_items = num_items.to(hidden_states.device).clamp(min=1)
        if skip_logits if skip_logits is not None else self.training and labels is not None:
            if labels is None or not isinstance(logits_to_keep, int) or logits_to_keep:
                raise ValueError("`skip_logits` needs `labels`, and excludes `logits_to_keep`.")
            # Patches and whatever else has no label cost no logits.
            is_target = shift_labels != -100
            positions = places_of(is_target, int(is_target.sum()) if num_targets is None else num_targets)
            targets = shift_labels.flatten().index_select(0, positions).clamp(min=0)  # −100 if their number is wrong
            hidden_states = hidden_states.flatten(0, 1).index_select(0, positions)  # (num_labels, hidden)
            if self.use_liger_loss and len(targets) > 0:
                return None, sum_cross_entropy_by_liger(hidden_states, self.lm_head, targets, text_config) / num_items
        else:
            hidden_states = slice_logits_to_keep(hidden_states, logits_to_keep)
        logits = scale_logits(self.lm_head(hidden_states), text_config)
        if labels is None:
            return logits, None
        if targets is not None and not hasattr(self, "_loss_function"):  # which is what a user has set
            return None, sum_cross_entropy_(logits, targets) / num_items
        shift_labels = shift_labels if targets is None else targets
        loss = self.loss_function(logits, labels, text_config.vocab_size, num_items, shift_labels=shift_labels)
        return logits if targets is None else None, loss
