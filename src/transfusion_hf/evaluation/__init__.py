"""The comparisons of the paper's Table 1, for any Transfusion."""

try:
    import matplotlib  # noqa: F401
    import scipy  # type: ignore[import-untyped]  # noqa: F401  # scipy has no annotations
except ImportError as error:
    raise ImportError(
        "`transfusion_hf.evaluation` needs more packages; run `pip install 'transfusion-hf[evaluate]'`."
    ) from error

from .perplexity import TextScore, perplexity
from .run import Run, Score, Task, TaskResult, Verdict
from .table import TASKS, evaluate, make_task

__all__ = [
    "evaluate",
    "make_task",
    "TASKS",
    "Task",
    "TaskResult",
    "Run",
    "Score",
    "Verdict",
    "perplexity",
    "TextScore",
]
