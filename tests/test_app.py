"""The page of `transfusion app`: the function behind it, and the page itself in a headless Chromium."""

import copy
import io
import os
import re
import runpy
import shutil
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForMultimodalLM, AutoProcessor

from transfusion_command import main
from transfusion_hf.diffusion_transfusion import make_sampling_scheduler

TINY = str(Path(__file__).parent / "fixtures" / "tiny-transfusion")
CHROMIUM = shutil.which("chromium")
# Chromium reaches for nothing but the page.
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


def needed(package: str):
    """Continuous integration sets the variable: there a test that does not run has failed."""
    if os.environ.get("TRANSFUSION_REQUIRE_BROWSER"):
        return __import__(package, fromlist=["_"])
    return pytest.importorskip(package)


gr = needed("gradio")
app = needed("transfusion_hf.cli.app")


@pytest.fixture(scope="module")
def model():
    return AutoModelForMultimodalLM.from_pretrained(TINY)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(TINY)


@pytest.fixture
def picture(tmp_path):
    file = tmp_path / "red.png"
    Image.new("RGB", (20, 20), "red").save(file)
    return str(file)


@pytest.fixture
def broken(tmp_path):
    file = tmp_path / "broken.png"
    file.write_text("no picture")
    return str(file)


def answers(model, processor, text, files=(), history=(), **settings):
    """All that `respond` yields, each picture opened, as it is gone with the next."""
    defaults = {
        "mode": "draw",
        "num_inference_steps": 4,
        "image_guidance_scale": 2.0,
        "seed": 0,
        "scheduler": "DDIMScheduler",
        "max_new_tokens": 6,
        "preview_interval": 2,
    }
    message = {"text": text, "files": list(files)}
    for answer in app.respond(model, processor, message, list(history), **defaults | settings):
        yield [
            [part if isinstance(part, str) else Image.open(part["path"]).copy() for part in m["content"]]
            for m in answer
        ]


def drawn(model, processor, text, steps=4, scale=2.0, seed=0, scheduler="DDIMScheduler", images=None):
    """The same picture by `generate()`."""
    output = model.generate(
        **processor(text=[text], images=images),
        generation_mode="image",
        num_inference_steps=steps,
        image_guidance_scale=scale,
        scheduler=scheduler,
        generator=torch.Generator().manual_seed(seed),
    )
    return processor.post_process_multimodal_output(output, generation_mode="image")[0].tobytes()


def test_a_drawing_is_a_preview_with_its_step_and_then_the_picture_of_generate(model, processor):
    (preview,), (final,) = answers(model, processor, "a seven")
    assert preview[1] == "step 2 of 4" and preview[0].size == (8, 8)
    assert [image.tobytes() for image in final] == [drawn(model, processor, "a seven")]


def test_a_picture_with_the_prompt_is_edited(model, processor, picture):
    *_, ((final,),) = answers(model, processor, "make it blue", [picture])
    expected = drawn(model, processor, "<image>make it blue", images=[Image.open(picture)])
    assert final.tobytes() == expected != drawn(model, processor, "make it blue")


def test_a_caption_comes_in_pieces_and_is_that_of_generate(model, processor, picture):
    *_, ((text,),) = answers(model, processor, "what?", [picture], mode="caption")
    inputs = processor(text=["<image>what?"], images=[Image.open(picture)])
    ids = model.generate(**inputs, generation_mode="text", max_new_tokens=6)
    assert text == processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]


def test_a_chat_holds_text_and_pictures_in_their_order(processor, picture):
    model = AutoModelForMultimodalLM.from_pretrained(TINY)
    model.generation_config.sequence_bias = [[[model.config.image_start_token_id], 1e4]]
    model.generation_config.max_images = 1
    history = [
        {"role": "user", "content": [{"type": "file", "file": {"path": picture}}, {"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "ho"}]},
    ]
    (preview,), *_, ((image, text),) = answers(
        model, processor, "more", history=history, mode="chat", max_new_tokens=26
    )
    assert preview[1] == "step 2 of 4" and image.size == (8, 8) and text
    inputs = processor(
        text=["user: <image>hi\nassistant: ho</s>\nuser: more\nassistant:"], images=[Image.open(picture)]
    )
    output = model.generate(
        **inputs,
        max_new_tokens=26,
        num_inference_steps=4,
        image_guidance_scale=2.0,
        scheduler="DDIMScheduler",
        generator=torch.Generator().manual_seed(0),
    )
    (expected,) = processor.decode_interleaved(output.sequences[:, inputs["input_ids"].shape[1] :], output.images)
    assert [image.tobytes(), text] == [expected[0].tobytes(), expected[1]]


def test_what_was_refused_or_stopped_is_no_part_of_the_conversation(picture):
    def said(role, text, **metadata):
        return {"role": role, "content": [{"type": "text", "text": text}], "metadata": metadata or None}

    def shown(role, file, **metadata):
        return {"role": role, "content": [{"type": "file", "file": {"path": file}}], "metadata": metadata or None}

    history = [
        shown("user", "/nowhere/refused.png"),
        said("user", "one"),
        said("assistant", "two"),
        said("user", "three"),
        shown("assistant", "/nowhere/stopped.png", id="preview"),
        shown("user", picture),
        said("assistant", "four"),
        said("user", "<image>"),
    ]
    messages = app._messages(history)
    contents = [part.get("text", "picture") for message in messages for part in message["content"]]
    assert contents == ["one", "two", "picture", "four"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "caption"}, "There is no picture to caption"),
        ({"text": "an <image> too many"}, "`text` has 1 markers &lt;image&gt;"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be 1 to 1000; got 0"),
        ({"preview_interval": 0}, "`preview_interval` must be at least 1"),
    ],
)
def test_what_is_refused_is_a_warning_of_the_page(model, processor, changes, message):
    with pytest.warns(UserWarning, match=re.escape(message)):
        assert not list(answers(model, processor, **{"text": "a"} | changes))


def test_a_fault_is_a_warning_too_and_its_traceback_is_printed(processor, capsys):
    model = AutoModelForMultimodalLM.from_pretrained(TINY)
    model.generation_config.callback_on_step_end = lambda *args: {}["missing"]
    with pytest.warns(UserWarning, match="missing"):
        list(answers(model, processor, "a"))
    assert "Traceback" in capsys.readouterr().err


def test_without_a_seed_each_drawing_is_another(model, processor):
    pictures = [list(answers(model, processor, "a seven", seed=None))[-1][0][0].tobytes() for _ in range(2)]
    assert pictures[0] != pictures[1]


def test_who_closes_the_answer_stops_the_model(model, processor):
    before, stream = set(threading.enumerate()), answers(model, processor, "a", num_inference_steps=1000)
    next(stream)
    assert set(threading.enumerate()) - before
    stream.close()
    assert not set(threading.enumerate()) - before


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_the_schedulers_offered_fit_the_model(processor, prediction_type):
    model = AutoModelForMultimodalLM.from_pretrained(TINY, prediction_type=prediction_type)
    page = app.make_app(model, processor)
    (dropdown,) = [block for block in page.blocks.values() if isinstance(block, gr.Dropdown)]
    names = [value for _, value in dropdown.choices]
    assert dropdown.value in names and len(names) == (3 if prediction_type == "flow_prediction" else 5)
    for name in names:
        make_sampling_scheduler(model.noise_scheduler, name, 2, torch.device("cpu"))


def test_stored_settings_outside_of_the_usual_are_offered(model, processor, monkeypatch):
    stored = {"scheduler": "HeunDiscreteScheduler", "max_new_tokens": 10_000, "image_guidance_scale": 30.0}
    config = copy.deepcopy(model.generation_config)
    config.update(**stored)
    monkeypatch.setattr(model, "generation_config", config)
    page = app.make_app(model, processor)
    settings = [block for block in page.blocks.values() if isinstance(block, gr.Dropdown | gr.Slider)]
    assert {*stored.values()} <= {block.preprocess(block.value) for block in settings}


@pytest.fixture(scope="module")
def drawing_model(processor):
    """Writes one token, then draws."""
    model = AutoModelForMultimodalLM.from_pretrained(TINY)
    start = model.config.image_start_token_id
    model.generation_config.sequence_bias = [[[i, start], 1e4] for i in range(ord("a"), ord("z"))]
    model.generation_config.sequence_bias += [[[i], 1e3] for i in range(ord("a"), ord("z"))]
    return model


def test_a_model_that_draws_on_its_own_draws_by_default_and_its_captions_are_the_examples(drawing_model, processor):
    captions = app.sample_captions(drawing_model, processor)
    page = app.make_app(drawing_model, processor)
    (mode,) = [block for block in page.blocks.values() if isinstance(block, gr.Radio)]
    (chatbot,) = [block for block in page.blocks.values() if isinstance(block, gr.Chatbot)]
    assert captions and mode.value == "draw"
    assert [example["text"] for example in chatbot.examples] == captions
    inputs = processor(text=captions[:1])
    assert drawing_model.generate(**inputs, max_new_tokens=24, num_inference_steps=1).images[0]


def test_a_model_that_writes_chats_by_default(model, processor):
    page = app.make_app(model, processor)
    (mode,) = [block for block in page.blocks.values() if isinstance(block, gr.Radio)]
    assert app.sample_captions(model, processor) is None and mode.value == "chat"
    assert page.title == "fixtures/tiny-transfusion · Transfusion"


def test_given_examples_are_offered_and_drawn(model, processor):
    given = [f"a red apple {i}" for i in range(6)]
    page = app.make_app(model, processor, given)
    (mode,) = [block for block in page.blocks.values() if isinstance(block, gr.Radio)]
    (chatbot,) = [block for block in page.blocks.values() if isinstance(block, gr.Chatbot)]
    assert mode.value == "draw" and [example["text"] for example in chatbot.examples] == given


def test_the_model_runs_for_one_at_a_time(model, processor):
    page = app.make_app(model, processor)
    runs = [fn for fn in page.fns.values() if fn.name == "_submit_fn"]
    assert runs and {fn.concurrency_limit for fn in runs} == {1} and len({fn.concurrency_id for fn in runs}) == 1
    assert not [fn for fn in page.fns.values() if fn.api_visibility == "public"]


def test_the_command_starts_the_page(monkeypatch):
    launched = {}
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **kwargs: launched.update(blocks=self.blocks, **kwargs))
    words = ["--host", "0.0.0.0", "--port", "7000", "--share", "--examples", "a red apple", "a pizza"]
    assert main(["app", TINY, "--device", "cpu", *words]) == 0
    assert (launched["server_name"], launched["server_port"], launched["share"]) == ("0.0.0.0", 7000, True)
    (chatbot,) = [block for block in launched["blocks"].values() if isinstance(block, gr.Chatbot)]
    assert [example["text"] for example in chatbot.examples] == ["a red apple", "a pizza"]


def test_the_space_shows_the_model_that_its_variable_names(monkeypatch):
    launched = {}
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **kwargs: launched.update(title=self.title, **kwargs))
    script = Path(__file__).parents[1] / "examples" / "space" / "app.py"
    monkeypatch.delenv("MODEL", raising=False)
    with pytest.raises(SystemExit, match="Set the Space's variable MODEL"):
        runpy.run_path(str(script))
    monkeypatch.setenv("MODEL", TINY)
    runpy.run_path(str(script))
    assert launched["server_name"] == "0.0.0.0" and "tiny-transfusion" in launched["title"]
    card = (script.parent / "README.md").read_text()
    pinned = (Path(__file__).parents[1] / "constraints.txt").read_text()
    version = next(line for line in pinned.splitlines() if line.startswith("gradio==")).removeprefix("gradio==")
    assert f"sdk_version: {version}" in card


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "transfusion_hf.cli.app")
    assert main(["app", TINY]) == 1
    assert 'run `pip install "transfusion-hf[demo]"`' in capsys.readouterr().err


# The page itself.


@pytest.fixture(scope="module")
def browser():
    playwright = needed("playwright.sync_api")
    if CHROMIUM is None:
        message = "no `chromium` on the path; `make browser` installs it"
        (pytest.fail if os.environ.get("TRANSFUSION_REQUIRE_BROWSER") else pytest.skip)(message)
    with playwright.sync_playwright() as engines:
        browser = engines.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(model, processor):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = app.launch_app(model, processor, server_port=port, prevent_thread_lock=True, quiet=True)
    yield f"http://127.0.0.1:{port}"
    page.close()


class Visit:
    """A visit to the page, with the hands of a user."""

    def __init__(self, page, address):
        self.page = page
        page.goto(address)
        self.prompt = page.locator(".multimodal-textbox textarea, textarea").last
        self.prompt.wait_for()

    def fill(self, field, value):
        """A page that is still opening takes back what is filled in, be there a new value or not."""
        field.fill(value)
        self.page.wait_for_timeout(300)
        while field.input_value() != value:
            field.fill(value)
            self.page.wait_for_timeout(300)

    def set(self, mode=None, **settings):
        if mode is not None:
            self.page.get_by_label(mode, exact=True).check()
        for label, value in settings.items():
            self.fill(self.page.get_by_label(label.replace("_", " ")).first, value)
            self.page.keyboard.press("Tab")

    def choose(self, scheduler):
        self.page.get_by_label("scheduler", exact=True).click()
        self.page.get_by_role("option", name=scheduler).click()

    def send(self, text, file=None):
        if file is not None:
            self.page.locator("input[type=file]").last.set_input_files(file)
            self.page.locator(".thumbnail-item").wait_for()
        num_sent = self.page.get_by_test_id("user").count()
        self.fill(self.prompt, text)
        self.prompt.press("Enter")
        self.page.wait_for_function(
            "n => document.querySelectorAll('[data-testid=user]').length > n", arg=num_sent, timeout=60_000
        )

    def wait(self):
        """Until the answer is there: the prompt is closed meanwhile."""
        self.page.wait_for_function(
            "() => ![...document.querySelectorAll('textarea')].at(-1).disabled", timeout=60_000
        )
        self.page.wait_for_timeout(300)

    def pictures(self):
        images = self.page.locator("[data-testid=bot] img")
        return [Image.open(io.BytesIO(self.page.request.get(i.get_attribute("src")).body())) for i in images.all()]

    def draw(self, text):
        self.send(text)
        self.wait()
        return self.pictures()[-1]


@pytest.mark.parametrize(("width", "is_open"), [(1200, True), (390, False)])
def test_the_settings_are_open_where_there_is_room(browser, address, width, is_open):
    page = browser.new_page(viewport={"width": width, "height": 800})
    visit = Visit(page, address)
    page.locator(f".sidebar{'.open' if is_open else ':not(.open)'}").wait_for(state="attached")
    page.wait_for_timeout(500)  # it slides
    prompt = visit.prompt.bounding_box()
    assert page.get_by_role("heading", name="tiny-transfusion").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    left = page.get_by_label("seed").bounding_box()["x"]
    assert (0 <= left < prompt["x"]) if is_open else (left < 0 and prompt["width"] > 150)
    assert page.get_by_label("seed").input_value() == "", "random by default"
    page.close()


def test_an_example_is_drawn_with_a_click(browser, drawing_model, processor):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = app.launch_app(drawing_model, processor, server_port=port, prevent_thread_lock=True, quiet=True)
    page = browser.new_page(viewport={"width": 390, "height": 844})
    visit = Visit(page, f"http://127.0.0.1:{port}")
    page.locator(".example").first.click()
    page.get_by_test_id("bot").locator("img").wait_for()
    visit.wait()
    assert [picture.size for picture in visit.pictures()] == [(8, 8)]
    page.close()
    server.close()


@pytest.fixture
def visit(browser, address):
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    page.set_default_timeout(60_000)
    elsewhere: list[str] = []
    local = (address, "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(local) else elsewhere.append(request.url))
    yield Visit(page, address)
    page.close()
    assert not elsewhere, "the page needs nothing from elsewhere"


# All steps and pictures that the chat ever shows.
WATCH = """() => {
  window.steps = []; window.shown = new Set();
  new MutationObserver(() => {
    const step = document.querySelector('.bubble-wrap').innerText.match(/step (\\d+) of \\d+/);
    if (step && window.steps.at(-1) !== +step[1]) window.steps.push(+step[1]);
    for (const i of document.querySelectorAll('[data-testid=bot] img')) window.shown.add(i.src);
  }).observe(document.body, {childList: true, subtree: true, characterData: true, attributes: true});
}"""


def pause(*_):
    """After each step: a machine may be so fast, or its browser so slow, that a drawing ends before a step is seen."""
    time.sleep(0.05)
    return {}


def test_a_drawing_appears_by_its_previews(visit, model, processor, monkeypatch, tmp_path):
    monkeypatch.setattr(model.generation_config, "callback_on_step_end", pause, raising=False)
    visit.set(mode="draw", steps="50", seed="5", preview_interval="3")
    visit.choose("DDIMScheduler")
    visit.page.evaluate(WATCH)
    image = visit.draw("a seven")
    steps, num_shown = visit.page.evaluate("[window.steps, window.shown.size]")
    assert len(steps) >= 2 and steps == sorted(steps) and all(step % 3 == 0 for step in steps)
    assert num_shown >= 2 and len(visit.pictures()) == 1
    assert "step" not in visit.page.locator(".bubble-wrap").inner_text()
    assert image.format == "PNG" and image.tobytes() == drawn(model, processor, "a seven", 50, 3.0, 5)
    size = visit.page.locator("[data-testid=bot] img").evaluate("i => [i.naturalWidth, i.naturalHeight, i.width]")
    assert size == [8, 8, 256], "8 pixels, shown large"
    visit.page.screenshot(path=tmp_path / "app.png")


def test_settings_decide_the_picture(visit):
    visit.set(mode="draw", steps="5", seed="1")
    first, second = (visit.draw("a seven").tobytes() for _ in range(2))
    assert first == second
    visit.set(seed="2")
    assert visit.draw("a seven").tobytes() != first
    visit.set(seed="1")
    visit.choose("UniPCMultistepScheduler")
    other = visit.draw("a seven").tobytes()
    assert other != first
    visit.set(guidance_scale="7")
    assert visit.draw("a seven").tobytes() != other


def test_errors_are_shown_and_the_page_works_on(visit, picture, broken, tmp_path):
    visit.set(mode="caption", max_new_tokens="6")
    errors = visit.page.locator(".toast-body")
    for text, file, message in [
        ("what?", None, "There is no picture to caption"),
        ("what?", broken, "broken.png is no picture that can be read"),
        ("an <image> too many", picture, "`text` has 2 markers <image>"),
    ]:
        visit.send(text, file)
        errors.filter(has_text=message).wait_for()
        visit.wait()
    other = tmp_path / "other.png"  # a browser tells a page nothing of the same file chosen twice
    Image.new("RGB", (8, 8), "blue").save(other)
    visit.send("what?", other)
    visit.wait()
    answer = visit.page.get_by_test_id("bot")
    assert answer.count() == 1 and answer.inner_text().strip()
    visit.set(mode="chat")  # the refused messages are no part of the conversation
    visit.send("and now?")
    visit.wait()
    assert visit.page.get_by_test_id("bot").count() == 2


def test_the_stop_button_stops_the_model(visit, model, monkeypatch):
    monkeypatch.setattr(model.generation_config, "callback_on_step_end", pause, raising=False)
    before = set(threading.enumerate())
    visit.set(mode="draw", steps="1000", preview_interval="1", max_new_tokens="6")
    visit.send("a seven")
    step = visit.page.get_by_text(re.compile(r"step \d+ of \d+"))
    step.wait_for()
    assert step.inner_text().endswith("of 1000")
    visit.page.locator(".stop-button").click()
    visit.wait()
    (step,) = re.findall(r"step (\d+) of 1000", visit.page.locator(".bubble-wrap").inner_text())
    assert int(step) < 1000
    deadline = time.monotonic() + 10
    while any(t.name.startswith("generate") for t in set(threading.enumerate()) - before):
        assert time.monotonic() < deadline, "the model runs on"
        time.sleep(0.05)
    visit.set(mode="draw", steps="3")
    assert visit.draw("another").size == (8, 8)
    visit.set(mode="chat")
    visit.send("and now?")
    visit.wait()
    assert "step" in visit.page.locator(".bubble-wrap").inner_text(), "what was stopped stays to be seen"
