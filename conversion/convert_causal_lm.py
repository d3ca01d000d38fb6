"""
Turns a language model into a Transfusion that can learn to draw, and writes it with its processor:

    python conversion/convert_causal_lm.py HuggingFaceTB/SmolLM2-135M outputs/model --sample_size 256 \
        --vae stabilityai/sd-vae-ft-mse

If the autoencoder comes without the scale of its latents, `--measure_vae_scale photos` measures it on a folder of
pictures.

MODEL is a folder or a repository of the Hub, in safetensors, or a GGUF file. The script reads and writes tensor by
tensor, so the model may be larger than the memory; that of a GGUF file is in memory, in float32. `--set
prediction_type=v_prediction patch_encoder=unet` sets further fields of `TransfusionConfig`.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import AutoModelForCausalLM, AutoTokenizer

from transfusion_hf import TransfusionForCausalLMAndDiffusion, TransfusionImageProcessor, measure_latent_scale
from transfusion_hf.configuration_transfusion import latent_channels_and_scale
from transfusion_hf.conversion.causal_lm import convert_causal_lm
from transfusion_hf.conversion.gguf import find_gguf, load_gguf
from transfusion_hf.data import load_rows
from transfusion_hf.vae.attach import load_autoencoder

NUM_MEASURED = 1000


def parse_fields(pairs: list[str]) -> dict:
    """`["a=1", "b=x"]` as a dict. Values that are not JSON are strings."""
    fields = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise SystemExit(f"--set takes NAME=VALUE; got {pair!r}.")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return fields


@torch.no_grad()
def check(model: str, output_dir: Path, revision: str | None) -> None:
    """Compares the logits of both models, which must fit into memory, in float32."""
    converted = TransfusionForCausalLMAndDiffusion.from_pretrained(output_dir)
    if (file := find_gguf(Path(model))) is None:
        original = AutoModelForCausalLM.from_pretrained(model, dtype=converted.dtype, revision=revision)
    else:
        original = load_gguf(file)
    converted, original = converted.float(), original.float()
    ids = torch.randint(converted.config.image_start_token_id, (1, 64))
    ids = ids.clamp(max=original.config.vocab_size - 1)
    expected, logits = original(ids).logits, converted(ids).logits[..., : original.config.vocab_size]
    error = (expected - logits).abs().max().item()
    print(f"largest difference of the text logits: {error:.2g}")
    if not error <= 1e-5 * max(1.0, expected.abs().max().item()):
        raise SystemExit("The converted model does not have the logits of the original.")


def measure_vae_scale(vae: AutoencoderKL, pictures: str, image_column: str, side: int) -> None:
    """Sets scale and shift of the autoencoder, measured on up to `NUM_MEASURED` pictures of `side` × `side`."""
    half = [0.5] * vae.config.in_channels
    image_processor = TransfusionImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_mean=half, image_std=half
    )
    rows = load_rows(pictures, streaming=True).select_columns([image_column])
    batches = rows.shuffle(seed=0).take(NUM_MEASURED).iter(8)
    scale, shift = measure_latent_scale(vae, (image_processor(rows[image_column])["pixel_values"] for rows in batches))
    vae.register_to_config(scaling_factor=scale, shift_factor=shift)
    print(f"the latents of {pictures} have a scale of {scale:.5g} and a shift of {shift:.5g}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a language model: a folder or repository of the Hub, or a GGUF file")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--tokenizer", help="default: the model's own")
    parser.add_argument(
        "--vae", help="an AutoencoderKL or AutoencoderRAE of diffusers; by default the model draws pixels"
    )
    parser.add_argument("--vae_subfolder", default="")
    parser.add_argument(
        "--measure_vae_scale",
        metavar="PICTURES",
        help="measures scale and shift of the latents on pictures: a folder, or a repository of the Hub",
    )
    parser.add_argument("--image_column", default="image", help="of those pictures")
    parser.add_argument("--sample_size", type=int, default=256, help="pixels of a side (default 256)")
    parser.add_argument("--patch_size", type=int, default=2, help="latent pixels of a side of a patch (default 2)")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="fields of TransfusionConfig")
    parser.add_argument("--pad_to_multiple_of", type=int, help="pads the vocabulary")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: unchanged")
    parser.add_argument("--max_shard_size", help="for example '5GB'; default: half the largest file read")
    parser.add_argument("--revision", help="of the model's repository")
    for name in ("image_token", "image_start_token", "image_end_token"):
        parser.add_argument(f"--{name}", help="the text of this token")
    parser.add_argument("--check", action="store_true", help="compares the logits of both models, in memory")
    args = parser.parse_args(argv)
    if args.measure_vae_scale and not args.vae:
        parser.error("--measure_vae_scale needs --vae")

    vae, latents = None, {"latent_channels": 3, "sample_size": args.sample_size}
    if args.vae is not None:
        vae = load_autoencoder(args.vae, subfolder=args.vae_subfolder)
        channels, factor = latent_channels_and_scale(vae.config)
        if args.sample_size % factor:
            parser.error(f"--sample_size must be a multiple of {factor} with this autoencoder; got {args.sample_size}")
        latents = {"latent_channels": channels, "sample_size": args.sample_size // factor}
        if args.measure_vae_scale is not None:
            measure_vae_scale(vae, args.measure_vae_scale, args.image_column, args.sample_size)
    tokens = {name: getattr(args, name) for name in ("image_token", "image_start_token", "image_end_token")}
    convert_causal_lm(
        args.model,
        args.output_dir,
        tokenizer=args.tokenizer and AutoTokenizer.from_pretrained(args.tokenizer),
        vae=vae,
        pad_to_multiple_of=args.pad_to_multiple_of,
        dtype=args.dtype and getattr(torch, args.dtype),
        max_shard_size=args.max_shard_size,
        revision=args.revision,
        image_tokens={name: token for name, token in tokens.items() if token is not None},
        patch_size=args.patch_size,
        **latents,
        **parse_fields(args.set),
    )
    print(f"written to {args.output_dir}")
    if args.check:
        check(args.model, args.output_dir, args.revision)


if __name__ == "__main__":
    main()
