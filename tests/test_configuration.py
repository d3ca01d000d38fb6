import json

import pytest
import tiny
import torch
from transformers import AutoConfig, GenerationConfig, LlamaConfig

from transfusion_hf import TransfusionConfig, TransfusionForCausalLMAndDiffusion, paper_vae_config
from transfusion_hf.patching_transfusion import (
    TransfusionUNetPatchDecoder,
    TransfusionUNetPatchEncoder,
    TransfusionVAE,
)

# Table 2: layers, hidden size, heads, and the number of parameters that names the model.
TABLE_2 = {
    "0.16B": (16, 768, 12, 0.16e9),
    "0.37B": (24, 1024, 16, 0.37e9),
    "0.76B": (24, 1536, 24, 0.76e9),
    "1.4B": (24, 2048, 16, 1.4e9),
    "7B": (32, 4096, 32, 7e9),
}
# What our widths make of it, with 32k tokens and an untied head.
OURS = {"0.16B": 0.162e9, "0.37B": 0.374e9, "0.76B": 0.778e9, "1.4B": 1.364e9, "7B": 6.74e9}


@pytest.mark.parametrize("name", TABLE_2)
def test_presets_are_the_models_of_table_2(name):
    layers, hidden, heads, parameters = TABLE_2[name]
    config = TransfusionConfig.from_preset(name)
    text = config.text_config
    assert (text.num_hidden_layers, text.hidden_size, text.num_attention_heads) == (layers, hidden, heads)
    with torch.device("meta"):
        model = TransfusionForCausalLMAndDiffusion(config)
    count = model.num_parameters()
    assert count == pytest.approx(OURS[name], rel=0.005)
    # The table's names are rounded to two digits (7B is Llama's 6.7B).
    assert count == pytest.approx(parameters, rel=0.03 if name != "7B" else 0.05)
    image_parts = sum(p.numel() for name, p in model.named_parameters() if "patch_" in name)
    assert image_parts < 0.005 * count  # §3: less than 0.5 % for the linear variant


def test_the_default_is_the_papers_smallest_model_over_32_by_32_latents_of_8_channels():
    config = TransfusionConfig()
    assert config.text_config.to_dict() == TransfusionConfig.from_preset("0.16B").text_config.to_dict()
    assert (config.latent_channels, config.latent_size, config.patch_size) == (8, (32, 32), 2)
    assert config.diffusion_loss_weight == 5.0 and config.num_train_timesteps == 1000


@pytest.mark.parametrize(("patch_size", "patches"), [(1, 1024), (2, 256), (4, 64), (8, 16)])
def test_patches_per_image_are_those_of_section_3(patch_size, patches):
    assert TransfusionConfig(patch_size=patch_size).num_patches(32, 32) == patches


@pytest.mark.parametrize("text", [tiny.text_config(), tiny.gemma3()], ids=["llama", "gemma3"])
def test_config_survives_saving(text, tmp_path):
    config = tiny.config(text, sample_size=(4, 8), diffusion_loss_weight=3.0)
    config.save_pretrained(tmp_path)
    for reloaded in (TransfusionConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(reloaded.text_config) is type(text)
        assert reloaded.latent_size == (4, 8) and reloaded.diffusion_loss_weight == 3.0
        assert reloaded.tie_word_embeddings == text.tie_word_embeddings


def test_tie_word_embeddings_is_that_of_the_decoder():
    config = tiny.config(tiny.text_config(tie_word_embeddings=True))
    assert config.tie_word_embeddings is config.to_dict()["tie_word_embeddings"] is True
    config.text_config.tie_word_embeddings = False
    assert config.tie_word_embeddings is config.to_dict()["tie_word_embeddings"] is False


def test_tie_word_embeddings_set_from_outside_is_set_in_the_decoder_and_saved(tmp_path):
    config = tiny.config(tie_word_embeddings=True)
    assert config.text_config.tie_word_embeddings is True
    config.tie_word_embeddings = False
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["tie_word_embeddings"] is saved["text_config"].get("tie_word_embeddings", False) is False
    for kwargs, expected in (({}, False), ({"tie_word_embeddings": True}, True)):
        reloaded = TransfusionConfig.from_pretrained(tmp_path, **kwargs)
        assert reloaded.tie_word_embeddings is reloaded.text_config.tie_word_embeddings is expected


def test_no_field_carries_the_name_of_a_generation_parameter():
    ours = set(TransfusionConfig.__annotations__)
    assert "latent_channels" in ours and not ours & set(GenerationConfig._get_default_generation_params())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_start_token_id": 64}, "`image_start_token_id` must lie inside the vocabulary, 0 to 63; got 64"),
        ({"image_end_token_id": -1}, "`image_end_token_id` must lie inside the vocabulary, 0 to 63; got -1"),
        ({"image_token_id": 61}, "must differ; got image_start_token_id=61, image_token_id=61, image_end_token_id=63"),
        ({"patch_size": 0}, "`patch_size` must be at least 1; got 0"),
        ({"patch_size": 3}, r"multiples of `patch_size` \(3\); got 4 × 4"),
        ({"sample_size": (4, 4, 4)}, r"`sample_size` must be one integer or \(height, width\); got \(4, 4, 4\)"),
        ({"patch_encoder": "vit"}, "`patch_encoder` must be 'linear' or 'unet'; got 'vit'"),
        ({"prediction_type": "velocity"}, "must be 'epsilon', 'v_prediction', 'sample' or 'flow_prediction'; got"),
        ({"diffusion_loss_weight": -1.0}, "`diffusion_loss_weight` must not be negative; got -1.0"),
        ({"diffusion_loss_weighting": "snr"}, "must be None, 'min_snr' or 'v_prediction'; got 'snr'"),
        ({"diffusion_loss_weighting": "v_prediction"}, "needs `prediction_type='sample'`.*; got 'epsilon'"),
        ({"timestep_embedding_dim": 7}, "`timestep_embedding_dim` must be even and at least 2; got 7"),
    ],
)  # fmt: skip
def test_bad_fields_name_what_was_expected_and_what_came(change, message):
    with pytest.raises(ValueError, match=message):
        tiny.config(**change)


def test_unknown_preset_names_those_there_are():
    with pytest.raises(
        ValueError, match=r"`name` must be one of the presets 0.16B, 0.37B, 0.76B, 1.4B, 7B; got '13B'"
    ):
        TransfusionConfig.from_preset("13B")


def test_ids_outside_of_a_small_vocabulary_are_refused_by_default():
    with pytest.raises(ValueError, match="must lie inside the vocabulary, 0 to 99; got 32000"):
        TransfusionConfig(text_config=LlamaConfig(vocab_size=100))


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["0.16B", "0.37B", "0.76B", "1.4B", "7B"])
def test_the_default_unet_of_the_papers_models_has_0_27b_parameters(name, patch_size):
    config = TransfusionConfig.from_preset(name, patch_encoder="unet", patch_size=patch_size)
    with torch.device("meta"):
        parts = (TransfusionUNetPatchEncoder(config), TransfusionUNetPatchDecoder(config))
    assert abs(sum(p.numel() for part in parts for p in part.parameters()) / 0.27e9 - 1) <= 0.03


def test_the_default_unet_of_a_small_model_is_small_and_stays_what_it_is():
    config = tiny.config(text=tiny.text_config(hidden_size=64), patch_encoder="unet", patch_size=4)
    assert config.unet_block_out_channels == [16, 16, 32]
    assert (config.unet_layers_per_block, config.unet_norm_num_groups) == (1, 8)
    again = TransfusionConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()


def test_the_papers_autoencoder_has_its_size():
    with torch.device("meta"):
        vae = TransfusionVAE(**paper_vae_config(0.9))
    assert abs(vae.num_parameters() / 83.7e6 - 1) < 0.001
    config = TransfusionConfig.from_preset("0.16B", vae_config=paper_vae_config(0.9))
    assert (config.vae_scale_factor, config.pixels_per_patch, config.num_patches(32, 32)) == (8, 16, 256)


VAE = {"block_out_channels": [8, 16], "latent_channels": 2, "scaling_factor": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"patch_encoder": "unet", "patch_size": 3, "sample_size": 6},
            "`patch_size` must be a power of two .*; got 3",
        ),
        ({**tiny.UNET, "unet_block_out_channels": [8]}, r"must hold log2\(`patch_size`\) \+ 1 = 2 numbers"),
        ({**tiny.UNET, "unet_norm_num_groups": 3}, r"`unet_norm_num_groups` \(3\) must divide every number"),
        ({**tiny.UNET, "unet_norm_num_groups": 4}, "leave at least 2 channels to a group"),
        ({**tiny.UNET, "unet_layers_per_block": 0}, "`unet_layers_per_block` must be at least 1; got 0"),
        ({"pos_embed_type": "rope"}, "`pos_embed_type` must be None or 'sincos'; got 'rope'"),
        (
            {"vae_config": {**VAE, "latent_channels": 4}},
            "`latent_channels` is 2, but the latents of `vae_config` have 4",
        ),
        ({"vae_config": {k: v for k, v in VAE.items() if k != "scaling_factor"}}, "`vae_config` lacks scaling_factor"),
        ({"vae_config": {**VAE, "scaling_factor": 0}}, "must be a positive number; got 0"),
        ({"vae_config": {**VAE, "scaling_factor": 0.18215}}, "is 0.18215, which diffusers writes where none was set"),
        ({"vae_config": {**VAE, "latents_mean": [1.0, 2.0]}}, "normalises each channel by its own `latents_mean`"),
        (
            {"vae_config": {**VAE, "_class_name": "AutoencoderTiny"}},
            "or `AutoencoderRAE`; got one of `AutoencoderTiny`",
        ),
        (
            {"vae_config": {**VAE, "latent_channels": 16}, "latent_channels": 16},
            "`vae_config` has no `shift_factor`, but latents of 16 channels",
        ),
    ],
)
def test_bad_front_ends_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        tiny.config(**change)


def test_fields_set_later_are_validated_by_the_model():
    config = tiny.config(**tiny.UNET)
    config.patch_size = 4
    with pytest.raises(ValueError, match=r"must hold log2\(`patch_size`\) \+ 1 = 3 numbers"):
        TransfusionForCausalLMAndDiffusion(config)
    config = tiny.config()
    config.patch_encoder = "unet"  # completed
    assert TransfusionForCausalLMAndDiffusion(config).config.unet_block_out_channels == [8, 16]
