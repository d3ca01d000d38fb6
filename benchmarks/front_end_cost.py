"""
What the front ends cost in a training step of the paper's 0.16B model: patch encoder and decoder, linear and U-Net,
and the paper's VAE with and without precomputed latents. The parts are timed in turn within each round.

    python benchmarks/front_end_cost.py [--num_images 2] [--num_text_tokens 64] [--output_dir benchmarks/results]
"""

import argparse
from collections.abc import Callable

import torch
from ratios import image_batch, in_turn, make_parser, median_and_range, quotients, setting, write

from transfusion_hf import TransfusionConfig, TransfusionForCausalLMAndDiffusion, paper_vae_config


def parts_of(patch_encoder: str, args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """A whole training step without optimizer, and its image parts alone, forward and backward."""
    device = args.device
    config = TransfusionConfig.from_preset("0.16B", patch_encoder=patch_encoder, vae_config=paper_vae_config(1.0))
    model = TransfusionForCausalLMAndDiffusion(config).to(device).train()
    batch = image_batch(config, args.num_images, args.num_text_tokens, device)
    images = torch.rand(args.num_images, 3, 256, 256, device=device) * 2 - 1
    latents = torch.randn(args.num_images, 8, 32, 32, device=device)
    inner, timesteps = model.model, torch.full((args.num_images,), 500, device=device)

    def step(**kwargs):
        model.zero_grad()
        model(**batch, **kwargs).loss.backward()

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
    parser = make_parser(__doc__, device="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num_images", type=int, default=2)
    parser.add_argument("--num_text_tokens", type=int, default=64)
    args = parser.parse_args()

    lines = ["| front end | part | share of the step on latents, median | min–max |", "|---|---|---|---|"]
    for patch_encoder in ("linear", "unet"):
        times = in_turn(parts_of(patch_encoder, args), args.rounds, args.device, patch_encoder)
        for name, own in times.items():
            shares = median_and_range(quotients(own, times["step on latents"]))
            lines.append(f"| {patch_encoder} | {name} | {shares} |")
    text = (
        f"# Cost of the front ends\n\n{setting(args.device)}, float32: 0.16B, {args.num_images} rows of "
        f"{args.num_text_tokens} text tokens and an image of 256×256 pixels, 32×32×8 latents, patches of 2; forward "
        "and backward, no optimizer. The VAE is the paper's, encoding only; with precomputed latents it costs "
        "nothing.\n\n" + "\n".join(lines) + "\n"
    )
    write(text, "front_end_cost", args)


if __name__ == "__main__":
    main()
