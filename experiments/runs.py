"""
One run of the comparisons: a model is trained by the paper's recipe and measured along the way. Its folder holds
`settings.json`, `metrics.jsonl` (a line for each measurement), the log, the last checkpoint while it is at work, and
at the end `drawn.png` and `done.json`. A run that was broken off continues from its checkpoint.
"""

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from data import Data
from filelock import FileLock, Timeout
from metrics import Judge
from models import build_chameleon, build_llama, build_transfusion, num_flops, num_image_tokens, num_parameters
from streams import MixedSteps, TokenRows, TransfusionRows
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from transfusion_hf import TransfusionTrainer
from transfusion_hf.training.checkpoints import NotFiniteError

FAMILIES = ("llama", "chameleon", "transfusion")
RESULTS = ("settings.json", "metrics.jsonl", "drawn.png", "done.json")  # what the tables are made of
SHOWN = ("perplexity", "captioned", "drawn", "frechet_distance")  # while a run is at work


@dataclass(frozen=True)
class Settings:
    """
    Args:
        family (`str`): One of `FAMILIES`.
        size (`str`): One of `models.SIZES`.
        learning_rate (`float`)
        max_steps, tokens_per_step, max_length (`int`): Steps, tokens of a step as Transfusion counts them, and tokens
            of a packed row.
        num_measurements (`int`): Evenly spaced, the last one at the end.
        seed (`int`, defaults to 0): Seeds weights, noise, and the order of the data.
        gradient_accumulation_steps (`int`, defaults to 1): Parts of a step, for a device that cannot hold it.
        options (`dict`, *optional*): Fields of the model's configuration.
        caption_first_probability (`float`, defaults to 0.8): §4.1.
        image_first_max_timesteps (`int`, defaults to 500): Limit of t for pictures before their caption (§4.3.4).
        with_images (`bool`, defaults to `True`): `False`: text alone, for Chameleon as in Table 4.
        image_learning_rate (`float`, *optional*): As in `TransfusionTrainer`.

    Raises:
        ValueError: an unknown family, or steps that the measurements or the parts do not divide.
    """

    family: str
    size: str
    learning_rate: float
    max_steps: int
    tokens_per_step: int
    max_length: int
    num_measurements: int
    seed: int = 0
    gradient_accumulation_steps: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    caption_first_probability: float = 0.8
    image_first_max_timesteps: int = 500
    with_images: bool = True
    image_learning_rate: float | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"`family` must be one of {', '.join(FAMILIES)}; got {self.family!r}.")
        for name, divisor in (
            ("max_steps", "num_measurements"),
            ("tokens_per_step", "gradient_accumulation_steps"),
        ):
            number, parts = getattr(self, name), getattr(self, divisor)
            if number < 1 or number % parts:
                raise ValueError(f"`{name}` must be a multiple of `{divisor}`, {parts}; got {number}.")

    @property
    def autoencoders(self) -> list[str]:
        """Kinds of `Data.autoencoder` that the model needs."""
        kinds = {"transfusion": ["kl"], "chameleon": ["vq"], "llama": []}
        return kinds[self.family] if self.with_images else []


class _Measurements(TrainerCallback):
    """Measures at even intervals, counts the seconds of training, and stops a run that has diverged."""

    def __init__(self, settings: Settings, folder: Path, judge: Judge, processor: Any):
        self.interval = settings.max_steps // settings.num_measurements
        self.file, self.judge, self.processor = folder / "metrics.jsonl", judge, processor
        self.has_diverged, self.seconds, self.since = False, 0.0, 0.0

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        lines = [line for line in read_lines(self.file) if line["step"] <= state.global_step]  # others come again
        replace_text(self.file, "".join(json.dumps(line) + "\n" for line in lines))
        self.seconds, self.since = lines[-1]["seconds"] if lines else 0.0, time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **kwargs: Any) -> None:
        if state.global_step % self.interval:
            return
        self.seconds += time.perf_counter() - self.since
        if not all(weight.isfinite().all() for weight in model.parameters()):
            self.has_diverged = control.should_training_stop = True
            return
        model.eval()
        try:
            with torch.random.fork_rng():
                is_last = state.global_step == state.max_steps
                metrics = self.judge(model, self.processor, self.file.with_name("drawn.png") if is_last else None)
        except (ValueError, OverflowError) as error:  # finite weights so large that nothing behind them is finite
            if isinstance(error, ValueError) and not any(word in str(error) for word in ("finite", "NaN")):
                raise
            self.has_diverged = control.should_training_stop = True
            return
        model.train()
        num_tokens = int(state.num_input_tokens_seen)
        flops = num_flops(model, num_tokens)
        seconds = round(self.seconds, 1)
        line = {"step": state.global_step, "num_tokens": num_tokens, "flops": flops, "seconds": seconds, **metrics}
        with open(self.file, "a") as lines:
            lines.write(json.dumps(line) + "\n")
        shown = ", ".join(f"{name} {line[name]:.3g}" for name in SHOWN if name in line)
        print(f"{self.file.parent.name}, step {state.global_step} of {state.max_steps}: {shown}", flush=True)
        control.should_save = state.global_step < state.max_steps
        self.since = time.perf_counter()


def build(settings: Settings, data: Data) -> tuple[Any, Any, Any]:
    """Model, processor (or tokenizer) and collator."""
    tokenizer = data.tokenizer()
    if settings.family == "transfusion":
        vae = data.autoencoder("kl")
        model, processor = build_transfusion(settings.size, tokenizer, vae, **settings.options)
        latents, limit = data.latents("train"), settings.image_first_max_timesteps
        rows = TransfusionRows(processor, settings.max_length, latents, image_first_max_timesteps=limit)
        return model, processor, rows
    if settings.family == "chameleon":
        num_codes = {} if settings.with_images else {"num_image_codes": 0}
        model = build_chameleon(settings.size, tokenizer, **num_codes, **settings.options)
    else:
        model = build_llama(settings.size, tokenizer)
    codes = data.codes("train") if settings.family == "chameleon" and settings.with_images else None
    return model, tokenizer, TokenRows(tokenizer, settings.max_length, codes)


def run(settings: Settings, data: Data, judge: Judge, folder: Path) -> dict[str, Any]:
    """
    Trains and measures, or goes on, or reads what is there. Returns `done.json`: parameters, whether the run diverged,
    date, hardware, and the last measurement.

    Raises:
        ValueError: `folder` holds a run with other settings, or another process is at work in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            return _run(settings, data, judge, folder)
    except Timeout:
        raise ValueError(
            f"Another process is at work in {folder}; wait for its end, or pass another `--output_dir`."
        ) from None


def _run(settings: Settings, data: Data, judge: Judge, folder: Path) -> dict[str, Any]:
    _check_settings(
        {**asdict(settings), "data": data.identity(settings.autoencoders), "judge": judge.identity()}, folder
    )
    if (done := folder / "done.json").is_file():
        return json.loads(done.read_text())
    set_seed(settings.seed)
    model, processor, collate = build(settings, data)
    steps = MixedSteps(
        data.passages("train", settings.max_length),
        data.captions("train"),
        data.tokenizer(),
        settings.tokens_per_step // settings.gradient_accumulation_steps,
        image_tokens=num_image_tokens(settings.size),
        seed=settings.seed,
        caption_first_probability=settings.caption_first_probability,
    )
    measurements = _Measurements(settings, folder, judge, processor)
    own: dict[str, Any] = {}
    if settings.family == "transfusion":
        own = {"image_learning_rate": settings.image_learning_rate}
    trainer_class = TransfusionTrainer if settings.family == "transfusion" else Trainer
    trainer = trainer_class(
        model,
        _arguments(settings, folder / "checkpoints"),
        train_dataset=steps,
        data_collator=collate,
        processing_class=getattr(processor, "tokenizer", processor),  # counts the tokens that are no padding
        callbacks=[measurements],
        **own,
    )
    trainer.remove_callback(PrinterCallback)  # it would print every logged loss; they are in `log.json`
    # Whoever was broken off while it was saving has left a checkpoint without its state, and the one before.
    whole = [file.parent for file in (folder / "checkpoints").glob("checkpoint-*/trainer_state.json")]
    last = max(whole, key=lambda checkpoint: int(checkpoint.name.rpartition("-")[2]), default=None)
    try:
        trainer.train(resume_from_checkpoint=last and str(last))
    except NotFiniteError:
        measurements.has_diverged = True
    lines = read_lines(folder / "metrics.jsonl")
    result = {
        "num_parameters": num_parameters(model),
        "has_diverged": measurements.has_diverged,
        "date": f"{date.today()}",
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores",
        "torch": torch.__version__,
        "last": lines[-1] if lines else {},
    }
    (folder / "log.json").write_text(json.dumps(trainer.state.log_history))
    replace_text(done, json.dumps(result, indent=2) + "\n")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return result


def _arguments(settings: Settings, folder: Path) -> TrainingArguments:
    """§4.1, with the warm-up's share of the steps."""
    return TrainingArguments(
        str(folder),
        max_steps=settings.max_steps,
        per_device_train_batch_size=1,  # of (parts of) steps, each with all its documents
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
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
        bf16=torch.cuda.is_available(),
        disable_tqdm=True,
        seed=settings.seed,
    )


def _check_settings(settings: dict[str, Any], folder: Path) -> None:
    file, now = folder / "settings.json", json.loads(json.dumps(settings))
    if not file.is_file():
        replace_text(file, json.dumps(now, indent=2) + "\n")
    before = json.loads(file.read_text())
    for name in now:
        if before.get(name) != now[name]:
            raise ValueError(
                f"{folder} holds a run with `{name}` {before.get(name)!r}; expected {now[name]!r}. Delete it, or pass "
                "another `--output_dir`."
            )


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The measurements of a `metrics.jsonl`. A line that a killed process left unfinished does not count."""
    text = file.read_text() if file.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def replace_text(file: Path, text: str) -> None:
    """Writes a file that is whole whenever it is read."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(text)
    os.replace(part, file)
