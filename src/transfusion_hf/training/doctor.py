"""
Says in words why a Transfusion model does not learn, or draws noise:

    python -m transfusion_hf.training.doctor MODEL
    python -m transfusion_hf.training.doctor MODEL "data/*.parquet" --caption_column caption
"""

import argparse
import copy
import glob
import math
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from PIL import Image
from transformers import AutoModelForMultimodalLM, AutoProcessor
from transformers.utils import logging

from ..data.collator import TransfusionDataCollator
from ..diffusion_transfusion import make_sampling_scheduler
from ..modeling_transfusion import TransfusionForCausalLMAndDiffusion
from ..patching_transfusion import stack_images

# Published autoencoders by channels: name, scale and shift.
_KNOWN_VAES: dict[int, list[tuple[str, float, float]]] = {
    4: [("Stable Diffusion 1 and 2", 0.18215, 0.0), ("Stable Diffusion XL", 0.13025, 0.0)],
    16: [("Stable Diffusion 3", 1.5305, 0.0609), ("FLUX.1", 0.3611, 0.1159)],
}
_IMAGE_PARTS = ("timestep embedding", "patch encoder", "patch decoder")


@dataclass
class Finding:
    """
    What one check found.

    Args:
        check (`str`): Its name, as `"attention mask"`.
        severity (`str`): `"error"`, `"warning"` or `"ok"`.
        message (`str`): What was seen.
        remedy (`str`, *optional*): What to do.
    """

    check: str
    severity: str
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.severity:8}{self.check:16}{self.message}{self.remedy and f' → {self.remedy}'}"


def diagnose(
    model: Any,
    processor: Any,
    batch: dict[str, Any] | None = None,
    dataset: Iterable[dict[str, Any]] | None = None,
    collator: Any = None,
    loading_info: dict[str, Any] | None = None,
    overfit: bool = True,
    steps: int = 500,
    learning_rate: float | None = None,
    batch_size: int = 4,
) -> list[Finding]:
    r"""
    Checks a model, its processor and its data, mostly by what they do rather than by what their configuration says.
    The model is left as it was: what trains is a copy of it, in float32.

    Args:
        model (`TransfusionForCausalLMAndDiffusion`, or a `PeftModel` around one)
        processor (`TransfusionProcessor`)
        batch (`dict`, *optional*): A training batch, as `model` takes it.
        dataset (iterable of samples, *optional*):
            In place of `batch`; its first `batch_size` samples are collated. Without either, pictures and words are
            made up, and a VAE is then judged roughly.
        collator (`Callable`, *optional*): From samples to a batch; defaults to a `TransfusionDataCollator`.
        loading_info (`dict`, *optional*): What `from_pretrained(..., output_loading_info=True)` gave beside the model.
        overfit (`bool`, defaults to `True`): Whether to train on the batch, the longest of the checks.
        steps (`int`, defaults to 500): At most; it ends as soon as both losses have fallen by 90 %.
        learning_rate (`float`, *optional*): Defaults to 0.8 / hidden size, at most 0.01.
        batch_size (`int`, defaults to 4)

    Returns:
        `list[Finding]`: For each check one `"ok"`, or what is wrong.

    Raises:
        ValueError: `model` is no Transfusion model, both `batch` and `dataset`, `steps` below 1.

    Example:

    ```python
    >>> print(*diagnose(model, processor, dataset=captions), sep="\n")
    ```"""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, TransfusionForCausalLMAndDiffusion):
        raise ValueError(f"`model` must be a TransfusionForCausalLMAndDiffusion; got {type(base).__name__}.")
    if batch is not None and dataset is not None:
        raise ValueError("Pass `batch` or `dataset`, not both.")
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1; got {steps}.")
    is_data, was_training = batch is not None or dataset is not None, base.training
    findings: list[Finding] = []

    def run(check: str, function: Any, *args: Any) -> None:
        try:
            found = function(*args)
        except NotImplementedError as error:  # as the backward pass of FlexAttention on a CPU
            found = [_warning(f"not tried: {error}", "try on another device or with another `attn_implementation`")]
        except (ValueError, RuntimeError, IndexError, KeyError, TypeError) as error:
            found = [_error(f"{type(error).__name__}: {' '.join(str(error).split())}")]
        for finding in found:
            finding.check = check
        findings.extend(found)

    def make_batch() -> list[Finding]:
        nonlocal batch
        limit = base.config.num_train_timesteps
        collate = collator or TransfusionDataCollator(
            processor, caption_dropout=0.0, num_train_timesteps=limit, image_first_max_timesteps=-(-limit // 2)
        )
        if batch is None:
            samples = _made_up_samples(base, processor, batch_size) if dataset is None else dataset
            batch = collate(list(islice(samples, batch_size)))
        batch = send_to_device(dict(batch), base.device)
        return check_batch(base, batch)

    base.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            run("checkpoint", check_loading, loading_info)
            run("special tokens", check_special_tokens, base, processor)
            run("tied head", check_tied_head, base)
            run("attention mask", check_attention_mask, base)
            run("noise schedule", check_noise_schedule, base)
            run("loss weight", check_loss_weight, base)
            run("trainable", check_trainable, base)
            run("batch", make_batch)
            if batch is not None:
                run("pixels", check_pixels, base, processor, batch)
                run("VAE", check_vae, base, batch, is_data)
                run("labels", check_labels, base, batch)
                if overfit:
                    errors = [finding.check for finding in findings if finding.severity == "error"]
                    run("overfit", check_overfit, base, batch, steps, learning_rate, errors)
    finally:
        base.train(was_training)
    return findings


def _ok(message: str) -> list[Finding]:
    return [Finding("", "ok", message)]


def _error(message: str, remedy: str = "") -> Finding:
    return Finding("", "error", message, remedy)


def _warning(message: str, remedy: str = "") -> Finding:
    return Finding("", "warning", message, remedy)


def _made_up_samples(base: Any, processor: Any, count: int) -> list[dict[str, Any]]:
    """Smooth colours at the model's size, or noise where its images are no pictures; words of the tokenizer."""
    rng, config = random.Random(0), base.config
    pieces = (token.lstrip("▁Ġ") for token in sorted(processor.tokenizer.get_vocab()))
    words = [piece for piece in pieces if piece.isascii() and piece.isalpha()] or ["a"]
    height, width = (side * config.vae_scale_factor for side in config.latent_size)
    colors = np.random.default_rng(0)
    samples = []
    for _ in range(count):
        sample: dict[str, Any] = {"text": " ".join(rng.choices(words, k=6))}
        if _takes_pictures(base):
            cells = Image.fromarray(colors.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            sample["image"] = cells.resize((width, height), Image.Resampling.BICUBIC)
        else:
            sample["latents"] = [torch.randn(config.latent_channels, *config.latent_size)]
        samples.append(sample)
    return samples


def _takes_pictures(base: Any) -> bool:
    return (base.config.latent_channels if base.vae is None else base.vae.config.in_channels) in (1, 3)


def check_loading(loading_info: dict[str, Any] | None) -> list[Finding]:
    """Whether the weights in the file are those of the model."""
    if loading_info is None:
        return []
    found = []
    if missing := sorted(loading_info.get("missing_keys") or []):
        message, remedy = f"the file lacks {_some(missing)}, random now", "save the whole model again"
        if "lm_head.weight" in missing:
            message = f"the LM head is lost, tied in the file but not in the configuration: {message}"
            remedy = "set `tie_word_embeddings=True` in `text_config`"
        found.append(_error(message, remedy))
    if unexpected := sorted(loading_info.get("unexpected_keys") or []):
        found.append(_warning(f"the file has weights that the model has no place for: {_some(unexpected)}"))
    return found or _ok("every weight is in its place")


def _some(names: Sequence[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def check_special_tokens(base: Any, processor: Any) -> list[Finding]:
    """<BOI>, placeholder and <EOI> in the tokenizer; one id for each in tokenizer, processor and configurations."""
    config, tokenizer, found = base.config, processor.tokenizer, []
    vocabulary = tokenizer.get_vocab()
    remedy = "`TransfusionProcessor.for_model(model, tokenizer)` makes them fit each other; then save both"
    ids = {}
    for name in ("image_start_token", "image_token", "image_end_token"):
        token, own = getattr(processor, name), vocabulary.get(getattr(processor, name))
        ids[token] = own
        if own is None:
            found.append(_error(f"{token} (`{name}`) is not in the tokenizer", remedy))
            continue
        if (pieces := tokenizer(token, add_special_tokens=False).input_ids) != [own]:
            found.append(_error(f"the tokenizer has {token}, but cuts it into {len(pieces)} pieces", remedy))
        others = {"processor": getattr(processor, f"{name}_id"), "config": getattr(config, f"{name}_id")}
        if wrong := [f"{other} in the {where}" for where, other in others.items() if other != own]:
            found.append(_error(f"the id of {token} is {own} in the tokenizer but {', '.join(wrong)}", remedy))
    for where, other_config in (("generation config", base.generation_config), ("text config", config.text_config)):
        for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
            own, other = getattr(tokenizer, name), getattr(other_config, name, None)
            several = other if isinstance(other, (list, tuple)) else [other]
            if own is not None and other is not None and own not in several:
                judge = _error if name == "eos_token_id" and where == "generation config" else _warning
                found.append(judge(f"`{name}` is {own} in the tokenizer but {other} in the {where}", remedy))
            if clash := [token for token, i in ids.items() if i is not None and i in several]:
                found.append(_error(f"`{name}` of the {where} is the id of {clash[0]}", remedy))
    if ids[processor.image_start_token] in (base.generation_config.suppress_tokens or []):
        found.append(_error("`suppress_tokens` of the generation config holds <BOI>: it never draws", "take it out"))
    largest, num_embeddings = max(vocabulary.values()), base.get_input_embeddings().weight.shape[0]
    if largest >= num_embeddings:
        found.append(_error(f"the tokenizer has ids up to {largest}, the embedding {num_embeddings} rows", remedy))
    for name in ("pixels_per_patch", "patch_size"):
        own, other = getattr(processor, name), getattr(config, name)
        if own != other:
            found.append(_error(f"`{name}` is {own} in the processor but {other} in the config", remedy))
    return found or _ok(", ".join(f"{token} {i}" for token, i in ids.items()))


def check_tied_head(base: Any) -> list[Finding]:
    """Whether LM head and embedding share their weight as the configuration says."""
    head, embedding = base.get_output_embeddings().weight, base.get_input_embeddings().weight
    is_tied, should_be = head.data_ptr() == embedding.data_ptr(), base.config.text_config.tie_word_embeddings
    if base.config.tie_word_embeddings != should_be:
        message = f"`tie_word_embeddings` is {should_be} in `text_config`, {not should_be} outside of it"
        return [_error(f"{message}: on reload the tied head is lost", "set it in `text_config` only")]
    if should_be and not is_tied:
        message = "the tied head is lost: `tie_word_embeddings` is True, but LM head and embedding are two weights"
        remedy = "`model.tie_weights()` to have the embedding's, or False in `text_config` to keep both"
        return [_error(message, remedy)]
    if is_tied and not should_be:
        message = "LM head and embedding are one weight (tied), but `tie_word_embeddings` is False"
        return [_error(f"{message}: on reload the head is lost", "set it to True in `text_config`")]
    return _ok("tied" if is_tied else "not tied")


def _word_ids(config: Any, count: int) -> list[int]:
    images = (config.image_start_token_id, config.image_token_id, config.image_end_token_id)
    return list(islice((i for i in range(3, config.text_config.vocab_size) if i not in images), count))


@torch.no_grad()
def check_attention_mask(base: Any) -> list[Finding]:
    """
    Who sees whom, found by moving the embedding of one position after the other. Nothing is read from masks, which a
    backend may drop; it runs as often as there are positions, so that equal shapes give equal digits.
    """
    config, backend = base.config, base.config.text_config._attn_implementation
    image = [config.image_start_token_id, *[config.image_token_id] * 4, config.image_end_token_id]
    ids = torch.tensor([[*_word_ids(config, 2), *image, *image, *_word_ids(config, 2)]], device=base.device)
    side, length = 2 * config.patch_size, ids.shape[1]
    latents = torch.randn(2, config.latent_channels, side, side).to(base.device)
    position = -1

    def move(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        embeds = kwargs["inputs_embeds"].clone()
        if position >= 0:
            embeds[:, position] += torch.randn(embeds.shape[-1]).to(embeds) * embeds.abs().max()
        return args, {**kwargs, "inputs_embeds": embeds}

    def states() -> torch.Tensor:
        return base.model(input_ids=ids, latents=latents, use_cache=False).last_hidden_state[0].float()

    handle = base.model.language_model.register_forward_pre_hook(move, with_kwargs=True)
    try:
        still = states()
        noise = (states() - still).abs().max()
        sees = torch.zeros(length, length, dtype=torch.bool)
        for position in range(length):
            sees[:, position] = ((states() - still).abs().amax(-1) > noise).cpu()
    finally:
        handle.remove()
    block = torch.tensor([0, 0, 0, *[1] * 4, 0, 0, *[2] * 4, 0, 0, 0])
    in_image = (block[:, None] == block) & (block[:, None] > 0)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    found = []
    remedy = "use `attn_implementation='sdpa'`, 'eager', 'flex_attention' or 'transfusion_varlen'"
    if (sees & ~causal & ~in_image).any():
        message = f"tokens see later ones under `attn_implementation={backend!r}`: the mask is not causal"
        found.append(_error(f"{message} outside of images, so the LM loss is worthless", remedy))
    forward_pairs = sees[in_image & ~causal]
    if config.bidirectional_image_attention and not forward_pairs.all():
        message = f"the mask is causal inside images: `attn_implementation={backend!r}` drops the image blocks, but "
        found.append(_error(f"{message}`bidirectional_image_attention` is True", remedy))
    elif not config.bidirectional_image_attention and forward_pairs.any():
        message = f"`bidirectional_image_attention` is False, but under {backend!r} patches see later ones"
        found.append(_error(message, remedy))
    elif not config.bidirectional_image_attention and config.num_patches(*config.latent_size) > 1:
        message = "the mask is causal inside images, as `bidirectional_image_attention=False` asks (Table 5)"
        found.append(_warning(message, "if it is not meant as the ablation, set it to True"))
    window = getattr(config.text_config, "sliding_window", None) or length
    if window >= length and not sees[causal].all():
        found.append(_error(f"tokens do not see all earlier ones under `attn_implementation={backend!r}`", remedy))
    return found or _ok(f"causal, and both ways inside images ({backend})")


@torch.no_grad()
def check_noise_schedule(base: Any) -> list[Finding]:
    """Which share of a clean image the model is given at which t; and that sampling goes from noise to clean."""
    config, found = base.config, []
    first, last = config.first_timestep, config.num_train_timesteps - 1 + config.first_timestep
    timesteps = torch.linspace(first, last, 5).long()
    image = [config.image_start_token_id, *[config.image_token_id] * 4, config.image_end_token_id]
    ids = torch.tensor([[*_word_ids(config, 1), *image * 5]], device=base.device)
    side, seen = 2 * config.patch_size, []
    x_0 = torch.randn(5, config.latent_channels, side, side).to(base.device)

    def look(module: Any, args: Any) -> None:
        seen.append((torch.cat(list(args[0])).float(), args[1].cpu()))

    handle = base.model.patch_encoder.register_forward_pre_hook(look)
    try:
        for latents in (x_0, -x_0):  # under the same noise, half their difference is what is left of the image
            base(input_ids=ids, latents=latents, timesteps=timesteps, noise_seeds=range(5), labels=ids)
    finally:
        handle.remove()
    (plus, told), (minus, _) = seen
    shares = ((plus - minus) * x_0).sum((1, 2, 3)) / (2 * x_0.square().sum((1, 2, 3)))
    clean, noisy = (round(float(share), 2) + 0.0 for share in (shares[0], shares[-1]))
    what = f"at t = {first} {clean:.2f} of the clean image is left, at t = {last} {noisy:.2f}"
    remedy = "t = 0 is clean here; take `beta_schedule` of a published schedule and `model.reset_noise_scheduler()`"
    if config.num_train_timesteps > 1 and clean < noisy:
        found.append(_error(f"t is reversed, the schedule upside down: {what}", remedy))
    elif config.num_train_timesteps > 1 and (clean < 0.7 or noisy > 0.3 or (shares.diff() > 1e-3).any()):
        found.append(_error(f"the schedule does not go from clean to noise: {what}", remedy))
    if not torch.equal(told.long(), timesteps):
        found.append(_error(f"images are noised to t = {timesteps.tolist()}, but the model is told {told.tolist()}"))
    own = base.generation_config
    steps = min(getattr(own, "num_inference_steps", None) or 250, config.num_train_timesteps)
    try:
        make_sampling_scheduler(base.noise_scheduler, getattr(own, "scheduler", None), steps, base.device)
    except ValueError as error:
        found.append(_error(f"`generate()` cannot draw with this schedule: {error}"))
    return found or _ok(what)


def check_loss_weight(base: Any) -> list[Finding]:
    """λ of Eq. 4."""
    weight = base.config.diffusion_loss_weight
    if not weight:
        remedy = "set `config.diffusion_loss_weight`; the paper's is 5"
        return [_error("λ (`diffusion_loss_weight`) is 0: the model does not learn to draw", remedy)]
    return _ok(f"λ = {weight:g}")


def _groups(base: Any) -> dict[str, dict[str, torch.nn.Parameter]]:
    """The parameters of the parts that a user can name."""
    groups: dict[str, dict[str, torch.nn.Parameter]] = defaultdict(dict)
    parts = {
        ".timestep_embedding.": "timestep embedding",
        "model.patch_encoder.": "patch encoder",
        "model.patch_decoder.": "patch decoder",
        "model.language_model.": "decoder",
        "lm_head.": "LM head",
    }
    for name, parameter in base.named_parameters():
        part = next((part for key, part in parts.items() if key in name), None)
        if part is not None and not name.startswith("vae."):
            groups[part][name] = parameter
    return groups


def check_trainable(base: Any) -> list[Finding]:
    """Whether the image parts learn."""
    groups = _groups(base)
    frozen = [name for name, group in groups.items() if not any(p.requires_grad for p in group.values())]
    if "decoder" in frozen and len(frozen) == len(groups):
        return [_error("every parameter is frozen", "`model.requires_grad_(True)`; of PEFT, `is_trainable=True`")]
    if parts := [name for name in frozen if name in _IMAGE_PARTS]:
        remedy = "unfreeze them, with PEFT by `modules_to_save=['patch_encoder', 'patch_decoder']`"
        return [_error(f"frozen: {', '.join(parts)}; images are not learned", remedy)]
    count = sum(p.numel() for group in groups.values() for p in group.values() if p.requires_grad)
    return _ok(f"{count:,} parameters" + (f"; frozen: {', '.join(frozen)}" if frozen else ""))


@torch.no_grad()
def check_batch(base: Any, batch: dict[str, Any]) -> list[Finding]:
    """Whether the model takes the batch, and there are images in it to learn from."""
    found = []
    if "labels" not in batch:
        return [_error("the batch has no `labels`: nothing is noised and no loss computed", "see `make_labels`")]
    images = batch.get("pixel_values", batch.get("latents"))
    if images is None:
        found.append(_error("the batch has no images", "name their column; `remove_unused_columns=False`"))
    mask, limits = batch.get("image_loss_mask"), batch.get("max_timesteps")
    if mask is not None and not mask.any():
        found.append(_error("`image_loss_mask` is False for every image: none is learned", "mark targets as True"))
    if limits is not None and len(limits) >= 4 and int(limits.max()) < base.config.num_train_timesteps:
        message = f"no image is noised beyond t = {int(limits.max())} of {base.config.num_train_timesteps}"
        found.append(_warning(message, "pass the collator the model's `num_train_timesteps`"))
    outputs = base(**batch)
    if not torch.isfinite(outputs.loss):
        found.append(_error(f"the loss is {float(outputs.loss)}", "look for damaged weights, or train in float32"))
    rows, count = len(batch["input_ids"]), 0 if images is None else len(images)
    return found or _ok(f"{rows} rows, {count} images: lm_loss {outputs.lm_loss:.3g}, {outputs.diffusion_loss:.3g}")


def check_pixels(base: Any, processor: Any, batch: dict[str, Any]) -> list[Finding]:
    """Black is −1 and white is 1, in what the processor makes and in what the batch holds."""
    found, remedy = [], "(x / 255 − 0.5) / 0.5: `rescale_factor` 1/255, `image_mean` and `image_std` of 0.5"
    if _takes_pictures(base):
        width, height = (side * base.config.vae_scale_factor for side in base.config.latent_size[::-1])
        for color, value in (("black", -1.0), ("white", 1.0)):
            pixels = processor.image_processor([Image.new("RGB", (width, height), color)])["pixel_values"][0].float()
            if (pixels - value).abs().max() > 0.02:
                message = f"the processor makes {color} {float(pixels.mean()):.4g}, the model expects {value:g}"
                found.append(_error(message, remedy))
    if (images := batch.get("pixel_values")) is None:
        return found or _ok("black is −1, white is 1" if _takes_pictures(base) else "images are latents")
    low, high = min(float(i.min()) for i in images), max(float(i.max()) for i in images)
    seen = f"pixels of the batch lie in {low:.4g} to {high:.4g}, expected −1 to 1"
    if low < -1.02 or high > 1.02:
        guess = ": 0…255, not rescaled" if low >= 0 and high > 2 else ": another mean and deviation than 0.5"
        found.append(_error(seen + guess, remedy))
    elif -0.02 <= low < 0.25:
        found.append(_error(f"{seen}: they look like [0, 1], not normalised", remedy))
    return found or _ok(f"{low:.3g} to {high:.3g}")


@torch.no_grad()
def check_vae(base: Any, batch: dict[str, Any], is_data: bool) -> list[Finding]:
    """Whether scale and shift give latents of mean 0 and deviation 1."""
    if base.vae is None and _takes_pictures(base):
        return _ok("none: pixels are diffused")
    if "pixel_values" not in batch and "latents" not in batch:
        return _ok("not checked: no images")
    config = {} if base.vae is None else base.vae.config
    noted, found = base.config.vae_config or {}, []
    scale, shift = config.get("scaling_factor", 1.0), config.get("shift_factor") or 0.0
    for name, used in (("scaling_factor", scale), ("shift_factor", shift)):
        if base.vae is not None and (other := noted.get(name) or 0.0) != used:
            message = f"`{name}` is {used} in `model.vae` but {other} in `config.vae_config`, which a reload takes"
            found.append(_error(message, "use `attach_vae`, which sets both"))
    stacks = base.encode_images(batch["pixel_values"]) if "pixel_values" in batch else stack_images(batch["latents"])
    values = torch.cat([stack.flatten() for stack in stacks]).double()
    mean, std = float(values.mean()), float(values.std(correction=0))
    fits = f"these images suggest a scale of {scale / std:.4g} and a shift of {mean / scale + shift:.4g}"
    seen = f"latents have mean {mean:.2f} and deviation {std:.2f} under scale {scale:g} and shift {shift:g}"
    remedy = "measure both by `measure_latent_scale`, on many images" + ("" if is_data else "; or pass DATA")
    for name, known_scale, known_shift in _KNOWN_VAES.get(base.config.latent_channels, []):
        if math.isclose(scale, known_scale, rel_tol=1e-3) and abs(shift - known_shift) > 1e-3:
            message = (
                f"the VAE's shift is {'missing' if not shift else 'wrong'}: the scale {scale:g} is that of {name}"
            )
            found.append(_error(f"{message}, with a shift of {known_shift:g}, not {shift:g}", remedy))
    # Made-up pictures tell little of the data that the scale was measured on.
    widest, farthest = (2.0, 0.5) if is_data else (4.0, 2.0)
    if not 1 / widest <= std <= widest:
        found.append(_error(f"the VAE's scale is wrong: {seen}; {fits}", remedy))
    elif is_data and not 0.75 <= std <= 1.33:
        found.append(_warning(f"the VAE's scale may be off: {seen}; {fits}", remedy))
    if abs(mean) > farthest * std:
        found.append(_error(f"the VAE's shift is {'wrong' if shift else 'missing'}: {seen}; {fits}", remedy))
    return found or _ok(seen)


def check_labels(base: Any, batch: dict[str, Any]) -> list[Finding]:
    """Labels are the ids in place, with −100 where there is no loss; the model shifts them."""
    ids, labels, config = batch["input_ids"], batch["labels"], base.config
    has_loss = labels != -100
    if not has_loss.any():
        return [_error("every label is −100: no text is learned", "see `make_labels`")]
    found, wrong = [], has_loss & (labels != ids)
    if wrong.any():
        early = has_loss[:, :-1] & (labels[:, :-1] == ids[:, 1:])
        message = f"{int(wrong.sum())} of {int(has_loss.sum())} labels are not the token at their place"
        if early.sum() > 0.5 * has_loss.sum():
            message = "labels are shifted by one already, and the model shifts them again"
        elif (has_loss[:, 1:] & (labels[:, 1:] == ids[:, :-1])).sum() > 0.5 * has_loss.sum():
            message = "labels are shifted by one to the right"
        found.append(_error(message, "pass the ids themselves as labels, −100 where there is no loss: `make_labels`"))
    else:
        for name in ("image_token_id", "image_end_token_id"):
            if (has_loss & (ids == getattr(config, name))).any():
                found.append(_error(f"labels hold `{name}`, which has no LM loss", "make it −100: `make_labels`"))
        starts = ids[:, 1:] == config.image_start_token_id
        if starts.any() and not has_loss[:, 1:][starts].any():
            found.append(_warning("no <BOI> is a label: the model does not learn when to draw", "see `make_labels`"))
    return found or _ok(f"{int(has_loss.sum())} of {ids.numel()} positions")


def _least_lm_loss(batch: dict[str, Any], image_token_id: int) -> float:
    """The LM loss that no model gets below: of tokens that differ behind one and the same text."""
    following: dict[Any, Counter] = defaultdict(Counter)
    positions = batch.get("position_ids")
    for row, (ids, labels) in enumerate(zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)):
        start = 0
        for i, label in enumerate(labels):
            if positions is not None and positions[row, i] == 0:
                start = i
            if label != -100:
                text = tuple(ids[start:i])
                following[row if image_token_id in text else -1, text][label] += 1  # images are a row's own
    counts = [(n, counter.total()) for counter in following.values() for n in counter.values()]
    return -sum(n * math.log(n / total) for n, total in counts) / max(sum(n for n, _ in counts), 1)


def check_overfit(
    base: Any, batch: dict[str, Any], steps: int, learning_rate: float | None, errors: Sequence[str] = ()
) -> list[Finding]:
    """
    Trains a copy on one batch, t in the middle of the schedule and the noise the same in each step, so that both
    losses can vanish. In evaluation mode: without dropout.
    """
    if "labels" not in batch:
        return [_error("not tried: the batch has no `labels`")]
    twin = copy.deepcopy(base, {id(base.vae): None}).float().eval()
    inputs = {k: v for k, v in batch.items() if k not in ("pixel_values", "max_timesteps", "timesteps")}
    if "pixel_values" in batch:
        inputs["latents"] = base.encode_images(batch["pixel_values"])
    if "latents" in inputs:
        num_images = sum(len(stack) for stack in stack_images(inputs["latents"]))
        inputs["timesteps"] = torch.full((num_images,), base.config.num_train_timesteps // 2)
        inputs["noise_seeds"] = range(num_images)
    groups = _groups(twin)
    trained = [p for group in groups.values() for p in group.values() if p.requires_grad]
    if not trained:
        return [_error("not tried: no parameter is trainable")]
    rate = learning_rate or min(0.8 / base.config.text_config.hidden_size, 0.01)
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)
    floors = {"lm_loss": _least_lm_loss(batch, base.config.image_token_id), "diffusion_loss": 0.0}
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    alive: set[str] = set()

    def has_fallen(name: str) -> bool:
        # By 90 %, or almost to the least there is; or it was next to nothing, of a batch known by heart already.
        return last[name] <= max(0.1 * first[name], floors[name] + 0.02 * first[name], floors[name] + 0.01)

    with torch.enable_grad(), logging.tqdm(total=steps, desc="overfit", unit=" steps") as progress:
        for step in range(steps + 1):
            outputs = twin(**inputs, skip_logits=True, use_cache=False)
            last = {name: float(getattr(outputs, name).detach()) for name in floors}
            first = first or last
            if step == steps or not torch.isfinite(outputs.loss) or all(map(has_fallen, floors)):
                break
            optimizer.zero_grad()
            outputs.loss.backward()
            if step < 3:
                alive |= {
                    name
                    for name, group in groups.items()
                    if any(p.grad is not None and bool(p.grad.any()) for p in group.values())
                }
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            warmup.step()
            progress.update()
    falls = [f"{name} from {first[name]:.3g} to {last[name]:.3g}" for name in floors]
    stuck = [fall for name, fall in zip(floors, falls, strict=True) if not has_fallen(name)]
    needed = [
        name for name, group in groups.items() if name in _IMAGE_PARTS or any(p.requires_grad for p in group.values())
    ]
    dead = [name for name in needed if name not in alive] if step else []
    if dead:
        stuck.append(f"no gradient reaches: {', '.join(dead)}")
    if not stuck:
        return _ok(f"{', '.join(falls)} in {step} steps")
    message = f"one batch cannot be learned by heart in {step} steps: {'; '.join(stuck)}"
    width, hidden_size = base.config.latent_channels * base.config.patch_size**2, base.config.text_config.hidden_size
    if width > hidden_size:
        message += f"; a patch of {width} values does not fit through a hidden size of {hidden_size}"
    frozen = [name for name, group in groups.items() if not all(p.requires_grad for p in group.values())]
    if step == steps and not dead and not errors and frozen:
        message += f"; that may be all that can be done where parameters are frozen ({', '.join(frozen)})"
        return [_warning(message, "try more `steps`, or an adapter of higher rank")]
    why = (
        f"first see to: {', '.join(dict.fromkeys(errors))}"
        if errors
        else "try another `learning_rate` or more `steps`"
    )
    return [_error(message, why)]


def _load_model(name: str, attn_implementation: str | None, device: str) -> tuple[Any, Any, dict[str, Any]]:
    kwargs: dict[str, Any] = {"dtype": "auto", "output_loading_info": True}
    if attn_implementation is not None:
        kwargs["attn_implementation"] = attn_implementation
    adapter = Path(name, "adapter_config.json").exists()
    source = name
    if adapter:
        try:
            from peft import PeftConfig, PeftModel
        except ImportError as error:
            raise ImportError(f"{name} is an adapter, which needs peft; run `pip install peft`.") from error
        source = PeftConfig.from_pretrained(name).base_model_name_or_path
    model, loading_info = AutoModelForMultimodalLM.from_pretrained(source, **kwargs)
    if adapter:
        model = PeftModel.from_pretrained(model, name, is_trainable=True)
    has_processor = not adapter or Path(name, "processor_config.json").exists()
    return model.to(device), AutoProcessor.from_pretrained(name if has_processor else source), loading_info


def _load_data(args: argparse.Namespace, image_token: str) -> Any:
    from ..data.dataset import TransfusionDataset, hf_datasets  # needs datasets, which the other checks do not

    if files := sorted(file for file in glob.glob(args.data) if Path(file).is_file()):
        rows = hf_datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    else:
        rows = hf_datasets.load_dataset(args.data, split=args.split, streaming=True)
    columns = {"image_column": args.image_column, "caption_column": args.caption_column}
    return TransfusionDataset.from_captions(rows, **columns, image_token=image_token)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one line per finding; returns the exit status, 1 if one is an error."""
    parser = argparse.ArgumentParser(
        "transfusion_hf.training.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a folder (an adapter's, too) or a repository of the Hub")
    parser.add_argument("data", nargs="?", help="parquet files (a pattern), a folder or a repository of the Hub")
    parser.add_argument("--split", default="train")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--caption_column", default="text")
    parser.add_argument("--attn_implementation", help="default that of the checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no_overfit", action="store_true", help="do not train a copy on one batch")
    parser.add_argument("--steps", type=int, default=500, help="of that training, at most")
    parser.add_argument("--learning_rate", type=float, help="default 0.8 / hidden size, at most 0.01")
    parser.add_argument("--batch_size", type=int, default=4)
    args = parser.parse_args(argv)
    step = "model"
    try:
        model, processor, loading_info = _load_model(args.model, args.attn_implementation, args.device)
        step = "data"
        dataset = None if args.data is None else _load_data(args, processor.image_token)
        step = "arguments"
        findings = diagnose(
            model,
            processor,
            dataset=dataset,
            loading_info=loading_info,
            overfit=not args.no_overfit,
            steps=args.steps,
            learning_rate=args.learning_rate,
            batch_size=args.batch_size,
        )
    except (ValueError, OSError, ImportError) as error:
        findings = [Finding(step, "error", " ".join(str(error).split()))]
    print(*findings, sep="\n")
    return int(any(finding.severity == "error" for finding in findings))


__all__ = ["Finding", "diagnose"]

if __name__ == "__main__":
    sys.exit(main())
