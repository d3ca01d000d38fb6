"""Pages of results: means and spreads over seeds, verdicts on the paper's claims, and plots of every metric."""

import json
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import parity
from PIL import Image
from runs import RESULTS, Settings, read_lines

# By metric: 1 if more is better, −1 if less is, and its title.
METRICS = {
    "perplexity": (-1, "perplexity ↓"),
    "captioned": (1, "captions right ↑"),
    "cider": (1, "CIDEr (words) ↑"),
    "drawn": (1, "drawn right ↑"),
    "frechet_distance": (-1, "Fréchet distance ↓"),
}
# At the end of a run, at other scales of guidance.
AT_SCALES = {
    f"{name}@{scale}": (METRICS[name][0], f"{METRICS[name][1][:-2]} at {scale} {METRICS[name][1][-1]}")
    for name in ("drawn", "frechet_distance")
    for scale in (1, 2, 5)
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


@dataclass(frozen=True)
class Row:
    """The finished runs of a row, one for each seed."""

    folders: list[Path]

    @cached_property
    def done(self) -> list[dict[str, Any]]:
        return [json.loads((folder / "done.json").read_text()) for folder in self.folders]

    @cached_property
    def curves(self) -> list[list[dict[str, Any]]]:
        """The measurements of every run, those of diverged ones too."""
        return [read_lines(folder / "metrics.jsonl") for folder in self.folders]

    @property
    def last(self) -> list[dict[str, Any]]:
        """The last measurement of each run that did not diverge."""
        return [done["last"] for done in self.done if not done["has_diverged"]]

    def values(self, metric: str) -> list[float]:
        return [line[metric] for line in self.last if metric in line]


def write_table(
    name: str,
    table: Table,
    folders: dict[str, list[Path]],
    results: Path,
    command: str,
    ceilings: dict[str, dict[str, float]],
    shown: Sequence[tuple[str, Image.Image]] = (),
) -> Path:
    """`results/<name>.md` and `.png`, and `<name>-drawn.png` if a run has kept drawings of the captions in `shown`."""
    rows = {row: Row(runs) for row, runs in folders.items()}
    found = {metric for row in rows.values() for line in row.last for metric in line}
    metrics = [metric for metric in METRICS if metric in found]
    at_scales = [metric for metric in AT_SCALES if metric in found]
    lines = [f"# {name}: {table.title}", "", _setting(command, rows), ""]
    lines += _table("", metrics, {row: _cells(runs, metrics, table.paper.get(row, {})) for row, runs in rows.items()})
    lines += [
        "Mean over seeds (lowest–highest); in brackets the paper's value on its own data, for the direction alone.",
        "",
        *_verdicts(table.claims, rows, [*metrics, *at_scales]),
    ]
    if at_scales:
        cells = {row: _cells(runs, at_scales, {}) for row, runs in rows.items() if runs.values(at_scales[0])}
        lines += ["Other scales of guidance:", "", *_table("", at_scales, cells)]
    lines += [
        "| compute of a run | parameters | tokens | FLOPs | seconds of the fastest |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {row} | {' | '.join(_compute(runs))} |" for row, runs in rows.items()]
    lines += ["", *(f"Ceiling of the `{kind}` autoencoder: {_named(each)}." for kind, each in ceilings.items()), ""]
    lines += [f"![metrics over training]({name}.png)"]
    kept = {row: [file for run in runs if (file := run / "drawn.png").is_file()] for row, runs in folders.items()}
    drawn = {row: files[0] for row, files in kept.items() if files}
    if drawn and shown:
        lines += ["", "Drawings of the first seed, under real pictures:", ""]
        lines += [f"![drawings]({name}-drawn.png)"]
        _write_figure(results / f"{name}-drawn.png", _drawings(drawn, shown))
    return _save(results, name, lines, _plot(rows, metrics))


def keep_runs(folders: dict[str, list[Path]], results: Path) -> None:
    """Copies what the tables are made of to `results/runs`; copied back, the runs count as made."""
    for folder in {folder for runs in folders.values() for folder in runs}:
        kept = results / "runs" / folder.name
        kept.mkdir(parents=True, exist_ok=True)
        for file in RESULTS:
            if (folder / file).is_file():
                shutil.copyfile(folder / file, kept / file)


def _setting(command: str, rows: dict[str, Row]) -> str:
    done = [each for row in rows.values() for each in row.done]
    dates, hardware, torch = (sorted({each[name] for each in done}) for name in ("date", "hardware", "torch"))
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    diverged = [
        folder.name
        for row in rows.values()
        for folder, each in zip(row.folders, row.done, strict=True)
        if each["has_diverged"]
    ]
    text = f"`{command}`, {when}, {', '.join(hardware)}, torch {', '.join(torch)}, {len(done)} runs."
    return text + (f" Diverged, and left out of the means: {', '.join(diverged)}." if diverged else "")


def _table(corner: str, metrics: Sequence[str], cells: dict[str, list[str]]) -> Iterator[str]:
    titles = {**METRICS, **AT_SCALES}
    yield f"| {corner} | " + " | ".join(titles[metric][1] for metric in metrics) + " |"
    yield "|---" * (len(metrics) + 1) + "|"
    for name, row in cells.items():
        yield f"| {name} | " + " | ".join(row) + " |"
    yield ""


def _cells(row: Row, metrics: Sequence[str], paper: dict[str, Any]) -> list[str]:
    cells = []
    for metric in metrics:
        text = "" if row.last else "diverged"
        if values := row.values(metric):
            text = f"{_number(np.mean(values))} ({_number(min(values))}–{_number(max(values))})"
        cells.append(text + (f" [{paper[metric]}]" if metric in paper else ""))
    return cells


def _number(x: float) -> str:
    """Three digits, and 1000 instead of 1e+03."""
    return f"{float(f'{x:.3g}'):g}"


def _compute(row: Row) -> Iterator[str]:
    yield f"{row.done[0]['num_parameters']:,}"
    for name, form in (("num_tokens", ",.0f"), ("flops", ".2e"), ("seconds", ",.0f")):
        # A machine that is shared makes a run longer, and none shorter.
        over_seeds = min if name == "seconds" else np.mean
        yield f"{over_seeds([line[name] for line in row.last]):{form}}" if row.last else "diverged"


def _named(numbers: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in numbers.items())


def _verdicts(claims: list[Claim], rows: dict[str, Row], metrics: list[str]) -> Iterator[str]:
    """A claim holds if the order is the paper's and the ranges over seeds do not overlap."""
    metrics = [metric for metric in metrics if any(metric in claim.metrics for claim in claims)]
    cells = {}
    for claim in claims:
        pair = (rows[claim.better], rows[claim.worse])
        verdicts = [_verdict(metric, *pair) if metric in claim.metrics else "" for metric in metrics]
        cells[f"{claim.better} beats {claim.worse}"] = verdicts
    if claims:
        yield from _table("claim of the paper", metrics, cells)


def _verdict(metric: str, better: Row, worse: Row) -> str:
    sign = {**METRICS, **AT_SCALES}[metric][0]
    high, low = ([sign * x for x in row.values(metric)] for row in (better, worse))
    if not high or not low:
        return "diverged"
    if len(high) == 1 or len(low) == 1:
        return "one seed"
    if min(high) > max(low):
        return "holds"
    return "does not hold" if max(high) < min(low) else "within the spread"


def _write_figure(file: Path, figure: plt.Figure) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def _save(results: Path, name: str, lines: list[str], figure: plt.Figure) -> Path:
    _write_figure(results / f"{name}.png", figure)
    file = results / f"{name}.md"
    file.write_text("\n".join(lines) + "\n")
    return file


def _plot(rows: dict[str, Row], metrics: list[str]) -> plt.Figure:
    """Each metric over the steps, a line a seed."""
    size = (4.2 * len(metrics), 3.6)
    figure, axes = plt.subplots(1, len(metrics), figsize=size, squeeze=False, layout="constrained")
    for axis, metric in zip(axes[0], metrics, strict=True):
        for i, (name, row) in enumerate(rows.items()):
            for seed, curve in enumerate(row.curves):
                points = [(line["step"], line[metric]) for line in curve if metric in line]
                if points:
                    axis.plot(*zip(*points, strict=True), f"C{i}.-", label=None if seed else name, lw=1)
        axis.set(title=METRICS[metric][1], xlabel="step")
        if metric == "perplexity":
            axis.set_yscale("log")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def _drawings(drawn: dict[str, Path], shown: Sequence[tuple[str, Image.Image]]) -> plt.Figure:
    """A row of pictures for each model, under the real ones."""
    real = np.concatenate([np.asarray(picture) for _, picture in shown], axis=1)
    strips = {"real": real, **{name: np.asarray(Image.open(file)) for name, file in drawn.items()}}
    figure, axes = plt.subplots(len(strips), 1, figsize=(11, len(strips) + 0.8), layout="constrained")
    for axis, (name, strip) in zip(axes, strips.items(), strict=True):
        axis.imshow(strip)
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(textwrap.fill(name, 22), rotation=0, ha="right", va="center", fontsize=8)
    side = real.shape[1] / len(shown)
    captions = [textwrap.fill(caption, 14) for caption, _ in shown]
    axes[0].set_xticks([(i + 0.5) * side for i in range(len(shown))], captions, fontsize=7)
    axes[0].tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    return figure


def write_figure5(table: Table, folders: dict[str, list[Path]], results: Path, command: str) -> Path:
    """`results/figure5.md` and `.png`, from the runs of table 3 with all steps."""
    rows = {name: Row(runs) for name, runs in folders.items()}
    max_steps = max(settings.max_steps for settings in table.rows.values())
    lines = ["# figure5: Metrics and compute", "", _setting(command, rows), ""]
    lines += ["| metric | slope, Transfusion | slope, Chameleon | parity FLOP ratio | paper |", "|---" * 5 + "|"]
    figure, axes = plt.subplots(1, len(METRICS), figsize=(4.2 * len(METRICS), 3.6), layout="constrained")
    for axis, (metric, (sign, title)) in zip(axes, METRICS.items(), strict=True):
        points: dict[str, parity.Points] = {"transfusion": {}, "chameleon": {}}
        for name, settings in table.rows.items():
            if settings.max_steps == max_steps:
                runs = [(line["flops"], line[metric]) for line in rows[name].last]
                points[settings.family][settings.size] = runs
        lines.append(f"| {title} | {' | '.join(parity.row(*points.values(), sign))} | {PARITY.get(metric, '')} |")
        parity.plot(axis, points)
        axis.set_title(title)
    axes[-1].legend(fontsize=7)
    lines += [
        "",
        "Slopes of log metric over log FLOPs, with their standard error. The ratio is the share of Chameleon's FLOPs, "
        "at its largest size, with which Transfusion's line reaches the same value; in brackets the range of 95 % of "
        "the ratios when seeds are drawn again, which leaves out how well a line fits.",
        "",
        "![metrics over compute](figure5.png)",
    ]
    return _save(results, "figure5", lines, figure)
