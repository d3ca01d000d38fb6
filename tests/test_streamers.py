from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LogitsProcessor, LogitsProcessorList

from transfusion_hf import StreamedImage, TransfusionForCausalLMAndDiffusion, TransfusionStreamer

TINY = Path(__file__).parent / "fixtures" / "tiny-transfusion"
STEPS = 6


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model():
    return TransfusionForCausalLMAndDiffusion.from_pretrained(TINY)


class Says(LogitsProcessor):
    """Makes the model say these tokens, whatever it would."""

    def __init__(self, tokens: list[int], prompt_length: int, image_length: int):
        self.tokens = tokens
        self.prompt_length = prompt_length
        self.image_length = image_length

    def __call__(self, input_ids, scores):
        boi_to_eoi = self.image_length - 1
        said, position = input_ids.shape[1] - self.prompt_length, 0
        for token in self.tokens:
            if said <= 0:
                break
            said -= 1 + (boi_to_eoi if token == self.tokens[3] else 0)
            position += 1
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([self.tokens[position]]), 0.0)


def inputs_of(model, processor, before: str = "abc"):
    inputs = dict(processor(text=["draw"]))
    tokens = processor.tokenizer(before, add_special_tokens=False).input_ids
    boi, eos = model.config.image_start_token_id, processor.tokenizer.eos_token_id
    more = processor.tokenizer("cd e", add_special_tokens=False).input_ids
    says = Says([*tokens[:3], boi, *more, eos], inputs["input_ids"].shape[1], 18)
    return {
        **inputs,
        "max_new_tokens": 60,
        "num_inference_steps": STEPS,
        "logits_processor": LogitsProcessorList([says]),
    }


@pytest.mark.parametrize("text", ["abc", "a b"])
def test_text_previews_and_images_come_in_order(model, processor, text):
    """Of "a b", the "b" is held back until the image comes."""
    inputs = inputs_of(model, processor, text)
    streamer = TransfusionStreamer(processor, preview_interval=2)
    pieces = list(streamer.generate(model, **inputs, generator=torch.Generator().manual_seed(0)))
    expected = model.generate(**inputs, generator=torch.Generator().manual_seed(0))
    images = [piece for piece in pieces if isinstance(piece, StreamedImage)]
    assert [(image.step, image.is_final) for image in images] == [(2, False), (4, False), (6, True)]
    (final,) = processor.image_processor.postprocess(expected.images[0])
    assert images[-1].image.tobytes() == final.tobytes() and isinstance(final, Image.Image)
    before = "".join(pieces[: pieces.index(images[0])])
    after = "".join(pieces[pieces.index(images[-1]) + 1 :])
    assert (before, after) == (text, "cd e")


def test_previews_come_nearer_to_the_image(model, processor):
    inputs = inputs_of(model, processor) | {"num_inference_steps": 20}
    streamer = TransfusionStreamer(processor, preview_interval=1)
    images = [p for p in streamer.generate(model, **inputs) if isinstance(p, StreamedImage)]
    pixels = [torch.tensor(list(image.image.tobytes()), dtype=torch.float) for image in images]
    distances = [float((p - pixels[-1]).norm()) for p in pixels]
    assert len(images) == 20 and distances[18] < distances[9] < distances[0]


def test_an_error_of_generate_is_raised_where_one_listens_and_the_next_run_is_whole(model, processor):
    inputs, streamer = inputs_of(model, processor), TransfusionStreamer(processor)

    def fail(*args):
        raise RuntimeError("in the callback")

    with pytest.raises(RuntimeError, match="in the callback"):
        list(streamer.generate(model, **inputs, callback_on_step_end=fail))
    with pytest.raises(ValueError, match="only supports batch size 1"):
        list(streamer.generate(model, **processor(text=["a", "b"])))
    pieces = list(streamer.generate(model, **inputs))
    assert "".join(p for p in pieces if isinstance(p, str)) == "abccd e"


def test_who_stops_listening_stops_the_generation(model, processor):
    inputs, steps = inputs_of(model, processor), []
    stream = TransfusionStreamer(processor, preview_interval=50).generate(
        model, **inputs | {"num_inference_steps": 100}, callback_on_step_end=lambda *args: steps.append(args[1])
    )
    for piece in stream:
        if isinstance(piece, StreamedImage):
            break
    stream.close()
    assert len(steps) < 100


def test_an_interval_below_1_is_refused(processor):
    with pytest.raises(ValueError, match="`preview_interval` must be at least 1, or None; got 0"):
        TransfusionStreamer(processor, preview_interval=0)
