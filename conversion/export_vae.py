"""
Writes the autoencoder of a Transfusion on its own, as diffusers' `AutoencoderKL` loads it:

    python conversion/export_vae.py outputs/model outputs/vae
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from transfusion_hf import TransfusionForCausalLMAndDiffusion
from transfusion_hf.export import extract_vae


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or repository of a Transfusion")
    parser.add_argument("output_dir", type=Path, help="must not exist: it is written whole or not at all")
    args = parser.parse_args(argv)
    if args.output_dir.exists():
        raise SystemExit(f"{args.output_dir} exists; choose another folder.")
    vae = extract_vae(TransfusionForCausalLMAndDiffusion.from_pretrained(args.model, dtype="auto"))
    args.output_dir.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=args.output_dir.parent) as aside:
        vae.save_pretrained(Path(aside, "whole"))
        Path(aside, "whole").rename(args.output_dir)
    print(f"written to {args.output_dir}")


if __name__ == "__main__":
    main()
