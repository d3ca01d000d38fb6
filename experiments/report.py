"""What the tables say: means and spreads over seeds, the paper's claims judged, and plots of every metric."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import parity
import torch
from runs import Settings

# What a higher value of each metric means, and how the table calls it.
METRICS = {
    "perplexity": (-1, "perplexity ↓"),
    "captioned": (1, "captions right ↑"),
    "cider": (1, "CIDEr (words) ↑"),
    "drawn": (1, "drawn right ↑"),
    "frechet_distance": (-1, "Fréchet distance ↓"),
}


# The paper's parity FLOP ratios (Table 3): C4 and Wikipedia, CIDEr, FID.
PARITY = {"perplexity": ".489, .526", "cider": ".218", "frechet_distance": ".029"}


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


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_table(
    name: str, table: Table, folders: dict[str, list[Path]], results: Path, command: str, ceilings: dict[str, Any]
) -> Path:
    """`results/<name>.md` and `.png`."""
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
        *_guidance(folders),
        f"Ceilings of the autoencoders: {json.dumps(ceilings)}.",
        "",
        f"![metrics over training]({name}.png)",
    ]
    return _save(results, name, lines, _plot(folders, metrics))


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
    if not table.claims:
        return
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
    yield ""


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


def _save(results: Path, name: str, lines: list[str], figure: plt.Figure) -> Path:
    results.mkdir(parents=True, exist_ok=True)
    figure.savefig(results / f"{name}.png", dpi=100)
    plt.close(figure)
    file = results / f"{name}.md"
    file.write_text("\n".join(lines) + "\n")
    return file


def _plot(folders: dict[str, list[Path]], metrics: list[str]) -> plt.Figure:
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
    return figure


def write_figure5(folders: dict[str, list[Path]], results: Path, command: str) -> Path:
    """`results/figure5.md` and `.png`, from the runs of table 3."""
    whole = {row: [folder for folder in runs if _is_whole(folder)] for row, runs in folders.items()}
    lines = ["# figure5: Metrics and compute", "", _setting(command, folders), ""]
    lines += [
        "| metric | slope, Transfusion | slope, Chameleon | parity FLOP ratio | paper |",
        "|---|---|---|---|---|",
    ]
    figure, axes = plt.subplots(1, len(METRICS), figsize=(4.2 * len(METRICS), 3.6), layout="constrained")
    for axis, (metric, (sign, title)) in zip(axes, METRICS.items(), strict=True):
        points: dict[str, parity.Points] = {family: {} for family in ("Transfusion", "Chameleon")}
        for row, runs in whole.items():
            family, _, size = row.partition(" ")
            if family in points and runs:
                points[family][size] = [(line["flops"], line[metric]) for line in (lines_of(run)[-1] for run in runs)]
        lines.append(f"| {title} | {' | '.join(parity.row(*points.values(), sign))} | {PARITY.get(metric, '')} |")
        parity.plot(axis, points)
        axis.set_title(title)
    axes[-1].legend(fontsize=7)
    lines += [
        "",
        "Slopes of log metric over log FLOPs, with their standard error. The ratio is the share of Chameleon's FLOPs, "
        "at its largest size, with which Transfusion's line reaches the same value; in brackets the 95 % interval "
        "when seeds are drawn again.",
        "",
        "![metrics over compute](figure5.png)",
    ]
    return _save(results, "figure5", lines, figure)
