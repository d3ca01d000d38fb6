"""
Trains the paper's image tokenizer (§4.1): diffusers' `AutoencoderKL`, or with `--vq` its discrete twin, a `VQModel`.

    # The paper's autoencoder on a folder of images, or on a data set of the Hub with `--dataset_name`
    accelerate launch examples/train_vae.py --train_dir photos --output_dir outputs/vae --mixed_precision bf16 \
        --lpips_backbone vgg16-397923af.pth --moco_checkpoint moco_v2_800ep_pretrain.pth.tar
    # The 1,797 digits of scikit-learn at 32×32 pixels, with every loss, on a CPU in two minutes
    python examples/train_vae.py --digits

`--resume_from_checkpoint latest` continues a stopped run and ends with the same weights. `from_pretrained` loads the
result from `output_dir/vae`. Its `scaling_factor` and `shift_factor` give (z − shift) · scale mean 0 and variance 1.
"""

import argparse
import json
import os
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from common import Judge, load_split, say_next
from diffusers import AutoencoderKL, VQModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import v2
from torchvision.utils import save_image
from tqdm.auto import tqdm

from transfusion_hf import TransfusionImageProcessor, measure_latent_scale
from transfusion_hf.vae.losses import IdentityLoss, PatchDiscriminator, PerceptualLoss, VAELoss

NUM_MEASURED = 10_000  # images that measure the scale of the latents, or the codes in use

# Defaults of `--digits`.
DIGITS = {
    "image_size": 32, "num_eval_images": 297, "latent_channels": 4, "block_out_channels": [16, 32, 64],
    "layers_per_block": 1, "norm_num_groups": 8, "num_codes": 256, "discriminator_channels": 16,
    "discriminator_layers": 2, "gan_start": 200, "train_batch_size": 16, "max_train_steps": 400,
    "learning_rate": 1e-3, "lr_scheduler": "cosine", "lr_warmup_steps": 20, "dataloader_num_workers": 0,
    "logging_steps": 20, "eval_steps": 200, "checkpointing_steps": 200,
}  # fmt: skip


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--digits", action="store_true", help="scikit-learn's digits; trains small feature networks first")
    add("--dataset_name", help="a repository of the Hub, or files (a pattern)")
    add("--dataset_split", default="train")
    add("--train_dir", help="a folder of images, or a pattern")
    add("--image_column", default="image")
    add("--num_eval_images", type=int, default=256, help="held out from the training")
    add("--image_size", type=int, default=256)
    add("--output_dir", type=Path, default=Path("outputs/vae"))
    add("--seed", type=int, default=0)

    add("--vq", action="store_true", help="discrete: a `VQModel`, with a commitment loss instead of the KL")
    add("--latent_channels", type=int, default=8)
    add("--block_out_channels", type=int, nargs="+", default=[128, 256, 512, 512])
    add("--layers_per_block", type=int, default=2)
    add("--norm_num_groups", type=int, default=32)
    add("--num_codes", type=int, default=16384)
    add("--restart_codes_after", type=int, default=0, help="steps without use; 0: never (see `Autoencoder`)")

    add("--l1_weight", type=float, default=1.0)
    add("--perceptual_weight", type=float, default=1.0)
    add("--gan_weight", type=float, default=0.5)
    add("--identity_weight", type=float, default=0.2)
    add("--kl_weight", type=float, default=1e-6, help="weight of the KL, which is summed over the latent")
    add("--commitment_cost", type=float, default=0.25, help="β, with --vq")
    add("--gan_start", type=int, default=50_000, help="first step with the adversarial term")
    add("--discriminator_channels", type=int, default=64)
    add("--discriminator_layers", type=int, default=3)
    add("--lpips_backbone", help="torchvision's VGG-16 weights, a file")
    add("--moco_checkpoint", help="a checkpoint of MoCo v2, a file")

    add("--max_train_steps", type=int, default=1_000_000)
    add("--train_batch_size", type=int, default=16, help="per process")
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--gradient_checkpointing", action="store_true")
    add("--learning_rate", type=float, default=1e-4, help="for autoencoder and discriminator; not in the paper")
    add("--lr_scheduler", default="constant_with_warmup", choices=["constant_with_warmup", "cosine"])
    add("--lr_warmup_steps", type=int, default=1000)
    add("--adam_beta1", type=float, default=0.5)
    add("--adam_beta2", type=float, default=0.9)
    add("--max_grad_norm", type=float, default=1.0)
    add("--ema_decay", type=float, default=0.0, help="above 0: judge and save averaged weights")
    add("--mixed_precision", choices=["no", "fp16", "bf16"])
    add("--dataloader_num_workers", type=int, default=4)

    add("--resume_from_checkpoint", help="a checkpoint, or `latest` in --output_dir (starts a run if none)")
    add("--checkpointing_steps", type=int, default=5000)
    add("--checkpoints_total_limit", type=int, default=2)
    add("--eval_steps", type=int, default=5000, help="measure PSNR and L1 on held-out images, draw a grid")
    add("--logging_steps", type=int, default=50)
    add("--report_to", default="tensorboard", help="a tracker of accelerate, or `none`")
    if parser.parse_known_args(argv)[0].digits:
        parser.set_defaults(**DIGITS)
    args = parser.parse_args(argv)
    if args.digits + bool(args.dataset_name) + bool(args.train_dir) != 1:
        parser.error("pass one of --digits, --dataset_name and --train_dir")
    if args.restart_codes_after and not args.vq:
        parser.error("--restart_codes_after needs --vq")
    factor = 2 ** (len(args.block_out_channels) - 1)
    if args.image_size % factor:
        parser.error(f"--image_size {args.image_size} is not a multiple of {factor}, as --block_out_channels needs")
    for weight, file in (("perceptual_weight", "lpips_backbone"), ("identity_weight", "moco_checkpoint")):
        if not args.digits and getattr(args, weight) > 0 and not getattr(args, file):
            parser.error(f"pass --{file} FILE, or --{weight} 0 to train without that loss")
    return args


class Images(Dataset):
    """Tensors of shape `(3, image_size, image_size)` in [-1, 1], resized and cropped at the centre as in the paper."""

    def __init__(self, source, column: str, image_size: int):
        self.source = source
        self.column = column
        self.convert = TransfusionImageProcessor().convert
        self.transform = v2.Compose(
            [
                v2.Resize(image_size, interpolation=v2.InterpolationMode.BICUBIC),
                v2.CenterCrop(image_size),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.5], [0.5]),
            ]
        )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(self.convert(self.source[int(index)][self.column]))


def load_images(args: argparse.Namespace) -> tuple[Subset, Subset]:
    """In a fixed random order; the last `num_eval_images` are held out. `--digits` splits as the quickstart does."""
    if args.digits:
        source, column = [sample for part in load_split() for sample in part], "image"
        order = range(len(source))  # already shuffled
    else:
        from transfusion_hf.data.dataset import load_rows

        source, column = load_rows(args.dataset_name or args.train_dir, split=args.dataset_split), args.image_column
        if column not in source.column_names:
            raise ValueError(f"no column {column!r} in {source.column_names}; pass --image_column")
        source = source.select_columns([column])
        order = np.random.default_rng(0).permutation(len(source))
    num_train = len(source) - args.num_eval_images
    if not 0 < num_train < len(source):
        raise ValueError(
            f"--num_eval_images {args.num_eval_images} of {len(source)} images leaves none to train or judge"
        )
    images = Images(source, column, args.image_size)
    return Subset(images, order[:num_train]), Subset(images, order[num_train:])


def samples_of(digits: Subset) -> list[dict]:
    return [digits.dataset.source[i] for i in digits.indices]


def endless_batches(num_images: int, args: argparse.Namespace, accelerator: Accelerator, step: int):
    """
    Endless batches of this process's indices, from `step` on. They depend only on the position in the run (with one
    permutation per epoch), so a resumed run continues with exactly the next image.
    """
    size, epoch, order = args.train_batch_size, -1, None
    for batch in count(step * args.gradient_accumulation_steps):
        first = (batch * accelerator.num_processes + accelerator.process_index) * size
        indices = []
        for position in range(first, first + size):
            if position // num_images != epoch:
                epoch = position // num_images
                order = np.random.default_rng([args.seed, epoch]).permutation(num_images)
            indices.append(int(order[position % num_images]))
        yield indices


class FeatureMaps(nn.Module):
    def __init__(self, blocks: nn.Sequential):
        super().__init__()
        self.blocks = blocks

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        maps = [pixel_values]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        return maps[1:]


def train_digit_features(train_set: Subset) -> nn.Sequential:
    """
    A classifier of digits without its head, in place of VGG and MoCo. It trains in seconds, to the same weights every
    time, so a resumed run has the same losses.
    """
    torch.manual_seed(0)
    widths = [(3, 16), (16, 32), (32, 64)]
    blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.ReLU()) for i, o in widths))
    classifier = nn.Sequential(blocks, nn.Flatten(), nn.LazyLinear(10))
    pixel_values = torch.stack([train_set[i] for i in range(len(train_set))])
    labels = torch.tensor([sample["label"] for sample in samples_of(train_set)])
    classifier(pixel_values[:1])
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    for _ in range(8):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(classifier(pixel_values[batch]), labels[batch]).backward()
            optimizer.step()
    return blocks


def build_loss(args: argparse.Namespace, train_set: Subset) -> VAELoss:
    if args.digits:
        blocks = train_digit_features(train_set)
        perceptual, identity = PerceptualLoss(FeatureMaps(blocks)), IdentityLoss(nn.Sequential(blocks, nn.Flatten()))
    else:
        perceptual = PerceptualLoss.from_lpips(args.lpips_backbone) if args.perceptual_weight > 0 else None
        identity = IdentityLoss.from_moco(args.moco_checkpoint) if args.identity_weight > 0 else None
    return VAELoss(
        perceptual,
        identity,
        l1_weight=args.l1_weight,
        perceptual_weight=args.perceptual_weight,
        gan_weight=args.gan_weight,
        identity_weight=args.identity_weight,
        regularizer_weight=1.0 if args.vq else args.kl_weight,
        gan_start=args.gan_start,
    )


def build_vae(args: argparse.Namespace) -> AutoencoderKL | VQModel:
    num_blocks = len(args.block_out_channels)
    options = {
        "latent_channels": args.latent_channels,
        "block_out_channels": args.block_out_channels,
        "down_block_types": ["DownEncoderBlock2D"] * num_blocks,
        "up_block_types": ["UpDecoderBlock2D"] * num_blocks,
        "layers_per_block": args.layers_per_block,
        "norm_num_groups": args.norm_num_groups,
        "sample_size": args.image_size,
    }
    if not args.vq:
        return AutoencoderKL(**options)
    vae = VQModel(num_vq_embeddings=args.num_codes, **options)
    # With `legacy`, diffusers multiplies the codebook term by β; in the VQ-VAE, β belongs to the commitment term. Both
    # attributes matter only in training and are not saved.
    vae.quantize.legacy, vae.quantize.beta = False, args.commitment_cost
    return vae


class Autoencoder(nn.Module):
    """
    Encodes and decodes in one `forward`, because DDP synchronises only what goes through `forward`.

    With `restart_codes_after` above 0, a code that was not used in so many calls, as all at the first, moves to a
    latent of the batch, drawn in proportion to the squared distance from its code, like the centres of k-means++.
    NOTE: the paper does not say how it keeps its codes in use. diffusers' codes begin so close together that small
    codebooks learn slowly and in part.
    """

    def __init__(self, vae: AutoencoderKL | VQModel, restart_codes_after: int = 0):
        super().__init__()
        self.vae, self.restart_codes_after = vae, restart_codes_after
        if restart_codes_after:
            self.register_buffer("idle", torch.full((vae.config.num_vq_embeddings,), restart_codes_after))

    @torch.no_grad()
    def _restart_codes(self, latents: torch.Tensor) -> None:
        codes, points = self.vae.quantize.embedding.weight, latents.permute(0, 2, 3, 1).flatten(0, 2).float()
        distances, chosen = torch.cdist(points, codes).min(dim=1)
        is_idle = self.idle >= self.restart_codes_after
        if is_idle.any():
            picks = torch.multinomial(distances.square() + 1e-12, int(is_idle.sum()), replacement=True)
            codes[is_idle] = broadcast(points[picks])  # the same in every process
            self.idle[is_idle] = 0
            chosen = torch.cdist(points, codes).argmin(dim=1)
        self.idle += 1
        self.idle[chosen] = 0

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the reconstruction and the KL (summed over the latent, mean over images) or commitment loss."""
        if isinstance(self.vae, VQModel):
            latents = self.vae.encode(pixel_values).latents
            if self.restart_codes_after:
                self._restart_codes(latents)
            output = self.vae.decode(latents)
            return output.sample, output.commit_loss
        posterior = self.vae.encode(pixel_values).latent_dist
        posterior = DiagonalGaussianDistribution(posterior.parameters.float())
        return self.vae.decode(posterior.sample()).sample, posterior.kl().mean()


@contextmanager
def averaged(ema: EMAModel | None, vae: nn.Module):
    if ema is None:
        yield
        return
    ema.store(vae.parameters())
    ema.copy_to(vae.parameters())
    yield
    ema.restore(vae.parameters())


def process_batches(images: Subset, accelerator: Accelerator, args: argparse.Namespace, limit: int | None = None):
    """This process's share of the first `limit` images."""
    share = range(accelerator.process_index, min(limit or len(images), len(images)), accelerator.num_processes)
    loader = DataLoader(Subset(images, share), args.train_batch_size, generator=torch.Generator())
    return (batch.to(accelerator.device) for batch in loader)


@torch.no_grad()
def evaluate(vae, images: Subset, accelerator: Accelerator, args: argparse.Namespace) -> dict[str, float]:
    """PSNR (mean over images, of clamped values) and L1 in [-1, 1], of reconstructions from the posterior's mode."""
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    for pixel_values in process_batches(images, accelerator, args):
        difference = vae(pixel_values).sample.clamp(-1, 1) - pixel_values
        psnr = 10 * torch.log10(4 / difference.square().mean(dim=(1, 2, 3)).clamp(min=1e-10))
        sums += torch.stack([psnr.sum(), difference.abs().mean(dim=(1, 2, 3)).sum(), psnr.new_tensor(len(psnr))])
    psnr, l1, number = accelerator.reduce(sums, "sum").tolist()
    return {"psnr": psnr / number, "l1": l1 / number}


@torch.no_grad()
def save_grid(vae, images: Subset, file: Path, device: torch.device, columns: int = 8) -> None:
    """Sixteen images in two rows, each row above its reconstructions."""
    pixel_values = torch.stack([images[i] for i in range(min(2 * columns, len(images)))]).to(device)
    reconstruction = vae(pixel_values).sample.clamp(-1, 1)
    pairs = zip(pixel_values.split(columns), reconstruction.split(columns), strict=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_image(
        torch.cat([row for pair in pairs for row in pair]), file, nrow=columns, normalize=True, value_range=(-1, 1)
    )


@torch.no_grad()
def share_of_codes_used(vae: VQModel, images: Subset, accelerator: Accelerator, args: argparse.Namespace) -> float:
    used = torch.zeros(vae.config.num_vq_embeddings, device=accelerator.device)
    for pixel_values in process_batches(images, accelerator, args, NUM_MEASURED):
        used[vae.quantize(vae.encode(pixel_values).latents)[2][2].flatten()] = 1
    return (accelerator.reduce(used, "sum") > 0).float().mean().item()


@torch.no_grad()
def judge_digits(vae, train_set: Subset, held_out: Subset, device: torch.device) -> dict[str, float]:
    """Whether a classifier of real digits still reads reconstructed ones, averaged down to 8×8."""
    judge, samples = Judge(samples_of(train_set)), samples_of(held_out)
    pixel_values = torch.stack([held_out[i] for i in range(len(held_out))]).to(device)
    gray = (vae(pixel_values).sample.clamp(-1, 1).mean(dim=1, keepdim=True) + 1) * 127.5
    small = F.adaptive_avg_pool2d(gray, 8).flatten(1).round().cpu().numpy()
    accuracy = judge.classifier.score(small, [sample["label"] for sample in samples])
    return {"digit_accuracy": accuracy, "judge_accuracy": float(judge.accuracy(samples))}


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first. Unfinished ones have another name."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def save_checkpoint(accelerator: Accelerator, args: argparse.Namespace, state: dict) -> None:
    folder = args.output_dir / f"checkpoint-{state['step']}"
    unfinished = folder.with_suffix(".unfinished")
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(unfinished)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (unfinished / "run.json").write_text(json.dumps(state))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)
        for old in list_checkpoints(args.output_dir)[: -args.checkpoints_total_limit]:
            shutil.rmtree(old)


def load_checkpoint(accelerator: Accelerator, args: argparse.Namespace, run: dict, ema: EMAModel | None) -> int:
    """Returns the step to go on with."""
    folder = Path(args.resume_from_checkpoint)
    if args.resume_from_checkpoint == "latest":
        found = list_checkpoints(args.output_dir)
        if not found:
            accelerator.print(f"no checkpoint in {args.output_dir}: starts from the beginning")
            return 0
        folder = found[-1]
    if not (folder / "run.json").is_file():
        raise ValueError(f"--resume_from_checkpoint {folder} is not a checkpoint of this script")
    state = json.loads((folder / "run.json").read_text())
    differing = {name: (state[name], value) for name, value in run.items() if state[name] != value}
    if differing:
        raise ValueError(f"{folder} belongs to another run, (there, here): {differing}; pass the same flags")
    accelerator.load_state(folder)
    if ema is not None:
        ema.to(accelerator.device)  # it was read to the CPU
    accelerator.print(f"resumed from {folder}")
    return state["step"]


@dataclass
class Training:
    """What a training step needs."""

    args: argparse.Namespace
    accelerator: Accelerator
    criterion: VAELoss
    vae: AutoencoderKL | VQModel
    model: nn.Module
    discriminator: nn.Module
    optimizer: torch.optim.Optimizer
    discriminator_optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: EMAModel | None


def prepare(args: argparse.Namespace, accelerator: Accelerator, train_set: Subset) -> Training:
    criterion = build_loss(args, train_set).to(accelerator.device)
    set_seed(args.seed)
    vae = build_vae(args)
    if args.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    discriminator = PatchDiscriminator(3, args.discriminator_channels, args.discriminator_layers)
    betas = (args.adam_beta1, args.adam_beta2)
    optimizers = [torch.optim.Adam(m.parameters(), args.learning_rate, betas) for m in (vae, discriminator)]
    scheduler = get_scheduler(
        args.lr_scheduler,
        optimizers[0],
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    prepared = accelerator.prepare(Autoencoder(vae, args.restart_codes_after), discriminator, *optimizers)
    accelerator.register_for_checkpointing(scheduler)
    ema = None
    if args.ema_decay > 0:
        ema = EMAModel(vae.parameters(), decay=args.ema_decay, use_ema_warmup=True)
        ema.to(accelerator.device)
        accelerator.register_for_checkpointing(ema)
    set_seed(args.seed, device_specific=True)  # its own noise for each process
    return Training(args, accelerator, criterion, vae, *prepared, scheduler, ema)


def train_step(training: Training, batches, step: int) -> dict[str, torch.Tensor]:
    """Updates autoencoder and discriminator, and returns the terms of the loss."""
    accelerator, criterion, model = training.accelerator, training.criterion, training.model
    discriminator, discriminator_optimizer = training.discriminator, training.discriminator_optimizer
    for _ in range(training.args.gradient_accumulation_steps):
        pixel_values = next(batches).to(accelerator.device, non_blocking=True)
        with accelerator.accumulate(model, discriminator):
            reconstruction, regularizer = model(pixel_values)
            with accelerator.autocast():
                loss, terms = criterion(
                    reconstruction, pixel_values, regularizer, step, accelerator.unwrap_model(discriminator)
                )
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), training.args.max_grad_norm)
            training.optimizer.step()
            training.optimizer.zero_grad()
            if criterion.gan_is_on(step):
                terms["discriminator"] = criterion.discriminator_loss(discriminator, reconstruction, pixel_values)
                accelerator.backward(terms["discriminator"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(discriminator.parameters(), training.args.max_grad_norm)
                for group in discriminator_optimizer.param_groups:
                    group["lr"] = training.scheduler.get_last_lr()[0]
                discriminator_optimizer.step()
                discriminator_optimizer.zero_grad()
    training.scheduler.step()
    if training.ema is not None:
        training.ema.step(training.vae.parameters())
    return terms


def train(training: Training, train_set: Subset, held_out: Subset) -> float:
    """Runs all steps with logs, evaluations and checkpoints; returns the seconds it took."""
    args, accelerator, vae = training.args, training.accelerator, training.vae
    names = ("seed", "image_size", "train_batch_size", "gradient_accumulation_steps")
    run = {name: getattr(args, name) for name in names}
    run |= {"num_train_images": len(train_set), "num_processes": accelerator.num_processes}
    first = load_checkpoint(accelerator, args, run, training.ema) if args.resume_from_checkpoint else 0
    loader = DataLoader(
        train_set,
        batch_sampler=endless_batches(len(train_set), args, accelerator, first),
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator(),  # otherwise the workers' seed comes from the generator of the noise
    )
    batches, start = iter(loader), time.perf_counter()
    steps = range(first + 1, args.max_train_steps + 1)
    progress = tqdm(steps, desc="train", disable=not accelerator.is_local_main_process)
    for step in progress:
        terms = train_step(training, batches, step - 1)
        if step % args.logging_steps == 0:
            logs = {name: term.item() for name, term in terms.items()} | {"lr": training.scheduler.get_last_lr()[0]}
            progress.set_postfix({name: f"{value:.3g}" for name, value in logs.items()})
            accelerator.log(logs, step)
        if step % args.eval_steps == 0:
            with averaged(training.ema, vae):
                accelerator.log(evaluate(vae, held_out, accelerator, args), step)
                if accelerator.is_main_process:
                    save_grid(vae, held_out, args.output_dir / "samples" / f"{step:07}.png", accelerator.device)
        if step % args.checkpointing_steps == 0 or step == args.max_train_steps:
            save_checkpoint(accelerator, args, {"step": step, **run})
    return time.perf_counter() - start


def finish(training: Training, train_set: Subset, held_out: Subset) -> dict:
    """Judges and saves the trained autoencoder, with the scale of its latents."""
    args, accelerator, vae = training.args, training.accelerator, training.vae
    results = {"parameters": vae.num_parameters()}
    if training.ema is not None:
        training.ema.copy_to(vae.parameters())
    results |= evaluate(vae, held_out, accelerator, args)
    if args.vq:
        results["codes_used"] = share_of_codes_used(vae, train_set, accelerator, args)
    else:
        some = Subset(train_set, range(min(len(train_set), NUM_MEASURED)))
        scale, shift = measure_latent_scale(vae, DataLoader(some, args.train_batch_size))
        results |= {"scaling_factor": scale, "shift_factor": shift}
        vae.register_to_config(scaling_factor=scale, shift_factor=shift)
    if accelerator.is_main_process:
        vae.save_pretrained(args.output_dir / "vae")
        save_grid(vae, held_out, args.output_dir / "reconstructions.png", accelerator.device)
        if args.digits:
            results |= judge_digits(vae, train_set, held_out, accelerator.device)
    return results


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
    )
    accelerator.init_trackers("logs", {name: str(value) for name, value in vars(args).items()})
    train_set, held_out = load_images(args)
    training = prepare(args, accelerator, train_set)
    seconds = train(training, train_set, held_out)
    results = {"train_seconds": round(seconds, 1), **finish(training, train_set, held_out)}
    if accelerator.is_main_process:
        (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        print(*(f"{name:18} {value}" for name, value in results.items()), sep="\n")
        if not args.vq:  # a Transfusion diffuses latents without codes
            words = ("transfusion", "train", "--tokenizer_name", "TOKENIZER", "--caption_dataset", "DATA")
            words = ("python", "examples/quickstart.py", "--vae") if args.digits else (*words, "--vae_name_or_path")
            say_next(args.output_dir, *words, args.output_dir / "vae")
    accelerator.end_training()
    return results


if __name__ == "__main__":
    main()
