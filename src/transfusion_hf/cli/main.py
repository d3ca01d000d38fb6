"""
The command line:

    transfusion draw MODEL "a handwritten seven" -o seven.png
    transfusion caption MODEL picture.png
    transfusion edit MODEL picture.png "make it red" -o out.png
    transfusion chat MODEL
    transfusion app MODEL
    transfusion doctor MODEL [DATA]
    transfusion latents MODEL DATASET OUTPUT
    transfusion train --tokenizer_name TOKENIZER --caption_dataset DATA --output_dir FOLDER
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForMultimodalLM

from ..denoising_transfusion import DRAWING_DEFAULTS
from ..image_processing_transfusion import read_picture
from ..pipelines_transfusion import drawing_kwargs
from ..processing_transfusion import TransfusionProcessor
from .streamers import TransfusionStreamer

_CHAT_HELP = "End a line with Return to send it. `/image FILE` shows a picture, `/quit` ends."


def _parse_args(argv: Sequence[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("transfusion", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("model", help="a folder (an adapter's, too) or a repository of the Hub")
        sub.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        sub.add_argument("--dtype", default="auto", help="for example 'bfloat16'; default: the checkpoint's")
        return sub

    draw = command("draw", "Draws a picture from a prompt.")
    draw.add_argument("prompt")
    caption = command("caption", "Describes a picture, or answers a question about it.")
    caption.add_argument("picture", type=Path)
    caption.add_argument("--prompt", default="", help="text behind the picture, for example a question")
    edit = command("edit", "Changes a picture as instructed.")
    edit.add_argument("picture", type=Path)
    edit.add_argument("prompt", metavar="instruction")
    edit.add_argument("--input_image_guidance_scale", type=float, help="how closely to follow the picture")
    chat = command("chat", f"Chats in text and pictures. {_CHAT_HELP}")
    for sub, num_tokens in ((caption, 64), (chat, 1024)):
        sub.add_argument("--max_new_tokens", type=int, default=num_tokens)
    for sub, output in ((draw, "drawing.png"), (edit, "edited.png"), (chat, "chat.png")):
        sub.add_argument("-o", "--output", type=Path, default=Path(output))
        sub.add_argument("--guidance_scale", type=float)
        sub.add_argument("--negative_prompt", help="what not to draw")
        sub.add_argument("--scheduler", help="a class of diffusers, for example 'DDIMScheduler'")
        for name in ("num_inference_steps", "height", "width"):
            sub.add_argument(f"--{name}", type=int)
    for sub in (draw, edit):
        sub.add_argument("--num_images_per_prompt", type=int, help="several are numbered: drawing-1.png …")
    for sub in (draw, caption, edit, chat):
        sub.add_argument("--seed", type=int)
    app = command("app", "Opens a page to draw, caption and chat in a browser.")
    app.add_argument("--host", default="127.0.0.1", help="'0.0.0.0' for other machines")
    app.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    app.add_argument("--share", action="store_true", help="a public address through Gradio's servers")
    # `main` hands these three over before; here they only get their line of help.
    commands.add_parser("doctor", help="Finds out why a model does not learn, or draws noise.")
    commands.add_parser("latents", help="Computes the latents of a dataset once, for training without the VAE.")
    commands.add_parser("train", help="Trains a model by the paper's recipe, from arguments or a YAML file.")
    return parser.parse_args(argv)


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


def _chat(args: argparse.Namespace, model: Any, processor: Any, kwargs: dict[str, Any]) -> None:
    print(_CHAT_HELP)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    messages: list[dict[str, Any]] = []
    shown: list[dict[str, Any]] = []
    files = _numbered(args.output)
    for line in filter(None, map(str.strip, sys.stdin)):
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


def _run(args: argparse.Namespace) -> None:
    if args.command == "app":
        from .app import launch_app  # needs Gradio, which the others do not
    if "output" in args and args.output.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"`--output` {args.output} has no image suffix; name it, for example, drawing.png.")
    if args.dtype != "auto" and not isinstance(getattr(torch, args.dtype, None), torch.dtype):
        raise ValueError(f"`--dtype` must be 'auto' or a type of torch such as 'bfloat16'; got {args.dtype!r}.")
    model = AutoModelForMultimodalLM.from_pretrained(args.model, dtype=args.dtype).to(args.device)
    processor = TransfusionProcessor.from_pretrained(args.model)
    if args.command == "app":
        launch_app(model, processor, server_name=args.host, server_port=args.port, share=args.share)
        return
    kwargs = {name: value for name, value in vars(args).items() if name in {*DRAWING_DEFAULTS, "max_new_tokens"}}
    words = ("guidance_scale", "negative_prompt", "num_images_per_prompt")
    kwargs |= drawing_kwargs(model, processor, **{name: getattr(args, name) for name in words if name in args})
    kwargs["generator"] = None if args.seed is None else torch.Generator(args.device).manual_seed(args.seed)
    (_chat if args.command == "chat" else _run_once)(args, model, processor, kwargs)


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
        elif argv[:1] == ["train"]:
            from . import train

            train.main(argv[1:])
        else:
            _run(_parse_args(argv))
        return 0
    except (ValueError, OSError, ImportError, RuntimeError) as error:  # RuntimeError: an unknown device
        print(f"transfusion: {error}", file=sys.stderr)
        return 1
