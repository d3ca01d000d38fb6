"""Image weights of their own (`untied_modalities`): against the tied model and against both halves computed apart."""

import copy
import json
import pickle
import random

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from test_checkpoint_mapping import IMAGES, quickstart
from test_generation import SCRIPTS, Script, assert_rows_equal, generate, generators, new_ids, prompts
from test_modeling import FAMILIES
from test_quickstart import ROOT, run
from test_trainer import exact_trainer, uneven_samples
from tiny import BOI, BOS, EOI, IMG
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, CompileConfig, LogitsProcessorList

from transfusion_hf import TransfusionForCausalLMAndDiffusion
from transfusion_hf.conversion.causal_lm import convert_causal_lm
from transfusion_hf.conversion.export import extract_causal_lm
from transfusion_hf.modality_transfusion import image_parameters
from transfusion_hf.training.plans import TRAINING_PLANS, set_trainable
from transfusion_hf.training.trainer import _flops_per_token

UNTIED = {"untied_modalities": ["image"]}
IMAGE = [BOI] + [IMG] * 4 + [EOI]
# Families with norms of queries and keys that only an option brings.
ALL_FAMILIES = {
    **FAMILIES,
    "cohere-norms": {"use_qk_norm": True},
    "phi-norms": {"qk_layernorm": True, "num_key_value_heads": 4},
    "stablelm-norms": {"qk_layernorm": True},
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
}


def family(name: str):
    return tiny.text_config(name.split("-")[0], **ALL_FAMILIES[name])


def pair(text=None, **kwargs):
    """An untied model with random image weights, and a tied one with its text weights."""
    untied, tied = tiny.model(text, **UNTIED, **kwargs), tiny.model(text, **kwargs)
    missing, unexpected = tied.load_state_dict(untied.state_dict(), strict=False)
    assert not missing and unexpected and all(".image." in name for name in unexpected)
    return untied, tied


def interleaved() -> dict:
    """Rows with two images, with one at the end, with none; padded."""
    rows = [[5, 6, *IMAGE, 7, *IMAGE, 8], [9, 10, 11, *IMAGE], [12, 13, 14, 15, 16]]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    latents = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "latents": latents}


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_every_family_sends_each_position_through_its_own_half_alone(name):
    """Held to a tied model whose leaf modules compute both halves for all positions and choose."""
    untied, tied = pair(family(name))
    features = interleaved()
    is_image = features["input_ids"] == IMG
    sequence_length = is_image.shape[1]  # no other dimension is as large
    layers = zip(tied.model.language_model.layers, untied.model.language_model.layers, strict=True)
    num_replaced = 0
    for tied_layer, untied_layer in layers:
        image_modules = dict(untied_layer.image.named_modules())
        for path, module in tied_layer.named_modules():
            if not list(module.parameters(recurse=False)):
                continue
            num_replaced += sum(p.numel() for p in module.parameters(recurse=False))

            def choose(module, args, output, image=image_modules[path]):
                shape = [1] * output.ndim
                shape[0], shape[output.shape.index(sequence_length)] = is_image.shape
                return torch.where(is_image.view(shape), image(*args), output)

            module.register_forward_hook(choose)
    assert num_replaced == sum(image.numel() for _, image, _ in image_parameters(untied)) > 0
    timesteps = torch.tensor([3, 500, 999])
    with torch.no_grad():
        actual = untied(**features, timesteps=timesteps)
        expected = tied(**features, timesteps=timesteps)
    real = features["attention_mask"].bool()
    torch.testing.assert_close(actual.logits[real], expected.logits[real], atol=1e-4, rtol=1e-4)
    for image, other in zip(actual.image_predictions, expected.image_predictions, strict=True):
        torch.testing.assert_close(image, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_text_is_that_of_the_tied_model_to_the_bit(name):
    untied, tied = pair(family(name))
    ids = torch.tensor([tiny.words(random.Random(0), 12)])
    for model in (untied, tied):
        model.train(model is untied)  # where image weights are touched; there is no dropout
    assert torch.equal(untied(ids).logits, tied(ids).logits)
    untied.eval()
    assert torch.equal(untied(ids).logits, tied(ids).logits)
    # Behind an image text changes, before it text is the same.
    features = {name: value[:1] for name, value in interleaved().items()} | {"latents": torch.randn(2, 2, 4, 4)}
    before, after = untied(**features).logits, tied(**features).logits
    assert torch.equal(before[:, :3], after[:, :3]) and not torch.isclose(before[:, 8], after[:, 8]).all()


def test_a_new_model_begins_with_copies_that_are_its_own():
    untied = TransfusionForCausalLMAndDiffusion(tiny.config(**UNTIED)).eval()
    pairs = list(image_parameters(untied))
    assert len(pairs) == len(untied.model.language_model.layers) * 9
    for name, image, text in pairs:
        assert torch.equal(image, text) and image.data_ptr() != text.data_ptr(), name
    tied = TransfusionForCausalLMAndDiffusion(tiny.config()).eval()
    tied.load_state_dict(untied.state_dict(), strict=False)
    features = {**interleaved(), "timesteps": torch.tensor([3, 500, 999])}
    actual, expected = untied(**features), tied(**features)
    torch.testing.assert_close(actual.logits, expected.logits, atol=tiny.ROUNDING, rtol=tiny.ROUNDING)
    for image, other in zip(actual.image_predictions, expected.image_predictions, strict=True):
        torch.testing.assert_close(image, other, atol=tiny.ROUNDING, rtol=tiny.ROUNDING)


def test_saved_and_loaded_it_is_the_same_and_a_tied_checkpoint_is_copied(tmp_path):
    untied, tied = pair(tiny.gemma3())
    features = interleaved()
    untied.save_pretrained(tmp_path / "untied")
    loaded, info = TransfusionForCausalLMAndDiffusion.from_pretrained(tmp_path / "untied", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.untied_modalities == ["image"]
    assert torch.equal(loaded(**features).logits, untied(**features).logits)

    tied.save_pretrained(tmp_path / "tied")
    grown = TransfusionForCausalLMAndDiffusion.from_pretrained(tmp_path / "tied", **UNTIED)
    assert all(torch.equal(image, text) for _, image, text in image_parameters(grown))
    torch.testing.assert_close(grown(**features).logits, tied(**features).logits, atol=1e-5, rtol=1e-5)


def test_image_weights_that_a_checkpoint_lacks_are_copies_and_the_others_its_own(tmp_path):
    untied, _ = pair()
    weights = untied.state_dict()
    lacking = [name for name in weights if ".layers.0.image." in name or ".layers.1.image.mlp.up_proj" in name]
    untied.save_pretrained(tmp_path, state_dict={n: value for n, value in weights.items() if n not in lacking})
    loaded = TransfusionForCausalLMAndDiffusion.from_pretrained(tmp_path)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, weights[name.replace(".image.", ".") if name in lacking else name]), name


def test_initialising_a_trained_model_again_leaves_its_image_weights():
    untied = TransfusionForCausalLMAndDiffusion(tiny.config(**UNTIED))
    with torch.no_grad():
        for _, image, _ in image_parameters(untied):
            image.add_(1)
    untied.init_weights()
    assert not any(torch.equal(image, text) for _, image, text in image_parameters(untied))


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_routes_through_its_own_weights(make_copy):
    untied, _ = pair()
    features = interleaved()
    before, copied = untied(**features).logits, make_copy(untied)
    with torch.no_grad():
        for parameter in untied.parameters():
            parameter.zero_()
    assert torch.equal(copied(**features).logits, before)


def test_a_token_costs_one_of_the_two_halves():
    untied, tied = pair()
    block = {"input_ids": torch.full((2, 4), IMG), "latents": torch.randn(2, 2, 4, 4)}
    for features in (interleaved(), block, {"input_ids": torch.tensor([[5, 6, 7]])}):
        flops = []
        for model in (untied, tied):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(**features)
            flops.append(counter.get_total_flops())
        assert flops[0] == flops[1] > 0


def test_the_trainer_counts_one_half_for_a_token(tmp_path):
    trainers = [exact_trainer(model, tmp_path, uneven_samples()) for model in pair()]
    assert _flops_per_token(trainers[0].model) == _flops_per_token(trainers[1].model) > 0


@pytest.mark.parametrize("text", [tiny.text_config(), tiny.gemma3()], ids=["llama", "gemma3"])
def test_padding_changes_nothing(text):
    model, _ = pair(text)
    left, right = (tiny.batch(4, padding_side=side) for side in ("left", "right"))
    with torch.no_grad():
        outputs = [model(**features) for features in (left, right)]
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, atol=1e-5, rtol=1e-5)
    rows = [o.logits[f["attention_mask"].bool()] for o, f in zip(outputs, (left, right), strict=True)]
    torch.testing.assert_close(rows[0], rows[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "transfusion_varlen"])
def test_packed_documents_equal_each_alone(implementation):
    model, _ = pair()
    model.set_attn_implementation(implementation)
    documents = [[5, 6, *IMAGE, 7], [8, 9, 10], [*IMAGE, *IMAGE, 11]]
    latents = torch.randn(3, 2, 4, 4)
    ids = torch.tensor([[token for document in documents for token in document]])
    positions = torch.cat([torch.arange(len(document)) for document in documents])[None]
    with torch.no_grad():
        packed = model(ids, latents=latents, position_ids=positions, use_cache=False).logits[0]
        used, alone = 0, []
        for document in documents:
            count = document.count(BOI)
            images = latents[used : used + count] if count else None
            alone.append(model(torch.tensor([document]), latents=images, use_cache=False).logits[0])
            used += count
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-4, rtol=1e-4)


MIXED = [[BOS, 3, 30], [4, 30], [BOS, 5, 30], [BOS, 6, 30]]


@pytest.mark.parametrize("text", [tiny.text_config("qwen3"), tiny.gemma3()], ids=["qwen3", "gemma3"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_each_row_of_a_mixed_batch_equals_that_row_alone_and_uncached(text, guidance):
    """Prompts, text behind a cache, denoising steps, and what the steps left in the cache."""
    model, tied = pair(text)
    kwargs = {"logits_processor": LogitsProcessorList([Script(SCRIPTS)]), "image_guidance_scale": guidance}
    inputs = prompts(*MIXED)
    batch = generate(model, inputs, generator=generators(4), **kwargs)
    assert [len(row) for row in batch.images] == [1, 2, 0, 1]
    assert new_ids(batch, inputs, 1) == [10, *IMAGE, *IMAGE, 11, tiny.EOS]
    uncached = generate(model, inputs, generator=generators(4), use_cache=False, **kwargs)
    for row, prompt in enumerate(MIXED):
        alone_inputs = prompts(prompt)
        alone = generate(model, alone_inputs, generator=[generators(4)[row]], **kwargs)
        assert_rows_equal(batch, row, alone, inputs, alone_inputs)
        assert_rows_equal(batch, row, uncached, inputs, inputs, row)
    other = generate(tied, inputs, generator=generators(4), **kwargs)
    assert not torch.allclose(other.images[0][0], batch.images[0][0], atol=1e-2)


def test_a_denoising_step_runs_through_the_image_weights_alone():
    model, _ = pair()
    seen = []
    layer = model.model.language_model.layers[0]
    for name, module in (("text", layer.mlp), ("image", layer.image.mlp)):
        module.register_forward_hook(lambda _, args, __, name=name: seen.append((name, args[0].shape[1])))
    generate(model, prompts([BOS, 5, BOI]), generator=generators(1), generation_mode="image", image_guidance_scale=1.0)
    assert seen == [("text", 3), ("image", 4)] + [("image", 4)] * 3


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    model, _ = pair(tiny.text_config("qwen3"))
    features = tiny.batch(3)
    model.train()
    gradients = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(**features).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5, msg=name)
    assert all(gradients[0][name].any() for name, _, _ in image_parameters(model))


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_step_without_images_gives_image_weights_gradients_of_0(is_checkpointed):
    model, tied = pair()
    ids = torch.tensor([[5, 6, 7, 8]])
    if is_checkpointed:
        model.gradient_checkpointing_enable()
    for one in (model, tied):
        one.train()
        one(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad for name, parameter in tied.named_parameters()}
    for name, parameter in model.named_parameters():
        if ".image." in name:
            assert not parameter.grad.any(), name
        else:
            assert torch.equal(parameter.grad, expected[name]), name


def test_lora_finds_both_halves_or_one_and_merges_into_them():
    features, ids = interleaved(), torch.tensor([[5, 6, 7]])
    both, _ = pair()
    adapted = [
        n for n, _ in get_peft_model(both, LoraConfig(target_modules=["q_proj"])).named_parameters() if "lora" in n
    ]
    assert {".image." in name for name in adapted} == {True, False}
    adapted = [n for n, _ in get_peft_model(pair()[0], LoraConfig(target_modules="all-linear")).named_parameters()]
    assert any(".image.mlp.up_proj.lora_A" in n for n in adapted) and any("0.mlp.up_proj.lora_A" in n for n in adapted)

    model, tied = pair()
    before = model(**features).logits
    wrapped = get_peft_model(model, LoraConfig(target_modules=r".*\.image\..*_proj", init_lora_weights=False))
    assert all(".image." in name for name, parameter in wrapped.named_parameters() if parameter.requires_grad)
    assert torch.equal(wrapped(input_ids=ids).logits, tied(ids).logits)  # text meets no adapter
    with_adapter = wrapped(**features).logits
    assert not torch.allclose(with_adapter, before, atol=1e-2)
    wrapped.train()
    wrapped(**features, labels=features["input_ids"].masked_fill(features["input_ids"] >= BOI, -100)).loss.backward()
    assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)
    merged = wrapped.eval().merge_and_unload()
    torch.testing.assert_close(merged(**features).logits, with_adapter, atol=1e-4, rtol=1e-4)
    assert torch.equal(merged(ids).logits, tied(ids).logits)


@pytest.mark.slow
def test_compiled_steps_draw_the_same():
    model, _ = pair()
    kwargs = {"generation_mode": "image", "image_guidance_scale": 1.0}
    inputs, options = prompts([BOS, 5, BOI]), CompileConfig(backend="eager", mode="default", fullgraph=True)
    plain = generate(model, inputs, generator=generators(1), **kwargs)
    compiled = generate(model, inputs, generator=generators(1), compile_config=options, **kwargs)
    torch.testing.assert_close(compiled.images[0][0], plain.images[0][0], atol=1e-5, rtol=0)


def test_hidden_states_and_attentions_are_recorded_as_ever():
    untied, tied = pair(attn_implementation="eager")
    with torch.no_grad():
        for _, image, text in image_parameters(untied):
            image.copy_(text)
    features = {**interleaved(), "output_attentions": True, "output_hidden_states": True}
    actual, expected = untied(**features), tied(**features)
    assert len(actual.attentions) == 2 and len(actual.hidden_states) == 3
    pairs = zip(actual.attentions + actual.hidden_states, expected.attentions + expected.hidden_states, strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_the_tensor_parallel_plan_covers_the_image_weights_as_the_text():
    model, _ = pair(tiny.text_config("qwen3"))
    plan = model.tp_plan
    text = {name: style for name, style in plan.items() if ".layers.*." in name and ".image." not in name}
    assert text
    for name, style in text.items():
        image = name.replace(".layers.*.", ".layers.*.image.")
        assert plan[image] == style
        assert model.get_submodule(image.replace("*", "0")) is not model.get_submodule(name.replace("*", "0"))


@pytest.mark.parametrize("modalities", [["text"], ["image", "text"], ["image", "image"], ["audio"]])
def test_other_modalities_are_refused(modalities):
    with pytest.raises(ValueError, match=r"`untied_modalities` must be None, \[\] or \['image'\]"):
        tiny.config(untied_modalities=modalities)


def test_the_vae_is_trained_by_no_plan():
    for plan in TRAINING_PLANS:
        model = tiny.model(vae_config=tiny.VAE, **UNTIED)
        assert not any(name.startswith("vae.") for name in set_trainable(model, plan))
        assert not any(parameter.requires_grad for parameter in model.vae.parameters())


@pytest.mark.parametrize("nothing", [None, []])
def test_nothing_untied_is_the_model_of_the_paper(nothing):
    model = tiny.model(untied_modalities=nothing)
    assert not list(image_parameters(model)) and not any("image" in name for name, _ in model.named_parameters())


def test_plans_train_what_they_say_and_leave_text_alone():
    text_ids, features = torch.tensor([[5, 6, 7, 8]]), tiny.batch(3)
    for plan in TRAINING_PLANS:
        model, _ = pair()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        logits = model(text_ids).logits
        trained = set_trainable(model, plan)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01, weight_decay=0.1)
        model.train()
        for _ in range(2):
            optimizer.zero_grad()
            model(**features).loss.backward()
            optimizer.step()
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert changed == set(trained)
        is_expected = {
            "image_parts": lambda name: ".patch_" in name,
            "image_weights": lambda name: ".patch_" in name or ".image." in name,
            "all": lambda name: True,
        }[plan]
        assert changed == {name for name in before if is_expected(name)}
        assert torch.equal(model.eval()(text_ids).logits, logits) == (plan != "all")


def test_plans_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="`plan` must be one of image_parts, image_weights, all; got 'images'"):
        set_trainable(tiny.model(), "images")
    with pytest.raises(ValueError, match=r"'image_weights' needs `untied_modalities=\['image'\]`"):
        set_trainable(tiny.model(), "image_weights")


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "phi"])
def test_a_language_model_is_converted_with_image_weights_that_are_copies_and_drop_out_on_the_way_back(tmp_path, name):
    tokenizer = quickstart.train_tokenizer()
    original = AutoModelForCausalLM.from_config(tiny.text_config(name, vocab_size=len(tokenizer))).eval()
    original.save_pretrained(tmp_path / "lm", max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path / "lm")
    ids = torch.tensor([tiny.words(random.Random(0), 12)])
    expected, weights = original(ids).logits, original.state_dict()
    convert_causal_lm(tmp_path / "lm", tmp_path / "converted", **IMAGES, **UNTIED)
    load = TransfusionForCausalLMAndDiffusion.from_pretrained
    converted, info = load(tmp_path / "converted", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    in_memory = TransfusionForCausalLMAndDiffusion.from_causal_lm(tmp_path / "lm", **IMAGES, **UNTIED)
    for model in (converted, in_memory):
        assert torch.equal(model(ids).logits[..., : len(tokenizer)], expected)
        pairs = list(image_parameters(model))
        assert pairs and all(torch.equal(image, text) for _, image, text in pairs)
        back = extract_causal_lm(model, len(tokenizer)).state_dict()
        assert back.keys() == weights.keys()
        assert all(torch.equal(value, weights[key]) for key, value in back.items())


@pytest.mark.parametrize("text", [tiny.text_config(), tiny.gemma3()], ids=["llama", "gemma3"])
def test_weights_on_disk_give_the_same_to_the_bit(tmp_path, text):
    model = tiny.model(text, **UNTIED)
    model.save_pretrained(tmp_path / "model")
    load = TransfusionForCausalLMAndDiffusion.from_pretrained
    on_disk = load(tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "disk")
    assert {parameter.device.type for parameter in on_disk.parameters()} == {"meta"}
    features = interleaved()
    with torch.no_grad():
        assert torch.equal(on_disk(**features).logits, model(**features).logits)
    assert {parameter.device.type for parameter in on_disk.parameters()} == {"meta"}  # nothing stays in memory


def test_a_language_model_already_in_a_model_with_image_weights_is_refused():
    original = AutoModelForCausalLM.from_config(tiny.text_config())
    TransfusionForCausalLMAndDiffusion.from_causal_lm(original, **IMAGES, **UNTIED)
    with pytest.raises(ValueError, match="have image weights already"):
        TransfusionForCausalLMAndDiffusion.from_causal_lm(original, **IMAGES, **UNTIED)


@pytest.mark.slow
def test_a_language_model_learns_to_draw_and_keeps_its_text_to_the_bit(tmp_path):
    run(ROOT / "benchmarks" / "untied.py", "--parts", "digits", "--plans", "image_weights", "--output_dir", tmp_path)
    (results,) = json.loads((tmp_path / "results.json").read_text())
    assert results["text_logits_equal"] and results["draw_accuracy"] >= 0.9
    assert results["steps"] <= 2000 and results["sums"] >= 0.9
