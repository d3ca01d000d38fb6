"""Guidance with its branches, and the cache of drawing: against plain passes over whole sequences."""

from itertools import pairwise

import pytest
import tiny
import torch
from diffusers import DDIMScheduler
from test_generation import (
    IMAGE,
    SCRIPTS,
    STEPS,
    Script,
    assert_rows_equal,
    count_passes,
    generate,
    generators,
    prompts,
)
from tiny import BOI, BOS, EOI, EOS, IMG
from transformers import CompileConfig, DynamicCache, LogitsProcessorList, PrefixConstrainedLogitsProcessor

from transfusion_hf.denoising_transfusion import DrawingLayer


def by_hand(model, contexts, latents, combine, seed: int = 0, guided=lambda i: True) -> torch.Tensor:
    """DDIM over ε of whole sequences, context by context: `latents` are the clean images of each."""
    scheduler = DDIMScheduler.from_config(model.noise_scheduler.config, steps_offset=230)
    scheduler.set_timesteps(STEPS)
    x = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            eps = []
            for context, images in zip(contexts, latents, strict=True):
                ids = torch.tensor([[*context, *IMAGE[1:5]]])
                times = torch.tensor([0] * len(images) + [int(t)])
                eps.append(model(ids, latents=[*images, x[0]], timesteps=times).image_predictions[-1])
            result = combine(*eps) if guided(i) else eps[0]
            x = scheduler.step(result[None], t, x, use_clipped_model_output=True).prev_sample
    return x[0]


@pytest.mark.parametrize("bos", [[BOS], []])
@pytest.mark.parametrize("negative", [[BOS, 40, 41, 42], [40], [BOS, 40, 41, 42, 43, 44, 45, BOI]])
def test_a_negative_prompt_takes_the_place_of_the_unconditional_context(bos, negative):
    model, prompt = tiny.model(), [*bos, 5, 6, 7, BOI]
    output = generate(
        model,
        prompts(prompt),
        generator=generators(1),
        generation_mode="image",
        negative_prompt_ids=torch.tensor([negative]),
    )
    context = negative if negative[-1] == BOI else [*negative, BOI]
    expected = by_hand(model, [prompt, context], [[], []], lambda c, u: u + 3 * (c - u))
    torch.testing.assert_close(output.images[0][0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("scale", "image_scale"), [(3.0, 1.5), (3.0, 1.0), (1.0, 2.0), (2.0, 2.0), (1.0, 1.0)])
def test_input_images_and_text_have_scales_of_their_own(scale, image_scale):
    model, image = tiny.model(), torch.randn(2, 4, 4)
    prompt = [BOS, *IMAGE, 5, 6, BOI]
    output = generate(
        model,
        {**prompts(prompt), "latents": image[None]},
        generator=generators(1),
        generation_mode="image",
        image_guidance_scale=scale,
        input_image_guidance_scale=image_scale,
    )
    expected = by_hand(
        model,
        [prompt, [BOS, *IMAGE, BOI], [BOS, BOI]],
        [[image], [image], []],
        lambda full, images, nothing: nothing + image_scale * (images - nothing) + scale * (full - images),
    )
    torch.testing.assert_close(output.images[0][0], expected, atol=1e-4, rtol=0)


def test_guidance_may_be_limited_to_some_steps_and_rescaled():
    model, prompt = tiny.model(), [BOS, 5, 6, BOI]
    kwargs = {"generation_mode": "image", "generator": generators(1)}
    output = generate(model, prompts(prompt), guidance_start=0.25, guidance_end=0.75, **kwargs)
    expected = by_hand(
        model, [prompt, [BOS, BOI]], [[], []], lambda c, u: u + 3 * (c - u), guided=lambda i: i in (1, 2)
    )
    torch.testing.assert_close(output.images[0][0], expected, atol=1e-4, rtol=0)

    def rescaled(conditional, unconditional):
        guided = unconditional + 3 * (conditional - unconditional)
        return 0.7 * guided * conditional.std() / guided.std() + 0.3 * guided

    kwargs["generator"] = generators(1)
    output = generate(model, prompts(prompt), guidance_rescale=0.7, **kwargs)
    expected = by_hand(model, [prompt, [BOS, BOI]], [[], []], rescaled)
    torch.testing.assert_close(output.images[0][0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_prompt_of_bos_alone_is_guided_away_from_bos(use_cache):
    model = tiny.model()
    script = [BOI, *IMAGE[1:5], EOI, EOS]
    said = LogitsProcessorList([PrefixConstrainedLogitsProcessor(lambda _, ids: script[len(ids) - 1 :][:1], 1)])
    kwargs = {"logits_processor": said, "use_cache": use_cache, "image_guidance_scale": 3.0}
    output = generate(model, prompts([BOS]), generator=generators(1), **kwargs)
    expected = by_hand(model, [[BOS, BOI], [BOS, BOI]], [[], []], lambda c, u: u + 3 * (c - u))
    torch.testing.assert_close(output.images[0][0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_with_guidance_of_every_kind_equal_each_row_alone(use_cache):
    model = tiny.model()
    kwargs = {"logits_processor": LogitsProcessorList([Script(SCRIPTS)]), "use_cache": use_cache}
    kwargs |= {"guidance_end": 0.8, "guidance_rescale": 0.5, "image_guidance_scale": 2.5}
    rows = [[BOS, 3, 30], [4, 30], [BOS, 5, 30], [BOS, 6, 30]]
    negatives = [[BOS, 40, 41], [42], [BOS, 43, 44, 45, 46], [47, 48]]
    negative = prompts(*negatives)
    together = generate(
        model, prompts(*rows), generator=generators(4), negative_prompt_ids=negative["input_ids"],
        negative_prompt_attention_mask=negative["attention_mask"], **kwargs,
    )  # fmt: skip
    for i, (row, own) in enumerate(zip(rows, negatives, strict=True)):
        alone = generate(
            model, prompts(row), generator=[generators(4)[i]], negative_prompt_ids=torch.tensor([own]), **kwargs
        )
        assert_rows_equal(together, i, alone, prompts(*rows), prompts(row))


def test_edits_with_two_scales_equal_each_alone_cached_and_uncached():
    model, generator = tiny.model(), torch.Generator().manual_seed(7)
    rows = [[BOS, *IMAGE, 3, 30], [*IMAGE, *IMAGE, 4, 30]]
    latents = torch.randn(3, 2, 4, 4, generator=generator)
    kwargs = {"generation_mode": "image", "input_image_guidance_scale": 1.5}
    cached = generate(model, {**prompts(*rows), "latents": latents}, generator=generators(2), **kwargs)
    uncached = generate(
        model, {**prompts(*rows), "latents": latents}, generator=generators(2), use_cache=False, **kwargs
    )
    for i, (row, own) in enumerate(zip(rows, (latents[:1], latents[1:]), strict=True)):
        alone = generate(model, {**prompts(row), "latents": own}, generator=[generators(2)[i]], **kwargs)
        for other in (uncached.images[i][0], alone.images[0][0]):
            torch.testing.assert_close(cached.images[i][0], other, atol=1e-4, rtol=0)


def test_a_negative_prompt_is_read_once_and_unguided_steps_cost_one_context():
    for prompt, script, read in (
        ([BOS, 4, 30], [10, BOI, BOI, EOS], [(1, 3), (1, 1), (1, 3)]),
        ([BOS, 4, 30, BOI], [BOI, BOI, EOS], [(1, 4), (1, 3)]),  # a prompt that asks for the first image itself
    ):
        model = tiny.model()
        passes = count_passes(model)
        generate(
            model, prompts(prompt), logits_processor=LogitsProcessorList([Script({4: script})]), guidance_end=0.5,
            negative_prompt_ids=torch.tensor([[BOS, 40, 41]]),
        )  # fmt: skip
        image = [(2, 5), (2, 4), (1, 4), (1, 4), (1, 4)]  # two guided steps, two without, the commit
        assert passes == [*read, *image, (1, 1), *image, (1, 1)]


def test_drawing_allocates_its_cache_once_and_never_copies_the_prefix(monkeypatch):
    storages, model = [], tiny.model()
    update = DrawingLayer.update

    def spy(self, *args, **kwargs):
        result = update(self, *args, **kwargs)
        storages.extend(states.untyped_storage().data_ptr() for states in result)
        return result

    monkeypatch.setattr(DrawingLayer, "update", spy)
    generate(model, prompts([BOS, 4, 30, BOI]), generation_mode="image")
    assert len(set(storages)) == 2 * model.config.text_config.num_hidden_layers
    assert len(storages) >= STEPS * len(set(storages))


@pytest.mark.slow
def test_compiled_steps_of_text_and_drawing_are_equal_and_compile_no_more_for_further_images(backend="eager"):
    """Prefixes, rows and images of the prompt differ; what was compiled in the first round serves in the second."""
    model, num_graphs, breaks = tiny.model(), [], torch._dynamo.utils.counters["graph_break"]
    torch.compiler.reset()
    breaks.clear()
    rounds = [
        [[[BOS, 4, 30]], [[BOS, 3, 30], [4, 30]], [[5, 30], [BOS, 6, 30], [3, 30]]],
        [[[BOS, 6, *IMAGE]], [[4, 30], [BOS, 3, 30], [3, 30], [6, 30]]],
    ]
    for batches in rounds:
        for rows in batches:
            inputs = prompts(*rows)
            if any(IMG in row for row in rows):
                inputs["latents"] = torch.ones(1, 2, 4, 4)
            outputs = [
                generate(
                    model, inputs, generator=generators(len(rows)), compile_config=compile_config,
                    logits_processor=LogitsProcessorList([Script(SCRIPTS)]),
                )
                for compile_config in (None, CompileConfig(backend=backend, mode="default", dynamic=True))
            ]  # fmt: skip
            for i in range(len(rows)):
                assert_rows_equal(outputs[1], i, outputs[0], inputs, inputs, i)
        num_graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < num_graphs[0] == num_graphs[1] and not breaks


@pytest.mark.slow
def test_steps_compiled_by_inductor_are_equal():
    test_compiled_steps_of_text_and_drawing_are_equal_and_compile_no_more_for_further_images("inductor")


@pytest.mark.slow
def test_text_of_a_static_cache_is_compiled_by_the_library():
    model, config = tiny.model(), CompileConfig(backend="eager", mode="default")
    config._compile_all_devices = True
    torch.compiler.reset()
    torch._dynamo.utils.counters["graph_break"].clear()
    kwargs = {"generation_mode": "text", "suppress_tokens": [0, EOS], "max_new_tokens": 20}
    for rows in ([[BOS, *IMAGE, 6]], [[BOS, *IMAGE, 6], [4, 30]]):
        inputs = {**prompts(*rows), "latents": torch.ones(1, 2, 4, 4)}
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        compiled = generate(model, inputs, cache_implementation="static", compile_config=config, **kwargs)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
        assert torch.equal(compiled, generate(model, inputs, **kwargs))
    assert not torch._dynamo.utils.counters["graph_break"]


def test_the_callback_sees_every_step_and_may_change_the_latents():
    model, seen = tiny.model(), []

    def callback(pipe, step, timestep, callback_kwargs):
        assert pipe is model and callback_kwargs["latents"].shape == (2, 2, 4, 4)
        seen.append((step, int(timestep)))
        return {"latents": torch.zeros_like(callback_kwargs["latents"])} if step == STEPS - 1 else None

    output = generate(
        model, prompts([BOS, 4, BOI], [BOS, 5, BOI]), generation_mode="image", callback_on_step_end=callback
    )
    assert seen == [(0, 980), (1, 730), (2, 480), (3, 230)]
    assert not any(row[0].any() for row in output.images)


def test_an_exception_in_a_callback_leaves_everything_usable():
    model = tiny.model()
    expected = generate(model, prompts([BOS, 4, BOI]), generation_mode="image", generator=generators(1))

    def fail(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, prompts([BOS, 4, BOI]), generation_mode="image", callback_on_step_end=fail)
    again = generate(model, prompts([BOS, 4, BOI]), generation_mode="image", generator=generators(1))
    assert torch.equal(again.images[0][0], expected.images[0][0])


@pytest.mark.parametrize("mode", ["image", "interleaved"])
@pytest.mark.parametrize("turn", [1, 2])
def test_a_call_that_is_stopped_leaves_a_cache_handed_in_as_it_was(mode, turn):
    model, cache, stop_at = tiny.model(), DynamicCache(), [-1]

    def stop(model, step, *args):
        if step == stop_at[0]:
            raise KeyboardInterrupt

    kwargs = {"generation_mode": mode, "callback_on_step_end": stop, "max_new_tokens": 12}
    kwargs |= {"cache": cache, "return_dict_in_generate": True, "suppress_tokens": [EOS]}

    def draw(prompt, **changes):
        return generate(model, prompts(prompt), generator=generators(1), **{**kwargs, **changes})

    prompt = [BOS, 4, 5, BOI]
    if turn == 2:
        prompt = [*draw(prompt).sequences[0].tolist(), 7, BOI]
    elif mode == "interleaved":  # text comes first
        prompt, kwargs["logits_processor"] = [BOS, 4, 30], LogitsProcessorList([Script(SCRIPTS)])
    filled = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    for stop_at[0], change, error in (
        (STEPS - 1, {}, KeyboardInterrupt),
        (1, {}, KeyboardInterrupt),
        (-1, {"negative_prompt_ids": torch.tensor([[4, BOI, IMG]])}, ValueError),
    ):
        with pytest.raises(error):
            draw(prompt, **change)
        assert len(cache.layers) == len(filled)
        for layer, (keys, values) in zip(cache.layers, filled, strict=True):
            assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
    stop_at[0] = -1
    again = draw(prompt)
    fresh = DynamicCache()
    if turn == 2:
        draw([BOS, 4, 5, BOI], cache=fresh)
    expected = draw(prompt, cache=fresh)
    assert torch.equal(again.sequences, expected.sequences)
    assert torch.equal(again.images[0][0], expected.images[0][0])


@pytest.mark.parametrize("text", [None, tiny.gemma3()], ids=["llama", "gemma3"])
def test_text_that_is_stopped_leaves_a_cache_handed_in_as_it_was(text):
    model, prompt = tiny.model(text), [BOS, 4, *IMAGE, 30, 31, 32]
    latents, stop_at = torch.randn(1, 2, 4, 4), [-1]

    def stop(input_ids, scores):
        if input_ids.shape[1] == stop_at[0]:
            raise KeyboardInterrupt
        return torch.zeros(len(input_ids), dtype=torch.bool)

    def write(cache):
        inputs = {**prompts(prompt), "latents": latents, "cache": cache}
        return model.generate(**inputs, generation_mode="text", max_new_tokens=8, stopping_criteria=[stop])

    make = [DynamicCache] if text is None else [DynamicCache, lambda: DynamicCache(config=text)]
    for make_cache in make:
        stop_at[0] = -1
        expected, cache = write(make_cache()), make_cache()
        stop_at[0] = len(prompt) + 4
        with pytest.raises(KeyboardInterrupt):
            write(cache)
        stop_at[0] = -1
        assert cache.get_seq_length() == 0 and torch.equal(write(cache), expected)


def test_the_progress_bar_is_shown_where_it_is_asked_for(capsys):
    for shown in (False, True):
        generate(tiny.model(), prompts([BOS, 4, BOI]), generation_mode="image", progress_bar=shown)
        assert (f"draw:   0%|          | 0/{STEPS}" in capsys.readouterr().err) == shown


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample", "flow_prediction"])
def test_models_of_every_prediction_type_draw_alike_in_a_batch_and_alone(prediction_type):
    model = tiny.model(prediction_type=prediction_type, std=0.1)
    schedulers = [None, "DPMSolverMultistepScheduler"]
    schedulers.append("FlowMatchEulerDiscreteScheduler" if prediction_type == "flow_prediction" else "DDIMScheduler")
    rows = [[BOS, 3, 30, BOI], [4, BOI]]
    for scheduler in schedulers:
        kwargs = {"generation_mode": "image", "scheduler": scheduler}
        together = generate(model, prompts(*rows), generator=generators(2), **kwargs)
        for i, row in enumerate(rows):
            alone = generate(model, prompts(row), generator=[generators(2)[i]], **kwargs)
            assert torch.isfinite(alone.images[0][0]).all()
            torch.testing.assert_close(together.images[i][0], alone.images[0][0], atol=1e-4, rtol=1e-4)


def test_flow_matching_equals_euler_steps_by_hand():
    model, prompt = tiny.model(prediction_type="flow_prediction", std=0.1), [BOS, 5, 6, BOI]
    output = generate(
        model, prompts(prompt), generation_mode="image", image_guidance_scale=1.0, scheduler=None,
        generator=generators(1),
    )  # fmt: skip
    x = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    sigmas = [*torch.linspace(1000, 1, STEPS).div(1000).tolist(), 0.0]
    with torch.no_grad():
        for sigma, following in pairwise(sigmas):
            ids, t = torch.tensor([[*prompt, *IMAGE[1:5]]]), torch.tensor([1000 * sigma])
            x = x + (following - sigma) * model(ids, latents=x, timesteps=t).image_predictions[0]
    torch.testing.assert_close(output.images[0][0], x[0], atol=1e-4, rtol=1e-4)


SCHEDULERS = [
    "DDPMScheduler",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
]


@pytest.mark.parametrize("scheduler", [*SCHEDULERS, "FlowMatchEulerDiscreteScheduler"])
def test_inpainting_keeps_what_is_not_masked_and_draws_the_rest(scheduler):
    is_flow = scheduler.startswith("Flow")
    model = tiny.model(std=0.1, prediction_type="flow_prediction" if is_flow else "epsilon")
    known = torch.rand(2, 2, 4, 4) * 2 - 1
    mask = torch.zeros(1, 1, 4, 4)
    mask[:, :, 1:3, 2:] = 1
    kwargs = {"generation_mode": "image", "scheduler": scheduler, "init_image": known}
    rows = [[BOS, 4, BOI], [5, BOI]]
    output = generate(model, prompts(*rows), mask_image=mask, generator=generators(2), **kwargs)
    drawn = torch.stack([row[0] for row in output.images])
    is_masked = mask.bool().expand_as(drawn)
    assert torch.equal(drawn[~is_masked], known[~is_masked])
    assert not torch.isclose(drawn[is_masked], known[is_masked], atol=1e-3).all() and torch.isfinite(drawn).all()
    kwargs["init_image"] = known[1:]
    alone = generate(model, prompts(rows[1]), mask_image=mask, generator=[generators(2)[1]], **kwargs)
    torch.testing.assert_close(drawn[1], alone.images[0][0], atol=1e-4, rtol=1e-4)
    # A variation of what is masked.
    weak = generate(model, prompts(rows[1]), mask_image=mask, strength=0.5, generator=generators(1), **kwargs)
    assert torch.equal(weak.images[0][0][~is_masked[1]], known[1][~is_masked[1]])
    assert not torch.isclose(weak.images[0][0][is_masked[1]], known[1][is_masked[1]], atol=1e-3).all()
    # One image for all rows.
    kwargs |= {"mask_image": mask, "strength": 0.5}
    one = generate(model, prompts(*rows), generator=generators(2), **kwargs)
    kwargs["init_image"] = known[1:].expand(2, -1, -1, -1)
    each = generate(model, prompts(*rows), generator=generators(2), **kwargs)
    assert all(torch.equal(x, y) for (x,), (y,) in zip(one.images, each.images, strict=True))


@pytest.mark.parametrize("scheduler", [*SCHEDULERS, "FlowMatchEulerDiscreteScheduler"])
def test_a_weak_variation_stays_nearer_to_its_image_than_a_strong_one(scheduler):
    is_flow = scheduler.startswith("Flow")
    model = tiny.model(std=0.05, prediction_type="flow_prediction" if is_flow else "epsilon")
    known, distances = torch.rand(1, 2, 4, 4) * 2 - 1, []
    for strength in (0.1, 0.9):
        output = generate(
            model, prompts([BOS, 5, BOI]), generation_mode="image", init_image=known, strength=strength,
            num_inference_steps=20, scheduler=scheduler, generator=generators(1),
        )  # fmt: skip
        distances.append(float((output.images[0][0] - known[0]).norm()))
    assert distances[0] < 0.5 * distances[1]


def test_a_variation_takes_its_share_of_the_steps_from_the_noised_image():
    model, prompt, known = tiny.model(), [BOS, 5, 6, BOI], torch.rand(1, 2, 4, 4) * 2 - 1
    output = generate(
        model, prompts(prompt), generation_mode="image", image_guidance_scale=1.0, init_image=known, strength=0.5,
        generator=generators(1),
    )  # fmt: skip
    scheduler = DDIMScheduler.from_config(model.noise_scheduler.config, steps_offset=230)
    scheduler.set_timesteps(STEPS)
    noise = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    x = scheduler.add_noise(known, noise, scheduler.timesteps[2:3])
    with torch.no_grad():
        for t in scheduler.timesteps[2:]:
            ids = torch.tensor([[*prompt, *IMAGE[1:5]]])
            eps = model(ids, latents=x, timesteps=t[None]).image_predictions[0]
            x = scheduler.step(eps[None], t, x, use_clipped_model_output=True).prev_sample
    torch.testing.assert_close(output.images[0][0], x[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance_start": 0.6, "guidance_end": 0.4}, r"0 ≤ start ≤ end ≤ 1; got 0\.6 and 0\.4"),
        ({"guidance_rescale": 2.0}, r"`guidance_rescale` must lie in 0 to 1; got 2\.0"),
        (
            {"negative_prompt_ids": torch.tensor([[7]]), "image_guidance_scale": 1.0},
            "`negative_prompt_ids` does nothing at a guidance scale of 1",
        ),
        ({"negative_prompt_ids": torch.tensor([[7]] * 3)}, "`negative_prompt_ids` has 3 rows for 1 prompts"),
        ({"negative_prompt_ids": torch.tensor([[BOI, IMG]])}, "a negative prompt is text"),
        (
            {"negative_prompt_ids": torch.tensor([[7, 8]]), "negative_prompt_attention_mask": torch.ones(1, 3)},
            r"must have the shape of `negative_prompt_ids`; got \(1, 3\) and \(1, 2\)",
        ),
        ({"negative_prompt_attention_mask": torch.ones(1, 3)}, r"the shape of `negative_prompt_ids`; got .* and None"),
        ({"strength": 0.5}, "need an `init_image` to begin with"),
        (
            {"init_image": torch.zeros(1, 2, 4, 4), "strength": 0.0},
            r"`strength` must lie above 0 and up to 1; got 0\.0",
        ),
        (
            {"init_image": torch.zeros(1, 2, 4, 8), "strength": 0.5},
            r"`init_image` must have shape \(1, 2, 4, 4\).*got \(1, 2, 4, 8\)",
        ),
        *(
            (
                {"init_image": torch.zeros(1, channels, 4, 4), "strength": 0.5},
                rf"`init_image` must have shape \(1, 2, 4, 4\).*got \(1, {channels}, 4, 4\)",
            )
            for channels in (1, 3)
        ),
        ({"init_image": torch.zeros(1, 2, 4, 4)}, "`init_image` does nothing at a `strength` of 1; lower it"),
        (
            {"init_image": torch.zeros(1, 2, 4, 4), "mask_image": torch.zeros(1, 2, 4, 4)},
            r"`mask_image` must have shape \(1, 1, 4, 4\)",
        ),
        (
            {"init_image": torch.zeros(1, 2, 4, 4), "generation_mode": "interleaved"},
            "`init_image` belongs to one drawing of each row",
        ),
        ({"input_image_guidance_scale": 1.5}, "guides by the images of the prompt, and a prompt has none"),
    ],
)
def test_guidance_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny.model(), prompts([BOS, 5, BOI]), **{"generation_mode": "image", **change})


def test_negative_prompts_have_the_positions_that_prompts_have():
    model, longest = tiny.model(tiny.text_config(max_position_embeddings=10)), [BOS, 5, 6, 7, 8]
    kwargs = {"generation_mode": "image", "max_new_tokens": 5}
    for ids in (longest, [*longest, BOI]):  # 5 tokens, <BOI> and 4 patches
        output = generate(model, prompts([BOS, 5, BOI]), negative_prompt_ids=torch.tensor([ids]), **kwargs)
        assert torch.isfinite(output.images[0][0]).all()
    message = "`negative_prompt_ids` has 6 tokens for row 0.* are 11, and `max_position_embeddings` is 10"
    with pytest.raises(ValueError, match=message):
        generate(model, prompts([BOS, 5, BOI]), negative_prompt_ids=torch.tensor([[*longest, 9]]), **kwargs)


def test_a_streamer_hears_the_steps_that_are_taken():
    class Heard:
        def __init__(self):
            self.counts = []

        def put(self, value):
            pass

        def put_step(self, model, step, num_steps, x_t, prediction, t):
            self.counts.append((step, num_steps))

        def put_image(self, image, step, num_steps):
            assert self.counts[-1] == (step, num_steps) == (num_steps, num_steps)

        def end(self):
            pass

    for strength, num_steps in ((0.5, 5), (1.0, 10)):
        heard, changes = Heard(), {"init_image": torch.zeros(1, 2, 4, 4), "strength": strength}
        generate(
            tiny.model(), prompts([BOS, 5, BOI]), generation_mode="image", num_inference_steps=10, streamer=heard,
            **(changes if strength < 1 else {}),
        )  # fmt: skip
        assert heard.counts == [(step + 1, num_steps) for step in range(num_steps)]
