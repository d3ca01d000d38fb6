import tiny
import torch

from transfusion_hf.diffusion_transfusion import (
    content_seeds,
    make_noise_scheduler,
    make_sampling_scheduler,
    sample_noise,
    sample_timesteps,
)


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
