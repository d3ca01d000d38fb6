"""Shard by shard: a language model's checkpoint becomes a Transfusion's; neither is ever in memory as a whole."""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ..configuration_transfusion import TransfusionConfig
from ..hub.card import make_model_card
from ..modality_transfusion import image_name
from ..modeling_transfusion import TransfusionForCausalLMAndDiffusion, check_text_config, mean_row
from ..processing_transfusion import IMAGE_TOKENS, TransfusionProcessor
from ..vae.attach import attach_vae
from .gguf import dequantised, find_gguf
from .language_model import causal_lm_config, generation_values, init_patch_parts, refuse_unfit

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def transfusion_key(key: str) -> str:
    """The name of a language model's tensor in a Transfusion: `model.…` becomes `model.language_model.…`."""
    return re.sub(r"^model\.", "model.language_model.", key)


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder to write into: it gets the name `folder` at the end, or is removed after an error."""
    folder = folder.resolve()
    if folder.is_mount():
        raise ValueError(f"`output_dir` {folder} is a mount point, which cannot be replaced; choose a folder in it.")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"`output_dir` {folder} is not empty; choose another, or empty it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as private:  # unlike the folder in it
        temporary = Path(private, folder.name)
        temporary.mkdir()
        yield temporary
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)


class SafetensorsCheckpoint:
    """
    The tensors of a folder of safetensors, read one at a time by name; `layout` has them without data. `ValueError`
    for files that are missing, broken, or hold no floating-point numbers of 16 bits or more.
    """

    def __init__(self, folder: Path, single: str = SINGLE):
        self.files: dict[str, Path] = {}
        self.layout: dict[str, torch.Tensor] = {}
        for path in [folder / single] if (folder / single).exists() else self._find(folder):
            try:
                with safe_open(path, framework="pt") as file:
                    slices = {key: file.get_slice(key) for key in file.keys()}
            except (SafetensorError, FileNotFoundError) as error:
                raise ValueError(f"{path} is missing, cut off or no safetensors: {error}. Get it again.") from error
            for key, tensor in slices.items():
                if (dtype := tensor.get_dtype()) not in DTYPES:
                    raise ValueError(
                        f"{key} in {path} is of type {dtype}; expected one of {', '.join(DTYPES)}. Quantised weights "
                        "cannot be converted; take the original ones."
                    )
                self.files[key] = path
                self.layout[key] = torch.empty(tensor.get_shape(), dtype=DTYPES[dtype], device="meta")

    @staticmethod
    def _find(folder: Path) -> list[Path]:
        if (index := folder / INDEX).exists():
            try:
                return sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
            except (json.JSONDecodeError, KeyError) as error:
                raise ValueError(f"{index} is cut off or no index: {error!r}. Get it again.") from error
        if (folder / SINGLE).exists():
            return [folder / SINGLE]
        found = sorted(file.name for file in folder.glob("*") if file.suffix in (".safetensors", ".bin"))
        raise ValueError(
            f"{folder} holds neither {SINGLE} nor {INDEX}; found: {', '.join(found) or 'no weights'}. Shards need "
            "their index; load weights in `.bin` (pickled) with transformers and save them again."
        )

    def __getitem__(self, key: str) -> torch.Tensor:
        with safe_open(self.files[key], framework="pt") as file:  # a memory mapping that ends with the tensor
            return file.get_tensor(key)

    def check(self, expected: dict[str, torch.Tensor], is_tied: bool) -> None:
        """Leaves what is to convert in `layout`; `ValueError` for tensors missing, unknown or of another shape."""
        # Older checkpoints hold these, which are computed, not learned.
        self.layout = {k: tensor for k, tensor in self.layout.items() if not k.endswith("rotary_emb.inv_freq")}
        if is_tied:
            expected = {key: tensor for key, tensor in expected.items() if key != HEAD}
            if self.layout.pop(HEAD, None) is not None and not torch.equal(self[HEAD], self[EMBEDDING]):
                raise ValueError(
                    f"`tie_word_embeddings` is true, but {HEAD} differs from {EMBEDDING}; correct the configuration."
                )
        found = self.layout
        misshapen = [key for key in found if key in expected and found[key].shape != expected[key].shape]
        refuse_unfit(expected.keys() - found.keys(), found.keys() - expected.keys(), misshapen)

    def write(self, folder: Path, model: TransfusionForCausalLMAndDiffusion, max_shard_size: int | str | None) -> None:
        """Writes the tensors in the types of `layout`, and what `model` has beside the meta device."""
        grown = model.state_dict()
        parts = {name: value for name, value in grown.items() if not value.is_meta}
        sources = {transfusion_key(key): key for key in self.layout}
        # The weights of images begin as copies.
        sources |= {image_name(name): key for name, key in sources.items() if image_name(name) in grown}
        layout = {name: grown[name].to(self.layout[key].dtype) for name, key in sources.items()} | parts
        limit = max_shard_size or max(path.stat().st_size for path in set(self.files.values())) // 2

        def make(name: str) -> torch.Tensor:
            tensor = parts[name] if name in parts else self[sources[name]].to(layout[name].dtype)
            if num_new := len(layout[name]) - len(tensor):
                tensor = torch.cat([tensor, mean_row(tensor).expand(num_new, *tensor.shape[1:])])
            return tensor

        # What is copied comes first in its file, while nothing else is in memory.
        write_shards(folder, layout, make, limit, first=(HEAD, transfusion_key(EMBEDDING)))


def write_shards(
    folder: Path, layout: dict[str, torch.Tensor], make: Callable[[str], torch.Tensor], max_shard_size: int | str,
    first: Sequence[str] = (),
) -> None:  # fmt: skip
    """Writes the tensors of `layout`, of which only the shapes and types are read, one file at a time."""
    split = split_torch_state_dict_into_shards(layout, max_shard_size=max_shard_size)
    for file, members in tqdm(split.filename_to_tensors.items(), desc="write shards"):
        tensors = {name: make(name) for name in sorted(members, key=lambda name: name not in first)}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _load_tokenizer(tokenizer: Any, source: Path, tokens: dict[str, str], vocab_size: int) -> Any:
    """`tokenizer`, or that in the model's folder `source`; `ValueError` if it does not fit the model or `tokens`."""
    has_own = tokenizer is None or (source / "tokenizer_config.json").exists()
    own = AutoTokenizer.from_pretrained(source) if has_own else None
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    tokenizer = own if tokenizer is None else tokenizer
    vocabulary = tokenizer.get_vocab()
    if clashes := [token for token in tokens.values() if token in vocabulary]:
        raise ValueError(
            f"`tokenizer` already has {', '.join(clashes)}; choose other names, such as `image_token='<picture>'`."
        )
    # Gemma 3 of 1B has one more token than rows.
    if not vocab_size // 2 < len(tokenizer) <= vocab_size + 8:
        raise ValueError(
            f"`tokenizer` has {len(tokenizer)} tokens but the model {vocab_size}; it is that of another model. Pass "
            "the right one."
        )
    if own is not None and (differ := [t for t, i in own.get_vocab().items() if vocabulary.get(t) != i]):
        raise ValueError(
            f"`tokenizer` is that of another model: {len(differ)} tokens of the model's own have other ids in it, for "
            f"example {differ[0]!r}. Pass the right one, or none."
        )
    return tokenizer


def convert_causal_lm(
    pretrained_model_name_or_path: str | os.PathLike,
    output_dir: str | os.PathLike,
    tokenizer: Any = None,
    vae: Any = None,
    pad_to_multiple_of: int | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str | None = None,
    revision: str | None = None,
    image_tokens: dict[str, str] | None = None,
    **kwargs: Any,
) -> None:
    r"""
    Converts a language model to a Transfusion and writes it with its processor, shard by shard; the result is that of
    [`from_causal_lm`]. `ValueError`, before anything is written, for what does not fit.

    Args:
        pretrained_model_name_or_path (`str` or `os.PathLike`):
            A folder or a repository of the Hub, in safetensors; or a GGUF file, or a folder that holds one.
        output_dir (`str` or `os.PathLike`): Must be empty or not exist; appears once all is written.
        tokenizer (*optional*): A tokenizer, or its folder or repository; defaults to the model's own.
        vae (*optional*): For [`attach_vae`].
        pad_to_multiple_of (`int`, *optional*): Pads the grown vocabulary to a multiple of this.
        dtype (`torch.dtype`, *optional*): Defaults to each tensor's own.
        max_shard_size (`int` or `str`, *optional*): Limit of each file; defaults to half the largest file read.
        image_tokens (`dict[str, str]`, *optional*):
            Texts other than `<image>`, `<BOI>`, `<EOI>` for `image_token`, `image_start_token`, `image_end_token`.
        kwargs: Fields of [`TransfusionConfig`], such as `latent_channels`.
    """
    if unknown := sorted(set(kwargs) - set(TransfusionConfig.__annotations__)):
        raise ValueError(f"TransfusionConfig has no field {', '.join(f'`{name}`' for name in unknown)}.")
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"`dtype` must be one of {', '.join(map(str, DTYPES.values()))}; got {dtype!r}.")
    source = Path(pretrained_model_name_or_path)
    if (file := find_gguf(source)) is not None:
        with dequantised(file) as folder:
            convert_causal_lm(
                folder,
                output_dir,
                tokenizer,
                vae,
                pad_to_multiple_of,
                dtype,
                max_shard_size,
                None,
                image_tokens,
                **kwargs,
            )
        return
    if is_remote := not source.is_dir():
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        source = Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
    text_config = AutoConfig.from_pretrained(source)
    check_text_config(text_config)
    tokens: dict[str, Any] = {**IMAGE_TOKENS, **(image_tokens or {})}
    tokenizer = _load_tokenizer(tokenizer, source, tokens, text_config.vocab_size)

    ids = {f"{name}_id": len(tokenizer) + i for i, name in enumerate(tokens)}  # where `for_model` puts them
    config = causal_lm_config(text_config, **{**ids, **kwargs})
    config.text_config._name_or_path = ""  # would be a path of this machine
    with torch.device("meta"):
        model = TransfusionForCausalLMAndDiffusion(config)
        expected = AutoModelForCausalLM.from_config(text_config).state_dict()
    checkpoint = SafetensorsCheckpoint(source)
    checkpoint.check(expected, text_config.tie_word_embeddings)
    init_patch_parts(model, checkpoint[EMBEDDING])
    if vae is not None:
        attach_vae(model, vae)
    model.grow_vocabulary(config.text_config.vocab_size, pad_to_multiple_of)
    processor = TransfusionProcessor.for_model(model, tokenizer, pad_to_multiple_of=pad_to_multiple_of, **tokens)
    if (file := source / "generation_config.json").exists():
        model.generation_config.update(**generation_values(GenerationConfig.from_pretrained(source)))
        try:
            model.generation_config.validate(strict=True)
        except ValueError as error:
            raise ValueError(f"{file} could not be saved again; correct it. {error}") from error
    checkpoint.layout = {key: tensor.to(dtype or tensor.dtype) for key, tensor in checkpoint.layout.items()}
    config.dtype = checkpoint.layout[EMBEDDING].dtype
    for part in (model.model.patch_encoder, model.model.patch_decoder):
        part.to(config.dtype)

    with written_whole(Path(output_dir)) as folder:
        checkpoint.write(folder, model, max_shard_size)
        config.architectures = [type(model).__name__]
        base_model = str(pretrained_model_name_or_path) if is_remote else None
        make_model_card(config, Path(output_dir).name, base_model=base_model).save(folder / "README.md")
        for part in (config, model.generation_config, processor):
            part.save_pretrained(folder)
