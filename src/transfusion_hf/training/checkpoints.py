"""A `Trainer` with atomic checkpoints and exact resume: the order of the data, saving, pushing, the model card."""

import inspect
import json
import math
import random
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import IterableDatasetShard
from huggingface_hub import HfApi, ModelCard
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset, get_worker_info
from transformers import AutoConfig, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.modelcard import extract_hyperparameters_from_trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy, get_last_checkpoint, has_length, sort_checkpoints
from transformers.utils import CONFIG_NAME, PushInProgress, flatten_dict

from ..hub.card import make_model_card
from .callbacks import TransfusionEMACallback


def _seed_of(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def resume_from(args: TrainingArguments) -> Any:
    """`--resume_from_checkpoint`: a folder, or `true` to continue from the last checkpoint if there is one."""
    resume = args.resume_from_checkpoint
    if isinstance(resume, str) and resume.lower() in ("true", "false"):
        return resume.lower() == "true" and get_last_checkpoint(args.output_dir) is not None
    return resume


class _RepeatableCollator:
    """
    Seeds what a collator draws for a batch (by torch, numpy, `random`) from seed, process, pass and the batch's number
    alone. So the draws do not depend on workers, nor on whether earlier batches were collated or skipped.
    """

    def __init__(self, collator: Callable[[Sequence[Any]], Any], seed: int, process: int):
        self.collator, self.seed, self.process = collator, seed, process
        # Number of passes begun, the current pass, its first batch: shared with workers that outlive a pass.
        self._place = torch.zeros(3, dtype=torch.long).share_memory_()
        self._begun, self._count = 0, 0

    def begin(self, epoch: int, first_batch: int) -> None:
        self._place[:] = torch.tensor([self._place[0] + 1, epoch, first_batch])

    def __call__(self, features: Sequence[Any]) -> Any:
        begun, epoch, number = self._place.tolist()
        if begun != self._begun:
            self._begun, self._count = begun, 0
        worker = get_worker_info()  # workers take turns
        number += self._count if worker is None else self._count * worker.num_workers + worker.id
        self._count += 1
        seed = _seed_of(self.seed, self.process, epoch, number)
        states = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # and no generator of a GPU
                random.seed(seed)
                np.random.seed(seed)
                return self.collator(features)
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


class NotFiniteError(ValueError):
    """A training has a loss, a gradient or an image that is NaN or infinite, and stops before its weights are."""


class WholeCheckpointsTrainer(Trainer, TrainerCallback):
    """
    A `Trainer` that writes each checkpoint into `_incomplete/` and renames it when it is whole, so a run killed at any
    moment continues with `resume_from_checkpoint=True`, exactly. Only the states of optimizer and generators are
    pickled. While it trains it is one of its callbacks. [`TransfusionTrainer`] is one.
    """

    push_in_progress: Any
    processing_class: Any

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        config = self.accelerator.dataloader_config
        if config.dispatch_batches:
            raise ValueError("`dispatch_batches=True` parts images from their texts; leave it out.")
        config.dispatch_batches = False  # accelerate would choose True for streams
        if config.data_seed is None:
            # Otherwise the order comes from each process's global generator, and these differ after a training.
            config.data_seed = self.args.seed

    def _unwrapped(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    @property
    def _num_replicas(self) -> int:
        """Number of ranks that hold the same batch: those of tensor, context and sequence parallelism."""
        return self.get_tp_size() * self.get_cp_size() * self.get_sp_size()

    def get_train_dataloader(self):
        if hasattr(self.train_dataset, "rows_per_turn"):  # all batches but the last are full, with several workers too
            self.train_dataset.rows_per_turn = self._train_batch_size * self.args.world_size // self._num_replicas
        return self._repeatable(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset=None):
        return self._repeatable(super().get_eval_dataloader(eval_dataset))

    def get_test_dataloader(self, test_dataset):
        return self._repeatable(super().get_test_dataloader(test_dataset))

    def _repeatable(self, loader: Any) -> Any:
        base = getattr(loader, "base_dataloader", loader)
        if not isinstance(base.collate_fn, _RepeatableCollator):  # else the loader is kept, for its persistent workers
            process = self.args.process_index // self._num_replicas
            base.collate_fn = _RepeatableCollator(base.collate_fn, self.args.seed, process)
        if isinstance(loader.dataset, IterableDatasetShard):  # the library does not set it
            loader.dataset.drop_last = self.args.dataloader_drop_last
        self._seed_pass(loader, epoch=0)  # so all evaluations see the same batches
        return loader

    def _seed_pass(self, loader: Any, epoch: int, first_batch: int = 0) -> None:
        """Makes what workers and the collator draw follow from the pass."""
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        base = getattr(loader, "base_dataloader", loader)
        # The library would seed workers from the global generator, which the noise comes from. The seed is the same in
        # all processes: each reads the whole stream and keeps its share.
        base.generator = torch.Generator().manual_seed(_seed_of(self.args.seed, epoch))
        if isinstance(base.collate_fn, _RepeatableCollator):  # not in a user's own loader
            base.collate_fn.begin(epoch, first_batch)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        if folder:
            _check_same_model(self._unwrapped(), Path(folder))
        self.add_callback(self)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.remove_callback(self)  # a reference to itself would keep the memory of a deleted trainer
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, TransfusionEMACallback):
                    callback.stop()

    def set_initial_training_values(self, args, dataloader):
        num_epochs, *values = super().set_initial_training_values(args, dataloader)
        self._batches_per_pass = values[4] if has_length(dataloader) else None
        # Passes are shorter than the data set says, and there are more of them, where broken rows are left out.
        return sys.maxsize if args.max_steps > 0 else num_epochs, *values

    # The library computes the position in the data from the number of steps, as if all passes had the length it
    # expects, and streams never ended. The state's `epoch` counts passes.
    def _init_training_state(self, max_steps, updates_per_epoch, num_epochs, resume_from_checkpoint, trial):
        args = (max_steps, updates_per_epoch, num_epochs, resume_from_checkpoint, trial)
        epoch, num_batches = super()._init_training_state(*args)
        self._since_log: dict[str, Any] = {}
        if self.state.epoch:
            folder, size = Path(resume_from_checkpoint), self._batches_per_pass
            if len(list(folder.glob("since_last_log_*.pt"))) == self.args.world_size:
                self._since_log = torch.load(folder / f"since_last_log_{self.args.process_index}.pt", "cpu")
            if size is None:  # the library's guess of then
                saved_max_steps = json.loads((folder / TRAINER_STATE_NAME).read_text())["max_steps"]
                size = saved_max_steps * self.args.gradient_accumulation_steps
            epoch = math.ceil(self.state.epoch) - 1
            position = round((self.state.epoch - epoch) * size)
            if self._since_log.get("pass_has_ended", position == self._batches_per_pass):
                epoch, position = epoch + 1, 0
            if not self.args.ignore_data_skip:
                num_batches = position
        if self.state.global_step >= max_steps:
            epoch = num_epochs  # no pass is left; the library would train a finished run for one more step
        self._resumed_from, self._num_skipped, self._next_pass = resume_from_checkpoint, num_batches, epoch
        return epoch, num_batches

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        if self._since_log:  # so that the logged curve continues
            self._tr_loss += self._since_log["loss"]
            self._total_loss_scalar -= self._since_log["loss"]  # the final `train_loss` is of this call's steps
            self._globalstep_last_logged -= self._since_log["steps"]

    def _since_last_log(self) -> dict[str, Any]:
        """What this process has summed up since the last log."""
        return {
            "loss": self._tr_loss.item(),
            "steps": self.state.global_step - self._globalstep_last_logged,
            "pass_has_ended": self._pass_has_ended,
        }

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs: Any) -> None:
        is_stream, is_resumed = isinstance(train_dataloader.dataset, IterableDataset), self._resumed_from is not None
        first_batch = self._num_skipped if is_resumed and not is_stream else 0  # a stream collates what it skips
        if is_resumed and self._num_skipped == self._batches_per_pass:
            # The library does so with the first batch that it does not skip, and there is none.
            self._load_rng_state(self._resumed_from)
        self._seed_pass(train_dataloader, self._next_pass, first_batch)
        self._pass_has_ended, self._steps_before = False, state.global_step

    def on_epoch_end(self, args, state, control, model=None, **kwargs: Any) -> None:
        is_stopped = control.should_training_stop or control.should_epoch_stop
        if state.global_step == self._steps_before and self._resumed_from is None and not is_stopped:
            raise ValueError(
                f"`train_dataset` gave a whole pass without a step: fewer than `gradient_accumulation_steps` = "
                f"{args.gradient_accumulation_steps} batches. Give it more samples, or lower that number."
            )
        model.zero_grad()  # leftover micro-batches, too few for a step, must not count in the next pass
        self._pass_has_ended, self._resumed_from, self._next_pass = True, None, self._next_pass + 1

    def _losses_of_step(self) -> list[torch.Tensor]:
        """Numbers of the micro-batches of a step that must be finite, too."""
        return []

    def _stop_by_losses(self) -> None:
        """Raises `NotFiniteError` if one of them is not."""

    # No event tells the norm, and weights that are not finite must not get into a checkpoint. Here all of a step is
    # queued but the optimizer's: the one place in which the device is waited for.
    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        is_scaled = self.accelerator.mixed_precision == "fp16"  # the scaler leaves such steps out
        checked = [*self._losses_of_step(), *([] if norm is None or is_scaled else [norm])]
        # A norm that is a number already is no tensor to wait for.
        numbers = [torch.as_tensor(number, device=self.args.device).detach().float() for number in checked]
        if numbers and not torch.stack(numbers).isfinite().all():
            self._stop_by_losses()
            raise NotFiniteError(
                f"The norm of the gradient is {float(norm)} after step {self.state.global_step}. Lower the learning "
                "rate or clip by `max_grad_norm`, and go on from the last checkpoint."
            )
        return norm

    # The library has no argument for where a checkpoint is written before it is whole.
    def _get_output_dir(self, trial):
        return str(Path(super()._get_output_dir(trial), "_incomplete"))

    # The library has no event between the last file of a checkpoint and the deletion of old ones.
    def _save_checkpoint(self, model, trial):
        aside = Path(self._get_output_dir(trial))
        name, best = (f"checkpoint-{step}" for step in (self.state.global_step, self.state.best_global_step))
        new, folder = aside / name, aside.parent / name
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        if best == name or (aside.parent / best).exists():
            self.state.best_model_checkpoint = str(aside.parent / best)  # the library has found it in `_incomplete/`
            if self.args.should_save:
                self.state.save_to_json(str(new / TRAINER_STATE_NAME))
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TransfusionEMACallback):
                callback.save(new, self.state)
        if not self.args.save_only_model:  # which cannot be resumed
            torch.save(self._since_last_log(), new / f"since_last_log_{self.args.process_index}.pt")
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if folder.exists():  # of an earlier run
                folder.rename(aside / "replaced")
            new.rename(folder)
            checkpoints, limit = sort_checkpoints(str(folder.parent), use_mtime=True), self.args.save_total_limit or 0
            num_old = max(len(checkpoints) - limit, 0) if limit > 0 else 0
            # Deleted under other names, so that no part of a checkpoint has a whole one's.
            for old in [Path(one) for one in checkpoints[:-1] if Path(one).name != best][:num_old]:
                old.rename(aside / f"outdated-{old.name}")
            shutil.rmtree(aside)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call=True)
        file = Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME)
        if self.args.should_save and file.exists():
            file.unlink()  # text instead of a pickle, because the folder is for others to load
            file.with_suffix(".json").write_text(self.args.to_json_string() + "\n")
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    # The library pushes before a checkpoint is whole, pickles the arguments and leaves out files of the model.
    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        args, folder = self.args, Path(checkpoint_folder)
        is_pushing = self.push_in_progress is not None and not self.push_in_progress.is_done()
        is_left_out = args.hub_strategy == HubStrategy.END or (is_pushing and not args.hub_always_push)
        if folder.parent.name == "_incomplete" or is_left_out or not self.is_world_process_zero():
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        # A copy of the model, because the checkpoint may be deleted before the upload ends.
        others = ["*.pt", "*.pth", "*.bin", TRAINER_STATE_NAME, TransfusionEMACallback.FILE_NAME, "README.md"]
        shutil.copytree(folder, args.output_dir, ignore=shutil.ignore_patterns(*others), dirs_exist_ok=True)
        to: dict[str, Any] = {"repo_id": self.hub_model_id, "token": args.hub_token, "revision": args.hub_revision}
        to |= {"commit_message": f"Training in progress, step {self.state.global_step}", "run_as_future": True}
        not_pushed = ["_*", "checkpoint-*"]
        jobs = [HfApi().upload_folder(folder_path=args.output_dir, ignore_patterns=not_pushed, **to)]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else folder.name
            jobs.append(HfApi().upload_folder(folder_path=folder, path_in_repo=name, **to))
        self.push_in_progress = PushInProgress([*(self.push_in_progress.jobs if is_pushing else []), *jobs])

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """
        Writes `README.md` into the output folder: [`make_model_card`] with the state of the training and the last
        picture of [`TransfusionSamplesCallback`]; for an adapter, the library's card. Arguments are the library's:
        `dataset_tags` are repositories of training data, `dataset` says what the model was evaluated on.
        """
        model = self._unwrapped()
        if not isinstance(model, PreTrainedModel):
            return super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero():
            return
        given = inspect.signature(super().create_model_card).bind(*args, **kwargs).arguments
        folder = Path(self.args.output_dir)
        progress = {"steps": self.state.global_step, "epochs": f"{self.state.epoch or 0:.4g}"}
        evaluation = {  # the last value of each
            name.removeprefix("eval_"): value
            for log in self.state.log_history
            for name, value in log.items()
            if name.startswith("eval_") and not name.endswith(("_runtime", "_per_second"))
        }
        picture = max(folder.glob("samples/step-*.png"), key=lambda file: int(file.stem.split("-")[1]), default=None)
        name, base_model = model.config._name_or_path, None
        if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).is_dir():
            base_model = name
        elif name and (card := Path(name, "README.md")).exists():  # the base model that the card of a folder names
            base_model = ModelCard.load(card, ignore_metadata_errors=True).data.base_model
        tags, dataset = ([x] if isinstance(x, str) else x or [] for x in (given.get("tags"), given.get("dataset")))
        make_model_card(
            model.config,
            self.hub_model_id or given.get("model_name") or folder.resolve().name,
            num_parameters=model.num_parameters(),
            license=given.get("license"),
            language=given.get("language"),
            base_model=given.get("finetuned_from") or base_model,
            datasets=given.get("dataset_tags"),
            dataset_name=", ".join(dataset),
            tags=tags,
            training=progress | extract_hyperparameters_from_trainer(self),
            evaluation=evaluation,
            samples=picture.relative_to(folder).as_posix() if picture else None,
        ).save(folder / "README.md")


# Fields of a model's or an adapter's configuration that may change between runs, or that say nothing of the weights.
_MAY_DIFFER = {
    "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "diffusion_loss_weight", "dtype",
    "eos_token_id", "initializer_range", "pad_token_id", "transformers_version", "use_cache",
    # Fields of adapters:
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version", "revision",
    "task_type",
}  # fmt: skip


def _check_same_model(model: Any, folder: Path) -> None:
    """The library would load the weights that fit and only warn about the rest, and ignore another `lora_alpha`."""
    pairs: dict[str, tuple[Any, Any]] = {}
    if (folder / CONFIG_NAME).exists():  # an adapter has none
        pairs["model"] = AutoConfig.from_pretrained(folder), model.config
    if (folder / "adapter_config.json").exists():
        if not hasattr(model, "peft_config"):
            raise ValueError(f"{folder} is of an adapter, and the model has none; wrap it by `peft.get_peft_model`.")
        from peft import PeftConfig

        pairs["adapter"] = PeftConfig.from_pretrained(str(folder)), model.peft_config[model.active_adapter]
    for kind, pair in pairs.items():
        there, here = (flatten_dict(config.to_dict()) for config in pair)
        differences = [
            f"`{name}` is {there.get(name)!r} there and {here.get(name)!r} here"
            for name in sorted({*there, *here})
            if not _MAY_DIFFER & {*name.split(".")} and there.get(name) != here.get(name)
        ]
        if differences:
            raise ValueError(
                f"`resume_from_checkpoint`: {folder} is of another {kind}: {'; '.join(differences[:5])}. Resume with "
                f"the {kind} that was trained there, or begin a new run in another `output_dir`."
            )
