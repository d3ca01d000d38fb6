"""Random batches of rows in every state: each row equals itself alone, whatever the cache and the attention."""

import random
from typing import Any

import pytest
import tiny
import torch
from test_generation import IMAGE, STEPS, assert_rows_equal, generators, prompts
from tiny import BOI, BOS, EOI, EOS, IMG, PAD
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

TEXTS = {
    "llama": tiny.text_config(),
    "gemma3": tiny.gemma3(),
    "qwen3": tiny.text_config("qwen3"),
}


class ScriptOfRows(LogitsProcessor):
    """Makes row i say `scripts[i]` behind `rows[i]`, and then whatever the model says."""

    def __init__(self, rows: list[list[int]], scripts: list[list[int]]):
        self.rows = rows
        self.scripts = scripts

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for i, ids in enumerate(input_ids.tolist()):
            new = [token for token in ids if token != PAD][len(self.rows[i]) :]
            said = [token for token in new if token not in (IMG, EOI)]
            if len(said) < len(self.scripts[i]):
                scores[i, self.scripts[i][len(said)]] += 1000.0
        return scores


def draw_batch(seed: int) -> dict[str, Any]:
    """Prompts with and without images, some that draw at once, scripts that draw early, late, twice or never."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows, scripts, images, num_rows = [], [], [], rng.randrange(2, 5)
    for _ in range(num_rows):
        row, own = ([BOS] if rng.random() < 0.6 else []) + tiny.words(rng, rng.randrange(1, 5)), []
        while rng.random() < 0.35:
            row += IMAGE + tiny.words(rng, rng.randrange(3))
            own.append(torch.randn(2, 4, 4, generator=generator))
        if row[-1] == EOI or rng.random() < 0.5:
            row += tiny.words(rng, 1)
        rows.append([*row, BOI] if rng.random() < 0.3 else row)
        images.append(own)
        script = [BOI if rng.random() < 0.35 else word for word in tiny.words(rng, rng.randrange(5))]
        scripts.append([*script, EOS] if rng.random() < 0.5 else script)
    return {"rng": rng, "rows": rows, "scripts": scripts, "images": images}


def draw_options(rng: random.Random, images: list[list[torch.Tensor]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Options for all rows, and those that are each row's own."""
    shared: dict[str, Any] = {
        "num_inference_steps": STEPS,
        "scheduler": "DDIMScheduler",
        "max_new_tokens": rng.choice([16, 24]),
        "suppress_tokens": [PAD],
        "image_guidance_scale": rng.choice([1.0, 2.5]),
        "generation_mode": rng.choice(["interleaved", "interleaved", "image"]),
    }
    own: list[dict[str, Any]] = [{} for _ in images]
    shared |= rng.choice([{}, {}, {"min_new_tokens": 6}, {"no_repeat_ngram_size": 2}])
    if shared["image_guidance_scale"] != 1:
        part = {"guidance_start": 0.25, "guidance_end": 0.75}
        shared |= rng.choice([{}, part, {"guidance_rescale": 0.6}, {"guidance_interval": (0.3, 0.8)}])
        is_nested = rng.random() < 0.4
        if is_nested:
            renorms = [None, "global", "channel", "text_channel"]
            shared |= {"guidance_type": "nested", "guidance_renorm": rng.choice(renorms)}
        if all(images) and rng.random() < 0.6:
            shared["input_image_guidance_scale"] = 1.5
        if rng.random() < 0.4 and not (is_nested and any(images)):
            for options in own:
                options["negative"] = [BOS] * rng.randrange(2) + tiny.words(rng, rng.randrange(1, 4))
    if rng.random() < 0.5:
        for options in own:
            options["height"], options["width"] = rng.choice([(4, 4), (2, 4), (4, 6)])
    if rng.random() < 0.4:
        shared |= {"do_sample": True, "temperature": 1.5}
    return shared, own


def inputs_of(rows: list[list[int]], images: list[list[torch.Tensor]], own: list[dict[str, Any]]) -> dict[str, Any]:
    inputs: dict[str, Any] = prompts(*rows)
    if any(images):
        inputs["latents"] = torch.stack([image for row in images for image in row])
    if "negative" in own[0]:
        negative = prompts(*(options["negative"] for options in own))
        inputs["negative_prompt_ids"] = negative["input_ids"]
        inputs["negative_prompt_attention_mask"] = negative["attention_mask"]
    for name in ("height", "width"):
        if name in own[0]:
            inputs[name] = [options[name] for options in own]
    return inputs


def with_filled_cache(model, inputs: dict[str, Any], rng: random.Random) -> dict[str, Any] | None:
    """The same call with a first part of the prompts in a cache; `None` where they have no such part."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    ends = [k for k in range(1, ids.shape[1]) if not torch.isin(ids[:, k], torch.tensor([IMG, EOI])).any()]
    if not ends:
        return None
    end = rng.choice(ends)
    image_ids = ids[:, :end] == IMG
    num_cached = [int(row.sum()) // 4 for row in image_ids]
    all_counts = [int((row == IMG).sum()) // 4 for row in ids]
    cached, rest, images = [], [], iter(inputs.get("latents", []))
    for first, count in zip(num_cached, all_counts, strict=True):
        row = [next(images) for _ in range(count)]
        cached += row[:first]
        rest += row[first:]
    cache = DynamicCache()
    with torch.no_grad():
        model(
            ids[:, :end],
            latents=torch.stack(cached) if cached else None,
            attention_mask=mask[:, :end],
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, :end],
            cache=cache,
            use_cache=True,
        )
    inputs = {**inputs, "cache": cache}
    inputs.pop("latents", None)
    return {**inputs, "latents": torch.stack(rest)} if rest else inputs


@pytest.fixture(autouse=True)
def _eager():
    with tiny.uncompiled():
        yield


# The odd ones with fields that the paper's model has not.
SEEDS = [pytest.param(seed, marks=[pytest.mark.slow] * (seed >= 4)) for seed in range(24)]


@pytest.mark.parametrize("seed", SEEDS)
def test_each_row_of_a_random_batch_equals_itself_alone_with_every_cache_and_attention(seed):
    case = draw_batch(seed)
    rng, rows, scripts, images = (case[name] for name in ("rng", "rows", "scripts", "images"))
    shared, own = draw_options(rng, images)
    model = tiny.model(TEXTS[rng.choice(list(TEXTS))], seed=seed, **tiny.drawn_fields(seed % 2 * seed))

    def run(inputs, members, **kwargs):
        chosen_rows, chosen_scripts = ([given[i] for i in members] for given in (rows, scripts))
        processors = LogitsProcessorList([ScriptOfRows(chosen_rows, chosen_scripts)])
        generator = [generators(len(rows))[i] for i in members]
        return model.generate(**inputs, logits_processor=processors, generator=generator, **shared, **kwargs)

    expected = []
    for i, row in enumerate(rows):
        inputs = inputs_of([row], [images[i]], [own[i]])
        expected.append((run(inputs, [i], use_cache=False), inputs))
    together, everyone = inputs_of(rows, images, own), list(range(len(rows)))
    columns, padded = rng.randrange(3), dict(together)  # of padding that all rows have
    for name, value in (("input_ids", PAD), ("attention_mask", 0)):
        padded[name] = torch.nn.functional.pad(together[name], (columns, 0), value=value)
    outputs = []
    has_window = model.config.text_config.model_type == "gemma3_text"  # of which `transfusion_varlen` knows nothing
    for backend in ("sdpa", rng.choice(["eager", "flex_attention", *["transfusion_varlen"] * (not has_window)])):
        model.set_attn_implementation(backend)
        outputs.append((run(padded, everyone, use_cache=rng.random() < 0.7), padded))
        outputs.append((run({**together, "cache": DynamicCache()}, everyone), together))
        # Nested guidance needs the images of the prompts, which a cache hides.
        is_hidden = any(images) and shared.get("guidance_type") == "nested"
        filled = None if is_hidden else with_filled_cache(model, together, rng)
        if filled is not None:
            outputs.append((run(filled, everyone), together))
    for output, given in outputs:
        for i, (alone, inputs) in enumerate(expected):
            assert_rows_equal(output, i, alone, given, inputs)


@pytest.mark.parametrize("seed", SEEDS)
def test_text_of_a_random_batch_is_that_of_each_row_alone_with_every_cache_and_attention(seed):
    case = draw_batch(seed)
    rng, images = case["rng"], case["images"]
    rows = [row[:-1] if row[-1] == BOI else row for row in case["rows"]]
    model = tiny.model(TEXTS[rng.choice(list(TEXTS))], seed=seed, **tiny.drawn_fields(seed % 2 * seed))

    def run(inputs, **kwargs):
        return model.generate(
            **inputs, generation_mode="text", max_new_tokens=8, min_new_tokens=8, do_sample=False, **kwargs
        )

    together = inputs_of(rows, images, [{}])
    alone = (inputs_of([row], [own], [{}]) for row, own in zip(rows, images, strict=True))
    expected = [run(inputs, use_cache=False)[0, -8:].tolist() for inputs in alone]
    backend = rng.choice(["sdpa", "eager", "flex_attention"])
    model.set_attn_implementation(backend)
    for kwargs in ({}, {"use_cache": False}, {"cache": DynamicCache()}):
        assert run(together, **kwargs)[:, -8:].tolist() == expected, kwargs
    if backend == "flex_attention":
        with pytest.raises(ValueError, match="takes no `flex_attention` with a static cache"):
            run(together, cache_implementation="static")
    else:
        assert run(together, cache_implementation="static")[:, -8:].tolist() == expected
