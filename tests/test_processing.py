import base64
import inspect
import tracemalloc
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from datasets import Dataset
from make_tiny_transfusion import byte_tokenizer
from PIL import Image, ImageOps
from tokenizers.processors import TemplateProcessing
from torchvision.transforms.v2 import functional as F
from transformers import AutoImageProcessor, AutoProcessor, LlamaConfig
from transformers.image_utils import PILImageResampling, SizeDict

from transfusion_hf import (
    TransfusionConfig,
    TransfusionDataCollator,
    TransfusionForCausalLMAndDiffusion,
    TransfusionImageProcessor,
    TransfusionProcessor,
)
from transfusion_hf.data import TransfusionDataset
from transfusion_hf.image_processing_transfusion import read_picture

TINY = Path(__file__).parent / "fixtures" / "tiny-transfusion"


@pytest.fixture
def processor() -> TransfusionProcessor:
    return AutoProcessor.from_pretrained(TINY)


@pytest.fixture
def tokenizer_without_image_tokens(processor):
    return byte_tokenizer()


def picture(color, size=(8, 8)) -> Image.Image:
    return Image.new("RGB", size, color)


RED, BLUE = picture("red"), picture("blue")


def test_each_marker_becomes_boi_patches_eoi(processor):
    features = processor(text="a<image>b<image>", images=[RED, BLUE])
    tokens = processor.tokenizer.convert_ids_to_tokens(features["input_ids"][0])
    image = ["<BOI>"] + ["<image>"] * 16 + ["<EOI>"]
    assert tokens == ["<s>", "a", *image, "b", *image]
    assert features["pixel_values"].shape == (2, 3, 8, 8)
    assert features["pixel_values"][0, :, 0, 0].tolist() == [1.0, -1.0, -1.0]


def test_latents_take_the_place_of_images(processor):
    latents = [torch.randn(4, 4, 2), torch.randn(4, 2, 2)]
    features = processor(text=["a<image>", "b<image>c"], latents=latents)  # patches of 2 latent pixels
    blocks = [ids.tolist().count(processor.image_token_id) for ids in features["input_ids"]]
    assert blocks == [2, 1] and "pixel_values" not in features
    assert all(torch.equal(a, b) for a, b in zip(features["latents"], latents, strict=True))
    assert processor(text="<image>", latents=latents[:1])["latents"].shape == (1, 4, 4, 2)
    with pytest.raises(
        ValueError, match="`latents`: image 0 is 3 × 2 pixels as the model takes it; its sides must be"
    ):
        processor(text="<image>", latents=[torch.randn(4, 3, 2)])
    with pytest.raises(ValueError, match="`text` has 1 markers <image> but `latents` holds 2 images"):
        processor(text="<image>", latents=latents)
    with pytest.raises(ValueError, match="Pass `images` or `latents`, not both"):
        processor(text="<image>", images=[RED], latents=latents[:1])


@pytest.fixture
def photo(tmp_path) -> Path:
    """Red above blue once it is turned upright, as its EXIF data ask for."""
    upright = picture("red")
    upright.paste("blue", (0, 4, 8, 8))
    stored, exif = upright.rotate(90), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    stored.save(tmp_path / "photo.png", exif=exif)
    return tmp_path / "photo.png"


def forms_of(file: Path) -> dict:
    """All the forms in which people hold a picture."""
    content = file.read_bytes()
    return {
        "image": Image.open(file), "path": str(file), "Path": file, "bytes": content,
        "data URI": f"data:image/png;base64,{base64.b64encode(content).decode()}",
        "row with bytes": {"bytes": content, "path": None}, "row with path": {"bytes": None, "path": str(file)},
    }  # fmt: skip


def test_a_photo_is_upright_in_whatever_form_it_comes(processor, photo):
    expected = ImageOps.exif_transpose(Image.open(photo))
    assert expected.getpixel((0, 0)) == (255, 0, 0) and expected.getpixel((0, 7)) == (0, 0, 255)
    pixels = processor.image_processor(expected)["pixel_values"]
    collate = TransfusionDataCollator(processor)
    for name, form in forms_of(photo).items():
        assert torch.equal(processor(text="<image>", images=form)["pixel_values"], pixels), name
        assert torch.equal(processor(text=["<image>"], images=[[form]])["pixel_values"], pixels), name
        assert torch.equal(processor.image_processor(form)["pixel_values"], pixels), name
        assert torch.equal(collate([{"text": "a<image>", "image": form}])["pixel_values"], pixels), name


@pytest.mark.parametrize("nothing", [None, {"bytes": None, "path": None}, bytearray(b"a"), "https://a/\x00.png"])
def test_what_is_no_picture_is_named(nothing):
    with pytest.raises(ValueError, match="is no picture that can be read"):
        read_picture(nothing)


def test_a_tiff_in_ycbcr_is_read(processor, tmp_path):
    Image.merge("YCbCr", [Image.new("L", (8, 8), v) for v in (76, 85, 255)]).save(tmp_path / "red.tiff")
    expected = [v / 127.5 - 1 for v in (254, 0, 0)]
    for picture in (tmp_path / "red.tiff", (tmp_path / "red.tiff").read_bytes(), Image.open(tmp_path / "red.tiff")):
        pixels = processor(text="<image>", images=picture)["pixel_values"][0, :, 0, 0].tolist()
        assert pixels == pytest.approx(expected, abs=0.01)
    row = {"image": {"bytes": None, "path": str(tmp_path / "red.tiff")}, "text": "red"}
    (sample,) = TransfusionDataset.from_captions(Dataset.from_list([row]))
    assert sample["image"].getpixel((0, 0)) == (254, 0, 0)


def test_a_chat_takes_pictures_in_each_form_of_the_library(processor, photo):
    pixels = processor(text="<image>", images=photo)["pixel_values"]
    for key, form in (("image", Image.open(photo)), ("path", str(photo)), ("url", forms_of(photo)["data URI"])):
        chat = [{"role": "user", "content": [{"type": "image", key: form}, {"type": "text", "text": "What?"}]}]
        features = processor.apply_chat_template(chat, tokenize=True, return_dict=True)
        assert torch.equal(features["pixel_values"], pixels), key


def test_a_url_is_fetched(processor, photo):
    handler = partial(SimpleHTTPRequestHandler, directory=photo.parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        features = processor(text="<image>", images=f"{address}/photo.png")
        assert torch.equal(features["pixel_values"], processor(text="<image>", images=photo)["pixel_values"])
        with pytest.raises(ValueError, match=r"none.png is no picture that can be read: .*404"):
            processor(text="<image>", images=f"{address}/none.png")
        server.shutdown()


def test_pictures_nested_by_row_must_belong_to_their_rows(processor):
    features = processor(text=["<image><image>x", "y<image>"], images=[[RED, BLUE], [RED]])
    assert len(features["pixel_values"]) == 3
    with pytest.raises(ValueError, match=r"`images` has \[1, 1\] images by row, but `text` marks \[2, 0\]"):
        processor(text=["<image><image>x", "y"], images=[[RED], [BLUE]])


def test_pictures_of_every_mode_become_what_the_model_takes(processor):
    color = processor.image_processor
    gray = TransfusionImageProcessor(do_resize=False, do_center_crop=False, image_mean=[0.5], image_std=[0.5])

    def pixel(images, image) -> list[float]:
        return [round(v, 2) for v in images(image)["pixel_values"][0][:, 0, 0].tolist()]

    half = round(128 / 127.5 - 1, 2)
    assert pixel(color, picture((255, 0, 0, 0)).convert("RGBA")) == [1, -1, -1]
    transparent = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert pixel(color, transparent) == [1, 1, 1]  # over white
    gray_over_white = Image.new("LA", (8, 8), (0, 0))
    assert pixel(color, gray_over_white) == pixel(color, gray_over_white.convert("La")) == [1, 1, 1]
    assert pixel(color, Image.new("L", (8, 8), 128)) == [half] * 3
    sixteen = Image.fromarray(np.full((8, 8), 128 * 257, dtype=np.uint16))
    assert sixteen.mode == "I;16" and pixel(color, sixteen) == [half] * 3
    assert pixel(gray, sixteen) == [half] and pixel(gray, picture((128, 128, 128))) == [half]
    assert pixel(color, RED.convert("P")) == [1, -1, -1]
    assert pixel(color, transparent.convert("RGBa")) == [1, 1, 1]
    with pytest.raises(ValueError, match="arrays must be uint8, 0 to 255; got uint16"):
        color(np.zeros((8, 8, 3), dtype=np.uint16))
    with pytest.raises(ValueError, match=r"mode 'F' \(floating point\) has no known range; pass images of 8 or 16"):
        color(Image.new("F", (8, 8)))


def test_rows_are_padded_at_the_left_and_may_end_at_boi(processor):
    features = processor(text=["abc<BOI>", "<image>"], images=[RED])
    assert features["attention_mask"][0].tolist() == [0] * 14 + [1] * 5
    assert features["input_ids"][0, -1] == processor.image_start_token_id


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_labels_are_minus_100_at_every_loss_free_position(processor, padding_side):
    features = processor(
        text=["ab<image>c", "d"], images=[RED], return_labels=True, padding=True, padding_side=padding_side
    )
    first, second = features["labels"].tolist()
    a, b, c, d = processor.tokenizer.convert_tokens_to_ids(["a", "b", "c", "d"])
    # <s> a b <BOI> 16 patches <EOI> c: <BOI> is predicted, what follows it and <EOI> are not.
    assert first == [-100, a, b, processor.image_start_token_id, *[-100] * 17, c]
    assert [label for label in second if label != -100] == [d]
    position = second.index(d)
    assert features["input_ids"][1, position - 1] == processor.tokenizer.bos_token_id


def test_a_text_that_ends_at_boi_has_no_loss_behind_it(processor):
    features = processor(text=["a<BOI>b"], return_labels=True)
    assert features["labels"][0].tolist()[-2:] == [processor.image_start_token_id, -100]


def with_ends(processor, single: str) -> TransfusionProcessor:
    """The processor with a tokenizer that puts `single` around a text."""
    ids = [("<s>", processor.tokenizer.bos_token_id), ("</s>", processor.tokenizer.eos_token_id)]
    template = TemplateProcessing(single=single, special_tokens=ids)
    processor.tokenizer.backend_tokenizer.post_processor = template
    return processor


def rows_of(processor, features) -> list[str]:
    """Each row as text, without padding, and with `*` for the patches of an image."""
    masked = zip(features["input_ids"], features["attention_mask"], strict=True)
    return [processor.tokenizer.decode(ids[mask.bool()]).replace("<image>" * 16, "*") for ids, mask in masked]


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>", "$A </s>", "$A"])
def test_rows_begin_and_end_once_whatever_the_tokenizer_adds(processor, single):
    processor, begin = with_ends(processor, single), "<s>" if "<s>" in single else ""
    end = "</s>" if "</s>" in single else ""
    prompts = processor(text=["a<BOI>", "<s>b</s>", "<image>"], images=[RED])
    assert rows_of(processor, prompts) == [f"{begin}a<BOI>", "<s>b</s>", f"{begin}<BOI>*<EOI>"]
    assert prompts["input_ids"].shape[1] == 18 + bool(begin) and prompts["attention_mask"][:, -1].all()
    trained = processor(text=["a", "<s>b</s>"], return_labels=True)
    assert rows_of(processor, trained) == [f"{begin}a{end}", "<s>b</s>"]
    batch = TransfusionDataCollator(processor)([{"text": "a"}, {"text": "<s>b</s>"}, {"text": "c</s>"}])
    assert rows_of(processor, batch) == [f"{begin}a</s>", "<s>b</s>", f"{begin}c</s>"]
    raw = processor(text=["a"], add_special_tokens=False, return_labels=True)
    assert rows_of(processor, raw) == ["a"]


def test_an_empty_prompt_draws_without_condition(processor):
    assert rows_of(processor, processor(text=[""])) == ["<s>"]
    processor = with_ends(processor, "$A")
    features = processor(text=["", "a"])
    assert rows_of(processor, features) == ["<BOI>", "a"] and features["input_ids"].dtype == torch.long
    model = TransfusionForCausalLMAndDiffusion.from_pretrained(TINY)
    output = model.generate(**features, num_inference_steps=2, generation_mode="image")
    assert [len(row) for row in output.images] == [1, 1]


def test_truncation_never_cuts_an_image(processor):
    text = "bc<image>d"  # <s>, 2 letters, 18 ids of the image, 1 letter
    for side, fitting in (("right", 21), ("left", 20)):
        processor.tokenizer.truncation_side = side
        for max_length in range(3, 23):
            kwargs = {"text": text, "images": RED, "truncation": True, "max_length": max_length}
            if max_length >= fitting:
                kept = rows_of(processor, processor(**kwargs))
                whole = "<s>bc<BOI>*<EOI>d"
                dropped = 22 - max_length
                expected = whole[: len(whole) - dropped] if side == "right" else "<s>" + whole[3 + dropped :]
                assert kept == [expected]
            else:
                with pytest.raises(ValueError, match=f"`max_length` is {max_length}, which cuts an image of row 0"):
                    processor(**kwargs)
    with pytest.raises(ValueError, match="`max_length` is 10, which cuts an image of row 0"):
        processor(text=text, latents=[torch.zeros(3, 8, 8)], truncation=True, max_length=10)


def test_text_options_may_come_in_their_own_dict(processor):
    texts = ["abc", "d"]
    options = {"padding": "max_length", "max_length": 6, "padding_side": "right"}
    nested, flat = processor(text=texts, text_kwargs=options), processor(text=texts, **options)
    assert nested["input_ids"].shape == (2, 6) and torch.equal(nested["input_ids"], flat["input_ids"])
    assert isinstance(processor(text=texts, text_kwargs={"return_tensors": "np"})["input_ids"], np.ndarray)
    assert isinstance(processor(text=texts, common_kwargs={"return_tensors": "np"})["input_ids"], np.ndarray)
    both = processor(text=texts, common_kwargs={"return_tensors": "np", "padding_side": "right"}, return_tensors="pt")
    assert isinstance(both["input_ids"], torch.Tensor) and both["attention_mask"][1].tolist() == [1, 1, 0, 0]
    assert processor(text=texts, pad_to_multiple_of=8)["input_ids"].shape == (2, 8)
    assert options == {"padding": "max_length", "max_length": 6, "padding_side": "right"}
    with pytest.raises(ValueError, match="`padding` was passed twice, alone and in `text_kwargs`"):
        processor(text=texts, padding=True, text_kwargs={"padding": True})


CHAT = [
    {"role": "user", "content": [{"type": "image", "image": RED}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": "red"},
    {"role": "user", "content": "Draw it."},
    {"role": "assistant", "content": [{"type": "text", "text": "here"}, {"type": "image", "image": BLUE}]},
]
RENDERED = "<s>user: <BOI>*<EOI>What is it?\nassistant: red</s>\nuser: Draw it.\nassistant: here<BOI>*<EOI></s>"


@pytest.fixture
def chatting(processor) -> TransfusionProcessor:
    """With the chat template of a tokenizer that has none."""
    return TransfusionProcessor(processor.image_processor, processor.tokenizer)


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>", "$A"])
def test_a_chat_has_the_same_ids_in_training_and_inference(chatting, single):
    chatting = with_ends(chatting, single)
    template = chatting.chat_template
    chatting.chat_template = template if "<s>" in single else f"{{{{ bos_token }}}}{template}"
    chat = chatting.apply_chat_template(CHAT, tokenize=True, return_dict=True)
    text = chatting.apply_chat_template(CHAT)
    assert rows_of(chatting, chat) == [RENDERED]
    assert torch.equal(chatting(text=text, images=[RED, BLUE])["input_ids"], chat["input_ids"])
    collate = TransfusionDataCollator(chatting)
    for sample in ({"text": text, "images": [RED, BLUE]}, {"messages": CHAT}):
        batch = collate([sample])
        assert torch.equal(batch["input_ids"], chat["input_ids"])
        assert torch.equal(batch["pixel_values"], chat["pixel_values"])
        assert batch["image_loss_mask"].tolist() == [True, True]
    prompt = chatting.apply_chat_template(CHAT[:1], add_generation_prompt=True, tokenize=True, return_dict=True)
    assert RENDERED.startswith(rows_of(chatting, prompt)[0])


def test_the_content_of_a_chat_is_text(chatting):
    content = "is <image> or <BOI> or <s> a tag?"
    chat = [{"role": "user", "content": [{"type": "image", "image": RED}, {"type": "text", "text": content}]}]
    for single in ("<s> $A", "$A"):
        processor = with_ends(chatting, single)
        features = processor.apply_chat_template(chat, tokenize=True, return_dict=True)
        assert rows_of(processor, features) == [f"{'<s>' * (single != '$A')}user: <BOI>*<EOI>{content}"]
        tokens = processor.tokenizer.convert_ids_to_tokens(features["input_ids"][0])
        assert tokens.count("<image>") == 16 and tokens.count("<BOI>") == 1
        ids = TransfusionDataCollator(processor)([{"messages": chat}])["input_ids"]
        assert torch.equal(ids, features["input_ids"])
    with pytest.raises(ValueError, match=r"`conversation` holds <BOI>, <image>, <s> as text, which"):
        TransfusionDataCollator(processor, assistant_only_loss=True)([{"messages": chat}])


@dataclass
class Message:
    role: str
    content: list | str | None = None
    tool_calls: list | None = None


@dataclass
class ImageURLPart:
    image_url: dict
    type: str = "image_url"


def test_messages_may_be_objects_as_clients_of_chat_servers_have_them(chatting, photo):
    url = forms_of(photo)["data URI"]
    objects = [Message("user", [ImageURLPart({"url": url}), {"type": "text", "text": "What?"}]), Message("assistant")]
    dicts = [
        {"role": "user", "content": [{"type": "image", "url": url}, {"type": "text", "text": "What?"}]},
        {"role": "assistant"},
    ]
    assert chatting.apply_chat_template(objects) == chatting.apply_chat_template(dicts)
    options = {"tokenize": True, "return_dict": True}
    expected = chatting.apply_chat_template(dicts, **options)
    for chat in (objects, [objects, objects[:1]]):
        features = chatting.apply_chat_template(chat, **options)
        assert torch.equal(features["input_ids"][0], expected["input_ids"][0])
        assert torch.equal(features["pixel_values"][:1], expected["pixel_values"])
    assert type(objects[0].content[0]) is ImageURLPart


def test_parts_of_a_data_set_hold_none_for_what_other_parts_have(chatting):
    lacking = {"text": None, "image": None, "url": None}
    chat = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in CHAT[1:3]]
    chat = [CHAT[0], *chat, CHAT[3]]
    filled = [{**one, "content": [lacking | part for part in one["content"]]} for one in chat]
    collate = TransfusionDataCollator(chatting, assistant_only_loss=True)
    for make in (lambda one: chatting.apply_chat_template(one, tokenize=True, return_dict=True),
                 lambda one: collate([{"messages": one}])):  # fmt: skip
        expected, features = make(chat), make(filled)
        assert features.keys() == expected.keys() and len(features["pixel_values"]) == 2
        assert features.pop("batch_counts", None) == expected.pop("batch_counts", None)
        assert all(torch.equal(features[name], expected[name]) for name in expected)
    assert filled[0]["content"][0]["text"] is None


@pytest.mark.parametrize(
    ("part", "kind"), [({"type": "video", "video": "a.mp4"}, "'video'"), ("a", "'str'"), ({"text": "a"}, "None")]
)
def test_parts_of_a_chat_that_nobody_reads_are_refused(processor, part, kind):
    for tokenize in (False, True):
        with pytest.raises(ValueError, match=rf"`conversation` holds a part of type {kind}; a part is {{'type': 'tex"):
            processor.apply_chat_template([{"role": "user", "content": [part]}], tokenize=tokenize)


def test_the_assistants_tokens_are_those_of_the_template_in_batches_with_images(chatting):
    features = chatting.apply_chat_template(
        [CHAT, CHAT[:2]], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [
        chatting.tokenizer.decode(ids[torch.tensor(mask).bool()]).replace("<image>" * 16, "*")
        for ids, mask in zip(features["input_ids"], features["assistant_masks"], strict=True)
    ]
    assert marked == [" red</s> here<BOI>*<EOI></s>", " red</s>"]


def test_images_of_several_sizes_come_as_a_list(processor):
    features = processor(
        text="<image><image>", images=[picture("red", (4, 8)), BLUE], do_resize=False, do_center_crop=False
    )
    assert [tuple(image.shape) for image in features["pixel_values"]] == [(3, 8, 4), (3, 8, 8)]
    blocks = (features["input_ids"][0] == processor.image_token_id).sum()
    assert blocks == 8 + 16


def test_images_come_as_the_tensors_that_are_asked_for(chatting):
    latents = [torch.zeros(4, 4, 2)] * 2
    for contents in (
        {"images": RED},
        {"images": RED, "text": "<image>"},
        {"text": "<image><image>", "latents": latents},
    ):
        name = "latents" if "latents" in contents else "pixel_values"
        assert isinstance(chatting(**contents)[name], torch.Tensor)
        assert isinstance(chatting(**contents, return_tensors="np")[name], np.ndarray)
    several = {"images": [picture("red", (4, 8)), BLUE], "do_resize": False, "do_center_crop": False}
    chat = [{"role": "user", "content": [{"type": "image", "image": image} for image in several["images"]]}]
    as_is = {name: several[name] for name in ("do_resize", "do_center_crop")}
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "return_assistant_tokens_mask": True}
    for features in (
        chatting(**several, return_tensors="pt"),
        chatting(**several, text="<image><image>", return_tensors="np"),
        chatting.apply_chat_template(chat, processor_kwargs=as_is, **options),
    ):
        assert [tuple(image.shape) for image in features["pixel_values"]] == [(3, 8, 4), (3, 8, 8)]
        assert isinstance(features["pixel_values"], list)


def test_arrays_of_floats_are_taken_by_a_call_that_does_not_rescale(processor):
    array = np.full((3, 8, 8), 0.25, dtype=np.float32)
    features = processor(text="<image>", images=array, do_rescale=False)
    assert torch.equal(features["pixel_values"], torch.full((1, 3, 8, 8), -0.5))
    with pytest.raises(ValueError, match="arrays must be uint8, 0 to 255; got float32"):
        processor(text="<image>", images=array)


def test_the_arguments_of_a_call_have_types_and_no_value_of_their_own():
    # By these transformers' own tests of processors tell what can be called with what.
    for name, argument in inspect.signature(TransfusionProcessor.__call__).parameters.items():
        if name not in ("self", "kwargs"):
            assert argument.default is None and argument.annotation is not inspect.Parameter.empty, name


def test_decode_gives_strings_and_pictures_in_order(processor):
    features = processor(text="ab<image>c<image><image>", images=[RED, BLUE, RED])
    (document,) = processor.decode_interleaved(features["input_ids"], [list(features["pixel_values"])])
    assert [part if isinstance(part, str) else part.getpixel((0, 0)) for part in document] == [
        "ab",
        (255, 0, 0),
        "c",
        (0, 0, 255),
        (255, 0, 0),
    ]
    with_special = processor.decode_interleaved(features["input_ids"], [[RED, BLUE, RED]], skip_special_tokens=False)
    assert with_special[0][0] == "<s>ab<BOI>" and with_special[0][1] is RED


def test_outputs_of_generate_become_text_images_or_both(processor):
    model = TransfusionForCausalLMAndDiffusion.from_pretrained(TINY)
    inputs = processor(text=["a red one", "blue"])
    kwargs = {"num_inference_steps": 2, "generation_mode": "image", "generator": torch.Generator().manual_seed(0)}
    output = model.generate(**inputs, **kwargs)
    images = processor.post_process_multimodal_output(output, generation_mode="image")
    assert [image.size for image in images] == [(8, 8), (8, 8)]
    assert processor.post_process_multimodal_output(output) == ["a red one", "blue"]
    documents = processor.post_process_multimodal_output(output, generation_mode="interleaved")
    assert documents[1][0] == "blue" and documents[1][1].size == (8, 8)
    for decode in (processor.decode, processor.batch_decode):
        assert decode(output.sequences, skip_special_tokens=True) == ["a red one", "blue"]
        with pytest.raises(TypeError, match=r"decode its ids, `output\.sequences`, or call `post_process_multimodal"):
            decode(output)
    # 8 bits of the drawn pixels, clipped to what a picture can show.
    expected = ((output.images[0][0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).to(torch.uint8)
    assert torch.equal(torch.from_numpy(np.asarray(images[0]).copy()), expected)


def test_pixels_survive_the_way_in_and_out():
    rng = np.random.default_rng(0)
    for channels, mode in ((3, "RGB"), (1, "L")):
        image_processor = TransfusionImageProcessor(
            do_resize=False,
            do_center_crop=False,
            do_convert_rgb=channels == 3,
            image_mean=[0.5] * channels,
            image_std=[0.5] * channels,
        )
        array = rng.integers(0, 256, (6, 4, 3) if channels == 3 else (6, 4), dtype=np.uint8)
        pixels = image_processor(Image.fromarray(array, mode))["pixel_values"]
        assert pixels.shape == (1, channels, 6, 4) and -1 <= pixels.min() < pixels.max() <= 1
        assert np.array_equal(np.asarray(image_processor.postprocess(pixels)[0]), array)


def test_images_are_resized_and_cropped_to_the_centre():
    image = picture("red", (40, 20))
    image.paste((0, 0, 255), (10, 0, 30, 20))  # the centre square
    pixels = TransfusionImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})(image)
    assert torch.equal(pixels["pixel_values"][0, :, 3, 3], torch.tensor([-1.0, -1.0, 1.0]))
    assert pixels["pixel_values"].shape == (1, 3, 8, 8)


@pytest.mark.parametrize("size", [(3, 400), (400, 3), (901, 5), (5000, 37)])
def test_long_pictures_are_cropped_before_they_are_resized(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    images = TransfusionImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 8, "width": 8})
    resized = images.resize(F.pil_to_tensor(image), SizeDict(shortest_edge=16), PILImageResampling.BICUBIC)
    expected = images.center_crop(resized, SizeDict(height=8, width=8))
    levels = (images(image)["pixel_values"][0] + 1) * 127.5
    assert (levels - expected).abs().max() < 1.01  # two libraries round


def test_a_picture_of_one_by_two_hundred_thousand_pixels_costs_what_its_crop_does(processor):
    image = Image.new("RGB", (1, 200_000), "red")
    image.paste("blue", (0, 0, 1, 90_000))
    tracemalloc.start()
    pixels = TransfusionImageProcessor()([[image]])["pixel_values"]  # resized as a whole: 39 GB
    assert torch.equal(pixels, torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 256, 256))
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_processor_survives_saving(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    reloaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(reloaded) is TransfusionProcessor and reloaded.pixels_per_patch == 2
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is TransfusionImageProcessor
    text, images = "a<image>b", [RED]
    for key, value in processor(text=text, images=images).items():
        assert torch.equal(value, reloaded(text=text, images=images)[key])


@pytest.mark.parametrize("tied", [False, True])
def test_one_call_fits_tokenizer_and_model_to_each_other(tokenizer_without_image_tokens, tied, tmp_path):
    tokenizer = tokenizer_without_image_tokens
    config = TransfusionConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=tied,
        ),
        latent_channels=3,
        sample_size=(8, 4),
        image_start_token_id=0,
        image_token_id=1,
        image_end_token_id=2,
    )
    model = TransfusionForCausalLMAndDiffusion(config)
    processor = TransfusionProcessor.for_model(model, tokenizer, pad_to_multiple_of=8)
    assert model.get_input_embeddings().num_embeddings == model.lm_head.out_features == 264
    assert model.config.image_token_id == processor.image_token_id == tokenizer.convert_tokens_to_ids("<image>")
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    features = processor(text="a<image>", images=[RED])
    assert features["pixel_values"].shape == (1, 3, 8, 4)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    reloaded = TransfusionForCausalLMAndDiffusion.from_pretrained(tmp_path)
    torch.testing.assert_close(reloaded(**features).logits, model.eval()(**features).logits)
    again = TransfusionProcessor.for_model(reloaded, AutoProcessor.from_pretrained(tmp_path).tokenizer)
    assert again.image_token_id == processor.image_token_id  # a second call changes nothing
    assert reloaded.get_input_embeddings().num_embeddings == 264


def test_a_tokenizer_without_padding_token_gets_one_of_its_own(tokenizer_without_image_tokens):
    tokenizer = tokenizer_without_image_tokens
    tokenizer.pad_token = None
    model = TransfusionForCausalLMAndDiffusion.from_pretrained(TINY)
    TransfusionProcessor.for_model(model, tokenizer)
    assert tokenizer.pad_token == "<pad>"
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


# --- Bad input -------------------------------------------------------------------------------------------------------


def test_more_or_fewer_images_than_markers_are_refused(processor):
    with pytest.raises(
        ValueError,
        match="`text` has 2 markers <image> but `images` holds 1 images; the number of <image> tokens in the prompts "
        "should be the same as the number of images",
    ):
        processor(text="<image><image>", images=[RED])
    with pytest.raises(ValueError, match="`text` has 1 markers <image> but `images` holds 2 images"):
        processor(text="<image>", images=[RED, BLUE])
    with pytest.raises(ValueError, match="`text` has 1 markers <image> but `images` holds 0 images"):
        processor(text="<image>")


def test_an_image_that_is_no_multiple_of_the_patch_is_refused(processor):
    with pytest.raises(
        ValueError, match=r"image 0 is 7 × 8 pixels as the model takes it; its sides must be multiples of 2"
    ):
        processor(text="<image>", images=[picture("red", (8, 7))], do_resize=False, do_center_crop=False)


def test_no_text_at_all_is_refused(processor):
    with pytest.raises(ValueError, match="`text` must hold at least one text; got an empty list"):
        processor(text=[])


def test_a_tokenizer_without_the_tokens_is_refused(tokenizer_without_image_tokens, processor):
    with pytest.raises(ValueError, match=r"`tokenizer` lacks <image>, <BOI>, <EOI>; `TransfusionProcessor.for_model"):
        TransfusionProcessor(processor.image_processor, tokenizer_without_image_tokens)


def test_decoding_asks_for_one_image_per_block(processor):
    features = processor(text="a<image>", images=[RED])
    with pytest.raises(ValueError, match="1 image blocks but `images` holds 0; pass the prompt's images"):
        processor.decode_interleaved(features["input_ids"], [[]])
    with pytest.raises(ValueError, match="must hold one list for each of 1 rows"):
        processor.decode_interleaved(features["input_ids"], None)
    with pytest.raises(ValueError, match="needs one image per row; got no images"):
        processor.post_process_multimodal_output(features["input_ids"], generation_mode="image")
    with pytest.raises(ValueError, match="must be 'text', 'image' or 'interleaved'; got 'video'"):
        processor.post_process_multimodal_output(features["input_ids"], generation_mode="video")


def test_pictures_of_nan_are_refused(processor):
    with pytest.raises(ValueError, match=r"finite tensors of shape \(channels, height, width\)"):
        processor.image_processor.postprocess(torch.full((1, 3, 2, 2), torch.nan))
