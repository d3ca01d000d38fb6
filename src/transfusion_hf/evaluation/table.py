"""[`evaluate`] runs tasks on a model and keeps the table of their scores."""

import json
from collections.abc import Iterable
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
from transformers import PreTrainedModel

from ..processing_transfusion import TransfusionProcessor
from .cider import CaptionTask
from .clip_score import CLIPScoreTask
from .fid import FIDTask
from .geneval import GenEvalTask
from .language_tasks import LmEvalTask
from .perplexity import PerplexityTask
from .report import write_report
from .run import Run, Task, TaskResult, write_file
from .shapes import ShapesTask

PACKAGES = ("transfusion_hf", "torch", "transformers", "diffusers")
# The order of the table.
TASKS: dict[str, type] = {
    "wikipedia": PerplexityTask,
    "c4": PerplexityTask,
    "text": PerplexityTask,
    "llama2-suite": LmEvalTask,
    "coco-captions": CaptionTask,
    "captions": CaptionTask,
    "coco-fid": FIDTask,
    "fid": FIDTask,
    "clip-score": CLIPScoreTask,
    "geneval": GenEvalTask,
    "shapes": ShapesTask,
}


def make_task(name: str, **options: Any) -> Task:
    """
    The task of a name: one of `TASKS`, or a task of lm-eval. `options` are fields of its class.

    Raises:
        ValueError: an unknown field, or a value of another type. An unknown name is an error of `prepare`.
    """
    task_class = TASKS.get(name, LmEvalTask)
    hints = {field.name: get_type_hints(task_class)[field.name] for field in fields(task_class)}
    for option, value in options.items():
        if option not in hints or option == "name":
            known = ", ".join(hint for hint in hints if hint != "name")
            raise ValueError(f"The task `{name}` has no option `{option}`; it has {known}.")
        if hints[option] == list[str] and isinstance(value, str):
            options[option] = value = value.split(",")
        kinds = get_args(hints[option]) if isinstance(hints[option], UnionType) else (hints[option],)
        if not any(kind is Any or isinstance(value, get_origin(kind) or kind) for kind in kinds):
            raise ValueError(f"`{option}` of the task `{name}` must be {hints[option]}; got {value!r}.")
    if name not in TASKS:
        options.setdefault("tasks", [name])
        name = Path(name).stem  # of a task file
    if "name" in hints:
        options["name"] = name
    return task_class(**options)


def evaluate(
    model: PreTrainedModel,
    processor: TransfusionProcessor,
    tasks: Iterable[str | Task],
    output_dir: str | Path,
    batch_size: int = 8,
    seed: int = 0,
    drawing: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """
    Runs tasks, on one process or as one of many, and writes `results.json`, `report.md` and the files of each task.
    A run that was killed goes on where it stopped; the tables of earlier runs are kept.

    Args:
        model (`TransfusionForCausalLMAndDiffusion`): For text alone, any causal language model.
        processor (`TransfusionProcessor`): For text alone, also a tokenizer.
        tasks (`list[str | Task]`): Names of [`make_task`], or tasks.
        output_dir (`str` or `Path`): One folder for each model.
        batch_size (`int`, defaults to 8): Items in a pass.
        seed (`int`, defaults to 0): Seeds the drawings, each with its own generator.
        drawing (`dict[str, Any]`, *optional*):
            `guidance_scale`, `negative_prompt`, `num_inference_steps` and other arguments of `generate()`; by default
            the model's own.

    Returns:
        `dict[str, Any]`: What `results.json` holds.

    Raises:
        ValueError: an unknown task, a folder of another model, a setting other than that of the results in the folder,
            bad data. All data and weights are looked for before the first task begins.
        OSError, ImportError: data, weights or packages that are not there.
    """
    chosen = [make_task(task) if isinstance(task, str) else task for task in tasks]
    if not chosen:
        raise ValueError(f"`tasks` is empty; name some of {', '.join(TASKS)}.")
    for name, value in [("batch_size", batch_size)] + [
        ("num_samples", getattr(task, "num_samples", 1)) for task in chosen
    ]:
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1; got {value}.")
    if repeated := sorted({task.name for task in chosen if [t.name for t in chosen].count(task.name) > 1}):
        raise ValueError(f"`tasks` names {repeated[0]!r} twice; give them different names.")
    run = Run(model.eval(), processor, Path(output_dir), batch_size, seed, drawing or {})
    results = _head(run)
    for task in chosen:
        task.prepare(model, processor)
    for task in chosen:
        result = task.run(run)
        found = _as_json(task, result, run)
        if run.state.is_main_process:
            _write(results, task.name, found, result, run.output_dir)
        run.state.wait_for_everyone()
    return json.loads((run.output_dir / "results.json").read_text(encoding="utf-8"))


def _write(results: dict[str, Any], name: str, found: dict[str, Any], result: TaskResult, output_dir: Path) -> None:
    tasks = {**_tasks_in(output_dir), name: found}  # read again: another run may have written
    order = [*TASKS, *tasks]
    results["tasks"] = dict(sorted(tasks.items(), key=lambda item: order.index(item[0])))
    write_report(results, name, result.verdicts, output_dir)
    text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
    write_file(output_dir / "results.json", text + "\n")


def _tasks_in(output_dir: Path) -> dict[str, Any]:
    file = output_dir / "results.json"
    return json.loads(file.read_text(encoding="utf-8"))["tasks"] if file.is_file() else {}


def _head(run: Run) -> dict[str, Any]:
    """The results without tasks. Raises a `ValueError` for the folder of another model."""
    results: dict[str, Any] = {
        "model": {
            "name": run.model.config._name_or_path or type(run.model).__name__,
            "fingerprint": run.fingerprint,
            "num_parameters": run.model.num_parameters(),
            "dtype": str(run.model.dtype),
        },
        "tasks": {},
    }
    file = run.output_dir / "model.json"
    run.output_dir.mkdir(parents=True, exist_ok=True)
    if run.state.is_main_process and not file.is_file():
        write_file(file, json.dumps(results["model"], indent=2) + "\n")
    run.state.wait_for_everyone()
    before = json.loads(file.read_text(encoding="utf-8"))
    if before["fingerprint"] != run.fingerprint:
        raise ValueError(
            f"`output_dir` {run.output_dir} holds results of {before['name']} with other weights or another dtype "
            f"({before['fingerprint']}) than {results['model']['name']} ({run.fingerprint}); pass another folder."
        )
    return results


def _as_json(task: Task, result: TaskResult, run: Run) -> dict[str, Any]:
    for name, score in result.scores.items():
        if not np.isfinite([score.value, *(score.interval or ())]).all():
            raise ValueError(f"The task `{task.name}`: {name} is {score.value} with the interval {score.interval}.")
    scores = {name: asdict(score) for name, score in result.scores.items()}
    made_with: dict[str, Any] = {package: version(package) for package in PACKAGES}
    made_with |= {"batch_size": run.batch_size, "device": run.model.device.type, **run.how_to_draw}
    entry = {"modalities": task.modalities, "scores": scores, "settings": result.settings, "made_with": made_with}
    return json.loads(json.dumps(entry))
