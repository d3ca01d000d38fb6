"""
A `Trainer` whose checkpoints are whole or not there, and are what they are taken for: resumed from, pushed, described.
"""

import json
import math
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import IterableDatasetShard
from huggingface_hub import HfApi, ModelCard
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset, get_worker_info
from transformers import AutoConfig, PreTrainedModel, Trainer, TrainerCallback
from transformers.modelcard import extract_hyperparameters_from_trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    HubStrategy,
    get_last_checkpoint,
    has_length,
    sort_checkpoints,
)
from transformers.utils import CONFIG_NAME, PushInProgress

from ..hub.card import make_model_card
from .callbacks import TransfusionEMACallback

# Of a checkpoint, what is no part of the model, or is written for the whole run.
_OF_THE_RUN = (TRAINER_STATE_NAME, TransfusionEMACallback.FILE_NAME, "README.md")


def _seed_of(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


class _RepeatableCollator:
    """
    What a collator draws (by torch, numpy, `random`) for a batch follows from seed, process, pass and the batch's
    number there: be it in the main process or in a worker, and be what comes before it collated or skipped.
    """

    def __init__(self, collator: Callable[[Sequence[Any]], Any], seed: int, process: int):
        self.collator, self.seed, self.process = collator, seed, process
        # How many passes were begun, which one this is, and its first batch: shared with workers that outlive a pass.
        self._place = torch.zeros(3, dtype=torch.long).share_memory_()
        self._begun, self._count = 0, 0

    def begin(self, epoch: int, first_batch: int) -> None:
        """The next batch is this one of that pass."""
        self._place[:] = torch.tensor([self._place[0] + 1, epoch, first_batch])

    def __call__(self, features: Sequence[Any]) -> Any:
        begun, epoch, number = self._place.tolist()
        if begun != self._begun:
            self._begun, self._count = begun, 0
        worker = get_worker_info()  # which take turns
        number += self._count if worker is None else self._count * worker.num_workers + worker.id
        self._count += 1
        seed = _seed_of(self.seed, self.process, epoch, number)
        states = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # and none of a GPU
                random.seed(seed)
                np.random.seed(seed)
                return self.collator(features)
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


class _PassCallback(TrainerCallback):
    """Whether a checkpoint is of after the end of a pass, its evaluation and all."""

    has_ended = False

    def on_epoch_begin(self, args, state, control, **kwargs: Any) -> None:
        self.has_ended = False

    def on_epoch_end(self, args, state, control, **kwargs: Any) -> None:
        self.has_ended = True


class WholeCheckpointsTrainer(Trainer):
    """
    The `Trainer` that writes a checkpoint aside, in `incomplete/`, and then renames it: one that bears its name is
    whole, and a run that was killed at any moment goes on with `resume_from_checkpoint=True`. What others load is not
    pickled; the states of optimizer and generators, for resuming, are. [`TransfusionTrainer`] is one.

    Raises:
        ValueError: FSDP with state dicts in shards; a checkpoint of another model or adapter to resume from.
    """

    data_collator: Any
    push_in_progress: Any
    _is_saving = False
    _resumed: dict[str, Any]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._pass = _PassCallback()
        self.add_callback(self._pass)
        if self.is_fsdp_enabled:
            kind = self.accelerator.state.fsdp_plugin.state_dict_type.name
            if kind != "FULL_STATE_DICT":  # the library then saves no model, and says nothing
                raise ValueError(
                    f"`fsdp_state_dict_type` is {kind}, of which no model would be saved that can be loaded; set it "
                    "to FULL_STATE_DICT in accelerate's configuration, or `state_dict_type` in `fsdp_config`."
                )

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.data_seed is None:
            # Else the order comes from each process's global generator, and these differ after a training.
            self.accelerator.dataloader_config.data_seed = self.args.seed

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        if folder:
            state = Path(folder, TRAINER_STATE_NAME)
            self._resumed_max_steps = json.loads(state.read_text())["max_steps"] if state.exists() else 0
            _check_same_model(self._unwrapped().config, folder)
            _check_same_adapter(self._unwrapped(), folder)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _unwrapped(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    @property
    def _num_replicas(self) -> int:
        """Ranks of tensor, context and sequence parallelism, which hold the same batch."""
        return self.get_tp_size() * self.get_cp_size() * self.get_sp_size()

    def get_train_dataloader(self):
        if hasattr(self.train_dataset, "rows_per_turn"):  # all batches but the last are full, with several workers too
            self.train_dataset.rows_per_turn = self._train_batch_size * self.args.world_size // self._num_replicas
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset=None):
        loader = super().get_eval_dataloader(eval_dataset)
        self._begin(loader, epoch=0)  # each time, so that all evaluations are of the same batches
        return loader

    def _get_dataloader(self, *args: Any, **kwargs: Any):
        collator, process = self.data_collator, self.args.process_index // self._num_replicas
        self.data_collator = _RepeatableCollator(collator, self.args.seed, process)
        try:
            loader = super()._get_dataloader(*args, **kwargs)
        finally:
            self.data_collator = collator
        if isinstance(loader.dataset, IterableDatasetShard):  # to which the library does not hand it on
            loader.dataset.drop_last = self.args.dataloader_drop_last
        self._begin(loader, epoch=0)
        return loader

    def _begin(self, loader: Any, epoch: int, first_batch: int = 0) -> None:
        """What data draw in workers, and what the collator draws, follows from the pass."""
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        loader = getattr(loader, "base_dataloader", loader)
        # The library would take the workers' seed from the global generator, where the noise comes from. It is one in
        # all processes: of a stream each reads all and keeps its share.
        loader.generator = torch.Generator().manual_seed(_seed_of(self.args.seed, epoch))
        collator = getattr(loader.collate_fn, "data_collator", loader.collate_fn)  # in what removes columns
        if isinstance(collator, _RepeatableCollator):  # not that of a user's own loader
            collator.begin(epoch, first_batch)

    def set_initial_training_values(self, args, dataloader):
        num_epochs, *values = super().set_initial_training_values(args, dataloader)
        self._batches_per_epoch = values[4] if has_length(dataloader) else None
        # Where broken rows are left out, passes are shorter than the data set says, and it takes more of them.
        return sys.maxsize if args.max_steps > 0 else num_epochs, *values

    def _init_training_state(self, max_steps, updates_per_epoch, num_epochs, resume_from_checkpoint, trial):
        # The library computes from the number of steps where in the data a run stands, as if all passes had the length
        # that it is told, and those of a stream no end. The state's `epoch` is counted.
        args = (max_steps, updates_per_epoch, num_epochs, resume_from_checkpoint, trial)
        epoch, num_batches = super()._init_training_state(*args)
        self._resumed = {}
        if self.state.epoch:
            if len(list(Path(resume_from_checkpoint).glob("since_last_log_*.pt"))) == self.args.world_size:
                file = Path(resume_from_checkpoint, f"since_last_log_{self.args.process_index}.pt")
                self._resumed = torch.load(file, map_location="cpu")
            size = self._batches_per_epoch
            if size is None:
                size = self._resumed_max_steps * self.args.gradient_accumulation_steps
            epoch = math.ceil(self.state.epoch) - 1
            position = round((self.state.epoch - epoch) * size)
            if self._resumed.get("pass_has_ended", position == self._batches_per_epoch):
                epoch, position = epoch + 1, 0
            if not self.args.ignore_data_skip:
                num_batches = position
        return epoch, num_batches

    def _run_epoch(self, **kwargs: Any):
        if self.state.global_step >= self.state.max_steps:
            # The library would take a finished run that is resumed one step further.
            self.control.should_training_stop = True
            return
        epoch, folder, num_skipped = kwargs["epoch"], kwargs["resume_from_checkpoint"], 0
        is_resumed = folder is not None and epoch == kwargs["epochs_trained"]
        if is_resumed:
            if self._resumed:
                self._load_since_last_log(self._resumed)
            if not isinstance(kwargs["train_dataloader"].dataset, IterableDataset):
                num_skipped = kwargs["steps_trained_in_current_epoch"]  # without being collated
            if kwargs["steps_trained_in_current_epoch"] == self._batches_per_epoch:
                # The library does so with the first batch, of which there is none.
                self._load_rng_state(folder)
        self._begin(kwargs["train_dataloader"], epoch, num_skipped)
        step = self.state.global_step
        super()._run_epoch(**kwargs)
        is_stopped = self.control.should_training_stop or self.control.should_epoch_stop
        if step == self.state.global_step and not is_resumed and not is_stopped:
            raise ValueError(
                f"`train_dataset` gave a whole pass without a step: fewer than `gradient_accumulation_steps` = "
                f"{self.args.gradient_accumulation_steps} batches. Give it more samples, or lower that number."
            )
        # Micro-batches too few for a step, at the end of a pass, are no part of the next one's first.
        self.model.zero_grad()

    def _since_last_log(self) -> dict[str, Any]:
        """What this process has summed up since the last log, so that the logged curve goes on."""
        return {
            "loss": self._tr_loss.item(),
            "steps": self.state.global_step - self._globalstep_last_logged,
            "pass_has_ended": self._pass.has_ended,
        }

    def _load_since_last_log(self, state: dict[str, Any]) -> None:
        self._tr_loss += state["loss"]
        self._total_loss_scalar -= state["loss"]  # the `train_loss` at the end is of this call's steps
        self._globalstep_last_logged -= state["steps"]

    def _get_grad_norm(self, model, grad_norm=None):
        # Weights that are not finite shall not get into a checkpoint.
        norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        is_scaled = self.accelerator.mixed_precision == "fp16"  # where such steps are left out
        if norm is not None and not is_scaled and not math.isfinite(norm):
            raise ValueError(
                f"The norm of the gradient is {float(norm)} after step {self.state.global_step}. Lower the learning "
                "rate or clip by `max_grad_norm`, and go on from the last checkpoint."
            )
        return norm

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return str(Path(folder, "incomplete")) if self._is_saving else folder

    def _save_checkpoint(self, model, trial):
        folder, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        aside = folder / "incomplete"
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_saving = False
        best_step = self.state.best_global_step
        best = folder / f"{PREFIX_CHECKPOINT_DIR}-{best_step}"
        if best_step and (best_step == self.state.global_step or best.exists()):
            # The library found it aside, and has written so, where it does not stay.
            self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(aside / name / TRAINER_STATE_NAME))
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TransfusionEMACallback):
                callback.save(aside / name, self.state)
        if not self.args.save_only_model:  # which cannot be resumed from
            torch.save(self._since_last_log(), aside / name / f"since_last_log_{self.args.process_index}.pt")
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if (folder / name).exists():  # of an earlier run
                (folder / name).rename(aside / "replaced")
            (aside / name).rename(folder / name)
            self._delete(folder, self._outdated(folder))
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))

    def _is_best(self, checkpoint: Path) -> bool:
        best = self.state.best_model_checkpoint
        return best is not None and Path(best).exists() and checkpoint.samefile(best)

    def _outdated(self, folder: Path) -> list[Path]:
        """What the library's `rotate_checkpoints` would delete."""
        checkpoints = [Path(checkpoint) for checkpoint in sort_checkpoints(str(folder), use_mtime=True)]
        others = [checkpoint for checkpoint in checkpoints[:-1] if not self._is_best(checkpoint)]
        limit = self.args.save_total_limit or 0
        return others[: max(len(checkpoints) - limit, 0)] if limit > 0 else []

    def _delete(self, folder: Path, checkpoints: list[Path]) -> None:
        """Under other names, for one in part shall not bear its own."""
        aside = folder / "incomplete"
        aside.mkdir(exist_ok=True)
        for checkpoint in checkpoints:
            checkpoint.rename(aside / f"outdated-{checkpoint.name}")
        shutil.rmtree(aside)

    def _finalize_training(self, trial, *args: Any, **kwargs: Any):
        folder = Path(self._get_output_dir(trial))
        checkpoints = [Path(checkpoint) for checkpoint in sort_checkpoints(str(folder))]
        if self.args.should_save and self.args.save_total_limit == 1 and any(map(self._is_best, checkpoints)):
            # As the library does next.
            self._delete(folder, [checkpoint for checkpoint in checkpoints if not self._is_best(checkpoint)])
        return super()._finalize_training(trial, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            # As text: a folder that others load shall hold nothing that is pickled.
            folder = Path(output_dir or self.args.output_dir)
            (folder / TRAINING_ARGS_NAME).unlink()
            (folder / "training_args.json").write_text(self.args.to_json_string() + "\n")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As the library's, without pickled arguments, and not before the checkpoint has its name."""
        args, output_dir, folder = self.args, Path(self.args.output_dir), Path(checkpoint_folder)
        if self._is_saving or not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        is_pushing = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if is_pushing and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        # The checkpoint may be deleted before the upload ends. Without what only a resumed run needs.
        for file in folder.iterdir():
            is_model = file.suffix not in (".pt", ".pth", ".bin") and file.name not in _OF_THE_RUN
            if is_model and file.is_file():
                shutil.copyfile(file, output_dir / file.name)
        upload = {"repo_id": self.hub_model_id, "token": args.hub_token, "revision": args.hub_revision}
        message = f"Training in progress, step {self.state.global_step}"
        ignored = ["_*", "incomplete/*", f"{PREFIX_CHECKPOINT_DIR}-*"]
        jobs = [
            HfApi().upload_folder(
                folder_path=output_dir, commit_message=message, ignore_patterns=ignored, run_as_future=True, **upload
            )
        ]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else folder.name
            message = f"{message}, checkpoint"
            jobs.append(
                HfApi().upload_folder(
                    folder_path=folder, path_in_repo=name, commit_message=message, run_as_future=True, **upload
                )
            )
        if is_pushing:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """
        Writes `README.md` into the output folder: [`make_model_card`] with what the training's state says, and the
        last picture of [`TransfusionSamplesCallback`]. `push_to_hub` calls it.

        Args:
            language, license, tags (*optional*): As for `make_model_card`.
            finetuned_from (`str`, *optional*):
                The base model; defaults to the repository that the model is from, or to what the card in its folder
                names.
            model_name (`str`, *optional*): Defaults to the repository, or the name of the output folder.
            dataset_tags (`str` or `list[str]`, *optional*): The repositories of what it was trained on.
            dataset (`str` or `list[str]`, *optional*): What it was evaluated on, in words.
            tasks, dataset_args: Have no meaning here; an adapter's card is the library's, where they have.
        """
        model = self._unwrapped()
        if not isinstance(model, PreTrainedModel):
            given = (language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args)
            return super().create_model_card(*given)
        if not self.is_world_process_zero():
            return
        state, folder = self.state, Path(self.args.output_dir)
        training = {"steps": state.global_step, "epochs": f"{state.epoch or 0:.4g}"}
        training |= extract_hyperparameters_from_trainer(self)
        seconds = [log["train_runtime"] for log in state.log_history if "train_runtime" in log]
        if seconds:
            training["seconds"] = round(seconds[-1])
        training |= {name: version(name) for name in ("transformers", "torch", "diffusers")}
        pictures = sorted((folder / "samples").glob("step-*.png"), key=lambda file: int(file.stem.split("-")[1]))
        make_model_card(
            model.config,
            self.hub_model_id or model_name or folder.resolve().name,
            num_parameters=model.num_parameters(),
            license=license,
            language=language,
            base_model=_base_model(model.config._name_or_path) if finetuned_from is None else finetuned_from,
            datasets=dataset_tags,
            dataset_name=dataset if isinstance(dataset, str) else ", ".join(dataset or []),
            tags=[tags] if isinstance(tags, str) else tags or (),
            training=training,
            evaluation=_last_evaluation(state.log_history),
            samples=pictures[-1].relative_to(folder).as_posix() if pictures else None,
        ).save(folder / "README.md")


def _base_model(name: str) -> str | list[str] | None:
    """Of a model loaded by this name: the repository that it is, or what its folder's card says it was made from."""
    if name and Path(name).is_dir():
        card = Path(name, "README.md")
        return ModelCard.load(card, ignore_metadata_errors=True).data.base_model if card.exists() else None
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None


def _last_evaluation(log_history: list[dict[str, Any]]) -> dict[str, float]:
    """Losses and metrics of the last step at which there was an evaluation, of all its data sets."""
    steps = [log.get("step") for log in log_history if any(name.startswith("eval_") for name in log)]
    speeds = ("_runtime", "_per_second")
    return {
        name.removeprefix("eval_"): value
        for log in log_history
        if steps and log.get("step") == steps[-1]
        for name, value in log.items()
        if name.startswith("eval_") and not name.endswith(speeds)
    }


# What a run may change of its model's or adapter's configuration when it goes on, or what says nothing of the weights.
_MAY_DIFFER = {
    "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "diffusion_loss_weight", "dtype",
    "eos_token_id", "initializer_range", "pad_token_id", "transformers_version", "use_cache",
    # Of an adapter.
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version", "revision",
    "task_type",
}  # fmt: skip


def _differences(saved: dict[str, Any], current: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name in sorted({*saved, *current} - _MAY_DIFFER):
        there, here = saved.get(name), current.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            yield from _differences(there, here, f"{prefix}{name}.")
        elif there != here:
            yield f"`{prefix}{name}` is {there!r} there and {here!r} here"


def _check_same_model(config: Any, folder: str | Path) -> None:
    """The library would load what fits of another model's weights, and pass over the rest with a warning."""
    if not Path(folder, CONFIG_NAME).exists():  # of an adapter, or no checkpoint, which the library says
        return
    differences = list(_differences(AutoConfig.from_pretrained(folder).to_dict(), config.to_dict()))
    if differences:
        raise ValueError(
            f"`resume_from_checkpoint`: {folder} is of another model: {'; '.join(differences[:5])}. Resume with the "
            "model that was trained there, or begin a new run in another `output_dir`."
        )


def _check_same_adapter(model: Any, folder: str | Path) -> None:
    """The library would load another adapter's weights where they fit, and scale them by this one's `lora_alpha`."""
    file = Path(folder, "adapter_config.json")
    if not file.exists():
        return
    if not hasattr(model, "peft_config"):
        raise ValueError(
            f"`resume_from_checkpoint`: {folder} is of an adapter, and the model has none. Resume with the model that "
            "was trained there, made by `peft.get_peft_model`."
        )
    saved, current = json.loads(file.read_text()), model.peft_config[model.active_adapter].to_dict()
    for config in (saved, current):
        for name, value in config.items():
            if isinstance(value, (list, set)):  # saved in any order
                config[name] = sorted(value, key=str)
    differences = list(_differences(saved, {name: current.get(name) for name in saved}))
    if differences:
        raise ValueError(
            f"`resume_from_checkpoint`: {folder} is of another adapter: {'; '.join(differences[:5])}. Resume with the "
            "adapter that was trained there, or begin a new run in another `output_dir`."
        )


__all__ = ["WholeCheckpointsTrainer"]
