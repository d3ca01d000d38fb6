from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from transfusion_hf import TransfusionDataCollator

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


def test_a_seed_reproduces_the_batch(processor):
    collator, samples = TransfusionDataCollator(processor), [{"text": "red", "image": RED}] * 50
    torch.manual_seed(3)
    first = collator(samples)
    torch.manual_seed(3)
    assert all(torch.equal(first[key], value) for key, value in collator(samples).items())


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([], "`features` must hold at least one sample; got none"),
        ([{"text": "a", "images": [RED, BLUE]}], "marks no image but 2 images belong to it; put one <image> where"),
        ([{"text": "a<image><image>", "images": [RED]}], "`text` has 2 markers <image> but `images` holds 1 images"),
        ([{"text": "<image>", "image": RED, "max_timesteps": [1, 2]}], "`max_timesteps` must hold one value for each"),
    ],
)  # fmt: skip
def test_bad_samples_name_what_was_expected_and_what_came(processor, features, message):
    with pytest.raises(ValueError, match=message):
        TransfusionDataCollator(processor)(features)


def test_probabilities_outside_of_0_to_1_are_refused(processor):
    with pytest.raises(ValueError, match=r"`caption_dropout` must lie in 0 to 1; got 1\.5"):
        TransfusionDataCollator(processor, caption_dropout=1.5)
