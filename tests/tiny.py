"""Tiny real models and random interleaved layouts for the tests."""

import random
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from transfusion_hf import TransfusionConfig, TransfusionForCausalLMAndDiffusion, make_labels

PAD, BOS, EOS, BOI, IMG, EOI = 0, 1, 2, 61, 62, 63
# How far float32 results of these models (up to about 1 in size, some 64 roundings in a row) may differ where the same
# is computed in another order of sums or in another place in memory: which kernel runs depends on both.
ROUNDING = 64 * torch.finfo(torch.float32).eps
FIRST_WORD = 3
UNET = {"patch_encoder": "unet", "unet_block_out_channels": [4, 8], "unet_norm_num_groups": 2}
# f = 2, of 2 channels
VAE = {
    "block_out_channels": [4, 8], "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2, "latent_channels": 2, "norm_num_groups": 2, "scaling_factor": 0.5,
}  # fmt: skip
VOCAB_SIZE = 64


def text_config(model_type: str = "llama", **kwargs: Any) -> PreTrainedConfig:
    defaults: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    config_class = type(AutoConfig.for_model(model_type))
    if "head_dim" in config_class().to_dict():
        defaults["head_dim"] = 8
    if "layer_types" in config_class().to_dict():
        defaults["layer_types"] = None
    return config_class(**{**defaults, **kwargs})


def gemma3(window: int = 6) -> PreTrainedConfig:
    """Gemma 3 with one sliding and one full layer."""
    return text_config("gemma3_text", sliding_window=window, layer_types=["sliding_attention", "full_attention"])


def config(text: PreTrainedConfig | None = None, **kwargs: Any) -> TransfusionConfig:
    defaults = {
        "text_config": text or text_config(),
        "latent_channels": 2,
        "sample_size": 4,
        "patch_size": 2,
        "timestep_embedding_dim": 16,
        "image_start_token_id": BOI,
        "image_token_id": IMG,
        "image_end_token_id": EOI,
    }
    return TransfusionConfig(**{**defaults, **kwargs})


def model(
    text: PreTrainedConfig | None = None,
    seed: int = 0,
    std: float = 0.3,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> TransfusionForCausalLMAndDiffusion:
    """In evaluation mode, with weights large enough that every part matters."""
    built = TransfusionForCausalLMAndDiffusion(config(text, **kwargs)).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std)
    return built


def words(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(FIRST_WORD, BOI) for _ in range(length)]


def layout(rng: random.Random, patches: tuple[int, ...] = (1, 2, 4)) -> tuple[list[int], list[int]]:
    """
    A random document: its ids, and the number of patches of each image. 0 to 4 images; adjacent, first, last and
    one-patch images all occur.
    """
    ids, images = [], []
    if rng.random() < 0.7:
        ids += [BOS]
    for _ in range(rng.randrange(5)):
        if rng.random() < 0.6:
            ids += words(rng, rng.randrange(1, 4))
        images.append(rng.choice(patches))
        ids += [BOI] + [IMG] * images[-1] + [EOI]
    if not ids or rng.random() < 0.6:
        ids += words(rng, rng.randrange(1, 5))
    return ids, images


def image_of(num_patches: int, generator: torch.Generator, channels: int = 2, dtype=torch.float32) -> torch.Tensor:
    """A random latent of 1, 2 or 4 patches of 2 × 2."""
    height, width = {1: (2, 2), 2: (2, 4), 4: (4, 4)}[num_patches]
    return torch.randn(channels, height, width, generator=generator, dtype=dtype)


def batch(seed: int, rows: int = 3, dtype=torch.float32, padding_side: str = "right", **kwargs: Any) -> dict[str, Any]:
    """A random training batch of interleaved rows, some images of it clean context."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    layouts = [layout(rng, **kwargs) for _ in range(rows)]
    images = [image_of(n, generator, dtype=dtype) for _, counts in layouts for n in counts]
    input_ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(ids) for ids, _ in layouts], batch_first=True, padding_value=PAD, padding_side=padding_side
    )
    attention_mask = (input_ids != PAD).long()
    features: dict[str, Any] = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": make_labels(input_ids, attention_mask, BOI, IMG, EOI),
    }
    if images:
        features["latents"] = images
        features["image_loss_mask"] = torch.tensor([rng.random() < 0.75 for _ in images])
        features["max_timesteps"] = torch.tensor([rng.choice([500, 1000]) for _ in images])
        features["noise_seeds"] = [rng.randrange(10**6) for _ in images]
    return features


def drawn_fields(seed: int) -> dict[str, Any]:
    """A random choice of what a configuration may have and the paper's has not; nothing for a seed of 0."""
    rng = random.Random(seed)
    switches = ("image_markers_in_block", "shared_image_position", "hide_noised_images")
    fields: dict[str, Any] = {name: rng.random() < 0.6 for name in switches}
    if rng.random() < 0.6:
        fields |= {"untied_modalities": ["image"], "untied_final_norm": rng.random() < 0.6}
    fields |= {"timestep_embedding_level": rng.choice(["patch", "hidden"]), "timestep_scale": rng.choice([1.0, 1e-3])}
    fields |= {"pos_embed_type": rng.choice([None, "sincos"])}
    fields |= rng.choice([{}, {"timestep_distribution": "logit_normal", "train_timestep_shift": 3.0}])
    fields |= {"diffusion_loss_weighting": rng.choice([None, "min_snr"])}
    return fields if seed else {}


def uncompiled() -> Any:
    """Flex attention on the CPU without minutes of compilation for each length."""
    return torch.compiler.set_stance("force_eager")
