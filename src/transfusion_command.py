"""
The command line:

    transfusion draw MODEL "a handwritten seven" -o seven.png
    transfusion caption MODEL picture.png
    transfusion edit MODEL picture.png "make it red" -o out.png
    transfusion chat MODEL
    transfusion app MODEL
    transfusion doctor MODEL [DATA]
    transfusion latents MODEL DATASET OUTPUT
    transfusion evaluate MODEL --tasks shapes geneval
    transfusion train --tokenizer_name TOKENIZER --vae_name_or_path VAE --caption_dataset DATA --output_dir FOLDER
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

# This module is outside the package because `import transfusion_hf` registers the Auto classes, which takes torch and
# transformers. Help and wrong arguments need neither.

CHAT_HELP = "End a line with Return to send it. `/image FILE` shows a picture, `/quit` ends."
# Their own modules read their arguments.
DELEGATED = {
    "doctor": "Finds out why a model does not learn, or draws noise.",
    "latents": "Computes the latents of a dataset once, for training without the VAE.",
    "evaluate": "Scores a model by the tasks of the paper's Table 1.",
    "train": "Trains a model by the paper's recipe, from arguments or a YAML file.",
}


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("transfusion", description=__doc__, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"transfusion-hf {version('transfusion-hf')}")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("model", help="a folder (an adapter's, too) or a repository of the Hub")
        sub.add_argument("--device", help="default: 'cuda' where there is a GPU, else 'cpu'")
        sub.add_argument("--dtype", default="auto", help="for example 'bfloat16'; default: the checkpoint's")
        return sub

    draw = command("draw", "Draws a picture from a prompt.")
    draw.add_argument("prompt")
    caption = command("caption", "Describes a picture, or answers a question about it.")
    caption.add_argument("picture", help="a file or a URL")
    caption.add_argument("--prompt", default="", help="text behind the picture, for example a question")
    edit = command("edit", "Changes a picture as instructed.")
    edit.add_argument("picture", help="a file or a URL")
    edit.add_argument("prompt", metavar="instruction")
    edit.add_argument("--input_image_guidance_scale", type=float, help="how closely to follow the picture")
    chat = command("chat", f"Chats in text and pictures. {CHAT_HELP}")
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
    app.add_argument(
        "--examples", nargs="+", help="prompts to draw, offered on the page, which opens in the mode 'draw'"
    )
    for name, text in DELEGATED.items():
        commands.add_parser(name, help=text)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command `transfusion`. Returns the exit status: 1 after an error, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not DELEGATED.keys() & argv[:1]:
        parse_args(argv)
    # Notes of the libraries about each other's versions, which no user of the command can act on.
    os.environ.setdefault("TORCH_LOGS", "-all")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    # How long OpenMP's threads spin before they sleep: by default so long that a busy core slows all down.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        from transfusion_hf.cli.main import main as run

        return run(argv)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
