"""BAGEL-7B-MoT (arXiv 2505.14683) and what is in its format: names and layouts of its weights, there and back."""

import math
import re

import torch

# In the order of the rules; the first one that matches is used. A `_moe_gen` of BAGEL is an `image.` of ours.
_RENAMED = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.norm_moe_gen\.", "model.language_model.image.norm."),
    (r"^language_model\.model\.(layers\.\d+\.)(.*)_moe_gen\.", r"model.language_model.\1image.\2."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^vae2llm\.", "model.patch_encoder.proj."),
    (r"^llm2vae\.", "model.patch_decoder.proj."),
    (r"^vit_model\.vision_model\.", "model.vision_encoder.vision_tower."),
    (r"^connector\.fc([12])\.", r"model.vision_encoder.linear_\1."),
    (r"^time_embedder\.mlp\.0\.", "model.patch_encoder.timestep_embedding.mlp.linear_1."),
    (r"^time_embedder\.mlp\.2\.", "model.patch_encoder.timestep_embedding.mlp.linear_2."),
)


def transfusion_name(name: str) -> str | None:
    """Our name of a tensor in `ema.safetensors`; `None` for what has no counterpart."""
    for pattern, replacement in _RENAMED:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name)
    return None


def reordered(name: str, tensor: torch.Tensor, patch_size: int) -> torch.Tensor:
    """BAGEL has windows, of latents and of pixels, in the order (row, column, channel), we (channel, row, column)."""
    if name.endswith("patch_embedding.weight"):  # a convolution
        side = math.isqrt(tensor.shape[1] // 3)
        return tensor.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2).contiguous()
    if name == "vae2llm.weight":
        return _windows(tensor.T, patch_size).T
    return _windows(tensor, patch_size) if name.startswith("llm2vae.") else tensor


def _windows(rows: torch.Tensor, patch_size: int) -> torch.Tensor:
    return rows.unflatten(0, (patch_size, patch_size, -1)).movedim(2, 0).flatten(0, 2).contiguous()
