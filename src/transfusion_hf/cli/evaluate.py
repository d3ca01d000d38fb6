"""
Evaluates a model by the tasks of the paper's Table 1 (arXiv 2408.11039) and others:

    transfusion evaluate MODEL --tasks shapes
    transfusion evaluate MODEL --tasks wikipedia c4 --data 'wikipedia=wiki/*.parquet' 'c4=c4/*.json.gz'
    transfusion evaluate MODEL --tasks coco-captions coco-fid clip-score --data coco=COCO --weights inception=FILE
    transfusion evaluate MODEL --tasks geneval --data geneval=evaluation_metadata.jsonl --num_inference_steps 250
    transfusion evaluate MODEL --tasks llama2-suite

On several processes: `torchrun --nproc_per_node 8 --no-python transfusion evaluate …`. The same command again goes on
where it stopped. For text alone MODEL may be any causal language model, to compare with.
"""

import argparse
import ast
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoTokenizer
from transformers.utils.peft_utils import find_adapter_config_file

from ..evaluation import TASKS, Task, evaluate, make_task
from ..evaluation.report import COCO
from ..processing_transfusion import TransfusionProcessor
from .main import check_dtype


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("transfusion evaluate", description=__doc__, formatter_class=raw)
    parser.add_argument("model", help="a folder or a repository of the Hub")
    names = f"of {', '.join(TASKS)}, or of lm-eval's"
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help=names)
    pairs: dict[str, Any] = {"nargs": "+", "default": [], "metavar": "NAME=VALUE"}
    parser.add_argument("--data", **pairs, help="files, a folder or a repository for a task; `coco` for all of COCO's")
    parser.add_argument("--weights", **pairs, help="of judges: clip, inception, detector")
    parser.add_argument("--set", **pairs, help="other options of a task, for example `wikipedia.max_tokens=100000`")
    parser.add_argument("--num_samples", type=int, help="texts, pictures or prompts of each task; default: all")
    parser.add_argument("-o", "--output_dir", type=Path, help="default: outputs/evaluation/ and the model's name")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_inference_steps", type=int)
    parser.add_argument("--guidance_scale", type=float)
    parser.add_argument("--negative_prompt", help="what not to draw")
    parser.add_argument("--scheduler", help="a class of diffusers, for example 'DDIMScheduler'")
    parser.add_argument("--device", help="default: 'cuda' where there is a GPU, else 'cpu'")
    parser.add_argument("--dtype", default="auto", help="for example 'bfloat16'; default: the checkpoint's")
    args = parser.parse_args(argv)
    args.output_dir = args.output_dir or Path("outputs/evaluation", args.model.strip("./").replace("/", "--"))
    return args


def read_tasks(args: argparse.Namespace) -> list[Task]:
    options = _options(args)
    return [make_task(task, **options[task]) for task in args.tasks]


def _pairs(option: str, given: Sequence[str]) -> dict[str, Any]:
    pairs = {}
    for text in given:
        name, separator, value = text.partition("=")
        if not separator:
            raise ValueError(f"`--{option}` takes NAME=VALUE; got {text!r}.")
        pairs[name] = value
    return pairs


def _options(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """For each task the fields that are set. Raises a `ValueError` for a name that belongs to none."""
    options: dict[str, dict[str, Any]] = {task: {} for task in args.tasks}
    for name, value in _pairs("data", args.data).items():
        tasks = [task for task in args.tasks if name == task or (name == "coco" and task in COCO)]
        _set(options, "data", name, tasks, "data", value)
    for name, value in _pairs("weights", args.weights).items():
        tasks = [task for task in args.tasks if name in _fields(task)]
        _set(options, "weights", name, tasks, name, value)
    for name, value in _pairs("set", args.set).items():
        task, _, field = name.partition(".")
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pass  # a string
        _set(options, "set", name, [task] if task in options and field else [], field, value)
    if args.num_samples is not None:
        for task in args.tasks:
            options[task].setdefault("num_samples", args.num_samples)
    return options


def _fields(task: str) -> list[str]:
    return [field.name for field in fields(TASKS[task])] if task in TASKS else []


def _set(options: dict[str, dict[str, Any]], option: str, name: str, tasks: list[str], field: str, value: Any) -> None:
    if not tasks:
        raise ValueError(f"`--{option} {name}=…` belongs to none of the `--tasks` {', '.join(options)}.")
    for task in tasks:
        options[task][field] = value


def main(argv: Sequence[str]) -> dict[str, Any]:
    args = parse_args(argv)
    tasks = read_tasks(args)
    check_dtype(args.dtype)
    state = PartialState(cpu=args.device == "cpu" or not torch.cuda.is_available())
    device = args.device if args.device and state.num_processes == 1 else state.device
    base = args.model
    if (adapter := find_adapter_config_file(args.model)) is not None:
        base = json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"]
    is_ours = AutoConfig.from_pretrained(base).model_type == "transfusion"
    auto = AutoModelForMultimodalLM if is_ours else AutoModelForCausalLM
    model = auto.from_pretrained(args.model, dtype=args.dtype).to(device)
    processor = TransfusionProcessor.from_pretrained(args.model) if is_ours else AutoTokenizer.from_pretrained(base)
    names = ("num_inference_steps", "guidance_scale", "negative_prompt", "scheduler")
    drawing = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    results = evaluate(model, processor, tasks, args.output_dir, args.batch_size, args.seed, drawing)
    if state.is_main_process:
        sys.stdout.write((args.output_dir / "report.md").read_text(encoding="utf-8").partition("\n## ")[0])
        print(f"\n{args.output_dir / 'report.md'}")
    return results
