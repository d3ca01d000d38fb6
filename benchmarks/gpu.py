"""
Measures a GPU in a few minutes. For the paper's sizes in bfloat16: how often a training step waits for the device, and
its time, memory and utilisation, beside transformers' Llama on as many tokens. Then drawing in batches, Liger's loss,
and the same steps compiled, smallest first. Each figure stands beside its demand.

    python benchmarks/gpu.py [--presets 0.16B 0.37B 0.76B 1.4B] [--limit_s 240] [--output_dir benchmarks/results]

Everything is timed in turn within a size. Parts that would begin after `--limit_s` seconds are named, not run.
"""

import gc
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from ratios import clock, image_batch, in_turn, make_parser, setting, write
from transformers import LlamaForCausalLM

from transfusion_hf import TransfusionConfig, TransfusionForCausalLMAndDiffusion
from transfusion_hf.diffusion_transfusion import BatchCounts
from transfusion_hf.masking_transfusion import make_packed_plan

PRESETS = ("0.16B", "0.37B", "0.76B", "1.4B")
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # of dense bfloat16, by a part of the device's name
MOST_OF_LLAMA, MOST_OF_EAGER = 1.03, 1.0
HEAD = "| what | ms | of it | demanded | | peak GiB | MFU |\n|---|---|---|---|---|---|---|"


def packed_batch(
    config: TransfusionConfig, num_documents: int, num_words: int, device: torch.device
) -> dict[str, Any]:
    """One row of documents, each words and an image, as the collator makes it for `transfusion_varlen`."""
    ids = image_batch(config, 1, num_words, torch.device("cpu"), num_documents)
    length = ids["input_ids"].shape[1]
    positions = torch.arange(length).remainder(length // num_documents)[None]
    counts = BatchCounts(int((ids["labels"][:, 1:] != -100).sum()), [num_documents])
    plan = make_packed_plan(ids["input_ids"], positions, config.image_token_id)
    latents = torch.randn(num_documents, config.latent_channels, *config.latent_size)
    batch = {**ids, "position_ids": positions, "latents": latents, "batch_counts": counts, "varlen_plan": plan}
    return {name: value.to(device) for name, value in batch.items()} | {"use_cache": False, "check_inputs": False}


def waits(run: Callable[[], Any], device: torch.device) -> int | None:
    """How often the host waits for a GPU in a run that is warm; `waiting.py` counts what would wait without one."""
    if device.type != "cuda":
        return None
    run()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # The mode warns of itself too, once.
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def peak_gib(run: Callable[[], Any], device: torch.device, before: int = 0) -> float:
    """Peak memory of a run, less the bytes that were allocated `before`; one run warms up."""
    if device.type != "cuda":
        return float("nan")
    run()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def row(
    what: str, seconds: float, base: tuple[str, float] | None, bound: float | None, peak: float, mfu: float
) -> str:
    ratio = "" if base is None else f"{seconds / base[1]:.3f} of {base[0]}"
    verdict = "" if base is None or bound is None else "holds" if seconds / base[1] <= bound else "FAILS"
    numbers = [f"{x:.2f}" if x == x else "" for x in (peak, mfu)]
    demanded = "" if bound is None else f"≤ {bound:g}"
    return f"| {what} | {1e3 * seconds:.1f} | {ratio} | {demanded} | {verdict} | {' | '.join(numbers)} |"


def step_of(model: torch.nn.Module, call: Callable[..., Any], batch: dict[str, Any], optimizer: Any) -> None:
    optimizer.zero_grad()
    call(**batch).loss.backward()
    optimizer.step()


def training_rows(
    label: str,
    config: TransfusionConfig,
    device: torch.device,
    rounds: int,
    num_documents: int = 8,
    num_words: int = 254,
    is_compiled: bool = False,
) -> list[str]:
    """
    A step on text alone, one on text and images, and one of Llama, on as many tokens. With `is_compiled` that on
    text and images, compiled and not; compiling takes minutes.
    """
    torch.manual_seed(0)
    config.text_config._attn_implementation = "sdpa"
    before = allocated(device)
    model = TransfusionForCausalLMAndDiffusion(config).to(device, torch.bfloat16).train()
    packed = packed_batch(config, num_documents, num_words, device)
    ids = torch.randint(5, config.image_start_token_id, packed["input_ids"].shape, device=device)
    text = {"input_ids": ids, "labels": ids, "use_cache": False}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def on_varlen(call: Callable[..., Any]) -> float:
        model.set_attn_implementation("transfusion_varlen")
        start = clock(device)
        step_of(model, call, packed, optimizer)
        seconds = clock(device) - start
        model.set_attn_implementation("sdpa")
        return seconds

    images = "text and images, transfusion_varlen"
    runs: dict[str, Callable] = {images: partial(on_varlen, model)}
    if is_compiled:
        torch.compiler.reset()
        runs["the same, compiled"] = partial(on_varlen, torch.compile(model, fullgraph=True, dynamic=True))
    else:
        runs["text alone"] = partial(step_of, model, model, text, optimizer)
    peaks = {name: peak_gib(run, device, before) for name, run in runs.items()}
    if not is_compiled:
        before = allocated(device)
        llama = LlamaForCausalLM(model.config.text_config).to(device, torch.bfloat16).train()
        llamas = torch.optim.AdamW(llama.parameters(), lr=1e-5, fused=True)
        runs["LlamaForCausalLM"] = partial(step_of, llama, llama, text, llamas)
        peaks["LlamaForCausalLM"] = peak_gib(runs["LlamaForCausalLM"], device, before)
    medians = {name: statistics.median(times) for name, times in in_turn(runs, rounds, device, label).items()}
    flops = 6 * ids.numel() * model.num_parameters(exclude_embeddings=True)
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    peak_flops = next((peak for part, peak in PEAKS.items() if part in name), float("nan"))
    own = None if is_compiled else ("LlamaForCausalLM's", medians["LlamaForCausalLM"])
    against: dict[str, tuple] = {
        "text alone": (own, MOST_OF_LLAMA),
        images: (own, None),
        "the same, compiled": (("the same, not compiled", medians[images]), MOST_OF_EAGER),
        "LlamaForCausalLM": (None, None),
    }
    lines = [
        row(f"{label}, {ids.numel():,} tokens: {what}", seconds, *against[what], peaks[what],
            flops / seconds / peak_flops)
        for what, seconds in medians.items()
    ]  # fmt: skip
    if is_compiled:
        return lines
    model.set_attn_implementation("transfusion_varlen")
    count = waits(partial(step_of, model, model, packed, optimizer), device)
    verdict = "" if count is None else "FAILS" if count else "holds"
    return [
        *lines,
        f"| {label}: waits of a step on text and images | | {'' if count is None else count} | 0 | {verdict} | | |",
    ]


def liger_rows(label: str, config: TransfusionConfig, device: torch.device, rounds: int) -> list[str]:
    if importlib.util.find_spec("liger_kernel") is None:
        return ["| Liger: not installed | | | | | | |"]
    torch.manual_seed(0)
    model = TransfusionForCausalLMAndDiffusion(config).to(device, torch.bfloat16).train()
    ids = torch.randint(5, config.image_start_token_id, (4, 1024), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(use_liger_loss: bool) -> None:
        model.use_liger_loss = use_liger_loss
        step_of(model, model, {"input_ids": ids, "labels": ids, "use_cache": False}, optimizer)

    runs = {"Liger's LM loss": partial(step, True), "our own": partial(step, False)}
    medians = {name: statistics.median(times) for name, times in in_turn(runs, rounds, device, "liger").items()}
    base = ("our own", medians["our own"])
    return [
        row(f"{label}: {what}", seconds, None if what == base[0] else base, None, peak_gib(runs[what], device),
            float("nan"))
        for what, seconds in medians.items()
    ]  # fmt: skip


def drawing_rows(
    label: str,
    config: TransfusionConfig,
    device: torch.device,
    rounds: int,
    batches: tuple[int, ...] = (1, 8, 32),
    num_inference_steps: int = 25,
) -> list[str]:
    """Seconds of a drawing within a batch."""
    torch.manual_seed(0)
    model = TransfusionForCausalLMAndDiffusion(config).to(device, torch.bfloat16).eval()
    model.generation_config.update(pad_token_id=0, eos_token_id=None)

    def draw(number: int) -> None:
        ids = torch.full((number, 8), 7, device=device)
        options = {"num_inference_steps": num_inference_steps, "image_guidance_scale": 3.0}
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_mode="image", **options)

    runs = {f"a drawing in a batch of {number}": partial(draw, number) for number in batches}
    times = in_turn(runs, rounds, device, "drawing").items()
    each = {name: statistics.median(t) / n for n, (name, t) in zip(batches, times, strict=True)}
    (first, alone), *_ = each.items()
    return [
        row(f"{label}: {what}", seconds, None if what == first else ("one alone", alone), None, float("nan"),
            float("nan"))
        for what, seconds in each.items()
    ]  # fmt: skip


def main() -> None:
    parser = make_parser(__doc__, rounds=7, device="cuda")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--limit_s", type=float, default=240)
    args = parser.parse_args()
    start, lines, left_out = time.perf_counter(), [], []
    smallest = TransfusionConfig.from_preset("0.16B")
    configs = {preset: TransfusionConfig.from_preset(preset) for preset in args.presets}
    parts: dict[str, Callable[[], list[str]]] = {
        f"training at {preset}": partial(training_rows, preset, config, args.device, args.rounds)
        for preset, config in configs.items()
    }
    parts["drawing"] = partial(drawing_rows, "0.16B", smallest, args.device, 3)
    parts["Liger"] = partial(liger_rows, "0.16B", smallest, args.device, args.rounds)
    for preset, config in configs.items():  # last, since compiling takes minutes
        compiled = partial(training_rows, preset, config, args.device, args.rounds, is_compiled=True)
        parts[f"compiled training at {preset}"] = compiled
    for name, part in parts.items():
        if time.perf_counter() - start > args.limit_s:
            left_out.append(name)
            continue
        try:
            lines += part()
        except torch.OutOfMemoryError:
            left_out.append(f"{name} (no memory)")
        gc.collect()
        if args.device.type == "cuda":
            torch.cuda.empty_cache()
        head = f"# A GPU\n\n{setting(args.device)}, bfloat16, medians of {args.rounds} rounds, 3 of drawing."
        rest = f"\n\nNo time was left for: {', '.join(left_out)}." if left_out else ""
        write("\n".join([head, "", HEAD, *lines]) + rest + "\n", "gpu", args)


if __name__ == "__main__":
    main()
