"""
Images to transformer vectors and back (§3, arXiv 2408.11039).

Images travel as *stacks*: a list of tensors `(num_images, channels, height, width)`, neighbours of one size stacked,
so that a batch of equal images is a single tensor and one of mixed sizes keeps its order.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import nn

from .configuration_transfusion import TransfusionConfig


def stack_images(images: torch.Tensor | Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """
    A tensor `(num_images, channels, height, width)`, or images `(channels, height, width)` of any sizes, as stacks.
    Stacks pass through.
    """
    if isinstance(images, torch.Tensor):
        return [images]
    images = list(images)
    if all(image.ndim == 4 for image in images):
        return images
    return [torch.stack(list(group)) for _, group in groupby(images, key=lambda image: tuple(image.shape))]


def patchify(stack: torch.Tensor, patch_size: int) -> torch.Tensor:
    """
    Cuts images into windows, left to right, top to bottom.

    Args:
        stack (`torch.Tensor` of shape `(num_images, channels, height, width)`)
        patch_size (`int`): Side of a window.

    Returns:
        `torch.Tensor` of shape `(num_images · num_patches, channels · patch_size²)`.
    """
    windows = nn.functional.pixel_unshuffle(stack, patch_size)  # (images, channels · p², rows, columns)
    return windows.flatten(2).transpose(1, 2).flatten(0, 1)


def unpatchify(patches: torch.Tensor, patch_size: int, shape: tuple[int, ...]) -> torch.Tensor:
    """
    Undoes [`patchify`].

    Args:
        patches (`torch.Tensor` of shape `(num_images · num_patches, channels · patch_size²)`)
        patch_size (`int`): Side of a window.
        shape (`tuple[int, ...]`): That of the stack, `(num_images, channels, height, width)`.
    """
    num_images, _, height, width = shape
    windows = patches.view(num_images, -1, patches.shape[-1]).transpose(1, 2)
    windows = windows.unflatten(2, (height // patch_size, width // patch_size))
    return nn.functional.pixel_shuffle(windows, patch_size)


class TransfusionTimestepEmbedding(nn.Module):
    """
    Sinusoids of t and a small MLP, of the width of a patch (footnote 6 adds it to every patch vector). At least
    float32 whatever the model's dtype.
    """

    def __init__(self, num_channels: int, patch_dim: int):
        super().__init__()
        self.sinusoids = Timesteps(num_channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.mlp = TimestepEmbedding(num_channels, num_channels, out_dim=patch_dim).float()

    def _apply(self, fn, recurse=True):
        def keep_float32(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            is_rounded = moved.is_floating_point() and moved.dtype.itemsize < tensor.dtype.itemsize
            return tensor.to(moved.device) if is_rounded else moved

        return super()._apply(keep_float32, recurse)

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """`timesteps` of shape `(num_images,)` → `(num_images, patch_dim)`."""
        with torch.autocast(timesteps.device.type, enabled=False):
            return self.mlp(self.sinusoids(timesteps).to(self.mlp.linear_1.weight.dtype))


class TransfusionLinearPatchEncoder(nn.Module):
    """Patch plus timestep embedding, then one linear layer: the paper's "linear" variant."""

    def __init__(self, config: TransfusionConfig):
        super().__init__()
        self.patch_size = config.patch_size
        patch_dim = config.latent_channels * config.patch_size**2
        self.timestep_embedding = TransfusionTimestepEmbedding(config.timestep_embedding_dim, patch_dim)
        self.proj = nn.Linear(patch_dim, config.text_config.hidden_size)

    def forward(self, stacks: Sequence[torch.Tensor], timesteps: torch.Tensor) -> torch.Tensor:
        """
        Args:
            stacks (`list[torch.Tensor]` of shapes `(num_images, channels, height, width)`): Latents x_t.
            timesteps (`torch.Tensor` of shape `(num_images,)`): t of each image, over all stacks.

        Returns:
            `torch.Tensor` of shape `(total patches, hidden)`.
        """
        patches = torch.cat([patchify(stack, self.patch_size) for stack in stacks])
        repeats = torch.cat(
            [
                timesteps.new_full((len(stack),), stack[0, 0].numel() // self.patch_size**2, dtype=torch.long)
                for stack in stacks
            ]
        )
        embedding = self.timestep_embedding(timesteps).repeat_interleave(repeats, dim=0, output_size=len(patches))
        return self.proj((patches + embedding).to(self.proj.weight.dtype))


class TransfusionLinearPatchDecoder(nn.Module):
    """One linear layer from the transformer's output to the predicted patch."""

    def __init__(self, config: TransfusionConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.proj = nn.Linear(config.text_config.hidden_size, config.latent_channels * config.patch_size**2)

    def forward(self, hidden_states: torch.Tensor, shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(total patches, hidden)`)
            shapes (`list[tuple]`): Those of the stacks, `(num_images, channels, height, width)` each.

        Returns:
            `list[torch.Tensor]` in those shapes.
        """
        area = self.patch_size**2
        lengths = [num_images * height * width // area for num_images, _, height, width in shapes]
        patches = self.proj(hidden_states).split(lengths)
        return [unpatchify(patch, self.patch_size, shape) for patch, shape in zip(patches, shapes, strict=True)]
