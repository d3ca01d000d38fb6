"""A folder in BAGEL's format becomes a model that all tools take, and goes back bit for bit."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from reference_bagel import Bagel, FluxAutoencoder, Latents, Seen, Text, latents_of, windows_of
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import pad
from torchao.quantization import IntxWeightOnlyConfig, PerGroup
from transformers import AutoProcessor, PreTrainedTokenizerFast, TorchAoConfig, TrainingArguments, pipeline

from transfusion_hf import (
    TransfusionDataCollator,
    TransfusionForCausalLMAndDiffusion,
    TransfusionPipeline,
    TransfusionProcessor,
    TransfusionTrainer,
)
from transfusion_hf.conversion.bagel import (
    LATENT_TABLE,
    TOKENS,
    VISION_TABLE,
    bagel_config,
    bagel_name,
    convert_bagel,
    export_bagel,
    load_flux_autoencoder,
    transfusion_name,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "conversion"))
import convert_bagel as convert_script
import export_bagel as export_script

FIXTURES = Path(__file__).parent / "fixtures" / "bagel"
PLACES = "vit_model.vision_model.embeddings.position_embedding.weight"
SPECIAL = {"<|im_start|>": 300, "<|im_end|>": 301, "<|vision_start|>": 302, "<|vision_end|>": 303}
IMAGE, VISION = 304, 305  # which the tokenizer lacks, and gets
START, END, BOI, EOI = SPECIAL.values()


def flux_shapes(
    width: int = 32, multiples: tuple[int, ...] = (1, 2, 2, 2), num_blocks: int = 1
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the autoencoder's tensors, with so many blocks on each level down, and one more up."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *shape: int) -> None:
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    def block(name: str, before: int, after: int) -> None:
        for part, shape in {"norm1": (before,), "conv1": (after, before, 3, 3), "norm2": (after,)}.items():
            layer(f"{name}.{part}", *shape)
        layer(f"{name}.conv2", after, after, 3, 3)
        if before != after:
            layer(f"{name}.nin_shortcut", after, before, 1, 1)

    widths = [width * multiple for multiple in multiples]
    for half, first, last in (
        ("encoder", (widths[0], 3), (32, widths[-1])),
        ("decoder", (widths[-1], 16), (3, widths[0])),
    ):
        layer(f"{half}.conv_in", *first, 3, 3)
        layer(f"{half}.conv_out", *last, 3, 3)
        layer(f"{half}.norm_out", last[1])
        for part in ("block_1", "block_2"):
            block(f"{half}.mid.{part}", widths[-1], widths[-1])
        layer(f"{half}.mid.attn_1.norm", widths[-1])
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{half}.mid.attn_1.{part}", widths[-1], widths[-1], 1, 1)
    for level, after in enumerate(widths):
        above = widths[min(level + 1, len(widths) - 1)]
        for i in range(num_blocks):
            block(f"encoder.down.{level}.block.{i}", after if i else widths[max(level - 1, 0)], after)
        for i in range(num_blocks + 1):
            block(f"decoder.up.{level}.block.{i}", after if i else above, after)
        if level + 1 < len(widths):
            layer(f"encoder.down.{level}.downsample.conv", after, after, 3, 3)
        if level:
            layer(f"decoder.up.{level}.upsample.conv", after, after, 3, 3)
    return shapes


def flux_weights() -> dict[str, torch.Tensor]:
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, shape in flux_shapes().items():
        fan_in = max(1, int(np.prod(shape[1:])))
        weights[name] = torch.randn(shape, generator=generator) / fan_in**0.5 * (1.0 if len(shape) > 1 else 0.3)
    return weights


@pytest.fixture(scope="module")
def bagel(tmp_path_factory) -> Path:
    """The tiny weights with a whole table of places, a random autoencoder and a tokenizer of words."""
    folder = tmp_path_factory.mktemp("bagel")
    for name in ("llm_config.json", "vit_config.json"):
        shutil.copyfile(FIXTURES / name, folder / name)
    weights = load_file(FIXTURES / "ema.safetensors")
    weights[PLACES] = pad(weights[PLACES], (0, 0, 0, 84)).contiguous()
    save_file(weights, folder / "ema.safetensors")
    save_file(flux_weights(), folder / "ae.safetensors")
    words = {f"w{i}": i for i in range(300)} | SPECIAL
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w299")
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(bagel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert_script.main([str(bagel), str(folder)])
    return folder


@pytest.fixture(scope="module")
def model(converted) -> TransfusionForCausalLMAndDiffusion:
    return TransfusionForCausalLMAndDiffusion.from_pretrained(converted)


@pytest.fixture(scope="module")
def processor(converted):
    return AutoProcessor.from_pretrained(converted)


@pytest.fixture(scope="module")
def twin() -> Bagel:
    weights = {name: value.double() for name, value in load_file(FIXTURES / "ema.safetensors").items()}
    configs = (json.loads((FIXTURES / f"{name}_config.json").read_text()) for name in ("llm", "vit"))
    return Bagel(weights, *configs, tuple(SPECIAL.values()))


@pytest.fixture(scope="module")
def cases() -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / "cases.safetensors")


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-4)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@torch.no_grad()
def test_the_folder_writes_draws_and_answers_as_the_released_code(model, cases, twin):
    """By its own defaults, with the scale and the interval of the release."""
    logits = model(cases["text.ids"][None]).logits[0]
    close(logits, cases["text.logits"])
    twin_logits = twin.logits([Text(cases["text.ids"].tolist())])
    torch.testing.assert_close(logits.double(), twin_logits, rtol=1e-5, atol=1e-5)  # float32 against float64
    noise = latents_of(cases["draw.text4_global.noise"].view(4, 6, 64))[None]
    prompt = {"inputs": cases["text.ids"][None], "generation_mode": "image", "num_inference_steps": 7}
    size = {"height": 64, "width": 96}
    steps = []
    output = model.generate(
        **prompt, **size, init_noise=noise, callback_on_step_end=lambda m, i, t, x: steps.append(x["latents"])
    )
    close(steps[-1][0], cases["draw.text4_global.latents"])
    close(output.images[0][0], model.decode_latents(steps[-1])[0])
    ids = torch.tensor([[BOI, *[VISION] * 6, EOI, *cases["text.ids"].tolist(), START]])
    seen = cases["vit.image"][None]
    answer = model.generate(ids, vision_pixel_values=seen, generation_mode="text", max_new_tokens=11, pad_token_id=0)
    assert answer[0, ids.shape[1] - 1 :].tolist() == cases["answer.ids"].tolist()


@torch.no_grad()
def test_the_autoencoder_is_the_one_of_the_folder(model):
    """The twin of it had the released numbers within 1e-5."""
    reference = FluxAutoencoder(flux_weights())
    image = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    (latents,) = model.encode_images(image[None])
    close(latents[0], reference.encode(image.double()))
    close(model.decode_latents(latents)[0], reference.decode(latents[0].double()))


@torch.no_grad()
def test_an_edit_of_a_picture_is_that_of_the_twin(model, processor, twin):
    """From pixels: the processor resizes for both readers, and the picture stands twice before the text."""
    inputs = processor(text="<|image_pad|>w7 w9", images=[picture(90, 130)])
    latents, pixels = model.encode_images(inputs["pixel_values"])[0][0], inputs["vision_pixel_values"][0]
    assert latents.shape == (16, 12, 16) and pixels.shape == (3, 98, 140)
    block = [BOI, *[IMAGE] * 48, EOI, BOI, *[VISION] * 70, EOI]
    assert inputs["input_ids"].tolist() == [[*block, START, 7, 9, END]]
    noise = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    steps = []
    model.generate(
        **inputs, generation_mode="image", num_inference_steps=2, height=32, width=32, init_noise=noise,
        input_image_guidance_scale=1.5, callback_on_step_end=lambda m, i, t, x: steps.append(x["latents"]),
    )  # fmt: skip
    twin.w[PLACES] = pad(twin.w[PLACES], (0, 0, 0, 100 - len(twin.w[PLACES])))
    shown, text = [Latents(windows_of(latents.double())), Seen(pixels.double())], Text([START, 7, 9, END])
    kwargs = {"text_scale": 4.0, "image_scale": 1.5, "interval": (0.4, 1.0)}
    contexts = {"without_text": shown, "without_images": [text]}
    expected = twin.draw([*shown, text], windows_of(noise[0].double()), num_points=3, **kwargs, **contexts)
    close(steps[-1][0], latents_of(expected))


def test_the_folder_has_the_recipe_of_the_release(model, processor):
    """Texts end at `<|im_end|>`, whatever the tokenizer says; both losses count alike; t is logit-normal."""
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id == END
    assert model.config.diffusion_loss_weight == 1.0
    assert (model.config.timestep_distribution, model.config.train_timestep_shift) == ("logit_normal", 1.0)


def test_without_guidance_the_models_renorm_has_no_place(model):
    ids, kwargs = torch.tensor([[START, 5, END]]), {"num_inference_steps": 2, "height": 32, "width": 32}
    noise = torch.randn(1, 16, 4, 4)
    kwargs |= {"generation_mode": "image", "init_noise": noise, "image_guidance_scale": 1.0}
    output = model.generate(ids, **kwargs)
    assert torch.isfinite(output.images[0][0]).all()
    with pytest.raises(ValueError, match="`guidance_renorm` does nothing without guidance"):
        model.generate(ids, **kwargs, guidance_renorm="global")


def test_texts_between_images_have_their_marks(processor):
    def tokens(text, **kwargs):
        return processor.tokenizer.convert_ids_to_tokens(processor(text=text, **kwargs)["input_ids"][0])

    assert tokens("w1 w2") == ["<|im_start|>", "w1", "w2", "<|im_end|>"]
    assert tokens("w1<|im_end|>") == ["<|im_start|>", "w1", "<|im_end|>"]
    as_it_is = ["<|im_start|>", "w1", "<|im_end|>", "<|im_start|>"]
    assert tokens("".join(as_it_is)) == as_it_is
    assert tokens("w1<|vision_start|>") == ["<|im_start|>", "w1", "<|im_end|>", "<|vision_start|>"]
    assert tokens("") == ["<|vision_start|>"]
    for text_format in ("<s>", "{}<e>"):
        with pytest.raises(
            ValueError, match=rf"`text_format` must hold one \{{\}} .* begins a text; got {text_format!r}"
        ):
            TransfusionProcessor(processor.image_processor, processor.tokenizer, **TOKENS, text_format=text_format)
    found = tokens("w1<|image_pad|>w2", images=[picture(64, 64)], read_images_as="latents")
    image = ["<|vision_start|>", *["<|image_pad|>"] * 16, "<|vision_end|>"]
    assert found == ["<|im_start|>", "w1", "<|im_end|>", *image, "<|im_start|>", "w2", "<|im_end|>"]


def test_a_chat_ends_where_the_answer_begins(processor):
    content = [{"type": "image", "image": picture(64, 64)}, {"type": "text", "text": "w5"}]
    messages = [{"role": "system", "content": "w4"}, {"role": "user", "content": content}]
    kwargs = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    options = {"processor_kwargs": {"read_images_as": "vision"}}
    row = processor.apply_chat_template(messages, **kwargs, **options)["input_ids"][0].tolist()
    assert row == [START, 4, END, BOI, *[VISION] * 100, EOI, START, 5, END, START]
    messages.append({"role": "assistant", "content": "w6 w7"})
    full = TransfusionDataCollator(processor, assistant_only_loss=True)([{"messages": messages}])
    assert full["input_ids"][0, -4:].tolist() == [START, 6, 7, END]
    assert full["labels"][0].tolist()[-4:] == [-100, 6, 7, END] and int((full["labels"] != -100).sum()) == 3


def test_thinking_and_drawing_are_one_call(model, processor):
    """After the thought the image begins, and after the image the row ends; both by a bias of the library."""
    inputs = processor(text="<|im_start|>w1<|im_end|><|im_start|>w2<|im_end|><|im_start|>")
    end = processor.tokenizer.pad_token_id
    output = model.generate(
        **inputs, max_new_tokens=60, eos_token_id=end, max_images=1, num_inference_steps=2, height=32, width=32,
        sequence_bias=[[[END, BOI], 1e4], [[EOI, end], 1e4]],
        logits_processor=[Ends(inputs["input_ids"].shape[1] + 3)],
    )  # fmt: skip
    new = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    thought = new.index(END)
    assert thought >= 3 and new[thought + 1 :] == [BOI, *[IMAGE] * 4, EOI, end]
    assert len(output.images[0]) == 1


class Ends:
    """Ends a thought at a column, as random weights never do."""

    def __init__(self, column: int):
        self.column = column

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == self.column:
            scores[:, END] = 1e6
        return scores


def test_all_tools_take_the_folder(converted, tmp_path):
    kwargs = {"num_inference_steps": 2, "height": 32, "width": 32}
    drawn = TransfusionPipeline.from_pretrained(str(converted))("w5 w6", progress_bar=False, **kwargs).images
    assert drawn[0].size == (32, 32)
    pipe = pipeline("any-to-any", model=str(converted))
    content = [{"type": "image", "image": picture(64, 64)}, {"type": "text", "text": "w5"}]
    answer = pipe([{"role": "user", "content": content}], max_new_tokens=3, return_full_text=False)
    assert isinstance(answer[0]["generated_text"], str)
    image = pipe(text="w5", generate_kwargs=kwargs, generation_mode="image")
    assert isinstance(image[0]["generated_image"], Image.Image)


@pytest.mark.parametrize(("mode", "has_picture"), [("draw", False), ("draw", True), ("caption", True), ("chat", True)])
def test_the_page_draws_edits_and_answers(converted, processor, tmp_path, mode, has_picture):
    pytest.importorskip("gradio")
    from transfusion_hf.cli import app

    model = TransfusionForCausalLMAndDiffusion.from_pretrained(converted)
    model.generation_config.update(height=32, width=32)
    app.make_app(model, processor)
    picture(64, 64).save(tmp_path / "picture.png")
    message = {"text": "w5 w6", "files": [str(tmp_path / "picture.png")] if has_picture else []}
    settings = (2, 4.0, 0, "FlowMatchEulerDiscreteScheduler", 6, 1)
    *_, last = app.respond(model, processor, message, [], mode, *settings)
    (answer,) = last[-1]["content"]
    assert answer["path"].endswith("-2.png") if mode == "draw" else len(answer.split()) == 6


def test_lora_on_the_image_weights_learns_and_leaves_the_text_as_it_is(converted, processor, tmp_path):
    model = TransfusionForCausalLMAndDiffusion.from_pretrained(converted)
    ids = torch.tensor([[START, 5, 6, END]])
    before = model(ids).logits
    targets = r".*\.image\.(self_attn|mlp)\.\w+_proj"
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    sample = {"text": "w5<|image_pad|>", "image": picture(64, 64)}
    edit = {"text": "<|image_pad|>w5<|image_pad|>", "images": [picture(64, 64), picture(64, 64, 1)]}
    edit["image_loss_mask"] = [False, True]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to="none",
        remove_unused_columns=False, learning_rate=1e-2,
    )  # fmt: skip
    trainer = TransfusionTrainer(adapted, arguments, TransfusionDataCollator(processor), train_dataset=[sample, edit])
    assert np.isfinite(trainer.train().training_loss)
    merged = adapted.merge_and_unload().eval()
    assert torch.equal(merged(ids).logits, before)
    weight = merged.model.language_model.layers[0].image.mlp.up_proj.weight
    assert not torch.equal(weight, load_file(converted / "model.safetensors")[
        "model.language_model.layers.0.image.mlp.up_proj.weight"
    ])  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_names_and_bits_come_back(bagel, tmp_path, dtype):
    expected = load_file(bagel / "ema.safetensors")
    source = tmp_path / "source"
    shutil.copytree(bagel, source)
    if dtype == "bfloat16":
        expected = {name: value.bfloat16() for name, value in expected.items()}
        save_file(expected, source / "ema.safetensors")
    convert_script.main([str(source), str(tmp_path / "model"), "--max_shard_size", "500KB"])
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
    export_bagel(tmp_path / "model", tmp_path / "back")
    found = load_file(tmp_path / "back" / "ema.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    again = tmp_path / "again"
    shutil.copytree(bagel, again)
    for name in ("ema.safetensors", "llm_config.json", "vit_config.json"):
        shutil.copyfile(tmp_path / "back" / name, again / name)
    convert_bagel(again, tmp_path / "second")
    first = TransfusionForCausalLMAndDiffusion.from_pretrained(tmp_path / "model")
    second = TransfusionForCausalLMAndDiffusion.from_pretrained(tmp_path / "second")
    for (name, one), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_a_fine_tune_in_one_file_or_in_shards_is_converted(bagel, converted, tmp_path):
    source, weights = tmp_path / "source", load_file(bagel / "ema.safetensors")
    shutil.copytree(bagel, source, ignore=lambda *_: ["ema.safetensors"])
    shutil.copyfile(bagel / "ema.safetensors", source / "model.safetensors")
    convert_bagel(source, tmp_path / "from_one_file")
    (source / "model.safetensors").unlink()
    names = sorted(weights)
    files = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, members in files.items():
        save_file({name: weights[name] for name in members}, source / file)
    index = {"metadata": {}, "weight_map": {name: file for file, members in files.items() for name in members}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    convert_bagel(source, tmp_path / "model")
    expected = (converted / "model.safetensors").read_bytes()
    for folder in ("model", "from_one_file"):
        assert (tmp_path / folder / "model.safetensors").read_bytes() == expected


def full_size() -> tuple[dict, dict]:
    """What the released configurations say: Qwen2.5-7B, and SigLIP-so400m on 980 pixels."""
    llm = {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "model_type": "qwen2",
    }  # fmt: skip
    vit = {
        "hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27,
        "patch_size": 14, "model_type": "siglip_vision_model",
    }  # fmt: skip
    return llm, vit


def released_shapes(llm: dict, vit: dict) -> dict[str, tuple[int, ...]]:
    """All tensors of the release by name and shape, written from the facts about it."""
    hidden, wide, kv = llm["hidden_size"], llm["intermediate_size"], 4 * 128
    shapes: dict[str, tuple[int, ...]] = {
        "language_model.model.embed_tokens.weight": (152064, hidden),
        "language_model.lm_head.weight": (152064, hidden),
        "vae2llm.weight": (hidden, 64), "vae2llm.bias": (hidden,),
        "llm2vae.weight": (64, hidden), "llm2vae.bias": (64,),
        "time_embedder.mlp.0.weight": (hidden, 256), "time_embedder.mlp.0.bias": (hidden,),
        "time_embedder.mlp.2.weight": (hidden, hidden), "time_embedder.mlp.2.bias": (hidden,),
        "latent_pos_embed.pos_embed": (64 * 64, hidden), "vit_pos_embed.pos_embed": (70 * 70, hidden),
        "connector.fc1.weight": (hidden, 1152), "connector.fc1.bias": (hidden,),
        "connector.fc2.weight": (hidden, hidden), "connector.fc2.bias": (hidden,),
        "vit_model.vision_model.embeddings.patch_embedding.weight": (1152, 14 * 14 * 3),
        "vit_model.vision_model.embeddings.patch_embedding.bias": (1152,),
        "vit_model.vision_model.embeddings.position_embedding.weight": (4900, 1152),
        "vit_model.vision_model.post_layernorm.weight": (1152,), "vit_model.vision_model.post_layernorm.bias": (1152,),
    }  # fmt: skip
    for kind in ("", "_moe_gen"):
        shapes[f"language_model.model.norm{kind}.weight"] = (hidden,)
        for i in range(28):
            layer = f"language_model.model.layers.{i}"
            shapes[f"{layer}.input_layernorm{kind}.weight"] = (hidden,)
            shapes[f"{layer}.post_attention_layernorm{kind}.weight"] = (hidden,)
            for part, rows in (("q", hidden), ("k", kv), ("v", kv)):
                shapes[f"{layer}.self_attn.{part}_proj{kind}.weight"] = (rows, hidden)
                shapes[f"{layer}.self_attn.{part}_proj{kind}.bias"] = (rows,)
            shapes[f"{layer}.self_attn.o_proj{kind}.weight"] = (hidden, hidden)
            for part in ("q", "k"):
                shapes[f"{layer}.self_attn.{part}_norm{kind}.weight"] = (128,)
            for part in ("gate", "up"):
                shapes[f"{layer}.mlp{kind}.{part}_proj.weight"] = (wide, hidden)
            shapes[f"{layer}.mlp{kind}.down_proj.weight"] = (hidden, wide)
    for i in range(26):  # one fewer than the configuration says
        layer = f"vit_model.vision_model.encoder.layers.{i}"
        for part in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}.{part}.weight": (1152,), f"{layer}.{part}.bias": (1152,)}
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{layer}.self_attn.{part}.weight": (1152, 1152), f"{layer}.self_attn.{part}.bias": (1152,)}
        shapes |= {f"{layer}.mlp.fc1.weight": (4304, 1152), f"{layer}.mlp.fc1.bias": (4304,)}
        shapes |= {f"{layer}.mlp.fc2.weight": (1152, 4304), f"{layer}.mlp.fc2.bias": (1152,)}
    return shapes


def test_every_tensor_of_the_release_has_its_place():
    llm, vit = full_size()
    ids = {"image_start_token_id": 1, "image_token_id": 2, "image_end_token_id": 3, "vision_token_id": 4}
    config = bagel_config(llm, vit, 64, 70, **ids)
    with torch.device("meta"):
        model = TransfusionForCausalLMAndDiffusion(config)
    expected = released_shapes(llm, vit)
    own = model.state_dict()
    found = {bagel_name(name): tuple(tensor.shape) for name, tensor in own.items() if bagel_name(name)}
    found |= {LATENT_TABLE: (4096, 3584), VISION_TABLE: (4900, 3584)}
    found["vit_model.vision_model.embeddings.patch_embedding.weight"] = (1152, 588)  # a convolution here
    assert found == expected
    assert all(transfusion_name(bagel_name(name)) == name for name in own if bagel_name(name))
    added = [name for name in own if bagel_name(name) is None]
    assert len(added) == 2 * 28 and all(name.endswith("o_proj.bias") for name in added)
    assert sum(p.numel() for p in model.parameters()) == 14_575_219_168


def test_the_autoencoder_of_the_release_has_its_place(tmp_path):
    """FLUX's, at full size and in bfloat16: each tensor of its authors' layout becomes one of diffusers'."""
    shapes = flux_shapes(128, (1, 2, 4, 4), num_blocks=2)
    assert sum(np.prod(shape) for shape in shapes.values()) == 83_819_683
    weights = {name: torch.full(shape, i, dtype=torch.bfloat16) for i, (name, shape) in enumerate(shapes.items())}
    save_file(weights, tmp_path / "ae.safetensors")
    state = load_flux_autoencoder(tmp_path / "ae.safetensors").state_dict()
    assert sorted(int(tensor.flatten()[0]) for tensor in state.values()) == [*range(len(shapes))]


@pytest.mark.slow
def test_a_conversion_holds_a_shard_and_the_autoencoder_at_a_time(bagel, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(bagel, source)
    config = json.loads((source / "llm_config.json").read_text()) | {"vocab_size": 400_000}
    (source / "llm_config.json").write_text(json.dumps(config))
    weights = load_file(source / "ema.safetensors")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        weights[name] = torch.zeros(400_000, 64)
    for i, part in enumerate((sorted(weights)[::2], sorted(weights)[1::2])):
        save_file({name: weights[name] for name in part}, source / f"model-{i}.safetensors")
    names = {name: f"model-{i}.safetensors" for i in (0, 1) for name in sorted(weights)[i::2]}
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (source / "ema.safetensors").unlink()
    command = (
        "import sys; from transfusion_hf.conversion.bagel import convert_bagel; "
        "peak = lambda: int(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM'))); "
        "before = peak(); convert_bagel(*sys.argv[1:], max_shard_size='20MB'); print(1024 * (peak() - before))"
    )
    arguments = [sys.executable, "-c", command, str(source), str(tmp_path / "model")]
    printed = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    largest = 4 * 400_000 * 64  # of the two tensors of 102 MB
    grown = int(printed.split()[-1])
    assert largest < grown < 2 * largest, f"{grown / 1e6:.0f} MB"  # 258 MB in one shard, 154 MB in many


def changed(bagel: Path, folder: Path, **changes) -> Path:
    """A copy with other files: `None` removes one, a dict changes JSON, a function weights."""
    shutil.copytree(bagel, folder)
    for name, change in changes.items():
        file = folder / f"{name}.{'json' if name.endswith(('config', 'tokenizer')) else 'safetensors'}"
        if change is None:
            file.unlink()
        elif isinstance(change, dict):
            file.write_text(json.dumps(json.loads(file.read_text()) | change))
        elif isinstance(change, str):
            file.write_text(change)
        else:
            weights = load_file(file)
            change(weights)
            save_file(weights, file)
    return folder


def reshape(weights):
    weights["vae2llm.weight"] = weights["vae2llm.weight"][:, :-1].contiguous()


def narrow(weights):
    weights["decoder.conv_in.weight"] = weights["decoder.conv_in.weight"][:, :8].contiguous()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema": None}, r"lacks ema\.safetensors; a BAGEL holds llm_config\.json, vit_config\.json, ema\.safetensors"),
        ({"vit_config": None, "ae": None}, r"lacks vit_config\.json, ae\.safetensors"),
        ({"llm_config": "{"}, r"llm_config\.json is cut off or no JSON"),
        ({"llm_config": "{}"}, r"llm_config\.json lacks vocab_size, hidden_size, intermediate_size, num_hi"),
        ({"vit_config": "{}"}, r"vit_config\.json lacks hidden_size, .* patch_size, num_hidden_layers; take that"),
        ({"ema": "xx"}, r"ema\.safetensors is missing, cut off or no safetensors"),
        ({"ae": "xx"}, r"ae\.safetensors is not the autoencoder of FLUX, or damaged"),
        ({"ae": narrow}, "is not the autoencoder of FLUX.*it has 8 channels, not 16"),
        ({"ae": lambda w: w.pop("decoder.mid.attn_1.q.weight")}, "is not the autoencoder of FLUX, or damaged"),
        ({"vit_config": {"model_type": "clip_vision_model"}}, "`model_type` of vit_config.json must be 'siglip"),
        ({"vit_config": {"hidden_act": "gelu"}}, "must be 'gelu_pytorch_tanh'; got 'gelu'"),
        ({"vit_config": {"num_hidden_layers": 4}}, r"Tensors missing: vit_model\.vision_model\.encoder\.layers\.2"),
        ({"llm_config": {"model_type": "llama"}}, "`model_type` of llm_config.json must be 'qwen2'; got 'llama'"),
        ({"llm_config": {"tie_word_embeddings": True}}, "`tie_word_embeddings` of llm_config.json must be False"),
        ({"llm_config": {"rope_scaling": {"type": "yarn"}}}, "`rope_scaling` of llm_config.json must be None; got"),
        ({"llm_config": {"qk_norm": False}}, "`qk_norm` of llm_config.json must be True; got False"),
        ({"llm_config": {"num_attention_heads": 0}}, "`num_attention_heads` of llm_config.json must be a positive in"),
        ({"llm_config": None}, r"lacks llm_config\.json; a BAGEL holds"),
        ({"tokenizer_config": None, "tokenizer": None}, "source has no tokenizer, or a damaged one; copy that of"),
        ({"ae": lambda w: w.update({"encoder.x": torch.zeros(1)})}, "it holds 177 tensors, and that of FLUX 176"),
        ({"llm_config": {"num_hidden_layers": 2}}, r"unknown: language_model\.model\.layers\.2"),
        ({"ema": lambda w: w.pop("connector.fc1.bias")}, r"Tensors missing: connector\.fc1\.bias \(1 in all\)"),
        ({"ema": lambda w: w.update(other=torch.zeros(1))}, r"unknown: other \(1 in all\)"),
        ({"ema": reshape}, r"of another shape: vae2llm\.weight"),
        ({"ema": lambda w: w.pop(LATENT_TABLE)}, r"latent_pos_embed\.pos_embed must be a square .* it is missing"),
        ({"ema": lambda w: w[VISION_TABLE].add_(0.01)}, r"vit_pos_embed\.pos_embed differs by 0\.01 from the sines"),
        ({"llm_config": {"vocab_size": 304}}, "has 307 tokens but the model 304 rows"),
    ],
)  # fmt: skip
def test_what_is_no_bagel_is_refused_before_anything_is_written(bagel, tmp_path, changes, message):
    source = changed(bagel, tmp_path / "source", **changes)
    with pytest.raises(ValueError, match=message):
        convert_bagel(source, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_model_that_bagel_cannot_hold_is_refused(converted, tmp_path):
    model = TransfusionForCausalLMAndDiffusion.from_pretrained(converted)
    with torch.no_grad():
        model.model.language_model.layers[1].self_attn.o_proj.bias[3] = 1.0
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.o_proj\.bias is not 0, and BAGEL has no such bias"):
        export_script.main([str(tmp_path / "trained"), str(tmp_path / "back")])
    with pytest.raises(ValueError, match="is not in BAGEL's form: a Qwen3 with biases"):
        export_bagel(Path(__file__).parent / "fixtures" / "tiny-transfusion", tmp_path / "back")
    assert not (tmp_path / "back").exists()


DRAW = {"generation_mode": "image", "num_inference_steps": 3, "height": 32, "width": 32}


def drawing(model) -> torch.Tensor:
    noise = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    return model.generate(torch.tensor([[START, 5, 6, END]]), init_noise=noise, **DRAW).images[0][0]


def test_both_halves_in_4_bits_draw_nearly_the_same(converted, model):
    parts = ["model.vision_encoder", "model.patch_encoder", "model.patch_decoder", "lm_head"]
    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    quantization = TorchAoConfig(config, modules_to_not_convert=parts)
    small = TransfusionForCausalLMAndDiffusion.from_pretrained(converted, quantization_config=quantization)
    layer = small.model.language_model.layers[0]
    for half in (layer, layer.image):
        assert (
            "Intx" in type(half.mlp.up_proj.weight).__name__ and "Intx" in type(half.self_attn.q_proj.weight).__name__
        )
    for linear in (small.lm_head, small.model.patch_encoder.proj, small.model.vision_encoder.linear_1):
        assert type(linear.weight) is torch.nn.Parameter
    expected, found = drawing(model), drawing(small)
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < 0.5


def test_weights_on_the_disk_draw_the_same(converted, model, tmp_path):
    where = {"model.language_model.layers.0": "cpu", "model.language_model.layers.1": "disk"}
    rest = ["model.language_model.layers.2", "model.language_model.embed_tokens", "model.language_model.norm"]
    rest += ["model.language_model.image", "model.language_model.rotary_emb", "lm_head", "vae"]
    rest += ["model.patch_encoder", "model.patch_decoder", "model.vision_encoder"]
    where |= dict.fromkeys(rest, "cpu")
    offloaded = TransfusionForCausalLMAndDiffusion.from_pretrained(
        converted, device_map=where, offload_folder=str(tmp_path)
    )
    assert offloaded.model.language_model.layers[1].image.mlp.up_proj.weight.is_meta
    assert torch.equal(drawing(offloaded), drawing(model))


def test_a_pipeline_offloads_the_model_between_drawings(converted, model):
    pipe = TransfusionPipeline.from_pretrained(str(converted))
    kwargs = {"prompt": "w5 w6", "num_inference_steps": 2, "height": 32, "width": 32, "output_type": "pt"}
    pair = []
    for is_offloaded in (False, True):
        if is_offloaded:
            pipe.enable_model_cpu_offload(device="cpu")
        pair.append(pipe(**kwargs, generator=torch.Generator().manual_seed(0), progress_bar=False).images)
    assert torch.equal(*pair)
