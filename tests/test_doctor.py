"""Planted faults, each found and named; healthy models, which yield no complaint."""

import copy
import io
import json
import math
import re
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from diffusers import AutoencoderKL
from make_tiny_transfusion import byte_tokenizer
from peft import LoraConfig, get_peft_model
from test_vae import CONFIG as VAE_CONFIG
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForMultimodalLM, AutoProcessor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from transfusion_command import main as run
from transfusion_hf import (
    TransfusionDataCollator,
    TransfusionForCausalLMAndDiffusion,
    TransfusionProcessor,
    attach_vae,
    diffusion_transfusion,
    measure_latent_scale,
)
from transfusion_hf.data.shapes import ShapesDataset
from transfusion_hf.training.doctor import diagnose, main

TINY = Path(__file__).parent / "fixtures" / "tiny-transfusion"
CHECKS = ["special tokens", "attention mask", "noise schedule", "pixels", "VAE", "labels", "overfit"]
LORA = {"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}
PATCH_PARTS = ["patch_encoder", "patch_decoder"]
SAMPLES = [ShapesDataset(8)[i] for i in range(8)]


def healthy(family: str = "llama", seed: int = 0, with_vae: bool = False, tied: bool = False, **kwargs):
    """A new model and its processor: 8 × 8 pixels, by way of an autoencoder where asked for."""
    torch.manual_seed(seed)
    text = tiny.gemma3() if family == "gemma3" else tiny.text_config(family, tie_word_embeddings=tied)
    text.vocab_size = 262
    sizes = {"latent_channels": 2, "sample_size": 4} if with_vae else {"latent_channels": 3, "sample_size": 8}
    model = TransfusionForCausalLMAndDiffusion(tiny.config(text, **{**sizes, **kwargs}))
    if with_vae:
        vae = AutoencoderKL(**VAE_CONFIG).eval()
        vae.quant_conv.bias.data[:2] += 1.5  # latents off the centre, as those of FLUX
        attach_vae(model, vae, *measure_latent_scale(vae, [torch.rand(16, 3, 8, 8) * 2 - 1]))
    return model, TransfusionProcessor.for_model(model, byte_tokenizer())


def complaints(findings) -> list[str]:
    return [str(finding) for finding in findings if finding.severity != "ok"]


def errors(findings, check: str) -> str:
    return " ".join(f"{f.message} {f.remedy}" for f in findings if f.severity == "error" and f.check == check)


def assert_named(findings, check: str, *words: str) -> None:
    found = errors(findings, check)
    assert found and all(word in found for word in words), complaints(findings)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": True, "with_vae": True, "prediction_type": "v_prediction"},
        {"family": "gemma3", "with_vae": True, "prediction_type": "flow_prediction", **tiny.UNET},
        {"family": "phi", "prediction_type": "sample", "pos_embed_type": "sincos"},
        {"latent_channels": 5, "beta_schedule": "scaled_linear"},  # no pictures: latents are made up
        {"family": "cohere", "latent_channels": 1, "sample_size": (4, 12), "num_train_timesteps": 20},
    ],
    ids=str,
)
def test_a_healthy_model_yields_no_complaint(changes):
    findings = diagnose(*healthy(**changes))
    assert not complaints(findings)
    assert [finding.check for finding in findings] == CHECKS
    falls = re.findall(r"from ([\d.]+) to ([\d.]+)", findings[-1].message)
    assert len(falls) == 2 and all(float(last) <= 0.101 * float(first) for first, last in falls)


@pytest.mark.parametrize("backend", ["eager", "transfusion_varlen"])
def test_every_right_backend_is_healthy(backend):
    model, processor = healthy()
    model.set_attn_implementation(backend)
    assert not complaints(diagnose(model, processor, steps=60))


def test_half_precision_and_short_windows_are_healthy():
    model, processor = healthy("mistral")
    model.config.text_config.sliding_window = 4
    assert not complaints(diagnose(model.bfloat16(), processor, overfit=False))


def test_data_of_ones_own_are_healthy_packed_or_not_and_as_a_batch():
    model, processor = healthy()
    collator = TransfusionDataCollator(processor, max_length=128)
    assert not complaints(diagnose(model, processor, dataset=SAMPLES))
    assert not complaints(diagnose(model, processor, batch=collator(SAMPLES)))


def test_a_model_that_knows_the_batch_by_heart_is_healthy():
    model, processor = healthy()
    batch = TransfusionDataCollator(processor)(SAMPLES[:2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(120):
        output = model(**batch, timesteps=torch.tensor([500, 500]), noise_seeds=[0, 1])
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert output.lm_loss < 0.5
    assert not complaints(diagnose(model, processor, batch=batch))


def test_the_model_is_left_as_it_was():
    model, processor = healthy(with_vae=True)
    model.train()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = torch.get_rng_state()
    diagnose(model, processor)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert model.training and not any(parameter.grad is not None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


# 1 and 2: the autoencoder


@pytest.mark.parametrize("factor", [0.1, 3.0, 10.0])
def test_1_a_wrong_scale_is_named_with_the_right_one(factor):
    model, processor = healthy(with_vae=True)
    scale, shift = (model.config.vae_config[name] for name in ("scaling_factor", "shift_factor"))
    attach_vae(model, model.vae, factor * scale, shift)
    findings = diagnose(model, processor, dataset=SAMPLES, batch_size=8, overfit=False)
    assert_named(findings, "VAE", "scale is wrong", "these images suggest a scale of ")
    suggested = float(errors(findings, "VAE").split("suggest a scale of ")[1].split()[0])
    images = TransfusionDataCollator(processor)(SAMPLES)["pixel_values"]
    assert suggested == pytest.approx(measure_latent_scale(model.vae, [images])[0], rel=1e-3)
    if factor != 3.0:
        assert_named(diagnose(model, processor, overfit=False), "VAE", "scale is wrong")


@pytest.mark.parametrize("with_data", [False, True])
def test_2_a_missing_shift_is_named_with_the_right_one(with_data):
    model, processor = healthy(with_vae=True)
    shift = model.config.vae_config["shift_factor"]
    attach_vae(model, model.vae, model.config.vae_config["scaling_factor"], 0.0)
    findings = diagnose(model, processor, dataset=SAMPLES if with_data else None, overfit=False)
    assert_named(findings, "VAE", "shift is missing", "and a shift of ")
    assert float(errors(findings, "VAE").split("and a shift of ")[1].split()[0]) == pytest.approx(shift, rel=0.2)


# 3: the mask


def without_image_blocks(module, query, key, value, attention_mask, **kwargs):
    return sdpa_attention_forward(module, query, key, value, None, **{**kwargs, "is_causal": True})


def without_later_image_blocks(module, query, key, value, attention_mask, **kwargs):
    attention_mask = attention_mask.clone()
    attention_mask[..., 9:, 9:].tril_()
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def without_any_mask(module, query, key, value, attention_mask, **kwargs):
    return sdpa_attention_forward(module, query, key, value, None, **{**kwargs, "is_causal": False})


@pytest.mark.parametrize(("family", "patch_encoder"), [("llama", tiny.UNET), ("gemma3", {})])
def test_3_a_backend_that_drops_the_mask_is_named(family, patch_encoder):
    model, processor = healthy(family, **patch_encoder)
    AttentionInterface.register("without_image_blocks", without_image_blocks)
    AttentionInterface.register("without_later_image_blocks", without_later_image_blocks)
    AttentionInterface.register("without_any_mask", without_any_mask)
    AttentionMaskInterface.register("without_later_image_blocks", sdpa_mask)
    for name in ("without_image_blocks", "without_later_image_blocks"):
        model.set_attn_implementation(name)
        findings = diagnose(model, processor, overfit=False)
        assert_named(findings, "attention mask", "causal inside images", name, "'sdpa'")
        assert "outside of images" not in errors(findings, "attention mask")
    model.set_attn_implementation("without_any_mask")
    findings = diagnose(model, processor, overfit=False)
    assert_named(findings, "attention mask", "not causal outside of images", "without_any_mask")


def test_3_markers_in_the_block_of_their_image_are_no_fault():
    findings = diagnose(*healthy(image_markers_in_block=True), overfit=False)
    assert not errors(findings, "attention mask")


def test_3_the_causal_ablation_is_a_warning_where_an_image_has_several_patches():
    model, processor = healthy(bidirectional_image_attention=False)
    findings = diagnose(model, processor, overfit=False)
    (warning,) = [finding for finding in findings if finding.severity != "ok"]
    assert (warning.check, warning.severity) == ("attention mask", "warning") and "Table 5" in warning.message
    assert not complaints(diagnose(*healthy(bidirectional_image_attention=False, sample_size=2), overfit=False))


# 4: special tokens


def test_4_tokens_that_the_tokenizer_lacks_are_named():
    model, processor = healthy()
    processor.tokenizer = byte_tokenizer()
    found = errors(diagnose(model, processor), "special tokens")
    assert all(f"the tokenizer reads {token} as [" in found for token in ("<BOI>", "<image>", "<EOI>"))
    assert "for_model" in found


def test_4_ids_that_disagree_are_named():
    for name, token in (("image_start", "<BOI>"), ("image", "<image>"), ("image_end", "<EOI>")):
        for where in ("processor", "config"):
            model, processor = healthy()
            setattr(processor if where == "processor" else model.config, f"{name}_token_id", 7)
            found = errors(diagnose(model, processor, overfit=False), "special tokens")
            own = processor.tokenizer.convert_tokens_to_ids(token)
            assert f"the tokenizer reads {token} as [{own}], but `{name}_token_id` is " in found
            assert f"7 in the {where}" in found and f"{own} in the " in found
    model, processor = healthy()
    model.generation_config.eos_token_id = 9
    findings = diagnose(model, processor, overfit=False)
    assert_named(findings, "special tokens", "`eos_token_id` is 2 in the tokenizer but [9] to `generate()`")


def test_4_a_token_in_pieces_and_a_processor_of_other_patches_are_named():
    model, processor = healthy()
    tokenizer = byte_tokenizer()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["model"]["vocab"] |= {"<BOI>": 260, "<image>": 259, "<EOI>": 261}  # words, not added tokens
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(backend))
    processor.tokenizer = tokenizer
    findings = diagnose(model, processor, overfit=False)
    assert_named(findings, "special tokens", "reads <BOI> as [", "is 260 in the processor and 260 in the config")
    model, processor = healthy()
    processor.pixels_per_patch = 4
    assert_named(
        diagnose(model, processor, overfit=False), "special tokens", "`pixels_per_patch` is 4 in the processor but 2"
    )


# 5: labels


@pytest.mark.parametrize("places", [-1, 1])
def test_5_shifted_labels_are_named(places):
    model, processor = healthy()

    def collator(samples):
        batch = TransfusionDataCollator(processor)(samples)
        batch["labels"] = batch["labels"].roll(places, 1)
        return batch

    findings = diagnose(model, processor, dataset=SAMPLES, collator=collator, overfit=False)
    message = "labels are shifted by one already" if places == -1 else "labels are not the token at their place"
    assert_named(findings, "labels", message, "make_labels")


def test_5_other_labels_that_teach_wrongly_are_named():
    model, processor = healthy()
    batch = TransfusionDataCollator(processor)(SAMPLES)
    for change, words in (
        (batch["input_ids"], "labels hold `image_token_id`"),
        (torch.full_like(batch["labels"], -100), "every label is −100"),
        (batch["labels"].where(batch["labels"] == -100, 5), "are not the token at their place"),
    ):
        findings = diagnose(model, processor, batch=batch | {"labels": change}, overfit=False)
        assert_named(findings, "labels", words)
    mute = batch["labels"].where(batch["labels"] != 260, -100)
    (warning,) = complaints(diagnose(model, processor, batch=batch | {"labels": mute}, overfit=False))
    assert "no <BOI> is a label" in warning


# 6: t reversed


def test_6_a_schedule_upside_down_is_named():
    model, processor = healthy()
    scheduler = model.noise_scheduler
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.flip(0)
    assert_named(diagnose(model, processor, overfit=False), "noise schedule", "at t = 0 0.00 of the clean image")


def test_6_flow_matching_in_the_other_direction_is_named(monkeypatch):
    right = diffusion_transfusion.add_noise
    monkeypatch.setattr(diffusion_transfusion, "add_noise", lambda s, x, e, t: right(s, x, e, 1001 - t))
    findings = diagnose(*healthy(prediction_type="flow_prediction"), overfit=False)
    assert_named(findings, "noise schedule", "at t = 1 0.00 of the clean image")


def test_6_a_model_that_never_sees_noise_is_named():
    model, processor = healthy(num_train_timesteps=20, beta_schedule="linear")
    assert_named(diagnose(model, processor, overfit=False), "noise schedule", "does not go from clean to noise")


# 7: frozen parts


def test_7_a_frozen_patch_head_is_named():
    model, processor = healthy()
    model.model.patch_decoder.requires_grad_(False)
    findings = diagnose(model, processor, steps=5)
    assert_named(findings, "overfit", "no gradient reaches: patch_decoder", "with PEFT, `modules_to_save=")
    assert all(finding.severity == "ok" for finding in findings if finding.check != "overfit")
    model.requires_grad_(False)
    assert_named(diagnose(model, processor), "overfit", "every parameter is frozen")


@pytest.mark.parametrize("modules_to_save", [None, PATCH_PARTS])
def test_7_an_adapter_needs_the_patch_parts_saved(modules_to_save, tmp_path, capsys):
    model, processor = healthy()
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    model = AutoModelForMultimodalLM.from_pretrained(tmp_path / "base")
    lora = get_peft_model(model, LoraConfig(**LORA, modules_to_save=modules_to_save))
    findings = diagnose(lora, processor, steps=15)
    lora.save_pretrained(tmp_path / "adapter")
    status = main([str(tmp_path / "adapter"), "--steps", "15", "--device", "cpu"])
    if modules_to_save:
        assert not any(finding.severity == "error" for finding in findings) and status == 0
    else:
        assert_named(findings, "overfit", "no gradient reaches: patch_encoder, patch_decoder", "modules_to_save")
        assert status == 1 and "patch_decoder" in capsys.readouterr().out


def test_7_an_adapter_that_learns_less_than_a_whole_model_is_a_warning():
    model, processor = healthy()
    small = get_peft_model(model, LoraConfig(**LORA, modules_to_save=PATCH_PARTS))
    findings = diagnose(small, processor, steps=30)
    (warning,) = complaints(findings)
    assert "frozen parameters may allow no more" in warning and "lm_loss from 5." in warning
    model, processor = healthy()
    everything = [*PATCH_PARTS, "lm_head", "embed_tokens"]
    assert not complaints(diagnose(get_peft_model(model, LoraConfig(**LORA, modules_to_save=everything)), processor))


# 8: pixels


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"do_rescale": False, "do_normalize": False}, ["and white 255", "lie in 0 to 255"]),
        ({"do_normalize": False}, ["makes black 0 and", "lie in 0 to 1,"]),
        ({"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}, ["makes black -1.", "lie in -1."]),
    ],
)
def test_8_pixels_out_of_range_are_named(change, words):
    model, processor = healthy()
    right = TransfusionDataCollator(copy.deepcopy(processor))(SAMPLES)
    for name, value in change.items():
        setattr(processor.image_processor, name, value)
    assert_named(diagnose(model, processor, overfit=False), "pixels", *words)
    # The batch alone, from a collator of one's own.
    batch = TransfusionDataCollator(processor)(SAMPLES)
    model, processor = healthy()
    findings = diagnose(model, processor, batch=batch, overfit=False)
    assert_named(findings, "pixels", "pixels of the batch", words[-1])
    assert not complaints(diagnose(model, processor, batch=right, overfit=False))


# 9: λ


def test_9_a_loss_weight_of_zero_is_named():
    findings = diagnose(*healthy(diffusion_loss_weight=0.0), steps=90)
    words = ("diffusion_loss from 1.0", "in 90 steps", "no gradient reaches: patch_decoder")
    assert_named(findings, "overfit", *words, "`diffusion_loss_weight` above 0")
    assert "lm_loss" not in errors(findings, "overfit")


# Everything else


def test_too_few_steps_are_no_success_and_the_losses_are_told():
    findings = diagnose(*healthy(), steps=2)
    assert_named(findings, "overfit", "lm_loss from 5.", "diffusion_loss from 1.", "in 2 steps", "more `steps`")


def test_batches_that_cannot_be_learned_from_are_named():
    model, processor = healthy()
    batch = TransfusionDataCollator(processor)(SAMPLES)
    unmarked = batch | {"image_loss_mask": torch.zeros(8, dtype=torch.bool)}
    findings = diagnose(model, processor, batch=unmarked, steps=3)
    assert_named(findings, "overfit", "no gradient reaches: ", "images with a loss")
    findings = diagnose(model, processor, dataset=[{"text": "words"}] * 4, steps=3)
    assert_named(findings, "overfit", "no gradient reaches: ", "images with a loss")
    findings = diagnose(model, processor, batch={name: value for name, value in batch.items() if name != "labels"})
    assert_named(findings, "labels", "no `labels`")
    assert findings[-1].check == "labels"  # and nothing is trained
    assert_named(diagnose(model, processor, dataset=[]), "batch", "at least one sample")
    model.lm_head.weight.data[0, 0] = math.nan
    assert_named(diagnose(model, processor, batch=batch, steps=2), "overfit", "lm_loss from nan")


@pytest.mark.parametrize("is_packed", [False, True])
def test_texts_that_part_at_their_first_word_are_no_error(is_packed):
    """No model can tell which of eight captions follows, which costs log 8 of their few tokens."""
    model, processor = healthy()
    samples = [{"text": letter, "latents": [torch.randn(3, 8, 8)]} for letter in "abcdefgh"]
    options = {"caption_first_probability": 1.0, "caption_dropout": 0.0, "max_length": 200 if is_packed else None}
    batch = TransfusionDataCollator(processor, **options)(samples)
    findings = diagnose(model, processor, batch=batch, steps=200)
    assert not [finding for finding in findings if finding.check == "overfit" and finding.severity != "ok"], findings


def test_arguments_that_do_not_fit_are_refused():
    model, processor = healthy()
    for kwargs in ({"batch": {}, "dataset": []}, {"steps": 0}):
        with pytest.raises(ValueError, match=r"not both|`steps` must be at least 1"):
            diagnose(model, processor, **kwargs)
    with pytest.raises(ValueError, match="`model` must be a TransfusionForCausalLMAndDiffusion; got LlamaModel"):
        diagnose(model.model.language_model, processor)


# The command


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rows = tmp_path_factory.mktemp("data"), {"image": [], "caption": []}
    for sample in SAMPLES:
        buffer = io.BytesIO()
        sample["image"].save(buffer, "png")
        rows["image"].append({"bytes": buffer.getvalue(), "path": None})
        rows["caption"].append(sample["text"])
    Dataset.from_dict(rows).to_parquet(folder / "pictures-0.parquet")
    return folder


def run_command(capsys, *arguments: str) -> tuple[int, str]:
    with warnings.catch_warnings(action="ignore"):
        status = run(["doctor", *arguments, "--device", "cpu"])
    return status, capsys.readouterr().out


def test_the_command_prints_a_line_for_each_check(data, capsys):
    status, output = run_command(capsys, str(TINY), str(data / "*.parquet"), "--caption_column", "caption")
    lines = output.splitlines()
    assert status == 0 and [line[8:24].strip() for line in lines] == CHECKS, output
    assert all(line.startswith("ok") for line in lines), output


def test_the_command_fails_where_an_error_is_found(tmp_path, capsys):
    model, processor = AutoModelForMultimodalLM.from_pretrained(TINY), AutoProcessor.from_pretrained(TINY)
    model.config.diffusion_loss_weight = 0.0
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    status, output = run_command(capsys, str(tmp_path), "--steps", "3")
    assert status == 1 and "error   overfit " in output and "ok      attention mask" in output


def test_the_command_takes_a_folder_and_another_backend(data, capsys):
    arguments = [str(TINY), str(data), "--caption_column", "caption", "--no_overfit", "--device", "cpu"]
    assert main([*arguments, "--attn_implementation", "eager", "--batch_size", "2"]) == 0
    output = capsys.readouterr().out
    assert "'eager'" in output and "of 120 positions" in output and "overfit" not in output


def test_bad_input_is_told_in_a_line(data, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ([str(tmp_path / "nowhere")], ["nowhere"]),
        ([str(tmp_path / "empty")], ["empty"]),
        ([str(TINY), str(data)], ["`caption_column` is 'text'", "['image', 'caption']"]),
        ([str(TINY), str(data / "none-*.parquet")], ["data_files are invalid"]),
        ([str(TINY), "--steps", "0"], ["`steps` must be at least 1; got 0"]),
        ([str(TINY), "--attn_implementation", "flash_attention_2"], ["bidirectional image blocks"]),
    ):
        assert run(["doctor", *arguments, "--device", "cpu"]) == 1
        printed = capsys.readouterr()
        assert not printed.out and all(word in printed.err for word in ("transfusion: ", *words)), printed
