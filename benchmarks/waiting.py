"""
Where the host waits for the device, counted on a CPU: values that a step reads back, operations whose result has a
shape that depends on values, and the graphs and breaks of `torch.compile`. A GPU is not needed: what would wait there
is known by the operation.

    python benchmarks/waiting.py [--output_dir outputs/benchmarks]

On a GPU, `torch.cuda.set_sync_debug_mode("warn")` says where the real waits are.
"""

import argparse
import copy
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from ratios import image_batch, setting
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm
from transformers import LlamaConfig

from transfusion_hf import TransfusionConfig, TransfusionForCausalLMAndDiffusion
from transfusion_hf.diffusion_transfusion import BatchCounts
from transfusion_hf.masking_transfusion import make_packed_plan

aten = torch.ops.aten
# Their result is a number for Python, or its shape is.
WAITING = {
    aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten.bincount,
    aten.unique_consecutive, aten._unique2, aten.unique_dim, aten.repeat_interleave,
}  # fmt: skip
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}  # by a mask
COPYING = ("tolist", "cpu", "numpy")  # of CPU tensors, no operation that a dispatch mode sees


class ReadBacks(TorchDispatchMode):
    """
    Counts what waits for the device, by the line of this package that it comes from.

    Args:
        sources (*optional*): Tensors that lie on the device. Only what follows from them counts, not what the CPU
            keeps for itself, such as a scheduler's steps. `None`: everything counts.
    """

    def __init__(self, sources: Iterable[torch.Tensor] | None = None):
        super().__init__()
        self.found: Counter[str] = Counter()
        self.on_device: set[int] | None = None if sources is None else set()
        self.mark(sources or ())
        self.functions = _Copies(self)

    def mark(self, tensors: Any) -> None:
        if self.on_device is None:
            return
        for storage in {id(x.untyped_storage()): x.untyped_storage() for x in _tensors(tensors)}.values():
            if id(storage) not in self.on_device:
                self.on_device.add(id(storage))
                weakref.finalize(storage, self.on_device.discard, id(storage))

    def is_on_device(self, tensors: Any) -> bool:
        return self.on_device is None or any(id(x.untyped_storage()) in self.on_device for x in _tensors(tensors))

    def count(self, name: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if "transfusion_hf" in frame.filename]
        where = f"{Path(frames[-1].filename).name}: {frames[-1].line}" if frames else "outside"
        self.found[f"{name} in {where}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet, kwargs = func.overloadpacket, kwargs or {}
        is_on_device = self.is_on_device((args, kwargs))
        by_mask = packet in INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1])
        if is_on_device and (by_mask or (packet in WAITING and kwargs.get("output_size") is None)):
            self.count(str(packet))
        result = func(*args, **kwargs)
        if is_on_device:
            self.mark(result)
        return result

    def __enter__(self) -> "ReadBacks":
        self.functions.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.functions.__exit__(*error)


class _Copies(TorchFunctionMode):
    def __init__(self, read_backs: ReadBacks):
        super().__init__()
        self.read_backs = read_backs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in COPYING and self.read_backs.is_on_device(args):
            self.read_backs.count(func.__name__)
        return func(*args, **(kwargs or {}))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def read_backs(run: Callable[[], Any], sources: Iterable[torch.Tensor] | None = None) -> Counter[str]:
    """What one call waits for, after one that warms up."""
    run()
    with ReadBacks(sources) as counted:
        run()
    return counted.found


def small_model(attn_implementation: str = "sdpa", **kwargs: Any) -> TransfusionForCausalLMAndDiffusion:
    text = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    ids = {"image_start_token_id": 290, "image_token_id": 291, "image_end_token_id": 292}
    config = TransfusionConfig(text_config=text, latent_channels=4, sample_size=8, patch_size=2, **ids, **kwargs)
    model = TransfusionForCausalLMAndDiffusion(config)
    model.set_attn_implementation(attn_implementation)
    return model


def training_batch(
    model: TransfusionForCausalLMAndDiffusion,
    has_context: bool = False,
    num_rows: int = 2,
    num_words: int = 11,
    side: int = 8,
) -> dict[str, Any]:
    """Packed rows, each of two texts with an image of `side` latent pixels, as the collator makes them."""
    config = copy.copy(model.config)
    config.sample_size = side
    batch: dict[str, Any] = image_batch(config, num_rows, num_words, torch.device("cpu"), num_images=2)
    length, num_images = batch["input_ids"].shape[1], 2 * num_rows
    batch["position_ids"] = torch.arange(length).remainder(length // 2).expand(num_rows, -1)
    batch["latents"] = torch.randn(num_images, config.latent_channels, side, side)
    batch["max_timesteps"] = torch.full((num_images,), 500)
    batch["image_loss_mask"] = torch.tensor([True, not has_context] * num_rows)
    num_targets = int((batch["labels"][:, 1:] != -100).sum())
    batch["batch_counts"] = BatchCounts(num_targets, [int(batch["image_loss_mask"].sum())])
    if config.text_config._attn_implementation == "transfusion_varlen":
        ids, token_id = batch["input_ids"], config.image_token_id
        batch["varlen_plan"] = make_packed_plan(ids, batch["position_ids"], token_id)
    return {**batch, "check_inputs": False}  # as on a GPU


def training_step(model: TransfusionForCausalLMAndDiffusion, batch: dict[str, Any]) -> None:
    model.train()
    model(**batch).loss.backward()


def drawing_step(model: TransfusionForCausalLMAndDiffusion, **kwargs: Any) -> Counter[str]:
    """What a step of the denoising loop waits for: the difference of 6 steps and 3."""
    model.eval()
    ids = torch.tensor([[1, 7, 8, 9], [1, 5, 4, 3]])

    def found(num_steps: int) -> Counter[str]:
        options = {"num_inference_steps": num_steps, "image_guidance_scale": 3.0}
        options |= {"progress_bar": False, "pad_token_id": 0, **kwargs}
        with ReadBacks([*model.parameters(), ids]) as counted:
            model.generate(ids, attention_mask=torch.ones_like(ids), generation_mode="image", **options)
        return counted.found

    return found(6) - found(3)


def text_step(model: TransfusionForCausalLMAndDiffusion) -> Counter[str]:
    """What a token waits for: the difference of 6 new tokens and 3."""
    model.eval()
    ids = torch.tensor([[1, 7, 8, 9], [1, 5, 4, 3]])

    def found(num_tokens: int) -> Counter[str]:
        options = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "pad_token_id": 0}
        with ReadBacks([*model.parameters(), ids]) as counted:
            model.generate(ids, attention_mask=torch.ones_like(ids), generation_mode="text", **options)
        return counted.found

    return found(6) - found(3)


VARIANTS: dict[str, dict[str, Any]] = {
    "linear": {},
    "U-Net": {"patch_encoder": "unet", "unet_block_out_channels": [32, 32], "unet_norm_num_groups": 8},
    "untied": {"untied_modalities": ["image"]},
}
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")


def compiled_graphs(model: TransfusionForCausalLMAndDiffusion, num_batches: int = 50) -> tuple[int, int]:
    """Graphs and breaks of a compiled training step over batches of several sizes."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model.train(), dynamic=True, backend="eager")
    for i in tqdm(range(num_batches), desc="compile", leave=False):
        sizes = {"num_rows": 2 + i % 3, "num_words": 3 + 2 * i, "side": (8, 12, 16)[i % 3]}
        compiled(**training_batch(model, has_context=i % 4 == 3, **sizes)).loss.backward()
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmarks"))
    args = parser.parse_args()
    counts, graphs = [], []
    for attn_implementation in ("sdpa", "eager", "transfusion_varlen"):
        for name, options in VARIANTS.items():
            model = small_model(attn_implementation, **options)
            for has_context in (False, True):
                batch = training_batch(model, has_context)
                found = read_backs(lambda model=model, batch=batch: training_step(model, batch))
                remark = ", clean images as context" if has_context else ""
                counts.append((f"training, {attn_implementation}, {name}{remark}", found))
            if attn_implementation != "eager":
                what = f"{attn_implementation}, {name}"
                graphs.append(f"| {what} | {' | '.join(map(str, compiled_graphs(model)))} |")
    for scheduler in SCHEDULERS:
        steps = drawing_step(small_model(), scheduler=scheduler)
        counts.append((f"denoising, {scheduler}", Counter({name: n // 3 for name, n in steps.items()})))
    counts.append(("denoising, flow matching", drawing_step(small_model(prediction_type="flow_prediction"))))
    tokens = text_step(small_model())
    counts.append(("a token of text", Counter({name: n // 3 for name, n in tokens.items()})))
    lines = ["# What the host waits for", "", f"{setting(torch.device('cpu'))}, `python benchmarks/waiting.py`.", ""]
    lines += ["| step | values read back | where |", "|---|---|---|"]
    lines += [f"| {what} | {found.total()} | {'; '.join(f'`{name}`' for name in found)} |" for what, found in counts]
    lines += [
        "",
        "`torch.compile(model, dynamic=True)`, 50 batches of three sizes of images:",
        "",
    ]
    lines += ["| training step | graphs | breaks |", "|---|---|---|", *graphs]
    text = "\n".join(lines) + "\n"
    print(text)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "waiting.md").write_text(text)


if __name__ == "__main__":
    main()
