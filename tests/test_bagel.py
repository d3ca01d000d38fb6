"""
BAGEL: the naive twin reproduces what the released code computed from the same tiny weights, and so does our class with
BAGEL's options.
"""

import json
import random
from pathlib import Path

import pytest
import torch
from reference_bagel import Bagel, Latents, Seen, Text, latents_of, shifted, windows_of
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, pad
from transformers import DynamicCache, Qwen3Config
from transformers.models.qwen3 import modeling_qwen3

from transfusion_hf import TransfusionConfig, TransfusionForCausalLMAndDiffusion
from transfusion_hf.attention_transfusion import make_varlen_plan
from transfusion_hf.conversion.bagel import reordered, transfusion_name
from transfusion_hf.diffusion_transfusion import sample_timesteps
from transfusion_hf.masking_transfusion import attention_block_ids, positions_of_images, share_positions
from transfusion_hf.patching_transfusion import sincos_positions

FIXTURES = Path(__file__).parent / "fixtures" / "bagel"
IDS = (300, 301, 302, 303)
PROMPT = Text([300, 5, 17, 99, 250, 3, 42, 7, 301])


@pytest.fixture(scope="module")
def cases() -> dict[str, torch.Tensor]:
    cases = load_file(FIXTURES / "cases.safetensors")
    return {name: value.double() if value.is_floating_point() else value for name, value in cases.items()}


def make_twin(requires_grad: bool = False) -> Bagel:
    state = {name: value.double() for name, value in load_file(FIXTURES / "ema.safetensors").items()}
    for value in state.values():
        value.requires_grad_(requires_grad)
    configs = (json.loads((FIXTURES / f"{name}_config.json").read_text()) for name in ("llm", "vit"))
    return Bagel(state, *configs, IDS)


@pytest.fixture(scope="module")
def twin() -> Bagel:
    return make_twin()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_twin_writes_as_the_released_code(twin, cases):
    assert cases["text.ids"].tolist() == PROMPT.ids
    close(twin.logits([PROMPT]), cases["text.logits"])


GUIDED = {
    "plain": {},
    "text4_global": {"text_scale": 4.0, "interval": (0.4, 1.0)},
    "text4_channel": {"text_scale": 4.0, "renorm": "channel", "renorm_min": 0.5},
}


@pytest.mark.parametrize("name", GUIDED)
def test_the_twin_draws_as_the_released_code(twin, cases, name):
    noise = cases[f"draw.{name}.noise"].view(4, 6, 64)
    drawn = twin.draw([PROMPT], noise, num_points=8, **GUIDED[name])
    close(drawn.flatten(0, 1), cases[f"draw.{name}.latent_windows"])
    close(latents_of(drawn), cases[f"draw.{name}.latents"])


@pytest.mark.parametrize("renorm", ["global", "text_channel"])
def test_the_twin_edits_as_the_released_code(twin, cases, renorm):
    images = [Latents(windows_of(cases["vae.latents_mode"][0])), Seen(cases["vit.image"])]
    kwargs = {"text_scale": 4.0, "image_scale": 1.5, "interval": (0.4, 1.0), "renorm": renorm}
    contexts = {"without_text": images, "without_images": [PROMPT]}
    noise = cases[f"edit.{renorm}.noise"].view(4, 6, 64)
    close(
        twin.draw([*images, PROMPT], noise, num_points=6, **kwargs, **contexts).flatten(0, 1),
        cases[f"edit.{renorm}.latent_windows"],
    )


def test_the_twin_answers_as_the_released_code(twin, cases):
    assert twin.answer([Seen(cases["vit.image"]), PROMPT], 12) == cases["answer.ids"].tolist()


def test_the_twin_trains_as_the_released_code(cases):
    twin = make_twin(requires_grad=True)
    first, second = (windows_of(latents) for latents in cases["train.latents"])
    noise = windows_of(cases["train.noise"])
    close(noise.flatten(0, 1), cases["train.noise_windows"])
    squared, entropies = twin.losses([PROMPT, Latents(first, float(cases["train.t"]), is_hidden=True)], noise)
    _, others = twin.losses([Latents(second), Seen(cases["vit.image"]), PROMPT], noise)
    entropies = torch.stack(entropies + others)
    close(squared.mean().detach(), cases["train.mse"])
    close(entropies.detach(), cases["train.ce_each"])
    (squared.mean() + entropies.mean()).backward()
    names = [name for name in cases if name.startswith("train.grad.")]
    assert len(names) == 9
    for name in names:
        close(twin.w[name.removeprefix("train.grad.")].grad, cases[name])


def test_windows_and_latents_are_inverse():
    latents = torch.randn(3, 4, 6)
    assert torch.equal(latents_of(windows_of(latents)), latents)
    assert windows_of(latents)[1, 2].tolist() == latents[:, 2:4, 4:6].permute(1, 2, 0).flatten().tolist()


PATCH, VISION = 304, 305


def block(rows: int = 4, columns: int = 6) -> list[int]:
    return [302, *[PATCH] * (rows * columns), 303]


@pytest.fixture(scope="module")
def model(twin) -> TransfusionForCausalLMAndDiffusion:
    """Our class with the tiny weights, in float64."""
    llm = {name: value for name, value in twin.llm.items() if name not in ("model_type", "rope_theta")}
    rope = {"rope_type": "default", "rope_theta": twin.llm["rope_theta"]}
    config = TransfusionConfig(
        text_config=Qwen3Config(**llm, rope_parameters=rope, head_dim=16, attention_bias=True),
        latent_channels=16,
        sample_size=[8, 12],
        patch_size=2,
        prediction_type="flow_prediction",
        pos_embed_type="sincos",
        timestep_embedding_level="hidden",
        timestep_scale=1e-3,
        untied_modalities=["image"],
        untied_final_norm=True,
        image_markers_in_block=True,
        shared_image_position=True,
        hide_noised_images=True,
        image_start_token_id=302,
        image_token_id=PATCH,
        image_end_token_id=303,
        vision_config={**twin.vit, "num_hidden_layers": 2, "image_size": 140, "vision_use_head": False},
        vision_token_id=VISION,
    )
    model = TransfusionForCausalLMAndDiffusion(config).double().eval()
    state = {transfusion_name(name): reordered(name, value, 2) for name, value in twin.w.items()}
    state.pop(None)
    table = state["model.vision_encoder.vision_tower.embeddings.position_embedding.weight"]
    # The tiny table has the first 16 of 10 × 10 places; the real one is whole.
    state["model.vision_encoder.vision_tower.embeddings.position_embedding.weight"] = pad(table, (0, 0, 0, 84))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("o_proj.bias") for name in missing)
    with torch.no_grad():
        for name in missing:
            model.get_parameter(name).zero_()
    return model


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Norms and rotary embeddings of the library are in float32."""
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_class_writes_as_the_released_code(model, cases):
    near(model(cases["text.ids"][None]).logits[0], cases["text.logits"])


def test_without_the_librarys_float32_text_is_that_of_the_twin_to_float64(model, twin, monkeypatch):
    def norm(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    def rotary(self, x, position_ids):
        exponents = torch.arange(0, 16, 2, dtype=torch.float64) / 16
        angles = position_ids[..., None].double() * twin.llm["rope_theta"] ** -exponents
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()

    monkeypatch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_qwen3.Qwen3RotaryEmbedding, "forward", rotary)
    torch.manual_seed(0)
    latents = torch.randn(16, 4, 4).double()
    ids = [300, 5, 7, 301]
    for segments, row, options in (
        ([Text(ids)], ids, {}),
        # A clean image comes in with sinusoids and positions in float32.
        ([Text(ids), Latents(windows_of(latents)), Text([9, 8])], [*ids, *block(2, 2), 9, 8], {"latents": [latents]}),
    ):
        found, expected = model(torch.tensor([row]), **options).logits[0], twin.logits(segments)
        bound = 1e-10 if not options else 1e-6
        places = torch.tensor(row) != PATCH
        torch.testing.assert_close(found[places], expected[places], rtol=bound, atol=bound)


def test_positions_of_patches_are_those_of_the_checkpoint(twin):
    table = twin.w["latent_pos_embed.pos_embed"]
    torch.testing.assert_close(sincos_positions(8, 8, 64).double(), table, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "transfusion_varlen"])
def test_blocks_with_their_markers_and_one_position_are_those_of_the_twin(model, twin, implementation):
    torch.manual_seed(0)
    first, second = torch.randn(16, 4, 4).double(), torch.randn(16, 8, 12).double()
    segments = [Text([300, 5, 301]), Latents(windows_of(first)), Text([9, 8]), Latents(windows_of(second), 0.3, True)]
    logits = twin.logits([*segments, Text([11, 12])])
    velocity = latents_of(twin.velocity(segments[:3], windows_of(second), 0.3))
    ids = torch.tensor([[300, 5, 301, *block(2, 2), 9, 8, *block(), 11, 12]])
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        # transformers' eager attention takes softmax in float32, where float64's mask of a pad is −∞.
        layouts = [(ids, None), (padded, (padded != 0).long())][: 1 if implementation == "eager" else 2]
        for one, mask in layouts:
            positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
            output = model(
                one,
                latents=[first, second],
                timesteps=torch.tensor([0.0, 300.0], dtype=torch.float64),
                prediction_mask=torch.tensor([False, True]),
                attention_mask=mask,
                position_ids=positions,
            )
            near(output.image_predictions[0], velocity)
            near(output.logits[0, -ids.shape[1] :][ids[0] != PATCH], logits[ids[0] != PATCH])
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "transfusion_varlen"])
@pytest.mark.parametrize("seed", range(6))
def test_a_random_layout_is_that_of_the_twin(model, twin, seed, implementation):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    segments, row, pixels, noised = [], [], [], []
    images: dict[str, list] = {"latents": [], "timesteps": []}
    for _ in range(rng.randrange(3, 8)):
        kind = rng.choice(["text", "clean", "noised", "seen"])
        if kind == "text":
            segments.append(Text([rng.randrange(4, 300) for _ in range(rng.randrange(1, 5))]))
            row += segments[-1].ids
            continue
        rows, columns = rng.choice([(1, 2), (2, 1), (2, 2), (2, 4)])
        if kind == "seen":
            pixels.append(torch.randn(3, 14 * rows, 14 * columns, generator=generator).double())
            segments.append(Seen(pixels[-1]))
            row += seen(rows, columns)
            continue
        image, t = torch.randn(16, 2 * rows, 2 * columns, generator=generator).double(), rng.choice([0.2, 0.7])
        t = t if kind == "noised" else 0.0
        if t:
            noised.append(twin.velocity(segments, windows_of(image), t))
        segments.append(Latents(windows_of(image), t, kind == "noised"))
        row += block(rows, columns)
        images["latents"].append(image)
        images["timesteps"].append(1000 * t)
    inputs: dict = {"vision_pixel_values": pixels} if pixels else {}
    if images["latents"]:
        times = torch.tensor(images["timesteps"], dtype=torch.float64)
        inputs |= {"latents": images["latents"], "timesteps": times, "prediction_mask": times > 0}
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        output = model(torch.tensor([row]), **inputs)
    finally:
        model.set_attn_implementation(before)
    places = ~torch.isin(torch.tensor(row), torch.tensor([PATCH, VISION, 302, 303]))
    near(output.logits[0][places], twin.logits(segments)[places])
    for found, expected in zip(output.image_predictions or [], noised, strict=True):
        near(found, latents_of(expected))


DRAWN = {
    "plain": {"image_guidance_scale": 1.0},
    "text4_global": {"guidance_interval": (0.4, 1.0), "guidance_renorm": "global"},
    "text4_channel": {"guidance_renorm": "channel", "guidance_renorm_min": 0.5},
}
NESTED = {"generation_mode": "image", "guidance_type": "nested", "image_guidance_scale": 4.0, "pad_token_id": 0}
NESTED |= {"timestep_shift": 3.0}


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", DRAWN)
def test_the_class_draws_as_the_released_code(model, cases, name, use_cache):
    noise = latents_of(cases[f"draw.{name}.noise"].view(4, 6, 64))[None]
    kwargs = {**NESTED, "num_inference_steps": 7, "init_noise": noise, "use_cache": use_cache, **DRAWN[name]}
    output = model.generate(torch.tensor([PROMPT.ids]), **kwargs)
    near(output.images[0][0], cases[f"draw.{name}.latents"])
    assert output.sequences[0].tolist() == [*PROMPT.ids, *block()]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    ("renorm", "image_scale"), [("global", 1.5), ("channel", 1.5), ("text_channel", 1.5), (None, 1.5), (None, None)]
)
def test_edits_are_guided_by_text_and_then_by_images_as_the_twin(model, twin, renorm, image_scale, use_cache):
    """Two rows in a batch: of one and of two images."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 16, 8, 12, generator=generator).double()
    first, second = torch.randn(2, 16, 4, 4, generator=generator).double()
    rows = [[300, 5, *block(2, 2), 9, 7], [*block(2, 2), *block(2, 2), 300, 8]]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    kwargs = {**NESTED, "num_inference_steps": 3, "init_noise": noise, "use_cache": use_cache}
    kwargs |= {"input_image_guidance_scale": image_scale, "guidance_interval": (0.4, 1.0), "guidance_renorm": renorm}
    latents = [first, second, -first]
    output = model.generate(ids, latents=latents, attention_mask=(ids != 0).long(), **kwargs)
    shown = [Latents(windows_of(one)) for one in latents]
    contexts = [
        ([Text([300, 5]), shown[0], Text([9, 7])], [Text([300, 5]), shown[0]], [Text([300, 5, 9, 7])]),
        ([shown[1], shown[2], Text([300, 8])], [shown[1], shown[2]], [Text([300, 8])]),
    ]
    options = {"num_points": 4, "text_scale": 4.0, "image_scale": image_scale or 1.0, "interval": (0.4, 1.0)}
    options |= {"renorm": renorm or "global", "renorm_min": 1.0 if renorm is None else 0.0}
    for i, (context, without_text, without_images) in enumerate(contexts):
        others = {"without_text": without_text, "without_images": without_images}
        near(output.images[i][0], latents_of(twin.draw(context, windows_of(noise[i]), **options, **others)))


@pytest.mark.parametrize("renorm", ["global", "text_channel"])
def test_a_system_prompt_stays_in_what_guidance_moves_away_from(model, twin, renorm):
    noise = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(0)).double()
    system, prompt = [300, 5, 301], [300, 9, 7, 301]
    kwargs = {**NESTED, "num_inference_steps": 3, "init_noise": noise, "guidance_renorm": renorm}
    negative = {"negative_prompt_ids": torch.tensor([system])}
    output = model.generate(torch.tensor([[*system, *prompt]]), **kwargs, **negative)
    context, windows = [Text([*system, *prompt])], windows_of(noise[0])
    options = {"num_points": 4, "text_scale": 4.0, "renorm": renorm, "without_text": [Text(system)]}
    near(output.images[0][0], latents_of(twin.draw(context, windows, **options)))
    image = torch.zeros(1, 16, 4, 4).double()
    with pytest.raises(ValueError, match="nested guidance would lose the prompt's"):
        model.generate(torch.tensor([[*block(2, 2), 300, 9]]), latents=image, **kwargs, **negative)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance_type": "bagel"}, r"`guidance_type` must be one of \('instruct_pix2pix', 'nested'\); got 'bagel'"),
        ({"guidance_renorm": "image"}, r"`guidance_renorm` must be one of .*; got 'image'"),
        ({"guidance_renorm": "global", "image_guidance_scale": 1.0}, "does nothing without guidance; raise"),
        ({"guidance_renorm": "text_channel", "guidance_type": "instruct_pix2pix"}, "needs `guidance_type='nested'`"),
        ({"guidance_interval": (0.5, 0.4)}, r"`guidance_interval` must be \(low, high\) with 0 ≤ low ≤ high ≤ 1"),
        ({"timestep_shift": 0.0}, r"`timestep_shift` must be positive; got 0\.0"),
        ({"sigmas": [1.0, 0.5]}, "`timestep_shift` is for flow matching, without `timesteps` and `sigmas`"),
        ({"input_image_guidance_scale": 1.5}, "guides by the images of the prompt, and a prompt has none"),
    ],
)
def test_guidance_that_contradicts_itself_is_refused(model, changes, message):
    with pytest.raises(ValueError, match=message):
        model.generate(torch.tensor([PROMPT.ids]), **{**NESTED, "num_inference_steps": 2, **changes})


def test_text_behind_images_goes_on_as_the_twin_with_and_without_cache(model, twin):
    """Rows of different lengths: one has an image to read, both draw one and write on."""
    torch.manual_seed(0)
    image = torch.randn(16, 4, 4).double()
    rows = [[300, 5, *block(2, 2), 9, 302], [300, 7, 302]]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    kwargs = {"latents": [image], "attention_mask": (ids != 0).long(), "pad_token_id": 0, "sigmas": [1.0, 0.5]}
    kwargs |= {"image_guidance_scale": 1.0, "max_images": 1, "max_new_tokens": 25 + 4, "generator": None}
    outputs = []
    for use_cache in (True, False):
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        outputs.append(model.generate(ids, use_cache=use_cache, **{**kwargs, "generator": generators}))
    cached, uncached = outputs
    assert torch.equal(cached.sequences, uncached.sequences)
    for i, context in enumerate(([Text([300, 5]), Latents(windows_of(image)), Text([9])], [Text([300, 7])])):
        near(cached.images[i][0], uncached.images[i][0].double())
        x = windows_of(torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(i))[0].double())
        for t, after in ((1.0, 0.5), (0.5, 0.0)):
            x = x + (after - t) * twin.velocity(context, x, t)
        near(cached.images[i][0], latents_of(x))
        new = cached.sequences[i, width + 25 :].tolist()
        expected = []
        for _ in range(4):
            logits = twin.logits([*context, Latents(x), *([Text(expected)] if expected else [])])[-1]
            logits[[302, 303, PATCH]] = -torch.inf
            expected.append(int(logits.argmax()))
        assert new == expected


def test_positions_are_shared_once_and_documents_begin_anew(model):
    ids = torch.tensor([[5, *block(1, 2), 6, 7, *block(1, 1), 8, 5, 302, PATCH, 303, 9]])
    blocks = attention_block_ids(ids, model.config)
    assert blocks.tolist() == [[-1, 0, 0, 0, 0, -1, -1, 1, 1, 1, -1, -1, 2, 2, 2, -1]]
    positions = torch.tensor([[*range(11), *range(5)]])
    shared, counted = share_positions(positions, blocks)
    assert torch.equal(counted, positions)
    assert shared.tolist() == [[0, 1, 1, 1, 1, 2, 3, 4, 4, 4, 5, 0, 1, 1, 1, 2]]
    again, counted = share_positions(shared, blocks)
    assert torch.equal(again, shared) and torch.equal(counted, positions)
    lonely = torch.tensor([[0, 0, 1, 0]])  # documents of one token
    assert all(torch.equal(each, lonely) for each in share_positions(lonely, torch.full((1, 4), -1)))


@pytest.mark.parametrize("mode", ["interleaved", "text"])
def test_a_single_row_is_read_alike_with_and_without_cache(model, twin, mode):
    image = torch.randn(16, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    ids = torch.tensor([[300, 5, *block(2, 2), 9, *block(2, 2), 7]])
    context = [Text([300, 5]), Latents(windows_of(image)), Text([9]), Latents(windows_of(-image)), Text([7])]
    expected: list[int] = []
    for _ in range(4):
        logits = twin.logits([*context, *([Text(expected)] if expected else [])])[-1]
        logits[[302, 303, PATCH]] = -torch.inf
        expected.append(int(logits.argmax()))
    for use_cache in (True, False):
        kwargs = {"generation_mode": mode, "max_images": 0 if mode == "interleaved" else None, "pad_token_id": 0}
        output = model.generate(ids, latents=[image, -image], max_new_tokens=4, use_cache=use_cache, **kwargs)
        assert getattr(output, "sequences", output)[0, ids.shape[1] :].tolist() == expected


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "transfusion_varlen"])
def test_a_training_step_is_that_of_the_twin(model, implementation, is_packed):
    """A noised image, hidden, before its clean copy and text, and a document of its own behind it; with gradients."""
    twin, generator, t = make_twin(requires_grad=True), torch.Generator().manual_seed(0), (0.3, 0.8)
    first, second = (torch.randn(16, *size, generator=generator).double() for size in ((8, 12), (4, 4)))
    noise = [
        torch.randn(x.shape, generator=torch.Generator().manual_seed(i + 1), dtype=x.dtype)
        for i, x in enumerate((first, second))  # as `noise_seeds` 0 and 1 say
    ]
    pixels = torch.randn(2, 3, 14, 28, generator=generator).double()
    hidden = [Latents(windows_of(x), t[i], is_hidden=True) for i, x in enumerate((first, second))]
    documents = [
        [PROMPT, hidden[0], Latents(windows_of(first)), Seen(pixels[0]), Text([11, 12, 13])],
        [Seen(pixels[1]), Text([300, 8, 9]), hidden[1], Text([14, 15])],
    ]
    losses = [twin.losses(d, windows_of(e)) for d, e in zip(documents, noise, strict=True)]
    diffusion = torch.stack([squared.mean() for squared, _ in losses]).mean()
    entropy = torch.stack([e for _, entropies in losses for e in entropies]).mean()
    (entropy + 5.0 * diffusion).backward()

    rows = [
        [*PROMPT.ids, *block(), *block(), *seen(1, 2), 11, 12, 13],
        [*seen(1, 2), 300, 8, 9, *block(2, 2), 14, 15],
    ]
    labels = [[-100 if token in (302, PATCH, VISION, 303) else token for token in row] for row in rows]
    for row, label in zip(rows, labels, strict=True):
        for i in range(len(row)):
            if i == 0 or row[i - 1] in (302, 303):
                label[i] = -100
    if is_packed:
        ids, targets = ([each[0] + each[1]] for each in (rows, labels))
        where = {"position_ids": torch.tensor([[*range(len(rows[0])), *range(len(rows[1]))]])}
    else:
        width = len(rows[0])
        ids, targets = (
            [row + [fill] * (width - len(row)) for row in each] for each, fill in ((rows, 0), (labels, -100))
        )
        where = {"attention_mask": (torch.tensor(ids) != 0).long()}
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation(implementation)
    model.zero_grad()
    try:
        output = model(
            torch.tensor(ids),
            latents=[first, first, second],
            vision_pixel_values=pixels,
            labels=torch.tensor(targets),
            timesteps=torch.tensor([300.0, 0.0, 800.0], dtype=torch.float64),
            image_loss_mask=torch.tensor([True, False, True]),
            noise_seeds=[0, 7, 1],
            **where,
        )
    finally:
        model.set_attn_implementation(before)
    near(output.lm_loss, entropy.detach())
    near(output.diffusion_loss, diffusion.detach())
    output.loss.backward()
    for name, value in twin.w.items():
        if (ours := transfusion_name(name)) is not None:
            grad = model.get_parameter(ours).grad
            near(grad[: len(value)] if "position_embedding" in name else grad, reordered(name, value.grad, 2))


def test_t_of_training_is_logit_normal_and_shifted():
    torch.manual_seed(0)
    limit = torch.full((40_000,), 1000)
    t = sample_timesteps(limit, distribution="logit_normal", shift=3.0)
    assert 0 <= t.min() and t.max() <= 999
    normal = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]))
    expected = [shifted(float(x), 3.0) for x in normal.sigmoid()]
    found = (t / 1000).quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=0.01)
    again = [sample_timesteps(limit[:5], [1, 2, 3, 4, 5], "logit_normal") for _ in range(2)]
    assert torch.equal(*again) and len(set(again[0].tolist())) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timestep_embedding_level": "hidden", "patch_encoder": "unet"}, "needs `patch_encoder='linear'`"),
        ({"timestep_distribution": "normal"}, "`timestep_distribution` must be 'uniform' or 'logit_normal'"),
        ({"train_timestep_shift": 0}, "`train_timestep_shift` must be positive; got 0"),
        ({"hide_noised_images": True, "bidirectional_image_attention": False}, "an image would not see itself"),
        ({"untied_final_norm": True}, "`untied_final_norm` needs `untied_modalities"),
    ],
)
def test_options_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TransfusionConfig(**changes)


def test_each_image_is_found_in_its_row():
    blocks = torch.tensor([[-1, 0, 0, -1, 1], [0, -1, 1, 1, -1]])
    found = positions_of_images(blocks, torch.tensor([True, False, False, True]))
    assert found.int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]]


def test_contexts_with_images_are_kept_between_drawings(model):
    """Rows of two sizes are drawn in turn."""
    images = [*torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0)).double()]
    ids = torch.tensor([[300, 5, *block(2, 2), 9, 7, 302]]).expand(2, -1)
    kwargs = {**NESTED, "num_inference_steps": 2, "height": [8, 4], "width": 12}
    drawn = []
    for use_cache in (True, False):
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        output = model.generate(ids, latents=images, use_cache=use_cache, generator=generators, **kwargs)
        drawn.append([row[0] for row in output.images])
    for cached, uncached in zip(*drawn, strict=True):
        near(cached, uncached.double())


def test_images_hidden_in_a_cache_are_no_context_of_nested_guidance(model):
    ids, cache = torch.tensor([[300, 5, *block(2, 2), 9, 302]]), DynamicCache()
    model(ids[:, :-2], latents=torch.zeros(1, 16, 4, 4).double(), cache=cache, use_cache=True)
    with pytest.raises(ValueError, match=r"guides by the images of the prompt, .* are in `cache`"):
        model.generate(ids, cache=cache, **NESTED, num_inference_steps=2)


def test_a_plan_that_does_not_know_hidden_images_is_refused(model):
    ids = torch.tensor([[300, *block(2, 2), 9]])
    plan = make_varlen_plan(torch.ones_like(ids), ids.shape[1], attention_block_ids(ids, model.config))
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation("transfusion_varlen")
    try:
        with pytest.raises(
            ValueError, match="`varlen_plan` does not know `hide_noised_images`; have the collator make"
        ):
            model(ids, latents=torch.zeros(1, 16, 4, 4).double(), labels=ids, varlen_plan=plan)
    finally:
        model.set_attn_implementation(before)


def seen(rows: int, columns: int) -> list[int]:
    return [302, *[VISION] * (rows * columns), 303]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("renorm", ["global", "text_channel"])
def test_the_class_edits_as_the_released_code(model, cases, renorm, use_cache):
    """The image stands twice before the prompt: as latents, and as what the vision encoder sees."""
    ids = torch.tensor([[*block(), *seen(2, 3), *PROMPT.ids]])
    noise = latents_of(cases[f"edit.{renorm}.noise"].view(4, 6, 64))[None]
    images = {"latents": cases["vae.latents_mode"], "vision_pixel_values": cases["vit.image"][None]}
    guidance = {"input_image_guidance_scale": 1.5, "guidance_interval": (0.4, 1.0), "guidance_renorm": renorm}
    kwargs = {**NESTED, **images, **guidance, "num_inference_steps": 5, "init_noise": noise, "use_cache": use_cache}
    output = model.generate(ids, **kwargs)
    expected = latents_of(cases[f"edit.{renorm}.latent_windows"].view(4, 6, 64))
    near(output.images[0][0], expected)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("mode", ["text", "interleaved"])
def test_the_class_answers_as_the_released_code(model, cases, mode, use_cache):
    ids = torch.tensor([[*seen(2, 3), *PROMPT.ids, 300]])
    kwargs = {"vision_pixel_values": cases["vit.image"][None], "generation_mode": mode, "use_cache": use_cache}
    output = model.generate(ids, max_new_tokens=11, pad_token_id=0, **kwargs)
    sequences = output if mode == "text" else output.sequences
    assert sequences[0, ids.shape[1] - 1 :].tolist() == cases["answer.ids"].tolist()


def test_the_class_trains_as_the_released_code(model, cases):
    """One packed step, with the noise and the gradients of the release."""
    first, second = cases["train.latents"]
    noise, t = cases["train.noise"].view_as(first), float(cases["train.t"])
    documents = [[*PROMPT.ids, *block()], [*block(), *seen(2, 3), *PROMPT.ids]]
    ids = torch.tensor([documents[0] + documents[1]])
    output = model(
        ids,
        latents=[(1 - t) * first + t * noise, second],
        vision_pixel_values=cases["vit.image"][None],
        timesteps=torch.tensor([1000 * t, 0.0], dtype=torch.float64),
        prediction_mask=torch.tensor([True, False]),
        position_ids=torch.tensor([[*range(len(documents[0])), *range(len(documents[1]))]]),
    )
    squared = (output.image_predictions[0] - (noise - first)).square().mean()
    texts = (slice(0, 9), slice(len(ids[0]) - 9, None))
    entropies = [cross_entropy(output.logits[0, text][:-1], ids[0, text][1:], reduction="none") for text in texts]
    near(squared.detach(), cases["train.mse"])
    near(torch.cat(entropies).detach(), cases["train.ce_each"])
    model.zero_grad()
    (squared + torch.cat(entropies).mean()).backward()
    for name in (name for name in cases if name.startswith("train.grad.")):
        theirs = name.removeprefix("train.grad.")
        found = model.get_parameter(transfusion_name(theirs)).grad
        close(reordered(theirs, found, 2, is_back=True)[: len(cases[name])], cases[name])
    model.zero_grad()
