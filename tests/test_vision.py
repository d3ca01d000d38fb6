"""Images that a vision encoder reads, beside latents or in their place."""

import numpy as np
import pytest
import tiny
import torch
from make_tiny_transfusion import byte_tokenizer
from PIL import Image
from transformers import AutoProcessor, SiglipVisionConfig, SiglipVisionModel, TrainingArguments
from transformers.image_utils import SizeDict

from transfusion_hf import (
    TransfusionConfig,
    TransfusionDataCollator,
    TransfusionForCausalLMAndDiffusion,
    TransfusionProcessor,
    TransfusionTrainer,
    new_transfusion,
)
from transfusion_hf.image_processing_transfusion import sides_to_resize_to
from transfusion_hf.masking_transfusion import image_block_ids
from transfusion_hf.patching_transfusion import TransfusionVisionEncoder, sincos_positions

SEEN = 60
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4, "vision_use_head": False,
}  # fmt: skip
FIELDS = {"vision_config": VISION, "vision_token_id": SEEN}


@pytest.fixture(scope="module")
def model() -> TransfusionForCausalLMAndDiffusion:
    return tiny.model(**FIELDS)


@pytest.fixture(scope="module")
def pair() -> tuple[TransfusionForCausalLMAndDiffusion, TransfusionProcessor]:
    """A model that was made for a tokenizer, and its processor."""
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "patch_size": 2, "timestep_embedding_dim": 16, "vision_config": VISION}
    model, processor = new_transfusion(byte_tokenizer(), tiny.text_config(), **sizes)
    return model.eval(), processor


def picture(height: int = 12, width: int = 8, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def block(num: int, token: int = SEEN) -> list[int]:
    return [tiny.BOI, *[token] * num, tiny.EOI]


@torch.no_grad()
def test_a_whole_image_is_seen_as_by_the_library(model):
    """With all of the table's positions, and what stands behind the tower by hand."""
    encoder = model.model.vision_encoder
    library = SiglipVisionModel(SiglipVisionConfig(**VISION)).eval()
    library.load_state_dict(encoder.vision_tower.state_dict())
    pixels = torch.randn(2, 3, 16, 16)
    states = library(pixels).last_hidden_state
    hidden = torch.nn.functional.gelu(encoder.linear_1(states), approximate="tanh")
    expected = encoder.linear_2(hidden) + sincos_positions(4, 4, 32).float()
    torch.testing.assert_close(encoder([pixels])[0], expected)


@torch.no_grad()
def test_smaller_images_have_the_first_rows_and_columns_of_positions(model):
    encoder = model.model.vision_encoder
    table = encoder.vision_tower.embeddings.position_embedding.weight
    (before,) = encoder([pixels := torch.randn(1, 3, 8, 4)])
    others = [place for place in range(16) if place not in (0, 4)]
    kept = table[others].clone()
    table[others] += 1.0
    assert torch.equal(encoder([pixels])[0], before)
    table[others] = kept
    table[4, 0] += 1.0
    assert not torch.allclose(encoder([pixels])[0], before)
    table[4, 0] -= 1.0


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "transfusion_varlen"])
def test_what_is_seen_is_a_block_of_its_own(implementation):
    """Within it both directions, to what is before it none; images of several sizes, latents between, pads."""
    model = tiny.model(**FIELDS)
    model.set_attn_implementation(implementation)
    pixels = [torch.randn(3, 8, 4), torch.randn(3, 4, 12)]
    latents = torch.randn(1, 2, 4, 4)
    rows = [[5, *block(2), *block(4, tiny.IMG), 6, *block(3), 7], [0] * 6 + [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]]
    rows[1] = [0] * (len(rows[0]) - 11) + rows[1][6:]
    ids = torch.tensor(rows)
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "latents": latents}
    before = model(**inputs, vision_pixel_values=pixels).logits
    changed = pixels[0].clone()
    changed[:, 4:] += 1  # the second patch of the first image
    after = model(**inputs, vision_pixel_values=[changed, pixels[1]]).logits
    same = ((after - before)[0].abs().amax(-1) < tiny.ROUNDING).tolist()
    assert same == [True, True, *[False] * (len(rows[0]) - 2)]
    alone = model(ids[1:, -11:]).logits
    torch.testing.assert_close(before[1, -11:], alone[0], rtol=0, atol=tiny.ROUNDING)


@pytest.mark.parametrize("has_image", [True, False])
def test_the_encoder_has_a_gradient_in_every_training_step(has_image):
    """One of 0 where no image came: else processes would wait for each other."""
    model = tiny.model(**FIELDS).train()
    ids = torch.tensor([[5, *block(2), 6, 7]]) if has_image else torch.tensor([[5, 6, 7]])
    images = {"vision_pixel_values": torch.randn(1, 3, 4, 8)} if has_image else {}
    labels = torch.where((ids == SEEN) | (ids >= tiny.BOI), -100, ids)
    loss = model(ids, labels=labels, **images).loss
    text_loss = model.eval()(ids, labels=labels, **images).loss
    torch.testing.assert_close(loss, text_loss, rtol=0, atol=tiny.ROUNDING)
    loss.backward()
    grads = [p.grad for p in model.model.vision_encoder.parameters()]
    used = sum(float(g.abs().sum()) for g in grads if g is not None)
    assert all(g is not None for g in grads) and (used > 0) == has_image


@pytest.mark.parametrize("mode", ["text", "interleaved"])
def test_rows_that_see_write_as_they_do_alone_with_and_without_cache(model, mode):
    pixels = [torch.randn(3, 8, 8), torch.randn(3, 4, 8), torch.randn(3, 4, 4)]
    rows = [[5, *block(4), 6, *block(2), 7], [9, *block(1), 8], [5, 6]]
    numbers = [pixels[:2], pixels[2:], []]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    kwargs = {"generation_mode": mode, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    kwargs |= {"max_images": 0} if mode == "interleaved" else {}
    mask = (ids != 0).long()
    outputs = [
        model.generate(ids, attention_mask=mask, vision_pixel_values=pixels, use_cache=use_cache, **kwargs)
        for use_cache in (True, False)
    ]
    together, uncached = (getattr(output, "sequences", output)[:, width:] for output in outputs)
    assert torch.equal(together, uncached)
    assert not (together == SEEN).any()
    for row, own, expected in zip(rows, numbers, together, strict=True):
        output = model.generate(torch.tensor([row]), vision_pixel_values=own or None, **kwargs)
        assert getattr(output, "sequences", output)[0, len(row) :].tolist() == expected.tolist()


def test_several_sequences_of_a_prompt_have_its_images(model):
    pixels = [torch.randn(3, 8, 8), torch.randn(3, 8, 8)]
    ids = torch.tensor([[5, *block(4), 6], [8, *block(4), 7]])
    kwargs = {"generation_mode": "text", "max_new_tokens": 3, "pad_token_id": 0, "eos_token_id": None}
    one = model.generate(ids, vision_pixel_values=pixels, **kwargs)
    several = model.generate(ids, vision_pixel_values=pixels, num_beams=2, num_return_sequences=2, **kwargs)
    assert several.shape == (4, one.shape[1])
    alone = model.generate(ids[1:], vision_pixel_values=pixels[1:], num_beams=2, num_return_sequences=2, **kwargs)
    assert torch.equal(several[2:], alone)


@pytest.mark.parametrize(
    ("ids", "pixels", "message"),
    [
        ([5, *block(2), 6], None, "`vision_pixel_values` hold 0 images but `input_ids` has 1 image blocks"),
        ([5, 6], torch.zeros(1, 3, 8, 8), "`vision_pixel_values` hold 1 images but `input_ids` has 0 image blocks"),
        ([5, *block(2), 6], torch.zeros(1, 3, 8, 8), r"image blocks of \[2\] patches but the images have \[4\]"),
        ([5, *block(2), 6], torch.zeros(1, 3, 8, 20), r"sides multiples of 4 up to 16; got \(1, 3, 8, 20\)"),
        ([5, *block(2), 6], torch.zeros(1, 3, 4, 6), r"sides multiples of 4 up to 16; got \(1, 3, 4, 6\)"),
        ([5, *block(2), 6], torch.full((1, 3, 4, 8), torch.nan), "`vision_pixel_values` holds NaN"),
    ],
)
def test_images_that_do_not_fit_are_refused(model, ids, pixels, message):
    with pytest.raises(ValueError, match=message):
        model(torch.tensor([ids]), vision_pixel_values=pixels)


def test_a_model_without_encoder_refuses_images_for_one():
    with pytest.raises(ValueError, match=r"`vision_pixel_values` need `input_ids` and a `config.vision_config`"):
        tiny.model()(torch.tensor([[5, 6]]), vision_pixel_values=torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_config": VISION}, "`vision_config` and `vision_token_id` belong together"),
        ({"vision_token_id": SEEN}, "`vision_config` and `vision_token_id` belong together"),
        ({**FIELDS, "vision_config": {**VISION, "vision_use_head": True}}, "must have `vision_use_head=False`"),
        ({**FIELDS, "vision_config": {**VISION, "image_size": 18}}, "multiple of its `patch_size`; got 18 and 4"),
        ({**FIELDS, "vision_config": {**VISION, "image_size": [16, 16]}}, r"one `image_size`.*got \[16, 16\] and 4"),
        ({**FIELDS, "vision_token_id": tiny.IMG}, "The image tokens must differ"),
        ({**FIELDS, "vision_token_id": 64}, "`vision_token_id` must lie inside the vocabulary"),
    ],
)
def test_a_configuration_without_its_encoder_or_token_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.config(**changes)


def test_the_configuration_comes_back_from_a_file(tmp_path):
    config = tiny.config(**FIELDS)
    config.save_pretrained(tmp_path)
    again = TransfusionConfig.from_pretrained(tmp_path)
    assert isinstance(again.vision_config, SiglipVisionConfig)
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("sides", "edges", "divisor", "expected"),
    [
        ((600, 800), (512, 1024), 16, (608, 800)),  # fits already: to multiples
        ((300, 600), (512, 1024), 16, (512, 1024)),  # the shorter side grows
        ((2000, 1000), (512, 1024), 16, (1024, 512)),  # the longer side shrinks
        ((100, 1000), (512, 1024), 16, (96, 1024)),  # the longer side decides where both cannot be
        ((1, 3000), (512, 1024), 16, (16, 1024)),  # never without a patch
        ((1000, 1000), (224, 980), 14, (980, 980)),
        ((500, 300), (224, None), 14, (504, 294)),
        ((225, 981), (224, 985), 14, (224, 980)),  # the limit itself is a multiple
    ],
)
def test_sides_are_multiples_between_the_limits(sides, edges, divisor, expected):
    size = SizeDict(shortest_edge=edges[0], longest_edge=edges[1])
    assert sides_to_resize_to(sides, size, divisor) == expected


@pytest.mark.parametrize("kind", [None, "latents", "vision", "both"])
def test_the_processor_writes_a_block_for_each_way_of_reading(pair, kind):
    model, processor = pair
    features = processor(text="a<image>b", images=[picture()], read_images_as=kind)
    tokens = processor.tokenizer.convert_ids_to_tokens(features["input_ids"][0])
    latents, seen = ["<BOI>", *["<image>"] * 16, "<EOI>"], ["<BOI>", *["<vision>"] * 12, "<EOI>"]
    expected = {"latents": latents, "vision": seen}.get(kind, latents + seen)
    assert tokens == ["<s>", "a", *expected, "b"]
    assert ("pixel_values" in features) == (kind != "vision")
    assert ("vision_pixel_values" in features) == (kind != "latents")
    assert torch.isfinite(model(**features).logits).all()


def test_each_image_is_read_in_its_own_way_and_comes_back_from_a_folder(pair, tmp_path):
    _, processor = pair
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    images = [picture(seed=0), picture(16, 16, seed=1), picture(8, 16, seed=2)]
    kwargs = {
        "text": ["<image><image>", "x<image>"],
        "images": images,
        "read_images_as": ["vision", "latents", "both"],
    }
    first, second = (one(**kwargs) for one in (processor, again))
    assert first.keys() == second.keys()
    for name in first:
        for x, y in zip(first[name], second[name], strict=True):
            assert torch.equal(x, y)
    assert len(first["pixel_values"]) == 2 and len(first["vision_pixel_values"]) == 2
    seen = [processor(text="<image>", images=[images[i]], read_images_as="vision") for i in (0, 2)]
    for ours, alone in zip(first["vision_pixel_values"], seen, strict=True):
        assert torch.equal(ours, alone["vision_pixel_values"][0])


@pytest.mark.parametrize("kind", ["pixels", ["both"], ["both", "latents", "both"]])
def test_an_unknown_way_of_reading_is_refused(pair, kind):
    _, processor = pair
    with pytest.raises(ValueError, match=r"`read_images_as` must be one of .* for each of 2 images; got"):
        processor(text="<image><image>", images=[picture(), picture()], read_images_as=kind)


def test_a_processor_without_encoder_reads_latents_alone(pair):
    _, processor = new_transfusion(byte_tokenizer(), tiny.text_config(), sample_size=8, timestep_embedding_dim=16)
    with pytest.raises(ValueError, match=r"must be one of \('latents',\).*has no vision encoder"):
        processor(text="<image>", images=[picture()], read_images_as="both")
    with pytest.raises(ValueError, match="`vision_token` and the image processor's `vision_size` belong together"):
        TransfusionProcessor(pair[1].image_processor, pair[1].tokenizer)


@pytest.mark.parametrize("max_length", [None, 90])
def test_the_collator_shows_context_to_the_encoder_and_not_what_is_to_be_drawn(pair, max_length):
    model, processor = pair
    collator = TransfusionDataCollator(processor, max_length=max_length)
    edit = {"text": "<image>x<image>", "images": [picture(), picture(seed=1)], "image_loss_mask": [False, True]}
    samples = [edit, {"text": "a", "image": picture(seed=2)}, {"text": "b"}]
    samples.append(
        {"text": "<image>y", "image": picture(seed=3), "image_loss_mask": False, "read_images_as": "vision"}
    )
    batch = collator(samples)
    assert len(batch["pixel_values"]) == 3 and len(batch["vision_pixel_values"]) == 2
    assert sorted(batch["image_loss_mask"].tolist()) == [False, True, True]
    is_seen = batch["input_ids"] == processor.vision_token_id
    assert int(is_seen.sum()) == 24 and (batch["labels"][is_seen] == -100).all()
    output = model.train()(**batch)
    model.eval()
    assert torch.isfinite(output.loss) and len(output.image_losses) == 2


def test_a_chat_shows_the_users_images_to_the_encoder(pair):
    _, processor = pair
    collator = TransfusionDataCollator(processor, assistant_only_loss=True)
    image = {"type": "image", "image": picture()}
    messages = [
        {"role": "user", "content": [image, {"type": "text", "text": "blue"}]},
        {"role": "assistant", "content": [{"type": "image", "image": picture(seed=1)}]},
    ]
    batch = collator([{"messages": messages}])
    assert batch["image_loss_mask"].tolist() == [False, True]
    assert len(batch["pixel_values"]) == 2 and len(batch["vision_pixel_values"]) == 1


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"text": "<image>", "image": picture(), "read_images_as": "vision"}, "set its `image_loss_mask` False"),
        (
            {"text": "<image>", "latents": torch.zeros(1, 3, 8, 8), "read_images_as": "both"},
            "the sample holds latents",
        ),
    ],
)
def test_what_no_encoder_can_read_is_refused(pair, sample, message):
    with pytest.raises(ValueError, match=message):
        TransfusionDataCollator(pair[1])([sample])


def test_packed_plans_know_what_is_seen(pair):
    model, processor = pair
    samples = [{"text": "<image>x<image>", "images": [picture(), picture(seed=1)], "image_loss_mask": [False, True]}]
    kwargs = {"max_length": 80, "num_train_timesteps": 1000}
    planned = TransfusionDataCollator(processor, return_varlen_plan=True, **kwargs)(samples)
    model.set_attn_implementation("transfusion_varlen")
    losses = []
    for own in (True, False):
        batch = dict(planned) if own else {name: value for name, value in planned.items() if name != "varlen_plan"}
        losses.append(model(**batch, noise_seeds=[0, 1]).loss)
    model.set_attn_implementation("sdpa")
    losses.append(model(**batch, noise_seeds=[0, 1]).loss)
    assert torch.equal(losses[0], losses[1])
    torch.testing.assert_close(losses[1], losses[2], rtol=0, atol=tiny.ROUNDING)


def test_cutting_a_long_sample_leaves_whole_blocks(pair):
    _, processor = pair
    sample = {"text": "<image>xyz", "image": picture(), "image_loss_mask": False}
    collator = TransfusionDataCollator(processor, max_length=25, truncation=True)
    batch = collator([sample])
    assert len(batch["pixel_values"]) == 1 and "vision_pixel_values" not in batch
    assert processor.vision_token_id not in batch["input_ids"]


def test_the_trainer_learns_with_an_encoder_and_the_folder_loads(pair, tmp_path):
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "patch_size": 2, "timestep_embedding_dim": 16, "vision_config": VISION}
    model, processor = new_transfusion(byte_tokenizer(), tiny.text_config(), **sizes)
    before = {name: p.clone() for name, p in model.model.vision_encoder.named_parameters()}
    sample = {"text": "<image>ab", "image": picture(), "image_loss_mask": False, "read_images_as": "vision"}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=1, use_cpu=True, report_to="none",
        remove_unused_columns=False, learning_rate=1e-2,
    )  # fmt: skip
    collator = TransfusionDataCollator(processor)
    TransfusionTrainer(model, arguments, collator, train_dataset=[sample, {"text": "b"}]).train()
    changed = [name for name, p in model.model.vision_encoder.named_parameters() if not torch.equal(p, before[name])]
    assert len(changed) > len(before) / 2
    model.save_pretrained(tmp_path / "saved")
    again = TransfusionForCausalLMAndDiffusion.from_pretrained(tmp_path / "saved")
    assert isinstance(again.model.vision_encoder, TransfusionVisionEncoder)
    inputs = processor(text="<image>a", images=[picture()])
    # Not to the bit on every processor: weights in a file are aligned otherwise.
    torch.testing.assert_close(again(**inputs).logits, model.eval()(**inputs).logits, atol=1e-6, rtol=1e-5)


def test_neighbours_of_two_kinds_are_two_images():
    ids = torch.tensor([[5, tiny.IMG, tiny.IMG, SEEN, SEEN, 6]])
    assert image_block_ids(ids, tiny.IMG, SEEN).tolist() == [[-1, 0, 0, 1, 1, -1]]
    assert image_block_ids(ids, SEEN).tolist() == [[-1, -1, -1, 0, 0, -1]]


def test_text_behind_a_drawing_is_the_same_with_and_without_cache(model):
    """What was seen before it is read once."""
    ids, pixels = torch.tensor([[5, *block(2), 6, tiny.BOI]]), torch.randn(1, 3, 4, 8)
    kwargs = {"max_images": 1, "max_new_tokens": 9, "num_inference_steps": 2, "eos_token_id": None, "pad_token_id": 0}
    outputs = []
    for use_cache in (True, False):
        generator = torch.Generator().manual_seed(0)
        output = model.generate(ids, vision_pixel_values=pixels, use_cache=use_cache, generator=generator, **kwargs)
        outputs.append(output)
    assert outputs[0].sequences.shape == (1, ids.shape[1] + 9)
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    torch.testing.assert_close(outputs[0].images[0][0], outputs[1].images[0][0], rtol=1e-4, atol=1e-4)


def test_a_prompt_is_not_cut_within_what_is_seen(pair):
    _, processor = pair
    kwargs = {"images": [picture()], "read_images_as": "vision", "truncation": True}
    with pytest.raises(ValueError, match="`max_length` is 8, which cuts an image of row 0"):
        processor(text="a<image>", max_length=8, **kwargs)
