"""
Images to transformer vectors and back (§3, arXiv 2408.11039): linear, U-Net, and the frozen VAE around either (§4.1);
and a vision encoder for images that are read, which the paper does not have.

Images travel as *stacks*: a list of tensors `(num_images, channels, height, width)` in which neighbours of one size
are stacked. A batch of equal images is a single tensor, and one of mixed sizes keeps its order.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderRAE
from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder
from diffusers.models.embeddings import (
    TimestepEmbedding,
    Timesteps,
    get_2d_sincos_pos_embed,
    get_2d_sincos_pos_embed_from_grid,
)
from diffusers.models.unets.unet_2d_blocks import DownBlock2D, UpBlock2D
from torch import nn
from transformers import SiglipVisionModel

from .configuration_transfusion import TransfusionConfig, is_rae

Tensors = tuple[torch.Tensor, ...]
Stacks = Sequence[torch.Tensor]
Sizes = Sequence[tuple[int, int]]  # height and width of the images of each stack


def stack_images(images: torch.Tensor | Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Stacks of a tensor `(num_images, channels, height, width)` or of images of any sizes. Stacks pass through."""
    if isinstance(images, torch.Tensor):
        return [images]
    images = list(images)
    if all(image.ndim == 4 for image in images):
        return images
    return [torch.stack(list(group)) for _, group in groupby(images, key=lambda image: tuple(image.shape))]


def apply_by_size(function: Callable[..., Tensors], inputs: Sequence[Tensors]) -> list[Tensors]:
    """Calls a function of images once per size. `inputs` and the result hold tensors for each stack, images first."""
    if len(inputs) == 1:
        return [function(*inputs[0])]
    members: dict[tuple[int, ...], list[int]] = {}
    for i, arguments in enumerate(inputs):
        members.setdefault(tuple(arguments[0].shape[1:]), []).append(i)
    outputs: list[Tensors] = [()] * len(inputs)
    for stacks in members.values():
        results = function(*(torch.cat(parts) for parts in zip(*(inputs[i] for i in stacks), strict=True)))
        lengths = [len(inputs[i][0]) for i in stacks]
        for i, *parts in zip(stacks, *(result.split(lengths) for result in results), strict=True):
            outputs[i] = tuple(parts)
    return outputs


def patchify(stack: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cuts images `(n, channels, height, width)` into windows, row by row: `(n, patches, channels · patch_size²)`."""
    windows = nn.functional.pixel_unshuffle(stack, patch_size)  # (images, channels · p², rows, columns)
    return windows.flatten(2).transpose(1, 2)


def unpatchify(patches: torch.Tensor, patch_size: int, size: tuple[int, int]) -> torch.Tensor:
    """Undoes [`patchify`]; `size` is the height and width of the images."""
    windows = patches.transpose(1, 2).unflatten(2, (size[0] // patch_size, size[1] // patch_size))
    return nn.functional.pixel_shuffle(windows, patch_size)


def sincos_positions(height: int, width: int, hidden_size: int) -> torch.Tensor:
    """Sines and cosines of each patch's column (first half) and row, `(height · width, hidden)`; sides in patches."""
    columns, rows = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
    return get_2d_sincos_pos_embed_from_grid(hidden_size, torch.stack([columns, rows]).float(), output_type="pt")


class KeepFloat32(nn.Module):
    """Keeps its precision when the model around it is cast to less than float32."""

    def _apply(self, fn, recurse=True):
        def keep_float32(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            is_rounded = moved.is_floating_point() and moved.dtype.itemsize < min(tensor.dtype.itemsize, 4)
            return tensor.to(moved.device) if is_rounded else moved

        return super()._apply(keep_float32, recurse)


class TransfusionTimestepEmbedding(KeepFloat32):
    """Sinusoids of t and a small MLP. In the linear encoder as wide as a patch and added to each one (footnote 6)."""

    def __init__(self, config: TransfusionConfig, out_dim: int, width: int | None = None):
        super().__init__()
        num_channels, scale = config.timestep_embedding_dim, config.timestep_scale
        self.sinusoids = Timesteps(num_channels, flip_sin_to_cos=True, downscale_freq_shift=0, scale=scale)
        self.mlp = TimestepEmbedding(num_channels, width or num_channels, out_dim=out_dim).float()

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """`timesteps` of shape `(num_images,)` → `(num_images, out_dim)`."""
        with torch.autocast(timesteps.device.type, enabled=False):
            return self.mlp(self.sinusoids(timesteps).to(self.mlp.linear_1.weight.dtype))


class TransfusionLinearPatchEncoder(nn.Module):
    """Patch plus timestep embedding, then one linear layer: the paper's "linear" variant; or t behind the layer."""

    def __init__(self, config: TransfusionConfig):
        super().__init__()
        self.patch_size = config.patch_size
        patch_dim, hidden_size = config.latent_channels * config.patch_size**2, config.text_config.hidden_size
        self.is_added_behind = config.timestep_embedding_level == "hidden"
        widths = (hidden_size, hidden_size) if self.is_added_behind else (patch_dim, None)
        self.timestep_embedding = TransfusionTimestepEmbedding(config, *widths)
        self.proj = nn.Linear(patch_dim, hidden_size)

    def forward(self, stacks: Stacks, timesteps: torch.Tensor) -> tuple[list[torch.Tensor], None]:
        """Latents x_t in stacks, and t of each image → stacks `(num_images, num_patches, hidden)`; no skips."""
        patches = [patchify(stack, self.patch_size) for stack in stacks]  # (images, patches, channels · p²)
        embeddings = self.timestep_embedding(timesteps).split([len(stack) for stack in stacks])
        if self.is_added_behind:
            states = _per_stack(self.proj, [patch.to(self.proj.weight.dtype) for patch in patches])
            return [state + e[:, None].to(state) for state, e in zip(states, embeddings, strict=True)], None
        sums = [(p + e[:, None]).to(self.proj.weight.dtype) for p, e in zip(patches, embeddings, strict=True)]
        return _per_stack(self.proj, sums), None


class TransfusionLinearPatchDecoder(nn.Module):
    """One linear layer from the transformer's output to the predicted patch."""

    def __init__(self, config: TransfusionConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.proj = nn.Linear(config.text_config.hidden_size, config.latent_channels * config.patch_size**2)

    def forward(self, hidden_states: Stacks, sizes: Sizes, skips: None = None) -> list[torch.Tensor]:
        """Stacks `(num_images, num_patches, hidden)` → stacks `(num_images, channels, height, width)`."""
        patches = _per_stack(self.proj, hidden_states)
        return [unpatchify(p, self.patch_size, size) for p, size in zip(patches, sizes, strict=True)]


def _per_stack(linear: nn.Linear, inputs: Stacks) -> list[torch.Tensor]:
    """One call for all stacks."""
    outputs = linear(torch.cat([x.flatten(0, 1) for x in inputs])).split([x.shape[0] * x.shape[1] for x in inputs])
    return [y.unflatten(0, x.shape[:2]) for x, y in zip(inputs, outputs, strict=True)]


class TransfusionUNetPatchEncoder(nn.Module):
    """
    The way down of a U-Net: each level but the last halves the image, until a pixel is a patch. The timestep embedding
    is added between the convolutions and does not shift or scale the norms (footnote 7: no AdaLayerNorm).

    NOTE: differs from the paper: the norms are group norms, because diffusers' blocks and the U-Nets that the paper
    cites have those; a layer norm is the case of one group.
    """

    def __init__(self, config: TransfusionConfig):
        super().__init__()
        channels: Any = config.unet_block_out_channels  # a list once the configuration is complete
        num_layers, num_groups, width = config.unet_layers_per_block, config.unet_norm_num_groups, 4 * channels[0]
        self.timestep_embedding = TransfusionTimestepEmbedding(config, width)
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], kernel_size=3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock2D(
                channels[max(level - 1, 0)], channels[level], width, num_layers=num_layers, resnet_groups=num_groups,
                add_downsample=level < len(channels) - 1,
            )
            for level in range(len(channels))
        )  # fmt: skip
        self.proj = nn.Linear(channels[-1], config.text_config.hidden_size)

    def forward(self, stacks: Stacks, timesteps: torch.Tensor) -> tuple[list[torch.Tensor], list[Tensors]]:
        """As in [`TransfusionLinearPatchEncoder`]; skips of each stack: timestep embedding and feature maps."""
        embeddings = self.timestep_embedding(timesteps).split([len(stack) for stack in stacks])
        outputs = apply_by_size(self._encode, list(zip(stacks, embeddings, strict=True)))
        return [patches for patches, *_ in outputs], [tuple(skips) for _, *skips in outputs]

    def _encode(self, x_t: torch.Tensor, embedding: torch.Tensor) -> Tensors:
        dtype = self.conv_in.weight.dtype
        hidden_states, embedding = self.conv_in(x_t.to(dtype)), embedding.to(dtype)
        maps = [hidden_states]
        for block in self.down_blocks:
            hidden_states, new = block(hidden_states, embedding)
            maps += new
        patches = self.proj(hidden_states.flatten(2).transpose(1, 2))  # (images, patches, hidden)
        return patches, embedding, *maps


class TransfusionUNetPatchDecoder(nn.Module):
    """The way up of a U-Net: from the transformer's output and the encoder's maps to the predicted image."""

    def __init__(self, config: TransfusionConfig):
        super().__init__()
        channels: Any = config.unet_block_out_channels
        num_layers: Any = config.unet_layers_per_block
        num_groups: Any = config.unet_norm_num_groups
        self.patch_size = config.patch_size
        self.proj = nn.Linear(config.text_config.hidden_size, channels[-1])
        padded = [channels[0], *channels, channels[-1]]
        self.up_blocks = nn.ModuleList(
            UpBlock2D(
                padded[level], padded[level + 2], channels[level], 4 * channels[0], num_layers=num_layers + 1,
                resnet_groups=num_groups, add_upsample=level > 0,
            )
            for level in reversed(range(len(channels)))
        )  # fmt: skip
        self.norm_out = nn.GroupNorm(num_groups, channels[0], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[0], config.latent_channels, kernel_size=3, padding=1)

    def forward(self, hidden_states: Stacks, sizes: Sizes, skips: Sequence[Tensors]) -> list[torch.Tensor]:
        """As in [`TransfusionLinearPatchDecoder`]; `skips` come from the encoder's pass over the same images."""
        inputs = []
        for states, (height, width), (embedding, *maps) in zip(hidden_states, sizes, skips, strict=True):
            rows, columns = height // self.patch_size, width // self.patch_size
            inputs.append((self.proj(states).transpose(1, 2).unflatten(2, (rows, columns)), embedding, *maps))
        return [prediction for (prediction,) in apply_by_size(self._decode, inputs)]

    def _decode(self, hidden_states: torch.Tensor, embedding: torch.Tensor, *maps: torch.Tensor):
        for block in self.up_blocks:
            count = len(block.resnets)
            hidden_states = block(hidden_states, maps[-count:], embedding)
            maps = maps[:-count]
        return (self.conv_out(nn.functional.silu(self.norm_out(hidden_states))),)


def make_patch_parts(config: TransfusionConfig) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder, as `config.patch_encoder` says."""
    if config.patch_encoder == "unet":
        return TransfusionUNetPatchEncoder(config), TransfusionUNetPatchDecoder(config)
    return TransfusionLinearPatchEncoder(config), TransfusionLinearPatchDecoder(config)


class TransfusionVisionEncoder(nn.Module):
    """
    A SigLIP and two linear layers behind it, for images that are read (as in BAGEL, arXiv 2505.14683). An image of any
    size has the positions of the table's first rows and columns, and its own sines and cosines at the end.
    """

    def __init__(self, config: TransfusionConfig):
        super().__init__()
        vision, self.hidden_size = config.vision_config, config.text_config.hidden_size
        self.patch_size, self.side = vision.patch_size, vision.image_size // vision.patch_size
        self.vision_tower = SiglipVisionModel._from_config(vision)
        self.linear_1 = nn.Linear(vision.hidden_size, self.hidden_size)
        self.act = nn.GELU(approximate="tanh")
        self.linear_2 = nn.Linear(self.hidden_size, self.hidden_size)

    def forward(self, stacks: Stacks) -> list[torch.Tensor]:
        """Pixels `(num_images, 3, height, width)` in [−1, 1] → `(num_images, num_patches, hidden)`, both in stacks."""
        return [states for (states,) in apply_by_size(self._encode, [(stack,) for stack in stacks])]

    def _encode(self, pixels: torch.Tensor) -> Tensors:
        tower, (rows, columns) = self.vision_tower, (n // self.patch_size for n in pixels.shape[2:])
        embedding = tower.embeddings
        patches = embedding.patch_embedding(pixels.to(embedding.patch_embedding.weight.dtype))
        table = embedding.position_embedding.weight.unflatten(0, (self.side, self.side))
        states = patches.flatten(2).transpose(1, 2) + table[:rows, :columns].flatten(0, 1)
        states = tower.post_layernorm(tower.encoder(inputs_embeds=states).last_hidden_state)
        states = self.linear_2(self.act(self.linear_1(states)))
        return (states + sincos_positions(rows, columns, self.hidden_size).to(states),)


class FrozenLinear(nn.Module):
    """A linear layer hidden from LoRA on `"all-linear"` and from quantisation."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias

    reset_parameters = nn.Linear.reset_parameters

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden_states, self.weight, self.bias)


class _FrozenAutoencoder(KeepFloat32):
    """
    An autoencoder of diffusers with its names and weights, but frozen, always in evaluation mode and in at least
    float32: lower precision damages images, and some public checkpoints overflow.
    """

    def __init__(self, **vae_config: Any):
        # Without diffusers' own notes, `_class_name` and others.
        super().__init__(**{name: value for name, value in vae_config.items() if not name.startswith("_")})
        for name, module in list(self.named_modules()):
            if isinstance(module, nn.Linear):
                self.set_submodule(name, FrozenLinear(module))
        self.train(False)

    def train(self, mode: bool = True):
        # Also called after loading, which creates new parameters.
        self.requires_grad_(False)
        return super().train(False)

    @torch.no_grad()
    def to_latents(self, images: torch.Tensor) -> torch.Tensor:
        """Images in [−1, 1] to latents as the transformer takes them."""
        with torch.autocast(images.device.type, enabled=False):
            return self._to_latents(images.to(self.dtype))

    @torch.no_grad()
    def to_images(self, latents: torch.Tensor) -> torch.Tensor:
        """Undoes [`to_latents`]; raises `ValueError` where the result is not finite."""
        with torch.autocast(latents.device.type, enabled=False):
            images = self._to_images(latents.to(self.dtype))
        if not torch.isfinite(images).all():
            raise ValueError(
                f"The VAE decoded latents with absolute values up to {float(latents.abs().max()):.3g} to NaN or "
                "infinite pixels. Check its weights, `scaling_factor` and `shift_factor`."
            )
        return images


class TransfusionVAE(_FrozenAutoencoder, AutoencoderKL):
    """
    `AutoencoderKL`: latents are (z − shift) · scale. NOTE: z is the mode of the posterior, which the paper leaves
    open, so that precomputed latents equal those computed on the fly.
    """

    def _to_latents(self, images: torch.Tensor) -> torch.Tensor:
        z = self.encode(images).latent_dist.mode()
        return (z - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def _to_images(self, latents: torch.Tensor) -> torch.Tensor:
        return self.decode(latents / self.config.scaling_factor + (self.config.shift_factor or 0.0)).sample


class TransfusionRAE(_FrozenAutoencoder, AutoencoderRAE):
    """
    `AutoencoderRAE` (arXiv 2510.11690): latents are the features of a vision encoder, standardised by its own means
    and deviations of shape `latents_shape`, which are in the weights. All images have one size.
    """

    def __init__(self, latents_shape: Sequence[int] = (1,), **vae_config: Any):
        super().__init__(**vae_config)
        self._latents_mean, self._latents_std = torch.zeros(*latents_shape), torch.ones(*latents_shape)

    def _to_latents(self, images: torch.Tensor) -> torch.Tensor:
        side = self.decoder_image_size
        if images.shape[2:] != (side, side):
            got = " × ".join(map(str, images.shape[2:]))
            raise ValueError(f"`pixel_values` must be {side} × {side} for an `AutoencoderRAE`; got {got}.")
        return self.encode((images + 1) / 2).latent

    def _to_images(self, latents: torch.Tensor) -> torch.Tensor:
        return self.decode(latents).sample * 2 - 1


def rae_positions(decoder: RAEDecoder) -> torch.Tensor:
    """Its `decoder_pos_embed`, which no file holds."""
    grid, width = math.isqrt(decoder.num_patches), decoder.decoder_hidden_size
    return get_2d_sincos_pos_embed(width, grid, cls_token=True, extra_tokens=1, output_type="pt")[None].float()


def make_vae(vae_config: dict[str, Any]) -> TransfusionVAE | TransfusionRAE:
    """The untrained autoencoder of a `vae_config`."""
    return (TransfusionRAE if is_rae(vae_config) else TransfusionVAE)(**vae_config)
