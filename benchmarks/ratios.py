"""What the benchmarks share: things timed in turn in one run, their ratios, and the report."""

import argparse
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm

from transfusion_hf import TransfusionConfig, make_labels

Row = tuple[str, list[float], float, str]  # what, the ratio of each round, its upper bound, a remark


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(runs: dict[str, Callable], rounds: int, device: torch.device, label: str) -> dict[str, list[float]]:
    """Seconds of each run in each round, after a round to warm up. A run may return its own seconds as a float."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in tqdm(range(rounds + 1), desc=label, leave=False):
        # Every other round goes backwards, so that no run is always the first.
        for name, run in list(runs.items())[:: -1 if number % 2 else 1]:
            start = clock(device)
            result = run()
            if number:
                seconds[name].append(result if isinstance(result, float) else clock(device) - start)
    return seconds


def quotients(numerators: list[float], denominators: list[float]) -> list[float]:
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def median_and_range(values: list[float], digits: int = 3) -> str:
    """Two cells of a table."""
    return f"{statistics.median(values):.{digits}f} | {min(values):.{digits}f}–{max(values):.{digits}f}"


def compare(what: str, runs: dict[str, Callable], bound: float, remark: str, rounds: int, device) -> list[Row]:
    """The time of each run over that of the last run."""
    *own, (last, base) = in_turn(runs, rounds, device, what).items()
    rows = []
    for name, times in own:
        medians = " / ".join(f"{1e3 * statistics.median(t):.1f}" for t in (times, base))
        rows.append((f"{what}: {name} / {last}", quotients(times, base), bound, f"{medians} ms; {remark}"))
    return rows


def table(rows: list[Row]) -> str:
    lines = ["| ratio | median | min–max | bound | | medians, and what was compared |", "|---|---|---|---|---|---|"]
    for what, ratios, bound, remark in rows:
        verdict = "holds" if statistics.median(ratios) <= bound else "FAILS"
        lines.append(f"| {what} | {median_and_range(ratios)} | {bound:g} | {verdict} | {remark} |")
    return "\n".join(lines)


def num_passes(transformer: torch.nn.Module, run: Callable) -> tuple[int, int]:
    """How often a run goes through the transformer, and with how many tokens in total."""
    tokens: list[int] = []

    def count(_, args, kwargs, __):
        inputs = kwargs["inputs_embeds"] if "inputs_embeds" in kwargs else args[0]
        tokens.append(inputs.shape[0] * inputs.shape[1])

    with transformer.register_forward_hook(count, with_kwargs=True):
        run()
    return len(tokens), sum(tokens)


def image_batch(
    config: TransfusionConfig, num_rows: int, num_words: int, device: torch.device, num_images: int = 1
) -> dict[str, torch.Tensor]:
    """Rows of random words and an image after them, `num_images` times; without the latents."""
    num_patches = config.num_patches(*config.latent_size)
    words = torch.randint(5, config.image_start_token_id, (num_rows, num_images, num_words), device=device)
    image = [config.image_start_token_id] + [config.image_token_id] * num_patches + [config.image_end_token_id]
    ids = torch.cat([words, torch.tensor(image, device=device).expand(num_rows, num_images, -1)], 2).flatten(1)
    tokens = (config.image_start_token_id, config.image_token_id, config.image_end_token_id)
    return {"input_ids": ids, "labels": make_labels(ids, torch.ones_like(ids), *tokens)}


def make_peer(config: TransfusionConfig, sizes: dict[str, int], device: torch.device, **kwargs) -> torch.nn.Module:
    """A transfusion-pytorch model that takes the same patches as a Transfusion of this configuration."""
    from loguru import logger
    from transfusion_pytorch import Transfusion

    logger.disable("transfusion_pytorch")
    side = config.latent_size[0] // config.patch_size
    return Transfusion(
        num_text_tokens=config.text_config.vocab_size - 134,  # it adds as many tokens itself
        transformer=sizes,
        dim_latent=config.latent_channels * config.patch_size**2,
        modality_default_shape=(side, side),
        **kwargs,
    ).to(device)


def setting(device: torch.device) -> str:
    """Date, hardware and versions, for the head of a report."""
    cores = f"{os.cpu_count()} shared {platform.machine().replace('_', '-')} cores, {torch.get_num_threads()} threads"
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else cores
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{datetime.date.today()}, {hardware}, {versions}"


def write(text: str, name: str, args: argparse.Namespace) -> None:
    """Prints a report and writes it to `<name>.md`, or `<name>_cuda.md` if it was measured on a GPU."""
    name += "" if args.device.type == "cpu" else f"_{args.device.type}"
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / f"{name}.md").write_text(text)
    print(text)


def report(title: str, name: str, body: str, args: argparse.Namespace) -> None:
    """Writes the results of `benchmarks/<name>.py`."""
    text = (
        f"# {title}\n\n{setting(args.device)}, float32, `python benchmarks/{name}.py`: random weights, {args.rounds} "
        f"rounds. A ratio is the first over the second.\n\n{body}\n"
    )
    write(text, name, args)


def make_parser(description: str | None, rounds: int = 5, device: str = "cpu") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--device", type=torch.device, default=torch.device(device))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmarks"))
    return parser


def parse_arguments(description: str | None, parts: Iterable[str]) -> argparse.Namespace:
    parser = make_parser(description)
    parser.add_argument("--parts", nargs="+", choices=list(parts), default=list(parts))
    return parser.parse_args()
