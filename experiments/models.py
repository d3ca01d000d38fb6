"""The models of the comparisons, with the same transformer in every family, and how their compute is counted."""

import os
from typing import Any

from chameleon import ChameleonTwinConfig, ChameleonTwinForConditionalGeneration
from diffusers import AutoencoderKL
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from transfusion_hf import (
    TransfusionConfig,
    TransfusionForCausalLMAndDiffusion,
    TransfusionProcessor,
    new_transfusion,
)
from transfusion_hf.processing_transfusion import IMAGE_TOKENS, add_image_tokens

# By name, which is the number of parameters without embeddings: layers, hidden size, heads, width of the SwiGLU (8/3
# of the hidden size rounded up to a multiple of 32).
SMALL_SIZES = {"0.1M": (2, 64, 2, 192), "0.3M": (3, 96, 3, 256), "0.8M": (4, 128, 4, 352), "2M": (5, 192, 6, 512)}
PAPER_SIZES = ("0.16B", "0.37B", "0.76B", "1.4B", "7B")  # Table 2; the names count embeddings
SIZES = {"small": tuple(SMALL_SIZES), "paper": PAPER_SIZES}

# §4.1
LEARNING_RATES = {"llama": 3e-4, "chameleon": 1e-4, "transfusion": 3e-4}
NUM_CODES = {"small": 512, "paper": 16384}
# Fields of Transfusion. There are as many codes as latent pixels. The default timestep embedding would be a fifth of
# the smallest transformer; the paper's image layers are below 0.5 % (§3).
IMAGES = {
    "small": {"sample_size": 8, "latent_channels": 4, "timestep_embedding_dim": 64},
    "paper": {"sample_size": 32, "latent_channels": 8},
}


def scale_of(size: str) -> str:
    """`"small"` or `"paper"`. `ValueError` for an unknown size."""
    for scale, sizes in SIZES.items():
        if size in sizes:
            return scale
    raise ValueError(f"`size` must be one of {', '.join((*SMALL_SIZES, *PAPER_SIZES))}; got {size!r}.")


def num_image_tokens(size: str) -> int:
    """Patches of 2×2 of a picture, the paper's default."""
    return (IMAGES[scale_of(size)]["sample_size"] // 2) ** 2


def decoder_config(size: str, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """
    The transformer of a size: Llama blocks, as Llama 2 without shared embeddings. Adds the image tokens that the
    tokenizer lacks, so that a word has the same id in every family.
    """
    if scale_of(size) == "paper":
        config = TransfusionConfig.from_preset(size).text_config
    else:
        num_layers, hidden_size, num_heads, intermediate_size = SMALL_SIZES[size]
        config = LlamaConfig(
            num_hidden_layers=num_layers,
            hidden_size=hidden_size,
            num_attention_heads=num_heads,
            intermediate_size=intermediate_size,
            max_position_embeddings=4096,
            initializer_range=0.06,  # the default of 0.02 suits wider models
        )
    add_image_tokens(tokenizer, IMAGE_TOKENS)
    config.vocab_size = len(tokenizer)
    config.pad_token_id, config.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.use_cache = False  # with a cache, the masks of Llama and Chameleon ignore where packed documents begin
    return config


def build_llama(size: str, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """The baseline for text, with random weights. `ValueError` for an unknown size."""
    return LlamaForCausalLM(decoder_config(size, tokenizer))


def build_chameleon(
    size: str, tokenizer: PreTrainedTokenizerBase, num_image_codes: int | None = None, **kwargs: Any
) -> ChameleonTwinForConditionalGeneration:
    """
    The discrete baseline, with random weights.

    Args:
        size (`str`): One of `SIZES`.
        tokenizer (`PreTrainedTokenizerBase`): Of the text; the codes follow its ids.
        num_image_codes (`int`, *optional*):
            Size of the codebook; by default that of the scale. 0 for text alone ("stability changes" in Table 4).
        kwargs: Fields of [`ChameleonTwinConfig`]: `qk_norm`, `swin_norm`, `z_loss_weight` …
    """
    llama = decoder_config(size, tokenizer)
    num_image_codes = NUM_CODES[scale_of(size)] if num_image_codes is None else num_image_codes
    shared = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
        "pad_token_id", "bos_token_id", "eos_token_id", "use_cache",
    )  # fmt: skip
    config = ChameleonTwinConfig(
        **{name: getattr(llama, name) for name in shared},
        vocab_size=llama.vocab_size + num_image_codes,
        num_image_codes=num_image_codes,
        image_start_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKENS["image_start_token"]),
        image_end_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKENS["image_end_token"]),
        **{"sample_size": IMAGES[scale_of(size)]["sample_size"], **kwargs},
    )
    return ChameleonTwinForConditionalGeneration(config)


def build_transfusion(
    size: str,
    tokenizer: PreTrainedTokenizerBase,
    vae: AutoencoderKL | str | os.PathLike | None = None,
    **kwargs: Any,
) -> tuple[TransfusionForCausalLMAndDiffusion, TransfusionProcessor]:
    """
    Transfusion with random weights, and its processor.

    Args:
        size (`str`): One of `SIZES`.
        tokenizer (`PreTrainedTokenizerBase`)
        vae (`AutoencoderKL`, `str` or `os.PathLike`, *optional*): Decodes drawings; training on latents needs none.
        kwargs: Fields of [`TransfusionConfig`]: `patch_size` (2 in the paper's main comparison), `patch_encoder`,
            `bidirectional_image_attention`, `diffusion_loss_weight` …
    """
    return new_transfusion(tokenizer, decoder_config(size, tokenizer), vae, **{**IMAGES[scale_of(size)], **kwargs})


def num_parameters(model: PreTrainedModel) -> int:
    """
    N in 6·N·D: all parameters but the token embeddings, the LM head and the VAE (Kaplan et al., arXiv 2001.08361).
    Norms and what Transfusion has around the transformer, linear layers or U-Net, are included.

    NOTE: the paper does not say which parameters it counts. At the small sizes the vocabulary's two matrices are as
    large as the transformer, and the codes of Chameleon would count as compute, which would favour Transfusion.
    """
    tables = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if id(parameter) not in tables and not name.startswith("vae.")
    )


def num_flops(model: PreTrainedModel, num_tokens: int) -> int:
    """
    Compute of a training (§4.2): 6·N·D, with D the number of elements in all sequences: text tokens and codes or
    patches.
    """
    return 6 * num_parameters(model) * num_tokens
