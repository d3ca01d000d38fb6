"""Training plans: which parameters are trained when a language model learns to draw."""

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

    Returns the names of the trained parameters. Raises a `ValueError` for an unknown plan, or for `"image_weights"`
    where a model has none.
    """
    if plan not in TRAINING_PLANS:
        raise ValueError(f"`plan` must be one of {', '.join(TRAINING_PLANS)}; got {plan!r}.")
    names = {name for name, _ in model.named_parameters() if not name.startswith("vae.")}
    image_weights = {name for name, _, _ in image_parameters(model)}
    if plan == "image_weights" and not image_weights:
        raise ValueError(
            "`plan` 'image_weights' needs `untied_modalities=['image']` in the config; or take 'image_parts'."
        )
    if plan != "all":
        parts = {name for name in names if name.startswith(("model.patch_encoder.", "model.patch_decoder."))}
        names = parts | image_weights if plan == "image_weights" else parts
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return [name for name, _ in model.named_parameters() if name in names]
