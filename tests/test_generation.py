import random
from itertools import pairwise

import pytest
import tiny
import torch
import transformers
from diffusers import (
    DDIMScheduler,
)
from tiny import BOI, BOS, EOI, EOS, IMG, PAD
from transformers import (
    DynamicCache,
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
)
from transformers.generation.streamers import BaseStreamer

STEPS = 4
IMAGE = [BOI] + [IMG] * 4 + [EOI]
TEXTS = {
    "llama": tiny.text_config(),
    "gemma3": tiny.gemma3(),
    "mistral": tiny.text_config("mistral", sliding_window=6),
}


class Script(LogitsProcessor):
    """
    Makes each row say what its script says and, behind it, whatever the model says; so that a random model draws where
    a test wants it to. A row is known by its first word, the place in its script by the text it has said since.
    """

    def __init__(self, scripts: dict[int, list[int]], strength: float = 1000.0):
        self.scripts = scripts
        self.strength = strength

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for row, ids in enumerate(input_ids.tolist()):
            ids = [token for token in ids if token not in (PAD, IMG, EOI, BOS)]
            script = self.scripts[ids[0]]
            said = ids[2:]  # prompts are two words, the first the row's name
            if len(said) < len(script):
                scores[row, script[len(said)]] += self.strength
        return scores


# An image early, two images, none, an image as the last thing: by the row's name.
SCRIPTS = {
    3: [BOI, 7, 8, 9, EOS],
    4: [10, BOI, BOI, 11, EOS],
    5: [12, 13, 14, 15, 16, 17, EOS],
    6: [18, 19, 20, BOI, EOS],
}


def prompts(*rows: list[int]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD, padding_side="left"
    )
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def generate(model, inputs, **kwargs):
    kwargs = {"max_new_tokens": 40, "num_inference_steps": STEPS, "scheduler": "DDIMScheduler", **kwargs}
    return model.generate(**inputs, **kwargs)


def new_ids(output, inputs, row: int) -> list[int]:
    ids = output.sequences[row, inputs["input_ids"].shape[1] :].tolist()
    while ids and ids[-1] == PAD:
        ids.pop()
    return ids


def assert_rows_equal(output, row, expected, inputs, expected_inputs, expected_row=0, atol=1e-4):
    assert new_ids(output, inputs, row) == new_ids(expected, expected_inputs, expected_row)
    assert len(output.images[row]) == len(expected.images[expected_row])
    for image, other in zip(output.images[row], expected.images[expected_row], strict=True):
        torch.testing.assert_close(image, other, atol=atol, rtol=0)


# A random model would end early, or say padding.
ENDLESS = {"suppress_tokens": [EOS, PAD]}
MIXED = [[BOS, 3, 30], [4, 30], [BOS, 5, 30], [BOS, 6, 30]]


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_each_row_of_a_mixed_batch_equals_that_row_alone(text, guidance):
    """Far past Gemma 3's window of 6, with and without guidance."""
    model = tiny.model(text)
    kwargs = {"logits_processor": LogitsProcessorList([Script(SCRIPTS)]), "image_guidance_scale": guidance}
    inputs = prompts(*MIXED)
    batch = generate(model, inputs, generator=generators(4), **kwargs)
    assert [len(row) for row in batch.images] == [1, 2, 0, 1]
    assert new_ids(batch, inputs, 1) == [10, *IMAGE, *IMAGE, 11, EOS]
    assert new_ids(batch, inputs, 3) == [18, 19, 20, *IMAGE, EOS]
    for row, prompt in enumerate(MIXED):
        alone_inputs = prompts(prompt)
        alone = generate(model, alone_inputs, generator=[generators(4)[row]], **kwargs)
        assert_rows_equal(batch, row, alone, inputs, alone_inputs)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_cached_equals_uncached(text, guidance):
    model = tiny.model(text)
    kwargs = {"logits_processor": LogitsProcessorList([Script(SCRIPTS)]), "image_guidance_scale": guidance}
    inputs = prompts(*MIXED)
    cached = generate(model, inputs, generator=generators(4), **kwargs)
    uncached = generate(model, inputs, generator=generators(4), use_cache=False, **kwargs)
    for row in range(4):
        assert_rows_equal(cached, row, uncached, inputs, inputs, row)


@pytest.mark.parametrize("options", [tiny.UNET, {**tiny.UNET, "pos_embed_type": "sincos"}])
def test_a_unet_draws_and_reads_alike_in_a_batch_alone_cached_and_uncached(options):
    model, inputs = tiny.model(**options), prompts(*MIXED)
    kwargs = {"logits_processor": LogitsProcessorList([Script(SCRIPTS)])}
    cached = generate(model, inputs, generator=generators(4), **kwargs)
    uncached = generate(model, inputs, generator=generators(4), use_cache=False, **kwargs)
    for row in range(4):
        assert_rows_equal(cached, row, uncached, inputs, inputs, row)
        alone = prompts(MIXED[row])
        one = generate(model, alone, generator=[generators(4)[row]], **kwargs)
        assert_rows_equal(cached, row, one, inputs, alone)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_free_text_after_images_equals_that_of_the_row_alone(text):
    """No script behind the images: what the model itself says depends on every key in the cache."""
    model = tiny.model(text)
    scripts = {3: [BOI], 4: [10, 11, BOI], 5: [], 6: [18, BOI, BOI]}
    kwargs = {"logits_processor": LogitsProcessorList([Script(scripts)]), "max_new_tokens": 30, **ENDLESS}
    inputs = prompts(*MIXED)
    batch = generate(model, inputs, generator=generators(4), **kwargs)
    uncached = generate(model, inputs, generator=generators(4), use_cache=False, **kwargs)
    for row, prompt in enumerate(MIXED):
        alone = generate(model, prompts(prompt), generator=[generators(4)[row]], **kwargs)
        assert_rows_equal(batch, row, alone, inputs, prompts(prompt))
        assert_rows_equal(batch, row, uncached, inputs, inputs, row)
        assert len(new_ids(batch, inputs, row)) == 30


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("mode", ["interleaved", "image"])
def test_prompts_with_images_and_prompts_that_end_at_boi(use_cache, mode):
    model = tiny.model(tiny.gemma3())
    rows = [[BOS, 3, *IMAGE, BOI], [BOS, 4, 30], [5, *IMAGE, 31, *IMAGE, 32], [BOI]]
    latents = torch.randn(3, 2, 4, 4)
    of_row = [latents[:1], None, latents[1:], None]
    inputs = prompts(*rows)
    kwargs = {"max_new_tokens": 12, "use_cache": use_cache, "generation_mode": mode}
    batch = generate(model, {**inputs, "latents": latents}, generator=generators(4), **kwargs)
    assert len(batch.images[0]) == len(batch.images[3]) == 1
    assert new_ids(batch, inputs, 0)[:5] == IMAGE[1:]
    for row, prompt in enumerate(rows):
        extra = {} if of_row[row] is None else {"latents": of_row[row]}
        alone = generate(model, {**prompts(prompt), **extra}, generator=[generators(4)[row]], **kwargs)
        assert_rows_equal(batch, row, alone, inputs, prompts(prompt))
    by_pixels = generate(model, {**inputs, "pixel_values": latents}, generator=generators(4), **kwargs)
    assert torch.equal(by_pixels.sequences, batch.sequences)


def test_left_padding_changes_nothing():
    model = tiny.model(tiny.gemma3())
    kwargs = {"logits_processor": LogitsProcessorList([Script({4: [10, BOI]})])}
    plain, padded = prompts([4, 30]), prompts([PAD] * 9 + [4, 30])
    outputs = [generate(model, inputs, generator=generators(1), **kwargs) for inputs in (plain, padded)]
    assert_rows_equal(outputs[0], 0, outputs[1], plain, padded)


def test_a_seed_reproduces_ids_and_pixels():
    model, inputs = tiny.model(), prompts([3, 30], [4, 30])
    kwargs = {
        "do_sample": True,
        "temperature": 3.0,
        "logits_processor": LogitsProcessorList([Script({3: [BOI], 4: [9, BOI]})]),
    }
    for make in (lambda: torch.Generator().manual_seed(5), lambda: generators(2)):
        first, second = (generate(model, inputs, generator=make(), **kwargs) for _ in range(2))
        assert torch.equal(first.sequences, second.sequences)
        assert all(torch.equal(a[0], b[0]) for a, b in zip(first.images, second.images, strict=True))
    other = generate(model, inputs, generator=torch.Generator().manual_seed(6), **kwargs)
    assert not torch.equal(first.sequences[:, :9], other.sequences[:, :9]) or not torch.equal(
        first.images[0][0], other.images[0][0]
    )
    torch.manual_seed(1)
    by_global_seed = generate(model, inputs, **kwargs)
    torch.manual_seed(1)
    assert torch.equal(by_global_seed.images[0][0], generate(model, inputs, **kwargs).images[0][0])


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_sampled_rows_with_their_own_generators_equal_the_row_alone(text):
    model, rows = tiny.model(text), [[3, 30], [BOS, 4, 30], [BOS, 5, 30]]
    scripts = {3: [BOI], 4: [9, 9, BOI], 5: []}
    kwargs = {"do_sample": True, "temperature": 2.0, "logits_processor": LogitsProcessorList([Script(scripts)])}
    inputs = prompts(*rows)
    batch = generate(model, inputs, generator=generators(3), **kwargs)
    for row, prompt in enumerate(rows):
        alone = generate(model, prompts(prompt), generator=[generators(3)[row]], **kwargs)
        assert_rows_equal(batch, row, alone, inputs, prompts(prompt))


# --- What it costs ---------------------------------------------------------------------------------------------------


def count_passes(model) -> list[tuple[int, int]]:
    """(rows, positions) of every pass of the decoder from now on."""
    passes: list[tuple[int, int]] = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    return passes


def test_eight_captions_of_different_lengths_run_one_denoising_loop():
    model = tiny.model()
    rows = [[BOS, 3, *tiny.words(random.Random(i), i), BOI] for i in range(8)]
    passes = count_passes(model)
    generate(model, prompts(*rows), generation_mode="image", image_guidance_scale=3.0)
    longest = max(len(row) for row in rows)
    # The first pass reads the prompts, too; the others compute the image alone, both branches of guidance together.
    assert passes == [(16, longest + 4)] + [(16, 4)] * (STEPS - 1)


def test_an_image_costs_its_steps_and_one_commit_whatever_the_prefix():
    for length in (2, 20):
        model = tiny.model()
        prompt = [BOS, 4, 30, *[31] * length]
        script = Script({4: [31] * length + [10, BOI, 11, EOS]})
        passes = count_passes(model)
        generate(model, prompts(prompt), logits_processor=LogitsProcessorList([script]), image_guidance_scale=3.0)
        # Prompt and <BOI>: the prompt, 10; then <BOI> with the image, the image, the clean image; <EOI>, 11.
        expected = [(1, len(prompt)), (1, 1), (2, 5)] + [(2, 4)] * (STEPS - 1) + [(1, 4), (1, 1), (1, 1)]
        assert passes == expected


def test_rows_that_say_boi_at_different_times_are_drawn_together():
    model = tiny.model()
    scripts = {3: [BOI, EOS], 4: [10, 11, BOI, EOS], 5: [12, EOS]}
    passes = count_passes(model)
    generate(
        model,
        prompts([3, 30], [4, 30], [5, 30]),
        logits_processor=LogitsProcessorList([Script(scripts)]),
        image_guidance_scale=1.0,
    )
    assert [p for p in passes if p[1] > 2] == [(2, 5)] + [(2, 4)] * STEPS  # one loop for both rows, and the commit


def test_guidance_1_costs_nothing_and_changes_nothing():
    model, inputs = tiny.model(), prompts([BOS, 5, 6, BOI])
    passes = count_passes(model)
    unguided = generate(model, inputs, generation_mode="image", image_guidance_scale=1, generator=generators(1))
    assert all(rows == 1 for rows, _ in passes)
    nearly = generate(model, inputs, generation_mode="image", image_guidance_scale=1 + 1e-7, generator=generators(1))
    torch.testing.assert_close(unguided.images[0][0], nearly.images[0][0], atol=1e-4, rtol=0)


def test_guidance_equals_two_plain_passes():
    """ε = ε(<BOI>) + s·(ε(prompt) − ε(<BOI>)), by hand; the beginning-of-sequence token stays where it was."""
    model, scale = tiny.model(), 3.0
    for bos in ([BOS], []):
        prompt = [*bos, 5, 6, BOI]
        output = generate(
            model, prompts(prompt), generation_mode="image", image_guidance_scale=scale, generator=generators(1)
        )
        scheduler = DDIMScheduler.from_config(model.noise_scheduler.config, steps_offset=230)
        scheduler.set_timesteps(STEPS)
        assert scheduler.timesteps.tolist() == [980, 730, 480, 230]
        x = torch.randn(1, 2, 4, 4, generator=generators(1)[0])
        with torch.no_grad():
            for t in scheduler.timesteps:
                eps = [
                    model(torch.tensor([[*context, *IMAGE[1:5]]]), latents=x, timesteps=t[None]).image_predictions[0]
                    for context in (prompt, [*bos, BOI])
                ]
                guided = eps[1] + scale * (eps[0] - eps[1])
                x = scheduler.step(guided[None], t, x, use_clipped_model_output=True).prev_sample
        torch.testing.assert_close(output.images[0][0], x[0], atol=1e-4, rtol=0)


# --- Modes, budgets and rules, per row -------------------------------------------------------------------------------


def test_modes():
    model, inputs = tiny.model(), prompts([4, 30])
    wants_image = LogitsProcessorList([Script({4: [BOI] * 9})])
    text = generate(model, inputs, generation_mode="text", max_new_tokens=5)
    assert isinstance(text, torch.Tensor) and not set(text[0].tolist()) & {BOI, IMG, EOI}
    image = generate(model, inputs, generation_mode="image", max_new_tokens=1)
    assert new_ids(image, inputs, 0) == IMAGE and len(image.images[0]) == 1
    interleaved = generate(model, inputs, logits_processor=wants_image, max_new_tokens=13)
    assert new_ids(interleaved, inputs, 0) == [*IMAGE, *IMAGE, BOI] and len(interleaved.images[0]) == 2


def test_slicing_the_output_like_a_tensor_names_its_sequences():
    output = generate(tiny.model(), prompts([BOS, 5, 30]))
    with pytest.raises(TypeError, match=r"index its ids, `output\.sequences\[\.\.\.\]`"):
        output[:, 3:]
    assert output[0] is output["sequences"] is output.sequences and output[:1] == (output.sequences,)


def test_what_the_decoder_appends_is_never_sampled():
    """Not even where the model would be certain: placeholders and <EOI> in any mode, <BOI> in text mode."""
    model, inputs = tiny.model(), prompts([4, 30])
    for mode, token in (("text", BOI), ("text", IMG), ("text", EOI), ("interleaved", IMG), ("interleaved", EOI)):
        script = LogitsProcessorList([Script({4: [token] * 20})])
        output = generate(model, inputs, logits_processor=script, generation_mode=mode, max_new_tokens=3)
        assert token not in getattr(output, "sequences", output)[0].tolist()


def test_beam_search_runs_as_text_unless_drawing_was_asked_for():
    model, inputs = tiny.model(), prompts([4, 30])
    beams = model.generate(**inputs, num_beams=3, max_new_tokens=6)
    assert isinstance(beams, torch.Tensor) and not set(beams[0].tolist()) & {BOI, IMG, EOI}
    with pytest.raises(ValueError, match="`generation_mode='interleaved'` draws, which beam_search cannot"):
        model.generate(**inputs, num_beams=3, max_new_tokens=6, generation_mode="interleaved")
    with pytest.raises(ValueError, match="`generator` is not used by beam_search"):
        model.generate(**inputs, num_beams=3, max_new_tokens=6, generator=torch.Generator())
    with pytest.raises(ValueError, match="`generator` holds 2 generators for 1 rows"):
        generate(model, inputs, generation_mode="text", do_sample=True, generator=generators(2))
    with pytest.raises(ValueError, match="Continuous batching is not supported"):
        model.generate_batch([[4, 30]])


def test_assisted_decoding_runs_as_text():
    model, assistant, inputs = tiny.model(), tiny.model(seed=1), prompts([4, 30])
    plain = generate(model, inputs, generation_mode="text", max_new_tokens=8)
    assert torch.equal(model.generate(**inputs, assistant_model=assistant, max_new_tokens=8), plain)
    with pytest.raises(ValueError, match="`generation_mode='image'` draws, which assisted_generation cannot"):
        model.generate(**inputs, assistant_model=assistant, generation_mode="image")


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_a_static_cache_in_text_mode_keeps_the_image_blocks(text):
    model = tiny.model(text)
    inputs = {**prompts([4, *IMAGE, 30], [5, 31, *IMAGE, 32]), "latents": torch.randn(2, 2, 4, 4)}
    kwargs = {"generation_mode": "text", "output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 8}
    dynamic = generate(model, inputs, **kwargs)
    static = generate(model, inputs, cache_implementation="static", **kwargs)
    assert torch.equal(static.sequences, dynamic.sequences)
    torch.testing.assert_close(static.logits[0], dynamic.logits[0], atol=1e-4, rtol=1e-4)


def test_max_new_tokens_counts_every_id_of_a_row():
    model, inputs = tiny.model(), prompts(*MIXED)
    scripts = {3: [BOI, *[9] * 30], 4: [10, BOI, BOI, *[9] * 30], 5: [9] * 40, 6: [18, 19, 20, BOI, *[9] * 30]}
    output = generate(model, inputs, logits_processor=LogitsProcessorList([Script(scripts)]), max_new_tokens=14)
    for row in range(4):
        assert len(new_ids(output, inputs, row)) == 14
    # A second image would need 5 more where the budget leaves 2: the row ends, at its <BOI>.
    short = generate(model, inputs, logits_processor=LogitsProcessorList([Script(scripts)]), max_new_tokens=10)
    assert new_ids(short, inputs, 1) == [10, *IMAGE, BOI]
    assert [len(row) for row in short.images] == [1, 1, 0, 1]


def test_a_budget_too_small_for_an_image_ends_the_row_with_a_warning(caplog):
    transformers.utils.logging.enable_propagation()
    model, inputs = tiny.model(), prompts([4, 30])
    output = generate(model, inputs, logits_processor=LogitsProcessorList([Script({4: [BOI]})]), max_new_tokens=5)
    transformers.utils.logging.disable_propagation()
    assert new_ids(output, inputs, 0) == [BOI]
    assert "`max_new_tokens` leaves 4 tokens, and an image needs 5, 4 patches and <EOI>" in caplog.text


def test_without_a_limit_a_row_has_room_for_20_tokens_and_an_image():
    model, inputs = tiny.model(), prompts([4, 30])
    script = LogitsProcessorList([Script({4: [BOI, *[9] * 99]})])
    output = model.generate(**inputs, logits_processor=script, num_inference_steps=STEPS)
    assert len(new_ids(output, inputs, 0)) == 26


def test_min_new_tokens_holds_back_the_end_of_each_row_by_its_own_count():
    model, inputs = tiny.model(), prompts(*MIXED)
    # Every row would end as soon as it may; `strength` is finite, so that −∞ for <EOS> wins.
    scripts = {3: [BOI, *[EOS] * 30], 4: [10, BOI, *[EOS] * 30], 5: [EOS] * 30, 6: [EOS] * 30}

    class StopAtEnd(Script):
        def __call__(self, input_ids, scores):
            scores = super().__call__(input_ids, scores)
            scores[:, EOS] += 500.0
            return scores

    kwargs = {"logits_processor": LogitsProcessorList([StopAtEnd(scripts)]), "min_new_tokens": 9}
    output = generate(model, inputs, generator=generators(4), **kwargs)
    for row, prompt in enumerate(MIXED):
        ids = new_ids(output, inputs, row)
        assert len(ids) == 10 and ids[-1] == EOS and EOS not in ids[:-1]
        alone = generate(model, prompts(prompt), generator=[generators(4)[row]], **kwargs)
        assert new_ids(alone, prompts(prompt), 0) == ids


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_no_repeat_ngram_size_reads_each_row_with_its_images(text):
    model = tiny.model(text)
    kwargs = {
        "logits_processor": LogitsProcessorList([Script({3: [BOI], 4: [10, BOI, BOI], 5: [], 6: [18, 19, BOI]})]),
        "no_repeat_ngram_size": 2,
        "max_new_tokens": 30,
        **ENDLESS,
    }
    inputs = prompts(*MIXED)
    batch = generate(model, inputs, generator=generators(4), **kwargs)
    for row, prompt in enumerate(MIXED):
        alone = generate(model, prompts(prompt), generator=[generators(4)[row]], **kwargs)
        assert_rows_equal(batch, row, alone, inputs, prompts(prompt))
        ids = new_ids(batch, inputs, row)
        pairs = [pair for pair in pairwise(ids) if pair[1] < BOI]
        assert len(pairs) == len(set(pairs))


def test_max_images_keeps_a_row_from_drawing_more():
    model, inputs = tiny.model(), prompts([3, 30], [4, 30], [6, 30])
    scripts = {3: [BOI, BOI, BOI, 7, EOS], 4: [10, BOI, 11, EOS], 6: [12, EOS]}
    kwargs = {"logits_processor": LogitsProcessorList([Script(scripts)]), "max_new_tokens": 30}
    for most in (0, 1, 2):
        output = generate(model, inputs, max_images=most, **kwargs)
        assert [len(row) for row in output.images] == [most, min(most, 1), 0]
    with pytest.raises(ValueError, match="`max_images` must be 0 or more, or None; got -1"):
        generate(model, inputs, max_images=-1)
    with pytest.raises(ValueError, match="`max_images` is 0, but prompt 1 asks for an image"):
        generate(model, prompts([3, 30], [4, BOI]), max_images=0)
    with pytest.raises(ValueError, match="`max_images` is 0, but prompt 0 asks for an image"):
        generate(model, inputs, max_images=0, generation_mode="image")


def test_stopping_criteria_of_the_user_end_a_row_for_good():
    class StopAt9(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] == 9

    model, inputs = tiny.model(), prompts([3, 30], [4, 30])
    scripts = {3: [9, 10, 11], 4: [BOI, 10, 9, 11]}
    output = generate(
        model, inputs, logits_processor=LogitsProcessorList([Script(scripts)]), stopping_criteria=[StopAt9()]
    )
    assert new_ids(output, inputs, 0) == [9]
    assert new_ids(output, inputs, 1) == [*IMAGE, 10, 9]


def test_a_row_that_the_user_ends_at_boi_draws_nothing():
    class StopAtBoi(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] == BOI

    model, inputs = tiny.model(), prompts([3, 30], [4, 30])
    rules = {"logits_processor": LogitsProcessorList([Script({3: [9, BOI, 10], 4: [BOI, 10]})])}
    output = generate(model, inputs, **rules, stopping_criteria=[StopAtBoi()])
    assert [new_ids(output, inputs, row) for row in (0, 1)] == [[9, BOI], [BOI]] and output.images == [[], []]


def test_num_return_sequences_repeats_the_images_of_a_row_together():
    model = tiny.model()
    latents = torch.randn(3, 2, 4, 4)
    inputs = prompts([3, *IMAGE, 30, *IMAGE, 31], [4, *IMAGE, 30])
    kwargs = {"do_sample": True, "top_k": 1, "max_new_tokens": 6}
    once = generate(model, {**inputs, "latents": latents}, **kwargs)
    twice = generate(model, {**inputs, "latents": latents}, num_return_sequences=2, **kwargs)
    assert torch.equal(twice.sequences, once.sequences.repeat_interleave(2, dim=0))

    inputs = prompts([3, *IMAGE, 30, *IMAGE, 31, BOI], [4, *IMAGE, 30, BOI])
    kwargs = {"generation_mode": "image", "do_sample": True}
    drawn = generate(
        model, {**inputs, "latents": latents}, num_return_sequences=2, generator=generators(4), **kwargs
    ).images
    for i in range(4):
        row, own = ([3, *IMAGE, 30, *IMAGE, 31, BOI], latents[:2]) if i < 2 else ([4, *IMAGE, 30, BOI], latents[2:])
        alone = generate(model, {**prompts(row), "latents": own}, generator=[generators(4)[i]], **kwargs)
        torch.testing.assert_close(drawn[i][0], alone.images[0][0], atol=1e-4, rtol=1e-4)


def test_streamer_gets_every_new_id_and_one_end():
    class Collect(BaseStreamer):
        def __init__(self):
            self.ids, self.ends = [], 0

        def put(self, value):
            self.ids += value.reshape(-1).tolist()

        def end(self):
            self.ends += 1

    streamer, inputs = Collect(), prompts([4, 30])
    script = LogitsProcessorList([Script(SCRIPTS)])
    output = generate(tiny.model(), inputs, logits_processor=script, streamer=streamer)
    assert streamer.ids == output.sequences[0].tolist() and streamer.ends == 1


# --- Sizes, schedulers, caches, dtypes -------------------------------------------------------------------------------


SIZES = {"height": [4, 4, 8, 2], "width": [4, 8, 4, 4]}


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_rows_may_draw_in_sizes_of_their_own(use_cache, guidance):
    model = tiny.model(tiny.gemma3())
    scripts = {**SCRIPTS, 5: [12, BOI, 13, BOI]}
    kwargs = {"logits_processor": LogitsProcessorList([Script(scripts)]), "image_guidance_scale": guidance}
    kwargs |= {"use_cache": use_cache, "max_new_tokens": 30, **ENDLESS}
    inputs = prompts(*MIXED)
    batch = generate(model, inputs, generator=generators(4), **SIZES, **kwargs)
    assert [[tuple(image.shape[1:]) for image in row] for row in batch.images] == [
        [(4, 4)], [(4, 8)] * 2, [(8, 4)] * 2, [(2, 4)]
    ]  # fmt: skip
    for row, prompt in enumerate(MIXED):
        size = {name: values[row] for name, values in SIZES.items()}
        alone = generate(model, prompts(prompt), generator=[generators(4)[row]], **size, **kwargs)
        assert_rows_equal(batch, row, alone, inputs, prompts(prompt))


@pytest.mark.parametrize("rows", [[[BOI]] * 2, [[BOS, 5, 6], [7, BOI]], [[BOS, *IMAGE, 5, BOI], [BOI]]])
@pytest.mark.parametrize("mode", ["image", "interleaved"])
def test_prompts_that_draw_at_once_may_draw_in_sizes_of_their_own(rows, mode):
    """Nothing is in the cache yet when the images of the first size are drawn."""
    model, latents = tiny.model(), torch.randn(1, 2, 4, 4)
    kwargs = {"generation_mode": mode, "max_new_tokens": 25, "return_dict_in_generate": True, **ENDLESS}
    extra = [{"latents": latents} if IMG in row else {} for row in rows]
    heights = [8, 4] if mode == "image" or all(row[-1] == BOI for row in rows) else [4, 4]
    batch = generate(model, {**prompts(*rows), **extra[0]}, generator=generators(2), height=heights, **kwargs)
    for i, row in enumerate(rows):
        alone = generate(
            model, {**prompts(row), **extra[i]}, generator=[generators(2)[i]], height=heights[i], **kwargs
        )
        assert_rows_equal(batch, i, alone, prompts(*rows), prompts(row))
        # What was handed over for the next turn is that of the row alone.
        length = alone.cache.get_seq_length()
        for ours, others in zip(batch.cache.layers, alone.cache.layers, strict=True):
            torch.testing.assert_close(ours.keys[i : i + 1, :, -length:], others.keys, atol=1e-4, rtol=0)
            torch.testing.assert_close(ours.values[i : i + 1, :, -length:], others.values, atol=1e-4, rtol=0)


def test_height_and_width_are_pixels_of_the_drawing():
    output = generate(tiny.model(), prompts([4, BOI]), generation_mode="image", height=8, width=2)
    assert output.images[0][0].shape == (2, 8, 2)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_a_dynamic_cache_handed_in_gives_equal_results_and_is_filled(text):
    model, inputs = tiny.model(text), prompts(*MIXED)
    kwargs = {"logits_processor": LogitsProcessorList([Script(SCRIPTS)])}
    expected = generate(model, inputs, generator=generators(4), return_dict_in_generate=True, **kwargs)
    cache = DynamicCache()
    output = generate(model, inputs, generator=generators(4), past_key_values=cache, **kwargs)
    assert torch.equal(output.sequences, expected.sequences)
    assert cache.get_seq_length() == expected.cache.get_seq_length()
    lengths = [len(prompt) + len(new_ids(output, inputs, row)) for row, prompt in enumerate(MIXED)]
    assert cache.get_seq_length() == max(lengths) - 1


def test_a_cache_that_holds_the_beginning_of_a_prompt_is_continued():
    model = tiny.model(tiny.gemma3())
    first, latents = [BOS, 4, *IMAGE, 30], torch.randn(1, 2, 4, 4)
    for rest, mode in (([31, BOI], "interleaved"), ([31], "image"), ([31], "interleaved"), ([BOI], "interleaved")):
        cache = DynamicCache()
        with torch.no_grad():
            model(torch.tensor([first]), latents=latents, cache=cache, use_cache=True)
        inputs = prompts([*first, *rest])
        kwargs = {"generation_mode": mode, "max_new_tokens": 14}
        expected = generate(model, {**inputs, "latents": latents}, generator=generators(1), **kwargs)
        output = generate(model, inputs, generator=generators(1), cache=cache, **kwargs)
        assert_rows_equal(output, 0, expected, inputs, inputs)


@pytest.mark.parametrize("mode", ["image", "interleaved"])
def test_the_cache_returned_continues_the_conversation(mode):
    """It holds the finished image, though no text followed it: as good as reading the image from its pixels."""
    model, inputs = tiny.model(tiny.gemma3()), prompts([BOS, 4, 30, BOI])
    kwargs = {"generation_mode": mode, "max_new_tokens": 5, "return_dict_in_generate": True}
    first = generate(model, inputs, generator=generators(1), **kwargs)
    ids = torch.cat([first.sequences, torch.tensor([[31, 32]])], dim=1)
    kwargs = {"max_new_tokens": 12, **ENDLESS}
    expected = generate(
        model, {"input_ids": ids, "latents": first.images[0][0][None]}, generator=generators(1), **kwargs
    )
    output = generate(model, {"input_ids": ids}, cache=first.cache, generator=generators(1), **kwargs)
    assert_rows_equal(output, 0, expected, {"input_ids": ids}, {"input_ids": ids})


def test_the_cache_returned_continues_a_batch_of_prompts_of_different_lengths():
    model, inputs = tiny.model(), prompts([30, BOI], [BOS, 4, 31, BOI])
    kwargs = {"generation_mode": "image", "generator": generators(2), "return_dict_in_generate": True}
    first = generate(model, inputs, **kwargs)
    ids = torch.cat([first.sequences, torch.tensor([[31, 32], [33, 34]])], dim=1)
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    kwargs = {"max_new_tokens": 12, **ENDLESS}
    output = generate(model, inputs, cache=first.cache, generator=generators(2), **kwargs)
    for i, row in enumerate(ids.tolist()):
        own = {**prompts([token for token in row if token != PAD]), "latents": first.images[i][0][None]}
        alone = generate(model, own, generator=[generators(2)[i]], **kwargs)
        assert_rows_equal(output, i, alone, inputs, own)


def test_a_returned_cache_with_prompts_padded_in_common_is_refused():
    model, inputs = tiny.model(), prompts([PAD, PAD, 4, 30])
    first = generate(model, inputs, max_new_tokens=3, return_dict_in_generate=True, **ENDLESS)
    ids = torch.cat([first.sequences, torch.tensor([[31]])], dim=1)
    with pytest.raises(ValueError, match="begins with columns that are padding in every row"):
        generate(model, {"input_ids": ids, "attention_mask": (ids != PAD).long()}, cache=first.cache)


def test_bfloat16_stays_within_its_error_through_a_whole_drawing():
    """
    250 steps against the same model in float32. Measured: at most 0.0010; with latents rounded to bfloat16 after each
    step at least 0.0186. One rounding to bfloat16 is 2⁻⁹.
    """
    inputs = prompts([BOS, 4, 5, BOI])
    kwargs = {"generation_mode": "image", "num_inference_steps": 250, "scheduler": None, "image_guidance_scale": 1.0}
    for seed in range(3):
        model = tiny.model(std=0.05, seed=seed)
        exact = generate(model, inputs, generator=generators(1), **kwargs).images[0][0]
        low = generate(model.to(torch.bfloat16), inputs, generator=generators(1), **kwargs).images[0][0]
        assert low.dtype == torch.float32
        assert (low - exact).abs().max() < 2**-8 * exact.abs().max()


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "change", "message"),
    [
        ([4, 30], {"generation_mode": "video"}, "must be one of interleaved, text, image; got 'video'"),
        ([4, BOI, IMG, IMG], {}, "`input_ids` ends among the patches of an image; end a prompt with"),
        ([4, BOI, IMG, IMG], {"generation_mode": "text"}, "`input_ids` ends among the patches of an image"),
        ([4, BOI], {"max_new_tokens": 4}, "leaves 4 tokens, and an image needs 5, 4 patches and <EOI>; prompt 0"),
        ([4, BOI], {"num_inference_steps": 0, "max_new_tokens": 9}, "`num_inference_steps` must be 1 to 1000; got 0"),
        ([4, BOI], {"num_inference_steps": 1001}, "`num_inference_steps` must be 1 to 1000; got 1001"),
        ([4, BOI], {"scheduler": "NoScheduler"}, "`scheduler` must name a scheduler of diffusers.*got 'NoScheduler'"),
        ([4, 30], {"num_inference_steps": 0, "max_images": 0}, "`num_inference_steps` must be 1 to 1000; got 0"),
        ([4, 30], {"scheduler": "Nope", "max_images": 0}, "`scheduler` must name a scheduler of diffusers.*'Nope'"),
        ([4, BOI], {"height": 5}, "`height` must be a positive multiple of 2 pixels.*got 5"),
        ([4, BOI], {"width": 4.0}, r"`width` must be a positive multiple of 2 pixels.*got 4\.0"),
        ([4, BOI], {"num_inference_steps": 2.5}, r"`num_inference_steps` must be 1 to 1000; got 2\.5"),
        ([4, BOI], {"height": [4, 4]}, "`height` must be .*, or a list with one for each of 1 rows; got .4, 4."),
        ([4, BOI], {"height": [4], "width": [4, 4, 4]}, "`width` must be .*, or a list .* 1 rows; got .4, 4, 4."),
        (
            [4, BOI],
            {"height": 512, "width": 64, "generation_mode": "image"},
            "`max_position_embeddings` leaves 2046 positions, and an image needs 8193, 8192 patches",
        ),
        ([4, BOI], {"generator": [torch.Generator()] * 3}, "`generator` holds 3 generators for 1 rows; pass one each"),
        ([4, 30], {"guidance_scale": 3.0}, "guides text.*to guide images pass `image_guidance_scale`"),
        ([4, 30], {"output_scores": True, "return_dict_in_generate": True}, "`output_scores=True` records columns"),
        ([4, 30], {"cache_implementation": "static"}, "`cache_implementation='static'` cannot give up the keys"),
        ([4, 30], {"cache_implementation": "quantized"}, "`cache_implementation='quantized'` cannot give up the keys"),
        ([4, 30], {"max_timesteps": torch.tensor([500])}, "`max_timesteps` is an argument of `forward`"),
        ([4, 30], {"timesteps": 500}, "`timesteps` must hold the steps to take, from 999 down to 0; got 500"),
        ([4, 30], {"timesteps": []}, r"`timesteps` must hold the steps to take, from 999 down to 0; got \[\]"),
        ([4, 30], {"timesteps": [300, 300]}, r"`timesteps` must hold the steps to take, .* got \[300, 300\]"),
        ([4, 30], {"timesteps": [1000, 300]}, r"`timesteps` must hold the steps to take, .* got \[1000, 300\]"),
        ([4, 30], {"sigmas": [2.0, -1.0]}, r"`sigmas` must hold the steps to take, from inf down to 0; got"),
        ([4, 30], {"sigmas": [2.0], "timesteps": [9]}, "`timesteps` and `sigmas` both say which steps to take"),
        ([4, 30], {"sigmas": [2.0]}, r"`sigmas` is not an argument of `DDIMScheduler.set_timesteps`; pass `num_inf"),
        ([4, 30], {"timesteps": [9]}, "`timesteps` is not an argument of `DDIMScheduler.set_timesteps`"),
        ([4, 30], {"labels": torch.tensor([[4, 30]])}, "`labels` is an argument of `forward`"),
        ([4, 30], {"exponential_decay_length_penalty": (2, 1.1)}, "decay_length_penalty=.* counts columns"),
        ([4, 30], {"logits_processor": [ForcedEOSTokenLogitsProcessor(9, EOS)]}, "ForcedEOSToken.* counts columns"),
        ([4, 30], {"prefill_chunk_size": 2}, "`prefill_chunk_size=2` could cut an image in two"),
        ([4, 30], {"latents": torch.zeros(1, 2, 4, 4)}, "hold 1 images but `input_ids` has 0 image blocks"),
        ([4, *IMAGE, 5], {}, "hold 0 images but `input_ids` has 1 image blocks"),
        ([4, 30], {"image_guidence_scale": 3.0}, "not used by the model: .'image_guidence_scale'"),
    ],
)  # fmt: skip
def test_bad_input_names_what_was_expected_and_what_came(prompt, change, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny.model(), prompts(prompt), **change)


def test_caches_that_cannot_give_up_a_steps_keys_are_refused():
    model, inputs = tiny.model(tiny.gemma3()), prompts([4, 30])
    for cache in (DynamicCache(config=model.config.text_config), StaticCache(model.config.text_config, 64)):
        with pytest.raises(ValueError, match=r"must be a `DynamicCache\(\)` without config"):
            generate(model, inputs, cache=cache)


def test_right_padded_prompts_are_refused():
    ids = torch.tensor([[4, 30, PAD], [4, 30, 31]])
    with pytest.raises(ValueError, match="be 0 at left padding only; use `padding_side='left'`"):
        generate(tiny.model(), {"input_ids": ids, "attention_mask": (ids != PAD).long()})


def test_empty_prompts_are_refused():
    for shape in ((0, 4), (1, 0)):
        with pytest.raises(
            ValueError, match=rf"at least one row of at least one token; got shape \({shape[0]}, {shape[1]}\)"
        ):
            generate(tiny.model(), {"input_ids": torch.zeros(shape, dtype=torch.long)})


def test_embeddings_can_be_continued_as_text():
    model, ids = tiny.model(), torch.tensor([[4, 30, 31]])
    kwargs = {"generation_mode": "text", "max_new_tokens": 5}
    expected = generate(model, {"input_ids": ids}, **kwargs)[:, 3:]
    assert torch.equal(generate(model, {"inputs_embeds": model.get_input_embeddings()(ids)}, **kwargs), expected)
    with pytest.raises(ValueError, match="`inputs_embeds` need `generation_mode='text'`"):
        generate(model, {"inputs_embeds": model.get_input_embeddings()(ids)})


def test_missing_padding_token_is_an_error():
    model = tiny.model()
    model.generation_config.pad_token_id = model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="Neither `pad_token_id` nor `eos_token_id` is set"):
        generate(model, {"input_ids": torch.tensor([[4, 30]])})
