"""The exact `Trainer`, and what the stock one needs beside it."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import AutoConfig, PreTrainedModel, Trainer, TrainerCallback, TrainerState
from transformers.modelcard import extract_hyperparameters_from_trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints
from transformers.utils import CONFIG_NAME

from .hub_transfusion import save_code
from .modality_transfusion import image_parameters
from .model_card_transfusion import make_model_card
from .modeling_transfusion import TransfusionForCausalLMAndDiffusion
from .patching_transfusion import TransfusionTimestepEmbedding


def shard_float32_parts(model: torch.nn.Module, mesh: DeviceMesh | None = None) -> set[torch.nn.Parameter]:
    """
    What stays float32 beside FSDP2 in lower precision: gives the timestep embedding a group of its own, for a group
    has one dtype, before `fully_shard` of what is around it. [`TransfusionTrainer`] does so itself.

    Args:
        model (`TransfusionForCausalLMAndDiffusion`)
        mesh (`torch.distributed.DeviceMesh`, *optional*): As for `fully_shard`; all processes where `None`.

    Returns:
        `set[torch.nn.Parameter]`: Those of the VAE, to pass as `ignored_params` to `fully_shard`: it is whole in each
        process, for one without images does not run it, and others would wait for its part.
    """
    for module in [module for module in model.modules() if isinstance(module, TransfusionTimestepEmbedding)]:
        fully_shard(module, mesh=mesh)
    return {parameter for name, parameter in model.named_parameters() if name.startswith("vae.")}


class _Sums:
    """Sums over batches since the last log: of both losses and what they are means over, by band of t too."""

    NAMES = ("nll", "labels", "tokens", "images")

    def __init__(self, num_bands: int, device: torch.device):
        dtype = torch.float32 if device.type == "mps" else torch.float64  # which Apple's GPUs have not
        self.by_name = torch.zeros(len(self.NAMES), dtype=dtype, device=device)
        self.bands = torch.zeros(2, num_bands, dtype=dtype, device=device)  # errors, and images
        self.start_time = time.perf_counter()

    def add(self, inputs: dict[str, Any], outputs: Any, num_items: Any, num_timesteps: int) -> None:
        """Of a micro-batch, whose `lm_loss` is a sum over `num_items`."""
        mask = inputs.get("attention_mask")
        numbers = (
            outputs["lm_loss"].detach() * num_items,
            (inputs["labels"][:, 1:] != -100).sum(),
            inputs["input_ids"].numel() if mask is None else mask.sum(),
            sum(len(stack) if stack.ndim == 4 else 1 for stack in _images_of(inputs)),
        )
        kwargs = {"dtype": self.by_name.dtype, "device": self.by_name.device}
        self.by_name += torch.stack([torch.as_tensor(number, **kwargs) for number in numbers])
        errors = outputs.get("image_losses")  # absent where there are none
        if errors is not None:
            num_bands = self.bands.shape[1]
            bands = (outputs["image_timesteps"] * num_bands / num_timesteps).long().clamp(max=num_bands - 1)
            self.bands.index_add_(1, bands, torch.stack([errors, torch.ones_like(errors)]).to(self.bands.dtype))


class TransfusionTrainer(Trainer):
    r"""
    The `Trainer` with both losses exact (Eq. 4, arXiv 2408.11039): `lm_loss` is the mean over all labels and
    `diffusion_loss` the mean over all noised images of the whole batch, however it is cut into micro-batches and
    processes. Beside `loss` it logs, in training and evaluation, `lm_loss`, `diffusion_loss`, and the latter by band
    of t (`diffusion_loss/t_0_250` …); and of the training `tokens_per_second`, `images_per_second` and, as 6·N·D
    counts it, 4·N·D what is frozen, `model_tflops_per_second` of all processes.

    A checkpoint is written aside, in `incomplete/`, and then renamed: one that bears its name is whole, and a run that
    was killed at any moment goes on with `resume_from_checkpoint=True`.

    Args:
        args, kwargs: As for `Trainer`, with `remove_unused_columns=False`.
        num_timestep_bands (`int`, defaults to 4): Bands of t.
        peak_flops_per_second (`float`, *optional*):
            Of one device in the precision of the training, as 989e12 of an H100 in bfloat16: logs the model FLOP
            utilisation `mfu`.

    Raises:
        ValueError: `average_tokens_across_devices=False` with several processes, `label_smoothing_factor`, or
            `dispatch_batches`, which would part images from their texts; `use_liger_kernel` with a split LM head; a
            checkpoint of another model or adapter to resume from; in training, a loss that is not finite, whose batch
            is then in the output folder.
    """

    def __init__(
        self,
        *args: Any,
        num_timestep_bands: int = 4,
        peak_flops_per_second: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        if not self.args.average_tokens_across_devices and self.args.world_size > 1:
            raise ValueError("`average_tokens_across_devices=False` weighs processes unequally; leave it on.")
        if self.args.label_smoothing_factor:
            raise ValueError("`label_smoothing_factor` takes the labels away from the model; leave it at 0.")
        if self.accelerator.dataloader_config.dispatch_batches:
            raise ValueError(
                "`dispatch_batches=True` cuts batches along their first dimension, which parts images from their "
                "texts; leave it out of `accelerator_config`."
            )
        self.accelerator.dataloader_config.dispatch_batches = False  # what accelerate would choose for streams
        if self.args.use_liger_kernel:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled or self.get_tp_size() > 1:
                raise ValueError("`use_liger_kernel` reads the LM head whole, and FSDP, DeepSpeed or TP split it.")
            for module in self.model.modules():
                if isinstance(module, TransfusionForCausalLMAndDiffusion):
                    module.use_liger_loss = True
        if self.accelerator.is_fsdp2:
            plugin, mesh = self.accelerator.state.fsdp_plugin, self.accelerator.torch_device_mesh
            if plugin.mixed_precision_policy is not None:
                # accelerate's own policy rounds the images before they are noised, and the losses.
                plugin.mixed_precision_policy = replace(
                    plugin.mixed_precision_policy, output_dtype=None, cast_forward_inputs=False
                )
            if mesh is not None:
                mesh = mesh[tuple(self.accelerator.parallelism_config.fsdp_dim_names)]
            shard_float32_parts(self.accelerator.unwrap_model(self.model), mesh)
            plugin.ignored_modules = r"(.*\.)?vae"
        self.num_timestep_bands = num_timestep_bands
        self.peak_flops_per_second = peak_flops_per_second
        self._train_sums, self._eval_sums = self._new_sums(), self._new_sums()
        self._num_images: Any = None
        self._is_saving = False

    @property
    def _num_replicas(self) -> int:
        """Ranks of tensor, context and sequence parallelism hold the same batch, and each counts it."""
        return self.get_tp_size() * self.get_cp_size() * self.get_sp_size()

    def _new_sums(self) -> _Sums:
        return _Sums(self.num_timestep_bands, self.args.device)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        if folder:
            _check_same_model(self._config(), folder)
            _check_same_adapter(self.accelerator.unwrap_model(self.model), folder)
        self._train_sums = self._new_sums()  # speeds count from now on
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any):
        # The library would take a finished run that is resumed one step further.
        if self.state.global_step < self.state.max_steps:
            return super()._run_epoch(*args, **kwargs)
        self.control.should_training_stop = True

    def _get_num_items_in_batch(self, batch_samples, device):
        num_images = torch.tensor(sum(_count_noised(batch) for batch in batch_samples), device=device)
        if self.args.world_size > 1:
            num_images = self.accelerator.gather(num_images).sum()
        self._num_images = (num_images / self._num_replicas).clamp(min=1)
        return super()._get_num_items_in_batch(batch_samples, device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {**inputs, "num_images_in_batch": self._num_images}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training and not torch.isfinite(loss):
            file = Path(self.args.output_dir, f"not-finite-{self.state.global_step}-{self.args.process_index}.pt")
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(inputs, file)
            lm_loss, diffusion_loss = outputs["lm_loss"].item(), outputs["diffusion_loss"].item()
            raise ValueError(
                f"The loss is {loss.item()} after step {self.state.global_step} (`lm_loss` {lm_loss}, "
                f"`diffusion_loss` {diffusion_loss}). The batch is saved in {file}; look at it, lower the learning "
                "rate, and go on from the last checkpoint."
            )
        num_items = 0 if num_items_in_batch is None else num_items_in_batch
        sums = self._train_sums if model.training else self._eval_sums
        sums.add(inputs, outputs, num_items, self._config().num_train_timesteps)
        return (loss, outputs) if return_outputs else loss

    def _config(self) -> Any:
        return self.accelerator.unwrap_model(self.model).config

    def _metrics(self, sums: _Sums, prefix: str = "") -> dict[str, float]:
        """Means over all that was summed, of all processes."""
        totals = self.accelerator.reduce(torch.cat([sums.by_name, sums.bands.flatten()]), "sum") / self._num_replicas
        nll, labels, tokens, images = totals[: len(sums.NAMES)].tolist()
        errors, counts = totals[len(sums.NAMES) :].view(2, -1)
        metrics = {}
        if labels:
            metrics[f"{prefix}lm_loss"] = nll / labels
        if counts.sum():
            metrics[f"{prefix}diffusion_loss"] = float(errors.sum() / counts.sum())
        num_timesteps = self._config().num_train_timesteps
        edges = [round(i * num_timesteps / self.num_timestep_bands) for i in range(self.num_timestep_bands + 1)]
        for i, (error, count) in enumerate(zip(errors.tolist(), counts.tolist(), strict=True)):
            if count:
                metrics[f"{prefix}diffusion_loss/t_{edges[i]}_{edges[i + 1]}"] = error / count
        if not prefix:
            seconds = time.perf_counter() - sums.start_time
            metrics["tokens_per_second"] = tokens / seconds
            metrics["images_per_second"] = images / seconds
            flops_per_second = self._flops_per_token * tokens / seconds
            metrics["model_tflops_per_second"] = flops_per_second / 1e12
            if self.peak_flops_per_second is not None:
                metrics["mfu"] = flops_per_second / (self.peak_flops_per_second * self.args.world_size)
        return metrics

    @property
    def _flops_per_token(self) -> int:
        """
        6·N over the transformer and its image parts, without the VAE; 4·N where frozen, which has no gradient. Of
        untied weights a token meets the text's or the image's: they count half each.
        """
        model = self.accelerator.unwrap_model(self.model)
        halves = {id(one) for _, *both in image_parameters(model) for one in both}
        return sum(
            (6 if parameter.requires_grad else 4) * parameter.numel() // (2 if id(parameter) in halves else 1)
            for name, parameter in model.named_parameters()
            if not {"vae", "original_module"} & set(name.split("."))  # PEFT keeps the modules that it replaces
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self._metrics(self._train_sums)}
            self._train_sums = self._new_sums()
        super().log(logs, start_time)

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return str(Path(folder, "incomplete")) if self._is_saving else folder

    def _save_checkpoint(self, model, trial):
        folder, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        aside = folder / "incomplete"
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(folder / name)
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_saving = False
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TransfusionEMACallback):
                callback.save(aside / name, self.state)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if (folder / name).exists():  # of an earlier run
                (folder / name).rename(aside / "replaced")
            (aside / name).rename(folder / name)
            shutil.rmtree(aside)
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            # As text: a folder that others load shall hold nothing that is pickled.
            folder = Path(output_dir or self.args.output_dir)
            (folder / TRAINING_ARGS_NAME).unlink()
            (folder / "training_args.json").write_text(self.args.to_json_string() + "\n")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._is_saving:  # or else in the background, while it is renamed
            if self.is_world_process_zero() and isinstance(self._unwrapped(), PreTrainedModel):
                save_code(self.args.output_dir)
            super()._push_from_checkpoint(checkpoint_folder)

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
            finetuned_from (`str`, *optional*): The base model; defaults to the repository that the model is from.
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
        name = model.config._name_or_path  # of a repository, it is what was trained further
        if finetuned_from is None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).is_dir():
            finetuned_from = name
        make_model_card(
            model.config,
            self.hub_model_id or model_name or folder.resolve().name,
            num_parameters=model.num_parameters(),
            license=license,
            language=language,
            base_model=finetuned_from,
            datasets=dataset_tags,
            dataset_name=dataset if isinstance(dataset, str) else ", ".join(dataset or []),
            tags=[tags] if isinstance(tags, str) else tags or (),
            training=training,
            evaluation=_last_evaluation(state.log_history),
            samples=pictures[-1].relative_to(folder).as_posix() if pictures else None,
        ).save(folder / "README.md")

    def _unwrapped(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any):
        self._eval_sums, start = self._new_sums(), time.perf_counter()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = self._metrics(self._eval_sums, f"{metric_key_prefix}_")
        output.metrics.update(metrics)
        # The library's is a mean over batches, whatever they hold.
        loss = metrics.get(f"{metric_key_prefix}_lm_loss", 0.0)
        loss += self._config().diffusion_loss_weight * metrics.get(f"{metric_key_prefix}_diffusion_loss", 0.0)
        output.metrics[f"{metric_key_prefix}_loss"] = loss
        self._train_sums.start_time += time.perf_counter() - start  # what an evaluation takes is no time of training
        return output


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


def _images_of(batch: dict[str, Any]) -> list[torch.Tensor]:
    images = batch.get("pixel_values")
    images = batch.get("latents") if images is None else images
    return [] if images is None else [images] if isinstance(images, torch.Tensor) else list(images)


def _count_noised(batch: dict[str, Any]) -> int:
    mask = batch.get("image_loss_mask")
    if mask is not None:
        return int(torch.as_tensor(mask).sum())
    return sum(len(stack) if stack.ndim == 4 else 1 for stack in _images_of(batch))


class TransfusionEMACallback(TrainerCallback):
    r"""
    Exponential moving average of the weights, for the stock `Trainer`. The averaged weights take the place of the
    trained ones during each evaluation of the training and for good at its end. Checkpoints hold both, so that a
    resumed run goes on with its average.

    Args:
        decay (`float`, defaults to 0.9999): Largest weight of the past; smaller in the first steps.
        power (`float`, defaults to 2/3): Exponent of that warm-up, 1 − (1 + step)^−power.
        resume_from_checkpoint (`str`, *optional*):
            The checkpoint that a run resumes from, where it is not in `args.output_dir`: the Trainer does not tell.

    Raises:
        ValueError: with `load_best_model_at_end`, with several evaluation sets, or when resuming from a checkpoint
            without average.

    Example:

    ```python
    >>> Trainer(model=model, args=args, callbacks=[TransfusionEMACallback(decay=0.999)])
    ```"""

    FILE_NAME = "ema.safetensors"

    def __init__(self, decay: float = 0.9999, power: float = 2 / 3, resume_from_checkpoint: str | None = None):
        self.decay = decay
        self.power = power
        self.resume_from_checkpoint = resume_from_checkpoint
        self._is_training = False
        self._saved_step: int | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs: Any) -> None:
        if args.load_best_model_at_end:
            raise ValueError(
                "`load_best_model_at_end` and an average at the end exclude each other; drop one of them."
            )
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._is_training, self._saved_step = True, None
        self._ema = EMAModel(self._parameters, decay=self.decay, use_ema_warmup=True, power=self.power)
        if state.global_step > 0:
            folder = self.resume_from_checkpoint
            file = self._file(args, state) if folder is None else Path(folder, self.FILE_NAME)
            if not file.exists():
                raise ValueError(
                    f"No average to resume with: {file} does not exist. Pass the checkpoint's folder to "
                    "`TransfusionEMACallback(resume_from_checkpoint=...)`; or its run had no such callback: drop it, "
                    "or begin anew."
                )
            stored = load_file(file)
            self._ema.optimization_step = state.global_step
            self._ema.shadow_params = [_like(stored[str(i)], p) for i, p in enumerate(self._parameters)]

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        self._ema.step(self._parameters)
        self._swap_for_evaluation(control)

    def on_epoch_end(self, args, state, control, **kwargs: Any) -> None:
        self._swap_for_evaluation(control)

    def _swap_for_evaluation(self, control) -> None:
        # The Trainer announces an evaluation here and has no other event before it.
        if control.should_evaluate:
            self._ema.store(self._parameters)
            self._ema.copy_to(self._parameters)

    def on_evaluate(self, args, state, control, **kwargs: Any) -> None:
        if not self._is_training:
            return
        if self._ema.temp_stored_params is None:
            raise ValueError(
                "`eval_dataset` holds several sets, of which only the first was evaluated with the averaged weights: "
                "the Trainer announces no second one. Concatenate them, or evaluate the others afterwards."
            )
        # Now, for a checkpoint may be saved next.
        self._ema.restore(self._parameters)

    def save(self, folder: Path, state: TrainerState) -> None:
        """Writes the average into a checkpoint's folder; for every process to call, where parameters are sharded."""
        self._saved_step = state.global_step
        average = {str(i): _whole(parameter).contiguous() for i, parameter in enumerate(self._ema.shadow_params)}
        if state.is_world_process_zero:
            save_file(average, folder / self.FILE_NAME)

    def on_save(self, args, state, control, **kwargs: Any) -> None:
        if self._saved_step != state.global_step:  # `TransfusionTrainer` writes it with the rest
            self.save(self._file(args, state).parent, state)

    def on_train_end(self, args, state, control, **kwargs: Any) -> None:
        self._is_training = False
        self._ema.copy_to(self._parameters)

    def _file(self, args, state) -> Path:
        return Path(args.output_dir, f"checkpoint-{state.global_step}", self.FILE_NAME)


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _like(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Sharded as a parameter is, on its device."""
    whole = whole.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements)


class TransfusionSamplesCallback(TrainerCallback):
    r"""
    Shows every so many steps what the model draws and reads: prompts as pictures, the same noise each time, and images
    with their captions. Into `samples/step-N.png` of the output folder, and to TensorBoard and Weights & Biases where
    the `Trainer` reports there. The training itself goes on as if nothing had been drawn.

    Args:
        trainer (`Trainer`): The one it is added to.
        processor (`TransfusionProcessor`)
        prompts (`list[str]`): To draw.
        images (`list[PIL.Image.Image]`, *optional*): To caption.
        interval (`int`, defaults to 1000): Steps between samples.
        seed (`int`, defaults to 0): Of the noise.
        max_new_tokens (`int`, defaults to 32): Of a caption.
        generate_kwargs: For drawing, as `num_inference_steps`.

    Example:

    ```python
    >>> trainer.add_callback(TransfusionSamplesCallback(trainer, processor, ["a handwritten seven"], interval=500))
    ```"""

    def __init__(
        self,
        trainer: Trainer,
        processor: Any,
        prompts: list[str],
        images: list[Image.Image] | None = None,
        interval: int = 1000,
        seed: int = 0,
        max_new_tokens: int = 32,
        **generate_kwargs: Any,
    ):
        if interval < 1:
            raise ValueError(f"`interval` must be at least 1 step; got {interval}.")
        self.trainer = trainer
        self.processor = processor
        self.prompts = list(prompts)
        self.images = list(images or [])
        self.interval = interval
        self.seed = seed
        self.max_new_tokens = max_new_tokens
        self.generate_kwargs = generate_kwargs

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        if state.global_step % self.interval:
            return
        # In every process: the parameters may be sharded.
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        was_training = model.training
        model.eval()
        try:
            drawn, captions = self._draw(model), self._caption(model)
        finally:
            model.train(was_training)
        if state.is_world_process_zero:
            self._report(Path(args.output_dir, "samples"), state.global_step, drawn, captions)

    def _draw(self, model: Any) -> list[Image.Image]:
        if not self.prompts:
            return []
        generators = [torch.Generator(model.device).manual_seed(self.seed + i) for i in range(len(self.prompts))]
        inputs = self.processor(text=self.prompts).to(model.device)
        output = model.generate(**inputs, generation_mode="image", generator=generators, **self.generate_kwargs)
        return self.processor.post_process_multimodal_output(output, generation_mode="image")

    def _caption(self, model: Any) -> list[str]:
        if not self.images:
            return []
        inputs = self.processor(text=[self.processor.image_token] * len(self.images), images=self.images)
        ids = model.generate(
            **inputs.to(model.device), generation_mode="text", do_sample=False, max_new_tokens=self.max_new_tokens
        )
        texts = self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _report(self, folder: Path, step: int, drawn: list[Image.Image], captions: list[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if drawn:
            sides = [max(getattr(image, side) for image in drawn) for side in ("width", "height")]
            grid = Image.new("RGB", (sides[0] * len(drawn), sides[1]))
            for i, image in enumerate(drawn):
                grid.paste(image, (i * sides[0], 0))
            grid.save(folder / f"step-{step}.png")
        if captions:
            (folder / f"step-{step}.txt").write_text("\n".join(captions) + "\n")
        for callback in self.trainer.callback_handler.callbacks:
            if (writer := getattr(callback, "tb_writer", None)) is not None:
                for prompt, image in zip(self.prompts, drawn, strict=True):
                    writer.add_image(f"samples/{prompt}", pil_to_tensor(image), step)
                if captions:
                    writer.add_text("samples/captions", "\n\n".join(captions), step)
            if (wandb := getattr(callback, "_wandb", None)) is not None and wandb.run is not None:
                pictures = [wandb.Image(image, caption=text) for text, image in zip(self.prompts, drawn, strict=True)]
                read = [wandb.Image(image, caption=text) for text, image in zip(captions, self.images, strict=False)]
                wandb.log({"samples/drawn": pictures, "samples/read": read, "train/global_step": step})


__all__ = ["TransfusionEMACallback", "TransfusionSamplesCallback", "TransfusionTrainer"]
