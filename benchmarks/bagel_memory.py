"""
How much memory BAGEL-7B-MoT takes, in training with LoRA and in drawing, worked out without a GPU: the model lives on
the meta device, its real forward and backward pass run without numbers, and every storage counts while it is alive.
Nothing here is measured on a device. Kernels' workspaces, the allocator's gaps and the CUDA context (about 1 GiB) come
on top.

    python benchmarks/bagel_memory.py [--output_dir outputs/benchmarks]
"""

import argparse
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from transfusion_hf import TransfusionForCausalLMAndDiffusion
from transfusion_hf.conversion.bagel import bagel_config
from transfusion_hf.diffusion_transfusion import sum_cross_entropy_
from transfusion_hf.modality_transfusion import ModalityRouter

GIB = 2**30
LLM = {
    "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4,
}  # fmt: skip
VIT = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27,
    "patch_size": 14, "model_type": "siglip_vision_model",
}  # fmt: skip
# Of FLUX. Its attention in the middle sees 128² positions of a picture of 1024².
VAE = {
    "latent_channels": 16, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159,
}  # fmt: skip
TEXT, PATCHES, SEEN, MARKERS = 64, 64 * 64, 70 * 70, 2  # of a caption and of a picture of 1024², 980² when it is seen
DRAWING = TEXT + PATCHES + MARKERS
EDIT = DRAWING + PATCHES + MARKERS + SEEN + MARKERS
CARDS = (16, 24, 32, 40, 48, 80, 141)


class PeakMemory(TorchDispatchMode):
    """Most bytes at a time of the storages that are made within it."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = self._storages((args, kwargs))
        for key, storage in self._storages(result).items():
            if key not in given and key not in self.known:
                self.known.add(key)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._forget, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _storages(self, tree: Any) -> dict[int, Any]:
        storages = [leaf.untyped_storage() for leaf in tree_leaves(tree) if torch.is_tensor(leaf)]
        return {id(storage): storage for storage in storages}

    def _forget(self, key: int, num_bytes: int) -> None:
        self.known.discard(key)
        self.now -= num_bytes


def peak(run: Callable[[], Any]) -> int:
    with PeakMemory() as memory:
        run()
    return memory.peak


def num_bytes(*modules: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


def bagel() -> TransfusionForCausalLMAndDiffusion:
    ids = {"image_start_token_id": 1, "image_token_id": 2, "image_end_token_id": 3, "vision_token_id": 4}
    with torch.device("meta"):
        config = bagel_config(LLM, VIT, 64, 70, vae_config=VAE, **ids)
        model: Any = TransfusionForCausalLMAndDiffusion._from_config(config, dtype=torch.bfloat16)
    model.set_attn_implementation("kernel_on_meta")
    model.vae.float()  # as `from_pretrained` keeps it
    return model


def attend(module: nn.Module, query: Any, key: Any, value: Any, *_: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """Keeps what `transfusion_varlen` keeps for the backward pass: queries, keys, values, output and its lse."""
    key, value = (each.repeat_interleave(module.num_key_value_groups, dim=1) for each in (key, value))
    output = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, is_causal=True)[0]
    return output.transpose(1, 2), None


AttentionInterface.register("kernel_on_meta", attend)


def decode(model: TransfusionForCausalLMAndDiffusion, batch: int, num_tokens: int, num_image_tokens: int) -> Any:
    """The decoder's output for a batch."""
    states = torch.zeros(batch, num_tokens, 3584, dtype=torch.bfloat16, device="meta")
    is_image = torch.zeros(batch, num_tokens, dtype=torch.bool, device="meta")
    router = ModalityRouter("qwen3", states.shape[:2], is_image, batch * num_image_tokens)
    output = model.model.language_model(
        inputs_embeds=states.requires_grad_(torch.is_grad_enabled()),
        attention_mask={"full_attention": None},
        position_ids=torch.zeros(batch, num_tokens, dtype=torch.long, device="meta"),
        modality_router=router,
        use_cache=False,
    )
    return output.last_hidden_state


def learn(model: TransfusionForCausalLMAndDiffusion, num_tokens: int) -> None:
    """Forward and backward of one row, with both losses."""
    states = decode(model, 1, num_tokens, PATCHES * (num_tokens // DRAWING))[0]
    labels = torch.zeros(TEXT, dtype=torch.long, device="meta")
    text = sum_cross_entropy_(model.lm_head(states[:TEXT]), labels)
    (predictions,) = model.model.patch_decoder([states[None, :PATCHES]], [(128, 128)], None)
    (text + predictions.float().square().mean()).backward()


def smallest(num: float) -> str:
    """The smallest card with a tenth to spare."""
    return next((f"{card} GiB" for card in CARDS if num <= 0.9 * card * GIB), "none")


def gib(num: float) -> str:
    return f"{num / GIB:.1f}"


def training_table() -> list[str]:
    model = bagel()
    frozen = num_bytes(model)
    pattern = r".*\.image\.(self_attn|mlp)\.\w+_proj"
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules=pattern))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    # Weights, gradients and both moments of AdamW.
    lora = 4 * sum(p.numel() * p.element_size() for p in trained)
    language_model = model.model.language_model
    layer = num_bytes(language_model.layers[0])
    rest = num_bytes(adapted) - layer * len(language_model.layers)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    adapted.train()
    learn(model, DRAWING)  # from now on there are gradients, which are in `lora`
    activations = {name: peak(lambda n=n: learn(model, n)) for name, n in (("drawing", DRAWING), ("edit", EDIT))}
    lines = [
        f"LoRA of rank 16 on the image's projections, {sum(p.numel() for p in trained) / 1e6:.1f}M weights in "
        "float32; the others in bfloat16, frozen; activation checkpointing; one row a GPU: a caption and a picture "
        f"of 1024² ({DRAWING:,} positions), or an edit of such a picture ({EDIT:,}).",
        "",
        "| GPUs (FSDP2) | weights | gathered | LoRA, gradients, AdamW | activations, drawing | edit "
        "| sum, drawing | card | sum, edit | card |",
        "|---" * 10 + "|",
    ]
    needed: dict[int, list[float]] = {}
    for num_gpus in (1, 2, 4, 8):
        # FSDP2 gathers a layer while the one before it computes, and keeps what is outside of the layers.
        gathered = 0 if num_gpus == 1 else 2 * layer + rest
        fixed = frozen / num_gpus + gathered + lora / num_gpus
        needed[num_gpus] = sums = [fixed + each for each in activations.values()]
        cells = [frozen / num_gpus, gathered, lora / num_gpus, *activations.values()]
        ends = [cell for each in sums for cell in (gib(each), smallest(each))]
        lines.append(f"| {num_gpus} | " + " | ".join([*map(gib, cells), *ends]) + " |")
    lines += ["", "| size of a GPU | GPUs for a drawing | for an edit |", "|---|---|---|"]
    for card in CARDS:
        fewest = [
            next((str(n) for n, sums in needed.items() if sums[i] <= 0.9 * card * GIB), "more than 8") for i in (0, 1)
        ]
        lines.append(f"| {card} GiB | {' | '.join(fewest)} |")
    return [*lines, ""]


def drawing_table() -> list[str]:
    model = bagel().eval()
    layers = [*model.model.language_model.layers]
    linear = sum(m.weight.numel() for each in layers for m in each.modules() if isinstance(m, nn.Linear))
    outside = num_bytes(model) - num_bytes(*layers)
    config = model.config.text_config
    a_token = 2 * 2 * config.num_key_value_heads * config.head_dim * len(layers)  # keys and values in bfloat16
    with torch.no_grad():
        # A row counts once for each context of guidance; the keys and values of each context are kept.
        step, edit = (
            contexts * length * a_token + peak(lambda contexts=contexts: decode(model, contexts, DRAWING, PATCHES))
            for contexts, length in ((2, DRAWING), (3, EDIT))
        )
        decoded = peak(lambda: model.vae.decode(torch.zeros(1, 16, 128, 128, device="meta")))
    whole, largest = num_bytes(model), max(map(num_bytes, layers))
    four_bits = whole - 2 * linear + linear * (0.5 + 4 / 32)  # with a scale and an offset for each 32
    rows = {
        "bfloat16": whole,
        "both halves in 4 bits, groups of 32": four_bits,
        "bfloat16, layers on the CPU or disk, one at a time on the GPU": outside + largest,
    }
    lines = [
        f"One drawing of 1024² with guidance by the text: a step takes {gib(step)} GiB beside the weights, with the "
        f"keys and values of both contexts; one of an edit, with three contexts, {gib(edit)}; the decoding by the "
        f"autoencoder in float32 {gib(decoded)} (less with `model.vae.enable_tiling()`).",
        "",
        "| weights on the GPU | GiB | with the step | card | with that of an edit | card | with the decoding | card |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, weights in rows.items():
        ends = [cell for each in (step, edit, decoded) for cell in (gib(weights + each), smallest(weights + each))]
        lines.append(f"| {name} | {gib(weights)} | {' | '.join(ends)} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmarks"))
    args = parser.parse_args()
    lines = ["# Memory of BAGEL-7B-MoT", "", "Computed by `benchmarks/bagel_memory.py`, not measured; in GiB.", ""]
    text = "\n".join([*lines, *training_table(), *drawing_table()])
    print(text)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "bagel_memory.md").write_text(text)


if __name__ == "__main__":
    main()
