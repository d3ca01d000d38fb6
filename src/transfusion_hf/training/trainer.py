"""The exact `Trainer`: both losses over the global batch, logged apart."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from ..modality_transfusion import image_parameters
from ..modeling_transfusion import TransfusionForCausalLMAndDiffusion
from ..patching_transfusion import TransfusionTimestepEmbedding
from .callbacks import TransfusionNoiseCallback
from .checkpoints import WholeCheckpointsTrainer


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


def _prepare_fsdp2(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """What accelerate then splits by itself."""
    plugin, mesh = accelerator.state.fsdp_plugin, accelerator.torch_device_mesh
    if plugin.mixed_precision_policy is not None:
        # accelerate's own policy rounds the images before they are noised, and the losses.
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, output_dtype=None, cast_forward_inputs=False
        )
    if mesh is not None:
        mesh = mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
    shard_float32_parts(accelerator.unwrap_model(model), mesh)
    plugin.ignored_modules = r"(.*\.)?vae"


class _Sums:
    """Sums over batches since the last log: of both losses and what they are means over, by band of t too."""

    NAMES = ("nll", "labels", "tokens", "images")

    def __init__(self, num_bands: int, num_timesteps: int, pad_token_id: int | None, device: torch.device):
        dtype = torch.float32 if device.type == "mps" else torch.float64  # which Apple's GPUs have not
        self.totals = torch.zeros(len(self.NAMES) + 2 * num_bands, dtype=dtype, device=device)
        self.by_name = self.totals[: len(self.NAMES)]
        self.bands = self.totals[len(self.NAMES) :].view(2, num_bands)  # errors, and images
        self.num_timesteps = num_timesteps
        self.pad_token_id = pad_token_id
        self.start_time = time.perf_counter()

    def add(self, inputs: dict[str, Any], outputs: Any, num_items: Any) -> None:
        """Of a micro-batch, whose `lm_loss` is a sum over `num_items`."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if mask is None:  # packed
            mask = torch.ones_like(ids) if self.pad_token_id is None else ids != self.pad_token_id
        numbers = (
            outputs["lm_loss"].detach() * num_items,
            (inputs["labels"][:, 1:] != -100).sum(),
            mask.sum(),
            sum(len(stack) if stack.ndim == 4 else 1 for stack in _images_of(inputs)),
        )
        kwargs = {"dtype": self.by_name.dtype, "device": self.by_name.device}
        self.by_name += torch.stack([torch.as_tensor(number, **kwargs) for number in numbers])
        errors = outputs.get("image_losses")  # absent where there are none
        if errors is not None:
            num_bands = self.bands.shape[1]
            bands = (outputs["image_timesteps"] * num_bands / self.num_timesteps).long().clamp(max=num_bands - 1)
            self.bands.index_add_(1, bands, torch.stack([errors, torch.ones_like(errors)]).to(self.bands.dtype))

    def state_dict(self) -> dict[str, Any]:
        return {"totals": self.totals, "seconds": time.perf_counter() - self.start_time}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["totals"].shape == self.totals.shape:  # of as many bands
            self.totals.copy_(state["totals"])
            self.start_time = time.perf_counter() - state["seconds"]

    def means(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> tuple[dict[str, float], float, float]:
        """Both losses, over all that `reduce` adds up of the processes, by band of t too; tokens; images."""
        totals = reduce(self.totals.clone())
        nll, labels, tokens, images = totals[: len(self.NAMES)].tolist()
        errors, counts = totals[len(self.NAMES) :].view(2, -1)
        means = {}
        if labels:
            means["lm_loss"] = nll / labels
        if counts.sum():
            means["diffusion_loss"] = float(errors.sum() / counts.sum())
        edges = [round(i * self.num_timesteps / len(counts)) for i in range(len(counts) + 1)]
        for i, (error, count) in enumerate(zip(errors.tolist(), counts.tolist(), strict=True)):
            if count:
                means[f"diffusion_loss/t_{edges[i]}_{edges[i + 1]}"] = error / count
        return means, tokens, images


def _flops_per_token(model: torch.nn.Module) -> int:
    """
    6·N over the transformer and its image parts, without the VAE; 4·N where frozen, which has no gradient. Of untied
    weights a token meets the text's or the image's: they count half each.
    """
    halves = {id(one) for _, *both in image_parameters(model) for one in both}
    return sum(
        # Under DeepSpeed ZeRO-3 a parameter is empty until it is gathered.
        (6 if parameter.requires_grad else 4)
        * getattr(parameter, "ds_numel", parameter.numel())
        // (2 if id(parameter) in halves else 1)
        for name, parameter in model.named_parameters()
        if not {"vae", "original_module"} & set(name.split("."))  # PEFT keeps the modules that it replaces
    )


class TransfusionTrainer(WholeCheckpointsTrainer):
    r"""
    The `Trainer` with both losses exact (Eq. 4, arXiv 2408.11039): `lm_loss` is the mean over all labels and
    `diffusion_loss` the mean over all noised images of the whole batch, however it is cut into micro-batches and
    processes. Beside `loss` it logs, in training and evaluation, `lm_loss`, `diffusion_loss`, and the latter by band
    of t (`diffusion_loss/t_0_250` …); and of the training `tokens_per_second`, `images_per_second` and, as 6·N·D
    counts it, 4·N·D what is frozen, `model_tflops_per_second` of all processes.

    A checkpoint is written aside, in `incomplete/`, and then renamed: one that bears its name is whole, and a run that
    was killed at any moment goes on with `resume_from_checkpoint=True`. The collator's draws follow from seed,
    process, pass and batch number: a resumed run repeats them, and every evaluation draws the same.

    Args:
        args, kwargs: As for `Trainer`, with `remove_unused_columns=False`.
        num_timestep_bands (`int`, defaults to 4): Bands of t.
        peak_flops_per_second (`float`, *optional*):
            Of one device in the precision of the training, as 989e12 of an H100 in bfloat16: logs the model FLOP
            utilisation `mfu`.

    Raises:
        ValueError: `average_tokens_across_devices=False` with several processes, `label_smoothing_factor`; several
            GPUs of one process or `dispatch_batches`, which would part images from their texts; `use_liger_kernel`
            with a split LM head; `model_init` with Liger or FSDP2; FSDP with state dicts in shards; a checkpoint of
            another model or adapter to resume from; in training, a gradient, a loss or images that are not finite (the
            batch of the latter two is then in the output folder), and a pass too short for a step.
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
        if self.args.n_gpu > 1:
            raise ValueError(
                f"One process has {self.args.n_gpu} GPUs, and `nn.DataParallel` would cut batches along their first "
                "dimension, which parts images from their texts; start one process for each by `torchrun` or "
                "`accelerate launch`, or show one GPU by CUDA_VISIBLE_DEVICES=0."
            )
        if self.args.label_smoothing_factor:
            raise ValueError("`label_smoothing_factor` takes the labels away from the model; leave it at 0.")
        if self.model_init is not None and (self.args.use_liger_kernel or self.accelerator.is_fsdp2):
            raise ValueError("`model_init` makes models that know nothing of Liger or FSDP2; pass `model`.")
        if self.args.use_liger_kernel:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled or self.get_tp_size() > 1:
                raise ValueError("`use_liger_kernel` reads the LM head whole, and FSDP, DeepSpeed or TP split it.")
            for module in self.model.modules():
                if isinstance(module, TransfusionForCausalLMAndDiffusion):
                    module.use_liger_loss = True
        if self.accelerator.is_fsdp2:
            _prepare_fsdp2(self.accelerator, self.model)
        self.add_callback(TransfusionNoiseCallback(self._num_replicas))
        self.num_timestep_bands = num_timestep_bands
        self.peak_flops_per_second = peak_flops_per_second
        self._train_sums, self._eval_sums = self._new_sums(), self._new_sums()
        self._num_images: Any = None

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.accelerator.dataloader_config.dispatch_batches:
            raise ValueError(
                "`dispatch_batches=True` cuts batches along their first dimension, which parts images from their "
                "texts; leave it out of `accelerator_config`."
            )
        self.accelerator.dataloader_config.dispatch_batches = False  # what accelerate would choose for streams

    def _new_sums(self) -> _Sums:
        config = self._unwrapped().config
        pad_token_id = config.text_config.pad_token_id
        return _Sums(self.num_timestep_bands, config.num_train_timesteps, pad_token_id, self.args.device)

    def _inner_training_loop(self, *args: Any, **kwargs: Any):
        self._train_sums = self._new_sums()  # speeds count from now on
        return super()._inner_training_loop(*args, **kwargs)

    def _since_last_log(self) -> dict[str, Any]:
        return super()._since_last_log() | self._train_sums.state_dict()

    def _load_since_last_log(self, state: dict[str, Any]) -> None:
        super()._load_since_last_log(state)
        self._train_sums.load_state_dict(state)

    def _get_num_items_in_batch(self, batch_samples, device):
        num_images = torch.tensor(sum(_count_noised(batch) for batch in batch_samples), device=device)
        if self.args.world_size > 1:
            num_images = self.accelerator.gather(num_images).sum()
        self._num_images = (num_images / self._num_replicas).clamp(min=1)
        return super()._get_num_items_in_batch(batch_samples, device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {**inputs, "num_images_in_batch": self._num_images}
        try:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        except ValueError as error:
            if model.training and "hold NaN or infinite" in str(error):
                raise ValueError(f"{error} The batch is saved in {self._save_not_finite(inputs)}.") from error
            raise
        if model.training and not torch.isfinite(loss):
            file = self._save_not_finite(inputs)
            lm_loss, diffusion_loss = outputs["lm_loss"].item(), outputs["diffusion_loss"].item()
            raise ValueError(
                f"The loss is {loss.item()} after step {self.state.global_step} (`lm_loss` {lm_loss}, "
                f"`diffusion_loss` {diffusion_loss}). The batch is saved in {file}; look at it, lower the learning "
                "rate, and go on from the last checkpoint."
            )
        num_items = 0 if num_items_in_batch is None else num_items_in_batch
        sums = self._train_sums if model.training else self._eval_sums
        sums.add(inputs, outputs, num_items)
        return (loss, outputs) if return_outputs else loss

    def _save_not_finite(self, inputs: dict[str, Any]) -> Path:
        file = Path(self.args.output_dir, f"not-finite-{self.state.global_step}-{self.args.process_index}.pt")
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(inputs, file)
        return file

    def _means(self, sums: _Sums) -> tuple[dict[str, float], float, float]:
        return sums.means(lambda totals: self.accelerator.reduce(totals, "sum") / self._num_replicas)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            means, tokens, images = self._means(self._train_sums)
            seconds = time.perf_counter() - self._train_sums.start_time
            flops_per_second = _flops_per_token(self._unwrapped()) * tokens / seconds
            logs = {
                **logs,
                **means,
                "tokens_per_second": tokens / seconds,
                "images_per_second": images / seconds,
                "model_tflops_per_second": flops_per_second / 1e12,
            }
            if self.peak_flops_per_second is not None:
                logs["mfu"] = flops_per_second / (self.peak_flops_per_second * self.args.world_size)
            self._train_sums = self._new_sums()
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any):
        self._eval_sums, start = self._new_sums(), time.perf_counter()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means, _, _ = self._means(self._eval_sums)
        # The library's is a mean over batches, whatever they hold.
        weight = self._unwrapped().config.diffusion_loss_weight
        means["loss"] = means.get("lm_loss", 0.0) + weight * means.get("diffusion_loss", 0.0)
        output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in means.items()})
        self._train_sums.start_time += time.perf_counter() - start  # what an evaluation takes is no time of training
        return output


def _images_of(batch: dict[str, Any]) -> list[torch.Tensor]:
    images = batch.get("pixel_values")
    images = batch.get("latents") if images is None else images
    return [] if images is None else [images] if isinstance(images, torch.Tensor) else list(images)


def _count_noised(batch: dict[str, Any]) -> int:
    mask = batch.get("image_loss_mask")
    if mask is not None:
        return int(torch.as_tensor(mask).sum())
    return sum(len(stack) if stack.ndim == 4 else 1 for stack in _images_of(batch))


__all__ = ["TransfusionTrainer", "shard_float32_parts"]
