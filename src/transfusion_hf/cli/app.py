"""`transfusion app MODEL`: a page to chat in text and pictures. Users share a model that runs for one at a time."""

import html
import traceback
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..denoising_transfusion import DRAWING_DEFAULTS
from ..diffusion_transfusion import is_flow
from ..image_processing_transfusion import read_picture
from ..inference.streamers import StreamedImage, TransfusionStreamer
from ..processing_transfusion import TransfusionProcessor
from .main import chat_inputs

try:
    import gradio as gr
except ImportError as error:
    raise ImportError('The app needs Gradio; run `pip install "transfusion-hf[demo]"`.') from error

MODES = {"chat": "interleaved", "draw": "image", "caption": "text"}  # the page's names, and those of `generate()`
_MULTISTEP = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
_SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", *_MULTISTEP, "EulerDiscreteScheduler")
_FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", *_MULTISTEP)
_HELP = (
    "**chat**: the whole conversation, with text and pictures from both sides.\n\n"
    "**draw**: one picture from the prompt; if you add a picture, an edit of it.\n\n"
    "**caption**: describes your picture, or answers a question about it."
)
# The button sends pictures to the Hub, and no option removes it; small pictures are enlarged without smoothing.
_CSS = '.message-buttons button[title="Share"] {display: none}'
_SMALL_CSS = ".message img {width: 16rem; object-fit: contain; image-rendering: pixelated}"
_PREVIEW = {"id": "preview"}


def _messages(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For chat templates, without previews of stopped drawings and without unanswered messages, which may not fit."""
    kept = [message for message in history if (message.get("metadata") or {}).get("id") != _PREVIEW["id"]]
    messages = []
    for message, after in pairwise([*kept, {"role": "user"}]):
        if "assistant" in (message["role"], after["role"]):
            content = [
                {"type": "image", "image": read_picture(part["file"]["path"])} if part["type"] == "file" else part
                for part in message["content"]
            ]
            messages.append({"role": message["role"], "content": content})
    return messages


def _inputs(processor: TransfusionProcessor, mode: str, message: dict[str, Any], history: list[dict[str, Any]]) -> Any:
    text, pictures = message["text"], [read_picture(file) for file in message["files"]]
    if mode == "chat":
        shown = [{"type": "image", "image": picture} for picture in pictures]
        question = {"role": "user", "content": [*shown, {"type": "text", "text": text}]}
        return chat_inputs(processor, [*_messages(history), question])
    if mode == "caption" and not pictures:
        raise ValueError("There is no picture to caption; add one to the message.")
    return processor(text=[processor.image_token * len(pictures) + text], images=pictures)


def _take(piece: str | StreamedImage, content: list[Any], folder: str) -> list[dict[str, Any]]:
    """Adds a piece to the content of the answer; a preview is returned instead, as a message."""
    if isinstance(piece, str):
        is_continued = content and isinstance(content[-1], str)
        content.append(content.pop() + piece if is_continued else piece)
        return []
    file = Path(folder, f"{len(content)}-{piece.step}.png")
    piece.image.save(file)
    if piece.is_final:
        content.append({"path": str(file)})
        return []
    shown = [{"path": str(file)}, f"step {piece.step} of {piece.num_inference_steps}"]
    return [{"role": "assistant", "content": shown, "metadata": _PREVIEW}]


def respond(
    model: Any,
    processor: TransfusionProcessor,
    message: dict[str, Any],
    history: list[dict[str, Any]],
    mode: str,
    num_inference_steps: int,
    image_guidance_scale: float,
    seed: int | None,
    scheduler: str,
    max_new_tokens: int,
    preview_interval: int,
) -> Iterator[list[dict[str, Any]]]:
    """
    Yields the answer so far to a message `{"text": str, "files": list[str]}`, after Gradio's `history`: text and PNG
    files in their order, then the preview of the current drawing. Closing the iterator stops the model. An error ends
    the answer, with a warning on the page. `mode` is one of `MODES`; the other settings are those of `generate()`.
    """
    content: list[Any] = []
    try:
        pieces = TransfusionStreamer(processor, preview_interval=preview_interval).generate(
            model,
            **_inputs(processor, mode, message, history).to(model.device),
            generation_mode=MODES[mode],
            num_inference_steps=num_inference_steps,
            image_guidance_scale=image_guidance_scale,
            generator=None if seed is None else torch.Generator(model.device).manual_seed(seed),
            scheduler=scheduler,
            max_new_tokens=max_new_tokens,
        )
        # Gradio copies each file before it asks for more.
        with closing(pieces), TemporaryDirectory() as folder:  # type: ignore[type-var]
            for piece in pieces:
                preview = _take(piece, content, folder)
                answer = [{"role": "assistant", "content": list(content)}] if content else []
                yield answer + preview
    # After an exception Gradio would not reopen the prompt.
    except Exception as error:
        if not isinstance(error, (ValueError, OSError)):
            traceback.print_exc()
        gr.Warning(html.escape(str(error), quote=False), title="Error")


def sample_captions(model: Any, processor: TransfusionProcessor) -> list[str] | None:
    """Up to 4 texts that it writes before it draws; `None` unless it draws in all 8 answers to an empty prompt."""
    if processor.tokenizer.bos_token_id is None:
        return None
    inputs, config = processor(text=[""] * 8).to(model.device), model.config
    output = model.generate(
        **inputs,
        do_sample=True,
        generator=torch.Generator(model.device).manual_seed(0),
        num_inference_steps=1,  # only the texts are of use
        image_guidance_scale=1.0,
        max_images=1,
        max_new_tokens=32 + 2 + config.num_patches(*config.latent_size),
    )
    rows = processor.decode_interleaved(output.sequences[:, inputs["input_ids"].shape[1] :], output.images)
    if not all(any(not isinstance(part, str) for part in row) for row in rows):
        return None
    texts = [row[0].strip() for row in rows if isinstance(row[0], str)]
    return [text for text in dict.fromkeys(texts) if text][:4]


def make_app(model: Any, processor: TransfusionProcessor, examples: list[str] | None = None) -> gr.Blocks:
    """
    The page for a `TransfusionForCausalLMAndDiffusion` and its processor. `launch_app` starts it. With `examples`,
    prompts to draw, it opens in mode "draw". Without, it does if the model draws on its own, offering its captions.
    """
    config, stored = model.config, model.generation_config
    defaults = DRAWING_DEFAULTS | {name: value for name, value in stored.to_dict().items() if value is not None}
    schedulers = _FLOW_SCHEDULERS if is_flow(model.noise_scheduler) else _SCHEDULERS
    scheduler = defaults["scheduler"] or type(model.noise_scheduler).__name__
    max_new_tokens, scale = stored.max_new_tokens or 1024, defaults["image_guidance_scale"]
    captions = examples or sample_captions(model, processor)
    name = "/".join(Path(config.name_or_path).parts[-2:])
    full, whole = {"fill_height": True, "fill_width": True}, {"step": 1, "precision": 0}
    # Files are deleted after a day.
    with gr.Blocks(title=f"{name} · Transfusion", analytics_enabled=False, delete_cache=(3600, 86400), **full) as app:
        with gr.Sidebar(width=340, open=False) as sidebar:
            settings = [
                gr.Radio(list(MODES), value="chat" if captions is None else "draw", label="mode"),
                gr.Slider(1, config.num_train_timesteps, defaults["num_inference_steps"], label="steps", **whole),
                gr.Slider(1, max(20, scale), scale, step=0.1, label="guidance scale"),
                seed := gr.Number(label="seed", placeholder="random", precision=0),
                gr.Dropdown([*dict.fromkeys([*schedulers, scheduler])], value=scheduler, label="scheduler"),
                gr.Slider(1, max(8192, max_new_tokens), max_new_tokens, label="max new tokens", **whole),
                gr.Slider(1, 100, 5, label="preview interval", **whole),
            ]
            gr.Markdown(_HELP)
        files = {"file_types": ["image"], "file_count": "multiple"}
        gr.ChatInterface(
            partial(respond, model, processor),
            title=f"Transfusion: {html.escape(name)}",
            examples=[[{"text": caption, "files": []}] for caption in captions or []] or None,
            multimodal=True,
            chatbot=gr.Chatbot(show_label=False, scale=1, render_markdown=False, buttons=["copy"]),
            textbox=gr.MultimodalTextbox(placeholder="text, pictures", stop_btn=True, **files),
            additional_inputs=settings,
            # A public API would have its own queue, but the model runs for one user at a time.
            api_visibility="private",
            concurrency_limit=1,
        )
        # Closed on a phone. A number that is empty from the start would be sent as 0.
        is_wide = gr.Checkbox(visible=False)
        app.load(
            lambda is_wide: (gr.Sidebar(width=340, open=is_wide), None),
            is_wide,
            [sidebar, seed],
            js="() => innerWidth >= 768",
            api_visibility="private",
        )
    return app


def launch_app(
    model: Any, processor: TransfusionProcessor, examples: list[str] | None = None, **kwargs: Any
) -> gr.Blocks:
    """Starts the page of `make_app`. `kwargs` are for Gradio's `launch`: `server_name`, `server_port`, `share` …"""
    app = make_app(model, processor, examples)
    app.queue(api_open=False)
    is_small = max(model.config.latent_size) * model.config.vae_scale_factor < 256
    # The browser's own fonts: none are fetched.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    look = {"theme": theme, "css": _CSS + _SMALL_CSS * is_small, "footer_links": [], "run_history": False}
    app.launch(ssr_mode=False, **look, **kwargs)
    return app
