"""
The paper's comparisons, one command a table:

    python experiments/tables.py table8

trains every row of the table with several seeds, measures it along the way, and writes `results/<table>.md` with a
plot of the curves. Runs that are done are kept, so that a second call goes on, and tables share their runs.

The tables are those of arXiv 2408.11039. The small scale needs two cores and the packages that `data.py` fetches;
`--scale paper` has the paper's sizes and steps, and needs GPUs.
"""

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from data import Data
from metrics import Judge
from models import LEARNING_RATES, PAPER_SIZES, SMALL_SIZES
from runs import Settings, run
from tqdm.auto import tqdm

# What a higher value of each metric means, and how the table calls it.
METRICS = {
    "perplexity": (-1, "perplexity ↓"),
    "captioned": (1, "captions right ↑"),
    "cider": (1, "CIDEr (words) ↑"),
    "drawn": (1, "drawn right ↑"),
    "frechet_distance": (-1, "Fréchet distance ↓"),
}


@dataclass(frozen=True)
class Scale:
    """What differs between two cores and a cluster: numbers alone."""

    sizes: tuple[str, ...]
    size: str  # of tables with one size
    max_steps: int
    tokens_per_step: int
    max_length: int
    learning_rates: dict[str, float]
    options: dict[str, Any] = field(default_factory=dict)  # of Transfusion


SCALES = {
    "small": Scale(
        tuple(SMALL_SIZES)[:3],
        "0.8M",
        max_steps=3000,
        tokens_per_step=2048,
        max_length=256,
        learning_rates={"llama": 2e-3, "chameleon": 2e-3, "transfusion": 2e-3},
        # Errors of ε at high noise are magnified in x_0, and latents are not clipped (docs/front_ends.md).
        options={"prediction_type": "v_prediction"},
    ),
    # For tests and CI: that everything runs.
    "toy": Scale(("0.3M",), "0.3M", 2, 256, 128, {"llama": 1e-3, "chameleon": 1e-3, "transfusion": 1e-3}),
    "paper": Scale(PAPER_SIZES, "0.76B", 250_000, 2_000_000, 4096, LEARNING_RATES),
}


SWEPT_LEARNING_RATES = (1e-3, 2e-3, 4e-3)
TOY_DATA = {"num_pictures": 64, "num_held_out": 16, "vae_steps": 2}
TOY_JUDGE = {"num_texts": 2, "num_captions": 4, "num_drawings": 2, "num_inference_steps": 2}


@dataclass(frozen=True)
class Claim:
    """That `better` beats `worse` in `metrics`, as the paper found."""

    better: str
    worse: str
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """
    Args:
        title (`str`), rows (`dict[str, Settings]`): The rows of the first seed.
        paper (`dict[str, dict[str, float | str]]`): The paper's values, by row.
        claims (`list[Claim]`)
    """

    title: str
    rows: dict[str, Settings]
    paper: dict[str, dict[str, Any]]
    claims: list[Claim]


IMAGES = ("captioned", "cider", "drawn", "frechet_distance")


def _transfusion(scale: Scale, size: str | None = None, **options: Any) -> Settings:
    options = {"patch_size": 2, **scale.options, **options}
    return Settings("transfusion", size or scale.size, scale.learning_rates["transfusion"], options=options)


def _family(scale: Scale, family: str, size: str | None = None, **kwargs: Any) -> Settings:
    return Settings(family, size or scale.size, scale.learning_rates[family], **kwargs)


def table3(scale: Scale) -> Table:
    rows = {}
    for size in scale.sizes:
        rows[f"Transfusion {size}"] = _transfusion(scale, size)
        rows[f"Chameleon {size}"] = _family(scale, "chameleon", size)
    last = scale.sizes[-1]
    paper = {
        f"Transfusion {last}": {"perplexity": "7.72, 4.28", "cider": 27.2, "frechet_distance": 16.8},
        f"Chameleon {last}": {"perplexity": "8.41, 4.69", "cider": 18.0, "frechet_distance": 29.6},
    }
    claims = [Claim(f"Transfusion {size}", f"Chameleon {size}", tuple(METRICS)) for size in scale.sizes]
    return Table("Transfusion and Chameleon by size", rows, paper, claims)


def table4(scale: Scale) -> Table:
    stable = "+ stability changes"
    rows = {
        "Llama 2": _family(scale, "llama"),
        "+ diffusion (Transfusion)": _transfusion(scale),
        stable: _family(scale, "chameleon", with_images=False),
        "+ LM loss on image tokens (Chameleon)": _family(scale, "chameleon"),
    }
    values = ("10.1, 5.8", "10.4, 6.0", "11.0, 6.3", "11.8, 6.8")
    paper = {name: {"perplexity": value} for name, value in zip(rows, values, strict=True)}
    names = [*rows]
    claims = [Claim(names[i], names[j], ("perplexity",)) for i, j in ((0, 1), (0, 2), (2, 3), (1, 3))]
    return Table("Text alone", rows, paper, claims)


def table5(scale: Scale) -> Table:
    rows, paper = {}, {}
    values = ((12.7, 61.3), (16.0, 20.3), (23.3, 16.8), (25.4, 16.7))
    for encoder in ("linear", "unet"):
        for is_bidirectional in (False, True):
            name = f"{encoder}, {'bidirectional' if is_bidirectional else 'causal'}"
            rows[name] = _transfusion(scale, patch_encoder=encoder, bidirectional_image_attention=is_bidirectional)
            cider, frechet = values[len(paper)]
            paper[name] = {"cider": cider, "frechet_distance": frechet}
    claims = [Claim(f"{encoder}, bidirectional", f"{encoder}, causal", IMAGES) for encoder in ("linear", "unet")]
    claims += [Claim(f"unet, {order}", f"linear, {order}", IMAGES) for order in ("causal", "bidirectional")]
    return Table("Attention inside images", rows, paper, claims)


def table6(scale: Scale) -> Table:
    rows, paper = {}, {}
    values = {
        ("linear", 1): (12.0, 21.0), ("linear", 2): (16.0, 20.3), ("linear", 4): (14.3, 25.6),
        ("linear", 8): (11.3, 43.5), ("unet", 2): (25.4, 16.7), ("unet", 4): (29.9, 16.0), ("unet", 8): (29.5, 16.1),
    }  # fmt: skip
    for (encoder, size), (cider, frechet) in values.items():
        name = f"{encoder}, {size}×{size}"
        rows[name] = _transfusion(scale, patch_encoder=encoder, patch_size=size)
        paper[name] = {"cider": cider, "frechet_distance": frechet}
    claims = [Claim(f"unet, {size}×{size}", f"linear, {size}×{size}", IMAGES) for size in (2, 4, 8)]
    claims.append(Claim("linear, 2×2", "linear, 8×8", IMAGES))
    return Table("Patch sizes", rows, paper, claims)


def table7(scale: Scale) -> Table:
    rows, paper = {}, {}
    values = {
        "0.16B": (37.6, 18.8),
        "0.37B": (21.5, 18.1),
        "0.76B": (20.3, 16.7),
        "1.4B": (19.4, 16.6),
        "7B": (18.6, 16.0),
    }
    for size in scale.sizes:
        for i, encoder in enumerate(("linear", "unet")):
            rows[f"{encoder}, {size}"] = _transfusion(scale, size, patch_encoder=encoder)
            paper[f"{encoder}, {size}"] = {"frechet_distance": values[size][i]} if size in values else {}
    claims = [Claim(f"unet, {size}", f"linear, {size}", IMAGES) for size in scale.sizes]
    return Table("Front ends by size", rows, paper, claims)


def table8(scale: Scale) -> Table:
    limited = _transfusion(scale)
    rows = {"no limit": replace(limited, stream={"image_first_max_timesteps": 1000}), "t ≤ 500": limited}
    paper = {
        "no limit": {"cider": 25.4, "frechet_distance": 16.7},
        "t ≤ 500": {"cider": 29.4, "frechet_distance": 16.5},
    }
    claims = [Claim("t ≤ 500", "no limit", IMAGES)]
    return Table("Noise limit of images before their caption", rows, paper, claims)


def sweep(scale: Scale) -> Table:
    """A sweep over the same learning rates for each family."""
    rows = {
        f"{family}, {rate:g}": replace(
            _transfusion(scale) if family == "transfusion" else _family(scale, family), learning_rate=rate
        )
        for family in scale.learning_rates
        for rate in SWEPT_LEARNING_RATES
    }
    return Table("Learning rates", rows, {}, [])


TABLES: dict[str, Callable[[Scale], Table]] = {
    "table3": table3, "table4": table4, "table5": table5, "table6": table6, "table7": table7, "table8": table8,
    "sweep": sweep,
}  # fmt: skip


def folder_of(settings: Settings, output_dir: Path) -> Path:
    """The folder depends only on the settings, so tables can share runs."""
    parts = [settings.family, settings.size, f"{settings.max_steps}", f"{settings.learning_rate:g}"]
    extra = {**settings.options, **settings.stream, **({} if settings.with_images else {"images": False})}
    parts += [f"{name}={value}" for name, value in sorted(extra.items())]
    return output_dir / "runs" / "-".join([*parts, f"seed{settings.seed}"])


def _on_one_core(settings: Settings, data: Data, judge: Judge, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    return run(settings, data, judge, folder)


def all_runs(
    table: Table, num_seeds: int, data: Data, judge: Judge, output_dir: Path, num_processes: int
) -> dict[str, list[Path]]:
    """The folders of each row's runs, by seed; those that are missing are made, `num_processes` at a time."""
    folders: dict[str, list[Path]] = {name: [] for name in table.rows}
    todo = {}
    for seed in range(num_seeds):  # all rows of a seed before the next
        for name, settings in table.rows.items():
            settings = replace(settings, seed=seed)
            folders[name].append(folder := folder_of(settings, output_dir))
            todo[folder] = settings
    _prepare(data, judge)
    if num_processes == 1:
        for folder, settings in tqdm(todo.items(), desc="runs"):
            run(settings, data, judge, folder)
        return folders
    with ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_on_one_core, settings, data, judge, folder) for folder, settings in todo.items()]
        for future in tqdm(as_completed(futures), total=len(futures), desc="runs"):
            future.result()
    return folders


def _prepare(data: Data, judge: Judge) -> None:
    """What the runs share is computed once, before they start."""
    for split in ("train", "held_out"):
        data.passages(split, judge.max_length)
        data.captions(split)
        data.latents(split)
        data.codes(split)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_table(
    name: str, table: Table, folders: dict[str, list[Path]], results: Path, command: str, ceilings: dict[str, Any]
) -> Path:
    """`results/<name>.md` and `.png`."""
    results.mkdir(parents=True, exist_ok=True)
    metrics = [
        m for m in METRICS if all(m in lines_of(f)[-1] for row in folders.values() for f in row if _is_whole(f))
    ]
    lines = [f"# {name}: {table.title}", "", _setting(command, folders), ""]
    heads = ["row", *(METRICS[m][1] for m in metrics), "parameters", "tokens", "FLOPs", "seconds"]
    lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row, runs in folders.items():
        lines.append("| " + " | ".join([row, *_cells(runs, metrics, table.paper.get(row, {}))]) + " |")
    lines += [
        "",
        "Mean over seeds (least–most); in brackets the paper's value on its own data, for the direction alone.",
        "",
        *_verdicts(table, folders, metrics),
        "",
        *_guidance(folders),
        f"Ceilings of the autoencoders: {json.dumps(ceilings)}.",
        "",
        f"![metrics over training]({name}.png)",
    ]
    _plot(folders, metrics, results / f"{name}.png")
    file = results / f"{name}.md"
    file.write_text("\n".join(lines) + "\n")
    return file


def _is_whole(folder: Path) -> bool:
    return not json.loads((folder / "done.json").read_text())["has_diverged"]


def _setting(command: str, folders: dict[str, list[Path]]) -> str:
    runs = [folder for row in folders.values() for folder in row]
    diverged = [folder.name for folder in runs if not _is_whole(folder)]
    text = f"`{command}`, {date.today()}, {os.cpu_count()} cores, torch {torch.__version__}, {len(runs)} runs."
    return text + (f" Diverged, and left out of the means: {', '.join(diverged)}." if diverged else "")


def _values(runs: list[Path], metric: str) -> list[float]:
    return [lines_of(folder)[-1][metric] for folder in runs if _is_whole(folder)]


def _cells(runs: list[Path], metrics: list[str], paper: dict[str, Any]) -> Iterator[str]:
    for metric in metrics:
        values = _values(runs, metric)
        text = f"{np.mean(values):.3g} ({min(values):.3g}–{max(values):.3g})" if values else "diverged"
        yield text + (f" [{paper[metric]}]" if metric in paper else "")
    done = [json.loads((folder / "done.json").read_text()) for folder in runs]
    last = done[0]["last"]
    yield f"{done[0]['num_parameters']:,}"
    yield f"{last.get('num_tokens', 0):,}"
    yield f"{last.get('flops', 0):.2e}"
    yield f"{np.mean([each['seconds'] for each in done]):.0f}"


def _verdicts(table: Table, folders: dict[str, list[Path]], metrics: list[str]) -> Iterator[str]:
    """A claim holds if the order is the paper's and the ranges over seeds do not overlap."""
    yield "| claim | " + " | ".join(METRICS[m][1] for m in metrics) + " |"
    yield "|---" * (len(metrics) + 1) + "|"
    for claim in table.claims:
        cells = []
        for metric in metrics:
            if metric not in claim.metrics:
                cells.append("")
                continue
            sign = METRICS[metric][0]
            better, worse = ([sign * x for x in _values(folders[row], metric)] for row in (claim.better, claim.worse))
            if not better or not worse:
                cells.append("diverged")
            elif len(better) == 1 or len(worse) == 1:
                cells.append("one seed")
            elif min(better) > max(worse):
                cells.append("holds")
            else:
                cells.append("does not hold" if max(better) < min(worse) else "within the spread")
        yield f"| {claim.better} beats {claim.worse} | " + " | ".join(cells) + " |"


def _guidance(folders: dict[str, list[Path]]) -> Iterator[str]:
    """Drawings at other scales of guidance; a scale that suits one family may spoil another's."""
    found = {row: [lines_of(folder)[-1] for folder in runs if _is_whole(folder)] for row, runs in folders.items()}
    names = sorted({name for lines in found.values() for line in lines for name in line if "@" in name})
    if names:
        yield "| at other scales of guidance | " + " | ".join(names) + " |"
        yield "|---" * (len(names) + 1) + "|"
    for row, lines in found.items():
        if names and lines and names[0] in lines[0]:
            yield f"| {row} | " + " | ".join(f"{np.mean([line[name] for line in lines]):.3g}" for name in names) + " |"
    yield ""


def _plot(folders: dict[str, list[Path]], metrics: list[str], file: Path) -> None:
    """Each metric over the steps, a line a seed."""
    figure, axes = plt.subplots(
        1, len(metrics), figsize=(4.2 * len(metrics), 3.6), squeeze=False, layout="constrained"
    )
    for axis, metric in zip(axes[0], metrics, strict=True):
        for i, (row, runs) in enumerate(folders.items()):
            for seed, folder in enumerate(runs):
                lines = lines_of(folder)
                label = row if seed == 0 else None
                axis.plot(
                    [line["step"] for line in lines], [line[metric] for line in lines], f"C{i}.-", label=label, lw=1
                )
        axis.set(title=METRICS[metric][1], xlabel="step")
        if metric == "perplexity":
            axis.set_yscale("log")
    axes[0, -1].legend(fontsize=7)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def main(argv: list[str] | None = None) -> Path:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=[*TABLES])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", choices=[*SCALES], default="small")
    parser.add_argument("--max_steps", type=int, help="default: the scale's")
    parser.add_argument("--num_processes", type=int, default=2, help="runs at the same time, each on one core")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/experiments"))
    parser.add_argument("--packages", type=Path, help="where the packages with the texts are, or are to be")
    parser.add_argument("--results_dir", type=Path, default=Path("experiments/results"))
    args = parser.parse_args(argv)
    if args.scale == "paper" and not torch.cuda.is_available():
        parser.error("--scale paper needs GPUs; this machine has none")
    scale = SCALES[args.scale]
    if args.max_steps:
        scale = replace(scale, max_steps=args.max_steps)
    table = TABLES[args.table](scale)
    kept = {name: getattr(scale, name) for name in ("max_steps", "tokens_per_step", "max_length")}
    measurements = {"num_measurements": 2 if args.scale == "toy" else 6}
    table = replace(table, rows={name: replace(row, **kept, **measurements) for name, row in table.rows.items()})
    data = Data(args.output_dir, args.packages, **(TOY_DATA if args.scale == "toy" else {}))
    judge = Judge(data, scale.max_length, **(TOY_JUDGE if args.scale == "toy" else {}))
    folders = all_runs(table, args.seeds, data, judge, args.output_dir, args.num_processes)
    ceilings = {kind: data.ceiling(kind) for kind in ("kl", "vq")}
    command = f"python experiments/tables.py {' '.join(argv)}"
    file = write_table(args.table, table, folders, args.results_dir, command, ceilings)
    print(file)
    return file


if __name__ == "__main__":
    main()
