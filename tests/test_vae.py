"""The autoencoder inside the model: scale and shift, frozen, saved with the model, kept out of everything else."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import AutoencoderKL, AutoencoderRAE, AutoencoderTiny
from make_tiny_transfusion import byte_tokenizer
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from tiny import BOI, EOI, IMG
from transformers import Trainer, TrainingArguments

from transfusion_hf import (
    TransfusionDataCollator,
    TransfusionForCausalLMAndDiffusion,
    TransfusionProcessor,
    attach_vae,
    make_labels,
    measure_latent_scale,
)
from transfusion_hf.conversion.export import extract_vae

CONFIG = {
    "block_out_channels": [8, 16],  # f = 2
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 2,
    "norm_num_groups": 4,
    "sample_size": 8,
}
IDS = torch.tensor([[5, BOI, IMG, IMG, IMG, IMG, EOI, 7]])  # latents of 4 × 4, images of 8 × 8


def autoencoder(**changes) -> AutoencoderKL:
    return AutoencoderKL(**{**CONFIG, **changes}).eval()


def model_with_vae(**kwargs) -> TransfusionForCausalLMAndDiffusion:
    model = tiny.model(**kwargs)
    attach_vae(model, autoencoder(), scaling_factor=0.7, shift_factor=0.2)
    return model


def pixels(num_images: int = 1) -> torch.Tensor:
    return torch.rand(num_images, 3, 8, 8) * 2 - 1


def test_latents_are_shifted_and_scaled_modes_of_the_posterior():
    vae, images = autoencoder(), pixels(3)
    model = tiny.model()
    attach_vae(model, vae, scaling_factor=0.7, shift_factor=0.2)
    with torch.no_grad():
        mode = vae.encode(images).latent_dist.mode()
        (latents,) = model.encode_images(images)
        torch.testing.assert_close(latents, (mode - 0.2) * 0.7)
        torch.testing.assert_close(model.decode_latents(latents), vae.decode(mode).sample, atol=1e-5, rtol=1e-5)
    assert not model.noise_scheduler.config.clip_sample  # latents are not bounded as pixels are


def test_precomputed_latents_give_the_losses_and_gradients_of_encoding_on_the_fly():
    model, images = model_with_vae(), pixels(3)
    ids = IDS.expand(3, -1)
    common = {
        "input_ids": ids,
        "labels": make_labels(ids, torch.ones_like(ids), BOI, IMG, EOI),
        "noise_seeds": [1, 2, 3],
    }
    (latents,) = model.encode_images(images)
    trained = [p for p in model.parameters() if p.requires_grad]
    results = []
    for given in ({"pixel_values": images}, {"latents": latents}):
        output = model(**common, **given)
        results.append([output.lm_loss, output.diffusion_loss, *torch.autograd.grad(output.loss, trained)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_images_of_several_sizes_are_encoded_as_each_alone():
    model, sizes = model_with_vae(), [(8, 8), (4, 8), (8, 8)]
    images = [torch.rand(3, *size) for size in sizes]
    together = [latent for stack in model.encode_images(images) for latent in stack]
    for image, latent in zip(images, together, strict=True):
        torch.testing.assert_close(model.encode_images(image[None])[0][0], latent, atol=1e-5, rtol=1e-5)


def test_the_weights_survive_construction_saving_and_loading_and_stay_frozen(tmp_path):
    vae, model = autoencoder(), tiny.model()
    attach_vae(model, vae, scaling_factor=0.7, shift_factor=0.2)
    model.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(stored[f"vae.{name}"], value) for name, value in vae.state_dict().items())
    loaded = TransfusionForCausalLMAndDiffusion.from_pretrained(tmp_path)
    for name, value in vae.state_dict().items():
        assert torch.equal(loaded.vae.state_dict()[name], value), name
    assert loaded.vae.config.scaling_factor == 0.7 and loaded.vae.config.shift_factor == 0.2
    for one in (model, loaded, loaded.train()):
        assert not any(p.requires_grad for p in one.vae.parameters()) and not one.vae.training
        assert next(reversed(dict(one.named_children()))) == "vae"
    images = pixels()
    assert torch.equal(loaded.encode_images(images)[0], model.encode_images(images)[0])


def test_a_checkpoint_without_its_vae_is_loaded_with_a_sane_new_one(tmp_path):
    model = model_with_vae()
    model.vae = None
    model.save_pretrained(tmp_path)
    loaded, info = TransfusionForCausalLMAndDiffusion.from_pretrained(tmp_path, output_loading_info=True)
    assert "vae.encoder.conv_in.weight" in info["missing_keys"]
    bound = (3 * 9) ** -0.5
    assert 0.5 * bound < loaded.vae.encoder.conv_in.weight.abs().max() <= bound
    assert torch.isfinite(loaded.encode_images(pixels())[0]).all()


@pytest.mark.parametrize("how", ["to", "from_pretrained"])
def test_the_vae_stays_in_float32_under_bfloat16(tmp_path, how):
    model = model_with_vae()
    images = pixels()
    expected = model.encode_images(images)[0]
    if how == "to":
        model = model.to(torch.bfloat16)
    else:
        model.save_pretrained(tmp_path)
        model = TransfusionForCausalLMAndDiffusion.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and {p.dtype for p in model.vae.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.encode_images(images)[0], expected, atol=tiny.ROUNDING, rtol=tiny.ROUNDING)
    drawn = model.generate(IDS[:, :2], generation_mode="image", num_inference_steps=3).images[0][0]
    assert drawn.shape == (3, 8, 8) and drawn.dtype == torch.float32


def test_lora_on_all_linear_layers_touches_no_weight_of_the_vae():
    wrapped = get_peft_model(model_with_vae(), LoraConfig(target_modules="all-linear"))
    adapted = [name for name, _ in wrapped.named_parameters() if "lora_" in name]
    assert adapted and not any(".vae." in name for name in adapted)


def test_the_vae_holds_no_linear_layer_that_quantisation_would_find():
    vae = model_with_vae().vae
    assert not any(isinstance(module, torch.nn.Linear) for module in vae.modules())
    assert any("to_q" in name for name in vae.state_dict())  # it has attention, under diffusers' names


def test_a_model_with_a_vae_loads_with_a_device_map(tmp_path):
    pytest.importorskip("accelerate")
    model = model_with_vae()
    model.save_pretrained(tmp_path)
    mapped = TransfusionForCausalLMAndDiffusion.from_pretrained(tmp_path, device_map="auto")
    images = pixels()
    torch.testing.assert_close(mapped(IDS, pixel_values=images).logits, model(IDS, pixel_values=images).logits)


@pytest.mark.parametrize("options", [{}, tiny.UNET])
def test_gradient_checkpointing_changes_nothing(options):
    model = model_with_vae(**options).train()
    features = {
        "input_ids": IDS,
        "pixel_values": pixels(),
        "labels": make_labels(IDS, torch.ones_like(IDS), BOI, IMG, EOI),
        "noise_seeds": [3],
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(**features).loss, trained)
    model.gradient_checkpointing_enable()
    for one, other in zip(torch.autograd.grad(model(**features).loss, trained), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_the_trainer_trains_everything_but_the_vae_on_pixels(tmp_path):
    model = model_with_vae()
    processor = TransfusionProcessor.for_model(model, byte_tokenizer())
    samples = [{"text": "red", "image": Image.new("RGB", (20, 20), color)} for color in ("red", "blue")] * 4
    before = {name: value.clone() for name, value in model.state_dict().items()}
    args = TrainingArguments(str(tmp_path), max_steps=2, remove_unused_columns=False, report_to="none", use_cpu=True)
    Trainer(model, args, train_dataset=samples, data_collator=TransfusionDataCollator(processor)).train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    assert not any(name.startswith("vae.") for name in changed)
    assert "model.patch_encoder.proj.weight" in changed


def test_pictures_go_in_and_come_out():
    model = model_with_vae()
    processor = TransfusionProcessor.for_model(model, byte_tokenizer())
    inputs = processor(text=["<image>draw<BOI>"], images=[Image.new("RGB", (30, 20), "red")])
    assert inputs["pixel_values"].shape == (1, 3, 8, 8)
    output = model.generate(**inputs, num_inference_steps=3, height=8, width=12, max_new_tokens=16)
    assert output.images[0][0].shape == (3, 8, 12)
    document = processor.decode_interleaved(output.sequences[:, inputs["input_ids"].shape[1] - 1 :], output.images)
    assert [type(part) for part in document[0]][:1] == [Image.Image] and document[0][0].size == (12, 8)


def test_slicing_and_tiling_are_passed_through():
    model, images = model_with_vae(), torch.rand(2, 3, 32, 32)
    expected = model.encode_images(images)[0]
    model.vae.enable_slicing()
    torch.testing.assert_close(model.encode_images(images)[0], expected, atol=1e-5, rtol=1e-5)
    model.vae.enable_tiling()
    tiled = model.encode_images(images)[0]
    assert tiled.shape == expected.shape and not torch.equal(tiled, expected)


# What the configurations of public autoencoders say of their latents; the rest of each is its size.
PUBLIC = {
    "sd-vae-ft-mse": ({"latent_channels": 4}, (0.18215, None)),
    "sdxl": ({"latent_channels": 4, "scaling_factor": 0.13025}, (0.13025, None)),
    "sd3": (
        {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False,
         "use_post_quant_conv": False},
        (1.5305, 0.0609),
    ),
    "flux": (
        {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False,
         "use_post_quant_conv": False},
        (0.3611, 0.1159),
    ),
    "transfusion-vae": ({"latent_channels": 8, "scaling_factor": 0.5}, (0.5, None)),
}  # fmt: skip


def saved(folder: Path, drop: tuple[str, ...] = (), **changes) -> Path:
    autoencoder(**changes).save_pretrained(folder)
    file = folder / "config.json"
    config = {name: value for name, value in json.loads(file.read_text()).items() if name not in drop}
    file.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", PUBLIC)
def test_public_autoencoders_are_attached_with_their_scale_and_shift(tmp_path, name):
    changes, (scale, shift) = PUBLIC[name]
    folder = saved(tmp_path, drop=() if "scaling_factor" in changes else ("scaling_factor",), **changes)
    model = tiny.model(latent_channels=changes["latent_channels"])
    attach_vae(model, folder)
    assert (model.vae.config.scaling_factor, model.vae.config.shift_factor) == (scale, shift)
    assert model.config.vae_config["scaling_factor"] == scale
    source, images = AutoencoderKL.from_pretrained(folder), pixels()
    with torch.no_grad():
        expected = (source.encode(images).latent_dist.mode() - (shift or 0)) * scale
    torch.testing.assert_close(model.encode_images(images)[0], expected)
    assert model(IDS, pixel_values=images).logits.shape == (1, 8, tiny.VOCAB_SIZE)


def test_a_scale_that_was_registered_later_is_kept():
    model, vae = tiny.model(latent_channels=4), autoencoder(latent_channels=4)
    assert "scaling_factor" in vae.config["_use_default_values"]
    vae.register_to_config(scaling_factor=0.7, shift_factor=0.2)
    attach_vae(model, vae)
    assert (model.vae.config.scaling_factor, model.vae.config.shift_factor) == (0.7, 0.2)


def test_what_does_not_fit_is_refused_and_the_model_left_as_it_was(tmp_path):
    model = tiny.model()
    with pytest.raises(ValueError, match="`latent_channels` is 2, but the latents of `vae_config` have 8"):
        attach_vae(model, autoencoder(latent_channels=8, scaling_factor=1.0))
    eight = saved(tmp_path / "eight", drop=("scaling_factor",), latent_channels=8)
    with pytest.raises(
        ValueError, match=r"`vae_config` lacks scaling_factor\. A model cannot learn without the scale"
    ):
        attach_vae(tiny.model(latent_channels=8), eight)
    sixteen = saved(tmp_path / "sixteen", latent_channels=16, scaling_factor=0.3611)
    with pytest.raises(ValueError, match="`vae_config` has no `shift_factor`, but latents of 16 channels"):
        attach_vae(tiny.model(latent_channels=16), sixteen)
    attach_vae(tiny.model(latent_channels=16), sixteen, shift_factor=0.0)
    channels, blocks = (8, 8), (1, 1)
    AutoencoderTiny(
        encoder_block_out_channels=channels, decoder_block_out_channels=channels,
        num_encoder_blocks=blocks, num_decoder_blocks=blocks,
    ).save_pretrained(tmp_path / "other")  # fmt: skip
    message = "must be an `AutoencoderKL` or `AutoencoderRAE` of diffusers; .*other holds a `AutoencoderTiny`"
    with pytest.raises(ValueError, match=message):
        attach_vae(model, tmp_path / "other")
    assert model.vae is None and model.config.vae_config is None


def test_an_attachment_that_fails_leaves_the_model_as_it_was(tmp_path):
    model, folder = tiny.model(), saved(tmp_path, scaling_factor=0.7)
    weights = folder / "diffusion_pytorch_model.safetensors"
    for vae in (AutoencoderTiny(), 3):
        with pytest.raises(ValueError, match=f"or where one lies; got {type(vae).__name__}"):
            attach_vae(model, vae)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "of_a_newer_version": 1}))
    attach_vae(tiny.model(), folder)  # what diffusers ignores is ignored
    weights.unlink()
    with pytest.raises(OSError):
        attach_vae(model, folder)
    assert model.vae is None and model.config.vae_config is None


def test_a_gray_autoencoder_has_a_gray_processor():
    model = tiny.model()
    attach_vae(model, autoencoder(in_channels=1, out_channels=1, scaling_factor=0.7))
    processor = TransfusionProcessor.for_model(model, byte_tokenizer())
    inputs = processor(text=["<image>"], images=[Image.new("RGB", (20, 20), "red")])
    assert inputs["pixel_values"].shape == (1, 1, 8, 8) and model(**inputs).logits is not None


def test_measured_scale_and_shift_make_latents_standard():
    vae = autoencoder()
    batches = [pixels(4), pixels(4)]
    scale, shift = measure_latent_scale(vae, batches)
    model = tiny.model()
    attach_vae(model, vae, scaling_factor=scale, shift_factor=shift)
    latents = torch.cat([model.encode_images(batch)[0] for batch in batches])
    assert abs(float(latents.mean())) < 1e-4 and abs(float(latents.std(correction=0)) - 1) < 1e-4
    with pytest.raises(ValueError, match="`images` gave 0 latent values"):
        measure_latent_scale(vae, [])


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (1, 3, 8, 6), (1, 3, 7, 8)])
def test_images_of_other_channels_or_sizes_are_refused(shape):
    message = r"`pixel_values` must have shape \(num_images, 3, height, width\), height and width multiples of 4 \(VAE"
    with pytest.raises(ValueError, match=message):
        model_with_vae()(IDS, pixel_values=torch.zeros(shape))


def test_pictures_that_are_no_numbers_are_refused():
    model = model_with_vae()
    with torch.no_grad():
        model.vae.decoder.conv_out.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"The VAE decoded latents with absolute values up to .* to NaN or infinite"):
        model.decode_latents(torch.randn(1, 2, 4, 4))


def representation_autoencoder(encoder_type: str = "dinov2", **changes) -> AutoencoderRAE:
    """Features of 2 × 2 places and 64 channels of images of 16 × 16, which come out as 8 × 8 · 2."""
    torch.manual_seed(0)
    sizes = {"encoder_hidden_size": 64, "encoder_patch_size": 8, "encoder_input_size": 16, "patch_size": 8}
    sizes |= {"encoder_num_hidden_layers": 1, "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1}
    sizes |= {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 32}
    stats = {"latents_mean": torch.randn(64, 2, 2), "latents_std": torch.rand(64, 2, 2) + 0.5}
    return AutoencoderRAE(encoder_type, **{**sizes, **stats, **changes}).eval()


def model_with_rae(encoder_type: str = "dinov2", **kwargs) -> TransfusionForCausalLMAndDiffusion:
    model = tiny.model(latent_channels=64, sample_size=2, patch_size=1, **kwargs)
    attach_vae(model, representation_autoencoder(encoder_type))
    return model


@pytest.mark.parametrize("encoder_type", ["dinov2", "mae"])  # "siglip2": diffusers 0.42 fails on transformers 5.24
def test_latents_of_a_representation_autoencoder_are_its_own(tmp_path, encoder_type):
    vae, model = representation_autoencoder(encoder_type), model_with_rae(encoder_type)
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    assert not model.noise_scheduler.config.clip_sample and model.config.pixels_per_patch == 8
    assert "latents_mean" not in model.config.vae_config
    model.save_pretrained(tmp_path)
    loaded = TransfusionForCausalLMAndDiffusion.from_pretrained(tmp_path)
    loaded.set_attn_implementation("transfusion_varlen")  # of the decoder alone
    with torch.no_grad():
        expected = vae.encode((images + 1) / 2).latent
        decoded = vae.decode(expected).sample * 2 - 1
        for one in (model, loaded):
            (latents,) = one.encode_images(images)
            torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(one.decode_latents(latents), decoded, atol=1e-5, rtol=1e-5)
    assert not any(p.requires_grad for p in loaded.vae.parameters())
    half = TransfusionForCausalLMAndDiffusion.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {x.dtype for x in half.vae.state_dict().values()} == {torch.float32}


def test_a_representation_autoencoder_goes_out_as_it_came_in(tmp_path):
    model, images = model_with_rae(), torch.rand(1, 3, 16, 16)
    extract_vae(model).save_pretrained(tmp_path)
    again = tiny.model(latent_channels=64, sample_size=2, patch_size=1)
    attach_vae(again, tmp_path)
    for one, other in zip(model.encode_images(images), again.encode_images(images), strict=True):
        assert torch.equal(one, other)
    half = representation_autoencoder(latents_mean=None)
    attach_vae(again, half)
    torch.testing.assert_close(again.encode_images(images)[0], half.encode((images + 1) / 2).latent)


def test_a_representation_autoencoder_has_no_scale_to_measure():
    with pytest.raises(ValueError, match="standardises its latents itself; there is no scale to set"):
        measure_latent_scale(representation_autoencoder(), [torch.rand(1, 3, 16, 16)])


def test_a_representation_autoencoder_has_one_size():
    model = model_with_rae()
    with pytest.raises(ValueError, match="`pixel_values` must be 16 × 16 for an `AutoencoderRAE`; got 16 × 32"):
        model.encode_images(torch.rand(1, 3, 16, 32))
    with pytest.raises(ValueError, match="`height` and `width` must be 16 × 16, the one size of an `AutoencoderRAE`"):
        model.generate(torch.tensor([[5]]), generation_mode="image", height=32, width=32, num_inference_steps=2)


def test_a_model_trains_on_features_and_draws_pictures():
    model = model_with_rae(train_timestep_shift=2.0, prediction_type="flow_prediction")
    ids = torch.tensor([[5, BOI, IMG, IMG, IMG, IMG, EOI, 7]])
    output = model.train()(ids, pixel_values=torch.rand(1, 3, 16, 16), labels=torch.where(ids >= IMG, -100, ids))
    output.loss.backward()
    assert output.image_predictions[0].shape == (64, 2, 2) and output.loss.isfinite()
    assert all(p.grad is None for p in model.vae.parameters())
    drawn = model.eval().generate(ids[:, :1], generation_mode="image", num_inference_steps=2, pad_token_id=0)
    processor = TransfusionProcessor.for_model(model, byte_tokenizer())
    (picture,) = processor.image_processor.postprocess(drawn.images[0])
    assert picture.size == (16, 16)


@pytest.mark.parametrize(
    ("fields", "kwargs", "message"),
    [
        ({"latent_channels": 4}, {}, "`latent_channels` is 4, but the features of `vae_config` have 64"),
        ({"sample_size": 4}, {}, "`sample_size` is 4 × 4, but an `AutoencoderRAE` has one size, here 2 × 2"),
        ({}, {"scaling_factor": 2.0}, "standardises its latents itself; leave out scaling_factor"),
    ],
)
def test_a_representation_autoencoder_that_does_not_fit_is_refused(fields, kwargs, message):
    model = tiny.model(**{"latent_channels": 64, "sample_size": 2, "patch_size": 1, **fields})
    with pytest.raises(ValueError, match=message):
        attach_vae(model, representation_autoencoder(), **kwargs)
    assert model.vae is None and model.config.vae_config is None
