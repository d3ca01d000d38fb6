"""`generate()` with the schedulers of diffusers: by name, as objects, in steps that are given."""

from itertools import pairwise

import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from test_generation import IMAGE, generate, generators, prompts
from tiny import BOI, BOS


@pytest.mark.parametrize(
    "name", [None, "DDPMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"]
)
def test_schedulers_of_diffusers_draw_finite_images_and_equal_rows(name):
    model, inputs = tiny.model(), prompts([BOS, 4, BOI], [BOS, 5, 6, BOI])
    batch = generate(model, inputs, generation_mode="image", scheduler=name, generator=generators(2))
    alone = generate(model, prompts([BOS, 4, BOI]), generation_mode="image", scheduler=name, generator=generators(1))
    assert all(torch.isfinite(row[0]).all() for row in batch.images)
    torch.testing.assert_close(batch.images[0][0], alone.images[0][0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sigmas", ["use_karras_sigmas", "use_exponential_sigmas"])
def test_steps_that_a_scheduler_repeats_are_taken_one_after_the_other(sigmas):
    model, x_t = tiny.model(), []
    scheduler = DPMSolverMultistepScheduler.from_config(model.noise_scheduler.config, **{sigmas: True})
    scheduler.set_timesteps(30)
    assert len(scheduler.timesteps.unique()) < 30
    output = generate(
        model,
        prompts([BOS, 5, BOI]),
        generation_mode="image",
        scheduler=scheduler,
        num_inference_steps=30,
        callback_on_step_end=lambda model, step, t, inputs: x_t.append(inputs["latents"]),
    )
    assert len(x_t) == 30 and torch.equal(output.images[0][0], x_t[-1][0])
    assert all(torch.isfinite(x).all() and not torch.equal(x, other) for x, other in pairwise(x_t))


def test_euler_keeps_pixels_in_range():
    output = generate(
        tiny.model(), prompts([BOS, 5, BOI]), generation_mode="image", scheduler="EulerDiscreteScheduler"
    )
    assert output.images[0][0].abs().max() <= 1.001


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [
        (DDPMScheduler, {"timesteps": [981, 700, 30]}),
        (EulerDiscreteScheduler, {"timesteps": torch.tensor([981, 700, 30])}),
        (EulerDiscreteScheduler, {"sigmas": [30.0, 2.5, 0.3, 0.0]}),
    ],
)
def test_timesteps_and_sigmas_are_the_steps_that_the_scheduler_takes(scheduler, steps):
    model, seen = tiny.model(), []
    expected = scheduler.from_config(model.noise_scheduler.config)
    (name, values), *_ = steps.items()
    expected.set_timesteps(**{name: list(values)})
    for given in (scheduler.__name__, scheduler.from_config(model.noise_scheduler.config)):
        generate(
            model,
            prompts([BOS, 5, BOI]),
            generation_mode="image",
            scheduler=given,
            callback_on_step_end=lambda model, step, t, inputs: seen.append(float(t)),
            **steps,
        )
    assert seen == 2 * expected.timesteps.tolist() and len(seen) == 6


def test_flow_matching_takes_sigmas():
    model, seen = tiny.model(prediction_type="flow_prediction"), []
    generate(
        model,
        prompts([BOS, 5, BOI]),
        generation_mode="image",
        scheduler=None,
        sigmas=[1.0, 0.5],
        callback_on_step_end=lambda model, step, t, inputs: seen.append(float(t)),
    )
    assert seen == [1000, 500]


def test_steps_to_take_leave_text_as_it_is():
    model, inputs = tiny.model(), {**prompts([BOS, *IMAGE, 5]), "latents": torch.randn(1, 2, 4, 4)}
    expected = generate(model, inputs, generation_mode="text", max_new_tokens=5)
    for steps in ({"timesteps": torch.tensor([500])}, {"sigmas": [3.0, 0.0]}):
        assert torch.equal(generate(model, inputs, generation_mode="text", max_new_tokens=5, **steps), expected)


def test_a_scheduler_object_is_used_and_left_as_it_was():
    model, inputs = tiny.model(), prompts([BOS, 4, BOI])
    scheduler = DDIMScheduler.from_config(model.noise_scheduler.config, steps_offset=230)
    by_object = generate(model, inputs, generation_mode="image", scheduler=scheduler, generator=generators(1))
    by_name = generate(model, inputs, generation_mode="image", generator=generators(1))
    assert torch.equal(by_object.images[0][0], by_name.images[0][0])
    assert scheduler.num_inference_steps is None


def test_a_scheduler_of_another_schedule_or_prediction_is_refused():
    model, inputs = tiny.model(), prompts([4, BOI])
    for other in (DDIMScheduler(), DDIMScheduler(num_train_timesteps=500)):
        with pytest.raises(ValueError, match=r"has another noise schedule than the model; make it with .*from_config"):
            generate(model, inputs, scheduler=other)
    other = DDIMScheduler.from_config(model.noise_scheduler.config, prediction_type="v_prediction")
    with pytest.raises(ValueError, match="prediction type 'v_prediction', the model predicts 'epsilon'"):
        generate(model, inputs, scheduler=other)
    with pytest.raises(ValueError, match="prediction type 'flow_prediction', the model predicts 'epsilon'"):
        generate(model, inputs, scheduler=FlowMatchEulerDiscreteScheduler())


def test_a_scheduler_of_another_flow_is_refused():
    model, inputs = tiny.model(prediction_type="flow_prediction"), prompts([4, BOI])
    with pytest.raises(ValueError, match="prediction type 'epsilon', the model predicts 'flow_prediction'"):
        generate(model, inputs, scheduler=DPMSolverMultistepScheduler(use_flow_sigmas=True))
    for other in (
        FlowMatchEulerDiscreteScheduler(num_train_timesteps=500),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction"),
        DPMSolverMultistepScheduler(500, prediction_type="flow_prediction", use_flow_sigmas=True),
    ):
        with pytest.raises(ValueError, match=r"has another noise schedule than the model; make it with .*from_config"):
            generate(model, inputs, scheduler=other)
    own = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    assert torch.isfinite(generate(model, inputs, scheduler=own).images[0][0]).all()


@pytest.mark.parametrize("scheduler", [DDIMScheduler, 7, object()])
def test_what_is_no_scheduler_is_refused(scheduler):
    for prompt in ([4, BOI], [4, 30]):
        with pytest.raises(
            ValueError, match="`scheduler` must be a diffusers scheduler, its class name or `None`; got"
        ):
            generate(tiny.model(), prompts(prompt), scheduler=scheduler, max_images=None if BOI in prompt else 0)
