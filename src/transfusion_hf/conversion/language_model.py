"""In memory: a language model of transformers becomes a Transfusion that can learn to draw."""

import copy
import math
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..configuration_transfusion import IMAGE_TOKEN_IDS, TransfusionConfig
from ..modality_transfusion import untie_modalities
from ..modeling_transfusion import TransfusionForCausalLMAndDiffusion
from ..patching_transfusion import make_patch_parts


def causal_lm_config(text_config: PreTrainedConfig, **kwargs: Any) -> TransfusionConfig:
    """
    The configuration of the Transfusion that a language model becomes: its vocabulary grows by the three image tokens
    that `kwargs`, the fields of [`TransfusionConfig`], do not name. `ValueError` for a quantised model, and for fields
    whose weights it does not have.
    """
    if getattr(text_config, "quantization_config", None) is not None:
        raise ValueError(
            "`quantization_config`: a quantised language model cannot be converted; take the original, and quantise "
            "the result when loading it."
        )
    for name, remedy in (
        ("vae_config", "; call `attach_vae(model, vae)` after the conversion"),
        ("vision_config", ""),
    ):
        if kwargs.get(name) is not None:
            raise ValueError(f"`{name}` would have no weights, since a language model has none for it{remedy}.")
    text_config = copy.deepcopy(text_config)
    size = getattr(text_config, "vocab_size", 0)
    for offset, name in enumerate(IMAGE_TOKEN_IDS):
        kwargs.setdefault(name, size + offset)
        text_config.vocab_size = max(getattr(text_config, "vocab_size", 0), kwargs[name] + 1)
    return TransfusionConfig(text_config=text_config, **kwargs)


def generation_values(generation_config: GenerationConfig) -> dict[str, Any]:
    """What a language model's generation config sets, without the library's bookkeeping."""
    values = generation_config.to_diff_dict().items()
    return {k: v for k, v in values if v is not None and k != "transformers_version" and not k.startswith("_")}


def refuse_unfit(missing: Iterable[str], unknown: Iterable[str], misshapen: Iterable[str]) -> None:
    """`ValueError` for tensors of a checkpoint that do not fit its configuration."""
    problems = {"missing": sorted(missing), "unknown": sorted(unknown), "of another shape": list(misshapen)}
    said = [f"{what}: {', '.join(names[:5])} ({len(names)} in all)" for what, names in problems.items() if names]
    if said:
        raise ValueError(f"The checkpoint does not fit its configuration. Tensors {'; '.join(said)}.")


@torch.no_grad()
def init_patch_parts(model: TransfusionForCausalLMAndDiffusion, embedding: torch.Tensor) -> None:
    """
    New patch encoder and decoder for a trained language model: patches enter as large as its words, and the first
    prediction is 0. They take device and dtype from the language model's `embedding` of shape `(vocab, hidden)`.
    """
    config, base = model.config, model.model
    parts = nn.ModuleList(make_patch_parts(config))
    parts.apply(model._init_weights).to(embedding)
    base.patch_encoder, base.patch_decoder = encoder, decoder = parts
    mean_square = sum(rows.float().square().sum().item() for rows in embedding.split(4096)) / embedding.numel()
    scale = getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0)
    side = 4 * config.patch_size  # small images: those of the model may be many patches
    stack = torch.randn(64, config.latent_channels, side, side, device=embedding.device)
    encoder.proj.bias.zero_()
    (patches,), _ = encoder([stack], torch.randint(config.num_train_timesteps, (len(stack),), device=stack.device))
    encoder.proj.weight.mul_(math.sqrt(mean_square) * scale / patches.float().square().mean().sqrt())
    last = getattr(decoder, "conv_out", decoder.proj)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)


def from_causal_lm(
    pretrained_model_name_or_path: str | os.PathLike | PreTrainedModel,
    pad_to_multiple_of: int | None = None,
    attn_implementation: str | None = None,
    **kwargs: Any,
) -> TransfusionForCausalLMAndDiffusion:
    """
    Turns a language model into one that can learn to draw; also `TransfusionForCausalLMAndDiffusion.from_causal_lm`.
    Its text stays as it was: the weights are taken as they are, and the vocabulary grows by `<BOI>`, the placeholder
    of a patch and `<EOI>`, whose rows are the mean of the others. Spare rows of the embedding, named by
    `image_start_token_id` and the other ids, stay as they are.

    Call `attach_vae(model, ...)` next if images are latents, and `TransfusionProcessor.for_model(model, tokenizer)`.
    `conversion/convert_causal_lm.py` does all of it without holding the model in memory.

    Args:
        pretrained_model_name_or_path (`str`, `os.PathLike` or `PreTrainedModel`):
            A folder, a repository on the Hub, or the language model itself, whose modules are then shared.
        pad_to_multiple_of (`int`, *optional*): For the size of the grown vocabulary.
        kwargs: Fields of [`TransfusionConfig`], such as `latent_channels`; the others go to
            `AutoModelForCausalLM.from_pretrained`: `dtype`, `revision`, `device_map` …

    Raises:
        ValueError: a quantised model, one of another family than `SUPPORTED_TEXT_MODELS`, a checkpoint with gaps.
    """
    fields = {name: kwargs.pop(name) for name in list(kwargs) if name in TransfusionConfig.__annotations__}
    source: Any = pretrained_model_name_or_path
    is_loaded = isinstance(source, PreTrainedModel)
    text_config = source.config if is_loaded else AutoConfig.from_pretrained(source, **kwargs)
    config = causal_lm_config(text_config, **fields)
    with torch.device("meta"):  # refuses what cannot be converted before anything large is loaded
        model = TransfusionForCausalLMAndDiffusion(config)
    language_model = source
    if not is_loaded:
        language_model, found = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **kwargs)
        misshapen = sorted(key for key, *_ in found["mismatched_keys"])
        refuse_unfit(found["missing_keys"], found["unexpected_keys"], misshapen)  # else the library fills in at random
    model.model.language_model = language_model.base_model
    if config.untied_modalities:
        untie_modalities(model.model.language_model, config.untied_final_norm)
    model.lm_head = language_model.get_output_embeddings()
    config.text_config = model.model.language_model.config
    model.grow_vocabulary(max(getattr(config, name) for name in IMAGE_TOKEN_IDS) + 1, pad_to_multiple_of)
    init_patch_parts(model, model.get_input_embeddings().weight.detach())
    model.generation_config.update(**generation_values(language_model.generation_config))
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)
    return model.eval()


# Users look for it beside `from_pretrained`, but the model's code, which travels with checkpoints, imports no wing.
TransfusionForCausalLMAndDiffusion.from_causal_lm = staticmethod(from_causal_lm)  # type: ignore[attr-defined]
