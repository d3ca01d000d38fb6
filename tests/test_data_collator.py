import base64
import io
import math
import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from datasets import IterableDataset
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoProcessor, Trainer, TrainingArguments

from transfusion_hf import (
    TransfusionDataCollator,
    TransfusionForCausalLMAndDiffusion,
    TransfusionProcessor,
    TransfusionTrainer,
)
from transfusion_hf.cli.main import main
from transfusion_hf.data.collator import first_fit
from transfusion_hf.data.mixing import count_tokens

TINY = Path(__file__).parent / "fixtures" / "tiny-transfusion"
RED, BLUE = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(TINY)


def texts(processor, batch) -> list[str]:
    rows = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        text = processor.tokenizer.decode(ids[mask.bool()])
        rows.append(text.replace("<image>" * 16, "*"))
    return rows


def test_captions_come_first_four_times_out_of_five_with_the_noise_limit_otherwise(processor):
    torch.manual_seed(0)
    collator = TransfusionDataCollator(processor, caption_dropout=0.25)
    batch = collator([{"text": "red", "image": RED}] * 1000)
    rows = texts(processor, batch)
    forms = {
        "caption": "<s>red<BOI>*<EOI></s>",
        "image": "<s><BOI>*<EOI>red</s>",
        "dropped": "<s><BOI>*<EOI></s>",
    }
    assert set(rows) == set(forms.values())
    count = {name: rows.count(form) for name, form in forms.items()}
    assert 0.76 < (count["caption"] + count["dropped"]) / 1000 < 0.84
    assert 0.20 < count["dropped"] / (count["caption"] + count["dropped"]) < 0.30
    for row, limit in zip(rows, batch["max_timesteps"].tolist(), strict=True):
        assert limit == (500 if row == forms["image"] else 1000)
    assert batch["image_loss_mask"].all()


def test_marked_texts_are_taken_as_they_stand(processor):
    batch = TransfusionDataCollator(processor, caption_first_probability=0.0)(
        [{"text": "a<image>b<image>", "images": [RED, BLUE]}, {"text": "no image"}]
    )
    assert texts(processor, batch) == ["<s>a<BOI>*<EOI>b<BOI>*<EOI></s>", "<s>no image</s>"]
    assert batch["max_timesteps"].tolist() == [1000, 1000]


@pytest.mark.parametrize("max_length", [None, 64])
def test_latents_may_take_the_place_of_images(processor, max_length):
    one, two = torch.randn(3, 8, 8), torch.randn(3, 4, 8)
    samples = [
        {"text": "<image>red", "latents": one},
        {"text": "abc", "latents": None},
        {"text": "<image><image>", "latents": [two.tolist(), one.tolist()]},  # as `datasets` gives them
    ]
    batch = TransfusionDataCollator(processor, max_length=max_length)(samples)
    expected = [one, two, one] if max_length is None else [two, one, one]  # the longest sample is packed first
    for actual, latent in zip(batch["latents"], expected, strict=True):
        torch.testing.assert_close(actual, latent, atol=1e-6, rtol=0)
    assert "pixel_values" not in batch and batch["max_timesteps"].tolist() == [1000] * 3
    with pytest.raises(ValueError, match="Pass `images` or `latents`, not both"):
        TransfusionDataCollator(processor)([*samples, {"text": "red", "image": RED}])


def test_missing_images_of_a_mixed_data_set_are_none(processor):
    batch = TransfusionDataCollator(processor, caption_first_probability=1.0, caption_dropout=0.0)(
        [{"text": "a", "image": None}, {"text": "b", "images": None}, {"text": "c", "image": RED, "images": None}]
    )
    assert texts(processor, batch) == ["<s>a</s>", "<s>b</s>", "<s>c<BOI>*<EOI></s>"]


def test_rows_are_padded_at_the_right_with_labels_of_minus_100(processor):
    batch = TransfusionDataCollator(processor)([{"text": "abc"}, {"text": "a"}])
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert batch["labels"][1].tolist() == [-100, *batch["input_ids"][1, 1:3].tolist(), -100, -100]
    assert batch["labels"][0, -1] == processor.tokenizer.eos_token_id
    assert "pixel_values" not in batch and "max_timesteps" not in batch


def test_samples_may_say_which_images_are_clean_and_how_much_noise(processor):
    edit = {"text": "<image>make it blue<image>", "images": [RED, BLUE]}
    batch = TransfusionDataCollator(processor)(
        [{**edit, "image_loss_mask": [False, True]}, {**edit, "max_timesteps": [10, 20]}]
    )
    assert batch["image_loss_mask"].tolist() == [False, True, True, True]
    assert batch["max_timesteps"].tolist() == [1000, 1000, 10, 20]


def chat(*images) -> list[dict]:
    first, second = ({"type": "image", **({} if image is None else {"image": image})} for image in images)
    return [
        {"role": "user", "content": [first, {"type": "text", "text": "a"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}, second]},
    ]


@pytest.mark.parametrize("max_length", [None, 64])
def test_chats_stand_beside_texts_with_images_inside_or_beside_them(processor, max_length):
    processor = TransfusionProcessor(processor.image_processor, processor.tokenizer)
    inside, beside = {"messages": chat(RED, BLUE)}, {"messages": chat(None, None), "images": [RED, BLUE], "text": None}
    collator = TransfusionDataCollator(processor, max_length=max_length, caption_first_probability=1.0)
    for sample in (inside, beside):
        batch = collator([{"text": "d", "image": BLUE}, sample, {"text": "e", "messages": None}])
        shown = ["blue" if pixels[0, 0, 0] < 0 else "red" for pixels in batch["pixel_values"]]
        assert shown == (["blue", "red", "blue"] if max_length is None else ["red", "blue", "blue"])
        row = "<s>user: <BOI>*<EOI>a\nassistant: b<BOI>*<EOI></s>"
        if max_length is None:
            assert texts(processor, batch) == ["<s>d<BOI>*<EOI></s>", row, "<s>e</s>"]
            assert count_tokens(sample, processor) == batch["attention_mask"][1].sum()
        else:
            assert processor.tokenizer.decode(batch["input_ids"][0]).replace("<image>" * 16, "*").startswith(row)
    buffer = io.BytesIO()
    RED.save(buffer, "png")
    url = {"url": f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"}
    content = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "see <image>"}]
    sample = {"messages": [{"role": "user", "content": content}]}
    row = collator([sample])
    assert count_tokens(sample, processor) == (row["labels"] != -100).sum() + 18
    latents = {"messages": chat(None, None), "latents": [torch.ones(3, 8, 8), torch.zeros(3, 8, 8)]}
    assert collator([latents])["latents"][:, 0, 0, 0].tolist() == [1, 0]


def test_chats_may_be_trained_on_what_the_assistant_says_and_draws(processor):
    processor = TransfusionProcessor(processor.image_processor, processor.tokenizer)
    collator = TransfusionDataCollator(processor, assistant_only_loss=True)
    batch = collator([{"messages": chat(RED, BLUE)}, {"text": "c"}])
    labels = [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert labels == [" b<BOI></s>", "c</s>"] and batch["image_loss_mask"].tolist() == [False, True]
    latents = {"messages": chat(None, None), "latents": [torch.zeros(3, 8, 8)] * 2}
    assert torch.equal(collator([latents])["labels"][0], batch["labels"][0])
    processor.chat_template = "{% for message in messages %}{{ message.role }}{% endfor %}"
    with pytest.raises(ValueError, match="`assistant_only_loss` needs a chat template that encloses"):
        collator([{"messages": [{"role": "assistant", "content": "a"}]}])


def test_a_seed_reproduces_the_batch(processor):
    collator, samples = TransfusionDataCollator(processor), [{"text": "red", "image": RED}] * 50
    torch.manual_seed(3)
    first = collator(samples)
    torch.manual_seed(3)
    second = collator(samples)
    assert first.pop("batch_counts") == second.pop("batch_counts")
    assert all(torch.equal(first[key], value) for key, value in second.items())


INTERLEAVED = [
    {"text": "abc"},
    {"text": "red", "image": RED},
    {"text": "<image>make it blue<image>", "images": [RED, BLUE], "image_loss_mask": [False, True]},
    {"text": "two<image>pictures<image>here", "images": [BLUE, RED], "max_timesteps": [10, 20]},
    {"text": "d" * 30},
]


def documents_of(batch: dict, processor) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each document of a pack, padding left out."""
    found = []
    for ids, labels, positions in zip(batch["input_ids"], batch["labels"], batch["position_ids"], strict=True):
        starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(ids)]
        for start, end in pairwise(starts):
            if not (ids[start:end] == processor.tokenizer.pad_token_id).all():
                found.append((ids[start:end].tolist(), labels[start:end].tolist()))
    return found


def test_packs_hold_every_sample_whole_with_its_images(processor):
    samples = INTERLEAVED * 3
    torch.manual_seed(1)
    padded = TransfusionDataCollator(processor)(samples)
    torch.manual_seed(1)
    packed = TransfusionDataCollator(processor, max_length=96)(samples)
    assert packed["input_ids"].shape[1] == 96 and "attention_mask" not in packed
    expected, images, start = [], {}, 0
    for ids, mask, labels in zip(padded["input_ids"], padded["attention_mask"], padded["labels"], strict=True):
        expected.append((ids[mask.bool()].tolist(), labels[mask.bool()].tolist()))
        count = int((ids == processor.image_start_token_id).sum())
        images.setdefault(str(expected[-1][0]), []).append(
            [padded["pixel_values"][start : start + count], padded["max_timesteps"][start : start + count]]
        )
        start += count
    documents = documents_of(packed, processor)
    assert sorted(map(str, documents)) == sorted(map(str, expected))
    start = 0
    for ids, _ in documents:  # the images come in the order of the rows
        count = ids.count(processor.image_start_token_id)
        pixels, limits = images[str(ids)].pop()
        assert torch.equal(packed["pixel_values"][start : start + count], pixels)
        assert torch.equal(packed["max_timesteps"][start : start + count], limits)
        start += count
    assert start == len(packed["pixel_values"]) == len(packed["image_loss_mask"])


def test_a_model_computes_the_same_losses_on_a_pack_as_on_padded_rows(processor):
    model = TransfusionForCausalLMAndDiffusion.from_pretrained(TINY)
    losses = {}
    for backend in ("sdpa", "transfusion_varlen"):
        model.set_attn_implementation(backend)
        for max_length in (None, 100):
            torch.manual_seed(1)
            batch = TransfusionDataCollator(processor, max_length=max_length)(INTERLEAVED * 2)
            output = model(**batch)  # in evaluation, where t and noise are the image's own
            losses[backend, max_length] = (float(output.lm_loss), float(output.diffusion_loss))
    for one in losses.values():
        assert one == pytest.approx(losses["sdpa", None], rel=1e-5)


def test_mixed_lengths_fill_rows_of_4096_to_95_percent():
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        lengths = (torch.rand(200, generator=generator) ** 2 * 2000 + 20).long().tolist()
        rows = first_fit(lengths, 4096)
        assert sorted(item for row in rows for item in row) == list(range(200))
        assert all(sum(lengths[item] for item in row) <= 4096 for row in rows)
        assert sum(lengths) / (4096 * len(rows)) >= 0.95


@pytest.mark.parametrize("workers", [0, 2])
def test_the_fill_rate_is_reported_from_workers_too(processor, workers):
    collator = TransfusionDataCollator(processor, max_length=64)
    assert math.isnan(collator.fill_rate)
    seen = list(DataLoader([{"text": "a" * 20}] * 12, batch_size=6, collate_fn=collator, num_workers=workers))
    tokens = sum(int((batch["input_ids"] != processor.tokenizer.pad_token_id).sum()) for batch in seen)
    assert tokens == 12 * 22 and collator.fill_rate == tokens / sum(batch["input_ids"].numel() for batch in seen)


def test_packs_of_mixed_samples_fill_rows_of_4096_to_95_percent(processor):
    collator, rng = TransfusionDataCollator(processor, max_length=4096), random.Random(0)
    picture = Image.new("RGB", (64, 64))  # 1,024 patches
    samples = [
        {"text": "a" * rng.randrange(20, 3000)} if rng.random() < 0.6 else {"text": "b" * 30, "image": picture}
        for _ in range(60)
    ]
    is_real = collator(samples)["input_ids"] != processor.tokenizer.pad_token_id
    assert is_real.float().mean() >= 0.95


def test_packs_come_with_their_plan_through_the_trainer(processor, tmp_path):
    model = TransfusionForCausalLMAndDiffusion.from_pretrained(TINY, attn_implementation="transfusion_varlen")
    losses = []
    for return_varlen_plan in (False, True):
        collator = TransfusionDataCollator(processor, max_length=96, return_varlen_plan=return_varlen_plan)
        args = TrainingArguments(
            str(tmp_path), remove_unused_columns=False, report_to="none", use_cpu=True, dataloader_num_workers=2,
            per_device_eval_batch_size=10, prediction_loss_only=True,
        )  # fmt: skip
        samples = [sample if "<image>" in sample["text"] else {"text": sample["text"]} for sample in INTERLEAVED] * 4
        losses.append(Trainer(model, args, data_collator=collator, eval_dataset=samples).evaluate()["eval_loss"])
    assert ("varlen_plan" in collator(INTERLEAVED)) and losses[0] == losses[1]
    with pytest.raises(ValueError, match="`return_varlen_plan` is for packs; pass `max_length` too"):
        TransfusionDataCollator(processor, return_varlen_plan=True)


def test_truncation_cuts_text_but_never_an_image(processor):
    sample = {"text": "ab<image>cd<image>ef", "images": [RED, BLUE]}  # <s>ab, 18, cd, 18, ef</s>: 44 tokens
    for max_length, kept, num_images in ((44, 44, 2), (42, 42, 2), (41, 41, 2), (40, 23, 1), (24, 23, 1), (20, 3, 0)):
        batch = TransfusionDataCollator(processor, max_length=max_length, truncation=True)([sample])
        ((ids, labels),) = documents_of(batch, processor)
        assert len(ids) == len(labels) == kept
        assert len(batch.get("pixel_values", [])) == num_images


def test_samples_that_do_not_fit_are_refused(processor):
    with pytest.raises(ValueError, match="`max_length` is 40, but sample 1 has 44 tokens; raise it"):
        TransfusionDataCollator(processor, max_length=40)(
            [{"text": "a"}, {"text": "ab<image>cd<image>ef", "images": [RED, BLUE]}]
        )
    with pytest.raises(ValueError, match="`max_length` is 17, but sample 0 has an image of 18 tokens"):
        TransfusionDataCollator(processor, max_length=17, truncation=True)([{"text": "<image>", "image": RED}])


def test_streamed_data_sets_and_several_workers_pack_alike(processor):
    collator = TransfusionDataCollator(processor, max_length=96)
    marked = [sample if "<image>" in sample["text"] else {"text": sample["text"]} for sample in INTERLEAVED] * 4
    streamed = IterableDataset.from_generator(lambda: iter(marked))
    seen = []
    for workers in (0, 2):
        source = marked if workers else streamed
        loader = DataLoader(source, batch_size=10, collate_fn=collator, num_workers=workers)
        seen.append([document for batch in loader for document in documents_of(batch, processor)])
    assert sorted(map(str, seen[0])) == sorted(map(str, seen[1])) and len(seen[0]) == 20


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([{"text": "a", "images": [RED, BLUE]}], "marks no image but 2 images belong to it; put one <image> where"),
        ([{"text": "a<image><image>", "images": [RED]}], "`text` has 2 markers <image> but `images` holds 1 images"),
        ([{"text": "<image>", "image": RED, "images": [RED]}], "holds its images in `image` or in `images`; got both"),
        ([{"text": "<image>", "image": RED, "max_timesteps": [1, 2]}], "`max_timesteps` must hold one value for each"),
        ([{"text": None, "image": RED}], r"a string; got NoneType, and .* keys are \['text', 'image'\]"),
        ([{"text": ["a", "b"]}], r"got list, .* Choose one of a list, .* row\['text'\]\[0\]"),
        ([{"caption": "a", "image": RED}], r"no `text`: the sample's keys are \['caption', 'image'\].* rename it"),
        ([{}], r"the sample's keys are \[\]. If the stock `Trainer` .* pass `remove_unused_columns=False`"),
    ],
)  # fmt: skip
def test_bad_samples_name_what_was_expected_and_what_came(processor, features, message):
    with pytest.raises(ValueError, match=message):
        TransfusionDataCollator(processor)(features)


def test_a_lone_end_token_in_a_text_counts_as_no_image(processor):
    sample = {"text": "a<EOI>b<image>cdefgh", "image": RED}
    batch = TransfusionDataCollator(processor, max_length=24, truncation=True)([sample])
    assert len(batch["pixel_values"]) == 1
    batch = TransfusionDataCollator(processor, max_length=19, truncation=True)([sample])
    assert "pixel_values" not in batch


def test_one_image_may_give_its_values_bare_and_samples_may_hold_none(processor):
    collator = TransfusionDataCollator(processor)
    batch = collator([{"text": "<image>a", "image": RED, "image_loss_mask": False, "max_timesteps": 7}])
    assert batch["image_loss_mask"].tolist() == [False] and batch["max_timesteps"].tolist() == [7]
    assert "latents" not in collator([{"text": "a", "latents": []}])
    assert collator == TransfusionDataCollator(processor)
    with pytest.raises(ValueError, match="`truncation` is for packs; pass `max_length` too"):
        TransfusionDataCollator(processor, truncation=True)


def test_probabilities_outside_of_0_to_1_are_refused(processor):
    with pytest.raises(ValueError, match=r"`caption_dropout` must lie in 0 to 1; got 1\.5"):
        TransfusionDataCollator(processor, caption_dropout=1.5)


def test_an_image_before_its_caption_has_half_of_the_noise_of_any_schedule(processor):
    collator = TransfusionDataCollator(processor, caption_first_probability=0, num_train_timesteps=20)
    assert collator([{"text": "a", "image": RED}])["max_timesteps"].tolist() == [10]
    assert TransfusionDataCollator(processor).image_first_max_timesteps == 500  # §4.3.4
    with pytest.raises(
        ValueError, match="`image_first_max_timesteps` must lie in 1 to `num_train_timesteps`, 20; got 21"
    ):
        TransfusionDataCollator(processor, image_first_max_timesteps=21, num_train_timesteps=20)


def test_our_trainer_keeps_the_columns_and_saves_what_draws_and_the_stock_one_says_what_to_pass(processor, tmp_path):
    model = TransfusionForCausalLMAndDiffusion.from_pretrained(TINY)
    options = {"max_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    args = TrainingArguments(str(tmp_path), **options)
    parts = {"train_dataset": [{"text": "red", "image": RED}] * 8, "data_collator": TransfusionDataCollator(processor)}
    with pytest.raises(ValueError, match="pass `remove_unused_columns=False` to `TrainingArguments`"):
        Trainer(model, args, **parts).train()
    trainer = TransfusionTrainer(model, args, **parts)
    assert trainer.train().training_loss > 0
    trainer.save_model(tmp_path / "model")
    command = ["draw", str(tmp_path / "model"), "red", "-o", str(tmp_path / "red.png"), "--num_inference_steps", "1"]
    assert main([*command, "--device", "cpu"]) == 0 and Image.open(tmp_path / "red.png").size == (8, 8)
