"""GGUF files, which llama.cpp reads, as folders that transformers reads."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from ..modeling_transfusion import check_text_config
from .language_model import refuse_unfit


def find_gguf(path: Path) -> Path | None:
    """
    `path` if it is a GGUF file, or the one such file of a folder that has no safetensors. `ValueError` for several.
    """
    if path.suffix == ".gguf" and path.is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    if not files or any(path.glob("*.safetensors")):
        return None
    if len(files) > 1:
        raise ValueError(
            f"{path} holds {len(files)} GGUF files: {', '.join(file.name for file in files)}. Pass the path of one."
        )
    return files[0]


def load_gguf(file: Path) -> PreTrainedModel:
    """
    The model of a GGUF file, dequantised to float32.

    Raises:
        ValueError: a family that cannot be converted, a file that is cut off, tensors that are missing.
        ImportError: the package `gguf` is not installed.
    """
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    try:
        config = AutoConfig.from_pretrained(**where)
        check_text_config(config)
        model, found = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), output_loading_info=True
        )
    except ImportError:
        raise
    except Exception as error:  # where a file is cut off decides which
        raise ValueError(f"{file} is cut off, or no GGUF file that can be converted: {error}") from error
    refuse_unfit(found["missing_keys"], found["unexpected_keys"], [key for key, *_ in found["mismatched_keys"]])
    return model


@contextmanager
def dequantised(file: Path) -> Iterator[Path]:
    """A temporary folder with the model of a GGUF file, which is in memory meanwhile, and its tokenizer."""
    with TemporaryDirectory() as folder:
        load_gguf(file).save_pretrained(folder)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
        yield Path(folder)
