"""
The command line:

    transfusion draw MODEL "a handwritten seven" -o seven.png
    transfusion caption MODEL picture.png
    transfusion edit MODEL picture.png "make it red" -o out.png
    transfusion chat MODEL
    transfusion app MODEL
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from transformers import AutoModelForMultimodalLM, AutoProcessor

from .streamers import TransfusionStreamer

_CHAT_HELP = "Write, and end a line with Return. `/image FILE` shows a picture, `/quit` ends."


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "transfusion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("model", help="a folder or a repository of the Hub")
        sub.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        sub.add_argument("--dtype", default="auto", help="as 'bfloat16'; default that of the checkpoint")
        return sub

    def drawing(sub: argparse.ArgumentParser, output: str) -> None:
        sub.add_argument("-o", "--output", type=Path, default=Path(output))
        sub.add_argument("--num_inference_steps", type=int)
        sub.add_argument("--guidance_scale", type=float)
        sub.add_argument("--scheduler", help="a class of diffusers, as 'DDIMScheduler'")
        sub.add_argument("--height", type=int)
        sub.add_argument("--width", type=int)

    draw = command("draw", "Draws a picture from a prompt.")
    draw.add_argument("prompt")
    drawing(draw, "drawing.png")
    caption = command("caption", "Says what a picture shows.")
    caption.add_argument("picture", type=Path)
    caption.add_argument("--prompt", default="", help="text behind the picture, as a question")
    caption.add_argument("--max_new_tokens", type=int, default=64)
    edit = command("edit", "Changes a picture as told.")
    edit.add_argument("picture", type=Path)
    edit.add_argument("instruction")
    edit.add_argument("--input_image_guidance_scale", type=float, help="how closely to keep to the picture")
    drawing(edit, "edited.png")
    chat = command("chat", f"Talks, in text and pictures. {_CHAT_HELP}")
    chat.add_argument("--max_new_tokens", type=int, default=1024)
    drawing(chat, "chat.png")
    for sub in (draw, caption, edit, chat):
        sub.add_argument("--seed", type=int)
    app = command("app", "Opens a page to draw, caption and chat in a browser.")
    app.add_argument("--host", default="127.0.0.1", help="'0.0.0.0' for other machines")
    app.add_argument("--port", type=int, help="default the first free one from 7860 on")
    app.add_argument("--share", action="store_true", help="a public address, by Gradio's servers")
    return parser.parse_args(argv)


def _open(file: Path) -> Image.Image:
    try:
        picture = Image.open(file)
        picture.load()  # a file that was cut off shows only then
        return picture
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is no picture that can be read: {error}") from error


def _drawing_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    names = ("num_inference_steps", "scheduler", "height", "width", "input_image_guidance_scale")
    kwargs = {name: getattr(args, name, None) for name in names} | {"image_guidance_scale": args.guidance_scale}
    return {name: value for name, value in kwargs.items() if value is not None}


def _draw(args: argparse.Namespace, model: Any, processor: Any, generator: torch.Generator | None) -> None:
    is_edit = args.command == "edit"
    text = processor.image_token + args.instruction if is_edit else args.prompt
    inputs = processor(text=[text], images=[_open(args.picture)] if is_edit else None).to(model.device)
    output = model.generate(
        **inputs, generation_mode="image", generator=generator, progress_bar=True, **_drawing_kwargs(args)
    )
    (image,) = processor.post_process_multimodal_output(output, generation_mode="image")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    image.save(args.output)
    print(args.output)


def _caption(args: argparse.Namespace, model: Any, processor: Any, generator: torch.Generator | None) -> None:
    inputs = processor(text=[processor.image_token + args.prompt], images=[_open(args.picture)]).to(model.device)
    ids = model.generate(**inputs, generation_mode="text", generator=generator, max_new_tokens=args.max_new_tokens)
    (text,) = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(text.strip())


def _chat(args: argparse.Namespace, model: Any, processor: Any, generator: torch.Generator | None) -> None:
    print(_CHAT_HELP)
    messages: list[dict[str, Any]] = []
    shown: list[dict[str, Any]] = []
    num_drawn = 0
    for line in map(str.strip, sys.stdin):
        if line == "/quit":
            break
        if line.startswith("/image "):
            try:
                shown.append({"type": "image", "image": _open(Path(line.removeprefix("/image ").strip()))})
            except ValueError as error:
                print(error)
            continue
        if not line:
            continue
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": line}]})
        shown = []
        try:
            inputs = processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            ).to(model.device)
        except ValueError as error:  # as a marker without its picture: the conversation goes on without the line
            print(error)
            messages.pop()
            continue
        answer: list[dict[str, Any]] = []
        pieces = TransfusionStreamer(processor).generate(
            model, **inputs, max_new_tokens=args.max_new_tokens, generator=generator, **_drawing_kwargs(args)
        )
        for piece in pieces:
            if isinstance(piece, str):
                answer.append({"type": "text", "text": piece})
                print(piece, end="", flush=True)
            else:
                num_drawn += 1
                file = args.output.with_stem(f"{args.output.stem}-{num_drawn}")
                file.parent.mkdir(parents=True, exist_ok=True)
                piece.image.save(file)
                answer.append({"type": "image", "image": piece.image})
                print(f"[{file}]", end="", flush=True)
        print()
        messages.append({"role": "assistant", "content": answer})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status, 1 with a line on stderr for what an error says."""
    args = _parse_args(argv)
    try:
        output = getattr(args, "output", None)
        if output is not None and output.suffix.lower() not in Image.registered_extensions():
            raise ValueError(f"`--output` {output} has no suffix of a picture; call it, for example, drawing.png.")
        if args.dtype != "auto" and not isinstance(getattr(torch, args.dtype, None), torch.dtype):
            raise ValueError(f"`--dtype` must be 'auto' or of torch, as 'bfloat16'; got {args.dtype!r}.")
        if args.command == "app":
            from .app import launch_app  # needs Gradio, which the others do not
        model = AutoModelForMultimodalLM.from_pretrained(args.model, dtype=args.dtype).to(args.device)
        processor = AutoProcessor.from_pretrained(args.model)
        if args.command == "app":
            launch_app(model, processor, args.host, args.port, args.share)
            return 0
        generator = None if args.seed is None else torch.Generator(args.device).manual_seed(args.seed)
        if args.command == "caption":
            _caption(args, model, processor, generator)
        elif args.command == "chat":
            _chat(args, model, processor, generator)
        else:
            _draw(args, model, processor, generator)
    except (ValueError, OSError, ImportError, RuntimeError) as error:  # the last as of an unknown device
        print(f"transfusion: {error}", file=sys.stderr)
        return 1
    return 0
