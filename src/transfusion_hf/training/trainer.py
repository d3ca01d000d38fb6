"""The exact `Trainer`: both losses over the global batch, logged separately."""

import math
import os
import time
import warnings
from dataclasses import is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from ..configuration_transfusion import TransfusionConfig
from ..modality_transfusion import image_parameters, is_of_images
from ..modeling_transfusion import TransfusionForCausalLMAndDiffusion
from ..patching_transfusion import TransfusionTimestepEmbedding
from .checkpoints import NotFiniteError, WholeCheckpointsTrainer


def shard_float32_parts(model: torch.nn.Module, mesh: DeviceMesh | None = None) -> set[torch.nn.Parameter]:
    """
    Prepares a model for `fully_shard` in lower precision, as [`TransfusionTrainer`] does itself: shards the timestep
    embedding, which computes in float32, as its own group, because a group has one dtype. `mesh` is as in
    `fully_shard`; all processes if `None`. Returns the VAE's parameters, to pass as `ignored_params`: each process
    keeps the whole VAE, because one without images does not run it.
    """
    for module in [module for module in model.modules() if isinstance(module, TransfusionTimestepEmbedding)]:
        fully_shard(module, mesh=mesh)
    return {parameter for name, parameter in model.named_parameters() if name.startswith("vae.")}


def _prepare_fsdp2(accelerator: Accelerator, model: torch.nn.Module) -> None:
    plugin, mesh = accelerator.state.fsdp_plugin, accelerator.torch_device_mesh
    if (policy := plugin.mixed_precision_policy) is not None:
        # accelerate's own policy rounds the images before they are noised, and the losses.
        plugin.mixed_precision_policy = replace(policy, output_dtype=None, cast_forward_inputs=False)
    if mesh is not None:
        mesh = mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
    shard_float32_parts(accelerator.unwrap_model(model), mesh)
    plugin.ignored_modules = r"(.*\.)?vae"


def _count_images(batch: dict[str, Any], only_noised: bool = False) -> int:
    if only_noised and "batch_counts" in batch:
        return sum(batch["batch_counts"].num_noised_images)
    if only_noised and batch.get("image_loss_mask") is not None:
        return int(torch.as_tensor(batch["image_loss_mask"]).sum())
    images = batch.get("pixel_values", batch.get("latents"))
    return 0 if images is None else sum(len(one) if one.ndim == 4 else 1 for one in images)


class _Sums:
    """Sums since the last log: both losses, the counts they are divided by, and the diffusion loss by band of t."""

    def __init__(self, num_bands: int, config: TransfusionConfig, device: torch.device):
        dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        self.totals = torch.zeros(4 + 2 * num_bands, dtype=dtype, device=device)
        self.num_timesteps, self.pad_token_id = config.num_train_timesteps, config.text_config.pad_token_id
        self.start_time = time.perf_counter()

    def add(self, inputs: dict[str, Any], outputs: Any, num_items: Any) -> None:
        """Adds a micro-batch, whose `lm_loss` is a sum divided by `num_items`."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if mask is None:  # packed
            mask = torch.ones_like(ids) if self.pad_token_id is None else ids != self.pad_token_id
        num_labels = (inputs["labels"][:, 1:] != -100).sum()
        numbers = outputs["lm_loss"].detach() * num_items, num_labels, mask.sum()
        self.totals[:3] += torch.stack([number.to(self.totals) for number in numbers])
        self.totals[3] += _count_images(inputs)
        errors = outputs.get("image_losses")  # absent if there are none
        if errors is not None:
            bands = self.totals[4:].view(2, -1)  # errors, images
            num_bands = bands.shape[1]
            places = (outputs["image_timesteps"] * num_bands / self.num_timesteps).long().clamp(max=num_bands - 1)
            bands.index_add_(1, places, torch.stack([errors, torch.ones_like(errors)]).to(bands.dtype))

    def means(self, totals: torch.Tensor) -> tuple[dict[str, float], float, float]:
        """Both losses, the latter by band of t too, the number of tokens and that of images, from reduced totals."""
        nll, labels, tokens, images = totals[:4].tolist()
        errors, counts = totals[4:].view(2, -1).tolist()
        means = {"lm_loss": nll / labels} if labels else {}
        if any(counts):
            means["diffusion_loss"] = sum(errors) / sum(counts)
        edges = [round(i * self.num_timesteps / len(counts)) for i in range(len(counts) + 1)]
        names = [f"diffusion_loss/t_{low}_{high}" for low, high in pairwise(edges)]
        bands = {n: error / count for n, error, count in zip(names, errors, counts, strict=True) if count}
        return means | bands, tokens, images


def _flops_per_token(model: torch.nn.Module) -> int:
    """6·N without the VAE, 4·N for frozen parameters. A token uses the text's or the image's untied weights: half."""
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
    A `Trainer` with both losses exact (Eq. 4, arXiv 2408.11039): `lm_loss` is the mean over all labels and
    `diffusion_loss` the mean over all noised images of the whole batch, however it is cut into micro-batches and
    processes. In training and evaluation it logs `loss`, `lm_loss`, `diffusion_loss`, and the latter by band of t
    (`diffusion_loss/t_0_250` …). In training it also logs, over all processes, `tokens_per_second`,
    `images_per_second` and `model_tflops_per_second` (6·N·D; 4·N·D for frozen parameters).

    Checkpoints are atomic, and a run killed at any moment continues exactly with `resume_from_checkpoint=True`. Every
    evaluation draws the same.

    Args:
        args, kwargs: As for `Trainer`. `remove_unused_columns` is set to `False`, and `processing_class`, which is
            saved with the model, defaults to the collator's processor.
        num_timestep_bands (`int`, defaults to 4): Number of bands of t.
        peak_flops_per_second (`float`, *optional*): Logs the model FLOP utilisation `mfu`. Peak of one device in the
            precision of the training, such as 989e12 for an H100 in bfloat16.
        image_learning_rate (`float`, *optional*):
            Of patch encoder and decoder and the image weights of `untied_modalities`; all others have
            `args.learning_rate`. The scheduler moves both alike, and a resumed run keeps the rates that it began with.

    Raises:
        ValueError: a model from the folder of an adapter, of which the library would save the adapter alone; settings
            that make the losses inexact, part images from their texts, or shard what must be whole;
            resuming with another model or adapter; in the training, a pass too short for a step.
        NotFiniteError: a `ValueError`: in the training, a gradient, a loss or an image that is not finite. The batch
            of the latter two is saved.
    """

    def __init__(
        self,
        *args: Any,
        num_timestep_bands: int = 4,
        peak_flops_per_second: float | None = None,
        image_learning_rate: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        if getattr(self.model, "_hf_peft_config_loaded", False):
            raise ValueError(
                "The model was loaded from the folder of an adapter, and the library would save the adapter alone. "
                "Load its base model and wrap it: `PeftModel.from_pretrained(base, folder, is_trainable=True)`, or to "
                "train all of it, `PeftModel.from_pretrained(base, folder).merge_and_unload()`."
            )
        trained = {parameter.dtype for parameter in self.model.parameters() if parameter.requires_grad}
        if halved := trained - {torch.float32, torch.float64}:
            warnings.warn(
                f"Weights that are trained are {', '.join(sorted(map(str, halved)))}, which rounds away most updates; "
                "load the model with `dtype=torch.float32`, and pass `bf16=True` to compute in bfloat16.",
                stacklevel=2,
            )
        self.args.remove_unused_columns = False  # the collator reads texts and images, which `forward` does not take
        if self.processing_class is None:  # saved with the model
            self.processing_class = getattr(self.data_collator, "processor", None)
        if self.args.world_size == 1 and (started := os.environ.get("WORLD_SIZE", "1")) != "1":
            raise ValueError(f"{started} processes were started, but each would train alone; pass `use_cpu=True`.")
        if not self.args.average_tokens_across_devices and self.args.world_size > 1:
            raise ValueError("`average_tokens_across_devices=False` weighs processes unequally; leave it on.")
        if self.args.n_gpu > 1:
            raise ValueError(
                f"One process has {self.args.n_gpu} GPUs, and `nn.DataParallel` parts images from their texts; start "
                "one process for each by `torchrun`, or show one GPU by CUDA_VISIBLE_DEVICES=0."
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
        if self.is_fsdp_enabled:
            kind = self.accelerator.state.fsdp_plugin.state_dict_type.name
            if kind != "FULL_STATE_DICT":  # the library then saves no model, without a warning
                raise ValueError(f"`fsdp_state_dict_type` is {kind}, which saves no model; set it to FULL_STATE_DICT.")
        if self.accelerator.is_fsdp2:
            _prepare_fsdp2(self.accelerator, self.model)
        # It looks at each loss on its own, and hides those that are not finite; here they stop the run.
        self.args.logging_nan_inf_filter = False
        self._step: list[tuple[dict[str, Any], list[torch.Tensor]]] = []  # batches and losses since the optimizer's
        self.num_timestep_bands, self.peak_flops_per_second = num_timestep_bands, peak_flops_per_second
        self._train_sums, self._eval_sums = self._new_sums(), self._new_sums()
        self.image_learning_rate = image_learning_rate
        deepspeed = getattr(self.accelerator.state, "deepspeed_plugin", None)
        has_own = self.optimizer is not None or "optimizer" in (deepspeed.deepspeed_config if deepspeed else {})
        if image_learning_rate is not None and has_own:
            raise ValueError(
                "`image_learning_rate` is for the Trainer's own optimizer; you passed `optimizers`, or DeepSpeed's "
                "configuration names one."
            )

    def create_optimizer(self, model=None):
        is_new, optimizer = self.optimizer is None, super().create_optimizer(model)
        if not is_new or self.image_learning_rate is None:
            return optimizer
        named = (self.model if model is None else model).named_parameters()
        of_images = {parameter for name, parameter in named if is_of_images(name)}
        for group in list(optimizer.param_groups):
            parts: list[list[torch.nn.Parameter]] = [[], []]
            for parameter in group["params"]:
                parts[parameter in of_images].append(parameter)
            group["params"], params = parts
            if params:
                optimizer.add_param_group({**group, "params": params, "lr": self.image_learning_rate})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _new_sums(self) -> _Sums:
        return _Sums(self.num_timestep_bands, self._unwrapped().config, self.args.device)

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._train_sums = sums = self._new_sums()
        if self._since_log and self._since_log["totals"].shape == sums.totals.shape:  # else other bands
            sums.totals.copy_(self._since_log["totals"])
            sums.start_time -= self._since_log["seconds"]
        # `Trainer` seeds all ranks alike; each needs its own t and ε, except those that hold the same batch. Not
        # before the training, because the order of the samples must be the same in all.
        if args.world_size > self._num_replicas:
            torch.manual_seed(args.seed + args.process_index // self._num_replicas)

    def _since_last_log(self) -> dict[str, Any]:
        seconds = time.perf_counter() - self._train_sums.start_time
        return {**super()._since_last_log(), "totals": self._train_sums.totals, "seconds": seconds}

    def _count_noised(self, batches: list[dict[str, Any]]) -> torch.Tensor:
        """Number of noised images in the batches of all processes."""
        count = sum(_count_images(batch, only_noised=True) for batch in batches)
        num_images = self.accelerator.gather(torch.full((), count, device=self.args.device)).sum()
        return (num_images / self._num_replicas).clamp(min=1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        num_images = self._num_images if model.training else self._count_noised([inputs])
        inputs = {**inputs, "num_images_in_batch": num_images}
        try:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        except ValueError as error:
            if not model.training or "NaN or infinite" not in str(error):
                raise
            self._stop(inputs, str(error), error)
        if model.training:
            self._step.append((inputs, [outputs[name].detach() for name in ("loss", "lm_loss", "diffusion_loss")]))
        sums = self._train_sums if model.training else self._eval_sums
        sums.add(inputs, outputs, 0 if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _losses_of_step(self) -> list[torch.Tensor]:
        return [losses[0] for _, losses in self._step]

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self._step = []
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._num_images = self._count_noised(batches)
        return batches, num_items

    def _stop_by_losses(self) -> None:
        for inputs, losses in self._step:
            loss, lm_loss, diffusion_loss = torch.stack(losses).tolist()
            if math.isfinite(loss):
                continue
            # What `forward` does not look for on a GPU, where it would wait.
            for name in {"pixel_values", "latents", "vision_pixel_values"} & inputs.keys():
                if not all(image.isfinite().all() for image in inputs[name]):
                    self._stop(inputs, f"`{name}` hold NaN or infinite values; expected finite numbers.")
            if (counts := inputs.get("batch_counts")) is not None:
                counts.check((inputs["labels"][:, 1:] != -100).sum(), inputs.get("image_loss_mask"))
            self._stop(
                inputs,
                f"The loss is {loss} after step {self.state.global_step} (`lm_loss` {lm_loss}, `diffusion_loss` "
                f"{diffusion_loss}), NaN or infinite. Lower the learning rate, and go on from the last checkpoint.",
            )

    def _stop(self, inputs: dict[str, Any], reason: str, error: Exception | None = None) -> NoReturn:
        file = Path(self.args.output_dir, f"_not-finite-{self.state.global_step}-{self.args.process_index}.pt")
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({name: x for name, x in inputs.items() if not is_dataclass(x)}, file)  # what is loaded safely
        raise NotFiniteError(f"{reason} The batch is saved in {file}.") from error

    def _means(self, sums: _Sums) -> tuple[dict[str, float], float, float]:
        return sums.means(self.accelerator.reduce(sums.totals.clone(), "sum") / self._num_replicas)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            means, tokens, images = self._means(self._train_sums)
            seconds = time.perf_counter() - self._train_sums.start_time
            flops_per_second = _flops_per_token(self._unwrapped()) * tokens / seconds
            logs = logs | means | {"tokens_per_second": tokens / seconds, "images_per_second": images / seconds}
            logs["model_tflops_per_second"] = flops_per_second / 1e12
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
        self._train_sums.start_time += time.perf_counter() - start  # the speed is that of the training alone
        return output
