"""Training plans: which parameters are trained when a language model learns to draw."""

import re

from ..modality_transfusion import image_parameters
from ..modeling_transfusion import TransfusionForCausalLMAndDiffusion

TRAINING_PLANS = ("image_parts", "image_weights", "all")


def set_trainable(model: TransfusionForCausalLMAndDiffusion, plan: str) -> list[str]:
    r"""
    Freezes the parameters that a plan does not train (`requires_grad`). The VAE is always frozen. Call it before an
    optimizer or an adapter is made.

    Args:
        model ([`TransfusionForCausalLMAndDiffusion`])
        plan (`str`):
            - `"image_parts"`: patch encoder, timestep embedding and patch decoder.
            - `"image_weights"`: these and the image weights of `untied_modalities`. Text logits do not change.
            - `"all"`: everything.

    Returns:
        `list[str]`: names of the trained parameters.

    Raises:
        ValueError: an unknown plan, or `"image_weights"` for a model that has none.
    """
    if plan not in TRAINING_PLANS:
        raise ValueError(f"`plan` must be one of {', '.join(TRAINING_PLANS)}; got {plan!r}.")
    image_weights = {name for name, _, _ in image_parameters(model)}
    if plan == "image_weights" and not image_weights:
        raise ValueError(
            "`plan` 'image_weights' needs a model with weights for images; set `untied_modalities=['image']` in its "
            "config, or take 'image_parts'."
        )
    trained = []
    for name, parameter in model.named_parameters():
        is_image_part = re.match(r"model\.patch_(en|de)coder\.", name) is not None
        is_trained = is_image_part or (plan == "image_weights" and name in image_weights) or plan == "all"
        is_trained &= not name.startswith("vae.")
        parameter.requires_grad_(is_trained)
        trained += [name] * is_trained
    return trained
