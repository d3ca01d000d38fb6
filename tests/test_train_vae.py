"""The training of the VAE, run as its users run it, on digits and tiny networks."""

import io
import json
import sys
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, VQModel
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.utils import Bunch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import common
import train_vae

NUM_TRAIN = 80
TINY = (
    "--digits --report_to none --num_eval_images 40 --block_out_channels 4 4 8 --norm_num_groups 4 "
    "--discriminator_channels 4 --num_codes 8 --train_batch_size 4 --lr_warmup_steps 1 --gan_start 1"
).split()


def use_few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """120 digits instead of 1,797."""
    digits = load_digits()
    few = Bunch(images=digits.images[:120], target=digits.target[:120])
    monkeypatch.setattr(common, "load_digits", lambda: few)


@pytest.fixture
def few_digits(monkeypatch) -> None:
    use_few_digits(monkeypatch)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, dict, str]:
    """Four steps, a checkpoint after each of which the last three stay: folder, results and what was printed."""
    folder, printed = tmp_path_factory.mktemp("run"), io.StringIO()
    flags = "--max_train_steps 4 --checkpointing_steps 1 --checkpoints_total_limit 3 --gan_start 3 --eval_steps 1"
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        use_few_digits(patch)
        results = train(folder, *flags.split(), "--resume_from_checkpoint", "latest")
    return folder, results, printed.getvalue()


def train(folder: Path, *flags) -> dict:
    return train_vae.main([*TINY, "--output_dir", str(folder), *map(str, flags)])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")


def train_images() -> torch.Tensor:
    """Of the run's training set, made here: bicubic, three equal channels, [-1, 1]."""
    order = np.random.default_rng(0).permutation(120)[:NUM_TRAIN]
    pictures = np.round(load_digits().images[order] * 255 / 16).astype(np.uint8)
    large = [Image.fromarray(p).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC) for p in pictures]
    return torch.from_numpy(np.stack(large)).permute(0, 3, 1, 2) / 127.5 - 1


class KilledError(Exception):
    pass


def test_the_digits_are_split_as_in_the_quickstart():
    sets = train_vae.load_images(train_vae.parse_args(["--digits"]))
    for images, samples in zip(sets, common.load_split(), strict=True):
        assert train_vae.samples_of(images) == samples and len(images) == len(samples)


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize("mode", [(), ("--vq", "--restart_codes_after", 1)])
def test_a_run_killed_while_it_saves_and_resumed_ends_with_the_weights_of_one_that_was_not(
    tmp_path, monkeypatch, mode
):
    flags = (*mode, "--max_train_steps", 3, "--checkpointing_steps", 1, "--gradient_accumulation_steps", 2)
    flags = (*flags, "--ema_decay", 0.9, "--lr_scheduler", "cosine", "--checkpoints_total_limit", 9)
    train(tmp_path / "whole", *flags)

    save_state, saved = Accelerator.save_state, []

    def save_state_and_die(self, folder):
        save_state(self, folder)
        saved.append(folder)
        if len(saved) == 2:
            raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(Accelerator, "save_state", save_state_and_die)
        train(tmp_path / "killed", *flags)
    assert [path.name for path in train_vae.list_checkpoints(tmp_path / "killed")] == ["checkpoint-1"]
    assert any("2" in path.name for path in (tmp_path / "killed").iterdir())  # the unfinished one lies there
    torch.manual_seed(1234)  # whatever state the new process is in
    train(tmp_path / "killed", *flags, "--resume_from_checkpoint", "latest")

    expected, resumed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert expected.keys() == resumed.keys()
    for name, value in expected.items():
        assert torch.equal(value, resumed[name]), name
    for name in ("model.safetensors", "model_1.safetensors"):  # trained weights and the discriminator's
        last = [load_file(tmp_path / run / "checkpoint-3" / name) for run in ("whole", "killed")]
        assert all(torch.equal(value, last[1][key]) for key, value in last[0].items())
    names = {path.name for path in (tmp_path / "killed").glob("checkpoint-*")}
    assert names == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}

    # That the equality says something: without the checkpoint's state the weights are others.
    first = load_file(tmp_path / "whole" / "checkpoint-1" / "model.safetensors")
    assert not all(torch.equal(value, first["vae." + key]) for key, value in expected.items())


@pytest.mark.usefixtures("few_digits")
def test_a_checkpoint_of_another_run_is_refused_and_a_missing_one_too(run):
    with pytest.raises(ValueError, match=r"belongs to another run, .*'train_batch_size': \(4, 8\)"):
        train(run[0], "--resume_from_checkpoint", "latest", "--train_batch_size", 8)
    with pytest.raises(ValueError, match="is not a checkpoint of this script"):
        train(run[0], "--resume_from_checkpoint", run[0] / "checkpoint-9")


def test_a_resumed_average_is_on_the_device_of_the_training(tmp_path):
    (tmp_path / "run.json").write_text('{"step": 3}')
    ema = EMAModel([torch.nn.Parameter(torch.zeros(2))])  # on the CPU, where accelerate reads it
    accelerator = SimpleNamespace(load_state=lambda folder: None, print=print, device=torch.device("meta"))
    assert train_vae.load_checkpoint(accelerator, Namespace(resume_from_checkpoint=tmp_path), {}, ema) == 3
    assert ema.shadow_params[0].is_meta


def test_latest_begins_where_there_is_no_checkpoint_and_only_the_last_ones_are_kept(run):
    folder, _, printed = run
    assert "starts from the beginning" in printed
    assert [path.name for path in train_vae.list_checkpoints(folder)] == [f"checkpoint-{i}" for i in (2, 3, 4)]


def test_the_discriminator_does_not_learn_before_its_step(run):
    first, second, third = (load_file(run[0] / f"checkpoint-{i}" / "model_1.safetensors") for i in (2, 3, 4))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    # A bias before a norm has a gradient of rounding errors alone, or of 0.
    assert not any(torch.equal(value, third[name]) for name, value in first.items() if value.ndim > 1)


def test_the_saved_factors_standardise_the_latents(run):
    folder, results, _ = run
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    assert vae.config.latent_channels == 4 and vae.config.sample_size == 32
    with torch.no_grad():
        latents = vae.encode(train_images()).latent_dist.mode()
    assert latents.shape == (NUM_TRAIN, 4, 8, 8)
    assert vae.config.scaling_factor == pytest.approx(1 / latents.double().std().item(), rel=1e-3)
    assert vae.config.shift_factor == pytest.approx(latents.double().mean().item(), abs=1e-4)
    assert json.loads((folder / "results.json").read_text()) == results
    assert results.keys() >= {"psnr", "l1", "digit_accuracy", "train_seconds", "parameters"}
    for file in ("samples/0000001.png", "reconstructions.png"):
        with Image.open(folder / file) as picture:
            assert picture.size == (8 * 34 + 2, 4 * 34 + 2)


@pytest.mark.usefixtures("few_digits")
def test_psnr_and_l1_are_those_of_the_held_out_images(run):
    folder, results, _ = run
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    _, held_out = train_vae.load_images(train_vae.parse_args(TINY))
    assert len(held_out) == 40
    psnr, l1 = [], []
    for i in range(len(held_out)):
        original = held_out[i].numpy()
        with torch.no_grad():
            decoded = vae.decode(vae.encode(held_out[i][None]).latent_dist.mode()).sample[0].numpy()
        difference = (np.clip(decoded, -1, 1) - original) / 2  # in [0, 1]
        psnr.append(-10 * np.log10(np.mean(difference**2)))
        l1.append(np.mean(np.abs(2 * difference)))
    assert results["psnr"] == pytest.approx(np.mean(psnr), abs=1e-3)
    assert results["l1"] == pytest.approx(np.mean(l1), abs=1e-4)


@pytest.mark.usefixtures("few_digits")
def test_vq_saves_a_model_that_diffusers_loads(tmp_path, capsys):
    results = train(tmp_path, "--vq", "--max_train_steps", 2)
    assert "--vae" not in capsys.readouterr().out  # a Transfusion does not take it
    vae = VQModel.from_pretrained(tmp_path / "vae")
    assert vae.config.num_vq_embeddings == 8
    assert 0 < results["codes_used"] <= 1
    with torch.no_grad():
        assert vae(train_images()[:2]).sample.shape == (2, 3, 32, 32)


def test_beta_weighs_the_commitment_and_not_the_codebook():
    vae = train_vae.build_vae(train_vae.parse_args([*TINY, "--vq", "--commitment_cost", "0.25"]))
    latents = torch.randn(2, 4, 3, 3, requires_grad=True)
    quantized, loss, _ = vae.quantize(latents)
    loss.backward()
    number = latents.numel()
    torch.testing.assert_close(latents.grad, 0.25 * 2 * (latents - quantized).detach() / number)
    codes = vae.quantize.embedding.weight
    to_codes = torch.zeros_like(codes)
    nearest = torch.cdist(latents.permute(0, 2, 3, 1).reshape(-1, 4), codes).argmin(dim=1)
    for code, latent in zip(nearest, latents.detach().permute(0, 2, 3, 1).reshape(-1, 4), strict=True):
        to_codes[code] += 2 * (codes[code].detach() - latent) / number
    torch.testing.assert_close(codes.grad, to_codes)


def test_codes_that_nothing_uses_move_to_latents_and_those_in_use_stay():
    flags = "--train_dir x --perceptual_weight 0 --identity_weight 0 --vq --num_codes 6 --block_out_channels 4 8"
    flags += " --norm_num_groups 4 --layers_per_block 1 --latent_channels 2 --image_size 8"
    torch.manual_seed(0)
    model = train_vae.Autoencoder(train_vae.build_vae(train_vae.parse_args(flags.split())), restart_codes_after=2)
    codes, pixel_values = model.vae.quantize.embedding.weight.data, torch.rand(4, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        points = model.vae.encode(pixel_values).latents.permute(0, 2, 3, 1).flatten(0, 2)
        model(pixel_values)
    assert torch.cdist(codes, points).min(dim=1).values.max() < 1e-3, "all begin at latents"
    codes[2:] = 100.0
    codes[:2] = points[[0, -1]]
    model.idle[2:] = 1
    with torch.no_grad():
        model(pixel_values)
        assert (codes[2:] == 100).all(), "idle for two steps by now"
        model(pixel_values)
    assert torch.equal(codes[:2], points[[0, -1]])
    assert torch.cdist(codes, points).min(dim=1).values.max() < 1e-3
    assert "idle" in model.state_dict(), "a resumed training counts on"


@pytest.mark.parametrize("num_processes", [1, 2])
def test_every_epoch_shows_every_image_once_and_a_later_start_goes_on_with_the_same_order(num_processes):
    args = train_vae.parse_args([*TINY, "--train_batch_size", "3", "--gradient_accumulation_steps", "2"])

    class Process:
        def __init__(self, index):
            self.process_index, self.num_processes = index, num_processes

    def batches(step, number):
        streams = [train_vae.endless_batches(30, args, Process(i), step) for i in range(num_processes)]
        return [next(stream) for _ in range(number) for stream in streams]

    per_epoch = 10 // num_processes
    seen = batches(0, 2 * per_epoch)
    flat = [index for batch in seen for index in batch]
    assert sorted(flat[:30]) == sorted(flat[30:]) == list(range(30)) and flat[:30] != flat[30:]
    assert batches(2, 2) == seen[4 * num_processes :][: 2 * num_processes]


def test_an_image_folder_is_cropped_resized_and_trained_on(tmp_path):
    generator = np.random.default_rng(0)
    for i in range(12):
        pixels = generator.integers(0, 256, (40, 56, 3), dtype=np.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i:02}.png")
    flags = f"--train_dir {tmp_path / 'images'} --image_size 16 --num_eval_images 4 --output_dir {tmp_path / 'run'}"
    flags += " --block_out_channels 4 8 --norm_num_groups 4 --layers_per_block 1 --latent_channels 8 --report_to none"
    flags += " --perceptual_weight 0 --identity_weight 0 --gan_start 0 --discriminator_layers 1 --max_train_steps 2"
    flags += " --discriminator_channels 4 --train_batch_size 2 --dataloader_num_workers 0"
    results = train_vae.main(flags.split())
    assert AutoencoderKL.from_pretrained(tmp_path / "run" / "vae").config.latent_channels == 8
    assert "digit_accuracy" not in results
    train_set, held_out = train_vae.load_images(train_vae.parse_args(flags.split()))
    assert (len(train_set), len(held_out)) == (8, 4)
    assert train_set[0].shape == (3, 16, 16) and -1 <= train_set[0].min() < train_set[0].max() <= 1


def test_the_papers_autoencoder_is_the_default():
    flags = ["--train_dir", "x", "--lpips_backbone", "vgg16.pth", "--moco_checkpoint", "moco.pth"]
    args = train_vae.parse_args(flags)
    with torch.device("meta"):
        vae = train_vae.build_vae(args)
        encoder = vae.encode(torch.zeros(1, 3, 256, 256)).latent_dist
    assert encoder.mean.shape == (1, 8, 32, 32)
    assert 80e6 < vae.num_parameters() < 90e6  # the paper says 86M
    assert (args.kl_weight, args.gan_weight, args.identity_weight, args.gan_start) == (1e-6, 0.5, 0.2, 50_000)
    assert (args.num_codes, args.commitment_cost) == (16_384, 0.25)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "pass one of --digits"),
        ("--digits --train_dir x", "pass one of --digits"),
        ("--digits --image_size 30", "not a multiple of 4"),
        ("--train_dir x", "pass --lpips_backbone FILE, or --perceptual_weight 0"),
        ("--digits --restart_codes_after 50", "--restart_codes_after needs --vq"),
        ("--train_dir x --perceptual_weight 0", "pass --moco_checkpoint FILE, or --identity_weight 0"),
    ],
)
def test_flags_that_make_no_run_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        train_vae.parse_args(flags.split())
    assert message in capsys.readouterr().err
