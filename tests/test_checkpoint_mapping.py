"""Language models that become Transfusions, in memory and shard by shard."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_modeling import FAMILIES
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    Gemma3Config,
    GgufConfig,
    LlamaConfig,
    LlavaConfig,
    T5Config,
)

from transfusion_hf import TransfusionForCausalLMAndDiffusion, TransfusionProcessor, set_trainable
from transfusion_hf.configuration_transfusion import IMAGE_TOKEN_IDS
from transfusion_hf.conversion.causal_lm import convert_causal_lm, transfusion_key
from transfusion_hf.conversion.export import extract_causal_lm

for scripts in ("conversion", "examples"):
    sys.path.insert(0, str(Path(__file__).parents[1] / scripts))
import convert_causal_lm as script  # noqa: E402
import quickstart  # noqa: E402

IMAGES = {"latent_channels": 2, "sample_size": 8}


@pytest.fixture(scope="module")
def tokenizer():
    return quickstart.train_tokenizer()


def causal_lm(name: str = "llama", **kwargs):
    torch.manual_seed(0)
    overrides = FAMILIES.get(name, {}) | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | kwargs
    return AutoModelForCausalLM.from_config(tiny.text_config(name.removesuffix("-tied"), **overrides)).eval()


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A small Llama in several shards, with its tokenizer."""
    folder = tmp_path / "llama"
    causal_lm(vocab_size=len(tokenizer)).save_pretrained(folder, max_shard_size="40KB")
    tokenizer.save_pretrained(folder)
    return folder


def same_text(original, converted, ids: torch.Tensor) -> None:
    size = original.config.vocab_size
    assert torch.equal(converted(ids).logits[..., :size], original(ids).logits)
    kwargs = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(converted.generate(ids, generation_mode="text", **kwargs), original.generate(ids, **kwargs))


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi", "cohere"])
def test_a_language_model_says_as_a_transfusion_what_it_said(tmp_path, name):
    original = causal_lm(name)
    original.save_pretrained(tmp_path)
    converted = TransfusionForCausalLMAndDiffusion.from_causal_lm(str(tmp_path), **IMAGES)
    assert not converted.training and converted.config.text_config.vocab_size == 67
    ids = torch.randint(3, 60, (2, 9))
    same_text(original, converted, ids)
    converted.save_pretrained(tmp_path / "converted")
    same_text(original, TransfusionForCausalLMAndDiffusion.from_pretrained(tmp_path / "converted"), ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_shard_by_shard_is_what_it_is_in_memory(tmp_path, tokenizer, name):
    original = causal_lm(name, vocab_size=len(tokenizer))
    original.save_pretrained(tmp_path / "lm", max_shard_size="20KB")
    kwargs = {"tokenizer": quickstart.train_tokenizer(), "pad_to_multiple_of": 16}
    convert_causal_lm(tmp_path / "lm", tmp_path / "converted", **kwargs, **IMAGES)
    converted = TransfusionForCausalLMAndDiffusion.from_pretrained(tmp_path / "converted")
    ids = torch.randint(3, 60, (2, 9))
    assert torch.equal(converted(ids).logits[..., : len(tokenizer)], original(ids).logits)
    # And back, bit for bit.
    expected, back = original.state_dict(), extract_causal_lm(converted, len(tokenizer)).state_dict()
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], value) for name, value in expected.items())

    in_memory = TransfusionForCausalLMAndDiffusion.from_causal_lm(original, pad_to_multiple_of=16, **IMAGES)
    TransfusionProcessor.for_model(in_memory, quickstart.train_tokenizer())
    assert converted.config.text_config.vocab_size == in_memory.config.text_config.vocab_size == 320
    for name, value in converted.state_dict().items():
        if "patch" not in name:
            assert torch.equal(value, in_memory.state_dict()[name]), name
    written, made = (model.generation_config.to_diff_dict() for model in (converted, in_memory))
    assert {k: v for k, v in written.items() if v is not None} == {k: v for k, v in made.items() if v is not None}


def test_new_tokens_are_the_mean_of_the_others_and_the_chosen_token_of_text_stays():
    original = causal_lm("phi")
    with torch.no_grad():
        original.lm_head.bias.normal_()
    before = {name: value.clone() for name, value in original.state_dict().items()}
    converted = TransfusionForCausalLMAndDiffusion.from_causal_lm(original, pad_to_multiple_of=8, **IMAGES)
    assert converted.lm_head.weight.shape[0] == 72
    for name, rows in (
        ("model.embed_tokens.weight", converted.get_input_embeddings().weight),
        ("lm_head.weight", converted.lm_head.weight),
        ("lm_head.bias", converted.lm_head.bias),
    ):
        assert torch.equal(rows[:64], before[name])
        torch.testing.assert_close(rows[64:], before[name].mean(0).expand_as(rows[64:]))


@pytest.mark.parametrize("patch_encoder", ["linear", "unet"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_the_first_step_is_sane(name, patch_encoder):
    # Patches as large as words, and a diffusion loss of the noise itself: 1.
    converted = TransfusionForCausalLMAndDiffusion.from_causal_lm(
        causal_lm(name), patch_encoder=patch_encoder, latent_channels=4, sample_size=16
    )
    words = converted.get_input_embeddings()(torch.arange(64)).square().mean().sqrt()
    noise, t = torch.randn(64, 4, 16, 16), torch.randint(1000, (64,))
    (patches,), _ = converted.model.patch_encoder([noise], t)
    torch.testing.assert_close(patches.square().mean().sqrt(), words, rtol=0.15, atol=0)
    ids = torch.tensor([[5, 64] + [65] * 64 + [66]])
    output = converted.train()(ids, latents=noise[:1], labels=torch.where(ids < 65, ids, -100))
    assert output.diffusion_loss.item() == pytest.approx(1, abs=0.15)
    assert torch.isfinite(output.loss)


def test_fields_and_arguments_of_loading_are_told_apart(tmp_path):
    causal_lm().save_pretrained(tmp_path)
    converted = TransfusionForCausalLMAndDiffusion.from_causal_lm(
        tmp_path, dtype=torch.bfloat16, attn_implementation="eager", prediction_type="sample", **IMAGES
    )
    assert converted.dtype == converted.model.patch_decoder.proj.weight.dtype == torch.bfloat16
    assert converted.model.patch_encoder.timestep_embedding.mlp.linear_1.weight.dtype == torch.float32
    assert converted.config.prediction_type == "sample"
    assert converted.config.text_config._attn_implementation == "eager"


def test_any_of_the_image_tokens_may_be_a_spare_row():
    for name in ("image_start_token_id", "image_token_id", "image_end_token_id"):
        converted = TransfusionForCausalLMAndDiffusion.from_causal_lm(causal_lm(), **{name: 5}, **IMAGES)
        ids = [getattr(converted.config, each) for each in IMAGE_TOKEN_IDS]
        assert getattr(converted.config, name) == 5 and len(converted.get_input_embeddings().weight) == max(ids) + 1


@pytest.mark.parametrize("name", ["vae_config", "vision_config"])
def test_parts_that_a_language_model_lacks_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` would have no weights"):
        TransfusionForCausalLMAndDiffusion.from_causal_lm(causal_lm(), **{name: {}}, **IMAGES)


def test_the_ends_of_a_chat_model_stay(tokenizer):
    original = causal_lm(vocab_size=len(tokenizer))
    original.generation_config.update(eos_token_id=[2, 7], temperature=0.6, do_sample=True)
    converted = TransfusionForCausalLMAndDiffusion.from_causal_lm(original, **IMAGES)
    TransfusionProcessor.for_model(converted, quickstart.train_tokenizer())
    assert converted.generation_config.eos_token_id == [2, 7] and converted.generation_config.temperature == 0.6
    assert converted.generation_config.num_inference_steps == 250


def test_the_command_converts_attaches_a_vae_and_checks(tmp_path, folder, capsys):
    vae = AutoencoderKL(
        block_out_channels=[8, 8], down_block_types=["DownEncoderBlock2D"] * 2, norm_num_groups=2, latent_channels=4,
        up_block_types=["UpDecoderBlock2D"] * 2, scaling_factor=0.5, shift_factor=0.1,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    output = tmp_path / "converted"
    script.main([
        str(folder), str(output), "--vae", str(tmp_path / "vae"), "--sample_size", "16", "--dtype", "bfloat16",
        "--image_token", "<picture>", "--set", "prediction_type=v_prediction", "diffusion_loss_weight=2.5",
    ])  # fmt: skip
    model, processor = (kind.from_pretrained(output) for kind in (TransfusionForCausalLMAndDiffusion, AutoProcessor))
    assert model.config.diffusion_loss_weight == 2.5 and model.config.prediction_type == "v_prediction"
    assert model.dtype == torch.bfloat16 and model.vae.dtype == torch.float32
    assert all(torch.equal(value, vae.state_dict()[name]) for name, value in model.vae.state_dict().items())
    assert processor.image_token == "<picture>" and processor.image_token_id == model.config.image_token_id
    output = model.generate(**processor(text=["a"]), generation_mode="image", num_inference_steps=2)
    assert output.images[0][0].shape == (3, 16, 16)

    script.main([str(folder), str(tmp_path / "checked"), "--sample_size", "8", "--check"])
    assert "largest difference of the text logits: 0\n" in capsys.readouterr().out


def test_the_command_measures_the_scale_of_an_autoencoder_that_has_none(tmp_path, folder, capsys):
    vae = AutoencoderKL(
        block_out_channels=[8, 8], down_block_types=["DownEncoderBlock2D"] * 2, norm_num_groups=2, latent_channels=8,
        up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "pictures").mkdir()
    noise = torch.randint(256, (3, 20, 24, 3), dtype=torch.uint8)
    for i, pixels in enumerate(noise.numpy()):
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")
    output = tmp_path / "converted"
    command = [str(folder), str(output), "--vae", str(tmp_path / "vae"), "--sample_size", "16"]
    with pytest.raises(SystemExit):
        script.main([*command[:-1], "17"])
    assert "--sample_size must be a multiple of 2 with this autoencoder; got 17" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"0\.18215.*not 8; measure it with .* `--measure_vae_scale`"):
        script.main(command)
    assert not output.exists()
    with pytest.raises(
        ValueError, match=r"\['photo'\] not in the dataset. (Current c|C)olumns in the dataset: \['image'\]"
    ):
        script.main([*command, "--measure_vae_scale", str(tmp_path / "pictures"), "--image_column", "photo"])
    script.main([*command, "--measure_vae_scale", str(tmp_path / "pictures")])
    model, processor = (kind.from_pretrained(output) for kind in (TransfusionForCausalLMAndDiffusion, AutoProcessor))
    latents = model.encode_images(processor.image_processor(list(map(Image.fromarray, noise.numpy())))["pixel_values"])
    assert latents[0].mean().item() == pytest.approx(0, abs=1e-4)
    assert latents[0].std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert f"a scale of {model.vae.config.scaling_factor:.5g}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        script.main([*command[:2], "--measure_vae_scale", "pictures"])


def test_a_head_of_its_own_where_the_configuration_says_tied_is_an_error(tmp_path, tokenizer):
    original = causal_lm(vocab_size=len(tokenizer))
    original.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    config = AutoConfig.from_pretrained(tmp_path / "lm")
    config.tie_word_embeddings = True
    config.save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match=r"`tie_word_embeddings` is true, but lm_head.weight differs"):
        convert_causal_lm(tmp_path / "lm", tmp_path / "converted")


def spoil_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def spoil_shard(folder: Path) -> None:
    file = folder / "model-00002-of-00004.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def spoil_missing_shard(folder: Path) -> None:
    (folder / "model-00002-of-00004.safetensors").unlink()


def rewrite(folder: Path, change) -> None:
    file = folder / "model-00001-of-00004.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def spoil_dtype(folder: Path) -> None:
    rewrite(folder, lambda tensors: {name: value.to(torch.int8) for name, value in tensors.items()})


def spoil_name(folder: Path) -> None:
    rewrite(folder, lambda tensors: {name.replace("model.", "modle."): value for name, value in tensors.items()})
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    names = [name for file in folder.glob("*.safetensors") for name in safe_open(file, "pt").keys()]
    assert set(weight_map) != set(names)
    index.write_text(json.dumps({"weight_map": {
        name: file.name for file in folder.glob("*.safetensors") for name in safe_open(file, "pt").keys()
    }}))  # fmt: skip


def spoil_shape(folder: Path) -> None:
    rewrite(folder, lambda tensors: {name: value[..., :-1].contiguous() for name, value in tensors.items()})


def set_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_index, "holds neither model.safetensors nor model.safetensors.index.json; found: model-00001"),
        (spoil_shard, r"model-00002-of-00004.safetensors is missing, cut off or no safetensors"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_'), "is cut off or no index"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "is cut off or no index"),
        (spoil_missing_shard, r"model-00002-of-00004.safetensors is missing, cut off or no safetensors"),
        (spoil_dtype, "is of type I8; expected one of F64, F32, F16, BF16"),
        (spoil_name, r"missing: .*model.*\d+ in all\); unknown: modle"),
        (spoil_shape, r"of another shape: "),
        (lambda folder: set_config(folder, model_type="t5"), "'t5' is not supported"),
        (lambda folder: set_config(folder, model_type="llava"), "'llava' is not supported"),
        (lambda folder: set_config(folder, model_type="gemma3"), "'gemma3' is not supported"),
        (lambda folder: set_config(folder, quantization_config={"quant_method": "gptq", "bits": 4}), "quantised"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_named_and_nothing_is_written(tmp_path, folder, spoil, message):
    assert len(list(folder.glob("*.safetensors"))) == 4
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        convert_causal_lm(folder, tmp_path / "converted", **IMAGES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, folder):
    clash = quickstart.train_tokenizer()
    clash.add_tokens(["<image>"])
    large = quickstart.train_tokenizer()
    large.add_tokens([f"<{i}>" for i in range(50)])
    for tokenizer, message in (
        (clash, "`tokenizer` already has <image>; choose other names"),
        (large, "`tokenizer` has 355 tokens but the model 305"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_causal_lm(folder, tmp_path / "converted", tokenizer=tokenizer, **IMAGES)


def test_a_tokenizer_of_another_model_of_the_same_size_is_refused(tmp_path, folder, tokenizer):
    rows = tokenizer.backend_tokenizer.to_str()
    vocabulary = json.loads(rows)
    tokens = vocabulary["model"]["vocab"]
    (a, i), (b, j) = list(tokens.items())[-2:]
    tokens[a], tokens[b] = j, i
    other = type(tokenizer)(tokenizer_object=Tokenizer.from_str(json.dumps(vocabulary)), pad_token="<pad>")
    assert len(other) == len(tokenizer)
    with pytest.raises(ValueError, match="is that of another model: 2 tokens of the model's own have other ids in it"):
        convert_causal_lm(folder, tmp_path / "converted", tokenizer=other, **IMAGES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


@pytest.mark.parametrize("num_tokens", [-40, 1])
def test_rows_and_tokens_may_differ_in_number(tmp_path, num_tokens):
    """Qwen2.5 has spare rows, and Gemma 3 of 1B a token more than rows."""
    tokenizer = quickstart.train_tokenizer()
    original = causal_lm(vocab_size=len(tokenizer) - num_tokens)
    original.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    convert_causal_lm(tmp_path / "lm", tmp_path / "converted", **IMAGES)
    converted = TransfusionForCausalLMAndDiffusion.from_pretrained(tmp_path / "converted")
    same_text(original, converted, torch.randint(3, 60, (2, 9)))
    assert converted.config.image_start_token_id >= len(quickstart.train_tokenizer())
    rows = converted.get_input_embeddings().weight
    assert torch.equal(rows[: len(original.lm_head.weight)], original.get_input_embeddings().weight)
    assert len(rows) == max(len(original.lm_head.weight), len(quickstart.train_tokenizer()) + 3)


def test_in_memory_a_checkpoint_must_be_whole_too(tmp_path, folder):
    rewrite(folder, lambda tensors: {f"{name}_": value for name, value in tensors.items()})
    with pytest.raises(ValueError, match=r"does not fit its configuration. Tensors missing: .*; unknown: "):
        TransfusionForCausalLMAndDiffusion.from_causal_lm(folder, **IMAGES)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"predction_type": "sample"}, "TransfusionConfig has no field `predction_type`"),
        ({"dtype": "bfloat16"}, "`dtype` must be one of torch.float64"),
        ({"dtype": torch.int8}, "`dtype` must be one of torch.float64"),
    ],
)
def test_arguments_that_are_none_are_refused(tmp_path, folder, kwargs, message):
    with pytest.raises(ValueError, match=message):
        convert_causal_lm(folder, tmp_path / "converted", **kwargs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


def test_a_generation_config_that_cannot_be_saved_is_refused_before_anything_is_written(tmp_path, folder):
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9}')
    with pytest.raises(ValueError, match=r"generation_config.json could not be saved again; correct it"):
        convert_causal_lm(folder, tmp_path / "parent" / "converted", **IMAGES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


def test_a_link_to_an_empty_folder_is_written_through(tmp_path, folder):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    convert_causal_lm(folder, tmp_path / "link", **IMAGES)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "config.json").exists()
    assert str(tmp_path) not in (tmp_path / "real" / "config.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "llama", "real"]


@pytest.mark.parametrize("config", [LlavaConfig(), Gemma3Config(), T5Config()], ids=lambda config: config.model_type)
def test_what_is_no_decoder_is_named(tmp_path, folder, config):
    config.save_pretrained(folder)
    with pytest.raises(ValueError, match=f"'{config.model_type}' is not supported"):
        convert_causal_lm(folder, tmp_path / "converted", **IMAGES)


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path, folder):
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        convert_causal_lm(folder, tmp_path / "converted", **IMAGES)
    assert [path.name for path in (tmp_path / "converted").iterdir()] == ["mine.txt"]


def test_what_stops_half_way_leaves_nothing(tmp_path, folder, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("transfusion_hf.conversion.causal_lm.save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        convert_causal_lm(folder, tmp_path / "converted", **IMAGES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


@pytest.mark.slow
def test_a_checkpoint_larger_than_the_memory_allowed_converts(tmp_path, tokenizer):
    # 1.1 billion parameters in bfloat16 and files of about 0.5 GB.
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config).state_dict()
    assert sum(value.numel() for value in tensors.values()) > 1e9
    source, weight_map, shards = tmp_path / "lm", {}, [{}]
    source.mkdir()
    for name, value in tensors.items():
        if sum(2 * v.numel() for v in shards[-1].values()) > 400e6:
            shards.append({})
        shards[-1][name] = value
    for i, shard in enumerate(shards):
        made = {name: torch.randn(value.shape, dtype=torch.bfloat16) for name, value in shard.items()}
        save_file(made, source / f"model-{i}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, f"model-{i}.safetensors")
        del made
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config.save_pretrained(source)
    grown = quickstart.train_tokenizer()
    grown.add_tokens([f"<{i}>" for i in range(32_000 - len(grown))])
    grown.save_pretrained(source)

    # `ru_maxrss` of a child begins with that of its parent.
    command = (
        "import sys; from transfusion_hf.conversion.causal_lm import convert_causal_lm; "
        "convert_causal_lm(*sys.argv[1:], latent_channels=3, sample_size=64); "
        "print(*(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    arguments = [sys.executable, "-c", command, str(source), str(tmp_path / "converted")]
    printed = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", printed)[1])
    largest = max(file.stat().st_size for file in source.glob("*.safetensors"))
    print(f"peak {peak / 1e9:.2f} GB, largest file {largest / 1e9:.2f} GB")
    assert peak <= 1.3 * largest + 1e9
    for name in ("model.layers.21.mlp.up_proj.weight", "lm_head.weight", "model.embed_tokens.weight"):
        weight_map = json.loads((tmp_path / "converted" / "model.safetensors.index.json").read_text())["weight_map"]
        before, after = (
            load_file(folder / files[key])[key]
            for folder, files, key in (
                (source, {name: f"model-{i}.safetensors" for i, shard in enumerate(shards) for name in shard}, name),
                (tmp_path / "converted", weight_map, transfusion_key(name)),
            )
        )
        assert torch.equal(after[: len(before)], before)


@pytest.fixture
def gguf_file(tmp_path, tokenizer) -> Path:
    """A small Llama in 8 bits with its tokenizer, as llama.cpp writes them."""
    gguf = pytest.importorskip("gguf")
    model = causal_lm(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64)
    config, state = model.config, model.state_dict()
    file = tmp_path / "gguf" / "tiny.Q8_0.gguf"
    file.parent.mkdir()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    made = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(made["vocab"], key=made["vocab"].get))
    writer.add_token_types([3] * 3 + [1] * (len(tokenizer) - 3))  # three special ones
    writer.add_token_merges([" ".join(pair) for pair in made["merges"]])
    for name in ("pad", "bos", "eos"):
        getattr(writer, f"add_{name}_token_id")(getattr(tokenizer, f"{name}_token_id"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in state.items():
        stem, _, kind = name.rpartition(".")
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # its order of the halves of a head
            tensor = tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        array, form = tensor.numpy(), gguf.GGMLQuantizationType.F32
        if array.ndim == 2:
            form = gguf.GGMLQuantizationType.Q8_0
            array = gguf.quantize(array, form)
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", array, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_gguf_file_becomes_what_the_library_makes_of_it(gguf_file, tmp_path, tokenizer, capsys):
    where = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    original = AutoModelForCausalLM.from_pretrained(**where, quantization_config=GgufConfig(dequantize=True)).float()
    full = causal_lm(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64)
    ids = torch.randint(3, 60, (2, 9))
    torch.testing.assert_close(original(ids).logits, full(ids).logits, rtol=0, atol=0.05)
    text = "a handwritten seven"
    for source, output in ((gguf_file, tmp_path / "a"), (gguf_file.parent, tmp_path / "b")):
        script.main([str(source), str(output), "--sample_size", "8", "--check"])
        assert "difference of the text logits: 0\n" in capsys.readouterr().out
        converted = TransfusionForCausalLMAndDiffusion.from_pretrained(output)
        assert torch.equal(converted(ids).logits[..., : len(tokenizer)], original(ids).logits)
        processor = TransfusionProcessor.from_pretrained(output)
        assert processor.tokenizer(text).input_ids == AutoTokenizer.from_pretrained(**where)(text).input_ids


def test_gguf_files_that_cannot_be_converted_are_refused(gguf_file, tmp_path):
    output = tmp_path / "out"
    other = gguf_file.with_name("other.gguf")
    other.write_bytes(gguf_file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"holds 2 GGUF files: other\.gguf, tiny\.Q8_0\.gguf\. Pass the path of one"):
        convert_causal_lm(gguf_file.parent, output, **IMAGES)
    with pytest.raises(ValueError, match=r"other\.gguf is cut off, or no GGUF"):
        convert_causal_lm(other, output, **IMAGES)
    other.write_bytes(gguf_file.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.7.ffn_up.weight"))
    with pytest.raises(ValueError, match=r"Tensors missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        convert_causal_lm(other, output, **IMAGES)
    other.write_bytes(gguf_file.read_bytes().replace(b"llama", b"bloom"))
    with pytest.raises(ValueError, match="bloom"):
        convert_causal_lm(other, output, **IMAGES)
    assert not output.exists()


@pytest.mark.parametrize("name", ["llama", "phi"])
def test_the_last_norm_of_images_is_converted_trained_and_left_behind(tmp_path, tokenizer, name):
    original = causal_lm(name, vocab_size=len(tokenizer))
    with torch.no_grad():
        for parameter in original.base_model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    original.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    fields = {**IMAGES, "untied_modalities": ["image"], "untied_final_norm": True}
    convert_causal_lm(tmp_path / "lm", tmp_path / "converted", **fields)
    saved: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "converted").glob("*.safetensors"):
        saved |= load_file(file)
    norm = {"llama": "norm", "phi": "final_layernorm"}[name]
    twin, own = (f"model.language_model.{part}{norm}.weight" for part in ("image.", ""))
    assert torch.equal(saved[twin], saved[own])
    ids = torch.randint(3, 60, (2, 9))
    for model in (
        TransfusionForCausalLMAndDiffusion.from_pretrained(tmp_path / "converted"),
        TransfusionForCausalLMAndDiffusion.from_causal_lm(str(tmp_path / "lm"), **fields),
    ):
        assert torch.equal(model.get_parameter(twin), model.get_parameter(own))
        assert twin in set_trainable(model, "image_weights") and not model.get_parameter(own).requires_grad
        assert torch.equal(model(ids).logits[..., : len(tokenizer)], original(ids).logits)
        back = extract_causal_lm(model, len(tokenizer)).state_dict()
        assert all(torch.equal(back[key], value) for key, value in original.state_dict().items())
