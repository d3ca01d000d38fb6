"""
Extracts the language model of a Transfusion, for `AutoModelForCausalLM`:

    python conversion/export_causal_lm.py outputs/model outputs/language-model \
        --vocab_size 49152 --tokenizer HuggingFaceTB/SmolLM2-135M

`--vocab_size` cuts off the tokens that were added to the original vocabulary. Pass the original tokenizer with it;
without `--vocab_size` the checkpoint's is written.
"""

import argparse
from pathlib import Path

from transformers import AutoTokenizer

from transfusion_hf import TransfusionForCausalLMAndDiffusion
from transfusion_hf.conversion.causal_lm import written_whole
from transfusion_hf.conversion.export import extract_causal_lm


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a repository of the Hub")
    parser.add_argument("output_dir", type=Path, help="must be empty, or not exist")
    parser.add_argument("--vocab_size", type=int, help="default: all of it, with the image tokens")
    parser.add_argument("--tokenizer", help="default: the model's, without --vocab_size")
    args = parser.parse_args(argv)
    source = args.tokenizer or (args.model if args.vocab_size is None else None)
    tokenizer = None if source is None else AutoTokenizer.from_pretrained(source)
    model = TransfusionForCausalLMAndDiffusion.from_pretrained(args.model, dtype="auto")
    language_model = extract_causal_lm(model, args.vocab_size)
    size = language_model.config.vocab_size
    if tokenizer is not None and len(tokenizer) > size:
        raise SystemExit(f"The tokenizer has {len(tokenizer)} tokens, and the vocabulary would have {size}.")
    with written_whole(args.output_dir) as folder:
        language_model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    print(f"written to {args.output_dir}" + (", without a tokenizer" if tokenizer is None else ""))


if __name__ == "__main__":
    main()
