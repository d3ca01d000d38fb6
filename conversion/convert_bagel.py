"""
Turns BAGEL-7B-MoT, or a fine-tune in its format, into a Transfusion, and writes it with its processor:

    python conversion/convert_bagel.py BAGEL-7B-MoT outputs/bagel

BAGEL is a folder or a repository of the Hub. Files are written one at a time, so at most one is in memory.
"""

import argparse
from pathlib import Path

import torch

from transfusion_hf.conversion.bagel import convert_bagel


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bagel", help="a folder or a repository of the Hub")
    parser.add_argument("output_dir", type=Path, help="must be empty, or not exist")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: unchanged")
    parser.add_argument("--max_shard_size", default="4GB", help="of each file (default 4GB)")
    parser.add_argument("--revision", help="of the repository")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    dtype = args.dtype and getattr(torch, args.dtype)
    convert_bagel(args.bagel, args.output_dir, dtype, args.max_shard_size, args.revision)
    print(f"written to {args.output_dir}")


if __name__ == "__main__":
    main()
