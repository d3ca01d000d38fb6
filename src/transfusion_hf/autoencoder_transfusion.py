"""The frozen autoencoder inside a Transfusion model: pixels to latents and back (§4.1, arXiv 2408.11039)."""

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

from .patching_transfusion import KeepFloat32


class FrozenLinear(nn.Module):
    """A linear layer that nothing takes for one: LoRA on `"all-linear"` and quantisation leave it alone."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias

    def reset_parameters(self) -> None:
        nn.Linear.reset_parameters(self)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden_states, self.weight, self.bias)


class TransfusionVAE(KeepFloat32, AutoencoderKL):
    """
    diffusers' `AutoencoderKL`, its names and weights unchanged, but frozen, always in evaluation mode and in at least
    float32: low precision costs the picture, and overflows in some public checkpoints.

    Args:
        kwargs: The fields of an `AutoencoderKL` configuration.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        linears = [(name, module) for name, module in self.named_modules() if isinstance(module, nn.Linear)]
        for name, linear in linears:
            parent, _, child = name.rpartition(".")
            setattr(self.get_submodule(parent), child, FrozenLinear(linear))
        self.train(False)

    def train(self, mode: bool = True) -> "TransfusionVAE":
        # Called after loading, too, which makes new parameters.
        self.requires_grad_(False)
        return super().train(False)

    @torch.no_grad()
    def to_latents(self, images: torch.Tensor) -> torch.Tensor:
        """
        NOTE: the mode of the posterior, not a sample, which the paper leaves open: latents computed once are then
        those computed on the fly.

        Args:
            images (`torch.FloatTensor` of shape `(num_images, channels, height, width)`): In [−1, 1].

        Returns:
            `torch.FloatTensor` of shape `(num_images, latent_channels, height / f, width / f)`, (z − shift) · scale.
        """
        with torch.autocast(images.device.type, enabled=False):
            latents = self.encode(images.to(self.dtype)).latent_dist.mode()
        return (latents - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    @torch.no_grad()
    def to_images(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Undoes [`to_latents`].

        Raises:
            ValueError: the result holds values that are no numbers.
        """
        with torch.autocast(latents.device.type, enabled=False):
            z = latents.to(self.dtype) / self.config.scaling_factor + (self.config.shift_factor or 0.0)
            images = self.decode(z).sample
        if not torch.isfinite(images).all():
            raise ValueError(
                f"The VAE decoded latents of absolute values up to {float(latents.abs().max()):.3g} to NaN or "
                "infinite pixels. Its weights are damaged, or the latents were not made with its `scaling_factor` and "
                "`shift_factor`."
            )
        return images


__all__ = ["FrozenLinear", "TransfusionVAE"]
