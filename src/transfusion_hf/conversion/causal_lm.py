"""
A language model's checkpoint as that of a Transfusion, tensor by tensor: neither model is ever in memory as a whole.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ..configuration_transfusion import TransfusionConfig
from ..hub.card import make_model_card
from ..modality_transfusion import IMAGE, image_name
from ..modeling_transfusion import TransfusionForCausalLMAndDiffusion, check_text_config, mean_row
from ..processing_transfusion import TransfusionProcessor
from ..vae.attach import attach_vae
from .language_model import causal_lm_config, generation_values, unfit_message

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
IMAGE_TOKENS = {"image_token": "<image>", "image_start_token": "<BOI>", "image_end_token": "<EOI>"}
EMBEDDING, HEAD, HEAD_BIAS = "model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"


def transfusion_key(key: str) -> str:
    """The name of a language model's tensor in a Transfusion: `model.…` is `model.language_model.…` there."""
    return f"model.language_model.{key.removeprefix('model.')}" if key.startswith("model.") else key


def causal_lm_key(key: str) -> str | None:
    """The reverse of [`transfusion_key`]; `None` for what is of images."""
    if f".{IMAGE}." in key:
        return None
    if key.startswith("lm_head."):
        return key
    return f"model.{key.removeprefix('model.language_model.')}" if key.startswith("model.language_model.") else None


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes the name `folder` at the end, or disappears where that is not reached."""
    folder = folder.resolve()
    if folder.is_mount():
        raise ValueError(f"`output_dir` {folder} is a mount point, which cannot be renamed to; choose a folder in it.")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"`output_dir` {folder} is not empty; choose another, or empty it.")
    aside = folder.with_name(f".{folder.name}.incomplete")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        if folder.exists():
            folder.rmdir()
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


class SafetensorsCheckpoint:
    """
    The tensors of a folder of safetensors, one file or indexed shards, by name. Read one at a time.

    Args:
        folder (`Path`)

    Raises:
        ValueError: no safetensors, a missing index or shard, a file that is cut off, tensors that are not in a
            floating-point type of 16 bits or more.
    """

    def __init__(self, folder: Path):
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        names, promised = self._find(folder)
        for path in (folder / name for name in names):
            try:
                with safe_open(path, framework="pt") as file:
                    for key in file.keys():
                        self._add(key, path, file.get_slice(key))
            except (SafetensorError, FileNotFoundError) as error:
                raise ValueError(f"{path} is missing, cut off or no safetensors: {error}. Get it again.") from error
        absent = sorted(promised - set(self.files))
        if absent:
            raise ValueError(f"{folder / INDEX} names tensors that its shards do not hold: {', '.join(absent[:5])}.")

    @staticmethod
    def _find(folder: Path) -> tuple[list[str], set[str]]:
        """The files, and the tensors that an index promises."""
        if (folder / INDEX).exists():
            try:
                weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
            except (json.JSONDecodeError, KeyError) as error:
                raise ValueError(f"{folder / INDEX} is cut off or no index: {error!r}. Get it again.") from error
            return sorted(set(weight_map.values())), set(weight_map)
        if (folder / SINGLE).exists():
            return [SINGLE], set()
        found = sorted(file.name for file in folder.glob("*") if file.suffix in (".safetensors", ".bin"))
        raise ValueError(
            f"{folder} holds neither {SINGLE} nor {INDEX}; found: {', '.join(found) or 'no weights'}. Shards need "
            "their index; weights in `.bin` are pickled: load them with transformers and save them again."
        )

    def _add(self, key: str, path: Path, tensor: Any) -> None:
        if tensor.get_dtype() not in DTYPES:
            raise ValueError(
                f"{key} in {path} is of type {tensor.get_dtype()}; expected one of {', '.join(DTYPES)}. Quantised "
                "weights cannot be converted; take the original ones."
            )
        self.files[key] = path
        self.shapes[key] = torch.Size(tensor.get_shape())
        self.dtypes[key] = DTYPES[tensor.get_dtype()]

    def __getitem__(self, key: str) -> torch.Tensor:
        # A mapping of its own for each tensor, which ends with it.
        with safe_open(self.files[key], framework="pt") as file:
            return file.get_tensor(key)

    @property
    def max_shard_bytes(self) -> int:
        return max(path.stat().st_size for path in set(self.files.values()))


def check_keys(checkpoint: SafetensorsCheckpoint, expected: dict[str, torch.Tensor], is_tied: bool) -> list[str]:
    """
    The tensors to take, all that `expected` has and no other, in its shapes.

    Raises:
        ValueError: tensors that are missing, unknown or of other shapes, by name.
    """
    # Of older checkpoints: computed, not learned.
    keys = [key for key in checkpoint.shapes if not key.endswith("rotary_emb.inv_freq")]
    wanted = dict(expected)
    if is_tied:
        wanted.pop(HEAD, None)
        if HEAD in keys:
            if not torch.equal(checkpoint[HEAD], checkpoint[EMBEDDING]):
                raise ValueError(
                    f"`tie_word_embeddings` is true, but {HEAD} differs from {EMBEDDING}; correct the configuration."
                )
            keys.remove(HEAD)
    problems = {
        "missing": sorted(set(wanted) - set(keys)),
        "unknown": sorted(set(keys) - set(wanted)),
        "of another shape": [key for key in keys if key in wanted and checkpoint.shapes[key] != wanted[key].shape],
    }
    if any(problems.values()):
        raise ValueError(unfit_message(problems))
    return keys


def _with_rows(tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
    """More rows, each the mean of those there."""
    return torch.cat([tensor, mean_row(tensor).expand(num_rows - len(tensor), *tensor.shape[1:])])


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
    Writes the Transfusion that a language model becomes, with its processor, into a folder. What
    [`TransfusionForCausalLMAndDiffusion.from_causal_lm`] does in memory, shard by shard.

    Args:
        pretrained_model_name_or_path (`str` or `os.PathLike`): A folder, or a repository of the Hub; safetensors.
        output_dir (`str` or `os.PathLike`): Written whole or not at all; must be empty, or not exist.
        tokenizer (*optional*): The tokenizer, or where it lies; defaults to the model's own.
        vae (*optional*): As in [`attach_vae`].
        pad_to_multiple_of (`int`, *optional*): Pad the grown vocabulary to a multiple of this.
        dtype (`torch.dtype`, *optional*): Defaults to that of each tensor.
        max_shard_size (`int` or `str`, *optional*): Of the files written; defaults to half the largest file read.
        revision (`str`, *optional*): On the Hub.
        image_tokens (`dict[str, str]`, *optional*):
            The texts of `image_token`, `image_start_token`, `image_end_token`, where not `<image>`, `<BOI>`, `<EOI>`.
        kwargs: Fields of [`TransfusionConfig`], as `latent_channels`.

    Raises:
        ValueError: before anything is written, for a model that is no supported decoder, a quantised one, a checkpoint
            that is not complete or does not fit its configuration, a tokenizer that is not the model's or already has
            the image tokens, an unknown field or `dtype`, a generation config that cannot be saved.
    """
    unknown = sorted(set(kwargs) - set(TransfusionConfig.__annotations__))
    if unknown:
        raise ValueError(
            f"TransfusionConfig has no field {', '.join(f'`{name}`' for name in unknown)}; see its fields."
        )
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"`dtype` must be one of {', '.join(map(str, DTYPES.values()))}; got {dtype!r}.")
    source = Path(pretrained_model_name_or_path)
    if not source.is_dir():
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        source = Path(
            snapshot_download(str(pretrained_model_name_or_path), revision=revision, allow_patterns=patterns)
        )
    text_config = AutoConfig.from_pretrained(source)
    check_text_config(text_config)
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    has_own = tokenizer is None or (source / "tokenizer_config.json").exists()
    own = AutoTokenizer.from_pretrained(source) if has_own else None
    tokenizer = own if tokenizer is None else tokenizer
    tokens = {**IMAGE_TOKENS, **(image_tokens or {})}
    _check_tokenizer(tokenizer, own, tokens, text_config.vocab_size)

    first = len(tokenizer)  # where `for_model` puts them
    ids = {f"{name}_id": first + i for i, name in enumerate(tokens)}
    config = causal_lm_config(text_config, **{**ids, **kwargs})
    config.text_config._name_or_path = ""  # where it lay here
    with torch.device("meta"):
        model = TransfusionForCausalLMAndDiffusion(config)
        original = AutoModelForCausalLM.from_config(text_config)
    checkpoint = SafetensorsCheckpoint(source)
    keys = check_keys(checkpoint, original.state_dict(), text_config.tie_word_embeddings)
    del original

    model.init_patch_parts(checkpoint[EMBEDDING])
    if vae is not None:
        attach_vae(model, vae)
    model.grow_vocabulary(config.text_config.vocab_size, pad_to_multiple_of)
    kwargs = {"pad_to_multiple_of": pad_to_multiple_of, **tokens}
    processor = TransfusionProcessor.for_model(model, tokenizer, **kwargs)
    if (source / "generation_config.json").exists():
        model.generation_config.update(**generation_values(GenerationConfig.from_pretrained(source)))
        try:
            model.generation_config.validate(strict=True)
        except ValueError as error:
            raise ValueError(
                f"{source / 'generation_config.json'} could not be saved again; mend it. {error}"
            ) from error
    num_rows = config.text_config.vocab_size
    config.dtype = dtype or checkpoint.dtypes[EMBEDDING]
    for part in (model.model.patch_encoder, model.model.patch_decoder):
        part.to(config.dtype)
    parts = {key: value for key, value in model.state_dict().items() if not value.is_meta}
    sources = {transfusion_key(key): key for key in keys}
    names = model.state_dict()  # with `untied_modalities` image weights begin as copies
    sources |= {image_name(name): key for name, key in sources.items() if image_name(name) in names}
    layout = {
        member: torch.empty(
            num_rows if key in (EMBEDDING, HEAD, HEAD_BIAS) else checkpoint.shapes[key][0],
            *checkpoint.shapes[key][1:],
            dtype=dtype or checkpoint.dtypes[key],
            device="meta",
        )
        for member, key in sources.items()
    }
    max_shard_size = max_shard_size or checkpoint.max_shard_bytes // 2
    split = split_torch_state_dict_into_shards({**layout, **parts}, max_shard_size=max_shard_size)

    with written_whole(Path(output_dir)) as folder:
        for name, members in tqdm(split.filename_to_tensors.items(), desc="write shards"):
            tensors = {}
            # What is copied first, while nothing else is in memory.
            for member in sorted(members, key=lambda key: key not in ("lm_head.weight", transfusion_key(EMBEDDING))):
                key = sources.get(member)
                tensor = parts[member] if key is None else checkpoint[key]
                tensors[member] = tensor.to(dtype) if key is not None and dtype is not None else tensor
                if key is not None and len(tensor) < len(layout[member]):
                    tensors[member] = _with_rows(tensors[member], len(layout[member]))
            save_file(tensors, folder / name, metadata={"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        config.architectures = [type(model).__name__]
        base_model = None if Path(pretrained_model_name_or_path).is_dir() else str(pretrained_model_name_or_path)
        make_model_card(config, Path(output_dir).name, base_model=base_model).save(folder / "README.md")
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        processor.save_pretrained(folder)


def _check_tokenizer(tokenizer: Any, own: Any, tokens: dict[str, str], vocab_size: int) -> None:
    """`own` is the tokenizer that lies beside the model, if any."""
    vocabulary = tokenizer.get_vocab()
    clashes = [token for token in tokens.values() if token in vocabulary]
    if clashes:
        raise ValueError(
            f"`tokenizer` already has {', '.join(clashes)}; choose other names, as `image_token='<picture>'`."
        )
    # Gemma 3 of 1B has a token more than rows.
    if not vocab_size // 2 < len(tokenizer) <= vocab_size + 8:
        raise ValueError(
            f"`tokenizer` has {len(tokenizer)} tokens but the model {vocab_size}; it is that of another model. Pass "
            "the right one."
        )
    if own is not None and (differ := [t for t, i in own.get_vocab().items() if vocabulary.get(t) != i]):
        raise ValueError(
            f"`tokenizer` is that of another model: {len(differ)} tokens of the model's own have other ids in it, as "
            f"{differ[0]!r}. Pass the right one, or none."
        )


__all__ = ["SafetensorsCheckpoint", "causal_lm_key", "convert_causal_lm", "transfusion_key"]
