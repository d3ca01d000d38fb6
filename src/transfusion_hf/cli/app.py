"""
`transfusion app MODEL`: a page to chat with a model, in text and pictures. Needs Gradio.

What the model writes and draws appears as it comes, a drawing by its previews. Users share nothing but the model,
which runs for one of them at a time.
"""

import html
import traceback
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from ..diffusion_transfusion import is_flow
from ..generation_transfusion import DRAWING_DEFAULTS
from ..processing_transfusion import TransfusionProcessor
from .streamers import TransfusionStreamer

try:
    import gradio as gr
except ImportError as error:
    raise ImportError('The app needs Gradio; run `pip install "transfusion-hf[demo]"`.') from error

# What the page calls them, and `generate()`.
MODES = {"chat": "interleaved", "draw": "image", "caption": "text"}
_SCHEDULERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
)
_FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
_HELP = (
    "**chat**: the whole conversation, text and pictures from both sides.\n\n"
    "**draw**: one picture from the prompt; with a picture of yours, an edit of it.\n\n"
    "**caption**: what your picture shows; a question may go with it."
)
# The button would send pictures to the Hub, and has no switch.
_CSS = '.message-buttons button[title="Share"] {display: none}'
# Pictures of a few pixels are shown large, and as they are.
_SMALL_CSS = ".message img {width: 16rem; object-fit: contain; image-rendering: pixelated}"
_PREVIEW = {"id": "preview"}


def _open(file: str) -> Image.Image:
    try:
        picture = Image.open(file)
        picture.load()
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{Path(file).name} is no picture that can be read: {error}") from error
    return picture


def _messages(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Gradio's messages as those of a chat template. Without previews of drawings that were stopped, and without what was
    not answered: it may be what the model cannot take.
    """
    kept: list[dict[str, Any]] = []
    for message in history:
        if (message.get("metadata") or {}).get("id") == _PREVIEW["id"]:
            continue
        if message["role"] == "user" and kept and kept[-1]["role"] == "user":
            kept.pop()
        kept.append(message)
    if kept and kept[-1]["role"] == "user":
        kept.pop()

    def content_of(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "text":
            return {"type": "text", "text": part["text"]}
        return {"type": "image", "image": _open(part["file"]["path"])}

    return [{"role": message["role"], "content": [content_of(p) for p in message["content"]]} for message in kept]


def _inputs(processor: TransfusionProcessor, mode: str, message: dict[str, Any], history: list[dict[str, Any]]) -> Any:
    text, pictures = message["text"], [_open(file) for file in message["files"]]
    if mode == "chat":
        shown = [{"type": "image", "image": picture} for picture in pictures]
        messages = [*_messages(history), {"role": "user", "content": [*shown, {"type": "text", "text": text}]}]
        return processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    if mode == "caption" and not pictures:
        raise ValueError("There is no picture to caption; add one to the message.")
    return processor(text=[processor.image_token * len(pictures) + text], images=pictures)


def _generator(seed: str, device: torch.device) -> torch.Generator | None:
    if not seed.strip():
        return None
    if not seed.strip().isdecimal() or int(seed) >= 2**63:
        raise ValueError(f"The seed must be a whole number, 0 or more and below 2⁶³, or empty; got {seed!r}.")
    return torch.Generator(device).manual_seed(int(seed))


def respond(
    model: Any,
    processor: TransfusionProcessor,
    message: dict[str, Any],
    history: list[dict[str, Any]],
    mode: str,
    num_inference_steps: int,
    image_guidance_scale: float,
    seed: str,
    scheduler: str,
    max_new_tokens: int,
    preview_interval: int,
) -> Iterator[list[dict[str, Any]]]:
    """
    The answer to a message, as it comes. Who closes the iterator stops the model, at the next word or preview. What
    `generate()`, the processor or a file refuses is shown as a warning of the page, and ends the answer.

    Args:
        model (`TransfusionForCausalLMAndDiffusion`)
        processor (`TransfusionProcessor`)
        message (`dict`): `{"text": str, "files": list[str]}`.
        history (`list[dict]`): Gradio's messages so far; of use in the mode `"chat"`.
        mode (`str`): `"chat"`, `"draw"` or `"caption"`.
        num_inference_steps (`int`), image_guidance_scale (`float`), scheduler (`str`), max_new_tokens (`int`):
            As for `generate()`.
        seed (`str`): Of noise and of sampled text, a whole number; another each time where empty.
        preview_interval (`int`): Denoising steps between two previews.

    Yields:
        The messages of the answer so far: text and PNG files in their order, and behind them the preview of what is
        being drawn.
    """
    content: list[Any] = []
    try:
        inputs = _inputs(processor, mode, message, history).to(model.device)
        pieces = TransfusionStreamer(processor, preview_interval=int(preview_interval)).generate(
            model,
            **inputs,
            generation_mode=MODES[mode],
            num_inference_steps=int(num_inference_steps),
            image_guidance_scale=image_guidance_scale,
            scheduler=scheduler,
            max_new_tokens=int(max_new_tokens),
            generator=_generator(seed, model.device),
        )
        # Gradio copies what it shows before it asks for more.
        with closing(pieces), TemporaryDirectory() as folder:  # type: ignore[type-var]
            for piece in pieces:
                preview = []
                if isinstance(piece, str):
                    if not content or not isinstance(content[-1], str):
                        content.append("")
                    content[-1] += piece
                else:
                    file = Path(folder) / f"{len(content)}-{piece.step}.png"
                    piece.image.save(file)
                    step = f"step {piece.step} of {piece.num_inference_steps}"
                    if piece.is_final:
                        content.append({"path": str(file)})
                    else:
                        preview = [{"path": str(file)}, step]
                answer = [{"role": "assistant", "content": list(content)}] if content else []
                yield answer + ([{"role": "assistant", "content": preview, "metadata": _PREVIEW}] if preview else [])
    # A warning: after an exception Gradio's chat would stay closed.
    except Exception as error:
        if not isinstance(error, (ValueError, OSError)):
            traceback.print_exc()
        gr.Warning(html.escape(str(error), quote=False), title="Error")


def make_app(model: Any, processor: TransfusionProcessor) -> gr.Blocks:
    """
    The page. `launch_app` starts it.

    Args:
        model (`TransfusionForCausalLMAndDiffusion`)
        processor (`TransfusionProcessor`)
    """
    stored = model.generation_config

    def default(name: str) -> Any:
        value = getattr(stored, name, None)
        return DRAWING_DEFAULTS[name] if value is None else value

    # Files are kept for a day.
    with gr.Blocks(
        title="Transfusion", analytics_enabled=False, fill_height=True, fill_width=True, delete_cache=(3600, 86400)
    ) as app:
        with gr.Sidebar(width=340):
            settings = [
                gr.Radio(list(MODES), value="chat", label="mode"),
                gr.Slider(1, model.config.num_train_timesteps, default("num_inference_steps"), step=1, label="steps"),
                gr.Slider(1, 20, default("image_guidance_scale"), step=0.1, label="guidance scale"),
                gr.Textbox(label="seed", placeholder="random"),
                gr.Dropdown(
                    _FLOW_SCHEDULERS if is_flow(model.noise_scheduler) else _SCHEDULERS,
                    value=default("scheduler") or type(model.noise_scheduler).__name__,
                    label="scheduler",
                ),
                gr.Slider(1, 8192, stored.max_new_tokens or 1024, step=1, label="max new tokens"),
                gr.Slider(1, 100, 5, step=1, label="preview interval"),
            ]
            gr.Markdown(_HELP)
        gr.ChatInterface(
            partial(respond, model, processor),
            multimodal=True,
            chatbot=gr.Chatbot(show_label=False, scale=1, render_markdown=False, buttons=["copy"]),
            textbox=gr.MultimodalTextbox(
                placeholder="text, pictures", file_types=["image"], file_count="multiple", stop_btn=True
            ),
            additional_inputs=settings,
            # A second entrance would have a queue of its own, and the model runs for one at a time.
            api_visibility="private",
            concurrency_limit=1,
        )
    return app


def launch_app(
    model: Any,
    processor: TransfusionProcessor,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    **kwargs: Any,
) -> gr.Blocks:
    """
    Starts the page.

    Args:
        model (`TransfusionForCausalLMAndDiffusion`)
        processor (`TransfusionProcessor`)
        host (`str`, defaults to `"127.0.0.1"`): `"0.0.0.0"` for other machines.
        port (`int`, *optional*): By default the first free one from 7860 on.
        share (`bool`, defaults to `False`): Whether to have a public address by Gradio's servers.
        kwargs: Further arguments of Gradio's `launch`, as `prevent_thread_lock`.
    """
    app = make_app(model, processor)
    app.queue(default_concurrency_limit=1, api_open=False)
    height, width = model.config.latent_size
    is_small = max(height, width) * model.config.vae_scale_factor < 256
    # Fonts of the browser's: none are fetched.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    app.launch(
        server_name=host,
        server_port=port,
        share=share,
        theme=theme,
        css=_CSS + _SMALL_CSS * is_small,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        **kwargs,
    )
    return app


__all__ = ["launch_app", "make_app", "respond"]
