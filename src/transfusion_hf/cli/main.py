"""What the commands of `transfusion` do; `transfusion_command` reads their arguments."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForMultimodalLM

from transfusion_command import CHAT_HELP, parse_args

from ..denoising_transfusion import DRAWING_DEFAULTS
from ..image_processing_transfusion import read_picture
from ..inference.streamers import TransfusionStreamer
from ..pipelines_transfusion import drawing_kwargs
from ..processing_transfusion import TransfusionProcessor


def chat_inputs(processor: Any, messages: list[dict[str, Any]]) -> Any:
    """The ids and pixels of a conversation, up to where the answer begins."""
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)


def _numbered(output: Path) -> Iterator[Path]:
    return (output.with_stem(f"{output.stem}-{i}") for i in count(1))


def _run_once(args: argparse.Namespace, model: Any, processor: Any, kwargs: dict[str, Any]) -> None:
    """Draws, edits or captions."""
    pictures = [read_picture(args.picture)] if "picture" in args else []
    inputs = processor(text=[processor.image_token * len(pictures) + args.prompt], images=pictures).to(model.device)
    if args.command == "caption":
        pieces = TransfusionStreamer(processor).generate(model, **inputs, generation_mode="text", **kwargs)
        print("".join(map(str, pieces)).strip())
        return
    output = model.generate(**inputs, generation_mode="image", progress_bar=True, **kwargs)
    images = processor.post_process_multimodal_output(output, generation_mode="image")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for file, image in zip(_numbered(args.output) if len(images) > 1 else [args.output], images, strict=False):
        image.save(file)
        print(file)


def _typed() -> Iterator[str]:
    """The lines of the standard input; in a terminal behind a prompt sign, with a history, until Ctrl-D or Ctrl-C."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 - `input` uses it
    with suppress(EOFError):
        while True:
            yield input("> ")
    print()


def _chat(args: argparse.Namespace, model: Any, processor: Any, kwargs: dict[str, Any]) -> None:
    print(CHAT_HELP)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    messages: list[dict[str, Any]] = []
    shown: list[dict[str, Any]] = []
    files = _numbered(args.output)
    for line in filter(None, map(str.strip, _typed())):
        if line == "/quit":
            break
        try:
            if line.startswith("/image "):
                shown.append({"type": "image", "image": read_picture(line.removeprefix("/image ").strip())})
                continue
            question, shown = {"role": "user", "content": [*shown, {"type": "text", "text": line}]}, []
            inputs = chat_inputs(processor, [*messages, question]).to(model.device)
        except ValueError as error:  # the conversation goes on without this line
            print(error)
            continue
        answer: list[dict[str, Any]] = []
        for piece in TransfusionStreamer(processor).generate(model, **inputs, **kwargs):
            if isinstance(piece, str):
                answer.append({"type": "text", "text": piece})
                print(piece, end="", flush=True)
            else:
                file = next(files)
                piece.image.save(file)
                answer.append({"type": "image", "image": piece.image})
                print(f"[{file}]", end="", flush=True)
        print()
        messages += [question, {"role": "assistant", "content": answer}]


def check_dtype(dtype: str) -> None:
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"`--dtype` must be 'auto' or a type of torch such as 'bfloat16'; got {dtype!r}.")


def _run(args: argparse.Namespace) -> None:
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.command == "app":
        from .app import launch_app  # needs Gradio, which the others do not
    if "output" in args and args.output.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"`--output` {args.output} has no image suffix; name it, for example, drawing.png.")
    check_dtype(args.dtype)
    model = AutoModelForMultimodalLM.from_pretrained(args.model, dtype=args.dtype).to(args.device)
    processor = TransfusionProcessor.from_pretrained(args.model)
    if args.command == "app":
        server = {"server_name": args.host, "server_port": args.port, "share": args.share}
        launch_app(model, processor, args.examples, **server)
        return
    kwargs = {name: value for name, value in vars(args).items() if name in {*DRAWING_DEFAULTS, "max_new_tokens"}}
    words = ("guidance_scale", "negative_prompt", "num_images_per_prompt")
    kwargs |= drawing_kwargs(model, processor, **{name: getattr(args, name) for name in words if name in args})
    kwargs["generator"] = None if args.seed is None else torch.Generator(args.device).manual_seed(args.seed)
    if args.command != "chat":
        _run_once(args, model, processor, kwargs)
        return
    try:
        _chat(args, model, processor, kwargs)
    except KeyboardInterrupt:
        print()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status: 1 after an error, which is printed to stderr in one line."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        if argv[:1] == ["doctor"]:
            from ..training import doctor

            return doctor.main(argv[1:])
        if argv[:1] == ["latents"]:
            from ..data import latents  # needs datasets, which the others do not

            latents.main(argv[1:])
        elif argv[:1] == ["evaluate"]:
            from . import evaluate

            evaluate.main(argv[1:])
        elif argv[:1] == ["train"]:
            from . import train

            train.main(argv[1:])
        else:
            _run(parse_args(argv))
        return 0
    except (ValueError, OSError, ImportError, RuntimeError) as error:  # RuntimeError: an unknown device
        print(f"transfusion: {error}", file=sys.stderr)
        return 1
