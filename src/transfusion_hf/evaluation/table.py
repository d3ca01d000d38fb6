"""[`evaluate`] runs tasks on a model and keeps the table of their scores."""

import json
from collections.abc import Iterable
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
        ValueError: an unknown field. An unknown name is one when lm-eval looks for it, in `prepare`.
    """
    task_class = TASKS.get(name, LmEvalTask)
    known = [field.name for field in fields(task_class)]
    if unknown := sorted(options.keys() - {*known} | options.keys() & {"name"}):
        known = [field for field in known if field != "name"]
        raise ValueError(f"The task `{name}` has no option `{unknown[0]}`; it has {', '.join(known)}.")
    if name not in TASKS:
        options.setdefault("tasks", [name])
    if "name" in known:
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
    if repeated := sorted({task.name for task in chosen if [t.name for t in chosen].count(task.name) > 1}):
        raise ValueError(f"`tasks` names {repeated[0]!r} twice; give them different names.")
    run = Run(model.eval(), processor, Path(output_dir), batch_size, seed, drawing or {})
    results = _earlier_results(run)
    for task in chosen:
        task.prepare(model, processor)
    for task in chosen:
        result = task.run(run)
        results["tasks"][task.name] = _as_json(task, result)
        order = [*TASKS, *results["tasks"]]
        results["tasks"] = dict(sorted(results["tasks"].items(), key=lambda item: order.index(item[0])))
        if run.state.is_main_process:
            write_report(results, task.name, result.verdicts, run.output_dir)
            write_file(run.output_dir / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    run.state.wait_for_everyone()
    return results


def _earlier_results(run: Run) -> dict[str, Any]:
    """The tables in the folder, with this model's head. Raises a `ValueError` for another model's."""
    packages = ("transfusion_hf", "torch", "transformers", "diffusers")
    results: dict[str, Any] = {
        "model": {
            "name": run.model.config._name_or_path or type(run.model).__name__,
            "fingerprint": run.fingerprint,
            "num_parameters": run.model.num_parameters(),
            "dtype": str(run.model.dtype),
        },
        "versions": {package: version(package) for package in packages},
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
    if (kept := run.output_dir / "results.json").is_file():
        results["tasks"] = json.loads(kept.read_text(encoding="utf-8"))["tasks"]
    return results


def _as_json(task: Task, result: TaskResult) -> dict[str, Any]:
    scores = {name: asdict(score) for name, score in result.scores.items()}
    return json.loads(json.dumps({"modalities": task.modalities, "scores": scores, "settings": result.settings}))
