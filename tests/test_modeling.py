import copy
import random
from itertools import product

import pytest
import tiny
import torch
from tiny import BOI, EOI, IMG
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    DynamicCache,
    MistralConfig,
)
from transformers.utils import is_flash_attn_2_available
from transformers.utils.generic import find_labels

from transfusion_hf import (
    SUPPORTED_TEXT_MODELS,
    TransfusionConfig,
    TransfusionForCausalLMAndDiffusion,
    TransfusionModel,
)
from transfusion_hf.denoising_transfusion import positions_of
from transfusion_hf.diffusion_transfusion import noise_images, sample_noise, sample_timesteps

IMAGE = [BOI] + [IMG] * 4 + [EOI]
# Overrides that make the families' heads differ from a bare matrix, and their sliding layers slide.
FAMILIES = {name: {} for name in SUPPORTED_TEXT_MODELS}
FAMILIES["cohere"] = FAMILIES["cohere2"] = {"logit_scale": 1.5}
FAMILIES["gemma2"] = {"sliding_window": 6, "final_logit_softcapping": 3.0}
FAMILIES["gemma3_text"] = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES["granite"] = {"logits_scaling": 3.0, "embedding_multiplier": 2.0}
FAMILIES["mistral"] = {"sliding_window": 6}
FAMILIES["llama-tied"] = {"tie_word_embeddings": True}


def family(name: str):
    return tiny.text_config(name.removesuffix("-tied"), **FAMILIES[name])


def images(count: int, side: int = 4) -> torch.Tensor:
    return torch.randn(count, 2, side, side)


def with_weights_of(plain, model) -> None:
    """Puts the weights of a plain `...ForCausalLM` into a Transfusion model."""
    state = {f"model.language_model.{k.removeprefix('model.')}": v for k, v in plain.state_dict().items()}
    head = {k.removeprefix("model.language_model."): v for k, v in state.items() if "lm_head" in k}
    body = {k: v for k, v in state.items() if "lm_head" not in k}
    missing, unexpected = model.load_state_dict({**body, **head}, strict=False)
    assert not unexpected and all("patch_" in key for key in missing)


@pytest.mark.parametrize("name", FAMILIES)
def test_text_only_logits_equal_the_plain_decoder_before_and_after_reload(name, tmp_path):
    plain = AutoModelForCausalLM.from_config(family(name)).eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model = tiny.model(family(name))
    with_weights_of(plain, model)
    ids = torch.tensor([tiny.words(random.Random(0), 12)])
    expected = plain(ids).logits
    assert expected.std() > 0.1
    assert (model(ids).logits - expected).abs().max() <= tiny.ROUNDING
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (reloaded(ids).logits - expected).abs().max() <= tiny.ROUNDING


@pytest.mark.parametrize("name", FAMILIES)
def test_a_patch_reaches_its_whole_image_and_what_follows_and_nothing_before(name):
    """In every family, and so in both kinds of layers of the hybrid ones."""
    model = tiny.model(family(name))
    ids = torch.tensor([[5, 6, *IMAGE, 7, *IMAGE, 8]])
    latents = images(2)
    before = model.model(ids, latents).last_hidden_state[0]
    latents[1, :, 3, 3] += 1.0  # the last patch of the second image
    after = model.model(ids, latents).last_hidden_state[0]
    changed = (before != after).any(dim=-1)
    second = ids[0].tolist().index(BOI, 8) + 1
    assert not changed[:second].any()
    assert changed[second : second + 4].all()
    assert changed[second + 4 :].all()


@pytest.mark.parametrize("layer_type", ["sliding_attention", "full_attention"])
def test_gemma_3_has_the_blocks_in_both_kinds_of_layers(layer_type):
    text = tiny.text_config("gemma3_text", num_hidden_layers=1, sliding_window=4, layer_types=[layer_type])
    model = tiny.model(text, patch_size=1)
    ids = torch.tensor([[5, 6, 7, BOI] + [IMG] * 16 + [EOI, 8]])
    latents = images(1)
    before = model.model(ids, latents).last_hidden_state[0]
    latents[0, :, 3, 3] += 1.0  # the last of 16 patches, 12 beyond the window of the first
    changed = (before != model.model(ids, latents).last_hidden_state[0]).any(dim=-1)
    assert not changed[:4].any() and changed[4:20].all()


def test_causal_image_attention_is_the_ablation_of_table_5():
    model = tiny.model(bidirectional_image_attention=False)
    ids, latents = torch.tensor([[5, *IMAGE, 8]]), images(1)
    before = model.model(ids, latents).last_hidden_state[0]
    latents[0, :, 3, 3] += 1.0
    changed = (before != model.model(ids, latents).last_hidden_state[0]).any(dim=-1)
    assert changed.tolist() == [False] * 5 + [True] * 3


@pytest.mark.parametrize("model_type", ["mamba", "qwen3_next", "mixtral", "gpt2", "bart"])
def test_families_that_cannot_be_right_are_refused_by_name(model_type):
    config = tiny.config()
    config.text_config = AutoConfig.for_model(model_type)
    with pytest.raises(ValueError, match=f"'{model_type}' is not supported.*llama"):
        TransfusionModel(config)


def test_encoders_bidirectional_over_text_are_refused():
    with pytest.raises(ValueError, match="`text_config` is that of an encoder, bidirectional over text"):
        TransfusionModel(tiny.config(tiny.text_config("gemma3_text", use_bidirectional_attention=True)))


def test_one_token_behind_a_cache_is_checked_like_any_input():
    model, cache = tiny.model(), DynamicCache()
    model(torch.tensor([[5, BOI]]), cache=cache, use_cache=True)
    patch, kwargs = torch.tensor([[IMG]]), {"cache": cache, "use_cache": True}
    with pytest.raises(ValueError, match="NaN or infinite"):
        model(patch, latents=torch.full((1, 2, 2, 2), torch.nan), **kwargs)
    with pytest.raises(ValueError, match="one t from 0 to 999"):
        model(patch, latents=torch.zeros(1, 2, 2, 2), timesteps=torch.tensor([5000]), **kwargs)
    with pytest.raises(ValueError, match="hold 0 images but `input_ids` has 1 image blocks"):
        model(patch, **kwargs)


def test_the_cache_may_still_be_called_past_key_values():
    model, ids = tiny.model(), torch.tensor([[5, 6]])
    for part in (model, model.model):
        cache = DynamicCache()
        with pytest.warns(FutureWarning, match="`past_key_values` is deprecated"):
            output = part(ids, past_key_values=cache, use_cache=True)
        assert output.cache is output.past_key_values is cache and cache.get_seq_length() == 2


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"])
@pytest.mark.parametrize("form", ["plain", "dict"])
def test_stock_flash_attention_is_refused_with_the_reason(implementation, form):
    assert not is_flash_attn_2_available()  # or the plain refusal below would be the library's
    requested = implementation if form == "plain" else {"text_config": implementation}
    config = tiny.config()
    config._attn_implementation = requested
    with pytest.raises(ValueError, match=r"silently drop the bidirectional image blocks.*'sdpa'"):
        TransfusionForCausalLMAndDiffusion(config)
    model = tiny.model()
    with pytest.raises(ValueError, match="silently drop"):
        model.set_attn_implementation(requested)
    model.config.text_config._attn_implementation = implementation
    with pytest.raises(ValueError, match="silently drop"):
        model(torch.tensor([[5, 6]]))


def test_stock_flash_attention_is_refused_when_loading(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    for requested in ("flash_attention_2", {"text_config": "flash_attention_2"}):
        with pytest.raises(ValueError, match="silently drop"):
            TransfusionForCausalLMAndDiffusion.from_pretrained(tmp_path, attn_implementation=requested)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
def test_every_supported_attention_gives_the_same_output(implementation, seed):
    model = tiny.model(tiny.gemma3(), **tiny.drawn_fields(seed))
    features = {
        key: value for key, value in tiny.batch(3).items() if key in ("input_ids", "attention_mask", "latents")
    }
    with torch.no_grad(), tiny.uncompiled():
        expected = model(**features).logits
        model.set_attn_implementation(implementation)
        actual = model(**features).logits
    real = features["attention_mask"].bool()
    torch.testing.assert_close(actual[real], expected[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("text", [tiny.text_config(), tiny.gemma3()], ids=["llama", "gemma3"])
def test_padding_changes_nothing(text, seed):
    model = tiny.model(text, **tiny.drawn_fields(seed))
    left, right = (tiny.batch(4, padding_side=side) for side in ("left", "right"))
    with torch.no_grad():
        outputs = [model(**features) for features in (left, right)]
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, atol=1e-5, rtol=1e-5)
    rows = [o.logits[f["attention_mask"].bool()] for o, f in zip(outputs, (left, right), strict=True)]
    torch.testing.assert_close(rows[0], rows[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_cached_equals_uncached_wherever_the_text_is_cut(seed):
    model = tiny.model(tiny.gemma3(), **tiny.drawn_fields(seed))
    ids, latents = torch.tensor([[5, 6, *IMAGE, 7, 8, *IMAGE, 9]]), images(2)
    mask = torch.ones_like(ids)
    positions = positions_of(ids, mask, model.config)
    with torch.no_grad():
        expected = model(ids, latents=latents).logits
        for cut in (1, 2, 8, 9, 10, 16):  # not inside an image
            cache, blocks_before = DynamicCache(), int((ids[0, :cut] == BOI).sum())
            before = latents[:blocks_before] if blocks_before else None
            after = latents[blocks_before:] if blocks_before < 2 else None
            kwargs = {"cache": cache, "use_cache": True}
            first = model(ids[:, :cut], latents=before, position_ids=positions[:, :cut], **kwargs).logits
            kwargs["attention_mask"] = mask
            second = model(ids[:, cut:], latents=after, position_ids=positions[:, cut:], **kwargs).logits
            torch.testing.assert_close(torch.cat([first, second], dim=1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {**tiny.UNET, "pos_embed_type": "sincos"}, *map(tiny.drawn_fields, (1, 2))])
def test_images_of_several_sizes_in_one_batch_equal_each_alone(options):
    model = tiny.model(**options)
    sizes, generator = [4, 1, 2, 4, 2], torch.Generator().manual_seed(0)
    latents = [tiny.image_of(n, generator) for n in sizes]
    rows = [[5 + i, BOI] + [IMG] * n + [EOI, 6] for i, n in enumerate(sizes)]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True)
    timesteps = torch.tensor([0, 100, 500, 999, 700])
    with torch.no_grad():
        together = model(ids, latents=latents, timesteps=timesteps, attention_mask=(ids > 0).long())
        for i, row in enumerate(rows):
            alone = model(torch.tensor([row]), latents=latents[i][None], timesteps=timesteps[i : i + 1])
            torch.testing.assert_close(together.image_predictions[i], alone.image_predictions[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("prediction_type", "weighting"),
    [
        *product(["epsilon", "v_prediction", "sample", "flow_prediction"], [None, "min_snr"]),
        ("sample", "v_prediction"),
    ],
)
def test_each_prediction_type_trains_on_its_target(prediction_type, weighting):
    """x_t, the target and the weighted error by hand, from the ε and t that the seeds draw."""
    model = tiny.model(prediction_type=prediction_type, diffusion_loss_weighting=weighting)
    ids, x_0 = torch.tensor([[5, *IMAGE, 7, *IMAGE]]), images(2)
    labels, seeds = torch.where(ids >= IMG, -100, ids), [11, 2]
    output = model(ids, latents=x_0, labels=labels, noise_seeds=seeds, image_loss_mask=torch.tensor([True, True]))
    (eps,) = sample_noise([x_0], seeds)
    is_flow = prediction_type == "flow_prediction"
    t = sample_timesteps(torch.tensor([1000, 1000]), seeds) + is_flow
    if is_flow:
        a, b = 1 - t / 1000, t / 1000
    else:
        a = model.noise_scheduler.alphas_cumprod[t].sqrt()
        b = (1 - a**2).sqrt()
    a, b = a[:, None, None, None], b[:, None, None, None]
    target = {"epsilon": eps, "v_prediction": a * eps - b * x_0, "sample": x_0, "flow_prediction": eps - x_0}
    predicted = model(ids, latents=a * x_0 + b * eps, timesteps=t).image_predictions
    predicted, target, x_t = torch.stack(predicted), target[prediction_type], a * x_0 + b * eps
    restored = {
        "epsilon": (x_t - b * predicted) / a,
        "v_prediction": a * x_t - b * predicted,
        "sample": predicted,
        "flow_prediction": x_t - b * predicted,
    }[prediction_type]
    if weighting is None:
        expected = (predicted - target).square().mean()
    elif weighting == "min_snr":
        snr = (a / b) ** 2
        assert snr.min() < 5 < snr.max()
        expected = (snr.clamp(max=5) * (restored - x_0).square()).mean()
    else:
        expected = ((a * x_t - restored) / b - (a * eps - b * x_0)).square().mean()
    torch.testing.assert_close(output.image_losses.mean(), output.diffusion_loss)
    torch.testing.assert_close(output.diffusion_loss, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=f"`timesteps` must hold one t from 0 to {999 + is_flow}"):
        model(ids, latents=x_0, labels=labels, timesteps=torch.tensor([0, 1001]))


@pytest.mark.parametrize("patch_encoder", ["linear", "unet"])
@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_every_patch_size_trains_and_predicts_images_of_their_size(patch_encoder, patch_size):
    model = tiny.model(patch_encoder=patch_encoder, patch_size=patch_size, sample_size=8)
    sizes = [(8, 8), (8, 16)]
    blocks = [[BOI] + [IMG] * (height * width // patch_size**2) + [EOI] for height, width in sizes]
    ids = torch.tensor([[5, *blocks[0], *blocks[1], 6]])
    latents = [torch.randn(2, *size) for size in sizes]
    output = model(ids, latents=latents, labels=torch.where(ids >= IMG, -100, ids))
    assert [tuple(prediction.shape[1:]) for prediction in output.image_predictions] == sizes
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in model.model.patch_encoder.parameters())


def test_only_noised_images_are_decoded():
    model, seen = tiny.model(**tiny.UNET), []
    model.model.patch_decoder.register_forward_pre_hook(lambda _, args: seen.append([len(x) for x in args[0]]))
    ids = torch.tensor([[5, *IMAGE, 7, *IMAGE, *IMAGE]])
    features = {"latents": images(3), "labels": torch.where(ids >= IMG, -100, ids), "noise_seeds": [1, 2, 3]}
    output = model(ids, image_loss_mask=torch.tensor([False, True, False]), **features)
    assert seen == [[1]] and len(output.image_predictions) == 1
    everything = model(ids, **features)
    assert seen[1:] == [[3]] and len(everything.image_predictions) == 3
    none = model(ids, image_loss_mask=torch.tensor([False] * 3), **features)
    assert none.diffusion_loss == 0 and seen[2:] == [[1]]  # touched, for the sake of distributed training
    none.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_prediction_masks_that_do_not_fit_are_refused():
    model, ids = tiny.model(), torch.tensor([[5, *IMAGE, 7, *IMAGE]])
    times = torch.tensor([1, 2])
    for mask in ([True], [True] * 3):
        with pytest.raises(ValueError, match="`prediction_mask` must hold one value for each of 2 images"):
            model(ids, latents=images(2), timesteps=times, prediction_mask=torch.tensor(mask))
    with pytest.raises(ValueError, match=r"`prediction_mask` chooses images .*; pass `timesteps`, too"):
        model(ids, latents=images(2), prediction_mask=torch.tensor([True, False]))
    with pytest.raises(ValueError, match="`prediction_mask` is for inference; in training pass `image_loss_mask`"):
        model(ids, latents=images(2), labels=ids, prediction_mask=torch.tensor([True, False]))


def test_a_list_without_images_is_none():
    model, ids = tiny.model(), torch.tensor([[5, 6]])
    assert torch.equal(model(ids, latents=[]).logits, model(ids).logits)
    assert torch.equal(model(ids, pixel_values=[]).logits, model(ids).logits)


def test_clean_images_have_no_noise_no_loss_and_t_0():
    model = tiny.model()
    ids = torch.tensor([[5, *IMAGE, 7, *IMAGE]])
    latents = images(2)
    labels = torch.where((ids == IMG) | (ids == EOI), -100, ids)
    kwargs = {"latents": latents, "labels": labels, "timesteps": torch.tensor([700, 300]), "noise_seeds": [1, 2]}
    output = model(ids, image_loss_mask=torch.tensor([False, True]), **kwargs)
    only_second = model(
        ids, image_loss_mask=torch.tensor([False, True]), **{**kwargs, "timesteps": torch.tensor([1, 300])}
    )
    assert torch.equal(output.loss, only_second.loss)  # the t asked for a clean image is not used
    assert not torch.equal(output.diffusion_loss, model(ids, **kwargs).diffusion_loss)


def test_without_labels_images_are_clean():
    model = tiny.model()
    ids, latents = torch.tensor([[5, *IMAGE]]), images(1)
    clean = model(ids, latents=latents)
    assert clean.loss is None and clean.image_predictions is None
    at_0 = model(ids, latents=latents, timesteps=torch.tensor([0]))
    assert torch.equal(clean.logits, at_0.logits)
    assert at_0.image_predictions[0].shape == (2, 4, 4)


def test_pixel_values_are_latents_without_a_vae():
    model = tiny.model()
    ids, pixels = torch.tensor([[5, *IMAGE]]), images(1)
    assert torch.equal(model(ids, pixel_values=pixels).logits, model(ids, latents=pixels).logits)


def test_evaluation_draws_t_and_noise_from_the_images_themselves():
    model = tiny.model()
    ids, latents = torch.tensor([[5, *IMAGE], [6, *IMAGE]]), images(2)
    labels = torch.where((ids == IMG) | (ids == EOI), -100, ids)
    torch.manual_seed(1)
    first = model(ids, latents=latents, labels=labels).diffusion_loss
    torch.manual_seed(2)
    assert torch.equal(first, model(ids, latents=latents, labels=labels).diffusion_loss)
    rows = [model(ids[i : i + 1], latents=latents[i : i + 1], labels=labels[i : i + 1]).diffusion_loss for i in (0, 1)]
    torch.testing.assert_close(first, (rows[0] + rows[1]) / 2)
    model.train()
    assert not torch.equal(first, model(ids, latents=latents, labels=labels).diffusion_loss)


@pytest.mark.parametrize("seed", range(4))
def test_text_only_batch_gives_every_image_part_a_gradient(seed):
    model = tiny.model(**tiny.drawn_fields(seed)).train()
    ids = torch.tensor([[5, 6, 7]])
    output = model(ids, labels=ids)
    output.loss.backward()
    assert output.diffusion_loss == 0
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("seed", range(4))
def test_gradient_checkpointing_changes_nothing(seed):
    model, features = tiny.model(**tiny.drawn_fields(seed)).train(), tiny.batch(3)
    model(**features).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**features).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4)


def test_noising_and_losses_stay_float32_in_a_bfloat16_model():
    model = tiny.model(std=0.1).to(torch.bfloat16)
    ids, latents = torch.tensor([[5, *IMAGE]]), images(1)
    labels = torch.where((ids == IMG) | (ids == EOI), -100, ids)
    output = model(ids, latents=latents.bfloat16(), labels=labels, timesteps=torch.tensor([1]), noise_seeds=[0])
    assert output.logits.dtype == torch.bfloat16
    assert output.image_predictions[0].dtype == output.diffusion_loss.dtype == torch.float32
    # In bfloat16 ᾱ_1 = 1 and σ_1 = 0: the noised image would be the clean one.
    (noised,), *_ = noise_images(model.noise_scheduler, [latents], torch.tensor([1]), seeds=[0])
    assert noised.dtype == torch.float32 and not torch.equal(noised, latents)


def test_timestep_embedding_stays_float32_however_the_model_became_bfloat16(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    for make in (
        lambda: TransfusionForCausalLMAndDiffusion.from_pretrained(tmp_path, dtype=torch.bfloat16),
        lambda: AutoModelForCausalLM.from_config(tiny.config(), dtype=torch.bfloat16),
        lambda: tiny.model().to(torch.bfloat16),
        lambda: tiny.model().half(),
    ):
        model = make()
        dtypes = {parameter.dtype for parameter in model.model.patch_encoder.timestep_embedding.parameters()}
        assert dtypes == {torch.float32} and model.dtype in (torch.bfloat16, torch.float16)
    weight = tiny.model().model.patch_encoder.timestep_embedding.mlp.linear_1.weight
    kept = tiny.model().to(torch.bfloat16).model.patch_encoder.timestep_embedding.mlp.linear_1.weight
    assert torch.equal(weight, kept)
    assert tiny.model().double().model.patch_encoder.timestep_embedding.mlp.linear_1.weight.dtype == torch.float64


def test_save_and_load_give_equal_weights_and_outputs(tmp_path):
    model = tiny.model()
    features = tiny.batch(3)
    model.save_pretrained(tmp_path)
    reloaded = TransfusionForCausalLMAndDiffusion.from_pretrained(tmp_path)
    for (name, a), (_, b) in zip(model.state_dict().items(), reloaded.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(model(**features).loss, reloaded(**features).loss)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, TransfusionModel)
    assert torch.equal(base.patch_decoder.proj.weight, model.model.patch_decoder.proj.weight)


def test_static_flags_are_set():
    model = tiny.model(tiny.gemma3())
    parts = {"Gemma3DecoderLayer", "TransfusionLinearPatchEncoder", "TransfusionLinearPatchDecoder"}
    assert model._no_split_modules == parts
    parts = {"LlamaDecoderLayer", "TransfusionUNetPatchEncoder", "TransfusionUNetPatchDecoder", "TransfusionVAE"}
    assert tiny.model(**tiny.UNET, vae_config=tiny.VAE)._no_split_modules == parts
    assert model._supports_sdpa and model._supports_flex_attn and model._supports_attention_backend
    assert not model._supports_flash_attn
    assert model.supports_gradient_checkpointing
    assert find_labels(type(model)) == ["labels"]  # or the Trainer's evaluation has no loss
    assert "cache" in model._skip_keys_device_placement
    assert model.input_modalities == model.output_modalities == ("image", "text")
    assert model._tied_weights_keys == {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    assert model.all_tied_weights_keys and model.lm_head.weight is model.get_input_embeddings().weight
    assert not tiny.model().all_tied_weights_keys
    assert model.loss_type == "ForCausalLM"  # the Trainer counts shifted labels for it


def test_resizing_the_vocabulary_keeps_head_and_embeddings_together():
    for tied in (False, True):
        model = tiny.model(tiny.text_config(tie_word_embeddings=tied))
        model.resize_token_embeddings(70)
        assert model.lm_head.weight.shape == model.get_input_embeddings().weight.shape == (70, 32)
        assert model.config.text_config.vocab_size == 70
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
        assert model(torch.tensor([[5, 69]])).logits.shape[-1] == 70


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_without_the_image_tokens_is_refused_before_anything_changes(tied):
    model = tiny.model(tiny.text_config(tie_word_embeddings=tied))
    before = copy.deepcopy(model.state_dict())
    for part in (model, model.model):
        for kwargs in ({"new_num_tokens": 63}, {"new_num_tokens": 50, "pad_to_multiple_of": 10}):
            message = rf"above the ids.*image_end_token_id=63; got {kwargs['new_num_tokens']}\. Pass 64 or more"
            with pytest.raises(ValueError, match=message):
                part.resize_token_embeddings(**kwargs)
    assert model.config.text_config.vocab_size == 64
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.resize_token_embeddings(60, pad_to_multiple_of=16)  # which makes 64
    assert model.lm_head.weight.shape == (64, 32)


def test_only_parts_that_are_there_are_named_as_kept_in_float32():
    vae = {**tiny.VAE, "in_channels": 3}
    with_vae = tiny.model(vae_config=vae)
    for model in (tiny.model(), with_vae, with_vae.model, tiny.model(**tiny.UNET)):
        names = [name for name, _ in model.named_modules()]
        for kept in model._keep_in_fp32_modules_strict:
            assert any(kept in name.split(".") for name in names), kept
    assert with_vae._keep_in_fp32_modules_strict == {"timestep_embedding", "vae"}


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForMultimodalLM])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
)
def test_weights_that_are_cut_off_are_named(tmp_path, name, auto_class):
    tiny.model().save_pretrained(tmp_path, max_shard_size="1GB" if name == "model.safetensors" else "60KB")
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match=f"A weight file of {tmp_path} is cut off or damaged; get it again"):
        auto_class.from_pretrained(tmp_path)


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(1, 2, 4, 4)}, "hold 1 images but `input_ids` has 2 image blocks; pass one image per"),
        ({"latents": torch.zeros(3, 2, 4, 4)}, "hold 3 images but `input_ids` has 2 image blocks"),
        ({"latents": None}, "hold 0 images but `input_ids` has 2 image blocks; pass one image per"),
        ({"latents": torch.zeros(2, 2, 5, 4)}, r"multiples of `patch_size` \(2\); got 5 × 4. Resize or crop"),
        ({"latents": torch.zeros(2, 3, 4, 4)}, r"shape \(num_images, 2, height, width\).*got \(2, 3, 4, 4\)"),
        ({"latents": torch.zeros(2, 2, 4, 8)}, r"blocks of \[4, 4\] patches but the images have \[8, 8\]"),
        ({"latents": torch.full((2, 2, 4, 4), torch.nan)}, "hold NaN or infinite values; expected finite numbers"),
        ({"timesteps": torch.tensor([0, 1000])}, r"one t from 0 to 999 for each of 2 images; got \[0, 1000\]"),
        ({"timesteps": torch.tensor([-1, 0])}, r"one t from 0 to 999 for each of 2 images; got \[-1, 0\]"),
        ({"timesteps": torch.tensor([1])}, r"one t from 0 to 999 for each of 2 images; got \[1\]"),
        ({"pixel_values": torch.zeros(2, 2, 4, 4)}, "Pass `pixel_values` or `latents`, not both"),
        ({"input_ids": torch.zeros(0, 4, dtype=torch.long)}, r"`input_ids` must hold at least one token; got shape"),
        ({"input_ids": torch.tensor([[5, 6]])}, "hold 2 images but `input_ids` has 0 image blocks"),
        ({"input_ids": None}, "exactly one of `input_ids` and `inputs_embeds`"),
    ],
)  # fmt: skip
def test_bad_input_names_what_was_expected_and_what_came(change, message):
    features = {"input_ids": torch.tensor([[5, *IMAGE, 7, *IMAGE]]), "latents": images(2), **change}
    with pytest.raises(ValueError, match=message):
        tiny.model()(**features)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"timesteps": torch.tensor([0, 1000])},
            r"`timesteps` must hold one t from 0 to 999 .*; got \[0, 1000\]",
        ),
        ({"max_timesteps": torch.tensor([0, 1000])}, r"`max_timesteps` must lie in 1 to 1000; got \[0, 1000\]"),
        ({"max_timesteps": torch.tensor([500])}, "`max_timesteps` must hold one value for each of 2 images; got 1"),
        ({"image_loss_mask": torch.tensor([True])}, "`image_loss_mask` must hold one value for each of 2 images"),
        ({"timesteps": torch.tensor([5])}, r"`timesteps` must hold one t .* for each of 2 images; got \[5\]"),
        ({"noise_seeds": [1, 2, 3]}, "`noise_seeds` must hold one value for each of 2 images; got 3"),
    ],
)
def test_bad_training_input_names_what_was_expected_and_what_came(change, message):
    ids = torch.tensor([[5, *IMAGE, 7, *IMAGE]])
    with pytest.raises(ValueError, match=message):
        tiny.model()(ids, latents=images(2), labels=ids, **change)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", [slice(None, -1), slice(1, None)])
def test_labels_of_another_length_are_refused(training, change):
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    message = r"`labels` must have the shape of `input_ids`, \(2, 4\); got \(2, 3\)"
    with pytest.raises(ValueError, match=message):
        tiny.model().train(training)(ids, labels=ids[:, change])


def test_any_mistral_config_object_is_accepted():
    config = TransfusionConfig(text_config=MistralConfig(vocab_size=32003, num_hidden_layers=1))
    assert config.text_config.model_type == "mistral"
