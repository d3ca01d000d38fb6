"""Ratios of things timed in turn in one run, and the report on them: what the benchmarks share."""

import argparse
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tqdm.auto import tqdm

Row = tuple[str, list[float], float, str]  # what, the ratio of each round, the bound, a remark


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def compare(what: str, runs: dict[str, Callable], bound: float, remark: str, rounds: int, device) -> list[Row]:
    """Each run but the last over the last, after a round to warm up. A run may return its own seconds, a float."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in tqdm(range(rounds + 1), desc=what, leave=False):
        # Every other round backwards: whatever the first suffers, the last does, too.
        for name, run in list(runs.items())[:: -1 if number % 2 else 1]:
            start = clock(device)
            result = run()
            if number:
                seconds[name].append(result if isinstance(result, float) else clock(device) - start)
    *own, (last, base) = seconds.items()
    rows = []
    for name, times in own:
        medians = " / ".join(f"{1e3 * statistics.median(t):.1f}" for t in (times, base))
        ratios = [a / b for a, b in zip(times, base, strict=True)]
        rows.append((f"{what}: {name} / {last}", ratios, bound, f"{medians} ms; {remark}"))
    return rows


def num_passes(transformer: torch.nn.Module, run: Callable) -> tuple[int, int]:
    """How often a run goes through the transformer, and with how many tokens in all."""
    tokens: list[int] = []

    def count(_, args, kwargs, __):
        inputs = kwargs["inputs_embeds"] if "inputs_embeds" in kwargs else args[0]
        tokens.append(inputs.shape[0] * inputs.shape[1])

    with transformer.register_forward_hook(count, with_kwargs=True):
        run()
    return len(tokens), sum(tokens)


def table(rows: list[Row]) -> str:
    lines = ["| ratio | median | min–max | bound | | medians, and what was compared |", "|---|---|---|---|---|---|"]
    for what, ratios, bound, remark in rows:
        median, spread = statistics.median(ratios), f"{min(ratios):.3f}–{max(ratios):.3f}"
        verdict = "holds" if median <= bound else "FAILS"
        lines.append(f"| {what} | {median:.3f} | {spread} | {bound:g} | {verdict} | {remark} |")
    return "\n".join(lines)


def hardware(device: torch.device) -> str:
    """What it ran on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} shared {platform.machine().replace('_', '-')} cores, {torch.get_num_threads()} threads"


def parse_arguments(description: str | None, parts: Iterable[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(parts), default=list(parts))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmarks"))
    return parser.parse_args()


def report(title: str, name: str, body: str, args: argparse.Namespace) -> None:
    """Prints the results of `benchmarks/<name>.py`, and writes them to `<name>.md`."""
    text = (
        f"# {title}\n\n{datetime.date.today()}, {hardware(args.device)}, torch {torch.__version__}, float32, `python "
        f"benchmarks/{name}.py`: random weights, {args.rounds} rounds. A ratio is the first over the second.\n\n"
        f"{body}\n"
    )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / f"{name}.md").write_text(text)
    print(text)
