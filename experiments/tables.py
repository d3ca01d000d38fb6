"""
The paper's comparisons, one command a table:

    python experiments/tables.py table8

trains every row of the table with several seeds, measures it along the way, and writes `results/<table>.md` with a
plot of the curves. Runs that are done are kept, so that a second call goes on, and tables share their runs.

The tables are those of arXiv 2408.11039. The small scale needs two cores and the packages that `data.py` fetches;
`--scale paper` has the paper's sizes and steps, and needs GPUs.
"""

import argparse
import multiprocessing
import os
import shlex
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from data import Data
from metrics import Judge
from models import LEARNING_RATES, PAPER_SIZES, SMALL_SIZES
from report import AT_SCALES, METRICS, Claim, Table, keep_runs, write_figure5, write_table
from runs import Settings, run
from tqdm.auto import tqdm
from transformers.utils import logging

from transfusion_hf import TransfusionConfig


@dataclass(frozen=True)
class Scale:
    """The numbers in which two cores and a cluster differ. `data` and `judge` are fields of these classes."""

    sizes: tuple[str, ...]
    size: str  # of tables with one size
    max_steps: int
    tokens_per_step: int
    max_length: int
    learning_rates: dict[str, float]  # by family, and by front end where it has its own
    options: dict[str, Any] = field(default_factory=dict)  # of Transfusion
    num_measurements: int = 6
    gradient_accumulation_steps: int = 1
    # A picture has four times as many codes as patches. With this share of the steps, Chameleon has the FLOPs of
    # Transfusion.
    equal_flops: float = 0.54
    data: dict[str, Any] = field(default_factory=dict)
    judge: dict[str, Any] = field(default_factory=dict)


SCALES = {
    "small": Scale(
        tuple(SMALL_SIZES)[:3],
        "0.8M",
        max_steps=3000,
        tokens_per_step=1024,
        max_length=256,
        # The best of `sweep`, at this size.
        learning_rates={"llama": 2e-3, "chameleon": 3.2e-2, "transfusion": 4e-3, "unet": 1e-3},
        # Errors of ε at high noise are magnified in x_0, and latents are not clipped (docs/front_ends.md).
        options={"prediction_type": "v_prediction"},
    ),
    # For tests and CI: that everything runs.
    "toy": Scale(
        ("0.1M",),
        "0.1M",
        max_steps=4,
        tokens_per_step=256,
        max_length=128,
        learning_rates={"llama": 1e-3, "chameleon": 1e-3, "transfusion": 1e-3},
        num_measurements=2,
        data={"num_pictures": 64, "num_held_out": 16, "vae_steps": 2},
        judge={"num_texts": 2, "num_pictures": 4, "num_inference_steps": 2, "guidance_scales": (3.0, 5.0)},
    ),
    "paper": Scale(
        PAPER_SIZES,
        "0.76B",
        250_000,
        2_000_000,
        4096,
        LEARNING_RATES,
        num_measurements=10,
        gradient_accumulation_steps=125,
        equal_flops=0.42,
        data={"scale": "paper", "vocab_size": 32_000, "vae_steps": 1_000_000},
        judge={"num_inference_steps": 250},
    ),
}
# Four for each, moved by factors of two until the best one had neighbours on both sides.
SWEPT_LEARNING_RATES = {
    "llama": (1e-3, 2e-3, 4e-3, 8e-3),
    "chameleon": (8e-3, 1.6e-2, 3.2e-2, 6.4e-2),
    "transfusion": (1e-3, 2e-3, 4e-3, 8e-3),
    "unet": (5e-4, 1e-3, 2e-3, 4e-3),
}


IMAGES = ("captioned", "cider", "drawn", "frechet_distance")


def _row(scale: Scale, family: str = "transfusion", size: str | None = None, **kwargs: Any) -> Settings:
    rates, front_end = scale.learning_rates, kwargs.get("options", {}).get("patch_encoder")
    if family == "transfusion":
        options = {**scale.options, **kwargs.get("options", {})}
        # What is the default is left out, so that tables share the run.
        given = {name: value for name, value in options.items() if value != getattr(TransfusionConfig, name)}
        kwargs["options"] = {"patch_size": options.get("patch_size", 2), **given}
    return Settings(
        family,
        size or scale.size,
        rates.get(front_end, rates[family]),
        max_steps=scale.max_steps,
        tokens_per_step=scale.tokens_per_step,
        max_length=scale.max_length,
        num_measurements=scale.num_measurements,
        gradient_accumulation_steps=scale.gradient_accumulation_steps,
        **kwargs,
    )


def _transfusion(scale: Scale, size: str | None = None, **options: Any) -> Settings:
    return _row(scale, size=size, options=options)


def table3(scale: Scale) -> Table:
    rows = {}
    for size in scale.sizes:
        rows[f"Transfusion {size}"] = _transfusion(scale, size)
        rows[f"Chameleon {size}"] = _row(scale, "chameleon", size)
    equal = f"Chameleon {scale.size}, equal FLOPs"
    fewer = max(1, round(scale.equal_flops * scale.max_steps / scale.num_measurements)) * scale.num_measurements
    rows[equal] = replace(_row(scale, "chameleon"), max_steps=fewer)
    last = scale.sizes[-1]
    paper = {
        f"Transfusion {last}": {"perplexity": "7.72, 4.28", "cider": 27.2, "frechet_distance": 16.8},
        f"Chameleon {last}": {"perplexity": "8.41, 4.69", "cider": 18.0, "frechet_distance": 29.6},
    }
    metrics = (*METRICS, *AT_SCALES)
    claims = [Claim(f"Transfusion {size}", f"Chameleon {size}", metrics) for size in scale.sizes]
    claims.append(Claim(f"Transfusion {scale.size}", equal, metrics))
    return Table("Transfusion and Chameleon by size", rows, paper, claims)


def table4(scale: Scale) -> Table:
    stable = "+ stability changes"
    rows = {
        "Llama 2": _row(scale, "llama"),
        "+ diffusion (Transfusion)": _transfusion(scale),
        stable: _row(scale, "chameleon", with_images=False),
        "+ LM loss on image tokens (Chameleon)": _row(scale, "chameleon"),
    }
    values = ("10.1, 5.8", "10.4, 6.0", "11.0, 6.3", "11.8, 6.8")
    paper = {name: {"perplexity": value} for name, value in zip(rows, values, strict=True)}
    names = [*rows]
    claims = [Claim(names[i], names[j], ("perplexity",)) for i, j in ((0, 1), (0, 2), (2, 3), (1, 3))]
    return Table("Text alone", rows, paper, claims)


def table5(scale: Scale) -> Table:
    rows, paper = {}, {}
    values = ((12.7, 61.3), (16.0, 20.3), (23.3, 16.8), (25.4, 16.7))
    for encoder in ("linear", "unet"):
        for is_bidirectional in (False, True):
            name = f"{encoder}, {'bidirectional' if is_bidirectional else 'causal'}"
            rows[name] = _transfusion(scale, patch_encoder=encoder, bidirectional_image_attention=is_bidirectional)
            cider, frechet = values[len(paper)]
            paper[name] = {"cider": cider, "frechet_distance": frechet}
    claims = [Claim(f"{encoder}, bidirectional", f"{encoder}, causal", IMAGES) for encoder in ("linear", "unet")]
    claims += [Claim(f"unet, {order}", f"linear, {order}", IMAGES) for order in ("causal", "bidirectional")]
    return Table("Attention inside images", rows, paper, claims)


def table6(scale: Scale) -> Table:
    rows, paper = {}, {}
    values = {
        ("linear", 1): (12.0, 21.0), ("linear", 2): (16.0, 20.3), ("linear", 4): (14.3, 25.6),
        ("linear", 8): (11.3, 43.5), ("unet", 2): (25.4, 16.7), ("unet", 4): (29.9, 16.0), ("unet", 8): (29.5, 16.1),
    }  # fmt: skip
    for (encoder, size), (cider, frechet) in values.items():
        name = f"{encoder}, {size}×{size}"
        rows[name] = _transfusion(scale, patch_encoder=encoder, patch_size=size)
        paper[name] = {"cider": cider, "frechet_distance": frechet}
    claims = [Claim(f"unet, {size}×{size}", f"linear, {size}×{size}", IMAGES) for size in (2, 4, 8)]
    claims.append(Claim("linear, 2×2", "linear, 8×8", IMAGES))
    return Table("Patch sizes", rows, paper, claims)


def table7(scale: Scale) -> Table:
    rows, paper = {}, {}
    values = {
        "0.16B": (37.6, 18.8),
        "0.37B": (21.5, 18.1),
        "0.76B": (20.3, 16.7),
        "1.4B": (19.4, 16.6),
        "7B": (18.6, 16.0),
    }
    for size in scale.sizes:
        for i, encoder in enumerate(("linear", "unet")):
            rows[f"{encoder}, {size}"] = _transfusion(scale, size, patch_encoder=encoder)
            paper[f"{encoder}, {size}"] = {"frechet_distance": values[size][i]} if size in values else {}
    claims = [Claim(f"unet, {size}", f"linear, {size}", IMAGES) for size in scale.sizes]
    return Table("Front ends by size", rows, paper, claims)


def table8(scale: Scale) -> Table:
    limited = _transfusion(scale)
    rows = {"no limit": replace(limited, image_first_max_timesteps=1000), "t ≤ 500": limited}
    paper = {
        "no limit": {"cider": 25.4, "frechet_distance": 16.7},
        "t ≤ 500": {"cider": 29.4, "frechet_distance": 16.5},
    }
    claims = [Claim("t ≤ 500", "no limit", IMAGES)]
    return Table("Noise limit of images before their caption", rows, paper, claims)


def order(scale: Scale) -> Table:
    """The paper has 0.8, and no ablation."""
    rows = {
        f"caption first {share:g}": replace(_transfusion(scale), caption_first_probability=share)
        for share in (0.5, 1.0)
    }
    rows["caption first 0.8"] = _transfusion(scale)
    return Table("Order of captions and images", dict(sorted(rows.items())), {}, [])


def weight(scale: Scale) -> Table:
    """The paper has λ = 5, and no ablation."""
    rows = {f"λ = {weight:g}": _transfusion(scale, diffusion_loss_weight=weight) for weight in (1.0, 25.0)}
    rows["λ = 5"] = _transfusion(scale)
    return Table("Weight of the diffusion loss", {name: rows[name] for name in ("λ = 1", "λ = 5", "λ = 25")}, {}, [])


def steps(scale: Scale) -> Table:
    """Whether a claim of tables 3 to 5 depends on the number of steps."""
    once = {"Llama 2": _row(scale, "llama"), "Chameleon": _row(scale, "chameleon"), "Transfusion": _transfusion(scale)}
    once["U-Net"] = _transfusion(scale, patch_encoder="unet")
    once["Transfusion, causal"] = _transfusion(scale, bidirectional_image_attention=False)
    once["U-Net, causal"] = _transfusion(scale, patch_encoder="unet", bidirectional_image_attention=False)
    rows, claims = {}, []
    for num_steps in (scale.max_steps, 2 * scale.max_steps):
        names = {name: f"{name}, {num_steps:,} steps" for name in once}
        rows |= {names[name]: replace(row, max_steps=num_steps) for name, row in once.items()}
        claims += [
            Claim(names["Llama 2"], names["Transfusion"], ("perplexity",)),
            Claim(names["Transfusion"], names["Chameleon"], METRICS),
            Claim(names["U-Net"], names["Transfusion"], IMAGES),
            Claim(names["Transfusion"], names["Transfusion, causal"], IMAGES),
            Claim(names["U-Net"], names["U-Net, causal"], IMAGES),
        ]
    return Table("Number of steps", rows, {}, claims)


def recipes(scale: Scale) -> Table:
    """What is younger than the paper, or not of it: one change at a time."""
    base, unet = _transfusion(scale), _transfusion(scale, patch_encoder="unet")
    x_0 = {"prediction_type": "sample", "diffusion_loss_weighting": "v_prediction"}
    rows = {
        "default": base,
        "logit-normal t": _transfusion(scale, timestep_distribution="logit_normal"),
        "t shifted by 2": _transfusion(scale, train_timestep_shift=2.0),
        "min-SNR": _transfusion(scale, diffusion_loss_weighting="min_snr"),
        "x_0": _transfusion(scale, prediction_type="sample"),
        "x_0 with the loss of v": _transfusion(scale, **x_0),
        "image parts at half the rate": replace(base, image_learning_rate=base.learning_rate / 2),
        "unet": unet,
        "unet, transformer at the linear rate": replace(
            unet, learning_rate=base.learning_rate, image_learning_rate=unet.learning_rate
        ),
    }
    return Table("Other recipes", rows, {}, [])


def sweep(scale: Scale) -> Table:
    """As many learning rates for each family, and for the U-Net."""
    rows = {}
    for name, rates in SWEPT_LEARNING_RATES.items():
        row = _transfusion(scale, patch_encoder=name) if name == "unet" else _row(scale, name)
        rows |= {f"{name}, {rate:g}": replace(row, learning_rate=rate) for rate in rates}
    return Table("Learning rates", rows, {}, [])


TABLES: dict[str, Callable[[Scale], Table]] = {
    "table3": table3, "table4": table4, "table5": table5, "table6": table6, "table7": table7, "table8": table8,
    "order": order, "weight": weight, "steps": steps, "recipes": recipes, "sweep": sweep,
}  # fmt: skip


def folder_of(settings: Settings, output_dir: Path) -> Path:
    """The folder depends only on the settings, so tables can share runs."""
    parts = [settings.family, settings.size, f"{settings.max_steps}", f"{settings.learning_rate:g}"]
    defaults = {each.name: each.default for each in fields(Settings) if each.default is not MISSING}
    extra = {name: getattr(settings, name) for name in defaults if getattr(settings, name) != defaults[name]}
    parts += [f"{name}={value}" for name, value in sorted({**settings.options, **extra}.items()) if name != "seed"]
    return output_dir / "runs" / "-".join([*parts, f"seed{settings.seed}"])


def _take_device(devices: Any) -> None:
    """Prepares a process of the pool: one core, and one GPU if there are any."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # those of several runs would overwrite each other
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    device = devices.get()
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[device] if device < len(visible) and visible[0] else f"{device}"


def folders_of(table: Table, num_seeds: int, output_dir: Path) -> dict[str, list[Path]]:
    """The folders of each row's runs, by seed."""
    return {
        name: [folder_of(replace(settings, seed=seed), output_dir) for seed in range(num_seeds)]
        for name, settings in table.rows.items()
    }


def make_runs(
    tables: list[Table], num_seeds: int, data: Data, judge: Judge, output_dir: Path, num_processes: int
) -> None:
    """Makes the runs of the tables that are missing, `num_processes` at a time."""
    todo = {}
    for table in tables:
        for seed in range(num_seeds):  # all rows of a seed before the next
            for settings in table.rows.values():
                settings = replace(settings, seed=seed)
                todo[folder_of(settings, output_dir)] = settings
        _prepare(table, data, judge)
    if num_processes == 1 and torch.cuda.device_count() < 2:  # else the `Trainer` would take all GPUs
        for folder, settings in tqdm(todo.items(), desc="runs"):
            run(settings, data, judge, folder)
        return
    context = multiprocessing.get_context("spawn")
    devices = context.Queue()
    for i in range(num_processes):
        devices.put(i % max(1, torch.cuda.device_count()))
    with ProcessPoolExecutor(num_processes, context, _take_device, (devices,)) as pool:
        futures = {pool.submit(run, settings, data, judge, folder): folder for folder, settings in todo.items()}
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc="runs"):
                future.result()
        except BaseException as error:  # else those that have not started would run to their end first
            pool.shutdown(wait=False, cancel_futures=True)
            error.add_note(f"in {futures[future]}" if isinstance(error, Exception) else "Call again to go on.")
            raise


def kinds_of(table: Table) -> list[str]:
    """Kinds of the autoencoders that a table's models need."""
    return sorted({kind for row in table.rows.values() for kind in row.autoencoders})


def _prepare(table: Table, data: Data, judge: Judge) -> None:
    """What the runs share is computed once, before they start."""
    for split in ("train", "held_out"):
        data.passages(split, judge.max_length)
        data.captions(split)
        for kind in kinds_of(table):
            data.latents(split) if kind == "kl" else data.codes(split)
    judge.features  # noqa: B018


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=[*TABLES, "figure5", "all"])
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    parser.add_argument("--scale", choices=[*SCALES], default="small")
    parser.add_argument("--max_steps", type=int, help="default: the scale's")
    parser.add_argument("--num_processes", type=int, default=max(2, torch.cuda.device_count()), help="runs at a time")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/experiments"))
    parser.add_argument("--packages", type=Path, help="folder of the text packages; missing ones are installed there")
    parser.add_argument("--results_dir", type=Path, default=Path("experiments/results"))
    args = parser.parse_args(argv)
    if args.scale == "paper" and not torch.cuda.is_available():
        parser.error("--scale paper needs GPUs; this machine has none")
    for name in ("seeds", "num_processes"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1; got {getattr(args, name)}")
    scale = SCALES[args.scale]
    if args.max_steps is None:
        args.max_steps = scale.max_steps
    if args.max_steps < 1 or args.max_steps % scale.num_measurements:
        parser.error(f"--max_steps must be a multiple of {scale.num_measurements}; got {args.max_steps}")
    return args


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    scale = replace(SCALES[args.scale], max_steps=args.max_steps)
    names = [*TABLES, "figure5"] if args.table == "all" else [args.table]
    made = {name: TABLES["table3" if name == "figure5" else name](scale) for name in names}
    data = Data(args.output_dir, args.packages, **scale.data)
    judge = Judge(data, scale.max_length, **scale.judge)
    make_runs([*made.values()], args.seeds, data, judge, args.output_dir, args.num_processes)
    ceilings = {
        kind: data.ceiling(kind) for kind in sorted({kind for table in made.values() for kind in kinds_of(table)})
    }
    for name, table in made.items():
        words = [name if word == args.table else word for word in argv]
        command = f"python experiments/tables.py {shlex.join(words)}"
        folders = folders_of(table, args.seeds, args.output_dir)
        if name == "figure5":
            file = write_figure5(table, folders, args.results_dir, command)
        else:
            own = {kind: ceilings[kind] for kind in kinds_of(table)}
            file = write_table(name, table, folders, args.results_dir, command, own, judge.shown())
        keep_runs(folders, args.results_dir)
        print(file)


if __name__ == "__main__":
    main()
