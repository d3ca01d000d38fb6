"""
What a training step costs, in ratios of two things timed in turn: on text alone against transformers' Llama, compiled
against not, on text and images against transfusion-pytorch (`pip install -e '.[benchmark]'`, skipped if it is not
installed). And the memory of a step with logits only where there are labels, against that with all logits.

    python benchmarks/train.py [--parts text compiled memory peer] [--output_dir benchmarks/results]

Prints a Markdown table and writes it. A step is forward, backward and fused AdamW, as in the Trainer.
"""

import copy
import importlib.util
from collections.abc import Callable
from itertools import accumulate

import torch
from ratios import Row, compare, image_batch, make_peer, num_passes, parse_arguments, report, table
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from transfusion_hf import TransfusionConfig, TransfusionForCausalLMAndDiffusion
from transfusion_hf.diffusion_transfusion import BatchCounts


def train_step(model: torch.nn.Module, loss_of: Callable) -> Callable:
    """A step of AdamW on the loss that `loss_of` returns."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()

    return step


def text_rows(device: torch.device, rounds: int) -> list[Row]:
    torch.manual_seed(0)
    model = TransfusionForCausalLMAndDiffusion(TransfusionConfig.from_preset("0.16B")).to(device)
    llama = LlamaForCausalLM(model.config.text_config).to(device)
    ids = torch.randint(5, 32000, (1, 512), device=device)
    steps = {
        "ours": train_step(model, lambda: model(input_ids=ids, labels=ids, use_cache=False).loss),
        "LlamaForCausalLM": train_step(llama, lambda: llama(input_ids=ids, labels=ids, use_cache=False).loss),
    }
    return compare("text alone, 0.16B", steps, 1.03, "1 row of 512 tokens, sdpa", rounds, device)


SMALL = TransfusionConfig(
    text_config=LlamaConfig(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        tie_word_embeddings=True,
    ),
    latent_channels=1,
    sample_size=8,
    patch_size=2,
    prediction_type="flow_prediction",
    image_start_token_id=317,
    image_token_id=318,
    image_end_token_id=319,
)


def compiled_rows(device: torch.device, rounds: int) -> list[Row]:
    """One graph of a training step by inductor, the optimizer apart, as the Trainer has it."""
    middle = copy.deepcopy(SMALL)
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16}
    middle.text_config.update({"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6, **heads})
    rows = []
    for label, config, (num_rows, num_words) in (("1M", SMALL, (32, 12)), ("20M", middle, (32, 12))):
        torch.manual_seed(0)
        model = TransfusionForCausalLMAndDiffusion(config).to(device)
        batch = with_latents(config, image_batch(config, num_rows, num_words, device), device)
        num_labels = int((batch["labels"][:, 1:] != -100).sum())
        batch["batch_counts"] = BatchCounts(num_labels, [num_rows])
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        steps = {
            "compiled": train_step(model, lambda compiled=compiled, batch=batch: compiled(**batch).loss),
            "not": train_step(model, lambda model=model, batch=batch: model(**batch).loss),
        }
        tokens, number = batch["input_ids"].numel(), sum(p.numel() for p in model.parameters())
        remark = f"{num_rows} rows of {num_words} words and 16 patches, {tokens} tokens; parameters {number:,}"
        rows += compare(f"text and images, {label}", steps, 1.0, remark, rounds, device)
    return rows


def with_latents(config: TransfusionConfig, batch: dict, device: torch.device) -> dict:
    num_images = int((batch["input_ids"] == config.image_start_token_id).sum())
    latents = torch.randn(num_images, config.latent_channels, *config.latent_size, device=device)
    return {**batch, "latents": latents, "use_cache": False}


def peak_bytes(run: Callable, device: torch.device) -> int:
    """Peak of what a run allocates on top of what was allocated before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def memory_rows(device: torch.device, rounds: int) -> list[Row]:
    """Forward and backward, with gradients and optimizer state allocated before."""
    text = TransfusionConfig.from_preset("0.16B").text_config.to_dict() | {"vocab_size": 128_256}
    tokens = {"image_start_token_id": 128_253, "image_token_id": 128_254, "image_end_token_id": 128_255}
    config = TransfusionConfig(text_config=LlamaConfig(**text), sample_size=32, patch_size=2, **tokens)
    torch.manual_seed(0)
    model = TransfusionForCausalLMAndDiffusion(config).to(device).train()
    batch = with_latents(config, image_batch(config, 8, 254, device), device)  # 4,096 tokens

    def step(**kwargs) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
        model(**batch, **kwargs).loss.backward()

    step()
    rows: list[Row] = []
    for name, checkpointing in (("", False), (", activation checkpointing", True)):
        model.activation_checkpointing_enable() if checkpointing else model.activation_checkpointing_disable()
        own, full = (peak_bytes(lambda skip=skip: step(skip_logits=skip), device) for skip in (True, False))
        remark = f"{own / 2**20:.0f} / {full / 2**20:.0f} MiB; 8 rows of 254 words and 256 patches, measured once"
        rows.append((f"memory, 0.16B, vocabulary of 128k{name}: own / all logits", [own / full], 0.6, remark))
    return rows


def peer_rows(device: torch.device, rounds: int) -> list[Row]:
    """Flow matching in both, with equal parameters and tokens; the peer adds a few tokens."""
    if importlib.util.find_spec("transfusion_pytorch") is None:
        print("transfusion-pytorch is not installed, so its rows are skipped: pip install -e '.[benchmark]'")
        return []
    large = TransfusionConfig.from_preset("0.16B", prediction_type="flow_prediction")
    small_peer = {"dim": 76, "depth": 4, "dim_head": 20, "heads": 4}
    large_peer = {"dim": 464, "depth": 16, "dim_head": 64, "heads": 8}
    return [
        *against_peer("1M", SMALL, small_peer, (32, 1, 12), device, rounds),
        *against_peer("0.16B", large, large_peer, (2, 1, 62), device, rounds),
        *against_peer("0.16B, long rows", large, large_peer, (1, 6, 62), device, rounds),
    ]


def against_peer(label, config, sizes, shape: tuple[int, int, int], device, rounds: int) -> list[Row]:
    """`shape`: rows, images in each, words before each image."""
    torch.manual_seed(0)
    model = TransfusionForCausalLMAndDiffusion(config).to(device)
    side, dim = config.latent_size[0] // config.patch_size, config.latent_channels * config.patch_size**2
    peer = make_peer(config, sizes, device)
    num_rows, num_images, num_words = shape
    batch = with_latents(config, image_batch(config, num_rows, num_words, device, num_images), device)
    patches = torch.randn(num_rows, num_images, side, side, dim, device=device)
    words = batch["input_ids"].unflatten(1, (num_images, -1))[:, :, :num_words]
    words = words.clamp(max=config.text_config.vocab_size - 135)
    samples = [[part for pair in zip(*row, strict=True) for part in pair] for row in zip(words, patches, strict=True)]

    ours = train_step(model, lambda: model(**batch).loss)
    theirs = train_step(peer, lambda: peer(samples))
    numbers = [sum(p.numel() for p in m.parameters()) for m in (model, peer)]
    tokens = [num_passes(m, run)[1] for m, run in ((model.model.language_model, ours), (peer.transformer, theirs))]
    remark = (
        f"rows: {num_rows}, in each {num_images} × ({num_words} words and {side * side} patches); parameters "
        f"{numbers[0]:,} / {numbers[1]:,}, tokens {tokens[0]:,} / {tokens[1]:,}"
    )
    return compare(
        f"text and images, {label}", {"ours": ours, "transfusion-pytorch": theirs}, 0.5, remark, rounds, device
    )


PARTS = {"text": text_rows, "compiled": compiled_rows, "memory": memory_rows, "peer": peer_rows}


def main() -> None:
    args = parse_arguments(__doc__, PARTS)
    rows = [row for part in args.parts for row in PARTS[part](args.device, args.rounds)]
    report("A training step", "train", table(rows), args)


if __name__ == "__main__":
    main()
