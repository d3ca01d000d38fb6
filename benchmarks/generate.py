"""
What `generate()` costs, in ratios of two things timed in turn: text decoding against transformers' Llama, a denoising
step with a cached prefix against one without cache, a batch of prompts against one prompt after another, and drawing
against transfusion-pytorch (`pip install -e '.[benchmark]'`, skipped if it is not installed). Then the share of a
denoising step that is spent outside the model, and on what.

    python benchmarks/generate.py [--parts text cache batch peer overhead] [--output_dir benchmarks/results]

Prints Markdown tables and writes them. `benchmarks/schedulers.py` measures the quality of the drawings.
"""

import contextlib
import cProfile
import importlib.util
import io
import pstats
import statistics
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from ratios import Row, clock, compare, make_peer, num_passes, parse_arguments, report, table
from transformers import LlamaForCausalLM

from transfusion_hf import TransfusionConfig, TransfusionForCausalLMAndDiffusion

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from common import build_model, caption, train_tokenizer


def preset_model(device: torch.device, **kwargs) -> TransfusionForCausalLMAndDiffusion:
    """The paper's smallest model with random weights. Nothing ends a text."""
    torch.manual_seed(0)
    model = TransfusionForCausalLMAndDiffusion(TransfusionConfig.from_preset("0.16B", **kwargs)).to(device).eval()
    model.generation_config.update(eos_token_id=None, pad_token_id=0, num_inference_steps=4, image_guidance_scale=1.0)
    return model


def small_model(device: torch.device, **kwargs):
    """The quickstart's model, with random weights, and its processor."""
    torch.manual_seed(0)
    model, processor = build_model(train_tokenizer(), **kwargs)
    return model.to(device).eval(), processor


def text_rows(device: torch.device, rounds: int) -> list[Row]:
    model = preset_model(device)
    llama = LlamaForCausalLM(model.config.text_config).to(device).eval()
    llama.model.load_state_dict(model.model.language_model.state_dict())
    llama.lm_head.load_state_dict(model.lm_head.state_dict())
    llama.generation_config.update(eos_token_id=None, pad_token_id=0)
    prompt = torch.randint(5, 32000, (1, 64), device=device)
    kwargs = {"max_new_tokens": 64, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    runs: dict[str, Callable] = {
        "text mode": lambda: model.generate(prompt, generation_mode="text", **kwargs),
        "interleaved mode": lambda: model.generate(prompt, max_images=0, **kwargs).sequences,
        "LlamaForCausalLM.generate": lambda: llama.generate(prompt, **kwargs),
    }
    # All give the same greedy ids once the Llama, too, may not say the image tokens.
    never = [model.config.image_start_token_id, model.config.image_token_id, model.config.image_end_token_id]
    expected = llama.generate(prompt, suppress_tokens=never, **kwargs)
    is_equal = all(torch.equal(runs[name](), expected) for name in ("text mode", "interleaved mode"))
    remark = f"1 prompt of 64 tokens, 64 new ones, greedy, {'equal' if is_equal else 'DIFFERENT'} ids"
    return compare("text, 0.16B", runs, 1.05, remark, rounds, device)


def step_seconds(model, prompt: torch.Tensor, device: torch.device, **kwargs) -> float:
    """Median over the denoising steps after the first, which also reads the prompt."""
    stamps: list[float] = []
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        generation_mode="image",
        callback_on_step_end=lambda *_: stamps.append(clock(device)),
        **kwargs,
    )
    return statistics.median(end - start for start, end in pairwise(stamps))


def cache_rows(device: torch.device, rounds: int) -> list[Row]:
    model = preset_model(device)
    prompt = torch.randint(5, 32000, (1, 1000), device=device)
    runs = {
        "cached": lambda: step_seconds(model, prompt, device),
        "use_cache=False": lambda: step_seconds(model, prompt, device, use_cache=False, num_inference_steps=2),
    }
    return compare("denoising step, 0.16B", runs, 0.35, "1,000 tokens before 256 patches, no guidance", rounds, device)


def batch_rows(device: torch.device, rounds: int) -> list[Row]:
    model, processor = small_model(device)
    prompts = [processor(text=[caption(label)]).to(device) for label in range(8)]
    batch = processor(text=[caption(label) for label in range(8)]).to(device)
    kwargs = {"generation_mode": "image", "num_inference_steps": 25, "image_guidance_scale": 3.0}
    runs = {
        "8 prompts at once": lambda: model.generate(**batch, **kwargs),
        "one by one": lambda: [model.generate(**prompt, **kwargs) for prompt in prompts],
    }
    return compare("drawing, 1M", runs, 0.35, "25 steps, guidance 3, 16 patches", rounds, device)


def peer_rows(device: torch.device, rounds: int) -> list[Row]:
    """Flow matching with Euler's method in both, one pass per step, and equal parameters."""
    if importlib.util.find_spec("transfusion_pytorch") is None:
        print("transfusion-pytorch is not installed, so its rows are skipped: pip install -e '.[benchmark]'")
        return []
    flow = {"prediction_type": "flow_prediction"}
    small, sizes = small_model(device, **flow)[0], {"dim": 76, "depth": 4, "dim_head": 20, "heads": 4}
    large, large_sizes = preset_model(device, **flow), {"dim": 464, "depth": 16, "dim_head": 64, "heads": 8}
    return [
        *against_peer("1M", small, sizes, 8, 20, 1.0, device, rounds),
        *against_peer("1M, guidance", small, sizes, 8, 20, 3.0, device, rounds),
        *against_peer("0.16B", large, large_sizes, 1, 5, 1.0, device, rounds),
    ]


def against_peer(label, model, sizes, batch_size: int, num_steps: int, scale: float, device, rounds) -> list[Row]:
    side = model.config.latent_size[0] // model.config.patch_size
    peer = make_peer(model.config, sizes, device, odeint_kwargs={"method": "euler"}).eval()
    prompt = torch.randint(3, 180, (batch_size, 8), device=device)
    kwargs = {"generation_mode": "image", "num_inference_steps": num_steps, "image_guidance_scale": scale}

    def ours():
        model.generate(prompt, attention_mask=torch.ones_like(prompt), bos_token_id=None, **kwargs)

    def theirs():
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            # It puts a start token before each prompt, takes steps between `modality_steps` points in time, and ends
            # once there are more tokens than `max_length`, which is after the image.
            kwargs = {"force_modality_at_start": 0, "modality_steps": num_steps + 1, "max_length": side * side - 1}
            peer.sample_many(list(prompt[:, 1:]), cfg_scale=scale, **kwargs)

    counts = [num_passes(model.model.language_model, ours), num_passes(peer.transformer, theirs)]
    passes, tokens = zip(*counts, strict=True)
    numbers = [sum(p.numel() for p in m.parameters()) for m in (model, peer)]
    remark = (
        f"batch of {batch_size}, prompts of 8 tokens, {side * side} patches, {num_steps} Euler steps, guidance "
        f"{scale:g}; parameters {numbers[0]:,} / {numbers[1]:,}, passes {passes[0]} / {passes[1]}, tokens in all "
        f"passes {tokens[0]:,} / {tokens[1]:,}"
    )
    runs = {"generate": ours, "transfusion-pytorch's sample_many": theirs}
    return compare(f"drawing, {label}", runs, 1.0, remark, rounds, device)


def overhead_rows(device: torch.device, rounds: int) -> tuple[list[Row], str]:
    """The share of time outside `TransfusionModel.forward` in all steps after the first, and a profile of it."""
    model, processor = small_model(device)
    inner, forward = model.model, model.model.forward
    batch = processor(text=[caption(label % 10) for label in range(16)]).to(device)
    inside, num_steps = [], 50

    def timed(*args, **kwargs):
        start = clock(device)
        output = forward(*args, **kwargs)
        inside.append(clock(device) - start)
        return output

    rows: list[Row] = []
    for scale in (1.0, 3.0):
        shares, milliseconds = [], []
        kwargs = {"generation_mode": "image", "num_inference_steps": num_steps, "image_guidance_scale": scale}
        inner.forward = timed
        for number in range(rounds + 1):
            stamps: list[float] = []
            inside.clear()
            model.generate(**batch, **kwargs, callback_on_step_end=lambda *_, s=stamps: s.append(clock(device)))
            if number:  # the first warms up
                whole = stamps[-1] - stamps[0]
                shares.append(1 - sum(inside[1:]) / whole)
                milliseconds.append(1e3 * whole / (num_steps - 1))
        own = statistics.median(share * step for share, step in zip(shares, milliseconds, strict=True))
        remark = f"{own:.2f} of {statistics.median(milliseconds):.2f} ms; 16 prompts, DDPM"
        rows.append((f"outside the model, 1M, guidance {scale:g}", shares, 0.1, remark))
    profile = profile_outside(model, {**batch, **kwargs}, forward, num_steps)
    del inner.forward  # uncovers the method of the class
    return rows, f"## Outside the model, with guidance\n\n{profile}\n"


def profile_outside(model, arguments: dict, forward: Callable, num_steps: int, length: int = 12) -> str:
    """Profiles a `generate()` in which every pass after the second returns the second's output at once."""
    outputs: list = []
    profile = cProfile.Profile()

    def repeat(*args, **kwargs):
        if len(outputs) < 2:
            outputs.append(forward(*args, **kwargs))
        return outputs[-1]

    def start(_, step, *__):  # after the real passes
        if step == 1:
            profile.enable()

    model.model.forward = repeat
    model.generate(**arguments, callback_on_step_end=start)
    profile.disable()
    lines = ["| function | calls per step | µs per step with what it calls, under cProfile |", "|---|---|---|"]
    functions = pstats.Stats(profile).stats.items()
    for (file, _, name), (_, calls, _, seconds, _) in sorted(functions, key=lambda item: -item[1][3])[:length]:
        place = name if file == "~" else f"{Path(file).name}: {name}"
        lines.append(f"| `{place}` | {calls / (num_steps - 2):.1f} | {1e6 * seconds / (num_steps - 2):.0f} |")
    return "\n".join(lines)


PARTS = {"text": text_rows, "cache": cache_rows, "batch": batch_rows, "peer": peer_rows, "overhead": overhead_rows}


def main() -> None:
    args = parse_arguments(__doc__, PARTS)
    rows, profile = [], ""
    for part in args.parts:
        result = PARTS[part](args.device, args.rounds)
        more, profile = result if part == "overhead" else (result, profile)
        rows += more
    report("generate()", "generate", f"{table(rows)}\n\n{profile}", args)


if __name__ == "__main__":
    main()
