"""Configuration of a Transfusion model (Zhou et al., arXiv 2408.11039)."""

import copy
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig, SiglipVisionConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME, cached_file

# Table 2: layers, hidden size, heads; the SwiGLU width is 8/3 of the hidden size rounded up to a multiple of 256.
_PRESETS: dict[str, dict[str, int]] = {
    "0.16B": {"num_hidden_layers": 16, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 2048},
    "0.37B": {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 2816},
    "0.76B": {"num_hidden_layers": 24, "hidden_size": 1536, "num_attention_heads": 24, "intermediate_size": 4096},
    "1.4B": {"num_hidden_layers": 24, "hidden_size": 2048, "num_attention_heads": 16, "intermediate_size": 5632},
    "7B": {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 11008},
}

# By patch size: channels of each level, ResNet blocks per level. The paper gives only the sum, 0.27B for every size.
_PAPER_UNETS: dict[int, tuple[list[int], int]] = {
    1: ([1344], 2),
    2: ([512, 1056], 3),
    4: ([448, 896, 896], 2),
    8: ([320, 640, 640, 640], 3),
}

_CHOICES: dict[str, list] = {
    "patch_encoder": ["linear", "unet"],
    "pos_embed_type": [None, "sincos"],
    "prediction_type": ["epsilon", "v_prediction", "sample", "flow_prediction"],
    "timestep_embedding_level": ["patch", "hidden"],
    "timestep_distribution": ["uniform", "logit_normal"],
    "diffusion_loss_weighting": [None, "min_snr", "v_prediction"],
    "untied_modalities": [None, [], ["image"]],
}
IMAGE_TOKEN_IDS = ("image_start_token_id", "image_token_id", "image_end_token_id")

# Where a saved folder's classes are: `register_for_auto_class` would record one Auto class only.
AUTO_MAP = {
    "AutoConfig": "configuration_transfusion.TransfusionConfig",
    "AutoModel": "modeling_transfusion.TransfusionModel",
    "AutoModelForCausalLM": "modeling_transfusion.TransfusionForCausalLMAndDiffusion",
    "AutoModelForImageTextToText": "modeling_transfusion.TransfusionForCausalLMAndDiffusion",
    "AutoModelForMultimodalLM": "modeling_transfusion.TransfusionForCausalLMAndDiffusion",
    "AutoImageProcessor": "image_processing_transfusion.TransfusionImageProcessor",
    "AutoProcessor": "processing_transfusion.TransfusionProcessor",
}
CUSTOM_PIPELINES = {
    task: {"impl": f"pipelines_transfusion.{name}", "pt": ["AutoModelForMultimodalLM"], "type": "multimodal"}
    for task, name in {
        "text-to-image": "TextToImagePipeline",
        "interleaved-generation": "InterleavedGenerationPipeline",
        "any-to-any": "TransfusionAnyToAnyPipeline",
        "text-generation": "TransfusionTextGenerationPipeline",
    }.items()
}
_IS_REMOTE_CODE = __name__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME)


def image_token_ids(config: "TransfusionConfig") -> list[int]:
    """The ids of all tokens that stand for images or for parts of them."""
    ids = [getattr(config, name) for name in (*IMAGE_TOKEN_IDS, "vision_token_id")]
    return [token_id for token_id in ids if token_id is not None]


def is_rae(vae_config: dict[str, Any] | None) -> bool:
    """Whether an autoencoder is a diffusers `AutoencoderRAE`."""
    return "encoder_type" in (vae_config or {})


def latent_channels_and_scale(vae_config: dict[str, Any]) -> tuple[int, int]:
    """Channels of an autoencoder's latents, and image pixels along a side of one."""
    if is_rae(vae_config):
        return vae_config["encoder_hidden_size"], vae_config["patch_size"]
    return vae_config["latent_channels"], 2 ** (len(vae_config["block_out_channels"]) - 1)


def _preset_text_config(name: str, **fields: Any) -> LlamaConfig:
    # Llama 2's 32,000 tokens, then `<BOI>`, the patch placeholder and `<EOI>`.
    return LlamaConfig(**{"vocab_size": 32003, "max_position_embeddings": 4096, **_PRESETS[name], **fields})


def _refuse(problems: dict[str, Any]) -> None:
    """Raises `ValueError` with the first message whose condition holds."""
    for message, holds in problems.items():
        if holds:
            raise ValueError(message)


@strict
class TransfusionConfig(PreTrainedConfig):
    r"""
    Configuration of a [`TransfusionForCausalLMAndDiffusion`]: the decoder, the image parts around it, the noise
    schedule and the special tokens. The defaults are the paper's 0.16B model (Table 2) over 32×32×8 latents.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            The decoder, of any supported family. Defaults to a `LlamaConfig` of the paper's smallest size.
        vae_config (`dict`, *optional*):
            The configuration of a diffusers `AutoencoderKL`, such as [`paper_vae_config`], with `scaling_factor` and,
            for 16 channels, `shift_factor`, or of an `AutoencoderRAE`, whose images have one size; untrained until
            `attach_vae`. `None`: the image itself is the latent.
        latent_channels (`int`, defaults to 8): Channels of a latent, or of the image without a VAE.
        sample_size (`int` or pair of `int`, defaults to 32): Height and width, in latent pixels, of drawn images.
        patch_size (`int`, defaults to 2): Side, in latent pixels, of the window that becomes one vector (§3).
        patch_encoder (`str`, defaults to `"linear"`):
            `"linear"`: one linear layer on patch plus timestep embedding (with `patch_size=1` the paper's "none").
            `"unet"`: U-Net down and up blocks (§3, Table 7).
        unet_block_out_channels (`list[int]`, *optional*):
            Channels at each of the U-Net's log2(`patch_size`) + 1 resolutions. Default for a hidden size of 768 or
            more and patches up to 8: 0.27B parameters; otherwise a quarter of the hidden size, half of it at the last.
        unet_layers_per_block (`int`, *optional*): ResNet blocks at each resolution down; one more on the way up.
        unet_norm_num_groups (`int`, defaults to 32, or at most 8 for a small U-Net):
            Groups of the U-Net's group norms, of at least two channels; divides all its channels.
        pos_embed_type (`str`, *optional*):
            `"sincos"`: adds a two-dimensional sine-cosine embedding of row and column to each patch's vector.
        timestep_embedding_dim (`int`, defaults to 256): Number of sinusoids of t and width of their MLP; even.
        timestep_embedding_level (`str`, defaults to `"patch"`):
            With `"linear"`: `"patch"`: t is added before the linear layer, as wide as a patch (footnote 6).
            `"hidden"`: behind it, as wide as the transformer.
        timestep_scale (`float`, defaults to 1.0): Factor of t in the sinusoids; 1/T for t from 0 to 1.
        num_train_timesteps (`int`, defaults to 1000): T, the number of steps of the noise schedule.
        timestep_distribution (`str`, defaults to `"uniform"`):
            Of t/T in training; `"logit_normal"`: sigmoid(n) with n ~ N(0, 1) (arXiv 2403.03206).
        train_timestep_shift (`float`, defaults to 1.0): Moves t/T in training to s·t / (1 + (s − 1)·t) (ibid.).
        beta_schedule (`str`, defaults to `"squaredcos_cap_v2"`): By diffusers' name; the default is cosine (Eq. 3).
        prediction_type (`str`, defaults to `"epsilon"`):
            `"epsilon"` (Eq. 3), `"v_prediction"`, `"sample"`, or `"flow_prediction"` (flow matching, without
            `beta_schedule`).
        diffusion_loss_weight (`float`, defaults to 5.0): λ in L = L_LM + λ·L_DDPM (Eq. 4).
        diffusion_loss_weighting (`str`, *optional*):
            A factor of each image's loss, by its t. `"min_snr"`: min(SNR, 5) for errors of x_0, whatever the
            prediction (arXiv 2303.09556). `"v_prediction"`, for `prediction_type="sample"`: the loss is that of the v
            which the predicted x_0 amounts to (arXiv 2511.13720).
        bidirectional_image_attention (`bool`, defaults to `True`):
            Whether the patches of one image attend to each other (Fig. 4). `False`: the causal ablation of Table 5.
        hide_noised_images (`bool`, defaults to `False`):
            Whether only the positions of its own block attend to a noised image. Put a clean copy behind it where
            later text needs the image.
        untied_modalities (`list[str]`, *optional*):
            `["image"]`: patches have separate projections, MLPs and norms in each layer, initialised as copies of the
            text's; attention is shared. `<BOI>` and `<EOI>` count as text. `None` or `[]`: all share all weights.
        untied_final_norm (`bool`, defaults to `False`): With `untied_modalities`: the norm behind the last layer, too.
        image_markers_in_block (`bool`, defaults to `False`):
            Whether `<BOI>` and `<EOI>` belong to the block of their image: they see it and are seen by it.
        shared_image_position (`bool`, defaults to `False`):
            Whether all tokens of a block have one position, that of its first; the next token has the position after
            it. What a model is given as `position_ids` counts all tokens, as everywhere.
        image_start_token_id, image_token_id, image_end_token_id (`int`, defaults to 32000, 32001 and 32002):
            Ids of `<BOI>`, of the placeholder for one patch, and of `<EOI>`.
        vision_config (`SiglipVisionConfig` or `dict`, *optional*):
            A vision encoder for images that are read: a SigLIP without pooling head, and two linear layers behind it.
            It takes images of any size up to `image_size`, in whole patches.
        vision_token_id (`int`, *optional*): With `vision_config`: id of the placeholder for one of its patches.
        tie_word_embeddings (`bool`, *optional*):
            That of `text_config`, which is where it is kept: setting it here, then or later, sets it there.

    Raises:
        ValueError: a field is out of range, or special tokens coincide or lie outside the vocabulary.
    """

    model_type = "transfusion"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "vision_config": SubConfigSpec(config_class=SiglipVisionConfig, optional=True),
    }
    # An evaluation loop gathers every other output of `forward`.
    keys_to_ignore_at_inference = [
        "cache", "lm_loss", "diffusion_loss", "image_predictions", "image_losses", "image_timesteps",
    ]  # fmt: skip

    text_config: Any = None  # a `PreTrainedConfig` once constructed
    vae_config: dict | None = None
    latent_channels: int = 8
    sample_size: int | list | tuple = 32
    patch_size: int = 2
    patch_encoder: str = "linear"
    unet_block_out_channels: list | tuple | None = None
    unet_layers_per_block: int | None = None
    unet_norm_num_groups: int | None = None
    pos_embed_type: str | None = None
    timestep_embedding_dim: int = 256
    timestep_embedding_level: str = "patch"
    timestep_scale: float | int = 1.0
    num_train_timesteps: int = 1000
    timestep_distribution: str = "uniform"
    train_timestep_shift: float | int = 1.0
    beta_schedule: str = "squaredcos_cap_v2"
    prediction_type: str = "epsilon"
    diffusion_loss_weight: float | int = 5.0
    diffusion_loss_weighting: str | None = None
    bidirectional_image_attention: bool = True
    hide_noised_images: bool = False
    untied_modalities: list | None = None
    untied_final_norm: bool = False
    image_markers_in_block: bool = False
    shared_image_position: bool = False
    image_start_token_id: int = 32000
    image_token_id: int = 32001
    image_end_token_id: int = 32002
    vision_config: Any = None  # a `SiglipVisionConfig` once constructed
    vision_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.text_config is None:
            self.text_config = _preset_text_config("0.16B")
        if not _IS_REMOTE_CODE:
            # With the package installed, `pipeline()` must not ask for trust in a copy of it.
            kwargs.pop("auto_map", None)
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)
        self.validate_transfusion()

    @classmethod
    def from_preset(cls, name: str, text_config: dict[str, Any] | None = None, **kwargs: Any) -> "TransfusionConfig":
        """
        One of the paper's five sizes (Table 2): `"0.16B"`, `"0.37B"`, `"0.76B"`, `"1.4B"` or `"7B"`. `text_config` has
        fields of the decoder that differ from it, `kwargs` those of this class.
        """
        if name not in _PRESETS:
            raise ValueError(f"`name` must be one of the presets {', '.join(_PRESETS)}; got {name!r}.")
        return cls(text_config=_preset_text_config(name, **(text_config or {})), **kwargs)

    # transformers and PEFT read and set the outer flag: a copy of it would contradict the decoder's.
    @property
    def tie_word_embeddings(self) -> bool:
        return self.text_config.tie_word_embeddings

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, value: bool) -> None:
        self.text_config.tie_word_embeddings = value

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "tie_word_embeddings": self.tie_word_embeddings}

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes `config.json`, and the code that loads the folder with `trust_remote_code=True`; models call it."""
        saved = copy.copy(self)
        saved.auto_map, saved.custom_pipelines = dict(AUTO_MAP), CUSTOM_PIPELINES
        super(TransfusionConfig, saved).save_pretrained(save_directory)
        folder = Path(__file__).parent
        if _IS_REMOTE_CODE:
            # transformers copied only what this file imports, and no file imports the pipelines. A repository's code
            # lies in a folder named after its commit. If it is gone, transformers copies model and processor.
            with suppress(OSError):
                folder = Path(cached_file(self.name_or_path, "pipelines_transfusion.py", revision=folder.name)).parent
        for file in folder.glob("*_transfusion.py"):
            with suppress(shutil.SameFileError):
                shutil.copyfile(file, Path(save_directory, file.name))
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of a drawn image in latent pixels."""
        size = self.sample_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def vae_scale_factor(self) -> int:
        """Image pixels along one side of a latent pixel; 1 without a VAE."""
        return 1 if self.vae_config is None else latent_channels_and_scale(self.vae_config)[1]

    @property
    def pixels_per_patch(self) -> int:
        """Image pixels along one side of a patch; image sizes are multiples of it."""
        return self.vae_scale_factor * self.patch_size

    @property
    def first_timestep(self) -> int:
        """The smallest t of a noised image: 0, or 1 with flow matching, where t = 0 is clean."""
        return int(self.prediction_type == "flow_prediction")

    def num_patches(self, height: int, width: int) -> int:
        """Number of transformer vectors of an image whose latent is `height` × `width`."""
        if height < 1 or width < 1 or height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"The sides of a latent must be positive multiples of `patch_size` ({self.patch_size}); got "
                f"{height} × {width}. Resize or crop the image to multiples of {self.pixels_per_patch} pixels."
            )
        return (height // self.patch_size) * (width // self.patch_size)

    def validate_transfusion(self) -> None:
        """Checks all fields, after completing the U-Net's. A model calls it again, for fields that were set later."""
        dim, size, weight = self.timestep_embedding_dim, self.sample_size, self.diffusion_loss_weight
        width, vocab_size = self.text_config.hidden_size, self.text_config.vocab_size
        counts = {name: getattr(self, name) for name in ("latent_channels", "patch_size", "num_train_timesteps")}
        choices = [(name, getattr(self, name), allowed) for name, allowed in _CHOICES.items()]
        vision, vision_id = self.vision_config, self.vision_token_id
        ids = {name: getattr(self, name) for name in IMAGE_TOKEN_IDS}
        ids |= {} if vision_id is None else {"vision_token_id": vision_id}
        _refuse({
            **{f"`{name}` must be at least 1; got {value}.": value < 1 for name, value in counts.items()},
            **{f"`{name}` must be {', '.join(map(repr, allowed[:-1]))} or {allowed[-1]!r}; got {value!r}.":
                value not in allowed for name, value, allowed in choices},
            f"`timestep_embedding_dim` must be even and at least 2; got {dim}.": dim < 2 or dim % 2,
            f"`pos_embed_type='sincos'` needs a hidden size that is a multiple of 4; got {width}.":
                self.pos_embed_type == "sincos" and width % 4,
            f"`diffusion_loss_weight` must not be negative; got {weight}.": weight < 0,
            "`timestep_embedding_level='hidden'` needs `patch_encoder='linear'`: a U-Net takes t in its own blocks.":
                self.timestep_embedding_level == "hidden" and self.patch_encoder != "linear",
            "`diffusion_loss_weighting='v_prediction'` needs `prediction_type='sample'`; others predict v, or would "
            f"be divided by almost 0; got {self.prediction_type!r}.":
                self.diffusion_loss_weighting == "v_prediction" and self.prediction_type != "sample",
            f"`train_timestep_shift` must be positive; got {self.train_timestep_shift}.":
                self.train_timestep_shift <= 0,
            "`hide_noised_images` needs `bidirectional_image_attention`: an image would not see itself.":
                self.hide_noised_images and not self.bidirectional_image_attention,
            "`untied_final_norm` needs `untied_modalities=['image']`.":
                self.untied_final_norm and not self.untied_modalities,
            f"`sample_size` must be one integer or (height, width); got {size}.":
                not isinstance(size, int) and len(size) != 2,
            **{f"`{name}` must lie inside the vocabulary, 0 to {vocab_size - 1}; got {value}. Enlarge "
                "`text_config.vocab_size` or make model and processor by `new_transfusion(tokenizer)`.":
                not 0 <= value < vocab_size for name, value in ids.items()},
            "`vision_config` and `vision_token_id` belong together; pass both or neither.":
                (vision is None) != (vision_id is None),
            "`vision_config` must have `vision_use_head=False`, and one `image_size` that is a multiple of its "
            f"`patch_size`; got {getattr(vision, 'image_size', None)} and {getattr(vision, 'patch_size', None)}.":
                vision is not None and (vision.vision_use_head or not isinstance(vision.image_size, int)
                or vision.image_size % vision.patch_size),
            f"The image tokens must differ; got {', '.join(f'{name}={value}' for name, value in ids.items())}.":
                len(set(ids.values())) < len(ids),
        })  # fmt: skip
        if self.patch_encoder == "unet":
            self._complete_and_validate_unet()
        if self.vae_config is not None:
            self._validate_rae(self.vae_config) if is_rae(self.vae_config) else self._validate_vae(self.vae_config)
        self.num_patches(*self.latent_size)

    def _complete_and_validate_unet(self) -> None:
        hidden_size, patch_size, channels = self.text_config.hidden_size, self.patch_size, self.unet_block_out_channels
        num_levels, layers, groups = patch_size.bit_length(), 1, 32
        if channels is None and hidden_size >= _PRESETS["0.16B"]["hidden_size"] and patch_size in _PAPER_UNETS:
            channels, layers = _PAPER_UNETS[patch_size]
        elif channels is None:
            quarter, half = (-(-hidden_size // part // 8) * 8 for part in (4, 2))
            channels = [quarter] * (num_levels - 1) + [half]
            groups = min(8, channels[0] // 2)
        layers = layers if self.unet_layers_per_block is None else self.unet_layers_per_block
        groups = groups if self.unet_norm_num_groups is None else self.unet_norm_num_groups
        _refuse({
            "`patch_size` must be a power of two with `patch_encoder='unet'`, which halves the image at each level; "
            f"got {patch_size}.": patch_size & (patch_size - 1),
            f"`unet_block_out_channels` must hold log2(`patch_size`) + 1 = {num_levels} numbers for patches of "
            f"{patch_size}; got {channels}.": len(channels) != num_levels,
            # In a group of one channel an image of one patch is a single value, and its norm 0.
            f"`unet_norm_num_groups` ({groups}) must divide every number of `unet_block_out_channels` and leave at "
            f"least 2 channels to a group; got {channels}.":
                groups < 1 or any(c < 2 * groups or c % groups for c in channels),
            f"`unet_layers_per_block` must be at least 1; got {layers}.": layers < 1,
        })  # fmt: skip
        self.unet_block_out_channels = list(channels)
        self.unet_layers_per_block, self.unet_norm_num_groups = layers, groups

    def _validate_rae(self, vae: dict[str, Any]) -> None:
        needed = ("encoder_hidden_size", "encoder_input_size", "encoder_patch_size", "patch_size")
        if missing := [name for name in needed if name not in vae]:
            raise ValueError(f"`vae_config` lacks {', '.join(missing)}; take it from the autoencoder by `attach_vae`.")
        channels, size = vae["encoder_hidden_size"], self.latent_size
        side = vae["encoder_input_size"] // vae["encoder_patch_size"]
        _refuse({
            f"`latent_channels` is {self.latent_channels}, but the features of `vae_config` have {channels}.":
                channels != self.latent_channels,
            f"`sample_size` is {size[0]} × {size[1]}, but an `AutoencoderRAE` has one size, here {side} × {side}.":
                size != (side, side),
            "`reshape_to_2d` of `vae_config` must be `True`.": not vae.get("reshape_to_2d", True),
        })  # fmt: skip

    def _validate_vae(self, vae: dict[str, Any]) -> None:
        name, channels, scale = vae.get("_class_name"), vae.get("latent_channels"), vae.get("scaling_factor")
        missing = [key for key in ("block_out_channels", "latent_channels", "scaling_factor") if key not in vae]
        normalised = [f"`{key}`" for key in ("latents_mean", "latents_std") if vae.get(key) is not None]
        _refuse({
            f"`vae_config` must be that of a diffusers `AutoencoderKL` or `AutoencoderRAE`; got one of `{name}`.":
                name not in (None, "AutoencoderKL", "TransfusionVAE"),
            f"`vae_config` lacks {', '.join(missing)}. A model cannot learn without the scale of its latents; measure "
            "it with `transfusion_hf.measure_latent_scale`, or in the conversion script with `--measure_vae_scale`.":
                missing,
            f"`latent_channels` is {self.latent_channels}, but the latents of `vae_config` have {channels}.":
                channels != self.latent_channels,
            f"`scaling_factor` of `vae_config` must be a positive number; got {scale!r}.":
                not isinstance(scale, (int, float)) or not scale > 0,
            "`scaling_factor` of `vae_config` is 0.18215, which diffusers writes where none was set. It fits "
            f"Stable Diffusion's 4 channels, not {channels}; measure it with `transfusion_hf.measure_latent_scale`, "
            "or in the conversion script with `--measure_vae_scale`.":
                scale == 0.18215 and channels != 4,
            f"`vae_config` normalises each channel by its own {' and '.join(normalised)}, which is not supported; use "
            "`scaling_factor` and `shift_factor`.": normalised,
            "`vae_config` has no `shift_factor`, but latents of 16 channels, such as those of SD 3 (0.0609) and FLUX "
            "(0.1159), are not centred, and training would fail silently. Set it, to 0.0 if there is none.":
                vae.get("shift_factor") is None and channels == 16,
        })  # fmt: skip
