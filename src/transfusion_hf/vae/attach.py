"""The paper's autoencoder; gives a Transfusion model a trained one, and measures the scale of its latents."""

import copy
import inspect
import os
from collections.abc import Iterable
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderRAE

from ..diffusion_transfusion import make_noise_scheduler
from ..modeling_transfusion import TransfusionForCausalLMAndDiffusion
from ..patching_transfusion import make_vae


def paper_vae_config(scaling_factor: float, shift_factor: float | None = None) -> dict[str, Any]:
    """
    The `vae_config` of the paper's autoencoder (§4.1): sides 8 times smaller, 8 channels, latents (z − shift) · scale;
    measure both on the trained autoencoder with [`measure_latent_scale`].
    NOTE: the paper says only that it has 86M parameters; Stable Diffusion's layout with 8 channels has 83.7M.
    """
    channels = [128, 256, 512, 512]
    return {
        "in_channels": 3, "out_channels": 3, "latent_channels": 8, "sample_size": 256,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "block_out_channels": channels, "layers_per_block": 2,
        "scaling_factor": scaling_factor, "shift_factor": shift_factor,
    }  # fmt: skip


def attach_vae(
    model: TransfusionForCausalLMAndDiffusion,
    vae: str | os.PathLike | AutoencoderKL | AutoencoderRAE,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
    **kwargs: Any,
) -> None:
    """
    Puts a trained `AutoencoderKL` or `AutoencoderRAE` into a model, which then takes and draws pixels. It is frozen
    and saved with the model, as `model.vae`. Make the processor afterwards, with `TransfusionProcessor.for_model`.

    Args:
        model (`TransfusionForCausalLMAndDiffusion`): Must have the autoencoder's `latent_channels`.
        vae (`str`, `os.PathLike`, `AutoencoderKL` or `AutoencoderRAE`):
            A folder, a repository of the Hub, or the autoencoder itself.
        scaling_factor, shift_factor (`float`, *optional*): Of (z − shift) · scale; default to the autoencoder's. If
            it has no scale, latents of 4 channels get that of Stable Diffusion 1 and 2, 0.18215. An `AutoencoderRAE`
            has its own means and deviations.
        kwargs: For `from_pretrained`: `subfolder`, `revision`, `token` …

    Raises:
        ValueError: another architecture, other channels, a missing scale or shift. The model then stays as it was.
    """
    vae = load_autoencoder(vae, **kwargs)
    vae_config = _rae_config(vae) if isinstance(vae, AutoencoderRAE) else _kl_config(vae)
    factors = {"scaling_factor": scaling_factor, "shift_factor": shift_factor}
    factors = {name: value for name, value in factors.items() if value is not None}
    if factors and isinstance(vae, AutoencoderRAE):
        raise ValueError(f"An `AutoencoderRAE` standardises its latents itself; leave out {', '.join(factors)}.")
    vae_config |= factors
    if vae_config.get("latent_channels") == 4:
        vae_config.setdefault("scaling_factor", 0.18215)

    config = copy.copy(model.config)
    config.vae_config = vae_config
    config.validate_transfusion()
    attached = make_vae(vae_config)
    state = vae.state_dict()
    for name in {"_latents_mean", "_latents_std"} & state.keys():
        state[name] = state[name].expand(vae_config["latents_shape"])
    attached.load_state_dict(state)
    model.config.vae_config = vae_config
    model.vae = attached.to(model.model.patch_encoder.proj.weight.device)
    model.noise_scheduler = make_noise_scheduler(model.config)  # whether it clips depends on the autoencoder


def load_autoencoder(vae: Any, **kwargs: Any) -> AutoencoderKL | AutoencoderRAE:
    """The autoencoder of a folder or repository, or the one given; `ValueError` for another class."""
    allowed = "an `AutoencoderKL` or `AutoencoderRAE` of diffusers"
    if isinstance(vae, (str, os.PathLike)):
        name = AutoencoderKL.load_config(vae, **kwargs).get("_class_name", "AutoencoderKL")
        if name not in ("AutoencoderKL", "TransfusionVAE", "AutoencoderRAE"):
            raise ValueError(f"`vae` must be {allowed}; {vae} holds a `{name}`.")
        loaded_class = AutoencoderRAE if name == "AutoencoderRAE" else AutoencoderKL
        return loaded_class.from_pretrained(vae, **{"torch_dtype": torch.float32, **kwargs})
    if not isinstance(vae, (AutoencoderKL, AutoencoderRAE)):
        raise ValueError(f"`vae` must be {allowed}, or where one lies; got {type(vae).__name__}.")
    return vae


def _rae_config(vae: AutoencoderRAE) -> dict[str, Any]:
    # Means and deviations, many numbers, are in the weights too.
    left_out = ("latents_mean", "latents_std")
    own = {name: value for name, value in vae.config.items() if not name.startswith("_") and name not in left_out}
    shape = torch.broadcast_shapes(vae._latents_mean.shape, vae._latents_std.shape)
    return {**own, "latents_shape": list(shape)}


def _kl_config(vae: AutoencoderKL) -> dict[str, Any]:
    # Without the defaults of diffusers: its scale is that of one model, and no autoencoder would seem to lack a scale.
    # What was set later, by `register_to_config`, is still listed among the defaults.
    unset = set(vae.config.get("_use_default_values", [])) - {"block_out_channels", "latent_channels"}
    parameters = inspect.signature(AutoencoderKL).parameters
    names = [name for name in parameters if name not in unset or vae.config[name] != parameters[name].default]
    return {name: value for name, value in vae.config.items() if name in names}


@torch.no_grad()
def measure_latent_scale(vae: AutoencoderKL, images: Iterable[torch.Tensor]) -> tuple[float, float]:
    """
    The `(scaling_factor, shift_factor)` = (1 / std, mean) that give latents a mean of 0 and a standard deviation of 1,
    from batches of images of shape `(num_images, channels, height, width)` in [−1, 1]; they must differ.
    """
    if isinstance(vae, AutoencoderRAE):
        raise ValueError(
            "`vae` is an `AutoencoderRAE`, which standardises its latents itself; there is no scale to set."
        )
    count, total, squares = 0, 0.0, 0.0
    for batch in images:
        latents = vae.encode(batch.to(device=vae.device, dtype=vae.dtype)).latent_dist.mode().double()
        count += latents.numel()
        total += float(latents.sum())
        squares += float(latents.square().sum())
    mean = total / max(count, 1)
    variance = squares / max(count, 1) - mean**2
    if not variance > 0:
        raise ValueError(f"`images` gave {count} latent values of variance {variance}; pass some that differ.")
    return variance**-0.5, mean
