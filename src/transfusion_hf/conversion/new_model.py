"""From a tokenizer to a new Transfusion."""

import copy
import math
import os
import warnings
from typing import Any

from diffusers import AutoencoderKL, AutoencoderRAE
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from ..configuration_transfusion import TransfusionConfig, latent_channels_and_scale
from ..modeling_transfusion import TransfusionForCausalLMAndDiffusion
from ..processing_transfusion import IMAGE_TOKENS, VISION_TOKEN, TransfusionProcessor, add_image_tokens
from ..vae.attach import attach_vae, load_autoencoder


def new_transfusion(
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike,
    text_config: PreTrainedConfig | str = "0.16B",
    vae: AutoencoderKL | AutoencoderRAE | str | os.PathLike | None = None,
    pad_to_multiple_of: int | None = None,
    attn_implementation: str | None = None,
    **kwargs: Any,
) -> tuple[TransfusionForCausalLMAndDiffusion, TransfusionProcessor]:
    """
    A model with random weights and its processor, sized to a tokenizer. The tokenizer gets the image tokens, and
    `<pad>` if it has no padding token.

    Args:
        tokenizer (`PreTrainedTokenizerBase`, `str` or `os.PathLike`): Also a folder, or a repository of the Hub.
        text_config (`PreTrainedConfig` or `str`, defaults to `"0.16B"`):
            The decoder, or a preset of [`TransfusionConfig.from_preset`]. The tokenizer decides its `vocab_size`.
        vae (`AutoencoderKL`, `AutoencoderRAE`, `str` or `os.PathLike`, *optional*):
            For [`attach_vae`]; images are then its latents, otherwise pixels.
        pad_to_multiple_of (`int`, *optional*): Rounds the vocabulary up to a multiple of this.
        attn_implementation (`str`, *optional*): `"sdpa"`, `"transfusion_varlen"` …
        kwargs: Fields of [`TransfusionConfig`], such as `sample_size` (in latent pixels), `patch_size` or
            `latent_channels` (3 for pixels, with a `vae` its own); and names of tokens, such as `image_token`.

    Raises:
        ValueError: a tokenizer without end-of-sequence token, an unknown preset or field.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    if tokenizer.eos_token is None:
        raise ValueError(
            f"`tokenizer` {tokenizer.name_or_path} has no end-of-sequence token, so no text would end. Give it one "
            "(`tokenizer.add_special_tokens({'eos_token': ...})`, `save_pretrained`), or choose another."
        )
    names = IMAGE_TOKENS if kwargs.get("vision_config") is None else {**IMAGE_TOKENS, **VISION_TOKEN}
    tokens = {name: kwargs.pop(name, default) for name, default in names.items()}
    if unknown := sorted(set(kwargs) - set(TransfusionConfig.__annotations__)):
        raise ValueError(f"TransfusionConfig has no field {', '.join(f'`{name}`' for name in unknown)}.")
    add_image_tokens(tokenizer, tokens)
    vocab_size = math.ceil(len(tokenizer) / (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1)
    if isinstance(text_config, str):
        preset, text_config = text_config, TransfusionConfig.from_preset(text_config).text_config
        if abs(vocab_size / text_config.vocab_size - 1) > 0.05:
            difference = 2 * (vocab_size - text_config.vocab_size) * text_config.hidden_size / 1e9
            warnings.warn(
                f"{preset} is meant for a vocabulary of {text_config.vocab_size:,}; the {vocab_size:,} tokens of "
                f"`tokenizer` {tokenizer.name_or_path} change its size by {difference:+.3f}B parameters.",
                stacklevel=2,
            )
    text_config = copy.deepcopy(text_config)
    text_config.vocab_size = vocab_size
    autoencoder = None if vae is None else load_autoencoder(vae)
    channels = 3 if autoencoder is None else latent_channels_and_scale(autoencoder.config)[0]
    kwargs = {"latent_channels": channels, **kwargs}
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}
    model = TransfusionForCausalLMAndDiffusion(TransfusionConfig(text_config=text_config, **ids, **kwargs))
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)
    if autoencoder is not None:
        attach_vae(model, autoencoder)
    return model, TransfusionProcessor.for_model(model, tokenizer, **tokens)
