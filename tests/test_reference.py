"""Everything that trains, against the naive float64 twin in `reference.py`: outputs and all gradients."""

import random
from itertools import pairwise

import pytest
import reference
import tiny
import torch

from transfusion_hf import TransfusionConfig
from transfusion_hf.diffusion_transfusion import add_noise, sample_noise, sample_timesteps
from transfusion_hf.masking_transfusion import create_transfusion_mask, image_block_ids
from transfusion_hf.patching_transfusion import TransfusionTimestepEmbedding, patchify, stack_images, unpatchify

SEEDS = (1, 2, 10, 23)  # small batches that hold every case between them, see below


def real_ids(features: dict) -> list[list[int]]:
    pairs = zip(features["input_ids"], features["attention_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in pairs]


def drawn(model, features: dict):
    """t, ε and x_t as `forward` draws them from the seeds, x_t by the reference."""
    stacks = stack_images(features["latents"])
    seeds, is_noised = features["noise_seeds"], features["image_loss_mask"].tolist()
    kind, shift = model.config.timestep_distribution, model.config.train_timestep_shift
    timesteps = sample_timesteps(features["max_timesteps"], seeds, kind, shift).tolist()
    noise = [image for stack in sample_noise(stacks, seeds) for image in stack]
    images, alpha_bars = [], model.noise_scheduler.alphas_cumprod.double()
    timesteps = [t if noised else 0 for t, noised in zip(timesteps, is_noised, strict=True)]
    for image, eps, t, noised in zip(features["latents"], noise, timesteps, is_noised, strict=True):
        images.append(reference.noised(image, eps, float(alpha_bars[t])) if noised else image)
    return timesteps, noise, images, is_noised


def reference_losses(model, features: dict, params: reference.Params):
    """The two losses of a batch and everything on the way, document by document, image by image."""
    lm_terms, diffusion_terms, all_logits, predictions = [], [], [], []
    timesteps, noise, images, is_noised = drawn(model, features) if "latents" in features else ([], [], [], [])
    sinusoids = model.model.patch_encoder.timestep_embedding.sinusoids
    s = [sinusoids(torch.tensor([t]))[0].double() for t in timesteps]
    start = 0
    for ids in real_ids(features):
        count = sum(a == tiny.IMG != b for a, b in zip(ids, [None, *ids], strict=False))
        here = slice(start, start + count)
        logits, predicted = reference.document(params, model.config, ids, images[here], s[here], is_noised[here])
        lm_terms += reference.lm_terms(model.config, ids, logits)
        weights = [1.0] * count
        if model.config.diffusion_loss_weighting == "min_snr":
            alpha_bars = model.noise_scheduler.alphas_cumprod.double()
            weights = [reference.min_snr_weight(float(alpha_bars[t])) for t in timesteps[here]]
        pairs = [(p, e, w) for p, e, w in zip(predicted, noise[here], weights, strict=True) if p is not None]
        diffusion_terms += [reference.diffusion_term(*pair) for pair in pairs]
        all_logits.append(torch.stack(logits))
        predictions += [p for p, *_ in pairs]
        start += count
    zero = torch.zeros((), dtype=torch.float64)
    lm_loss = sum(lm_terms, zero) / max(len(lm_terms), 1)
    diffusion_loss = sum(diffusion_terms, zero) / max(len(diffusion_terms), 1)
    return lm_loss, diffusion_loss, all_logits, predictions


# Not eager with left padding: in float64 the library's eager softmax makes NaN of rows that see nothing.
WAYS = (("sdpa", "right"), ("sdpa", "left"), ("eager", "right"))


def assert_equal_to_the_reference(seed: int, ways=WAYS, **options) -> None:
    """Every attention and padding against one run of the reference, which knows neither."""
    model = tiny.model(seed=seed, dtype=torch.float64, **options)
    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    features = tiny.batch(seed, dtype=torch.float64)
    lm_loss, diffusion_loss, logits, predictions = reference_losses(model, features, params)
    loss = lm_loss + model.config.diffusion_loss_weight * diffusion_loss
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    largest = max(float(grad.abs().max()) for grad in grads if grad is not None)

    for attn_implementation, padding_side in ways:
        model.set_attn_implementation(attn_implementation)
        model.zero_grad()
        features = tiny.batch(seed, dtype=torch.float64, padding_side=padding_side)
        output = model(**features)
        output.loss.backward()
        # The model is float64, but the library keeps RoPE's table and the cross entropy in float32.
        torch.testing.assert_close(output.lm_loss.double(), lm_loss, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(output.diffusion_loss, diffusion_loss, atol=1e-6, rtol=1e-6)
        for row, mask, expected in zip(output.logits, features["attention_mask"], logits, strict=True):
            torch.testing.assert_close(row[mask.bool()], expected, atol=1e-5, rtol=1e-5)
        for predicted, expected in zip(output.image_predictions or [], predictions, strict=True):
            torch.testing.assert_close(predicted, expected, atol=1e-5, rtol=1e-5)
        for (name, parameter), expected in zip(model.named_parameters(), grads, strict=True):
            expected = torch.zeros_like(parameter) if expected is None else expected
            actual = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            difference = (actual - expected).abs()
            assert (difference <= 1e-6 * largest + 1e-5 * expected.abs()).all(), f"gradient of {name}"


@pytest.mark.parametrize("seed", SEEDS)
def test_losses_logits_predictions_and_every_gradient_equal_the_reference(seed):
    assert_equal_to_the_reference(seed)


@pytest.mark.parametrize(
    ("seed", "options"),
    [
        (SEEDS[0], {"pos_embed_type": "sincos"}),
        (SEEDS[1], tiny.UNET),
        (SEEDS[2], {**tiny.UNET, "unet_layers_per_block": 2, "pos_embed_type": "sincos"}),
    ],
)
def test_the_other_front_ends_equal_the_reference(seed, options):
    assert_equal_to_the_reference(seed, WAYS[1:2], **options)


@pytest.mark.parametrize("seed", SEEDS[:3])
def test_untied_image_weights_equal_the_reference(seed):
    assert_equal_to_the_reference(seed, WAYS[1:], untied_modalities=["image"])


@pytest.mark.parametrize("seed", [*SEEDS, 3, 4])
def test_the_fields_that_the_paper_has_not_equal_the_reference(seed):
    assert_equal_to_the_reference(seed, WAYS[:2], **tiny.drawn_fields(seed))


def test_the_random_layouts_cover_every_case():
    batches = [tiny.batch(seed) for seed in SEEDS]
    documents = [ids for features in batches for ids in real_ids(features)]
    counts = [sum(token == tiny.BOI for token in ids) for ids in documents]
    pairs = [pair for ids in documents for pair in pairwise(ids)]
    images = [image for features in batches for image in features.get("latents", [])]
    assert {0, 1, 2, 3, 4} <= set(counts)
    assert (tiny.EOI, tiny.BOI) in pairs  # adjacent
    assert any(ids[0] == tiny.BOI for ids in documents) and any(ids[-1] == tiny.EOI for ids in documents)
    assert any(image.shape[1:] == (2, 2) for image in images)  # one patch
    assert any(not mask for features in batches for mask in features.get("image_loss_mask", []))  # clean context
    assert any((features["attention_mask"] == 0).any() for features in batches)


@pytest.mark.parametrize("seed", SEEDS)
def test_mask_equals_the_reference(seed):
    features = tiny.batch(seed, padding_side="left")
    ids, padding = features["input_ids"], features["attention_mask"]
    text_config = tiny.text_config(attn_implementation="sdpa")
    mask = create_transfusion_mask(
        text_config, torch.zeros(*ids.shape, 1), image_block_ids(ids, tiny.IMG), padding, None, None
    )
    for row in range(len(ids)):
        real = padding[row].bool()
        expected = torch.tensor(reference.mask(ids[row][real].tolist(), tiny.IMG))
        seen = mask[row, 0] if mask is not None else torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
        assert torch.equal(seen[real][:, real], expected)
        assert not seen[real][:, ~real].any()


def test_noised_latents_equal_the_reference():
    model = tiny.model()
    alpha_bars = model.noise_scheduler.alphas_cumprod.double()
    x_0, eps = torch.randn(5, 2, 4, 4, dtype=torch.float64), torch.randn(5, 2, 4, 4, dtype=torch.float64)
    timesteps = torch.tensor([0, 1, 499, 998, 999])
    (x_t,) = add_noise(model.noise_scheduler, [x_0], [eps], timesteps)
    expected = [reference.noised(x, e, float(alpha_bars[t])) for x, e, t in zip(x_0, eps, timesteps, strict=True)]
    torch.testing.assert_close(x_t, torch.stack(expected), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_patches_equal_the_reference_and_unpatching_undoes_them(size):
    images = torch.randn(3, 2, 4, 8)
    expected = torch.stack([torch.stack(reference.patches(image, size)) for image in images])
    assert torch.equal(patchify(images, size), expected)
    assert torch.equal(unpatchify(expected, size, (4, 8)), images)


def test_unpatching_undoes_patching_for_every_size_and_layout():
    rng = random.Random(0)
    for _ in range(300):
        side = rng.choice([1, 2, 4, 8])
        size = (side * rng.randrange(1, 6), side * rng.randrange(1, 6))
        images = torch.randn(rng.randrange(1, 4), rng.randrange(1, 5), *size)
        images = images.transpose(2, 3).contiguous().transpose(2, 3) if rng.random() < 0.5 else images
        patches = patchify(images, side)
        assert patches.shape == (len(images), size[0] * size[1] // side**2, images.shape[1] * side**2)
        assert torch.equal(unpatchify(patches, side, size), images)


def test_timestep_sinusoids_are_float32_cosines_and_sines():
    timesteps = torch.tensor([0, 1, 500, 999])
    sinusoids = TransfusionTimestepEmbedding(TransfusionConfig(), 8).sinusoids(timesteps)
    frequencies = 10000 ** (-torch.arange(128, dtype=torch.float64) / 128)
    angles = timesteps[:, None].double() * frequencies
    assert sinusoids.dtype == torch.float32
    torch.testing.assert_close(sinusoids.double(), torch.cat([angles.cos(), angles.sin()], dim=1), atol=1e-4, rtol=0)


def test_alpha_bar_is_within_0_006_of_the_papers_cosine():
    alpha_bars = tiny.model().noise_scheduler.alphas_cumprod.double()
    t = torch.arange(1, 1001, dtype=torch.float64)
    cosine = torch.cos(t / 1000 * torch.pi / 2)
    assert (alpha_bars.sqrt() - cosine).abs().max() < 0.006
