"""Every block of README and docs runs as printed, a page from top to bottom, with small things under its names."""

import ast
import builtins
import importlib
import io
import itertools
import os
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tiny
import torch
import transformers
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from datasets import Dataset
from diffusers import AutoencoderKL
from hub_server import running_hub
from make_tiny_transfusion import byte_tokenizer
from PIL import Image
from torch.distributed.run import get_args_parser
from transformers import (
    AutoModelForMultimodalLM,
    AutoProcessor,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
)

import transfusion_command
from transfusion_hf import (
    TransfusionDataCollator,
    TransfusionPipeline,
    TransfusionTrainer,
    configuration_transfusion,
    new_transfusion,
)
from transfusion_hf.cli import evaluate, train
from transfusion_hf.conversion.causal_lm import convert_causal_lm
from transfusion_hf.hub.card import make_model_card

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / folder) for folder in ("examples", "conversion", "experiments")]
import convert_bagel  # noqa: E402
import emoji_data  # noqa: E402
import export_bagel  # noqa: E402
import fashion_mnist  # noqa: E402
import tables  # noqa: E402
import train_vae  # noqa: E402

TINY = ROOT / "tests" / "fixtures" / "tiny-transfusion"
PAGES = {
    file.relative_to(ROOT).as_posix(): file.read_text()
    for pattern in ("*.md", "conversion/*.md", "docs/*.md", "model_cards/*.md")
    for file in sorted(ROOT.glob(pattern))
}
PAGES["a card of the package"] = str(make_model_card(tiny.config(), "someone/digits"))

(CAPTIONS,) = re.findall(r"^```text\n(.*?)^```", PAGES["docs/pictures.md"], re.MULTILINE | re.DOTALL)

# Blocks and commands that are only read, by a piece of them, and why. All others run.
NOT_RUN = {
    "distributed_config=DistributedConfig(tp_size=8)": "8 processes; test_processes.py has two",
    "--tp_size 8": "8 processes; test_processes.py has two",
    "examples/train_vae.py --train_dir photos": "the weights of VGG-16 and of MoCo; test_train_vae.py makes its own",
    **dict.fromkeys(
        ("outputs/bagel", "make the apple green", "a chess game of two robots"),
        "29 GB of weights; test_bagel_conversion.py does the same with tiny ones",
    ),
    "experiments/tables.py": "hours; test_experiments_tables.py has stand-ins for the data",
    "examples/fashion_mnist.py": "a package of pictures; test_real_material.py trains on it for two steps",
    "examples/emoji_data.py": "a package of pictures; test_emoji.py makes its own",
    "transfusion app": "a server; test_app.py runs it",
    "--tasks wikipedia c4": "the weights of the judges; test_evaluation_*.py make their own",
}
# Behind the printed arguments: less of the same.
LESS = {
    "draw": "--num_inference_steps 2",
    "edit": "--num_inference_steps 2",
    "chat": "--max_new_tokens 4 --num_inference_steps 2",
    "doctor": "--no_overfit",
    "evaluate": "--num_samples 2 --num_inference_steps 2",
    "examples/finetune_editing.py": "--num_held_out 2 --num_train_edits 8 --num_inference_steps 2",
}
# How those scripts read their arguments.
READERS = {
    "examples/train.py": HfArgumentParser(
        (train.ModelArguments, train.DataArguments, train.PaperTrainingArguments)
    ).parse_args_into_dataclasses,
    "examples/train_vae.py": train_vae.parse_args,
    "examples/emoji_data.py": emoji_data.parse_args,
    "examples/fashion_mnist.py": HfArgumentParser((fashion_mnist.Arguments,)).parse_args_into_dataclasses,
    "experiments/tables.py": tables.parse_args,
    "conversion/convert_bagel.py": convert_bagel.parse_args,
    "conversion/export_bagel.py": export_bagel.parse_args,
}
# What stands for `...` in a command.
ELLIPSIS = "--tokenizer_name TOKENIZER --caption_dataset pictures --sample_size 16 --output_dir outputs/train"


def picture(side: int = 16) -> Image.Image:
    return Image.linear_gradient("L").resize((side, side)).convert("RGB")


def samples() -> list[dict[str, Any]]:
    return [{"text": f"picture {i}", "image": picture()} for i in range(4)]


def load_processor() -> Any:
    return AutoProcessor.from_pretrained(TINY)


def load_model() -> Any:
    """Random weights, but it draws once after a text and writes a letter behind an image, as a trained model would."""
    model = AutoModelForMultimodalLM.from_pretrained(TINY)
    tokens = ["<BOI>", "<EOI>", "q", "</s>"]
    start, end, letter, stop = load_processor().tokenizer.convert_tokens_to_ids(tokens)
    bias = [[[start], 100.0], [[end, letter], 200.0], [[end, letter, stop], 300.0]]
    model.generation_config.update(sequence_bias=bias, num_inference_steps=2)
    return model


def make_trainer() -> TransfusionTrainer:
    collator = TransfusionDataCollator(load_processor())
    arguments = TrainingArguments("outputs/pushed", hub_model_id="someone/pushed")
    trainer = TransfusionTrainer(load_model(), arguments, train_dataset=samples(), data_collator=collator)
    trainer.train()
    return trainer


# What a page takes for granted.
NAMES: dict[str, Callable[[], Any]] = {
    "path": lambda: str(TINY),
    "folder": lambda: str(TINY),
    "model": load_model,
    "processor": load_processor,
    "tokenizer": byte_tokenizer,
    "trainer": make_trainer,
    "inputs": lambda: load_processor()(text=["a seven"]),
    "dataset": samples,
    "samples": samples,
    "image": lambda: picture(32),
    "pipe": lambda: TransfusionPipeline(load_model(), load_processor()),
    **dict.fromkeys(("picture", "source", "target", "red"), picture),
}


def save_model(folder: Path) -> None:
    load_model().save_pretrained(folder)
    load_processor().save_pretrained(folder)


def save_shapes_model(folder: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model, processor = new_transfusion(byte_tokenizer(), LlamaConfig(**sizes), sample_size=32, patch_size=8)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def save_tokenizer(folder: Path) -> None:
    byte_tokenizer().save_pretrained(folder)


def save_language_model(folder: Path) -> None:
    """In bfloat16, as most are."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(byte_tokenizer()), tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    save_tokenizer(folder)


def save_converted(folder: Path) -> None:
    """With an autoencoder, and more tokens than SmolLM2."""
    save_language_model(Path("language-model"))
    save_vae(Path("vae"), channels=4)
    vae = AutoencoderKL.from_pretrained("vae")
    latents = {"latent_channels": 4, "sample_size": 8}
    convert_causal_lm("language-model", folder, vae=vae, pad_to_multiple_of=50_000, **latents)


def save_vae(folder: Path, channels: int, scale: float = 0.18215, shift: float | None = None) -> None:
    levels = {"block_out_channels": [4] * 4, "down_block_types": ["DownEncoderBlock2D"] * 4}
    levels["up_block_types"] = ["UpDecoderBlock2D"] * 4
    kwargs = {"latent_channels": channels, "scaling_factor": scale, "shift_factor": shift}
    vae = AutoencoderKL(**levels, norm_num_groups=2, **kwargs)
    vae.save_pretrained(folder)


def save_pictures(folder: Path) -> None:
    folder.mkdir(parents=True)
    for line in CAPTIONS.splitlines()[1:]:
        picture().save(folder / line.split(",")[0])
    (folder / "metadata.csv").write_text(CAPTIONS)


def save_rows(folder: Path, **columns: Any) -> None:
    folder.mkdir()
    Dataset.from_dict({name: [value] * 8 for name, value in columns.items()}).to_parquet(folder / "0.parquet")


# Files, folders and repositories by the way a block prints them: made before the first block that does.
FILES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "outputs/quickstart/model": ("outputs/quickstart/model", save_model),
    "MODEL": ("MODEL", save_model),
    "outputs/shapes": ("outputs/shapes", save_shapes_model),
    "someone/digits": ("someone/digits", save_model),
    "outputs/emoji-5000": ("outputs/emoji-5000", save_model),
    "outputs/smollm2-emoji/model": ("outputs/smollm2-emoji/model", save_model),
    "HuggingFaceTB/SmolLM2-135M": ("HuggingFaceTB/SmolLM2-135M", save_language_model),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("HuggingFaceTB/SmolLM2-135M-Instruct", save_language_model),
    "ORIGINAL": ("ORIGINAL", save_tokenizer),
    "TOKENIZER": ("TOKENIZER", save_tokenizer),
    "stabilityai/sd-vae-ft-mse": ("stabilityai/sd-vae-ft-mse", partial(save_vae, channels=4)),
    "black-forest-labs/FLUX.1-dev": (
        "black-forest-labs/FLUX.1-dev/vae",
        partial(save_vae, channels=16, scale=0.3611, shift=0.1159),
    ),
    "export_causal_lm.py outputs/model": ("outputs/model", save_converted),
    " VAE ": ("VAE", partial(save_vae, channels=4)),
    'attach_vae(model, "...")': ("...", partial(save_vae, channels=8, scale=0.5)),
    'AutoTokenizer.from_pretrained("...")': ("...", save_tokenizer),
    "picture.png": ("picture.png", lambda file: picture().save(file)),
    "pictures": ("pictures", save_pictures),
    "outputs/food/data/train": ("outputs/food/data/train", save_pictures),
    "pictures/*.parquet": ("pictures", partial(save_rows, image=picture(), caption="gray", text="gray")),
    "data/*.parquet": ("data", partial(save_rows, image=picture(), caption="gray")),
    "DATASET": ("DATASET", partial(save_rows, image=picture(), caption="gray", text="gray")),
    "web/*.parquet": ("web", partial(save_rows, text="a sentence")),
    "edits/*.parquet": (
        "edits",
        partial(save_rows, input_image=picture(), edit_prompt="the same", edited_image=picture()),
    ),
}


def make_files(code: str) -> None:
    """Pictures may lie in `pictures` as such or in Parquet files, by what the block says."""
    if "pictures" in code:
        shutil.rmtree("pictures", ignore_errors=True)
    for printed, (name, make) in FILES.items():
        if printed in code and (name == "..." or not Path(name).exists()):
            if printed == "pictures" and "pictures/*.parquet" in code:
                continue
            make(Path(name))


@contextmanager
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def local_hub() -> Iterator[None]:
    with running_hub() as hub, pytest.MonkeyPatch.context() as patch:
        constants = {"ENDPOINT": hub.url, "HF_HUB_CACHE": "cache", "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}
        constants["HUGGINGFACE_CO_URL_TEMPLATE"] = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in constants.items():
            patch.setattr(huggingface_hub.constants, name, value)
        patch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)  # of the functions that are no methods
        patch.setattr(huggingface_hub.hf_api.api, "token", "hf_none")
        # transformers keeps one from its first call on, with the endpoint of that moment.
        patch.setattr(transformers.utils.hub, "_hf_api", huggingface_hub.HfApi(endpoint=hub.url))
        patch.setenv("HF_TOKEN", "hf_none")
        yield


# What a block needs around it, by a piece of it.
SURROUNDINGS = {"fully_shard": one_process, "push_to_hub": local_hub}


def is_run(code: str) -> bool:
    return not any(piece in code for piece in NOT_RUN)


class Page:
    """Runs a page's blocks in one namespace and one folder, which is the working directory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.names: dict[str, Any] = {"__name__": "__page__"}

    def python(self, code: str) -> None:
        tree = ast.parse(code)
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        used = {node.id for node in nodes}
        if not is_run(code):
            tree.body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
            exec(compile(tree, "<imports>", "exec"), self.names)
            made = {node.id for node in nodes if isinstance(node.ctx, ast.Store)}
            assert used - made <= {*self.names, *NAMES, *dir(builtins)}
            for name in made:  # stand-ins take the place of what it would have made
                self.names.pop(name, None)
            return
        self.names |= {name: NAMES[name]() for name in sorted(used & NAMES.keys() - self.names.keys())}
        with ExitStack() as stack:
            for piece, surroundings in SURROUNDINGS.items():
                if piece in code:
                    stack.enter_context(surroundings())
            # The machine may have no GPU.
            exec(compile(code.replace('.to("cuda")', '.to("cpu")'), "<block>", "exec"), self.names)

    def bash(self, code: str) -> None:
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if words:
                self.run(*words)

    def text(self, code: str) -> None:
        assert code == CAPTIONS

    def yaml(self, code: str) -> None:
        """Its first line is its name."""
        Path(code.splitlines()[0].removeprefix("# ")).write_text(code)

    def run(self, program: str, *words: str) -> None:
        line = shlex.join([program, *words])
        if program == "make":
            targets = set(re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
            assert {*words} <= targets, line
        elif program == "pip":
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert words[:2] == ("install", "-e") and set(re.findall(r"\[(\w+)\]", line)) <= extras.keys(), line
        elif program == "transfusion":
            self.transfusion(*words)
        else:
            self.script(program, *words)

    def transfusion(self, command: str, *words: str) -> None:
        argv = [command, *words]
        if not is_run(shlex.join(["transfusion", *argv])):
            if command == "evaluate":
                evaluate.read_tasks(evaluate.parse_args(words))
            else:
                transfusion_command.parse_args(argv)
            return
        self.monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/quit\n"))
        assert transfusion_command.main([*argv, *LESS.get(command, "").split()]) == 0, shlex.join(argv)
        assert all(Path(file).is_file() for option, file in itertools.pairwise(argv) if option == "-o")

    def script(self, launcher: str, *words: str) -> None:
        """In this process, whatever launches it."""
        place = next(i for i, word in enumerate(words) if word.endswith(".py"))
        options, name = words[:place], words[place]
        argv = shlex.split(shlex.join(words[place + 1 :]).replace("...", ELLIPSIS))
        options = [os.path.expandvars(option) for option in options]
        if launcher == "torchrun":
            get_args_parser().parse_args([*options, name])
        elif launcher == "accelerate":
            arguments = launch_command_parser().parse_args([*options[1:], name])
            assert options[0] == "launch" and (arguments.config_file is None or Path(arguments.config_file).is_file())
        else:
            assert launcher == "python" and not options
        script = importlib.import_module(Path(name).stem)
        if is_run(shlex.join(words)):
            script.main([*argv, *LESS.get(name, "").split()])
        else:
            READERS[name](argv)


@pytest.fixture
def page(tmp_path, monkeypatch):
    """An empty folder with some of the repository's in it; two steps of two rows for every training, on the CPU."""
    monkeypatch.chdir(tmp_path)
    for name in ("examples", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name, value in {"RANK": "0", "HOST": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # what no stand-in stands for fails at once
    check = TrainingArguments.__post_init__

    def few_steps(args: TrainingArguments) -> None:
        args.max_steps, args.per_device_train_batch_size, args.dataloader_num_workers = 2, 2, 0
        args.use_cpu = args.disable_tqdm = True
        check(args)

    monkeypatch.setattr(TrainingArguments, "__post_init__", few_steps)
    presets = configuration_transfusion._PRESETS
    sizes = {"num_hidden_layers": 1, "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 32}
    monkeypatch.setattr(configuration_transfusion, "_PRESETS", dict.fromkeys(presets, sizes))
    with tiny.uncompiled():
        yield Page(monkeypatch)
    AcceleratorState._reset_state(reset_partial_state=True)  # a command may have been for bfloat16


def blocks_of(name: str) -> list[tuple[str, str]]:
    """Language and code of each."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[name], re.MULTILINE | re.DOTALL)
    assert 2 * len(blocks) == PAGES[name].count("```")
    return [(language, code) for language, code in blocks if language != "bibtex"]


@pytest.mark.parametrize("name", [name for name in PAGES if blocks_of(name)])
def test_the_blocks_of_a_page_run_as_printed(name, page):
    for language, code in blocks_of(name):
        make_files(code)
        getattr(page, language)(code)


def test_every_exception_and_stand_in_is_still_printed():
    printed = "".join(code for name in PAGES for _, code in blocks_of(name))
    assert [piece for piece in (*NOT_RUN, *FILES, *SURROUNDINGS) if piece not in printed] == []
