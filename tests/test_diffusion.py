import pytest
import tiny
import torch

from transfusion_hf.diffusion_transfusion import (
    add_noise,
    clip_x_0,
    content_seeds,
    image_loss_weights,
    make_noise_scheduler,
    make_sampling_scheduler,
    must_clip_x_0,
    prediction_targets,
    sample_noise,
    sample_timesteps,
    sampling_step_kwargs,
)
from transfusion_hf.inference.streamers import predicted_x_0


def test_t_is_uniform_below_the_limit_of_each_image():
    limits = torch.tensor([500, 1000]).repeat(20000)
    timesteps = sample_timesteps(limits)
    for limit, drawn in ((500, timesteps[::2]), (1000, timesteps[1::2])):
        assert drawn.min() == 0 and drawn.max() == limit - 1
        counts = torch.bincount(drawn * 10 // limit, minlength=10)
        assert (counts - 2000).abs().max() < 200  # ten equal parts, 5 σ = 212


def test_noise_is_standard_normal():
    (noise,) = sample_noise([torch.empty(100, 2, 16, 16)])
    assert noise.mean().abs() < 0.02 and (noise.std() - 1).abs() < 0.02


def test_seeds_decide_t_and_noise_of_each_image_however_images_are_stacked():
    seeds, stack = list(range(200)), torch.zeros(200, 2, 4, 4)
    limits = torch.full((200,), 1000)
    timesteps, (noise,) = sample_timesteps(limits, seeds), sample_noise([stack], seeds)
    assert len(timesteps.unique()) > 150 and len(noise[:, 0, 0, 0].unique()) == 200
    assert noise.mean().abs() < 0.05 and (noise.std() - 1).abs() < 0.05
    # Neither the noise of one seed nor its t tells that of the next.
    assert torch.corrcoef(torch.stack([noise[:-1].flatten(), noise[1:].flatten()]))[0, 1].abs() < 0.05
    assert torch.corrcoef(torch.stack([timesteps.float(), noise[:, 0, 0, 0]]))[0, 1].abs() < 0.25
    # Nor is the noise made of the numbers that made t.
    same = torch.stack([torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) for i, x in enumerate(stack)])
    assert (noise != same).any(dim=(1, 2, 3)).all()
    parts = sample_noise([stack[:3], stack[3:]], seeds)
    assert torch.equal(torch.cat(parts), noise)


def test_content_seeds_are_those_of_the_image_alone():
    images = torch.randn(4, 2, 4, 4)
    seeds = content_seeds([images[:1], images[1:]])
    assert len(set(seeds)) == 4
    assert seeds == [content_seeds([image[None]])[0] for image in images]
    assert content_seeds([images.double()]) == seeds


def test_pixels_are_clipped_while_sampling_and_latents_are_not():
    assert make_noise_scheduler(tiny.config()).config.clip_sample
    vae_config = {"block_out_channels": [32, 64], "latent_channels": 2, "scaling_factor": 1.0}
    assert not make_noise_scheduler(tiny.config(vae_config=vae_config)).config.clip_sample


@pytest.mark.parametrize(
    "name", ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]
)
def test_schedulers_by_name_clip_pixels_and_not_latents(name):
    """Whatever the model says; without clipping an ε of 0 leads to values of about 40."""
    vae_config = {"block_out_channels": [32, 64], "latent_channels": 2, "scaling_factor": 1.0}
    for config, is_clipped in ((tiny.config(), True), (tiny.config(vae_config=vae_config), False)):
        scheduler = make_sampling_scheduler(make_noise_scheduler(config), name, 20, torch.device("cpu"))
        x_t = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
        kwargs = sampling_step_kwargs(scheduler, torch.Generator().manual_seed(0))
        for t in scheduler.timesteps:
            x_t = scheduler.step(torch.zeros_like(x_t), t, x_t, **kwargs).prev_sample
        assert (x_t.abs().max() <= 1.001) == is_clipped


@pytest.mark.parametrize(
    ("name", "prediction_type"),
    [
        *(("EulerDiscreteScheduler", kind) for kind in ("epsilon", "v_prediction", "sample")),
        *(("EulerAncestralDiscreteScheduler", kind) for kind in ("epsilon", "v_prediction")),
    ],
)
def test_pixels_are_clipped_for_schedulers_that_cannot(name, prediction_type):
    noise_scheduler = make_noise_scheduler(tiny.config(prediction_type=prediction_type))
    scheduler = make_sampling_scheduler(noise_scheduler, name, 20, torch.device("cpu"))
    assert must_clip_x_0(scheduler, noise_scheduler)
    x_t = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    kwargs = sampling_step_kwargs(scheduler, torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x_t, t)
        wanted = best_prediction(noise_scheduler, prediction_type, x_in, float(t), error=0.0, mean=3.0)
        x_t = scheduler.step(clip_x_0(noise_scheduler, x_in, wanted, t), t, x_t, **kwargs).prev_sample
    assert 0.8 < x_t.mean() < x_t.max() <= 1.001  # unclipped: 3


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_clipping_x_0_changes_only_what_is_out_of_range(prediction_type):
    noise_scheduler = make_noise_scheduler(tiny.config(prediction_type=prediction_type))
    x_0, eps, t = torch.tensor([-3.0, -0.9, 0.5, 2.0]).view(1, 1, 2, 2), torch.randn(1, 1, 2, 2), torch.tensor(600)
    (x_t,), (target,) = (f(noise_scheduler, [x_0], [eps], t[None]) for f in (add_noise, prediction_targets))
    clipped = clip_x_0(noise_scheduler, x_t, target, t)
    assert torch.equal(clipped == target, x_0.abs() < 1)
    noise_scheduler.register_to_config(clip_sample=False)
    torch.testing.assert_close(predicted_x_0(noise_scheduler, x_t, clipped, t), x_0.clamp(-1, 1), atol=1e-5, rtol=0)


def test_schedulers_that_can_clip_and_latents_are_left_alone():
    vae_config = {"block_out_channels": [32, 64], "latent_channels": 2, "scaling_factor": 1.0}
    pixels, latents = make_noise_scheduler(tiny.config()), make_noise_scheduler(tiny.config(vae_config=vae_config))
    for name in ("DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        assert not must_clip_x_0(make_sampling_scheduler(pixels, name, 20, torch.device("cpu")), pixels)
    assert not must_clip_x_0(make_sampling_scheduler(latents, "EulerDiscreteScheduler", 20, "cpu"), latents)
    flow = make_noise_scheduler(tiny.config(prediction_type="flow_prediction"))
    assert not must_clip_x_0(make_sampling_scheduler(flow, None, 20, "cpu"), flow)


def test_sampling_leaves_out_the_last_steps_of_the_schedule():
    """At t = 999 an error of ε is magnified 20,000 times in x_0, at 980 30 times."""
    noise_scheduler = make_noise_scheduler(tiny.config())
    scheduler = make_sampling_scheduler(noise_scheduler, "DDIMScheduler", 50, torch.device("cpu"))
    assert scheduler.timesteps[0] == 980 and scheduler.timesteps[-1] == 0
    for steps in (1, 2, 10, 250):
        first, last = make_sampling_scheduler(noise_scheduler, None, steps, torch.device("cpu")).timesteps[[0, -1]]
        assert 980 <= first < 999 and last <= 1000 // steps  # few steps begin at noise, too
    magnified = 1 / noise_scheduler.alphas_cumprod.sqrt()
    assert magnified[999] > 10_000 and magnified[980] < 40


MEAN, STD = 0.3, 0.5  # of the data, each value on its own
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
SCHEDULERS = {
    "DDPMScheduler": 250,
    "DDIMScheduler": 50,
    "DPMSolverMultistepScheduler": 30,
    "UniPCMultistepScheduler": 30,
    "EulerDiscreteScheduler": 50,
}
FLOW_SCHEDULERS = {
    "FlowMatchEulerDiscreteScheduler": 50,
    "DPMSolverMultistepScheduler": 30,
    "UniPCMultistepScheduler": 30,
}


def coefficients(noise_scheduler, t: float) -> tuple[float, float]:
    """a and b of x_t = a·x_0 + b·ε."""
    if not hasattr(noise_scheduler, "alphas_cumprod"):
        return 1 - t / 1000, t / 1000
    # Multistep and Euler schedulers may ask between two t.
    alpha_bars = noise_scheduler.alphas_cumprod.double()
    low = int(t)
    alpha_bar = torch.lerp(alpha_bars[low], alpha_bars[min(low + 1, 999)], t - low)
    return float(alpha_bar.sqrt()), float((1 - alpha_bar).sqrt())


def best_prediction(
    noise_scheduler, prediction_type: str, x_t: torch.Tensor, t: float, error: float, mean: float = MEAN
) -> torch.Tensor:
    """The expectation of the target given x_t, in closed form, off by an ε that is too large or small by `error`."""
    a, b = coefficients(noise_scheduler, t)
    eps = b * (x_t - a * mean) / (a**2 * STD**2 + b**2)
    x_0 = (x_t - b * eps) / a if a > 1e-3 else torch.full_like(x_t, mean)
    eps = eps + error
    return {"epsilon": eps, "v_prediction": a * eps - b * x_0, "sample": x_0, "flow_prediction": eps - x_0}[
        prediction_type
    ]


@pytest.mark.slow
def test_steps_end_at_0_however_many_they_are():
    """Each grid from 0.98·T or above down, without a t twice, as far as its scheduler's last step reaches to 0."""
    noise_scheduler = make_noise_scheduler(tiny.config())
    for name in SCHEDULERS:
        for steps in (*range(2, 110), *range(110, 1000, 37), 999):
            if name == "DDIMScheduler" and steps * (1000 // steps) < 980:
                continue  # refused
            scheduler = make_sampling_scheduler(noise_scheduler, name, steps, torch.device("cpu"))
            timesteps, stride = scheduler.timesteps, 1000 // steps
            assert len(timesteps) == steps and 980 <= timesteps[0] <= 999 and (timesteps.diff() < 0).all()
            assert timesteps[-1] <= (stride if name == "DDIMScheduler" else 3 * stride)


def test_what_a_scheduler_cannot_divide_is_refused_with_what_it_can():
    noise_scheduler, cpu = make_noise_scheduler(tiny.config()), torch.device("cpu")
    for name, steps in (("DDIMScheduler", 300), ("DDIMScheduler", 600), ("DPMSolverMultistepScheduler", 1000)):
        message = rf"`num_inference_steps={steps}` cannot .* {name}; pass a smaller divisor of 1000\."
        with pytest.raises(ValueError, match=message):
            make_sampling_scheduler(noise_scheduler, name, steps, cpu)
        make_sampling_scheduler(noise_scheduler, name, 50, cpu)


# DDIM refuses the many that are not near a divisor of 1,000.
MANY = {name: (28, 250, 500, 980) if name == "DDIMScheduler" else (60, 300, 600) for name in SCHEDULERS}


@pytest.mark.parametrize("error", [0.0, 0.01])
@pytest.mark.parametrize(
    ("prediction_type", "name", "steps"),
    [
        *((kind, name, steps) for kind in PREDICTION_TYPES[:3] for name, steps in SCHEDULERS.items()),
        *(("epsilon", name, steps) for name, many in MANY.items() for steps in many),
        *(("flow_prediction", name, steps) for name, steps in FLOW_SCHEDULERS.items()),
    ],
)
def test_a_perfect_and_a_slightly_wrong_model_draw_the_right_mean_and_spread(prediction_type, name, steps, error):
    config = tiny.config(
        prediction_type=prediction_type,
        vae_config={"block_out_channels": [8], "latent_channels": 2, "scaling_factor": 1.0},  # latents: no clipping
    )
    noise_scheduler = make_noise_scheduler(config)
    scheduler = make_sampling_scheduler(noise_scheduler, name, steps, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    kwargs = sampling_step_kwargs(scheduler, generator)
    x_t = torch.randn(50, 2, 16, 16, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x_t, t) if hasattr(scheduler, "scale_model_input") else x_t
        x_t = scheduler.step(
            best_prediction(noise_scheduler, prediction_type, x_in, float(t), error), t, x_t, **kwargs
        ).prev_sample
    assert abs(float(x_t.mean()) - MEAN) < (0.1 if error else 0.05)
    assert abs(float(x_t.std()) - STD) < 0.05


def test_the_weight_of_x_0_with_the_loss_of_v_has_a_limit():
    noise_scheduler = make_noise_scheduler(tiny.config(prediction_type="sample"))
    weights = image_loss_weights(noise_scheduler, torch.tensor([0, 500, 999]), "v_prediction")
    noise = 1 - noise_scheduler.alphas_cumprod[[500, 999]]
    torch.testing.assert_close(weights, torch.cat([torch.tensor([400.0]), 1 / noise]))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_targets_are_what_turns_x_t_back_into_x_0(prediction_type):
    noise_scheduler = make_noise_scheduler(tiny.config(prediction_type=prediction_type))
    x_0, eps = torch.randn(4, 2, 4, 4, dtype=torch.float64), torch.randn(4, 2, 4, 4, dtype=torch.float64)
    timesteps = torch.tensor([1, 300, 700, 950])
    (x_t,) = add_noise(noise_scheduler, [x_0], [eps], timesteps)
    (target,) = prediction_targets(noise_scheduler, [x_0], [eps], timesteps)
    for i, t in enumerate(timesteps.tolist()):
        a, b = coefficients(noise_scheduler, t)
        torch.testing.assert_close(x_t[i], a * x_0[i] + b * eps[i], atol=1e-6, rtol=1e-6)
        restored = {
            "epsilon": (x_t[i] - b * target[i]) / a,
            "v_prediction": a * x_t[i] - b * target[i],
            "sample": target[i],
            "flow_prediction": x_t[i] - b * target[i],
        }[prediction_type]
        torch.testing.assert_close(restored, x_0[i], atol=1e-5, rtol=1e-5)
        preview = predicted_x_0(noise_scheduler, x_t[i : i + 1], target[i : i + 1], timesteps[i])
        expected = x_0[i] if prediction_type == "flow_prediction" else x_0[i].clamp(-1, 1)  # pixels
        torch.testing.assert_close(preview[0], expected, atol=1e-4, rtol=1e-4)
