"""What a run of `transfusion_hf.evaluation` keeps on disk: resumed, on two processes, with other settings."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.normalizers import Lowercase
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForMultimodalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from transfusion_hf import TransfusionProcessor
from transfusion_hf.evaluation.run import Run, Score, digest, fingerprint, open_picture, require_images

TINY = Path(__file__).parent / "fixtures" / "tiny-transfusion"
STEPS = {"num_inference_steps": 2}
PROMPTS = ["a seven", "a", "a much longer prompt", "two", "three"]


@pytest.fixture(scope="module")
def model():
    return AutoModelForMultimodalLM.from_pretrained(TINY)


@pytest.fixture(scope="module")
def processor():
    return TransfusionProcessor.from_pretrained(TINY)


@pytest.fixture
def run(model, processor, tmp_path):
    return Run(model, processor, tmp_path, batch_size=2, drawing=STEPS)


def squares(indices, items):
    return [{"square": item * item, "text": "\u2028\x85 of ü"} for item in items]


class Killed(BaseException):
    pass


def test_results_come_in_the_order_of_the_items_whatever_the_batch(run):
    for size in (1, 2, 7):
        results = run.map(f"of {size}", [3, 1, 2], squares, {}, batch_size=size)
        assert [result["square"] for result in results] == [9, 1, 4]
        assert results[0]["text"] == "\u2028\x85 of ü"


@pytest.mark.parametrize("cut", [0, 2, 17])
def test_a_run_that_is_killed_goes_on_and_leaves_the_same_file(run, tmp_path, cut):
    items, calls = list(range(7)), []
    run.map("whole", items, squares, {})

    def dies(indices, items):
        if indices[0] == 4:
            raise Killed
        return squares(indices, items)

    with pytest.raises(Killed):
        run.map("killed", items, dies, {})
    (part,) = tmp_path.glob("killed.0.jsonl")
    part.write_bytes(part.read_bytes()[: -cut or None])  # in the midst of a line

    def counts(indices, items):
        calls.append(indices)
        return squares(indices, items)

    run.map("killed", items, counts, {})
    assert calls == ([[2, 3]] if cut else []) + [[4, 5], [6]]
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not [*tmp_path.glob("killed.*.jsonl")]
    calls.clear()
    run.map("killed", items, counts, {})
    assert calls == []


def test_a_batch_of_which_some_is_missing_is_computed_whole(run, tmp_path):
    run.map("x", [1, 2, 3, 4], squares, {})
    lines = (tmp_path / "x.jsonl").read_text().split("\n")
    (tmp_path / "x.jsonl").write_text("\n".join([lines[0], *lines[2:]]))
    seen = []

    def sees(indices, items):
        seen.append(indices)
        return [{"square": 0}] * len(items)

    assert [result["square"] for result in run.map("x", [1, 2, 3, 4], sees, {})] == [1, 0, 9, 16]
    assert seen == [[0, 1]]


def test_processes_share_the_batches_and_read_each_others_results(run, tmp_path):
    run.map("alone", list(range(9)), squares, {})
    items, seen = list(range(9)), {0: [], 1: []}
    for rank in (1, 0):  # the first process gathers, when the others are done

        class State:
            process_index, num_processes, is_main_process = rank, 2, rank == 0
            wait_for_everyone = staticmethod(lambda: None)

        def sees(indices, items, rank=rank):
            seen[rank] += indices
            return squares(indices, items)

        other = Run(run.model, run.processor, tmp_path, batch_size=2, drawing=STEPS)
        other.__dict__["state"] = State
        if rank == 1:
            (tmp_path / "shared.settings.json").write_text('{"num_items": 9}')
            with pytest.raises(KeyError):  # no barrier holds it here until the first has its results
                other.map("shared", items, sees, {})
        else:
            other.map("shared", items, sees, {})
    assert seen == {0: [0, 1, 4, 5, 8], 1: [2, 3, 6, 7]}
    assert (tmp_path / "shared.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()


def test_a_changed_setting_is_an_error_that_names_it(run, model, processor, tmp_path):
    run.draw("x", PROMPTS)
    changes = {
        "seed": {"seed": 1},
        "drawing": {"drawing": {"num_inference_steps": 3}},
    }
    for name, change in changes.items():
        other = Run(model, processor, tmp_path, **{"drawing": STEPS, **change})
        with pytest.raises(ValueError, match=f"`{name}` is .* was made with .* delete"):
            other.draw("x", PROMPTS)
    with pytest.raises(ValueError, match=r"`num_items` is 4, but .* with 5"):
        run.draw("x", PROMPTS[:4])
    with pytest.raises(ValueError, match="`prompts` is"):
        run.draw("x", [*PROMPTS[:4], "else"])
    run.draw("x", PROMPTS)


def test_drawings_depend_on_neither_batch_nor_the_rest(model, processor, tmp_path):
    one = Run(model, processor, tmp_path / "1", batch_size=1, drawing=STEPS).draw("x", PROMPTS, 2)
    all_at_once = Run(model, processor, tmp_path / "10", batch_size=10, drawing=STEPS).draw("x", PROMPTS, 2)
    assert [file.name for file in one] == [f"{i:06d}.png" for i in range(10)]
    for first, second in zip(one, all_at_once, strict=True):
        difference = np.asarray(Image.open(first), float) - np.asarray(Image.open(second), float)
        assert abs(difference).max() <= 1  # of 255, from rounding
    assert one[0].read_bytes() != one[1].read_bytes()  # two of one prompt
    lines = [json.loads(line) for line in (tmp_path / "1" / "x" / "images.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert len({line["seed"] for line in lines}) == 10


def test_drawings_are_those_of_generate_with_the_seed_on_disk(run, model, processor, tmp_path):
    run.drawing = {**STEPS, "guidance_scale": 3.0, "scheduler": "DDIMScheduler"}
    (file,) = run.draw("x", ["a seven"])
    seed = json.loads((tmp_path / "x" / "images.jsonl").read_text())["seed"]
    output = model.generate(
        **processor(text=["a seven"]), generation_mode="image", num_inference_steps=2, image_guidance_scale=3.0,
        scheduler="DDIMScheduler", generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    (image,) = processor.post_process_multimodal_output(output, generation_mode="image")
    assert np.array_equal(np.asarray(Image.open(file)), np.asarray(image))


def test_a_lost_drawing_is_drawn_again(run, tmp_path):
    files = run.draw("x", PROMPTS)
    before = [file.read_bytes() for file in files]
    files[3].unlink()
    assert [file.read_bytes() for file in run.draw("x", PROMPTS)] == before


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("a <image> of", "Prompt 1, 'a <image> of', holds <image>"), ("long " * 300, r"Prompt 1, .* has \d+ tokens")],
)
def test_a_prompt_that_cannot_be_drawn_is_named_before_the_first_is(run, tmp_path, prompt, message):
    with pytest.raises(ValueError, match=message):
        run.draw("x", ["a seven", prompt])
    assert not [*tmp_path.iterdir()]


def test_processor_tokenizer_and_generation_config_are_settings(run, processor, tmp_path):
    pictures = [Image.linear_gradient("L").resize((16, 16)).convert("RGB")]
    model = AutoModelForMultimodalLM.from_pretrained(TINY)
    run.model = model
    run.caption("x", pictures, {}, max_new_tokens=2)
    run.draw("x", ["a"])

    def refuses(name, **changes):
        other = Run(**{"model": model, "processor": processor, "output_dir": tmp_path, "drawing": STEPS, **changes})
        for work in (lambda: other.caption("x", pictures, {}, max_new_tokens=2), lambda: other.draw("x", ["a"])):
            with pytest.raises(ValueError, match=f"`{name}` is"):
                work()

    changed = TransfusionProcessor.from_pretrained(TINY)
    changed.image_processor.image_mean = [0.25]
    refuses("image_processor", processor=changed)
    changed = TransfusionProcessor.from_pretrained(TINY)
    changed.tokenizer.backend_tokenizer.normalizer = Lowercase()
    refuses("tokenizer", processor=changed)
    model.generation_config.image_guidance_scale = 2.5
    refuses("generation_config")


def test_captions_are_greedy_whatever_the_generation_config_says(run, processor, tmp_path):
    pictures = [Image.linear_gradient("L").resize((16, 16)).convert("RGB").rotate(90 * i) for i in range(3)]
    expected = run.caption("x", pictures, {}, max_new_tokens=9)
    model = AutoModelForMultimodalLM.from_pretrained(TINY)
    model.generation_config.update(num_beams=3, repetition_penalty=5.0, no_repeat_ngram_size=1, min_new_tokens=9)
    assert Run(model, processor, tmp_path / "other").caption("x", pictures, {}, max_new_tokens=9) == expected


def test_captions_are_greedy_and_those_of_generate(run, model, processor, tmp_path):
    pictures = [Image.linear_gradient("L").resize((16, 16)).convert("RGB").rotate(90 * i) for i in range(3)]
    captions = run.caption("x", pictures, {}, prompt="what?", max_new_tokens=5)
    for picture, caption in zip(pictures, captions, strict=True):
        inputs = processor(text=["<image>what?"], images=[picture])
        ids = model.generate(**inputs, generation_mode="text", do_sample=False, max_new_tokens=5)
        expected = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert [caption] == [text.strip() for text in expected]
    with pytest.raises(ValueError, match="`prompt` is 'who"):
        run.caption("x", pictures, {}, prompt="who?", max_new_tokens=5)


def test_the_fingerprint_is_of_the_weights_and_not_of_the_name(model, tmp_path):
    model.save_pretrained(tmp_path)
    other = AutoModelForMultimodalLM.from_pretrained(tmp_path)
    assert fingerprint(other) == fingerprint(model)
    for weight in list(other.parameters())[::7]:
        for place in (0, 1, -1):
            with torch.no_grad():
                weight.flatten()[place] += 1
            assert fingerprint(other) != fingerprint(model)
            other.load_state_dict(model.state_dict())
    assert fingerprint(AutoModelForMultimodalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)) != fingerprint(model)


def test_a_quantised_model_has_a_fingerprint_of_its_own(model):
    config = TorchAoConfig(Int8WeightOnlyConfig())
    quantised = [AutoModelForMultimodalLM.from_pretrained(TINY, quantization_config=config) for _ in range(2)]
    assert fingerprint(quantised[0]) == fingerprint(quantised[1]) != fingerprint(model)


def test_an_interval_of_a_share_is_the_binomials():
    outcomes = [1.0] * 300 + [0.0] * 100
    score = Score.of(np.mean, outcomes)
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert (score.value, score.num_items) == (0.75, 400)
    assert score.interval == pytest.approx((0.75 - half, 0.75 + half), abs=0.006)
    assert Score.of(np.mean, outcomes) == score
    assert Score.of(np.mean, [1.0]).interval is None


def test_an_interval_of_a_ratio_draws_both_columns_together():
    def ratio(first, second, axis):
        return first.sum(axis) / second.sum(axis)

    score = Score.of(ratio, [1.0, 20.0, 300.0], [2.0, 40.0, 600.0])
    assert (score.value, score.interval) == (0.5, (0.5, 0.5))


def test_a_model_without_image_ids_and_a_broken_picture_are_named(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    with pytest.raises(ValueError, match=r"The task `shapes` needs images.*convert_causal_lm"):
        require_images(LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)), "shapes")
    (file := tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(ValueError, match=r"The picture .*broken\.png cannot be read"):
        open_picture(file)


def test_digests_tell_values_apart():
    assert digest("a", ["b"]) == digest("a", ["b"]) != digest("a", "b")
