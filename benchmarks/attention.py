"""
Compares attention backends on packed rows with image blocks: one layer, forward and forward + backward, and the
training step of a small model. All backends are timed in turn within each round.

    python benchmarks/attention.py [--tokens 2048] [--device cuda] [--output_dir benchmarks/results]

Prints a Markdown table of ratios (dense SDPA / backend: how many times faster) and writes it with a picture.
"""

import statistics
from collections.abc import Callable
from itertools import chain, zip_longest

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from ratios import in_turn, make_parser, median_and_range, quotients, setting
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward

from transfusion_hf import TransfusionConfig, TransfusionForCausalLMAndDiffusion, make_labels, varlen_kernels
from transfusion_hf.attention_transfusion import make_varlen_plan, transfusion_varlen_attention
from transfusion_hf.masking_transfusion import create_transfusion_mask, image_block_ids

BOI, IMG, EOI = 1, 2, 3


def layout(tokens: int, num_documents: int, num_images: int, patches: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and positions of one row of equal documents, with the images spread evenly over them."""
    length, images = tokens // num_documents, num_images // num_documents
    image = [BOI] + [IMG] * patches + [EOI]
    text = (length - images * len(image)) // (images + 1)
    document = ([9] * text + image) * images
    document += [9] * (length - len(document))
    ids = torch.tensor([document * num_documents])
    return ids, torch.arange(length).repeat(num_documents)[None]


def dense_mask(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The mask of Fig. 4 within each document, `(1, 1, tokens, tokens)`."""
    documents = (positions[0] == 0).cumsum(0)
    blocks = image_block_ids(ids, IMG)[0]
    order = torch.arange(ids.shape[1])
    causal = order[:, None] >= order[None]
    same_image = (blocks[:, None] == blocks[None]) & (blocks[:, None] >= 0)
    return ((causal | same_image) & (documents[:, None] == documents[None]))[None, None]


def layer_runs(ids, positions, heads: int, dim: int, device, dtype, backward: bool) -> dict[str, Callable[[], object]]:
    tokens = ids.shape[1]
    query, key, value = (torch.randn(1, heads, tokens, dim, device=device, dtype=dtype) for _ in range(3))
    inputs = [states.requires_grad_(backward) for states in (query, key, value)]
    grad = torch.randn(1, tokens, heads, dim, device=device, dtype=dtype)
    mask = dense_mask(ids, positions).to(device)
    documents, ones = (positions == 0).cumsum(-1), torch.ones(1, tokens)
    plan = make_varlen_plan(ones, tokens, image_block_ids(ids, IMG), documents, device)
    causal = make_varlen_plan(ones, tokens, None, documents, device)

    def finish(output):
        return torch.autograd.grad(output, inputs, grad) if backward else output

    def through_transformers(name):
        config = LlamaConfig(hidden_size=heads * dim, num_attention_heads=heads, attn_implementation=name)
        layer, interface = (
            LlamaAttention(config, 0),
            ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward),
        )
        embeds, blocks = torch.empty(1, tokens, 0, device=device, dtype=dtype), image_block_ids(ids, IMG).to(device)
        prepared = create_transfusion_mask(config, embeds, blocks, None, None, positions.to(device))
        return lambda: finish(interface(layer, *inputs, prepared, scaling=dim**-0.5)[0])

    def dense(backend):
        with sdpa_kernel(backend):
            output = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask)
        return finish(output.transpose(1, 2))

    def varlen(chosen):
        return finish(transfusion_varlen_attention(None, *inputs, None, varlen_plan=chosen)[0])

    runs: dict[str, Callable[[], object]] = {}
    if device.type == "cuda":
        runs["dense, memory-efficient"] = lambda: dense(SDPBackend.EFFICIENT_ATTENTION)
        runs["dense, cuDNN"] = lambda: dense(SDPBackend.CUDNN_ATTENTION)
    else:
        runs["dense"] = lambda: dense([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
    runs["eager"] = through_transformers("eager")
    if device.type == "cuda" or not backward:  # no backward pass on the CPU
        runs["flex_attention"] = through_transformers("flex_attention")
    runs["transfusion_varlen"] = lambda: varlen(plan)
    runs["causal alone, same kernel"] = lambda: varlen(causal)
    return runs


def model_runs(ids, positions, device, dtype) -> dict[str, Callable[[], object]]:
    """Training steps of a model of about 20M parameters, without optimizer."""
    config = TransfusionConfig(
        text_config=LlamaConfig(
            vocab_size=4096, hidden_size=512, intermediate_size=1536, num_hidden_layers=5, num_attention_heads=8
        ),
        image_start_token_id=BOI,
        image_token_id=IMG,
        image_end_token_id=EOI,
    )
    model = TransfusionForCausalLMAndDiffusion(config).to(device, dtype).train()
    num_images = int((ids == BOI).sum())
    side = 2 * int(((ids == IMG).sum() // num_images) ** 0.5)
    features = {
        "input_ids": ids.to(device),
        "position_ids": positions.to(device),
        "labels": make_labels(ids, torch.ones_like(ids), BOI, IMG, EOI).to(device),
        "latents": torch.randn(num_images, config.latent_channels, side, side, device=device),
    }

    def step(backend):
        model.set_attn_implementation(backend)
        model.zero_grad()
        model(**features).loss.backward()

    backends = ["sdpa", "eager", *(["flex_attention"] if device.type == "cuda" else []), "transfusion_varlen"]
    return {name: lambda name=name: step(name) for name in backends}


def table(rows: list[tuple[str, dict[str, list[float]]]]) -> tuple[str, list[tuple[str, str, float]]]:
    """The time of a layout's first backend over that of each, as the median over rounds."""
    lines, ratios = ["| layout | backend | first / this, median | min–max | median ms |", "|---|---|---|---|---|"], []
    for label, seconds in rows:
        first = next(iter(seconds.values()))
        for name, own in seconds.items():
            speedups, milliseconds = quotients(first, own), 1e3 * statistics.median(own)
            lines.append(f"| {label} | {name} | {median_and_range(speedups, 2)} | {milliseconds:.1f} |")
            ratios.append((label, name, statistics.median(speedups)))
    return "\n".join(lines), ratios


def make_figure(ratios: list[tuple[str, str, float]]) -> plt.Figure:
    """A panel for each layout, forward above forward + backward; `transfusion_varlen` stands out."""
    layouts: dict[str, dict[str, float]] = {}
    for label, name, value in ratios:
        layouts.setdefault(label, {})[name] = value
    rows = [[label for label in layouts if label.endswith("backward") == backward] for backward in (False, True)]
    size = {"figsize": (16, 5.5), "layout": "constrained"}
    figure, axes = plt.subplots(2, max(map(len, rows)), sharex=True, squeeze=False, **size)
    for axis, label in chain(*map(zip_longest, axes, rows)):
        if label is None:
            axis.remove()
            continue
        names, values = zip(*layouts[label].items(), strict=True)
        bars = axis.barh(names, values, color=["tab:purple" if "transfusion" in name else "silver" for name in names])
        axis.axvline(1, color="k", linewidth=0.8, zorder=0)
        axis.bar_label(bars, fmt="%.2f", padding=3, bbox={"facecolor": "w", "edgecolor": "none", "pad": 0.5})
        axis.invert_yaxis()
        axis.set_title(label.replace(", forward", "\nforward"), fontsize=10)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("times as fast as the first bar of the panel; longer is faster", fontsize=10)
    return figure


def main() -> None:
    parser = make_parser(__doc__, rounds=7, device="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, help="per row; default 4096 on CUDA, 2048 on the CPU")
    parser.add_argument("--heads", type=int, help="default 32 on CUDA, 8 on the CPU")
    parser.add_argument("--dim", type=int, help="of a head; default 128 on CUDA, 64 on the CPU")
    args = parser.parse_args()
    device, is_cuda = args.device, args.device.type == "cuda"
    dtype = torch.bfloat16 if is_cuda else torch.float32
    tokens, heads, dim = (
        args.tokens or (2048, 4096)[is_cuda],
        args.heads or (8, 32)[is_cuda],
        args.dim or (64, 128)[is_cuda],
    )
    torch.manual_seed(0)

    rows = []
    for num_documents in (1, 4, 8):
        ids, positions = layout(tokens, num_documents, num_images=8, patches=tokens // 16)
        for backward in (False, True):
            label = f"layer, {num_documents} × {tokens // num_documents}, forward{' + backward' if backward else ''}"
            runs = layer_runs(ids, positions, heads, dim, device, dtype, backward)
            rows.append((label, in_turn(runs, args.rounds, device, label)))
    ids, positions = layout(tokens, 4, num_images=4, patches=256)
    label = f"20M model, 4 × {tokens // 4}, forward + backward"
    rows.append((label, in_turn(model_runs(ids, positions, device, dtype), args.rounds, device, label)))

    body, ratios = table(rows)
    text = (
        f"# Attention\n\n{setting(device)}, {dtype}, {heads} heads of {dim}, {tokens} tokens; layers with 8 images of "
        f"{tokens // 16} patches, the model with 4 of 256; kernels {varlen_kernels()}.\n\n{body}\n"
    )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / f"attention_{device.type}.md").write_text(text)
    make_figure(ratios).savefig(args.output_dir / f"attention_{device.type}.png", dpi=100)
    print(text)


if __name__ == "__main__":
    main()
