"""
The way back: writes a Transfusion that was converted from BAGEL, fine-tuned perhaps, under BAGEL's names.

    python conversion/export_bagel.py outputs/bagel outputs/ema

Copy `ae.safetensors` and the tokenizer's files from the BAGEL that was converted.
"""

import argparse
from pathlib import Path

from transfusion_hf.conversion.bagel import export_bagel


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder")
    parser.add_argument("output_dir", type=Path, help="must be empty, or not exist")
    parser.add_argument("--max_shard_size", help="of each file; default: one file, which must fit into memory")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    export_bagel(args.model, args.output_dir, args.max_shard_size)
    print(f"written to {args.output_dir}")


if __name__ == "__main__":
    main()
