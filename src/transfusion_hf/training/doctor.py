"""
Finds out why a Transfusion model does not learn, or draws noise:

    transfusion doctor MODEL
    transfusion doctor MODEL "data/*.parquet" --caption_column caption
"""

import argparse
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from accelerate.utils import send_to_device
from PIL import Image
from transformers import AutoModelForMultimodalLM
from transformers.utils import logging

from ..data.collator import TransfusionDataCollator
from ..data.shapes import ShapesDataset
from ..modeling_transfusion import TransfusionForCausalLMAndDiffusion
from ..patching_transfusion import stack_images
from ..processing_transfusion import TransfusionProcessor


@dataclass
class Finding:
    """What a check saw: `severity` is `"error"`, `"warning"` or `"ok"`, `remedy` says what to do."""

    severity: str
    message: str
    remedy: str = ""
    check: str = ""

    def __str__(self) -> str:
        return f"{self.severity:8}{self.check:16}{self.message}{self.remedy and f' → {self.remedy}'}"


_PATCH_PARTS = ["patch_encoder", "patch_decoder"]
_ok, _warning, _error = (partial(Finding, severity) for severity in ("ok", "warning", "error"))


def diagnose(
    model: Any,
    processor: Any,
    batch: dict[str, Any] | None = None,
    dataset: Iterable[dict[str, Any]] | None = None,
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
    overfit: bool = True,
    steps: int = 500,
    learning_rate: float | None = None,
    batch_size: int = 4,
) -> list[Finding]:
    """
    Checks special tokens, attention mask, noise schedule, pixels, VAE, labels, and whether one batch can be learned by
    heart, which trains a float32 copy. Returns for each check either one `"ok"`, or everything that is wrong.

    Args:
        model (`TransfusionForCausalLMAndDiffusion`, or a `PeftModel` around one)
        processor (`TransfusionProcessor`)
        batch (`dict`, *optional*): A training batch, as `model` takes it.
        dataset (iterable of samples, *optional*):
            Instead of `batch`; `collator` (default `TransfusionDataCollator`) makes one of the first `batch_size`.
            Without either, pictures of shapes are used, and a VAE is judged less strictly.
        overfit (`bool`, defaults to `True`): Whether to train on the batch, which takes the longest.
        steps (`int`, defaults to 500): Limit of that training, which ends once both losses have fallen by 90 %.
        learning_rate (`float`, *optional*): Defaults to 0.8 / hidden size, at most 0.01.

    Raises:
        ValueError: `model` is not a Transfusion model; both `batch` and `dataset`; `steps` below 1.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, TransfusionForCausalLMAndDiffusion):
        raise ValueError(f"`model` must be a TransfusionForCausalLMAndDiffusion; got {type(base).__name__}.")
    if batch is not None and dataset is not None:
        raise ValueError("Pass `batch` or `dataset`, not both.")
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1; got {steps}.")
    is_data, was_training = batch is not None or dataset is not None, base.training
    findings: list[Finding] = []

    def run(check: str, function: Callable[..., Iterator[Finding] | None], *args: Any) -> None:
        try:
            found = list(function(*args) or ())
        except (ValueError, RuntimeError, IndexError, KeyError, TypeError) as error:
            # FlexAttention, for one, has no backward pass on a CPU.
            finding = _warning if isinstance(error, NotImplementedError) else _error
            found = [finding(f"{type(error).__name__}: {' '.join(str(error).split())}")]
        complaints = [finding for finding in found if finding.severity != "ok"]
        findings.extend(replace(finding, check=check) for finding in complaints or found)

    def make_batch() -> None:
        nonlocal batch
        if batch is None:
            samples = _made_up_samples(base, batch_size) if dataset is None else dataset
            collate = collator or TransfusionDataCollator(processor, caption_dropout=0.0)
            batch = collate(list(islice(samples, batch_size)))
        # Without numbers that a change to a batch may have left behind: `forward` counts itself.
        batch = send_to_device({name: x for name, x in batch.items() if name != "batch_counts"}, base.device)

    base.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            run("special tokens", check_special_tokens, base, processor)
            run("attention mask", check_attention_mask, base)
            run("noise schedule", check_noise_schedule, base)
            run("batch", make_batch)
            if batch is not None:
                run("pixels", check_pixels, base, processor, batch)
                run("VAE", check_vae, base, batch, is_data)
                run("labels", check_labels, base, batch)
                if overfit and "labels" in batch:
                    run("overfit", check_overfit, base, batch, steps, learning_rate)
    finally:
        base.train(was_training)
    return findings


def _made_up_samples(base: Any, count: int) -> list[dict[str, Any]]:
    """Pictures of shapes with their captions, or random latents if the images are not pictures."""
    samples, config = list(ShapesDataset(count)), base.config
    if _takes_pictures(base):
        return samples
    size = (1, config.latent_channels, *config.latent_size)
    return [{"text": sample["text"], "latents": torch.randn(size)} for sample in samples]


def _takes_pictures(base: Any) -> bool:
    return (base.config.latent_channels if base.vae is None else base.vae.config.get("in_channels", 3)) in (1, 3)


# A check yields everything that is wrong, and at its end what it saw, which counts if nothing is wrong.


def check_special_tokens(base: Any, processor: Any) -> Iterator[Finding]:
    """<BOI>, placeholder and <EOI> each have one id, the same in tokenizer, processor and configurations."""
    config, tokenizer, seen = base.config, processor.tokenizer, []
    remedy = "`TransfusionProcessor.for_model(model, tokenizer)` makes them agree; then save both"
    for name in ("image_start_token", "image_token", "image_end_token"):
        token = getattr(processor, name)
        ids = tokenizer(token, add_special_tokens=False).input_ids
        own, other = getattr(processor, f"{name}_id"), getattr(config, f"{name}_id")
        if not ids == [own] == [other]:
            where = f"{own} in the processor and {other} in the config"
            yield _error(f"the tokenizer reads {token} as {ids}, but `{name}_id` is {where}", remedy)
        seen.append(f"{token} {own}")
    ends = base.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    if tokenizer.eos_token_id not in (None, *ends) and ends != [None]:
        yield _error(f"`eos_token_id` is {tokenizer.eos_token_id} in the tokenizer but {ends} to `generate()`", remedy)
    if (own := processor.pixels_per_patch) != (other := config.pixels_per_patch):
        yield _error(f"`pixels_per_patch` is {own} in the processor but {other} in the config", remedy)
    yield _ok(", ".join(seen))


def _layout(base: Any, num_images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of shape `(1, seq)`: two words, images of four patches, two words; and the latents of these images."""
    config = base.config
    image = [config.image_start_token_id, *[config.image_token_id] * 4, config.image_end_token_id]
    words = [i for i in range(3, config.text_config.vocab_size) if i not in image][:2]
    latents = torch.randn(num_images, config.latent_channels, 2 * config.patch_size, 2 * config.patch_size)
    return torch.tensor([[*words, *image * num_images, *words]], device=base.device), latents.to(base.device)


@torch.no_grad()
def check_attention_mask(base: Any) -> Iterator[Finding]:
    """Text is causal; the patches of an image see each other, if the configuration says so."""
    config, backend = base.config, f"`attn_implementation={base.config.text_config._attn_implementation!r}`"
    ids, latents = _layout(base, 2)

    def states(changed: int | None = None) -> torch.Tensor:
        """Run with another embedding at one position, because a backend may ignore the mask it gets."""

        def change(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            embeds = kwargs["inputs_embeds"].clone()
            if changed is not None:
                embeds[:, changed] += torch.randn(embeds.shape[-1]).to(embeds) * embeds.abs().max()
            return args, {**kwargs, "inputs_embeds": embeds}

        with base.model.language_model.register_forward_pre_hook(change, with_kwargs=True):
            return base.model(input_ids=ids, latents=latents, use_cache=False).last_hidden_state[0].float()

    unchanged = states()
    noise = (states() - unchanged).abs().max()
    *others, last = (ids[0] == config.image_token_id).nonzero().flatten().tolist()[-4:]  # the second image
    sees_patch, sees_word = ((states(i) - unchanged).abs().amax(-1) > noise for i in (last, -1))
    remedy = "use `attn_implementation='sdpa'`, 'eager', 'flex_attention' or 'transfusion_varlen'"
    first = others[0] - (config.image_markers_in_block and config.bidirectional_image_attention)  # `<BOI>`
    if sees_patch[:first].any() or sees_word[:-1].any():
        yield _error(f"the mask is not causal outside of images under {backend}: the LM loss is worthless", remedy)
    if config.bidirectional_image_attention and not sees_patch[others].all():
        yield _error(f"the mask is causal inside images: {backend} drops the image blocks", remedy)
    elif not config.bidirectional_image_attention and config.num_patches(*config.latent_size) > 1:
        yield _warning("`bidirectional_image_attention` is False (the ablation of Table 5)", "set it to True")
    yield _ok(f"causal, and both ways inside images ({backend})")


@torch.no_grad()
def check_noise_schedule(base: Any) -> Iterator[Finding]:
    """The model gets a clean image at the first t and noise at the last one."""
    config = base.config
    first, last = config.first_timestep, config.num_train_timesteps - 1 + config.first_timestep
    ids, x_0 = _layout(base, 2)
    seen: list[torch.Tensor] = []
    kwargs = {"timesteps": torch.tensor([first, last]), "noise_seeds": range(2), "labels": ids}
    with base.model.patch_encoder.register_forward_pre_hook(lambda _, args: seen.append(torch.cat(list(args[0])))):
        for latents in (x_0, -x_0):  # under the same noise, half their difference is what is left of the image
            base(input_ids=ids, latents=latents, **kwargs)
    shares = ((seen[0] - seen[1]).float() * x_0).sum((1, 2, 3)) / (2 * x_0.square().sum((1, 2, 3)))
    clean, noisy = (round(share, 2) + 0.0 for share in shares.tolist())
    what = f"at t = {first} {clean:.2f} of the clean image is left, at t = {last} {noisy:.2f}"
    if config.num_train_timesteps > 1 and (clean < 0.7 or noisy > 0.3):
        remedy = "take `beta_schedule` of a published schedule; t = 0 is clean here"
        yield _error(f"the schedule does not go from clean to noise: {what}", remedy)
    yield _ok(what)


def check_pixels(base: Any, processor: Any, batch: dict[str, Any]) -> Iterator[Finding]:
    """Black is −1 and white is 1, in the processor's output and in the batch."""
    seen, remedy = "images are latents", "rescale by 1/255, then `image_mean` and `image_std` of 0.5"
    if _takes_pictures(base):
        size = [side * base.config.vae_scale_factor for side in base.config.latent_size[::-1]]
        pictures = [Image.new("RGB", size, color) for color in ("black", "white")]
        black, white = (pixels.float() for pixels in processor.image_processor(pictures)["pixel_values"])
        if (black + 1).abs().max() > 0.02 or (white - 1).abs().max() > 0.02:
            seen = f"the processor makes black {black.mean():.4g} and white {white.mean():.4g}, not −1 and 1"
            yield _error(seen, remedy)
    if (images := batch.get("pixel_values")) is not None:
        low, high = min(float(i.min()) for i in images), max(float(i.max()) for i in images)
        seen = f"pixels of the batch lie in {low:.4g} to {high:.4g}, expected −1 to 1"
        if low < -1.02 or high > 1.02 or -0.02 <= low < 0.25:  # the last in [0, 1]
            yield _error(seen, remedy)
    yield _ok(seen)


@torch.no_grad()
def check_vae(base: Any, batch: dict[str, Any], is_data: bool) -> Iterator[Finding]:
    """Scale and shift give latents of mean 0 and standard deviation 1."""
    images = batch.get("pixel_values", batch.get("latents"))
    if images is None or (base.vae is None and _takes_pictures(base)):
        yield _ok("no images" if images is None else "none: pixels are diffused")
        return
    config = {} if base.vae is None else base.vae.config
    scale, shift = config.get("scaling_factor", 1.0), config.get("shift_factor") or 0.0
    stacks = base.encode_images(images) if "pixel_values" in batch else stack_images(images)
    values = torch.cat([stack.flatten() for stack in stacks]).double()
    mean, std = float(values.mean()), float(values.std(correction=0))
    seen = f"latents have mean {mean:.2f} and deviation {std:.2f} under scale {scale:g} and shift {shift:g}"
    seen += f"; these images suggest a scale of {scale / std:.4g} and a shift of {mean / scale + shift:.4g}"
    remedy = "measure both with `measure_latent_scale`, on many images" + ("" if is_data else "; or pass DATA")
    widest, farthest = (2.0, 0.5) if is_data else (4.0, 2.0)  # made-up pictures say little
    if not 1 / widest <= std <= widest:
        yield _error(f"the VAE's scale is wrong: {seen}", remedy)
    if abs(mean) > farthest * std:
        yield _error(f"the VAE's shift is {'wrong' if shift else 'missing'}: {seen}", remedy)
    yield _ok(seen)


def check_labels(base: Any, batch: dict[str, Any]) -> Iterator[Finding]:
    """Labels are the ids in place, and −100 where there is no loss; the model shifts them."""
    remedy = "pass the ids themselves as labels, −100 where there is no loss: `make_labels`"
    if "labels" not in batch:
        yield _error("the batch has no `labels`: nothing is noised and no loss computed", remedy)
        return
    ids, labels = batch["input_ids"], batch["labels"]
    has_loss = labels != -100
    if not has_loss.any():
        yield _error("every label is −100: no text is learned", remedy)
    elif (wrong := has_loss & (labels != ids)).any():
        message = f"{int(wrong.sum())} of {int(has_loss.sum())} labels are not the token at their place"
        if 2 * (has_loss & (labels == ids.roll(-1, 1))).sum() > has_loss.sum():
            message = "labels are shifted by one already, and the model shifts them again"
        yield _error(message, remedy)
    else:
        for name in ("image_token_id", "image_end_token_id"):
            if (has_loss & (ids == getattr(base.config, name))).any():
                yield _error(f"labels hold `{name}`, which has no LM loss", remedy)
        starts = ids[:, 1:] == base.config.image_start_token_id
        if starts.any() and not has_loss[:, 1:][starts].any():
            yield _warning("no <BOI> is a label: the model does not learn when to draw", "see `make_labels`")
    yield _ok(f"{int(has_loss.sum())} of {ids.numel()} positions")


def check_overfit(base: Any, batch: dict[str, Any], steps: int, learning_rate: float | None) -> Iterator[Finding]:
    """Trained on one batch, t and noise fixed, both losses nearly vanish, and gradients reach every part."""
    config, twin = base.config, copy.deepcopy(base, {id(base.vae): None}).float().eval()  # without dropout
    trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    if not trained:
        yield _error("not tried: every parameter is frozen")
        return
    inputs = {k: v for k, v in batch.items() if k not in ("pixel_values", "max_timesteps", "timesteps")}
    if "pixel_values" in batch:
        inputs["latents"] = base.encode_images(batch["pixel_values"])
    if "latents" in inputs:
        num_images = sum(map(len, stack_images(inputs["latents"])))
        inputs["timesteps"] = torch.full((num_images,), config.num_train_timesteps // 2)
        inputs["noise_seeds"] = range(num_images)
    rate = learning_rate or min(0.8 / config.text_config.hidden_size, 0.01)
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)
    # Which of n documents it is in, a model can only guess: that costs up to log n each.
    positions, num_labels = batch.get("position_ids"), int((batch["labels"] != -100).sum())
    num_documents = len(batch["labels"]) if positions is None else int((positions == 0).sum())
    floors = {"lm_loss": num_documents * math.log(num_documents) / max(num_labels, 1), "diffusion_loss": 0.0}
    first: dict[str, float] = {}
    for step in logging.tqdm(range(steps + 1), desc="overfit", unit=" steps"):
        outputs = twin(**inputs, skip_logits=True, use_cache=False)
        last = {name: float(getattr(outputs, name).detach()) for name in floors}
        first = first or last
        # Learned: fallen by 90 %, or low from the start.
        high = [name for name, low in floors.items() if not last[name] <= max(0.1 * first[name], low + 0.05)]
        if not high or not outputs.loss.isfinite() or step == steps:
            break
        optimizer.zero_grad()
        outputs.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        warmup.step()

    falls = {name: f"{name} from {first[name]:.3g} to {loss:.3g}" for name, loss in last.items()}
    stuck = [falls[name] for name in high]
    parts = {name: getattr(twin.model, name).parameters() for name in _PATCH_PARTS}
    dead = [name for name, part in parts.items() if not any(p.grad is not None and p.grad.any() for p in part)]
    if step and dead:
        stuck.append(f"no gradient reaches: {', '.join(dead)}")
    message = f"one batch cannot be learned by heart in {step} steps: {'; '.join(stuck)}"
    if not stuck:
        yield _ok(f"{', '.join(falls.values())} in {step} steps")
    elif step and dead:
        remedy = f"unfreeze it (with PEFT, `modules_to_save={_PATCH_PARTS}`), take a `diffusion_loss_weight` above 0"
        yield _error(message, f"{remedy}, and images with a loss")
    elif step == steps and len(trained) < len(list(twin.parameters())):
        yield _warning(f"{message}; frozen parameters may allow no more", "more `steps`, or an adapter of higher rank")
    else:
        yield _error(message, "try another `learning_rate` or more `steps`")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one line per finding; returns the exit status, 1 if one is an error."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("transfusion doctor", description=__doc__, formatter_class=raw)
    parser.add_argument("model", help="a folder (an adapter's, too) or a repository of the Hub")
    parser.add_argument("data", nargs="?", help="a folder of pictures, files (a pattern) or a repository of the Hub")
    for name, default in (("split", "train"), ("image_column", "image"), ("caption_column", "text")):
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--attn_implementation", help="default: the checkpoint's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no_overfit", dest="overfit", action="store_false", help="do not train a copy on one batch")
    parser.add_argument("--steps", type=int, default=500, help="limit of that training")
    parser.add_argument("--learning_rate", type=float, help="default: 0.8 / hidden size, at most 0.01")
    parser.add_argument("--batch_size", type=int, default=4)
    args = parser.parse_args(argv)
    kwargs = {} if args.attn_implementation is None else {"attn_implementation": args.attn_implementation}
    model = AutoModelForMultimodalLM.from_pretrained(args.model, dtype="auto", **kwargs).to(args.device)
    for name, parameter in model.named_parameters():  # of an adapter, which is loaded frozen
        parameter.requires_grad_(parameter.requires_grad or ".lora_" in name)
    processor = TransfusionProcessor.from_pretrained(args.model)
    dataset = None
    if args.data is not None:
        from ..data.dataset import TransfusionDataset, load_rows  # needs datasets, which the other checks do not

        rows = load_rows(args.data, streaming=True, split=args.split)
        columns = args.image_column, args.caption_column
        dataset = TransfusionDataset.from_captions(rows, *columns, image_token=processor.image_token)
    options = {name: getattr(args, name) for name in ("overfit", "steps", "learning_rate", "batch_size")}
    findings = diagnose(model, processor, dataset=dataset, **options)
    print(*findings, sep="\n")
    return int(any(finding.severity == "error" for finding in findings))
