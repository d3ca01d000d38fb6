"""
One run of the comparisons: a model is trained by the paper's recipe and measured along the way. Its folder holds
`settings.json`, `metrics.jsonl` (a line for each measurement), the log, the last checkpoint while it is at work, and
`done.json` at the end. A run that was broken off continues from its checkpoint.
"""

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from data import Data
from metrics import Judge
from models import build_chameleon, build_llama, build_transfusion, num_flops, num_parameters
from streams import MixedSteps, TokenRows, TransfusionRows
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from transfusion_hf import TransfusionTrainer

FAMILIES = ("llama", "chameleon", "transfusion")
SHOWN = ("perplexity", "captioned", "drawn", "frechet_distance")  # while a run is at work


@dataclass(frozen=True)
class Settings:
    """
    Args:
        family (`str`): One of `FAMILIES`.
        size (`str`): One of `models.SIZES`.
        learning_rate (`float`)
        seed (`int`, defaults to 0): Of weights, noise, and the order of the data.
        max_steps, tokens_per_step, max_length (`int`): Steps, tokens of a step as Transfusion counts them, and tokens
            of a packed row.
        num_measurements (`int`): Evenly spaced, the last one at the end.
        options (`dict`, *optional*): Fields of the model's configuration.
        stream (`dict`, *optional*): Fields of `MixedSteps` and `TransfusionRows`, such as
            `caption_first_probability` and `image_first_max_timesteps`.
        guidance_scale (`float`, defaults to 3): Of drawings.
        with_images (`bool`, defaults to `True`): `False`: text alone, for Chameleon as in Table 4.
    """

    family: str
    size: str
    learning_rate: float
    max_steps: int
    tokens_per_step: int
    max_length: int
    num_measurements: int
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    stream: dict[str, Any] = field(default_factory=dict)
    guidance_scale: float = 3.0
    with_images: bool = True

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"`family` must be one of {', '.join(FAMILIES)}; got {self.family!r}.")
        if self.max_steps % self.num_measurements:
            raise ValueError(
                f"`max_steps` must be a multiple of `num_measurements`; got {self.max_steps}, {self.num_measurements}."
            )


class _Measurements(TrainerCallback):
    """Measures at even intervals, and stops a run that has diverged."""

    def __init__(self, settings: Settings, file: Path, judge: Judge, processor: Any):
        self.settings, self.file, self.judge, self.processor = settings, file, judge, processor
        self.interval = settings.max_steps // settings.num_measurements
        self.is_finite = True

    def on_step_end(self, args, state, control, model=None, **kwargs: Any) -> None:
        if state.global_step % self.interval:
            return
        self.is_finite &= all(bool(weight.isfinite().all()) for weight in model.parameters())
        if not self.is_finite:
            control.should_training_stop = True
            return
        model.eval()
        with torch.random.fork_rng():
            is_last = state.global_step == state.max_steps
            metrics = self.judge(model, self.processor, self.settings.guidance_scale, is_last)
        model.train()
        num_tokens = int(state.num_input_tokens_seen)
        line = {"step": state.global_step, "num_tokens": num_tokens, "flops": num_flops(model, num_tokens), **metrics}
        with open(self.file, "a") as lines:
            lines.write(json.dumps(line) + "\n")
        shown = ", ".join(f"{name} {line[name]:.3g}" for name in SHOWN if name in line)
        print(f"{self.file.parent.name}, step {state.global_step} of {state.max_steps}: {shown}", flush=True)
        control.should_save = True


def build(settings: Settings, data: Data) -> tuple[Any, Any, Any]:
    """Model, processor (or tokenizer) and collator."""
    tokenizer = data.tokenizer()
    if settings.family == "transfusion":
        vae = data.autoencoder("kl")
        model, processor = build_transfusion(settings.size, tokenizer, vae, **settings.options)
        limit = {name: x for name, x in settings.stream.items() if name == "image_first_max_timesteps"}
        return model, processor, TransfusionRows(processor, settings.max_length, data.latents("train"), **limit)
    if settings.family == "chameleon":
        num_codes = {} if settings.with_images else {"num_image_codes": 0}
        model = build_chameleon(settings.size, tokenizer, **num_codes, **settings.options)
    else:
        model = build_llama(settings.size, tokenizer)
    codes = data.codes("train") if settings.family == "chameleon" and settings.with_images else None
    return model, tokenizer, TokenRows(tokenizer, settings.max_length, codes)


def run(settings: Settings, data: Data, judge: Judge, folder: Path) -> dict[str, Any]:
    """
    Trains and measures, or goes on, or reads what is there. Returns `done.json`: parameters, tokens, FLOPs, seconds,
    whether the run diverged, and the last measurement.

    Raises:
        ValueError: `folder` is of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_settings(settings, folder)
    if (done := folder / "done.json").is_file():
        return json.loads(done.read_text())
    set_seed(settings.seed)
    model, processor, collate = build(settings, data)
    stream = {name: x for name, x in settings.stream.items() if name != "image_first_max_timesteps"}
    steps = MixedSteps(
        data.passages("train", settings.max_length),
        data.captions("train"),
        data.tokenizer(),
        settings.tokens_per_step,
        seed=settings.seed,
        **stream,
    )
    measurements = _Measurements(settings, folder / "metrics.jsonl", judge, processor)
    trainer_class = TransfusionTrainer if settings.family == "transfusion" else Trainer
    trainer = trainer_class(
        model,
        _arguments(settings, folder / "checkpoints"),
        train_dataset=steps,
        data_collator=collate,
        processing_class=getattr(processor, "tokenizer", processor),  # counts the tokens that are no padding
        callbacks=[measurements],
    )
    trainer.remove_callback(PrinterCallback)  # it would print every logged loss; they are in `log.json`
    last = get_last_checkpoint(folder / "checkpoints") if (folder / "checkpoints").is_dir() else None
    _cut(folder / "metrics.jsonl", 0 if last is None else int(last.rpartition("-")[2]))
    start = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=last)
    except ValueError as error:  # `TransfusionTrainer` stops at the first loss or gradient that is not finite
        if "finite" not in str(error):
            raise
        measurements.is_finite = False
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = {
        "num_parameters": num_parameters(model),
        "seconds": round(time.perf_counter() - start, 1),
        "has_diverged": not measurements.is_finite,
        "last": lines[-1] if lines else {},
    }
    (folder / "log.json").write_text(json.dumps(trainer.state.log_history))
    part = folder / "done.part"
    part.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(part, done)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return result


def _arguments(settings: Settings, folder: Path) -> TrainingArguments:
    """§4.1, with the warm-up's share of the steps."""
    return TrainingArguments(
        str(folder),
        max_steps=settings.max_steps,
        per_device_train_batch_size=1,  # of steps, each with all its documents
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        warmup_steps=max(1, settings.max_steps * 4000 // 250_000),
        adam_beta2=0.95,
        adam_epsilon=1e-8,
        weight_decay=0.1,
        max_grad_norm=1.0,
        logging_steps=20,
        include_num_input_tokens_seen="non_padding",
        save_strategy="no",  # with each measurement
        save_total_limit=1,
        report_to="none",
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        seed=settings.seed,
    )


def _check_settings(settings: Settings, folder: Path) -> None:
    file, now = folder / "settings.json", json.loads(json.dumps(asdict(settings)))
    if not file.is_file():
        file.write_text(json.dumps(now, indent=2) + "\n")
    before = json.loads(file.read_text())
    for name in now:
        if before.get(name) != now[name]:
            raise ValueError(
                f"{folder} is of a run with `{name}` {before.get(name)!r}, not {now[name]!r}; delete it, or pass "
                "another `--output_dir`."
            )


def _cut(file: Path, step: int) -> None:
    """Leaves the measurements up to a checkpoint: those behind it will be made again."""
    lines = file.read_text().splitlines() if file.is_file() else []
    file.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] <= step))
