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
from huggingface_hub import HfApi, ModelCard
from torch.utils.data import IterableDataset, get_worker_info
from transformers import AutoConfig, PreTrainedModel, Trainer
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

from .model_card_transfusion import make_model_card
from .trainer_callbacks import TransfusionEMACallback

# Of a checkpoint, what is no part of the model, or is written for the whole run.
_OF_THE_RUN = (TRAINER_STATE_NAME, TransfusionEMACallback.FILE_NAME, "README.md")


class _RepeatableCollator:
    """
    What a collator draws (by torch, numpy, `random`) for a batch follows from seed, process, pass and the batch's
    number there: be it in the main process or in a worker, and be what comes before it collated or skipped.
    """

    def __init__(self, collator: Callable[[Sequence[Any]], Any], seed: int, process: int):
        self.collator, self.seed, self.process = collator, seed, process
        # Shared with workers that outlive a pass.
        self._place = torch.zeros(2, dtype=torch.long).share_memory_()
        self._epoch, self._count = -1, 0

    def begin(self, epoch: int, first_batch: int) -> None:
        """The next batch is this one of that pass."""
        self._place[:] = torch.tensor([epoch, first_batch])
        self._epoch = -1

    def __call__(self, features: Sequence[Any]) -> Any:
        epoch, number = self._place.tolist()
        if epoch != self._epoch:
            self._epoch, self._count = epoch, 0
        worker = get_worker_info()  # which take turns
        number += self._count if worker is None else self._count * worker.num_workers + worker.id
        self._count += 1
        seed = int(np.random.SeedSequence((self.seed, self.process, epoch, number)).generate_state(1)[0])
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
    _repeatable: _RepeatableCollator

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled:
            kind = self.accelerator.state.fsdp_plugin.state_dict_type.name
            if kind != "FULL_STATE_DICT":  # the library then saves no model, and says nothing
                raise ValueError(
                    f"`fsdp_state_dict_type` is {kind}, of which no model would be saved that can be loaded; set it "
                    "to FULL_STATE_DICT in accelerate's configuration, or `state_dict_type` in `fsdp_config`."
                )

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
        collator, process = self.data_collator, self.args.process_index // self._num_replicas
        self.data_collator = self._repeatable = _RepeatableCollator(collator, self.args.seed, process)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def set_initial_training_values(self, args, dataloader):
        num_epochs, *values = super().set_initial_training_values(args, dataloader)
        self._batches_per_epoch = values[4] if has_length(dataloader) else None
        # Where broken rows are left out, passes are shorter than the data set says, and it takes more of them.
        return sys.maxsize if args.max_steps > 0 else num_epochs, *values

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        # The library computes from the number of steps where in the data a run stands, as if all passes had the length
        # that it is told, and those of a stream no end. The state's `epoch` is counted.
        epoch, num_batches = super()._init_training_state(*args, **kwargs)
        if self.state.epoch:
            size = self._batches_per_epoch
            if size is None:
                size = self._resumed_max_steps * self.args.gradient_accumulation_steps
            epoch = math.ceil(self.state.epoch) - 1
            position = round((self.state.epoch - epoch) * size)
            if position == self._batches_per_epoch:
                epoch, position = epoch + 1, 0
            if not self.args.ignore_data_skip:
                num_batches = position - position % self.args.gradient_accumulation_steps
        return epoch, num_batches

    def _run_epoch(self, **kwargs: Any):
        # The library would take a finished run that is resumed one step further.
        if self.state.global_step < self.state.max_steps:
            epoch, num_skipped = kwargs["epoch"], 0
            loader = kwargs["train_dataloader"]
            loader = getattr(loader, "base_dataloader", loader)
            # What the data draw in workers, a stream draws again. The library would take the workers' seed from the
            # global generator, and before it restores that.
            entropy = (self.args.seed, epoch, self.args.process_index // self._num_replicas)
            (seed,) = np.random.SeedSequence(entropy).generate_state(1)
            loader.generator = torch.Generator().manual_seed(int(seed))
            is_resumed = kwargs["resume_from_checkpoint"] is not None and epoch == kwargs["epochs_trained"]
            if is_resumed and not isinstance(loader.dataset, IterableDataset):
                num_skipped = kwargs["steps_trained_in_current_epoch"]  # without being collated
            self._repeatable.begin(epoch, num_skipped)
            super()._run_epoch(**kwargs)
            # Micro-batches too few for a step, at the end of a pass, are no part of the next one's first.
            self.model.zero_grad()
        else:
            self.control.should_training_stop = True

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
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if (folder / name).exists():  # of an earlier run
                (folder / name).rename(aside / "replaced")
            (aside / name).rename(folder / name)
            for checkpoint in self._outdated(folder):
                checkpoint.rename(aside / checkpoint.name)  # one in part shall not bear its name either
            shutil.rmtree(aside)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))

    def _outdated(self, folder: Path) -> list[Path]:
        """What the library's `rotate_checkpoints` would delete."""
        checkpoints = [Path(checkpoint) for checkpoint in sort_checkpoints(str(folder), use_mtime=True)]
        kept = {checkpoints[-1], Path(self.state.best_model_checkpoint or "")}.intersection(checkpoints)
        limit = self.args.save_total_limit or 0
        number = len(checkpoints) - max(limit, len(kept)) if limit > 0 else 0
        return [checkpoint for checkpoint in checkpoints if checkpoint not in kept][: max(number, 0)]

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
