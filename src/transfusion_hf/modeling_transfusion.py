"""
Transfusion (Zhou et al., arXiv 2408.11039): any decoder of transformers, the light image parts around it, two losses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    Cache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from .attention_transfusion import VarlenPlan
from .configuration_transfusion import (
    TransfusionConfig,
    vae_arguments,
)
from .conversion_transfusion import TransfusionConversionMixin
from .diffusion_transfusion import (
    add_noise,
    content_seeds,
    image_losses,
    make_noise_scheduler,
    prediction_targets,
    sample_noise,
    sample_timesteps,
)
from .generation_transfusion import DRAWING_DEFAULTS, TransfusionGenerationMixin
from .lm_loss_transfusion import scale_logits, sum_cross_entropy_, sum_cross_entropy_by_liger
from .masking_transfusion import (
    check_attn_implementation,
    check_varlen_plan,
    create_transfusion_mask,
    image_block_ids,
    image_block_lengths,
    is_prepared,
)
from .modality_transfusion import ModalityRouter, image_parameters, untie_modalities
from .patching_transfusion import (
    FrozenLinear,
    TransfusionLinearPatchDecoder,
    TransfusionLinearPatchEncoder,
    TransfusionUNetPatchDecoder,
    TransfusionUNetPatchEncoder,
    TransfusionVAE,
    apply_by_size,
    sincos_positions,
    stack_images,
)

# Decoders whose logits are `scale(lm_head(model(x)))` with what `scale_logits` knows, all of whose layers are softmax
# attention under a mask that the model takes prepared: a test holds each to its own `...ForCausalLM`.
SUPPORTED_TEXT_MODELS = (
    "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "granite",
    "helium", "llama", "ministral", "mistral", "olmo", "olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen3", "seed_oss",
    "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
_HEADS_WITH_BIAS = ("phi",)


def check_text_config(text_config: PreTrainedConfig) -> None:
    """Raises `ValueError` for what is no decoder of a supported family."""
    if text_config.model_type not in SUPPORTED_TEXT_MODELS:
        raise ValueError(
            f"`text_config.model_type` {text_config.model_type!r} is not supported. Recurrent, linear-attention, "
            "mixture-of-experts and encoder-decoder families cannot be made right, others have not been verified; "
            f"use one of {', '.join(SUPPORTED_TEXT_MODELS)}."
        )
    if getattr(text_config, "use_bidirectional_attention", False) or not getattr(text_config, "is_causal", True):
        raise ValueError("`text_config` is that of an encoder, bidirectional over text; pass a causal decoder's.")


@dataclass
class TransfusionModelOutputWithPast(BaseModelOutputWithPast):
    """
    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch, seq, hidden)`)
        image_predictions (`list[torch.FloatTensor]`, *optional*):
            What is predicted, ε or as `config.prediction_type` says, where `timesteps` was given: in stacks, of shape
            `(num_images, channels, height, width)` each, of the images in `prediction_mask` only.
    """

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
            What is predicted of each image, ε or as `config.prediction_type` says, `(channels, height, width)`,
            float32; with `labels` or `timesteps`. Of the images in `prediction_mask` only, or, with `labels`, in
            `image_loss_mask`.
        image_losses (`torch.FloatTensor` of shape `(num_noised_images,)`, *optional*):
            With `labels`: the mean squared error of each image that was noised.
        image_timesteps (`torch.Tensor` of shape `(num_noised_images,)`, *optional*): t of those.
    """

    lm_loss: torch.Tensor | None = None
    diffusion_loss: torch.Tensor | None = None
    image_predictions: list[torch.Tensor] | None = None
    image_losses: torch.Tensor | None = None
    image_timesteps: torch.Tensor | None = None


class TransfusionPreTrainedModel(PreTrainedModel):
    """What transformers wants to know of every Transfusion model."""

    config: TransfusionConfig
    config_class = TransfusionConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    output_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    # The decoder adds its own layers at construction.
    _no_split_modules: set[str] | list[str] = [
        "TransfusionLinearPatchEncoder",
        "TransfusionLinearPatchDecoder",
        "TransfusionUNetPatchEncoder",
        "TransfusionUNetPatchDecoder",
        "TransfusionVAE",
    ]
    _keep_in_fp32_modules_strict = ["timestep_embedding", "vae"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = False
    _supports_attention_backend = True

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs):
        check_attn_implementation(attn_implementation)
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Conv2d, FrozenLinear)):
            module.reset_parameters()  # by fan-in: the decoder's one standard deviation would suit no convolution
        else:
            super()._init_weights(module)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # all attention is the decoder's, whose source the library searches in its own right

    @torch.no_grad()
    def copy_text_weights_(self) -> None:
        """
        Makes the image weights of `untied_modalities` copies of the text's, as for a language model that was loaded.

        Raises:
            ValueError: the model has none.
        """
        if not self.config.untied_modalities:
            raise ValueError("There are no image weights to copy to: `untied_modalities` of the config is empty.")
        for _, image, text in image_parameters(self):
            image.copy_(text)

    def _initialize_missing_keys(self, is_quantized: bool) -> None:
        # Image weights that a checkpoint does not have, begin as copies there, too.
        pairs = list(image_parameters(self))
        missing = [name for name, image, _ in pairs if not getattr(image, "_is_hf_initialized", False)]
        super()._initialize_missing_keys(is_quantized)
        with torch.no_grad():
            for name, image, text in image_parameters(self):
                if name in missing:
                    image.copy_(text)


class TransfusionModel(TransfusionPreTrainedModel):
    """
    The single transformer with its patch encoder and decoder, without LM head.

    Raises:
        ValueError: the decoder's family is not supported, or it runs on a stock flash implementation.
    """

    def __init__(self, config: TransfusionConfig):
        super().__init__(config)
        config.validate_transfusion()
        text_config = config.text_config
        check_text_config(text_config)
        check_attn_implementation(text_config._attn_implementation)
        self.language_model = AutoModel.from_config(text_config)
        if config.untied_modalities:
            untie_modalities(self.language_model)
        is_unet = config.patch_encoder == "unet"
        self.patch_encoder = (TransfusionUNetPatchEncoder if is_unet else TransfusionLinearPatchEncoder)(config)
        self.patch_decoder = (TransfusionUNetPatchDecoder if is_unet else TransfusionLinearPatchDecoder)(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

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
        **kwargs: Any,
    ) -> TransfusionModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, seq)`, *optional*):
                Text tokens, and `image_token_id` where a patch stands.
            latents (`torch.FloatTensor` of shape `(num_images, channels, height, width)`, *optional*):
                The images of all rows in order, as the transformer shall see them; or a list of them,
                `(channels, height, width)` each, where sizes differ.
            timesteps (`torch.Tensor` of shape `(num_images,)`, *optional*):
                t of each image, 0 to T − 1 (with flow matching to T). Given, the noise of images is predicted; `None`:
                all images are clean (t = 0) and only read.
            prediction_mask (`torch.BoolTensor` of shape `(num_images,)`, *optional*):
                The images to predict the noise of; the others are only encoded. With `timesteps`; all where `None`.
            attention_mask (`torch.Tensor` of shape `(batch, past + seq)`, *optional*):
                0 at padding; or a mask prepared by `create_transfusion_mask`.
            position_ids (`torch.LongTensor` of shape `(batch, seq)`, *optional*)
            cache (`Cache`, *optional*)
            inputs_embeds (`torch.FloatTensor` of shape `(batch, seq, hidden)`, *optional*):
                In place of `input_ids`, for text alone.
            use_cache (`bool`, *optional*)
            varlen_plan (`VarlenPlan`, *optional*):
                In place of `attention_mask`, for `attn_implementation="transfusion_varlen"`: the plan of a batch
                without padding or cache, as the collator makes it. `None`: it is made here.

        Raises:
            ValueError: images and image blocks do not match, an image has a wrong size or values that are no numbers,
                `varlen_plan` was made for another batch.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        block_ids: Any = None
        if input_ids is not None:
            if input_ids.numel() == 0:
                raise ValueError(f"`input_ids` must hold at least one token; got shape {tuple(input_ids.shape)}.")
            block_ids = image_block_ids(input_ids, self.config.image_token_id)
        stacks = None if latents is None else stack_images(latents) or None
        # Under a mask already prepared, a step of generation, there is nothing left to check.
        if not is_prepared(attention_mask) and not torch.compiler.is_compiling():
            self._check_images(stacks, block_ids, timesteps, prediction_mask)

        if stacks is not None:
            num_images = sum(len(stack) for stack in stacks)
            encoder_timesteps = stacks[0].new_zeros(num_images) if timesteps is None else timesteps
            # Before the embedding of the text, as `_encode_blank` is: FSDP2 wants one order in all processes.
            patches, skips = self.patch_encoder(stacks, encoder_timesteps)
        hidden_states: Any = inputs_embeds if input_ids is None else self.get_input_embeddings()(input_ids)
        if stacks is not None:
            if self.config.pos_embed_type == "sincos":
                patches = [p + self._positions(stack).to(p) for p, stack in zip(patches, stacks, strict=True)]
            is_patch = block_ids >= 0
            flat = torch.cat([p.flatten(0, 1) for p in patches]).to(hidden_states.dtype)  # (total patches, hidden)
            # A denoising step is all patches: known by its shape, with nothing to look for.
            is_all_patches = len(flat) == is_patch.numel()
            if is_all_patches:
                hidden_states = flat.view_as(hidden_states)
            else:
                hidden_states = hidden_states.masked_scatter(is_patch[..., None], flat)

        if use_cache is None:
            use_cache = self.config.text_config.use_cache and not self.training
        # Text alone needs no blocks, and then transformers can use the faster causal kernels.
        has_blocks = stacks is not None and self.config.bidirectional_image_attention
        if varlen_plan is not None:
            if attention_mask is not None or cache is not None:
                raise ValueError("`varlen_plan` excludes `attention_mask` and `cache`; pass one of them.")
            if not torch.compiler.is_compiling():
                blocks = block_ids if has_blocks else None
                is_bidirectional = self.config.bidirectional_image_attention
                shape = hidden_states.shape[:2]
                check_varlen_plan(varlen_plan, self.config.text_config, shape, blocks, position_ids, is_bidirectional)
            attention_mask = varlen_plan.to(hidden_states.device)
        elif not is_prepared(attention_mask):
            attention_mask = create_transfusion_mask(
                self.config.text_config,
                hidden_states,
                block_ids if has_blocks else None,
                attention_mask,
                cache,
                position_ids,
            )
        if isinstance(attention_mask, VarlenPlan):
            kwargs["varlen_plan"], attention_mask = attention_mask, None
        # Text alone runs as if there were no image weights, but that in training they have a gradient, of 0: another
        # process may have images.
        if self.config.untied_modalities and (stacks is not None or (self.training and torch.is_grad_enabled())):
            patches_here = (None, 0) if stacks is None else (is_patch, len(flat))
            kwargs["modality_router"] = ModalityRouter(
                self.config.text_config.model_type, hidden_states.shape[:2], *patches_here
            )
        outputs = self.language_model(
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            **kwargs,
        )
        image_predictions = None
        if stacks is not None and timesteps is not None:
            states = outputs.last_hidden_state
            states = states.flatten(0, 1) if is_all_patches else states[is_patch]  # (total patches, hidden)
            states = states.split([p.shape[0] * p.shape[1] for p in patches])
            states = [s.view_as(p) for s, p in zip(states, patches, strict=True)]
            image_predictions = self._predict(stacks, states, skips, prediction_mask)
        return TransfusionModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_predictions=image_predictions,
        )

    def _positions(self, stack: torch.Tensor) -> torch.Tensor:
        height, width = (side // self.config.patch_size for side in stack.shape[2:])
        return sincos_positions(height, width, self.config.text_config.hidden_size)

    def _predict(
        self,
        stacks: list[torch.Tensor],
        hidden_states: list[torch.Tensor],
        skips: list[tuple[torch.Tensor, ...]] | None,
        mask: torch.BoolTensor | None,
    ) -> list[torch.Tensor]:
        """The predictions of the images chosen, in stacks; stacks of which none is chosen are left out."""
        sizes = [tuple(stack.shape[2:]) for stack in stacks]
        if mask is not None:
            rows = _chosen_rows(stacks, mask)
            sizes = [size for size, row in zip(sizes, rows, strict=True) if row]
            hidden_states = [states[row] for states, row in zip(hidden_states, rows, strict=True) if row]
            if skips is not None:
                skips = [tuple(s[row] for s in skip) for skip, row in zip(skips, rows, strict=True) if row]
        return self.patch_decoder(hidden_states, sizes, skips) if sizes else []

    def _check_images(
        self,
        stacks: list[torch.Tensor] | None,
        block_ids: torch.LongTensor | None,
        timesteps: torch.Tensor | None,
        prediction_mask: torch.BoolTensor | None,
    ) -> None:
        """Images and blocks must be the same in number and length: the placeholders would be filled wrongly."""
        if stacks is None:
            if block_ids is not None and (block_ids >= 0).any():
                raise ValueError(
                    f"`input_ids` has {len(image_block_lengths(block_ids))} image blocks but no images were passed; "
                    "pass `pixel_values` or `latents`, one image per block."
                )
            return
        if block_ids is None:
            raise ValueError("`inputs_embeds` holds text only; pass images together with `input_ids`.")
        num_patches = []
        for stack in stacks:
            if stack.ndim != 4 or stack.shape[1] != self.config.latent_channels:
                raise ValueError(
                    f"Latents must have shape (num_images, {self.config.latent_channels}, height, width), as "
                    f"`latent_channels` says; got {tuple(stack.shape)}."
                )
            num_patches += [self.config.num_patches(*stack.shape[2:])] * len(stack)
            if not torch.isfinite(stack).all():
                raise ValueError("`pixel_values` or `latents` hold NaN or infinite values; expected finite numbers.")
        block_lengths = image_block_lengths(block_ids)
        if len(num_patches) != len(block_lengths):
            raise ValueError(
                f"`pixel_values` or `latents` hold {len(num_patches)} images but `input_ids` has {len(block_lengths)} "
                "image blocks; pass one image per block."
            )
        if num_patches != block_lengths:
            raise ValueError(
                f"`input_ids` has image blocks of {block_lengths} patches but the images have {num_patches}; an image "
                "needs one placeholder per patch, in one uninterrupted run."
            )
        if prediction_mask is not None and (timesteps is None or len(prediction_mask) != len(num_patches)):
            raise ValueError(
                f"`prediction_mask` must hold one value for each of {len(num_patches)} images, together with "
                f"`timesteps`; got {len(prediction_mask)}."
            )
        if timesteps is not None:
            last = self.config.num_train_timesteps - 1 + self.config.first_timestep
            if timesteps.shape != (len(num_patches),) or not ((timesteps >= 0) & (timesteps <= last)).all():
                raise ValueError(
                    f"`timesteps` must hold one t from 0 to {last} for each of {len(num_patches)} images; got "
                    f"{timesteps.tolist()}."
                )


class TransfusionForCausalLMAndDiffusion(
    TransfusionConversionMixin, TransfusionPreTrainedModel, TransfusionGenerationMixin
):
    """
    Transfusion with its LM head and both losses: reads text and images, writes text and draws images.

    Attributes:
        use_liger_loss (`bool`, defaults to `False`):
            Where the LM head runs only at labels, to compute it and the LM loss by Liger's fused kernel.

    Raises:
        ValueError: as [`TransfusionModel`].
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: TransfusionConfig):
        super().__init__(config)
        text_config = config.text_config
        self.model = TransfusionModel(config)
        has_bias = text_config.model_type in _HEADS_WITH_BIAS
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=has_bias)
        self._noise_scheduler = None
        self.use_liger_loss = False
        # Otherwise the library ignores custom entries of `generation_config.json` on loading.
        self.generation_config._from_model_config = False
        for name, default in DRAWING_DEFAULTS.items():
            setattr(self.generation_config, name, default)
        self.post_init()
        if not self.model.tp_plan:  # a family that has none, as StableLM: then not the head alone, which may be tied
            self.tp_plan = None
        # Last: `post_init` would initialise it anew, and `dtype` and `device` are those of the first parameters.
        self.vae = None if config.vae_config is None else TransfusionVAE(**vae_arguments(config.vae_config))
        # FSDP takes its classes from here by default, and expects to find each.
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = {name for name in self._no_split_modules if name in present}

    @property
    def noise_scheduler(self):
        """
        The scheduler of the training, a `DDPMScheduler` unless the model predicts a flow. Other samplers are made from
        its config: `DDIMScheduler.from_config(model.noise_scheduler.config)`.
        """
        if self._noise_scheduler is None:  # not in __init__, which `from_pretrained` runs on the meta device
            self._noise_scheduler = make_noise_scheduler(self.config)
        return self._noise_scheduler

    def reset_noise_scheduler(self) -> None:
        """Has the schedule made anew after a change of the configuration."""
        self._noise_scheduler = None

    def encode_images(self, pixel_values: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """
        Images in [−1, 1] to latents, in stacks of at least float32. Without a VAE the image is its own latent.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`, or a list of images)

        Raises:
            ValueError: channels that the VAE does not take, sides that are no multiples of VAE factor × patch.
        """
        stacks, vae = [_at_least_float32(stack) for stack in stack_images(pixel_values)], self.vae
        if vae is None:
            return stacks
        channels, side = vae.config.in_channels, self.config.pixels_per_patch
        for stack in stacks:
            if stack.ndim != 4 or stack.shape[1] != channels or stack.shape[2] % side or stack.shape[3] % side:
                raise ValueError(
                    f"`pixel_values` must have shape (num_images, {channels}, height, width), height and width "
                    f"multiples of {side} (VAE factor {self.config.vae_scale_factor} × `patch_size` "
                    f"{self.config.patch_size}); got {tuple(stack.shape)}. Use the model's processor, or pass "
                    "`latents`."
                )
        encoded = apply_by_size(lambda images: (vae.to_latents(images),), [(stack,) for stack in stacks])
        return [latents for (latents,) in encoded]

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Latents to images in [−1, 1]; undoes [`encode_images`].

        Args:
            latents (`torch.FloatTensor` of shape `(num_images, latent_channels, height, width)`)
        """
        return latents if self.vae is None else self.vae.to_images(latents)

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
        **kwargs: Any,
    ) -> TransfusionCausalLMOutputWithPast:
        r"""
        With `labels`, images are noised and both losses computed; without, images are taken as they are.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, seq)`, *optional*):
                Text tokens, and `image_token_id` where a patch stands.
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`, *optional*):
                The images of all rows in order, in [−1, 1]; or a list of them where sizes differ. A VAE encodes them.
            latents (`torch.FloatTensor` of shape `(num_images, latent_channels, height, width)`, *optional*):
                In place of `pixel_values`: latents, or a list of them.
            timesteps (`torch.LongTensor` of shape `(num_images,)`, *optional*):
                With `labels`: the t to noise each image to, drawn where `None`. Without: the t that the given latents
                have, for which their noise is predicted; `None`: all are clean, t = 0.
            prediction_mask (`torch.BoolTensor` of shape `(num_images,)`, *optional*):
                Without `labels`: the images to predict the noise of; all where `None`.
            max_timesteps (`torch.LongTensor` of shape `(num_images,)`, *optional*):
                Each t is drawn below it (§4.3.4); T where `None`.
            image_loss_mask (`torch.BoolTensor` of shape `(num_images,)`, *optional*):
                `False`: the image is clean context, with t = 0, no noise and no loss. All `True` where `None`.
            noise_seeds (`list[int]` or `torch.LongTensor` of shape `(num_images,)`, *optional*):
                Seeds of t and ε. Where `None`, the global generator decides in training, and in evaluation the
                image's own values, so that an evaluation loss is the same every time.
            attention_mask (`torch.Tensor` of shape `(batch, past + seq)`, *optional*): 0 at padding.
            position_ids (`torch.LongTensor` of shape `(batch, seq)`, *optional*)
            cache (`Cache`, *optional*)
            inputs_embeds (`torch.FloatTensor` of shape `(batch, seq, hidden)`, *optional*):
                In place of `input_ids`, for text alone.
            labels (`torch.LongTensor` of shape `(batch, seq)`, *optional*):
                The input ids, with −100 wherever there is no LM loss: patches, `<EOI>`, padding (footnote 8). They are
                shifted here and masked no further.
            use_cache (`bool`, *optional*)
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0):
                Number of last positions, or the positions, to compute logits for; 0: all.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                Number of labels in the whole batch, over micro-batches and processes, as the `Trainer` counts it.
                `lm_loss` is then exact; `diffusion_loss` is weighted by this micro-batch's share of the labels. Summed
                over micro-batches that is exact where each holds the same numbers of labels and images, and otherwise
                an average over micro-batches in which one without images counts as 0: mix images into each.
            num_images_in_batch (`torch.Tensor` or `int`, *optional*):
                Number of noised images in the whole batch, as [`TransfusionTrainer`] counts it. `diffusion_loss` is
                then exact, too, whatever each micro-batch holds.
            skip_logits (`bool`, *optional*, defaults to `True` in training with `labels`):
                Whether to run the LM head only where there is a label, and to return no logits.
            kwargs: `varlen_plan`, as in [`TransfusionModel.forward`], and what the decoder takes.

        Raises:
            ValueError: as [`TransfusionModel.forward`]; also for both or neither of two arguments where one is needed.
        """
        if pixel_values is not None and latents is not None:
            raise ValueError("Pass `pixel_values` or `latents`, not both.")
        stacks: list[torch.Tensor] | None = None
        if pixel_values is not None:
            stacks = self.encode_images(pixel_values) or None
        elif latents is not None:
            stacks = [_at_least_float32(stack) for stack in stack_images(latents)] or None

        if labels is not None and prediction_mask is not None:
            raise ValueError("`prediction_mask` is for inference; in training pass `image_loss_mask`.")
        if labels is None:
            for name, value in (("max_timesteps", max_timesteps), ("image_loss_mask", image_loss_mask)):
                if value is not None:
                    raise ValueError(
                        f"`{name}` is for training, but no `labels` came, without which images are clean and no loss "
                        "is computed. (The Trainer takes them away with `label_smoothing_factor`.)"
                    )
        targets: list[torch.Tensor] = []
        blank = None
        if labels is not None and stacks is not None:
            stacks, targets, timesteps, prediction_mask = self._noise_images(
                stacks, timesteps, max_timesteps, image_loss_mask, noise_seeds
            )
            if not targets:  # clean context alone: one is predicted all the same, see below
                prediction_mask = torch.arange(len(timesteps), device=timesteps.device) == 0
        elif labels is not None:
            blank = self._encode_blank()

        outputs = self.model(
            input_ids=input_ids,
            latents=stacks,
            timesteps=timesteps,
            prediction_mask=prediction_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        blank_prediction = None if blank is None else self.model.patch_decoder(*blank)[0]
        hidden_states, targets_of_text = outputs.last_hidden_state, None
        if skip_logits if skip_logits is not None else self.training and labels is not None:
            if labels is None or not isinstance(logits_to_keep, int) or logits_to_keep:
                raise ValueError("`skip_logits` needs `labels`, and excludes `logits_to_keep`.")
            # Patches and what else has no label cost no logits.
            is_target = labels[:, 1:] != -100
            targets_of_text = labels[:, 1:][is_target]
            hidden_states = hidden_states[:, :-1][is_target]  # (num_labels, hidden)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            hidden_states = hidden_states[:, kept]
        is_fused = self.use_liger_loss and targets_of_text is not None and len(targets_of_text) > 0
        logits = None if is_fused else scale_logits(self.lm_head(hidden_states), self.config.text_config)
        predictions = outputs.image_predictions
        if predictions is not None:
            predictions = [_at_least_float32(stack) for stack in predictions]

        loss, lm_loss, diffusion_loss = None, None, None
        losses_of_images, timesteps_of_images = None, None
        if labels is not None:
            num_labels = (labels[:, 1:] != -100).sum()
            num_items = num_labels if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
            num_items = num_items.to(hidden_states.device).clamp(min=1)
            if logits is None:
                lm_loss = sum_cross_entropy_by_liger(
                    hidden_states, self.lm_head, targets_of_text, self.config.text_config
                )
                lm_loss = lm_loss / num_items
            elif targets_of_text is None or hasattr(self, "_loss_function"):  # the latter is what a user has set
                lm_loss = self.loss_function(
                    logits, labels, self.config.text_config.vocab_size, num_items, shift_labels=targets_of_text
                )
            else:
                lm_loss = sum_cross_entropy_(logits, targets_of_text) / num_items
            # Without images to learn from, each image part still gets a gradient, of 0, and in its turn: without it,
            # or in another order than in other processes, DDP, FSDP2 and ZeRO-3 would wait for it.
            if blank_prediction is not None:
                diffusion_loss = 0.0 * _at_least_float32(blank_prediction).sum()
            elif not targets:
                diffusion_loss, predictions = 0.0 * predictions[0].sum(), None
            else:
                losses_of_images = image_losses(predictions, targets)
                assert timesteps is not None
                timesteps_of_images = timesteps if prediction_mask is None else timesteps[prediction_mask]
                if num_images_in_batch is not None:
                    diffusion_loss = losses_of_images.sum() / num_images_in_batch
                else:
                    diffusion_loss = losses_of_images.mean()
                    if num_items_in_batch is not None:
                        if not num_items_in_batch:
                            raise ValueError(
                                "`num_items_in_batch` is 0: the Trainer counts labels, and a batch of images without "
                                "any cannot be weighted. Give each row a text token, as an end of sequence."
                            )
                        diffusion_loss = diffusion_loss * (num_labels / num_items)
            loss = lm_loss + self.config.diffusion_loss_weight * diffusion_loss

        return TransfusionCausalLMOutputWithPast(
            loss=loss,
            logits=logits if targets_of_text is None else None,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            lm_loss=lm_loss,
            diffusion_loss=diffusion_loss,
            image_predictions=None if predictions is None else [image for stack in predictions for image in stack],
            image_losses=None if losses_of_images is None else losses_of_images.detach(),
            image_timesteps=timesteps_of_images,
        )

    def _noise_images(self, stacks, timesteps, max_timesteps, image_loss_mask, noise_seeds):
        """
        The forward diffusion of a training step: stacks of x_0 → stacks of x_t, the targets in stacks of the noised
        images alone, t, and which are noised (`None`: all).
        """
        num_images, device = sum(len(stack) for stack in stacks), stacks[0].device
        num_train_timesteps, first = self.config.num_train_timesteps, self.config.first_timestep
        per_image = {
            "timesteps": timesteps,
            "max_timesteps": max_timesteps,
            "image_loss_mask": image_loss_mask,
            "noise_seeds": noise_seeds,
        }
        for name, value in per_image.items():
            if value is not None and len(value) != num_images:
                raise ValueError(f"`{name}` must hold one value for each of {num_images} images; got {len(value)}.")
        if noise_seeds is None and not self.training:
            noise_seeds = content_seeds(stacks)
        if timesteps is None:
            if max_timesteps is None:
                max_timesteps = torch.full((num_images,), num_train_timesteps, device=device)
            elif not ((max_timesteps >= 1) & (max_timesteps <= num_train_timesteps)).all():
                raise ValueError(
                    f"`max_timesteps` must lie in 1 to {num_train_timesteps}; got {max_timesteps.tolist()}."
                )
            timesteps = sample_timesteps(max_timesteps, noise_seeds) + first
        elif not ((timesteps >= 0) & (timesteps < num_train_timesteps + first)).all():
            raise ValueError(
                f"`timesteps` must lie in 0 to {num_train_timesteps - 1 + first}; got {timesteps.tolist()}."
            )
        timesteps = timesteps.to(device)
        noise = sample_noise(stacks, noise_seeds)
        if image_loss_mask is None:
            targets = prediction_targets(self.noise_scheduler, stacks, noise, timesteps)
            return add_noise(self.noise_scheduler, stacks, noise, timesteps), targets, timesteps, None
        is_noised = image_loss_mask.to(device=device, dtype=torch.bool)
        timesteps = torch.where(is_noised, timesteps, 0)
        noised = add_noise(self.noise_scheduler, stacks, noise, timesteps)
        keep = is_noised.split([len(stack) for stack in stacks])
        noised = [torch.where(k[:, None, None, None], n, s) for k, n, s in zip(keep, noised, stacks, strict=True)]
        targets = prediction_targets(self.noise_scheduler, stacks, noise, timesteps)
        targets = [target[row] for target, row in zip(targets, _chosen_rows(stacks, is_noised), strict=True) if row]
        return noised, targets, timesteps, is_noised

    def _encode_blank(self) -> tuple:
        """What the patch decoder takes, of an image of one patch without anything on it."""
        side = self.config.patch_size
        stack = torch.zeros(1, self.config.latent_channels, side, side, device=self.device)
        hidden_states, skips = self.model.patch_encoder([stack], stack.new_zeros(1))
        return hidden_states, [(side, side)], skips


def _chosen_rows(stacks: list[torch.Tensor], mask: torch.BoolTensor) -> list[list[int]]:
    """The images of each stack that a mask `(num_images,)` over all of them chooses (one device synchronisation)."""
    chosen = iter(mask.tolist())
    return [[i for i in range(len(stack)) if next(chosen)] for stack in stacks]


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


__all__ = [
    "SUPPORTED_TEXT_MODELS",
    "TransfusionCausalLMOutputWithPast",
    "TransfusionForCausalLMAndDiffusion",
    "TransfusionModel",
    "TransfusionModelOutputWithPast",
    "TransfusionPreTrainedModel",
    "check_text_config",
]
