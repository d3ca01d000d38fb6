"""
Extracts the autoencoder of a Transfusion, for `AutoencoderKL` of diffusers:

    python conversion/export_vae.py outputs/model outputs/vae
"""

import argparse
from pathlib import Path

from transfusion_hf import TransfusionForCausalLMAndDiffusion
from transfusion_hf.conversion.causal_lm import written_whole
from transfusion_hf.conversion.export import extract_vae


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a repository of the Hub")
    parser.add_argument("output_dir", type=Path, help="must be empty, or not exist")
    args = parser.parse_args(argv)
    vae = extract_vae(TransfusionForCausalLMAndDiffusion.from_pretrained(args.model, dtype="auto"))
    with written_whole(args.output_dir) as folder:
        vae.save_pretrained(folder)
    print(f"written to {args.output_dir}")


if __name__ == "__main__":
    main()
