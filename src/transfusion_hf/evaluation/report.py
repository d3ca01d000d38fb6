"""The report: `report.md` in the form of the paper's Table 1, and a grid of pictures where a task judges some."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .language_tasks import LLAMA2_SUITE
from .run import Verdict, open_picture, write_file

# Transfusion 7B after 0.5T tokens (Table 3, arXiv 2408.11039), except GenEval: after 2T (Table 9).
PAPER = {
    ("wikipedia", "perplexity"): 4.28,
    ("c4", "perplexity"): 7.72,
    ("llama2-suite", "accuracy"): 0.615,
    ("coco-captions", "CIDEr"): 27.2,
    ("coco-fid", "FID"): 16.8,
    ("clip-score", "CLIP score"): 25.5,
    ("geneval", "score"): 0.63,
}
COCO = ("coco-captions", "coco-fid", "clip-score")
_LOWER_IS_BETTER = ("perplexity", "word perplexity", "bits per byte", "FID")
_GRID = (5, 8)  # rows and columns


def write_report(results: dict[str, Any], task: str, verdicts: Sequence[Verdict], output_dir: Path) -> None:
    """Writes the table of all tasks, and the grid of `task`."""
    if verdicts:
        _plot_grid(verdicts, output_dir / task / "grid.png")
    model = results["model"]
    lines = [
        f"# Evaluation of {model['name']}",
        "",
        f"{model['num_parameters'] / 1e6:,.1f}M parameters, {model['dtype']}, fingerprint `{model['fingerprint']}`.",
        "",
        *_table(results["tasks"]),
        "",
        "Intervals: 95 %. Paper: Transfusion 7B after 0.5T tokens (Table 3), GenEval after 2T (Table 9).",
    ]
    for name, result in results["tasks"].items():
        lines += ["", f"## {name}", "", *_details(result)]
        if (output_dir / name / "grid.png").is_file():
            lines += ["", f"![pictures, with what the judge said]({name}/grid.png)"]
    write_file(output_dir / "report.md", "\n".join(lines) + "\n")


def _table(tasks: dict[str, Any]) -> list[str]:
    lines = ["| in → out | benchmark | metric | value | interval | items | paper |", "|---|---|---|--:|---|--:|--:|"]
    for task, result in tasks.items():
        metric, score = next(iter(result["scores"].items()))
        arrow = "↓" if metric in _LOWER_IS_BETTER else "↑"
        cells = [result["modalities"], task, f"{metric} {arrow}", _number(score["value"]), _interval(score)]
        lines.append(_row(*cells, f"{score['num_items']:,}", _paper(task, metric, result["settings"])))
    return lines


def _paper(task: str, metric: str, settings: dict[str, Any]) -> str:
    """The paper's value, or nothing if the task ran on other data than the paper's benchmark."""
    is_suite = {*settings.get("tasks", ())} == {*LLAMA2_SUITE}
    is_coco = settings.get("is_coco") and settings["split"] in ("test", "val2014")
    is_other = (task == "llama2-suite" and not is_suite) or (task in COCO and not is_coco)
    return "" if is_other else str(PAPER.get((task, metric), ""))


def _details(result: dict[str, Any]) -> list[str]:
    lines = ["| metric | value | interval | items |", "|---|--:|---|--:|"]
    for metric, score in result["scores"].items():
        lines.append(_row(metric, _number(score["value"]), _interval(score), f"{score['num_items']:,}"))
    made_with = ", ".join(f"{name} {value}" for name, value in result["made_with"].items())
    return [*lines, "", *(f"- {name}: {value}" for name, value in result["settings"].items()), f"- with {made_with}"]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def _interval(score: dict[str, Any]) -> str:
    return "" if score["interval"] is None else " to ".join(map(_number, score["interval"]))


def _plot_grid(verdicts: Sequence[Verdict], file: Path) -> None:
    """Shows a seeded random choice of the verdicts, in their original order."""
    rows, columns = _GRID
    order = np.random.default_rng(0).permutation(len(verdicts))[: rows * columns]
    chosen = [verdicts[i] for i in sorted(order)]
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(1.9 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set(xticks=[], yticks=[], frame_on=False)
    for axis, verdict in zip(axes, chosen, strict=False):
        axis.imshow(open_picture(verdict.picture).convert("RGB"))
        color = {None: "black", True: "darkgreen", False: "firebrick"}[verdict.is_right]
        axis.set_frame_on(True)  # or a white picture would have no edge
        axis.set_title(fill(verdict.text, 24), fontsize=8, color=color, parse_math=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
