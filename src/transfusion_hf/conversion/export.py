"""The way back: extracts the language model or the autoencoder of a Transfusion."""

import copy

import torch
from diffusers import AutoencoderKL, AutoencoderRAE
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from ..configuration_transfusion import is_rae
from ..denoising_transfusion import DRAWING_DEFAULTS
from ..modeling_transfusion import TransfusionForCausalLMAndDiffusion
from .causal_lm import transfusion_key
from .language_model import generation_values


def extract_causal_lm(model: TransfusionForCausalLMAndDiffusion, vocab_size: int | None = None) -> PreTrainedModel:
    """
    The language model alone, as a model of its own family with the same text logits. Its weights are shared, not
    copied. `vocab_size` cuts the vocabulary, for example to the original's; a padding token beyond it is dropped.

    Raises:
        ValueError: a `vocab_size` that is too large, or cuts off the first or last token of a text; a model whose
            weights are not those of its `text_config`, for example a quantised one.
    """
    text_config = copy.deepcopy(model.config.text_config)
    values = generation_values(model.generation_config).items()
    generation_config = {name: value for name, value in values if name not in DRAWING_DEFAULTS}
    if vocab_size is not None:
        if not 1 <= vocab_size <= text_config.vocab_size:
            raise ValueError(f"`vocab_size` must lie in 1 to {text_config.vocab_size}; got {vocab_size}.")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            for place in (vars(text_config), generation_config):
                value = place.get(name)
                if value is None or max([value] if isinstance(value, int) else value) < vocab_size:
                    continue
                if name != "pad_token_id":
                    raise ValueError(f"`vocab_size` is {vocab_size}, but `{name}` is {value}; leave it in.")
                place[name] = None

    text_config._attn_implementation = None  # ours may not fit its own class
    with torch.device("meta"):
        language_model = AutoModelForCausalLM.from_config(text_config)
    given, expected = model.state_dict(), language_model.state_dict()
    weights = {key: given[transfusion_key(key)] for key in expected if transfusion_key(key) in given}
    if missing := [key for key in expected if key not in weights or weights[key].shape != expected[key].shape]:
        raise ValueError(
            f"`model` lacks {len(missing)} of the weights of a {text_config.model_type!r}, or has them in another "
            f"shape: {', '.join(missing[:5])}. Merge adapters, and load it without quantisation."
        )
    language_model.load_state_dict(weights, assign=True)
    language_model.tie_weights()
    for name, buffer in list(language_model.named_buffers()):  # non-persistent
        if buffer.is_meta:
            owner, _, attribute = name.rpartition(".")
            value = model.model.language_model.get_buffer(name.removeprefix("model."))
            language_model.get_submodule(owner).register_buffer(attribute, value, persistent=False)
    if vocab_size is not None:
        language_model.resize_token_embeddings(vocab_size)
    language_model.generation_config = GenerationConfig(**generation_config)
    return language_model.train(model.training)


def extract_vae(model: TransfusionForCausalLMAndDiffusion) -> AutoencoderKL | AutoencoderRAE:
    """
    The autoencoder alone, as a diffusers model with its scale and shift; `ValueError` for a model without one. Its
    weights are shared, not copied.
    """
    vae_config = model.config.vae_config
    if model.vae is None or vae_config is None:
        raise ValueError("`model` has no autoencoder: its latents are the images themselves.")
    if is_rae(vae_config):
        own = {name: value for name, value in vae_config.items() if name != "latents_shape"}
        statistics = {"latents_mean": model.vae._latents_mean, "latents_std": model.vae._latents_std}
        vae = AutoencoderRAE(**own, **statistics)
    else:
        with torch.device("meta"):
            vae = AutoencoderKL.from_config(vae_config)
    vae.load_state_dict(model.vae.state_dict(), assign=True)
    return vae.eval()
