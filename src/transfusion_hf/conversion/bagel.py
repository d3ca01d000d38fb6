"""Converts BAGEL-7B-MoT (arXiv 2505.14683), and models in its format, to a Transfusion and back."""

import json
import math
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import AutoencoderKL
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, Qwen3Config, SiglipVisionConfig

from ..configuration_transfusion import TransfusionConfig
from ..hub.card import make_model_card
from ..image_processing_transfusion import TransfusionImageProcessor
from ..modeling_transfusion import TransfusionForCausalLMAndDiffusion
from ..patching_transfusion import sincos_positions
from ..processing_transfusion import TransfusionProcessor
from ..vae.attach import attach_vae
from .causal_lm import SafetensorsCheckpoint, write_shards, written_whole
from .language_model import refuse_unfit

FILES = ("llm_config.json", "vit_config.json", "ema.safetensors", "ae.safetensors")
TOKENS = {
    "image_token": "<|image_pad|>", "image_start_token": "<|vision_start|>", "image_end_token": "<|vision_end|>",
    "vision_token": "<|vision_pad|>",
}  # fmt: skip
START, END = "<|im_start|>", "<|im_end|>"
# Messages have no roles, only texts and images. An answer begins with a `START` that the prompt ends with.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{%- set content = message['content'] -%}"
    "{%- for part in ([{'type': 'text', 'text': content}] if content is string else content) -%}"
    "{%- if part['type'] != 'text' -%}{{ '<|image_pad|>' }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ '<|im_start|>' }}{% generation %}{{ part['text'] + '<|im_end|>' }}{% endgeneration %}"
    "{%- else -%}{{ '<|im_start|>' + part['text'] + '<|im_end|>' }}{%- endif -%}"
    "{%- endfor -%}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>' }}{%- endif -%}"
)
# The defaults of the released code, whose 50 points are 49 steps.
GENERATION = {
    "num_inference_steps": 49, "timestep_shift": 3.0, "guidance_type": "nested", "image_guidance_scale": 4.0,
    "guidance_interval": [0.4, 1.0], "guidance_renorm": "global", "guidance_renorm_min": 0.0,
}  # fmt: skip
# How names of tensors begin in BAGEL, and here.
_PREFIXES = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
    "vae2llm.": "model.patch_encoder.proj.",
    "llm2vae.": "model.patch_decoder.proj.",
    "vit_model.vision_model.": "model.vision_encoder.vision_tower.",
    "connector.fc1.": "model.vision_encoder.linear_1.",
    "connector.fc2.": "model.vision_encoder.linear_2.",
    "time_embedder.mlp.0.": "model.patch_encoder.timestep_embedding.mlp.linear_1.",
    "time_embedder.mlp.2.": "model.patch_encoder.timestep_embedding.mlp.linear_2.",
}
_OF_TEXT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act", "bos_token_id", "eos_token_id",
)  # fmt: skip
_OF_VISION = (
    "hidden_size", "intermediate_size", "num_attention_heads", "patch_size", "hidden_act", "layer_norm_eps",
)  # fmt: skip
_NEEDED = {"llm_config.json": _OF_TEXT[:6], "vit_config.json": (*_OF_VISION[:4], "num_hidden_layers")}
# What the class cannot have otherwise.
_TEXT_IS = {
    "model_type": "qwen2", "tie_word_embeddings": False, "rope_scaling": None, "qk_norm": True,
    "use_sliding_window": False,
}  # fmt: skip
_VISION_IS = {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh", "num_channels": 3}
LATENT_TABLE, VISION_TABLE = "latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"
EMBEDDING, WINDOWS = "language_model.model.embed_tokens.weight", "vit_model.vision_model.embeddings.patch_embedding."


def transfusion_name(name: str) -> str | None:
    """Our name of a tensor of BAGEL; `None` for the tables of positions, which are computed here."""
    for theirs, ours in _PREFIXES.items():
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
            return re.sub(r"^(model\.language_model\.(?:layers\.\d+\.)?)(.*)_moe_gen\.", r"\1image.\2.", name)
    return None


def bagel_name(name: str) -> str | None:
    """The inverse; `None` for what BAGEL lacks: biases of `o_proj`, which are 0 here, and the autoencoder."""
    if name.endswith("o_proj.bias"):
        return None
    if ".image." in name:
        first, last = name.split(".image.")
        head, tail = last.split(".", 1) if last.startswith("mlp.") else last.rsplit(".", 1)
        name = f"{first}.{head}_moe_gen.{tail}"
    for theirs, ours in _PREFIXES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return None


def reordered(name: str, tensor: torch.Tensor, patch_size: int, is_back: bool = False) -> torch.Tensor:
    """BAGEL orders a window of latents or pixels by (row, column, channel), we do by (channel, row, column)."""
    if name == f"{WINDOWS}weight":  # a convolution here
        if is_back:
            return tensor.permute(0, 2, 3, 1).flatten(1).contiguous()
        side = math.isqrt(tensor.shape[1] // 3)
        return tensor.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2).contiguous()
    if name == "vae2llm.weight":
        return _windows(tensor.T, patch_size, is_back).T.contiguous()
    return _windows(tensor, patch_size, is_back) if name.startswith("llm2vae.") else tensor


def _windows(rows: torch.Tensor, patch_size: int, is_back: bool) -> torch.Tensor:
    sides = (patch_size, patch_size)
    if is_back:
        return rows.unflatten(0, (-1, *sides)).movedim(0, 2).flatten(0, 2).contiguous()
    return rows.unflatten(0, (*sides, -1)).movedim(2, 0).flatten(0, 2).contiguous()


def _side(layout: dict[str, torch.Tensor], name: str) -> int:
    """The side of a square table of positions."""
    if name not in layout or layout[name].ndim != 2 or math.isqrt(len(layout[name])) ** 2 != len(layout[name]):
        found = f"has the shape {tuple(layout[name].shape)}" if name in layout else "is missing"
        raise ValueError(f"{name} must be a square table of positions, (side², hidden); it {found}.")
    return math.isqrt(len(layout[name]))


def bagel_config(
    llm_config: dict[str, Any], vit_config: dict[str, Any], latent_side: int, vision_side: int, **kwargs: Any
) -> TransfusionConfig:
    """
    The configuration of a model in BAGEL's format.

    Args:
        llm_config, vit_config (`dict`): From the folder. The encoder has one layer fewer than `vit_config` says.
        latent_side, vision_side (`int`): Patches along a side of the tables of positions, 64 and 70.
        kwargs: Further fields of [`TransfusionConfig`], such as the ids of tokens.

    Raises:
        ValueError: another vision encoder or decoder.
    """
    for file, config, expected in (
        ("llm_config.json", llm_config, _TEXT_IS),
        ("vit_config.json", vit_config, _VISION_IS),
    ):
        for name, value in expected.items():
            if config.get(name, value) != value:
                raise ValueError(f"`{name}` of {file} must be {value!r}; got {config[name]!r}.")
        for name in _NEEDED[file]:
            if not isinstance(config[name], int) or config[name] < 1:
                raise ValueError(f"`{name}` of {file} must be a positive integer; got {config[name]!r}.")
    text_config = Qwen3Config(
        **{name: llm_config[name] for name in _OF_TEXT if name in llm_config},
        head_dim=llm_config["hidden_size"] // llm_config["num_attention_heads"],
        attention_bias=True,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": llm_config.get("rope_theta", 1_000_000.0)},
    )
    vision_config = SiglipVisionConfig(
        **{name: vit_config[name] for name in _OF_VISION if name in vit_config},
        num_hidden_layers=vit_config["num_hidden_layers"] - 1,
        image_size=vision_side * vit_config["patch_size"],
        vision_use_head=False,
    )
    fields: dict[str, Any] = {
        "text_config": text_config,
        "vision_config": vision_config,
        "latent_channels": 16,
        "patch_size": 2,
        "sample_size": 2 * latent_side,
        "prediction_type": "flow_prediction",
        "diffusion_loss_weight": 1.0,
        "pos_embed_type": "sincos",
        "timestep_embedding_level": "hidden",
        "timestep_scale": 1e-3,
        "timestep_distribution": "logit_normal",
        "untied_modalities": ["image"],
        "untied_final_norm": True,
        "image_markers_in_block": True,
        "shared_image_position": True,
        "hide_noised_images": True,
    }
    return TransfusionConfig(**{**fields, **kwargs})


def load_flux_autoencoder(file: str | os.PathLike) -> AutoencoderKL:
    """The autoencoder of FLUX, from a file in its authors' layout; `ValueError` for any other file."""
    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
        widths, num_levels = [], 0
        while f"encoder.down.{num_levels}.block.0.conv1.weight" in shapes:
            widths.append(shapes[f"encoder.down.{num_levels}.block.0.conv1.weight"][0])
            num_levels += 1
        blocks = [name for name in shapes if re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", name)]
        config = {
            "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "block_out_channels": widths,
            "down_block_types": ["DownEncoderBlock2D"] * num_levels,
            "up_block_types": ["UpDecoderBlock2D"] * num_levels,
            "layers_per_block": len(blocks), "sample_size": 1024,
            "latent_channels": shapes["decoder.conv_in.weight"][1],
            "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False,
        }  # fmt: skip
        if config["latent_channels"] != 16:
            raise ValueError(f"it has {config['latent_channels']} channels, not 16")
        with TemporaryDirectory() as folder:  # diffusers would look for the configuration on the Hub
            Path(folder, "config.json").write_text(json.dumps(config))
            autoencoder = AutoencoderKL.from_single_file(str(file), config=folder, torch_dtype=torch.float32)
        if len(shapes) != len(autoencoder.state_dict()):
            raise ValueError(f"it holds {len(shapes)} tensors, and that of FLUX {len(autoencoder.state_dict())}")
        return autoencoder
    except (SafetensorError, KeyError, IndexError, ValueError, RuntimeError) as error:
        raise ValueError(f"{file} is not the autoencoder of FLUX, or damaged: {error!r}.") from error


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any], SafetensorsCheckpoint]:
    missing = [name for name in FILES if not (folder / name).is_file()]
    if "ema.safetensors" in missing and list(folder.glob("model*.safetensors")):
        missing.remove("ema.safetensors")  # a fine-tune, in shards perhaps
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}; a BAGEL holds {', '.join(FILES)} and its tokenizer.")
    configs = []
    for name in FILES[:2]:
        try:
            configs.append(json.loads((folder / name).read_text()))
        except json.JSONDecodeError as error:
            raise ValueError(f"{folder / name} is cut off or no JSON: {error}. Get it again.") from error
        if lacking := [key for key in _NEEDED[name] if key not in configs[-1]]:
            raise ValueError(f"{folder / name} lacks {', '.join(lacking)}; take that of the model.")
    return *configs, SafetensorsCheckpoint(folder, FILES[2])


def _expected(model: TransfusionForCausalLMAndDiffusion, sides: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """BAGEL's names and shapes of all tensors of a model."""
    hidden, patch_size = model.config.text_config.hidden_size, model.config.patch_size
    shapes: dict[str, tuple[int, ...]] = {name: (side**2, hidden) for name, side in sides.items()}
    for ours, tensor in model.state_dict().items():
        if (name := bagel_name(ours)) is not None:
            shapes[name] = tuple(reordered(name, tensor, patch_size, is_back=True).shape)
    return shapes


def _check_table(checkpoint: SafetensorsCheckpoint, name: str, side: int) -> None:
    table = checkpoint[name]
    expected = sincos_positions(side, side, table.shape[1])
    difference = float((table.double() - expected).abs().max())
    if not difference <= 1e-5 + torch.finfo(table.dtype).eps:
        raise ValueError(f"{name} differs by {difference:.2g} from the sines and cosines that BAGEL has there.")


def _tokenizer(folder: Path, vocab_size: int) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} has no tokenizer, or a damaged one; copy that of the BAGEL it began as."
        ) from error
    tokens = [START, END, *TOKENS.values()]
    tokenizer.add_tokens([token for token in tokens if token not in tokenizer.get_vocab()], special_tokens=True)
    tokenizer.eos_token = END
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<|endoftext|>"})
    if len(tokenizer) > vocab_size:
        raise ValueError(f"The tokenizer of {folder} has {len(tokenizer)} tokens but the model {vocab_size} rows.")
    return tokenizer


def convert_bagel(
    bagel_dir: str | os.PathLike,
    output_dir: str | os.PathLike,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "4GB",
    revision: str | None = None,
    base_model: str | None = "ByteDance-Seed/BAGEL-7B-MoT",
) -> None:
    r"""
    Converts a folder in BAGEL's format and writes model and processor, one file at a time.

    Args:
        bagel_dir (`str` or `os.PathLike`):
            A folder or a repository of the Hub, with `llm_config.json`, `vit_config.json`, the tokenizer,
            `ae.safetensors`, and `ema.safetensors` or, as fine-tunes have, `model.safetensors`, or in shards.
        output_dir (`str` or `os.PathLike`): Must be empty or not exist; appears once all is written.
        dtype (`torch.dtype`, *optional*): Defaults to each tensor's own.
        max_shard_size (`int` or `str`, defaults to `"4GB"`): Limit of each file, and of what is in memory.
        revision (`str`, *optional*): Of the repository.
        base_model (`str`, *optional*): For the model card.

    Raises:
        ValueError: before anything is written: files missing or damaged, another vision encoder or autoencoder,
            tensors that are missing, unknown or of another shape, other tables of positions.
    """
    source = Path(bagel_dir)
    if not source.is_dir():
        patterns = ["*.json", "*.safetensors", "*.txt"]
        source = Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
    llm_config, vit_config, checkpoint = _read(source)
    tokenizer = _tokenizer(source, llm_config["vocab_size"])
    sides = {name: _side(checkpoint.layout, name) for name in (LATENT_TABLE, VISION_TABLE)}
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in TOKENS.items()}
    timestep_dim = checkpoint.layout.get("time_embedder.mlp.0.weight", torch.empty(0, 256)).shape[1]
    config = bagel_config(llm_config, vit_config, *sides.values(), timestep_embedding_dim=timestep_dim, **ids)
    with torch.device("meta"):
        model = TransfusionForCausalLMAndDiffusion(config)
    expected, found = _expected(model, sides), checkpoint.layout
    misshapen = [name for name in found if name in expected and found[name].shape != expected[name]]
    refuse_unfit(expected.keys() - found.keys(), found.keys() - expected.keys(), misshapen)
    for name, side in sides.items():
        _check_table(checkpoint, name, side)
    own_dtype = dtype or found[EMBEDDING].dtype
    layout = {
        name: tensor.to(dtype or getattr(found.get(bagel_name(name) or ""), "dtype", own_dtype))
        for name, tensor in model.state_dict().items()
    }
    autoencoder = load_flux_autoencoder(source / "ae.safetensors")
    attach_vae(model, autoencoder)
    parts = {f"vae.{name}": tensor for name, tensor in autoencoder.state_dict().items()}
    processor = bagel_processor(model, tokenizer)
    model.generation_config.update(**GENERATION, allow_custom_entries=True)
    config.dtype = own_dtype

    def make(name: str) -> torch.Tensor:
        if name in parts:
            return parts[name]
        theirs = bagel_name(name)
        if theirs is None:
            return torch.zeros(layout[name].shape, dtype=layout[name].dtype)
        return reordered(theirs, checkpoint[theirs], config.patch_size).to(layout[name].dtype)

    with written_whole(Path(output_dir)) as folder:
        write_shards(folder, {**layout, **parts}, make, max_shard_size)
        config.architectures = [type(model).__name__]
        make_model_card(config, Path(output_dir).name, base_model=base_model).save(folder / "README.md")
        for part in (config, model.generation_config, processor):
            part.save_pretrained(folder)


def bagel_processor(model: TransfusionForCausalLMAndDiffusion, tokenizer: Any) -> TransfusionProcessor:
    """The processor of a model in BAGEL's format: sides of 512 to 1024 pixels, of 224 to 980 for the encoder."""
    config: Any = model.config
    longest, side = config.latent_size[0] * config.vae_scale_factor, config.pixels_per_patch
    seen, patch = config.vision_config.image_size, config.vision_config.patch_size
    image_processor = TransfusionImageProcessor(
        size={"shortest_edge": longest // 2, "longest_edge": longest},
        size_divisor=side,
        do_center_crop=False,
        vision_size={"shortest_edge": min(224, seen), "longest_edge": seen},
        vision_size_divisor=patch,
    )
    form: dict[str, Any] = {"chat_template": CHAT_TEMPLATE, "text_format": f"{START}{{}}{END}", **TOKENS}
    return TransfusionProcessor.for_model(model, tokenizer, image_processor, **form)


def export_bagel(
    transfusion_dir: str | os.PathLike,
    output_dir: str | os.PathLike,
    max_shard_size: int | str | None = None,
) -> None:
    """
    The way back: writes the weights under BAGEL's names as `ema.safetensors`, bit for bit, and its two configurations.
    The tables of positions, which are computed, get the dtype of the head.
    `ae.safetensors` and the tokenizer's files stay as they are: copy them from the BAGEL that was converted.

    Args:
        transfusion_dir (`str` or `os.PathLike`): The folder of a model that [`convert_bagel`] has written, fine-tuned
            or not; adapters must have been merged.
        output_dir (`str` or `os.PathLike`): Must be empty or not exist.
        max_shard_size (`int` or `str`, *optional*): By default one file, which is in memory.

    Raises:
        ValueError: a model that BAGEL's format cannot hold, such as one with trained biases of `o_proj`.
    """
    source = Path(transfusion_dir)
    config: Any = TransfusionConfig.from_pretrained(source)
    text, vision = config.text_config, config.vision_config
    if text.model_type != "qwen3" or vision is None or not config.untied_final_norm or not text.attention_bias:
        raise ValueError(f"{source} is not in BAGEL's form: a Qwen3 with biases, image weights and a vision encoder.")
    checkpoint = SafetensorsCheckpoint(source)
    with torch.device("meta"):
        model = TransfusionForCausalLMAndDiffusion(config)
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("vae.")}
    found = {name: tensor for name, tensor in checkpoint.layout.items() if not name.startswith("vae.")}
    misshapen = [name for name in found if name in own and found[name].shape != own[name].shape]
    refuse_unfit(own.keys() - found.keys(), found.keys() - own.keys(), misshapen)
    for name in found:
        if name.endswith("o_proj.bias") and checkpoint[name].any():
            raise ValueError(f"{name} is not 0, and BAGEL has no such bias; freeze it in training.")
    sides = {
        LATENT_TABLE: config.latent_size[0] // config.patch_size,
        VISION_TABLE: vision.image_size // vision.patch_size,
    }
    dtype, sources = found["lm_head.weight"].dtype, {bagel_name(name): name for name in found}
    layout = {
        name: torch.empty(shape, dtype=dtype if name in sides else found[sources[name]].dtype, device="meta")
        for name, shape in _expected(model, sides).items()
    }

    def make(name: str) -> torch.Tensor:
        if name in sides:
            return sincos_positions(sides[name], sides[name], text.hidden_size).to(dtype)
        return reordered(name, checkpoint[sources[name]], config.patch_size, is_back=True)

    llm_config = {name: getattr(text, name) for name in _OF_TEXT}
    llm_config |= {
        "model_type": "qwen2",
        "rope_theta": text.rope_parameters["rope_theta"],
        "tie_word_embeddings": False,
    }
    vit_config = {name: getattr(vision, name) for name in (*_OF_VISION, "image_size")}
    vit_config |= {"model_type": "siglip_vision_model", "num_hidden_layers": vision.num_hidden_layers + 1}
    with written_whole(Path(output_dir)) as folder:
        write_shards(
            folder, layout, make, max_shard_size or sum(t.numel() * t.dtype.itemsize for t in layout.values())
        )
        if (folder / "model.safetensors").exists():
            (folder / "model.safetensors").rename(folder / "ema.safetensors")
        for name, values in (("llm_config.json", llm_config), ("vit_config.json", vit_config)):
            (folder / name).write_text(json.dumps(values, indent=2) + "\n")
