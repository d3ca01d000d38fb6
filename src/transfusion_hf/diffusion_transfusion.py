"""
The mathematics of Transfusion as free functions: diffusion over diffusers' schedulers (Eq. 2-3, arXiv 2408.11039), and
the LM loss (Eq. 1).

Legend: `x_0` a clean latent, `eps` the noise ε, `x_t` = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε. Time runs from t = 0, almost clean, to
t = T − 1, almost pure noise; a clean image is conditioned on as t = 0. Everything here is float32.

A model may predict ε, as in the paper, v, x_0 or the flow. With flow matching (arXiv 2210.02747) there is no ᾱ:
x_t = (1 − t/T)·x_0 + (t/T)·ε for t from 1 to T, and the target is ε − x_0.

Images come in stacks of shape `(num_images, channels, height, width)`, one size each; what each image has once, such
as t, has shape `(num_images,)` over all stacks.
"""

import copy
import inspect
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedConfig

from .configuration_transfusion import TransfusionConfig

Stacks = Sequence[torch.Tensor]
_PIECE = 2**24  # logits that are worked on at a time
_SNR_LIMIT, _LEAST_NOISE = 5.0, 0.05  # those of the papers


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler is of a flow-matching model, which has no ᾱ."""
    return scheduler.config.get("use_flow_sigmas", False) or type(scheduler).__name__.startswith("FlowMatch")


def make_noise_scheduler(config: TransfusionConfig) -> SchedulerMixin:
    """
    The schedule of the training: a `DDPMScheduler`, or for flow matching a `FlowMatchEulerDiscreteScheduler`.
    Clipping x_0 to [−1, 1] while sampling is right for pixels only. Timesteps are spaced `"leading"`, which leaves out
    t = T − 1: the cosine schedule has √ᾱ ≈ 5e-5 there, and would magnify an error of ε 20,000 times.
    """
    if config.prediction_type == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=config.num_train_timesteps)
    return DDPMScheduler(
        num_train_timesteps=config.num_train_timesteps, beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type, clip_sample=config.vae_config is None, timestep_spacing="leading",
    )  # fmt: skip


def make_sampling_scheduler(
    noise_scheduler, scheduler, num_inference_steps: int, device, timesteps=None, sigmas=None
) -> SchedulerMixin:
    """
    A scheduler ready to sample in 1 to T steps, whose state is shared with nobody.

    Args:
        scheduler (`SchedulerMixin` or `str`, *optional*):
            A diffusers scheduler, or the name of its class. By name it is made from the training's schedule, to go
            from 0.98·T or above to 0 in any number of steps, and to clip x_0 if the training's does and it can.
            Default: the DDPM sampler of the paper; for flow matching Euler's.
        timesteps (`Sequence[float]`, *optional*), sigmas (`Sequence[float]`, *optional*):
            The steps to take, in place of `num_inference_steps`, if the scheduler's `set_timesteps` has that argument.

    Raises:
        ValueError: an unknown name, a schedule or prediction type other than the model's, steps out of range or that
            the scheduler does not take or, with a scheduler such as DDIM's by name, so many that it cannot go from
            noise to 0 in them.
    """
    num_train_timesteps = noise_scheduler.config.num_train_timesteps
    given = _given_steps(noise_scheduler, timesteps, sigmas)
    if not given and (not isinstance(num_inference_steps, int) or not 1 <= num_inference_steps <= num_train_timesteps):
        raise ValueError(f"`num_inference_steps` must be 1 to {num_train_timesteps}; got {num_inference_steps}.")
    is_named = scheduler is None or isinstance(scheduler, str)
    sampler: Any = _scheduler_of_name(noise_scheduler, scheduler) if is_named else scheduler
    _check_same_schedule(sampler, noise_scheduler)
    for name in given.keys() - inspect.signature(sampler.set_timesteps).parameters.keys():
        problem = f"`{name}` is not an argument of `{type(sampler).__name__}.set_timesteps`"
        raise ValueError(f"{problem}; pass `num_inference_steps` or another `scheduler`.")
    if is_named and not given and not is_flow(noise_scheduler):
        sampler = _from_noise_to_0(sampler, noise_scheduler.betas, num_inference_steps)
    sampler = copy.deepcopy(sampler)
    sampler.set_timesteps(**(given or {"num_inference_steps": num_inference_steps}), device=device)
    return sampler


def _given_steps(noise_scheduler: SchedulerMixin, timesteps: Any, sigmas: Any) -> dict[str, Any]:
    """`timesteps` or `sigmas`, whichever was given, as diffusers takes it."""
    if timesteps is not None and sigmas is not None:
        raise ValueError("`timesteps` and `sigmas` both say which steps to take; pass one of them.")
    last, given = noise_scheduler.config.num_train_timesteps - 1 + int(is_flow(noise_scheduler)), {}
    for name, values, highest in (("timesteps", timesteps, last), ("sigmas", sigmas, float("inf"))):
        if values is not None:
            steps = torch.as_tensor(values)
            is_falling = steps.ndim == 1 and len(steps) > 0 and (steps.diff() < 0).all()
            if not is_falling or not 0 <= steps[-1] <= steps[0] <= highest:
                raise ValueError(f"`{name}` must hold the steps to take, from {highest} down to 0; got {values}.")
            given[name] = steps.tolist()
    return given


def _scheduler_of_name(noise_scheduler: SchedulerMixin, name: Any) -> Any:
    own, name = noise_scheduler.config, name or type(noise_scheduler).__name__
    scheduler_class: Any = getattr(diffusers, name, None)
    if SchedulerMixin not in getattr(scheduler_class, "__mro__", ()):
        raise ValueError(f"`scheduler` must name a scheduler of diffusers, such as 'DDIMScheduler'; got {name!r}.")
    accepted = inspect.signature(scheduler_class).parameters
    changes: dict[str, Any] = {}
    if is_flow(noise_scheduler):
        if "use_flow_sigmas" in accepted:
            changes = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    elif own.clip_sample and "clip_sample" not in accepted and "thresholding" in accepted:
        changes = {"thresholding": True}  # with its default `sample_max_value` of 1 it clips to [−1, 1]
    return scheduler_class.from_config(own, **changes)


def _check_same_schedule(sampler: Any, noise_scheduler: SchedulerMixin) -> None:
    if not isinstance(sampler, SchedulerMixin):
        raise ValueError(f"`scheduler` must be a diffusers scheduler, its class name or `None`; got {sampler!r}.")
    remedy = "make it with `type(scheduler).from_config(model.noise_scheduler.config)` or pass its class name"
    pair = (sampler, noise_scheduler)
    # The config of diffusers' own flow matching names no type; that of multistep samplers does.
    names = ["flow_prediction" if type(s).__name__.startswith("FlowMatch") else None for s in pair]
    sampled, wanted = (name or s.config.get("prediction_type") for name, s in zip(names, pair, strict=True))
    if sampled != wanted:
        raise ValueError(f"`scheduler` has prediction type {sampled!r}, the model predicts {wanted!r}; {remedy}.")
    kinds = [(is_flow(s), s.config.get("num_train_timesteps")) for s in pair]
    bars = [torch.empty(0) if is_flow(s) else getattr(s, "alphas_cumprod", torch.empty(0)).cpu() for s in pair]
    if kinds[0] != kinds[1] or bars[0].shape != bars[1].shape or not torch.allclose(*bars, atol=1e-6):
        raise ValueError(f"`scheduler` has another noise schedule than the model; {remedy}.")


def _from_noise_to_0(sampler: Any, betas: torch.Tensor, num_steps: int) -> Any:
    """The sampler with steps that begin at 0.98·T or above and end at 0."""
    num_train_timesteps = len(betas)
    first = int(0.98 * num_train_timesteps)
    # DDIM and its kin go from t to t − T // steps, on no other grid than "leading".
    has_any_grid = hasattr(sampler, "sigmas") or hasattr(sampler, "previous_timestep")
    sampler.set_timesteps(num_steps)
    # How far to move "leading" steps up, to begin at noise, unless they would then end too early.
    missing = max(0, first - int(sampler.timesteps[0]))
    if missing <= num_train_timesteps // num_steps * (2 if has_any_grid else 1):
        return type(sampler).from_config(sampler.config, **({"steps_offset": missing} if missing else {}))
    if has_any_grid and num_steps <= first:
        # Evenly over the model's schedule without its end.
        kept = {"num_train_timesteps": first + 1, "trained_betas": betas[: first + 1].tolist()}
        return type(sampler).from_config(sampler.config, **kept, timestep_spacing="linspace")
    raise ValueError(
        f"`num_inference_steps={num_steps}` cannot be divided evenly from noise to 0 by {type(sampler).__name__}; "
        f"pass a smaller divisor of {num_train_timesteps}."
    )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(seed))


def content_seeds(stacks: Stacks) -> list[int]:
    """A seed for each image from its own values: evaluation sees the same t and ε however the data are batched."""
    return [zlib.crc32(image.cpu().contiguous().numpy().tobytes()) for stack in stacks for image in stack.float()]


def sample_timesteps(
    max_timesteps: torch.LongTensor,
    seeds: Sequence[int] | None = None,
    distribution: str = "uniform",
    shift: float = 1.0,
) -> torch.LongTensor:
    """
    Draws each image's t below its `max_timesteps` (§4.3.4), from its seed or torch's global generator. `distribution`
    and `shift` are those of [`TransfusionConfig`], of t as a share of the limit.
    """
    draw = torch.rand if distribution == "uniform" else torch.randn
    if seeds is None:
        drawn = draw(max_timesteps.shape, device=max_timesteps.device)
    else:
        drawn = torch.stack([draw((), generator=_generator(seed)) for seed in seeds]).to(max_timesteps.device)
    share = drawn if distribution == "uniform" else drawn.sigmoid()
    share = share if shift == 1 else shift_timesteps(share, shift)
    return (share * max_timesteps).long().minimum(max_timesteps - 1)


def check_per_image(num_images: int, **given: Any) -> None:
    """Raises `ValueError` unless each of the arguments that were given holds one value for each image."""
    for name, value in given.items():
        if value is not None and len(value) != num_images:
            raise ValueError(f"`{name}` must hold one value for each of {num_images} images; got {len(value)}.")


def check_timesteps(timesteps: torch.Tensor, num_images: int, last: int) -> None:
    """Raises `ValueError` unless there is one t from 0 to `last` for each image."""
    if timesteps.shape != (num_images,) or not ((timesteps >= 0) & (timesteps <= last)).all():
        got = timesteps.tolist()
        raise ValueError(f"`timesteps` must hold one t from 0 to {last} for each of {num_images} images; got {got}.")


def sample_noise(stacks: Stacks, seeds: Sequence[int] | None = None) -> list[torch.Tensor]:
    """Draws ε ~ N(0, 1) in the images' shapes, from a seed for each or by torch's global generator."""
    if seeds is None:
        return [torch.randn_like(stack) for stack in stacks]
    # Drawn on the CPU, so that a seed means the same on every device; the offset keeps ε apart from the draw of t.
    generators = iter([_generator(seed + 1) for seed in seeds])
    return [
        torch.stack([torch.randn(x.shape, generator=next(generators), dtype=x.dtype) for x in stack]).to(stack.device)
        for stack in stacks
    ]


def add_noise(noise_scheduler: SchedulerMixin, x_0: Stacks, eps: Stacks, timesteps: torch.Tensor) -> Stacks:
    """x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε (Eq. 2); with flow matching on the straight line from x_0 to ε."""
    if is_flow(noise_scheduler):
        sigmas = _per_stack(timesteps / noise_scheduler.config.num_train_timesteps, x_0)
        return [x + s.to(x)[:, None, None, None] * (e - x) for x, e, s in zip(x_0, eps, sigmas, strict=True)]
    return [noise_scheduler.add_noise(*part) for part in zip(x_0, eps, _per_stack(timesteps, x_0), strict=True)]


def _per_stack(values: torch.Tensor, stacks: Stacks) -> tuple[torch.Tensor, ...]:
    return values.split([len(stack) for stack in stacks])


def prediction_targets(noise_scheduler: SchedulerMixin, x_0: Stacks, eps: Stacks, timesteps: torch.Tensor) -> Stacks:
    """What to predict: ε (Eq. 3), v = √ᾱ_t·ε − √(1−ᾱ_t)·x_0 (arXiv 2202.00512), x_0, or ε − x_0 (flow matching)."""
    if is_flow(noise_scheduler):
        return [e - x for x, e in zip(x_0, eps, strict=True)]
    prediction_type = noise_scheduler.config.prediction_type
    if prediction_type == "v_prediction":
        parts = zip(x_0, eps, _per_stack(timesteps, x_0), strict=True)
        return [noise_scheduler.get_velocity(*part) for part in parts]
    return x_0 if prediction_type == "sample" else eps


@dataclass
class BatchCounts:
    """
    What the collator counts on the CPU, so that a training step does not wait for the device to do so.

    Args:
        num_targets (`int`): Labels, shifted, that are not −100.
        num_noised_images (`list[int]`): Images in `image_loss_mask`, for each run of images of one size.
    """

    num_targets: int
    num_noised_images: list[int]

    def pairs(self, num_labels: torch.Tensor, image_loss_mask: torch.Tensor | None) -> list[tuple[int, torch.Tensor]]:
        """Each number, and what it must be."""
        noised = [] if image_loss_mask is None else [(sum(self.num_noised_images), image_loss_mask.sum())]
        return [(self.num_targets, num_labels), *noised]

    def check(self, num_labels: torch.Tensor, image_loss_mask: torch.Tensor | None) -> None:
        """Raises `ValueError` unless the batch has these numbers; waits for the device."""
        pairs = self.pairs(num_labels, image_loss_mask)
        if any(int(found) != count for count, found in pairs):
            got = ", ".join(f"{count} where there are {int(found)}" for count, found in pairs)
            problem = f"`batch_counts` is of another batch (labels and noised images: {got})"
            raise ValueError(f"{problem}; take the collator's of this one, or leave it out.")

    def to(self, *args: Any, **kwargs: Any) -> "BatchCounts":
        """Itself, so that it can be moved like all else in a batch."""
        return self


def places_of(mask: torch.BoolTensor, num: int) -> torch.LongTensor:
    """Where a flattened mask is `True`, `num` times: without waiting for the device to count. 0 where it is not."""
    return torch.nonzero_static(mask.flatten(), size=num, fill_value=0)[:, 0]


def count_chosen(stacks: Stacks, mask: torch.BoolTensor) -> list[int]:
    """How many images of each stack a mask `(num_images,)` over all of them chooses (one device synchronisation)."""
    return torch.stack([part.sum() for part in _per_stack(mask, stacks)]).tolist()


def chosen_images(
    stacks: Stacks, mask: torch.BoolTensor | None, counts: Sequence[int] | None = None
) -> list[slice | torch.LongTensor | None]:
    """
    An index into each stack of the images that a mask over all of them chooses, `None` where it chooses none.
    `counts`, from [`count_chosen`], spares a wait for the device.
    """
    if mask is None:
        return [slice(None)] * len(stacks)
    counts = count_chosen(stacks, mask) if counts is None else counts
    is_graph = torch.compiler.is_compiling()  # where a graph for "all" would be one more
    parts = zip(_per_stack(mask, stacks), counts, strict=True)
    return [
        (slice(None) if not is_graph and n == len(part) else places_of(part, n)) if n else None for part, n in parts
    ]


def noise_images(
    noise_scheduler: SchedulerMixin,
    x_0: Stacks,
    timesteps=None,
    max_timesteps=None,
    image_loss_mask=None,
    seeds=None,
    distribution: str = "uniform",
    shift: float = 1.0,
    num_noised_images: Sequence[int] | None = None,
    check_inputs: bool = True,
) -> tuple[Stacks, torch.LongTensor, torch.BoolTensor | None, Sequence[int] | None, Stacks]:
    """
    The forward diffusion of a training step: draws t and ε, and noises the images in `image_loss_mask`. The arguments
    are those of `TransfusionForCausalLMAndDiffusion.forward`.

    Returns:
        x_t, in stacks, clean where not noised; t of each image, 0 for clean ones; the images to predict (`None`: all;
        the first if none is noised, so that each image part is used) and their numbers in the stacks; the targets of
        the noised ones, in stacks.
    """
    num_images, device = sum(len(stack) for stack in x_0), x_0[0].device
    num_train_timesteps, first = noise_scheduler.config.num_train_timesteps, int(is_flow(noise_scheduler))
    check_per_image(num_images, max_timesteps=max_timesteps, image_loss_mask=image_loss_mask, noise_seeds=seeds)
    if max_timesteps is None:
        max_timesteps = torch.full((num_images,), num_train_timesteps, device=device)
    elif not check_inputs:
        max_timesteps = max_timesteps.clamp(1, num_train_timesteps)
    elif not ((max_timesteps >= 1) & (max_timesteps <= num_train_timesteps)).all():
        raise ValueError(f"`max_timesteps` must lie in 1 to {num_train_timesteps}; got {max_timesteps.tolist()}.")
    if timesteps is None:
        timesteps = sample_timesteps(max_timesteps, seeds, distribution, shift) + first
    elif check_inputs:
        check_timesteps(timesteps, num_images, num_train_timesteps - 1 + first)
    timesteps, eps, mask, counts = timesteps.to(device), sample_noise(x_0, seeds), None, num_noised_images
    if image_loss_mask is not None and (counts is None or torch.compiler.is_compiling() or sum(counts) != num_images):
        mask = image_loss_mask.to(device=device, dtype=torch.bool)
        counts = count_chosen(x_0, mask) if counts is None else counts
        timesteps = torch.where(mask, timesteps, 0)
    x_t = add_noise(noise_scheduler, x_0, eps, timesteps)
    targets = prediction_targets(noise_scheduler, x_0, eps, timesteps)
    if mask is not None:
        keep = [part[:, None, None, None] for part in _per_stack(mask, x_0)]
        x_t = [torch.where(k, noised, clean) for k, noised, clean in zip(keep, x_t, x_0, strict=True)]
        chosen = zip(targets, chosen_images(x_0, mask, counts), strict=True)
        targets = [target[index] for target, index in chosen if index is not None]
        if not targets:
            mask = torch.arange(num_images, device=device) == 0
            counts = [1] + [0] * (len(x_0) - 1)
    return x_t, timesteps, mask, counts, targets


def must_clip_x_0(scheduler: SchedulerMixin, noise_scheduler: SchedulerMixin) -> bool:
    """Whether the training's schedule clips x_0 and the class of a sampling scheduler, such as Euler's, cannot."""
    accepted = inspect.signature(type(scheduler)).parameters
    return noise_scheduler.config.get("clip_sample", False) and not {"clip_sample", "thresholding"} & accepted.keys()


def clip_x_0(noise_scheduler, x_t: torch.Tensor, prediction: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """
    The prediction whose x_0 is clipped to [−1, 1]. `t` of shape `()` may lie between two of the training, where log σ,
    σ = √((1−ᾱ)/ᾱ), is linear as in diffusers.
    """
    prediction_type, alpha_bars = noise_scheduler.config.prediction_type, noise_scheduler.alphas_cumprod
    low, high = int(t), min(int(t) + 1, len(alpha_bars) - 1)
    log_sigmas = ((1 - alpha_bars) / alpha_bars).log() / 2
    sigma = torch.lerp(log_sigmas[low], log_sigmas[high], float(t) - low).exp()
    a = (1 + sigma**2).rsqrt()  # √ᾱ
    b = sigma * a  # √(1−ᾱ)
    # x_0 = (p·x_t − q·prediction) / r
    p, q, r = {"epsilon": (1.0, b, a), "v_prediction": (a, b, 1.0), "sample": (0.0, -1.0, 1.0)}[prediction_type]
    x_0 = (p * x_t - q * prediction) / r
    clipped = x_0.clamp(-1, 1)
    return torch.where(clipped == x_0, prediction, (p * x_t - r * clipped) / q)


def image_losses(predictions: Stacks, targets: Stacks) -> torch.Tensor:
    """The mean squared error of each image (Eq. 3)."""
    return torch.cat([(p - t).square().flatten(1).mean(1) for p, t in zip(predictions, targets, strict=True)])


def image_loss_weights(noise_scheduler: SchedulerMixin, timesteps: torch.LongTensor, weighting: str) -> torch.Tensor:
    """
    A factor for the loss of each image with t > 0. For errors of x_0 it is min(SNR, 5) with `"min_snr"` (SNR =
    ᾱ/(1−ᾱ), arXiv 2303.09556), and 1/(1−ᾱ), that of v, with `"v_prediction"`, where √(1−ᾱ) counts as 0.05 or more
    (arXiv 2511.13720). What a model predicts has errors that are a multiple of those of x_0.
    """
    if is_flow(noise_scheduler):
        sigmas = timesteps / noise_scheduler.config.num_train_timesteps
        signal, noise, prediction_type = (1 - sigmas) ** 2, sigmas**2, "flow_prediction"
    else:
        signal = noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        noise, prediction_type = 1 - signal, noise_scheduler.config.prediction_type
    if weighting == "v_prediction":
        return 1 / noise.clamp(min=_LEAST_NOISE**2)
    squared_error_of_x_0 = {"epsilon": noise / signal, "sample": torch.ones_like(noise)}.get(prediction_type, noise)
    return (signal / noise).clamp(max=_SNR_LIMIT) * squared_error_of_x_0


def mean_image_loss(losses, num_labels, num_items_in_batch=None, num_images_in_batch=None) -> torch.Tensor:
    """
    L_DDPM as the mean over the losses of images `(num_noised_images,)`, or this micro-batch's part of that of a batch:
    exactly, by the noised images in the batch, or by the share of `num_labels` in the `num_items_in_batch` labels.
    """
    if num_images_in_batch is not None:
        return losses.sum() / num_images_in_batch
    if num_items_in_batch is None:
        return losses.mean()
    num_items = torch.as_tensor(num_items_in_batch)
    if num_items.device.type == "cpu" and not num_items:  # elsewhere 0 / 0 is NaN, and nobody waits to see it
        raise ValueError(
            "`num_items_in_batch` is 0: the Trainer counts labels, and a batch of images without any cannot be "
            "weighted. Give each row a text token, such as an end of sequence."
        )
    return losses.mean() * (num_labels / num_items.to(losses.device))


def _logit_options(text_config: PreTrainedConfig) -> list[float | None]:
    return [getattr(text_config, name, None) for name in ("logit_scale", "logits_scaling", "final_logit_softcapping")]


def scale_logits(logits: torch.Tensor, text_config: PreTrainedConfig) -> torch.Tensor:
    """What Cohere, Granite and Gemma do to their logits after the head."""
    scale, divisor, cap = _logit_options(text_config)
    logits = logits if scale is None else logits * scale
    logits = logits if divisor is None else logits / divisor
    return logits if cap is None else torch.tanh(logits / cap) * cap


class _CrossEntropyInPlace(torch.autograd.Function):
    """The sum of the cross entropies. The logits become their own gradient: nothing else of their size is kept."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        total = logits.new_zeros(())
        num_rows = max(1, _PIECE // logits.shape[1])
        for rows, ids in zip(logits.split(num_rows), targets[:, None].split(num_rows), strict=True):
            rows.sub_(rows.logsumexp(1, keepdim=True))
            total -= rows.gather(1, ids).sum()
            rows.exp_().scatter_add_(1, ids, rows.new_full(ids.shape, -1.0))
        ctx.gradient = logits
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.gradient is None:
            raise RuntimeError("The LM loss goes backward once. Pass `skip_logits=False` to `forward` for more.")
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(grad_output), None


def sum_cross_entropy_(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """
    The sum of −log softmax(logits)[target] (L_LM, Eq. 1), in at least float32, of logits `(num_labels, vocab)`. In
    place: float32 and float64 logits hold nothing useful afterwards. The backward pass runs once and needs no memory
    beyond theirs; `F.cross_entropy` takes three times as much.
    """
    if torch.compiler.is_compiling():  # a graph cannot hold a function that keeps what it overwrote, and fuses this
        return nn.functional.cross_entropy(at_least_float32(logits), targets, reduction="sum")
    return _CrossEntropyInPlace.apply(at_least_float32(logits), targets)


def sum_cross_entropy_by_liger(hidden_states, head: nn.Linear, targets, text_config) -> torch.Tensor:
    """Fused LM head and cross-entropy (Liger): [`sum_cross_entropy_`] of the head's logits, of which it keeps none."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        raise ImportError("`use_liger_loss` needs Liger; `pip install liger-kernel`.") from error
    scale, divisor, cap = _logit_options(text_config)
    if (factor := (scale or 1.0) / (divisor or 1.0)) != 1.0:  # no such family has a head with bias
        hidden_states = hidden_states * factor
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", softcap=cap)
    return loss(head.weight, hidden_states, targets, head.bias)


def guide(conditional: torch.Tensor, unconditional: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance: the unconditional prediction moved `guidance_scale` times towards the conditional."""
    return unconditional + guidance_scale * (conditional - unconditional)


def limit_norm(
    guided: torch.Tensor, conditional: torch.Tensor, minimum: float, patch_size: int | None
) -> torch.Tensor:
    """
    The guided prediction, `(images, channels, height, width)`, shrunk to the norm of the conditional one where it is
    longer, but to no less than `minimum` of itself; image by image, or with `patch_size` patch by patch.
    """
    squares = [x.square().sum(dim=1, keepdim=True) for x in (conditional, guided)]
    if patch_size is None:
        squares = [x.sum(dim=(2, 3), keepdim=True) for x in squares]
    else:
        squares = [nn.functional.avg_pool2d(x, patch_size) for x in squares]
    ratio = (squares[0] / squares[1].clamp(min=torch.finfo(guided.dtype).tiny)).sqrt().clamp(minimum, 1.0)
    return guided * (
        ratio if patch_size is None else ratio.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
    )


def shift_timesteps(timesteps: torch.Tensor, shift: float) -> torch.Tensor:
    """t in 0 to 1, moved towards noise by `shift` above 1: s·t / (1 + (s − 1)·t) (arXiv 2403.03206, Eq. 23)."""
    return shift * timesteps / (1 + (shift - 1) * timesteps)


def at_timestep(scheduler: SchedulerMixin, x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A known x_0 as a sampling scheduler keeps it at its timestep `t` of shape `()`."""
    timesteps = t.expand(len(x_0))
    if hasattr(scheduler, "add_noise"):
        return scheduler.add_noise(x_0, eps, timesteps)
    return scheduler.scale_noise(x_0, timesteps, eps)


def sampling_step_kwargs(scheduler: SchedulerMixin, generator: Any) -> dict[str, Any]:
    """
    What to pass to `scheduler.step` beside ε, t and x_t, as far as it takes it. Where x_0 is clipped, ε must follow
    from the clipped x_0: DDIM otherwise moves along an ε that contradicts it, and with guidance ends in noise.
    """
    kwargs = {"generator": generator, "use_clipped_model_output": True}
    return {name: kwargs[name] for name in inspect.signature(scheduler.step).parameters if name in kwargs}
