"""
Trains a Transfusion from scratch by the paper's recipe (§4.1, arXiv 2408.11039): AdamW (0.9, 0.95, 1e-8), a learning
rate of 3e-4 after 4,000 steps of warm-up that falls to 1.5e-5 by a cosine, weight decay 0.1 except on norms and
biases, gradients clipped at 1, rows of 4,096 tokens, λ = 5, equal numbers of tokens of text and of captioned images.

    transfusion train --preset 0.16B --tokenizer_name TOKENIZER --vae_name_or_path VAE --caption_dataset pictures \\
        --output_dir outputs/train
    transfusion train recipe.yaml --max_steps 100

A YAML file holds the same arguments, `preset: 0.16B`; arguments behind the file win. On several processes
`torchrun --nproc_per_node 8 examples/train.py` takes the same.

Without `--text_dataset` it trains on captioned images alone. To start from a language model, convert it with
`conversion/convert_causal_lm.py` and train with `--model_name_or_path MODEL --training_plan image_parts`, then with
`image_weights`, then with `all`, each time from the last output. `--config_overrides
hidden_size=256,num_hidden_layers=4` makes small models. All arguments of transformers' `TrainingArguments` are taken;
`--resume_from_checkpoint true` continues a run.
"""

import argparse
import ast
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments, set_seed
from transformers.distributed import DistributedConfig

from ..configuration_transfusion import TransfusionConfig, latent_channels_and_scale
from ..conversion.new_model import new_transfusion
from ..data.collator import TransfusionDataCollator
from ..data.dataset import TransfusionDataset, load_rows
from ..data.mixing import mix_by_tokens
from ..modeling_transfusion import TransfusionForCausalLMAndDiffusion
from ..processing_transfusion import TransfusionProcessor
from ..training.callbacks import TransfusionEMACallback, TransfusionSamplesCallback
from ..training.checkpoints import resume_from
from ..training.plans import set_trainable
from ..training.trainer import TransfusionTrainer
from ..vae.attach import load_autoencoder


@dataclass
class ModelArguments:
    tokenizer_name: str | None = field(default=None, metadata={"help": "For a new model: a folder or a repository."})
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A Transfusion to continue from. Its configuration replaces the arguments below."},
    )
    training_plan: str = field(default="all", metadata={"help": "'image_parts', 'image_weights' or 'all'."})
    preset: str = field(default="0.16B", metadata={"help": "One of the paper's sizes: 0.16B, 0.37B, 0.76B, 1.4B, 7B."})
    config_overrides: str = field(default="", metadata={"help": "Fields of the decoder's configuration: 'a=1,b=2'."})
    vae_name_or_path: str | None = field(default=None, metadata={"help": "An autoencoder; default: pixels."})
    sample_size: int = field(default=256, metadata={"help": "Height and width; images are cropped and resized."})
    patch_size: int = field(default=2, metadata={"help": "Side of a patch in latent pixels: 1, 2, 4 or 8."})
    patch_encoder: str = field(default="linear", metadata={"help": "'linear' or 'unet'."})
    prediction_type: str = field(default="epsilon", metadata={"help": "'v_prediction', 'flow_prediction' …"})
    diffusion_loss_weight: float = field(default=5.0, metadata={"help": "λ of Eq. 4."})
    diffusion_loss_weighting: str | None = field(default=None, metadata={"help": "'min_snr' or 'v_prediction'."})
    timestep_distribution: str = field(default="uniform", metadata={"help": "Of t in training; or 'logit_normal'."})
    train_timestep_shift: float = field(default=1.0, metadata={"help": "Above 1: more noise in training."})
    attn_implementation: str = field(default="transfusion_varlen", metadata={"help": "Or 'sdpa', 'flex_attention'."})


@dataclass
class DataArguments:
    caption_dataset: str = field(
        metadata={"help": "A folder of pictures, files (a pattern) or a repository of the Hub."}
    )
    text_dataset: str | None = field(default=None, metadata={"help": "The same for text."})
    image_column: str = "image"
    caption_column: str = "text"
    text_column: str = "text"
    streaming: bool = False
    image_share: float = field(default=0.5, metadata={"help": "Share of captioned images in the tokens."})
    max_length: int = field(default=4096, metadata={"help": "Tokens of a packed row."})
    caption_first_probability: float = field(default=0.8, metadata={"help": "Otherwise the image comes first (§3)."})
    caption_dropout: float = 0.1


@dataclass
class PaperTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of §4.1."""

    learning_rate: float = 3e-4
    lr_scheduler_type: str = "cosine_with_min_lr"
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(default_factory=lambda: {"min_lr": 1.5e-5})
    warmup_steps: float = 4000
    max_steps: int = 250_000
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    save_steps: float = 5000
    logging_steps: float = 50
    remove_unused_columns: bool = False
    ddp_find_unused_parameters: bool | None = False
    dataloader_num_workers: int = 1  # read and collate during a step
    image_learning_rate: float | None = field(
        default=None, metadata={"help": "Of patch encoder, patch decoder and image weights; default: learning_rate."}
    )
    ema_decay: float | None = field(default=None, metadata={"help": "Average the weights, for example with 0.9999."})
    peak_flops_per_second: float | None = field(
        default=None, metadata={"help": "Peak of one device, for `mfu` in the logs; an H100 in bfloat16: 989e12."}
    )
    sample_prompts: str = field(default="", metadata={"help": "Captions to draw while training, split at '|'."})
    sample_steps: int = field(default=5000, metadata={"help": "Training steps between samples."})
    tp_size: int = field(default=1, metadata={"help": "Tensor parallelism: processes that share each layer."})


def parse_overrides(text: str) -> dict[str, Any]:
    """Reads `"a=1,b=x"` as `{"a": 1, "b": "x"}`."""
    overrides: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, separator, value = part.partition("=")
        if not separator:
            raise ValueError(f"`config_overrides` must be 'name=value' pairs separated by commas; got {part!r}.")
        try:
            overrides[name.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            overrides[name.strip()] = value
    return overrides


def build_model(args: ModelArguments) -> tuple[Any, TransfusionProcessor]:
    vae = None if args.vae_name_or_path is None else load_autoencoder(args.vae_name_or_path)
    factor = 1 if vae is None else latent_channels_and_scale(vae.config)[1]
    if args.sample_size % factor:
        raise ValueError(
            f"`sample_size` must be a multiple of {factor} with this autoencoder; got {args.sample_size}."
        )
    preset = TransfusionConfig.from_preset(args.preset).text_config
    overrides = parse_overrides(args.config_overrides)
    unknown = [name for name in overrides if not hasattr(preset, name)]
    if unknown:
        raise ValueError(f"`config_overrides` names unknown fields of the decoder's config: {', '.join(unknown)}.")
    decoder = TransfusionConfig.from_preset(args.preset, text_config=overrides).text_config
    return new_transfusion(
        args.tokenizer_name,
        decoder if overrides else args.preset,
        vae,
        attn_implementation=args.attn_implementation,
        sample_size=args.sample_size // factor,
        patch_size=args.patch_size,
        patch_encoder=args.patch_encoder,
        prediction_type=args.prediction_type,
        diffusion_loss_weight=args.diffusion_loss_weight,
        diffusion_loss_weighting=args.diffusion_loss_weighting,
        timestep_distribution=args.timestep_distribution,
        train_timestep_shift=args.train_timestep_shift,
    )


def load_model(args: ModelArguments) -> tuple[Any, TransfusionProcessor]:
    if (args.model_name_or_path is None) == (args.tokenizer_name is None):
        raise ValueError("Pass either `tokenizer_name` (a new model) or `model_name_or_path` (continue from one).")
    if args.model_name_or_path is None:
        return build_model(args)
    model = TransfusionForCausalLMAndDiffusion.from_pretrained(
        args.model_name_or_path, dtype=torch.float32, attn_implementation=args.attn_implementation
    )
    return model, TransfusionProcessor.from_pretrained(args.model_name_or_path)


def split_model(model: Any, tp_size: int, args: TrainingArguments) -> Any:
    """Spreads each layer over `tp_size` processes. transformers splits a model only when it loads it."""
    if args.world_size % tp_size:
        raise ValueError(f"`tp_size` must divide the number of processes, {args.world_size}; got {tp_size}.")
    folder = Path(args.output_dir, "_initial")
    with args.main_process_first(local=False):
        if args.process_index == 0:
            model.save_pretrained(folder)
    config = DistributedConfig(tp_size=tp_size, fsdp_size=args.world_size // tp_size)
    attn_implementation = model.config.text_config._attn_implementation
    return type(model).from_pretrained(folder, distributed_config=config, attn_implementation=attn_implementation)


def build_dataset(args: DataArguments, processor: TransfusionProcessor, seed: int) -> Any:
    kwargs = {"shuffle": True, "seed": seed, "image_token": processor.image_token}
    captions = TransfusionDataset.from_captions(
        load_rows(args.caption_dataset, args.streaming),
        image_column=args.image_column,
        caption_column=args.caption_column,
        **kwargs,
    )
    sources, ratios = [captions], [1.0]
    if args.text_dataset is not None:
        text = TransfusionDataset.from_text(
            load_rows(args.text_dataset, args.streaming), text_column=args.text_column, **kwargs
        )
        sources, ratios = [text, captions], [1 - args.image_share, args.image_share]
    # `max_steps` sets the length of the training.
    return mix_by_tokens(sources, processor, ratios=ratios, stopping_strategy="never")


def read_arguments(file: str) -> list[str]:
    """The arguments in a YAML file, as on the command line, which checks their names and types."""
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold lines such as `max_steps: 1000`; got {type(values).__name__}.")
    arguments: list[str] = []
    for name, value in values.items():
        if isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        elif value is not None:
            arguments.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return arguments


def main(argv: Sequence[str] | None = None) -> TransfusionTrainer:
    """Trains, saves, and prints where and what to run next."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0].endswith((".yaml", ".yml")):
        argv = [*read_arguments(argv[0]), *argv[1:]]
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, PaperTrainingArguments),
        prog="transfusion train",
        usage="transfusion train [FILE.yaml] --caption_dataset DATA --output_dir FOLDER [--OPTION VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model_args, data_args, training_args = parser.parse_args_into_dataclasses(argv)
    set_seed(training_args.seed)
    model, processor = load_model(model_args)
    num_tokens = model.config.num_patches(*model.config.latent_size) + 2  # <BOI>, <EOI>
    if num_tokens > data_args.max_length:
        raise ValueError(
            f"`max_length` is {data_args.max_length}, and an image has {num_tokens} tokens; pass an autoencoder in "
            "`vae_name_or_path`, a smaller `sample_size`, or a larger `patch_size` or `max_length`."
        )
    if training_args.tp_size > 1:
        model = split_model(model, training_args.tp_size, training_args)
    set_trainable(model, model_args.training_plan)
    decay = training_args.ema_decay
    trainer = TransfusionTrainer(
        model,
        training_args,
        train_dataset=build_dataset(data_args, processor, training_args.seed),
        data_collator=TransfusionDataCollator(
            processor,
            caption_first_probability=data_args.caption_first_probability,
            caption_dropout=data_args.caption_dropout,
            num_train_timesteps=model.config.num_train_timesteps,
            max_length=data_args.max_length,
            truncation=True,
        ),
        callbacks=[] if decay is None else [TransfusionEMACallback(decay=decay)],
        peak_flops_per_second=training_args.peak_flops_per_second,
        image_learning_rate=training_args.image_learning_rate,
    )
    if training_args.sample_prompts:
        prompts = training_args.sample_prompts.split("|")
        trainer.add_callback(
            TransfusionSamplesCallback(trainer, processor, prompts, interval=training_args.sample_steps)
        )
    trainer.train(resume_from_checkpoint=resume_from(training_args))
    trainer.save_model()
    trainer.create_model_card()
    if training_args.process_index == 0:
        folder, prompt = training_args.output_dir, training_args.sample_prompts.split("|")[0] or "…"
        print(f"Saved in {folder}. Draw from it:\n    {shlex.join(['transfusion', 'draw', folder, prompt])}")
    return trainer
