"""Text to text: tasks of lm-eval, and the suite of Llama 2 that the paper takes (Table 1, arXiv 2408.11039)."""

import random
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, ClassVar

import numpy as np
from transformers import PreTrainedModel

from .run import Run, Score, Task, TaskResult, mean_of_means

LLAMA2_SUITE = ("hellaswag", "piqa", "social_iqa", "winogrande", "arc_easy", "arc_challenge", "boolq")
# Ranked by the likelihood per character where lm-eval has that, as LLaMA's evaluation does (§3, arXiv 2302.13971).
METRICS = ("acc_norm", "acc")
SEED = 1234  # lm-eval's, by which it chooses the examples of few-shot prompts


@dataclass
class LmEvalTask(Task):
    """
    The mean score of tasks of lm-eval; by default the Llama 2 suite, zero-shot (§4.2). Ranked by `acc_norm` where a
    task has it, else by `acc`, else by the first of its metrics that is a mean over examples. The model may be any
    causal language model, and the processor its tokenizer.

    Args:
        name (`str`, defaults to `"llama2-suite"`)
        tasks (`list[str]`): Tasks, groups or tags of lm-eval, or task files.
        num_fewshot (`int`, *optional*, defaults to 0): `None` takes each task's own; what a task file sets to 0 stays.
        num_samples (`int`, *optional*): Only the first examples of each task.
        include_path (`str`, *optional*): A folder of further task files (YAML).
    """

    name: str = "llama2-suite"
    tasks: list[str] = field(default_factory=lambda: [*LLAMA2_SUITE])
    num_fewshot: int | None = 0
    num_samples: int | None = None
    include_path: str | None = None

    modalities: ClassVar[str] = "text → text"

    def prepare(self, model: PreTrainedModel, processor: Any) -> None:
        """
        Loads the tasks and their data.

        Raises:
            ImportError: without lm-eval.
            ValueError: an unknown task, or one that is not scored by a mean.
            FileNotFoundError: the data of a task are not there.
        """
        from . import lm_eval_model  # noqa: F401 - raises if lm-eval is absent
        from lm_eval.tasks import TaskManager  # isort: skip

        # To read all of lm-eval's own task files takes seconds.
        self._manager = TaskManager(include_path=self.include_path, include_defaults=False)
        if not {*self.tasks} <= {*self._manager.all_subtasks}:
            self._manager = TaskManager(include_path=self.include_path)
        self._loaded: dict[str, Any] = {}
        for name in self.tasks:
            self._loaded.update(self._load(name))
        self._metrics = {name: self._metric(task) for name, task in self._loaded.items()}

    def _load(self, name: str) -> dict[str, Any]:
        try:
            # Some tasks shuffle as they are loaded: the same in all processes and runs.
            random.seed(SEED)
            np.random.seed(SEED)
            return self._manager.load([name])["tasks"]
        except KeyError as error:
            raise ValueError(
                f"`tasks` names {name!r}, which is none of `transfusion_hf.evaluation.TASKS` and no task of lm-eval "
                "(`lm-eval ls tasks` lists those); correct it, or set `include_path` to the folder of its task file."
            ) from error
        except OSError as error:
            entry = self._manager.task_index.get(name)
            data = f" ({entry.cfg['dataset_path']!r})" if entry and entry.cfg and "dataset_path" in entry.cfg else ""
            raise FileNotFoundError(
                f"The data{data} of lm-eval's task `{name}` cannot be loaded: {error}. Run `lm_eval --model dummy "
                f"--limit 1 --tasks {name}` where the Hub can be reached and copy its cache (`HF_HOME`), or write a "
                "task file that names files of yours and set `include_path` to its folder."
            ) from error

    def _metric(self, task: Any) -> str:
        means = [name for name, how in task.aggregation().items() if getattr(how, "__name__", None) == "mean"]
        if not means:
            raise ValueError(
                f"lm-eval's task `{task.task_name}` is scored by {', '.join(task.aggregation())}, none a mean over "
                "examples; run it by `lm-eval` itself."
            )
        return next((name for name in METRICS if name in means), means[0])

    def run(self, run: Run) -> TaskResult:
        from lm_eval import evaluate

        from .lm_eval_model import RecordedLM

        for task in self._loaded.values():
            keeps_own = self.num_fewshot is None or task.config.num_fewshot == 0
            task.set_config("num_fewshot", (task.config.num_fewshot or 0) if keeps_own else self.num_fewshot)
            task.set_fewshot_seed(SEED)
        found = evaluate(RecordedLM(run, self.name), self._loaded, limit=self.num_samples, bootstrap_iters=0)
        rows = self._rows(found["samples"])
        run.map(f"{self.name}/examples", rows, lambda _, rows: rows, {"model": run.fingerprint}, len(rows))
        values = {name: [row["score"] for row in rows if row["task"] == name] for name in self._loaded}
        is_accuracy = all(metric.startswith("acc") for metric in self._metrics.values())
        scores = {"accuracy" if is_accuracy else "mean": Score.of(mean_of_means, *values.values(), paired=False)}
        scores |= {f"{name} {self._metrics[name]}": Score.of(np.mean, column) for name, column in values.items()}
        settings = {
            "lm_eval": version("lm-eval"),
            "num_samples": self.num_samples,
            "tasks": {name: self._describe(name) for name in values},
        }
        return TaskResult(scores, settings)

    def _rows(self, samples: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """The score of each example, as the first of a task's filters reads the answers."""
        rows = []
        for name, metric in self._metrics.items():
            own = [sample for sample in samples[name] if sample["filter"] == samples[name][0]["filter"]]
            for sample in sorted(own, key=lambda sample: sample["doc_id"]):
                rows.append({"task": name, "example": sample["doc_id"], "score": float(sample[metric])})
        return rows

    def _describe(self, name: str) -> dict[str, Any]:
        config = self._loaded[name].config
        return {
            "data": config.dataset_path,
            "config": config.dataset_name,
            "split": config.test_split or config.validation_split,
            "version": self._loaded[name].VERSION,
            "metric": self._metrics[name],
            "num_fewshot": config.num_fewshot,
        }
