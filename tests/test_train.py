"""`transfusion train`: the paper's recipe, on small things."""

import io
import json
import runpy
import shlex
from itertools import islice
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from datasets import Dataset
from diffusers import AutoencoderKL
from make_tiny_transfusion import byte_tokenizer
from PIL import Image
from transformers import AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from transfusion_hf import (
    TransfusionForCausalLMAndDiffusion,
    TransfusionProcessor,
    modeling_transfusion,
    new_transfusion,
)
from transfusion_hf.cli import train
from transfusion_hf.cli.main import main
from transfusion_hf.data.shapes import ShapesDataset

TINY = str(Path(__file__).parent / "fixtures" / "tiny-transfusion")
SMALL = "hidden_size=32,intermediate_size=48,num_hidden_layers=2,num_attention_heads=4,num_key_value_heads=4"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = {"image": [], "caption": []}
    for sample in (ShapesDataset(16)[i] for i in range(16)):
        buffer = io.BytesIO()
        sample["image"].save(buffer, "png")
        rows["image"].append({"bytes": buffer.getvalue(), "path": None})
        rows["caption"].append(sample["text"])
    Dataset.from_dict(rows).to_parquet(folder / "pictures-0.parquet")
    Dataset.from_dict({"text": [f"some words of text {i}" * (1 + i % 3) for i in range(30)]}).to_parquet(
        folder / "text-0.parquet"
    )
    return folder


def arguments(folder: Path, data: Path, *extra: str) -> list[str]:
    return [
        "--tokenizer_name", TINY, "--config_overrides", SMALL, "--sample_size", "16", "--max_length", "192",
        "--caption_dataset", str(data / "pictures-*.parquet"), "--caption_column", "caption",
        "--text_dataset", str(data / "text-*.parquet"), "--output_dir", str(folder), "--max_steps", "4",
        "--per_device_train_batch_size", "4", "--save_steps", "2", "--logging_steps", "1", "--report_to", "none",
        "--disable_tqdm", "true", "--use_cpu", *extra,
    ]  # fmt: skip


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_model_trains_from_scratch_and_loads_again(tmp_path, data, streaming):
    recipe = [
        "--prediction_type",
        "sample",
        "--diffusion_loss_weighting",
        "v_prediction",
        "--train_timestep_shift",
        "2",
    ]
    recipe += ["--timestep_distribution", "logit_normal", "--image_learning_rate", "1e-4"]
    trainer = train.main(arguments(tmp_path, data, "--streaming", streaming, "--ema_decay", "0.9", *recipe))
    config = trainer.model.config
    assert (config.diffusion_loss_weighting, config.prediction_type) == ("v_prediction", "sample")
    assert (config.train_timestep_shift, config.timestep_distribution) == (2.0, "logit_normal")
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {3e-4, 1e-4}
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 4 and all({"lm_loss", "diffusion_loss"} <= set(entry) for entry in logs)
    model = AutoModelForMultimodalLM.from_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    output = model.generate(**processor(text=["a circle"]), generation_mode="image", num_inference_steps=2)
    assert output.images[0][0].shape == (3, 16, 16)


def test_the_command_trains_on_a_folder_by_a_yaml_file_and_names_the_next_command(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for i in range(8):
        Image.new("RGB", (16, 16), (30 * i, 0, 0)).save(tmp_path / "photos" / f"{i}.png")
        (tmp_path / "photos" / f"{i}.txt").write_text(f"red {i}")
    recipe = {
        "tokenizer_name": TINY, "config_overrides": SMALL, "sample_size": 16, "max_length": 192, "max_steps": 9,
        "caption_dataset": str(tmp_path / "photos"), "output_dir": str(tmp_path / "my run"), "use_cpu": True,
        "learning_rate": "1e-3", "lr_scheduler_kwargs": {"min_lr": 1e-5}, "report_to": ["none"], "save_steps": 100,
        "per_device_train_batch_size": 4, "dataloader_num_workers": 0, "text_dataset": None,
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = [str(tmp_path / "recipe.yaml"), "--max_steps", "1", "--sample_prompts", "red 3|red 4"]
    assert main(["train", *arguments, "--disable_tqdm", "true"]) == 0
    saved = json.loads((tmp_path / "my run" / "training_args.json").read_text())
    assert (saved["max_steps"], saved["learning_rate"], saved["lr_scheduler_kwargs"]) == (1, 1e-3, {"min_lr": 1e-5})
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command == ["transfusion", "draw", str(tmp_path / "my run"), "red 3"]
    options = ["-o", str(tmp_path / "a.png"), "--num_inference_steps", "1", "--device", "cpu"]
    assert main([*command[1:], *options]) == 0 and Image.open(tmp_path / "a.png").size == (16, 16)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- max_steps", "must hold lines such as `max_steps: 1000`; got list"),
        ("steps: 1", "--steps=1"),
        ("steps: [1", "recipe.yml is no YAML: "),
    ],
)
def test_a_yaml_file_that_says_nothing_known_is_an_error(tmp_path, data, text, message, capsys):
    (tmp_path / "recipe.yml").write_text(text)
    assert main(["train", str(tmp_path / "recipe.yml"), *arguments(tmp_path, data)]) == 1
    assert message in capsys.readouterr().err


def losses_with(folder: Path, data: Path, *flags: str) -> torch.Tensor:
    """`loss`, `lm_loss` and `diffusion_loss` of four steps, whose batches have rows and images of several lengths."""
    trainer = train.main(arguments(folder, data, "--warmup_steps", "1", "--save_strategy", "no", *flags))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return torch.tensor([[entry[name] for name in ("loss", "lm_loss", "diffusion_loss")] for entry in logs])


def test_flags_that_save_time_and_memory_keep_the_losses(tmp_path, data):
    # A worker draws by a generator of its own, whatever the main process drew before.
    worker = ("--dataloader_num_workers", "1")
    plain = losses_with(tmp_path, data, *worker)
    assert torch.equal(losses_with(tmp_path, data, *worker, "--activation_checkpointing", "true"), plain)
    dtypes = {}

    def note(name: str):
        return lambda module, inputs, output: dtypes.update({name: output.dtype})

    def hook_model(*args):
        model, processor = build_model(*args)
        model.model.patch_encoder.timestep_embedding.mlp.linear_1.register_forward_hook(note("timestep_embedding"))
        model.model.language_model.layers[0].mlp.register_forward_hook(note("decoder"))
        return model, processor

    build_model, compute = train.build_model, modeling_transfusion.image_losses

    def note_errors(predictions, targets):
        dtypes["errors"] = {*(x.dtype for x in (*predictions, *targets)), compute(predictions, targets).dtype}
        return compute(predictions, targets)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build_model", hook_model)
        patch.setattr(modeling_transfusion, "image_losses", note_errors)
        torch.testing.assert_close(losses_with(tmp_path, data, *worker, "--bf16", "true"), plain, rtol=1e-3, atol=0)
    assert dtypes["decoder"] == torch.bfloat16
    assert dtypes["timestep_embedding"] == torch.float32 and dtypes["errors"] == {torch.float32}


@pytest.mark.slow
def test_a_compiled_model_trains_as_the_plain_one(tmp_path, data):
    arguments = ("--dataloader_num_workers", "1", "--attn_implementation", "sdpa")
    plain = losses_with(tmp_path, data, *arguments)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = losses_with(tmp_path, data, *arguments, "--torch_compile_backend", "eager")
    torch.testing.assert_close(compiled, plain, rtol=tiny.ROUNDING, atol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_the_recipe_is_that_of_the_paper(tmp_path, data):
    trainer = train.main(arguments(tmp_path, data, "--warmup_steps", "2"))
    args, optimizer = trainer.args, trainer.optimizer
    assert (args.learning_rate, args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (3e-4, 0.9, 0.95, 1e-8)
    assert (args.weight_decay, args.max_grad_norm) == (0.1, 1.0)
    assert train.PaperTrainingArguments(str(tmp_path)).warmup_steps == 4000
    assert train.DataArguments("x").max_length == 4096 and trainer.model.config.diffusion_loss_weight == 5
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert max(rates) == pytest.approx(3e-4) and optimizer.param_groups[0]["lr"] == pytest.approx(1.5e-5)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert all((id(parameter) in decayed) == (parameter.ndim > 1) for parameter in trained.values())


def test_a_run_goes_on_where_it_was(tmp_path, data):
    # In a worker the collator draws by a generator of its own, in which no denoising comes between.
    data_arguments = ("--dataloader_num_workers", "1", "--resume_from_checkpoint", "true")
    whole = train.main(arguments(tmp_path / "whole", data, *data_arguments))
    train.main(arguments(tmp_path / "parts", data, *data_arguments))
    for file in (tmp_path / "parts" / "checkpoint-4").iterdir():
        file.unlink()
    (tmp_path / "parts" / "checkpoint-4").rmdir()
    parts = train.main(arguments(tmp_path / "parts", data, *data_arguments))
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in parts.model.state_dict().items())


def test_the_data_of_a_training_never_end(data):
    processor = AutoProcessor.from_pretrained(TINY)
    args = train.DataArguments(
        str(data / "pictures-*.parquet"), str(data / "text-*.parquet"), caption_column="caption"
    )
    assert sum(1 for _ in islice(train.build_dataset(args, processor, 0), 150)) == 150  # of 46 rows


@pytest.mark.parametrize("plan", ["image_parts", "image_weights", "all"])
def test_a_language_model_goes_on_by_a_plan(tmp_path, data, plan):
    language_model = LlamaForCausalLM(tiny.text_config(vocab_size=262, max_position_embeddings=192))
    model = TransfusionForCausalLMAndDiffusion.from_causal_lm(
        language_model, untied_modalities=["image"], latent_channels=3, sample_size=16
    )
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    TransfusionProcessor.for_model(model, tokenizer).save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = ["--model_name_or_path", str(tmp_path / "model"), "--training_plan", plan, "--warmup_steps", "0"]
    trainer = train.main([*arguments(tmp_path / "run", data)[2:], "--attn_implementation", "sdpa", *options])
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    text = {name for name in before if "patch" not in name and ".image." not in name}
    image = {name for name in before if ".image." in name}
    assert bool(changed & text) == (plan == "all") and bool(changed & image) == (plan != "image_parts")
    assert any("patch_decoder" in name for name in changed)


def test_a_model_is_new_or_one_to_go_on_from(tmp_path, data):
    for options in (["--model_name_or_path", TINY], []):
        with pytest.raises(ValueError, match=r"Pass either `tokenizer_name` .* or `model_name_or_path`"):
            train.main([*arguments(tmp_path, data)[0 if options else 2 :], *options])


@pytest.mark.parametrize("overrides", ["hidden_size", "hidden_sizes=3"])
def test_overrides_that_mean_nothing_are_refused(tmp_path, data, overrides):
    with pytest.raises(ValueError, match="`config_overrides`"):
        train.main([*arguments(tmp_path, data), "--config_overrides", overrides])


def test_what_follows_from_an_overridden_field_is_computed_anew():
    args = train.ModelArguments(tokenizer_name=TINY, config_overrides="num_attention_heads=4,num_hidden_layers=1")
    model, _ = train.build_model(args)
    assert (model.config.text_config.num_key_value_heads, model.config.text_config.head_dim) == (4, 192)
    assert torch.isfinite(model(torch.tensor([[5, 6]])).logits).all()


def test_images_that_do_not_fit_a_row_or_the_autoencoder_are_refused_before_training(tmp_path, data):
    message = "`max_length` is 192, and an image has 1026 tokens; pass an autoencoder in `vae_name_or_path`"
    with pytest.raises(ValueError, match=message):
        train.main(arguments(tmp_path, data, "--sample_size", "64"))
    vae = AutoencoderKL(block_out_channels=[4] * 2, down_block_types=["DownEncoderBlock2D"] * 2, norm_num_groups=2)
    vae.save_pretrained(tmp_path / "vae")
    message = "`sample_size` must be a multiple of 2 with this autoencoder; got 17"
    with pytest.raises(ValueError, match=message):
        train.main(arguments(tmp_path, data, "--sample_size", "17", "--vae_name_or_path", str(tmp_path / "vae")))


def test_one_call_makes_a_model_and_a_processor_from_a_tokenizer(tmp_path):
    tokenizer = byte_tokenizer()  # 259 tokens; the default configuration wants 32,003
    decoder = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    fields = {"sample_size": 8, "patch_size": 2, "pad_to_multiple_of": 8}
    model, processor = new_transfusion(tokenizer, decoder, image_token="<picture>", **fields)
    assert model.config.text_config.vocab_size == 264 and decoder.vocab_size == 32_000
    assert model.config.image_token_id == processor.image_token_id == tokenizer.convert_tokens_to_ids("<picture>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    model = TransfusionForCausalLMAndDiffusion.from_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    output = model.generate(**processor(text=["a"]), generation_mode="image", num_inference_steps=2)
    assert output.images[0][0].shape == (3, 8, 8)
    down, up = ["DownEncoderBlock2D"] * 2, ["UpDecoderBlock2D"] * 2
    vae = AutoencoderKL(3, 3, down, up, [8, 16], latent_channels=2, norm_num_groups=4, scaling_factor=0.7)
    fields = {"sample_size": 4, "image_token": "<picture>"}
    again, processor = new_transfusion(str(tmp_path), decoder, vae, **fields)  # which has its tokens
    assert again.config.text_config.vocab_size == 262 and again.config.latent_channels == 2
    assert processor(text="<picture>", images=Image.new("RGB", (9, 9)))["pixel_values"].shape == (1, 3, 8, 8)


def test_a_tokenizer_that_does_not_fit_is_refused_or_said():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    with (
        torch.device("meta"),
        pytest.warns(UserWarning, match="vocabulary of 32,003; .* change its size by -0.0..B parameters"),
    ):
        new_transfusion(TINY, "0.16B")
    with pytest.raises(ValueError, match="TransfusionConfig has no field `sample_sise`"):
        new_transfusion(tokenizer, sample_sise=32)
    with pytest.raises(ValueError, match="'9B'"):
        new_transfusion(tokenizer, "9B")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no end-of-sequence token, so no text would end"):
        new_transfusion(tokenizer)


def test_accelerate_takes_its_configurations():
    folder = Path(__file__).parents[1] / "examples" / "accelerate"
    kinds = {}
    for file in sorted(folder.iterdir()):
        parsed = launch_command_parser().parse_args(["--config_file", str(file), "train.py"])
        args, _, _ = _validate_launch_command(parsed)
        kinds[file.stem] = (args.multi_gpu, args.use_fsdp, args.use_deepspeed)
        assert args.num_processes == 8 and args.mixed_precision == "bf16"
        # Of shards the Trainer saves no model.
        assert not args.use_fsdp or (args.fsdp_version, args.fsdp_state_dict_type) == (2, "FULL_STATE_DICT")
        assert not args.use_deepspeed or args.zero_stage == int(file.stem[-1])
    assert kinds == {
        "ddp": (True, False, False),
        "fsdp2": (False, True, False),
        "deepspeed_zero2": (False, False, True),
        "deepspeed_zero3": (False, False, True),
        "tensor_parallel": (True, False, False),
    }


def test_the_script_for_launchers_is_the_command():
    script = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "train.py"))
    assert script["main"] is train.main
