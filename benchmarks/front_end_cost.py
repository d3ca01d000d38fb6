"""
What the front ends cost in a training step of the paper's 0.16B model: patch encoder and decoder, linear and U-Net,
and the paper's VAE with and without precomputed latents. The parts are timed in turn within each round.

    python benchmarks/front_end_cost.py [--num_images 2] [--num_text_tokens 64] [--output_dir benchmarks/results]
"""

import argparse
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm.auto import tqdm

from transfusion_hf import TransfusionConfig, TransfusionForCausalLMAndDiffusion, make_labels, paper_vae_config


def features_of(config: TransfusionConfig, num_images: int, num_text_tokens: int, device) -> dict[str, torch.Tensor]:
    """Rows of a caption and an image of 32×32 latents."""
    image = [config.image_token_id] * config.num_patches(32, 32)
    row = [5] * num_text_tokens + [config.image_start_token_id] + image + [config.image_end_token_id]
    ids = torch.tensor([row] * num_images)
    special = (config.image_start_token_id, config.image_token_id, config.image_end_token_id)
    return {"input_ids": ids.to(device), "labels": make_labels(ids, torch.ones_like(ids), *special).to(device)}


def seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def parts_of(patch_encoder: str, args, device: torch.device) -> dict[str, Callable[[], object]]:
    """A whole training step without optimizer, and its image parts alone, forward and backward."""
    config = TransfusionConfig.from_preset("0.16B", patch_encoder=patch_encoder, vae_config=paper_vae_config(1.0))
    model = TransfusionForCausalLMAndDiffusion(config).to(device).train()
    features = features_of(config, args.num_images, args.num_text_tokens, device)
    images = torch.rand(args.num_images, 3, 256, 256, device=device) * 2 - 1
    latents = torch.randn(args.num_images, 8, 32, 32, device=device)
    inner, timesteps = model.model, torch.full((args.num_images,), 500, device=device)

    def step(**kwargs):
        model.zero_grad()
        model(**features, **kwargs).loss.backward()

    def front_end():
        model.zero_grad()
        patches, skips = inner.patch_encoder([latents], timesteps)
        inner.patch_decoder(patches, [(32, 32)], skips)[0].square().mean().backward()

    return {
        "step on latents": lambda: step(latents=latents),
        "patch encoder and decoder": front_end,
        "VAE encoding": lambda: model.encode_images(images),
        "step on pixels": lambda: step(pixel_values=images),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, default=2)
    parser.add_argument("--num_text_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmarks"))
    args = parser.parse_args()
    device = torch.device(args.device)

    lines = ["| front end | part | share of the step on latents, median | min–max |", "|---|---|---|---|"]
    for patch_encoder in ("linear", "unet"):
        parts = parts_of(patch_encoder, args, device)
        times: dict[str, list[float]] = {name: [] for name in parts}
        for number in tqdm(range(args.rounds + 1), desc=patch_encoder):
            for name, run in parts.items():
                elapsed = seconds(run, device)
                if number:
                    times[name].append(elapsed)
        for name, own in times.items():
            shares = [t / whole for t, whole in zip(own, times["step on latents"], strict=True)]
            spread = f"{min(shares):.3f}–{max(shares):.3f}"
            lines.append(f"| {patch_encoder} | {name} | {statistics.median(shares):.3f} | {spread} |")
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    text = (
        f"# Cost of the front ends\n\n{datetime.date.today()}, {hardware}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, float32: 0.16B, {args.num_images} rows of {args.num_text_tokens} text tokens and an "
        "image of 256×256 pixels, 32×32×8 latents, patches of 2; forward and backward, no optimizer. The VAE is the "
        "paper's, encoding only; with precomputed latents it costs nothing.\n\n" + "\n".join(lines) + "\n"
    )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "front_end_cost.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
