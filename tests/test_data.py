"""Rows of `datasets` to samples: the four kinds, broken rows, sharing, resuming, mixing by tokens."""

import ast
import importlib
import io
import json
import pickle
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, List, Value, load_dataset
from datasets.distributed import split_dataset_by_node
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import AutoProcessor, Trainer, TrainingArguments

import transfusion_hf
from transfusion_hf import TransfusionDataCollator, TransfusionForCausalLMAndDiffusion, TransfusionTrainer
from transfusion_hf.data import collator
from transfusion_hf.data.dataset import TransfusionDataset, load_rows
from transfusion_hf.data.mixing import count_tokens, mix_by_tokens
from transfusion_hf.data.shapes import ShapesDataset

TINY = Path(__file__).parent / "fixtures" / "tiny-transfusion"
DIGITS = load_digits()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model():
    return TransfusionForCausalLMAndDiffusion.from_pretrained(TINY)


def encoded(image: PILImage.Image, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def digit(i: int) -> PILImage.Image:
    return PILImage.fromarray((DIGITS.images[i] * 15).astype(np.uint8))


PNG, JPEG = encoded(digit(0)), encoded(PILImage.effect_noise((64, 64), 90), "JPEG")


def captions_set(num_rows: int = 6) -> Dataset:
    """Image files in bytes, as on the Hub."""
    columns = {
        "image": [{"bytes": encoded(digit(i)), "path": None} for i in range(num_rows)],
        "caption": [f"{i}: a {DIGITS.target[i]}" for i in range(num_rows)],
        "id": list(range(1000, 1000 + num_rows)),
    }
    return Dataset.from_dict(
        columns, features=Features({"image": Image(), "caption": Value("string"), "id": Value("int64")})
    )


def captions_source(rows=None, **kwargs) -> TransfusionDataset:
    return TransfusionDataset.from_captions(rows or captions_set(), caption_column="caption", **kwargs)


def text_set(num_rows: int = 6) -> Dataset:
    return Dataset.from_dict({"text": [f"{i}:" + "x" * (i * 7 % 40) for i in range(num_rows)]})


def documents_set() -> Dataset:
    rows = {
        "texts": [["A zero:", None, "and a one:", None], ["nothing to see"]],
        "images": [[None, digit(0), None, digit(1)], [None]],
    }
    return Dataset.from_dict(rows, features=Features({"texts": List(Value("string")), "images": List(Image())}))


def edits_set() -> Dataset:
    shapes = ShapesDataset(4, task="edit")
    rows = [shapes[i] for i in range(4)]
    return Dataset.from_dict(
        {
            "input_image": [row["images"][0] for row in rows],
            "edit_prompt": [row["text"].replace("<image>", "") for row in rows],
            "edited_image": [row["images"][1] for row in rows],
        }
    )


def numbered(shards: list[int]):
    for shard in shards:
        for i in range(5 + 2 * shard):
            yield {"text": f"{shard}-{i}:" + "x" * (i * 7 % 40)}


def stream_of(num_shards: int) -> IterableDataset:
    """Shards of uneven sizes, of columns that nobody declared."""
    return IterableDataset.from_generator(numbered, gen_kwargs={"shards": list(range(num_shards))})


def streams_of_files(dataset: Dataset, folder: Path, num_shards: int) -> IterableDataset:
    for i in range(num_shards):
        dataset.shard(num_shards, i).to_parquet(folder / f"{i}.parquet", batch_size=4)
    return load_dataset("parquet", data_files=f"{folder}/*.parquet", split="train", streaming=True)


def texts(samples) -> list[str]:
    return [sample["text"] for sample in samples]


def loader(dataset, num_workers: int = 0, **kwargs) -> StatefulDataLoader:
    return StatefulDataLoader(dataset, batch_size=4, num_workers=num_workers, collate_fn=list, **kwargs)


# The four kinds


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("make", "kind", "kwargs"),
    [
        (text_set, "text", {}),
        (captions_set, "captions", {"caption_column": "caption"}),
        (documents_set, "interleaved", {}),
        (edits_set, "edits", {}),
    ],
)
def test_each_kind_goes_through_the_collator_into_a_finite_loss(processor, model, make, kind, kwargs, streamed):
    rows = make().to_iterable_dataset() if streamed else make()
    dataset = getattr(TransfusionDataset, f"from_{kind}")(rows, **kwargs, on_error="raise")
    batch = TransfusionDataCollator(processor)(list(dataset))
    assert len(batch["input_ids"]) == len(make())
    assert len(batch.get("pixel_values", [])) == {"text": 0, "captions": 6, "interleaved": 2, "edits": 8}[kind]
    assert torch.isfinite(model(**batch).loss)


def test_samples_hold_what_the_rows_do():
    first, second = TransfusionDataset.from_interleaved(documents_set())
    assert first["text"] == "A zero:<image>and a one:<image>" and second == {"text": "nothing to see"}
    for i, image in enumerate(first["images"]):
        assert np.array_equal(np.asarray(image), np.asarray(digit(i)))
    *_, last = captions_source()
    assert last["text"] == "5: a 5" and np.array_equal(np.asarray(last["image"]), np.asarray(digit(5)))
    assert texts(TransfusionDataset.from_text(text_set(3))) == ["0:", "1:xxxxxxx", "2:xxxxxxxxxxxxxx"]


def test_the_source_of_an_edit_is_clean_context_without_loss(processor, model):
    samples, shapes = list(TransfusionDataset.from_edits(edits_set())), ShapesDataset(4, task="edit")
    for i, sample in enumerate(samples):
        assert sample["text"] == shapes[i]["text"] and sample["image_loss_mask"] == [False, True]
        for image, expected in zip(sample["images"], shapes[i]["images"], strict=True):
            assert np.array_equal(np.asarray(image), np.asarray(expected))
    batch = TransfusionDataCollator(processor)(samples[:1])
    output = model(**batch)
    assert len(output.image_predictions) == 1  # of two images
    everything = model(**batch | {"image_loss_mask": torch.tensor([True, True]), "batch_counts": None})
    assert not torch.equal(output.diffusion_loss, everything.diffusion_loss)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(PNG, digit(0)), ({"bytes": PNG, "path": None}, digit(0)), (digit(0), digit(0)), ("FILE", digit(0))],
)
def test_images_come_as_bytes_files_or_images(tmp_path, value, expected):
    if value == "FILE":
        value = str(tmp_path / "digit.png")
        digit(0).save(value)
    rows = IterableDataset.from_generator(lambda: iter([{"image": value, "text": "a"}]))
    (sample,) = TransfusionDataset.from_captions(rows, on_error="raise")
    assert np.array_equal(np.asarray(sample["image"]), np.asarray(expected))


@pytest.mark.parametrize("rows", [text_set(), text_set().to_iterable_dataset(), stream_of(2)])
def test_an_absent_column_is_refused_at_once_by_name(rows):
    with pytest.raises(ValueError, match=r"`text_column` is 'body', but the columns of `dataset` are \['text'\]"):
        TransfusionDataset.from_text(rows, text_column="body")


@pytest.mark.parametrize(
    ("dataset", "kwargs", "message"),
    [
        (DatasetDict(train=text_set()), {}, "got DatasetDict. If it is a dictionary of splits, pass one"),
        (text_set(), {"on_error": "ignore"}, "`on_error` must be 'skip' or 'raise'; got 'ignore'"),
        (text_set(), {"buffer_size": 0}, "`buffer_size` must be at least 1; got 0"),
        (text_set(), {"rows_per_turn": 0}, "`rows_per_turn` must be at least 1; got 0"),
    ],
)
def test_bad_arguments_are_refused(dataset, kwargs, message):
    with pytest.raises(ValueError, match=message):
        TransfusionDataset.from_text(dataset, **kwargs)


# Broken rows


BROKEN = {2: JPEG[: len(JPEG) // 2], 3: b"no image at all", 5: PNG[:-30], 6: b""}


def damaged(streamed: bool = False, declared: bool = True) -> Dataset | IterableDataset:
    """Twelve rows, of which 1 lacks its caption, 2, 3, 5 and 6 their image, and 8 is white space."""
    rows = captions_set(12).to_dict()
    for i, content in BROKEN.items():
        rows["image"][i] = {"bytes": content, "path": None}
    rows["caption"][1], rows["caption"][8], rows["image"][9] = None, " \n", None
    rows = Dataset.from_dict(rows, features=captions_set(1).features)
    if not streamed:
        return rows
    if declared:
        return rows.to_iterable_dataset(num_shards=3)
    plain = rows.cast_column("image", Image(decode=False)).to_list()
    return IterableDataset.from_generator(lambda: iter(plain))


@pytest.mark.parametrize("kind", [{}, {"streamed": True}, {"streamed": True, "declared": False}])
def test_broken_rows_are_skipped_and_counted(kind):
    dataset = captions_source(damaged(**kind))
    with pytest.warns(UserWarning, match=r"Skipped \d broken rows so far, the last row \d+ of") as warned:
        samples = list(dataset)
    assert [int(sample["text"].split(":")[0]) for sample in samples] == [0, 4, 7, 10, 11]
    assert dataset.num_skipped == 7
    counts = [str(w.message).split()[1] for w in warned if str(w.message).startswith("Skipped")]
    assert counts == ["1", "2", "4"]


@pytest.mark.parametrize("streamed", [False, True])
def test_broken_rows_are_counted_in_workers_too(streamed):
    dataset = captions_source(damaged(streamed))
    seen = texts(sample for batch in loader(dataset, num_workers=2) for sample in batch)
    assert len(seen) == 5 and dataset.num_skipped == 7


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
def test_broken_rows_can_raise_and_say_which(streamed, shuffle):
    rows = damaged().select([0, 2])
    rows = rows.to_iterable_dataset() if streamed else rows
    dataset = captions_source(rows, on_error="raise", shuffle=shuffle)
    message = r"Broken row 1 of `dataset` \{'caption': '2: a 2', 'id': '1002'\}: `image` cannot be read: OSError"
    with pytest.raises(ValueError, match=message):
        list(dataset)


def broken_after_three() -> IterableDataset:
    return captions_set(6).map(
        lambda row, i: {"image": {"bytes": b"none", "path": None} if i == 3 else row["image"]}, with_indices=True
    ).to_iterable_dataset()  # fmt: skip


@pytest.mark.parametrize("on_error", ["skip", "raise"])
@pytest.mark.parametrize(
    "changed",
    [
        lambda stream: stream.rename_column("id", "number"),
        lambda stream: stream.filter(lambda row: True),
        lambda stream: stream.filter(lambda row: row["id"] >= 1003),  # the first row is broken
        lambda stream: stream.map(lambda row: row),
    ],
)
def test_a_broken_image_that_a_stream_decodes_itself_says_what_to_do(changed, on_error):
    with pytest.raises(
        ValueError, match=r"before it could be left out \(Unidenti.*`stream.decode\(False\)` come first"
    ):
        list(captions_source(changed(broken_after_three()), on_error=on_error))


@pytest.mark.filterwarnings("ignore:Skipped")
def test_a_stream_that_decodes_nothing_may_be_changed_before():
    for stream in (broken_after_three(), broken_after_three().decode(False).filter(lambda row: True)):
        assert len(list(captions_source(stream))) == 5


def test_an_error_of_a_streams_own_steps_stays_what_it_is():
    def fail(row):
        raise OSError("no network")

    with pytest.raises(OSError, match="no network"):
        list(captions_source(captions_set().to_iterable_dataset().map(fail)))


def test_a_document_or_an_edit_with_one_broken_image_is_broken():
    documents = Dataset.from_dict(
        {"texts": [["a", None], ["a"], ["a", "b"], [None], []], "images": [[None, PNG], [PNG], [None], [b""], []]}
    )
    dataset = TransfusionDataset.from_interleaved(documents)
    with pytest.warns(UserWarning):
        assert texts(dataset) == ["a<image>"]
    assert dataset.num_skipped == 4
    edits = Dataset.from_dict({"input_image": [PNG] * 2, "edit_prompt": ["a", "b"], "edited_image": [PNG, b"x"]})
    with pytest.warns(UserWarning, match="`edited_image` cannot be read"):
        assert len(list(TransfusionDataset.from_edits(edits))) == 1


def test_a_text_that_holds_the_image_token_is_broken_for_it_would_ask_for_an_image():
    rows = Dataset.from_dict({"text": ["a", "an <image> tag"], "texts": [["a"], ["<image>"]], "images": [[None]] * 2})
    for make in (TransfusionDataset.from_text, TransfusionDataset.from_interleaved):
        with pytest.warns(UserWarning, match="holds <image>, which stands for an image"):
            assert texts(make(rows)) == ["a"]
    assert len(list(TransfusionDataset.from_text(rows, image_token="<img>"))) == 2


def test_an_image_that_was_opened_but_not_read_may_be_broken_too():
    def rows():
        yield {"image": PILImage.open(io.BytesIO(JPEG[: len(JPEG) // 2])), "text": "a"}

    dataset = TransfusionDataset.from_captions(IterableDataset.from_generator(rows))
    with pytest.warns(UserWarning, match="`image` cannot be read: OSError"):
        assert list(dataset) == [] and dataset.num_skipped == 1


def test_an_image_of_unknown_range_is_broken():
    rows = Dataset.from_dict({"image": [PILImage.new("F", (8, 8))], "text": ["a"]})
    with pytest.warns(UserWarning, match="`image` is of floating-point mode 'F', which has no known range"):
        assert list(TransfusionDataset.from_captions(rows)) == []


def test_a_column_of_another_type_is_an_error_and_not_a_broken_row():
    with pytest.raises(ValueError, match="`text` must hold strings; got int"):
        list(TransfusionDataset.from_text(Dataset.from_dict({"text": [1, 2]})))
    rows = Dataset.from_dict({"captions": [["a", "b"]], "id": [1]})
    with pytest.raises(ValueError, match=r"got list, and the columns are \['captions', 'id'\].*\['captions'\]\[0\]"):
        list(TransfusionDataset.from_text(rows, text_column="captions"))


def test_a_row_of_a_stream_that_lacks_its_columns_is_broken():
    image = {"bytes": encoded(digit(0)), "path": None}
    stream = IterableDataset.from_generator(
        lambda: iter([{"text": "a", "image": image}, {"text": "b"}, {"image": image}])
    )
    with pytest.warns(UserWarning, match="`image` is empty"):
        samples = list(dataset := TransfusionDataset.from_captions(stream))
    assert [sample["text"] for sample in samples] == ["a"] and dataset.num_skipped == 2


# Files and folders


def photos(folder: Path, captions: str) -> Path:
    """Three pictures in a folder and one below it; all but `b.png` with a caption."""
    (folder / "more").mkdir()
    metadata = []
    for i, name in enumerate(["a.png", "b.png", "c.jpg", "more/d.png"]):
        PILImage.new("RGB", (8, 8), (50 * i, 0, 0)).save(folder / name)
        if name != "b.png" and captions == "txt":
            (folder / name).with_suffix(".txt").write_text(f"picture {name}\n")
        elif name != "b.png":
            metadata.append({"file_name": name, "text": f"picture {name}"})
    if captions == "metadata":
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, metadata)))
    return folder


@pytest.mark.filterwarnings("ignore:Skipped")  # `b.png`, in part
@pytest.mark.parametrize("captions", ["txt", "metadata"])
def test_a_folder_of_pictures_or_a_pattern_gives_them_with_their_captions(tmp_path, captions):
    folder = photos(tmp_path, captions)
    for name, names in ((folder, ["a.png", "c.jpg", "more/d.png"]), (folder / "*.png", ["a.png"])):
        samples = list(TransfusionDataset.from_captions(load_rows(str(name), streaming=True)))
        assert texts(samples) == [f"picture {name}" for name in names]
        reds = [sample["image"].convert("RGB").getpixel((4, 4))[0] for sample in samples]
        assert reds == pytest.approx([{"a": 0, "c": 100, "d": 150}[Path(name).stem] for name in names], abs=2)


def test_names_of_files_mean_nothing(tmp_path):
    """Not splits, and not patterns."""
    folder = tmp_path / "photos [2026]"
    folder.mkdir()
    for name in ("test_car", "train station", "dog [1]", "cat"):
        PILImage.new("RGB", (4, 4)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name, encoding="utf-8-sig")  # as Notepad writes it
    for name in (str(folder), str(tmp_path / "*" / "*.png")):
        assert sorted(load_rows(name)["text"]) == ["cat", "dog [1]", "test_car", "train station"]
    (folder / "captions [1].jsonl").write_text('{"text": "a"}')
    assert load_rows(str(tmp_path / "*" / "*.jsonl"))["text"] == ["a"]
    for split in ("train", "test"):
        (tmp_path / "both" / split).mkdir(parents=True)
        PILImage.new("RGB", (4, 4)).save(tmp_path / "both" / split / "a.png")
    assert len(load_rows(str(tmp_path / "both"))) == len(load_rows(str(tmp_path / "both"), split="test")) == 1


def test_data_are_read_by_their_suffix_and_what_is_not_there_is_named(tmp_path):
    text_set(3).to_parquet(tmp_path / "a.parquet")
    text_set(3).to_json(tmp_path / "a.jsonl")
    for name in ("a.parquet", "*.parquet", "*.jsonl"):
        assert list(load_rows(str(tmp_path / name))["text"]) == list(text_set(3)["text"])
    with pytest.raises(ValueError, match=r"No file matches .*pass a folder of pictures, or a pattern"):
        load_rows(str(tmp_path / "*.png"))
    PILImage.new("L", (8, 8)).save(tmp_path / "alone.png")
    with pytest.raises(ValueError, match=r"\['image'\]; name one. Or put captions into `metadata.jsonl`"):
        TransfusionDataset.from_captions(load_rows(str(tmp_path / "*.png")))


# Order and sharing


SOURCES = {
    "map": lambda: text_set(43),
    "stream": lambda: stream_of(5),
    "stream of an even number of shards": lambda: stream_of(4),
}


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_two_processes_of_two_workers_see_every_sample_exactly_once(source, shuffle):
    expected, seen = sorted(texts(SOURCES[source]())), []
    for rank in range(2):
        rows = split_dataset_by_node(SOURCES[source](), rank=rank, world_size=2)
        dataset = TransfusionDataset.from_text(rows, shuffle=shuffle, buffer_size=3)
        batches = list(loader(dataset, 2))
        seen += [texts(sample for batch in part for sample in batch) for part in (batches[::2], batches[1::2])]
    assert all(seen) and sorted(text for part in seen for text in part) == expected


@pytest.mark.parametrize("source", SOURCES)
def test_accelerate_without_dispatching_gives_each_process_samples_of_its_own(source):
    seen = []
    for rank in range(2):
        dataset = TransfusionDataset.from_text(SOURCES[source](), shuffle=True, buffer_size=3)
        shard = IterableDatasetShard(dataset, batch_size=1, drop_last=True, num_processes=2, process_index=rank)
        seen += texts(sample for batch in DataLoader(shard, num_workers=2, collate_fn=list) for sample in batch)
    assert len(set(seen)) == len(seen) >= len(list(SOURCES[source]())) - 2  # a last half of a pair in each worker


@pytest.mark.parametrize("source", SOURCES)
def test_an_epoch_has_an_order_of_its_own_that_the_seed_decides(source):
    def order(seed: int, epoch: int) -> list[str]:
        dataset = TransfusionDataset.from_text(SOURCES[source](), shuffle=True, seed=seed, buffer_size=8)
        dataset.set_epoch(epoch)
        return texts(dataset)

    orders = [order(0, 0), order(0, 1), order(1, 0), texts(SOURCES[source]())]
    assert len({tuple(o) for o in orders}) == 4 and len({tuple(sorted(o)) for o in orders}) == 1
    assert order(0, 1) == orders[1]


def test_the_shards_of_a_stream_are_shuffled_as_well_as_the_rows():
    dataset = TransfusionDataset.from_text(stream_of(5), shuffle=True, buffer_size=1)
    orders = set()
    for epoch in range(4):
        dataset.set_epoch(epoch)
        orders.add(tuple(dict.fromkeys(text.split("-")[0] for text in texts(dataset))))
    assert len(orders) > 1 and all(sorted(order) == [*"01234"] for order in orders)


def test_the_rows_of_a_stream_are_shuffled_within_blocks():
    rows = text_set(24).to_iterable_dataset()
    order = [
        int(text.split(":")[0]) for text in texts(TransfusionDataset.from_text(rows, shuffle=True, buffer_size=8))
    ]
    blocks = [[i - start for i in order[start : start + 8]] for start in (0, 8, 16)]
    assert all(sorted(block) == list(range(8)) for block in blocks) and len(set(map(tuple, blocks))) == 3


def test_workers_that_outlive_an_epoch_hear_of_the_next():
    dataset = TransfusionDataset.from_text(text_set(43), shuffle=True)
    persistent = loader(dataset, 2, persistent_workers=True)
    first = list(persistent)
    dataset.set_epoch(1)
    assert first != list(persistent)


def test_a_map_style_set_has_a_length_and_a_stream_has_none():
    assert len(TransfusionDataset.from_text(text_set(43))) == 43
    with pytest.raises(TypeError):
        len(TransfusionDataset.from_text(stream_of(2)))


def test_data_sets_travel_to_workers_that_are_started_anew(processor):
    mixed = mix_by_tokens([TransfusionDataset.from_text(text_set()), captions_source()], processor)
    assert texts(pickle.loads(pickle.dumps(mixed))) == texts(mixed)


# Resuming


def mixture(kind: str, shuffle: bool, folder: Path, processor):
    options = {"shuffle": shuffle, "buffer_size": 5}
    text, captions = text_set(60), captions_set(30)
    if kind == "streams":
        text = stream_of(6)
        captions = captions.to_iterable_dataset(num_shards=4)
    elif kind == "files":
        (folder / "text").mkdir(exist_ok=True)
        (folder / "captions").mkdir(exist_ok=True)
        text = streams_of_files(text, folder / "text", 3)
        captions = streams_of_files(captions, folder / "captions", 2)
    sources = [TransfusionDataset.from_text(text, **options), captions_source(captions, **options)]
    return mix_by_tokens(sources, processor, stopping_strategy="never" if shuffle else "first_exhausted")


@pytest.mark.parametrize(("shuffle", "num_workers"), [(False, 0), (True, 0), (True, 2)])
@pytest.mark.parametrize("kind", ["map", "streams", "files"])
def test_a_resumed_loader_goes_on_with_the_next_sample(kind, shuffle, num_workers, tmp_path, processor):
    def fresh() -> StatefulDataLoader:
        dataset = mixture(kind, shuffle, tmp_path, processor)
        dataset.set_epoch(3)
        return loader(dataset, num_workers)

    def all_texts(batches) -> list[list[str]]:
        return [texts(batch) for batch in islice(batches, 25 - len(before))]

    before: list = []
    whole = all_texts(fresh())
    assert len(set(map(tuple, whole))) == len(whole) == (25 if shuffle else len(whole)) > 8
    for num_batches in (0, 1, 8) if num_workers == 0 else (7,):
        killed = fresh()
        batches = iter(killed)
        before = [texts(next(batches)) for _ in range(num_batches)]
        state = pickle.dumps(killed.state_dict())
        del batches, killed
        resumed = fresh()
        resumed.load_state_dict(pickle.loads(state))
        assert before + all_texts(resumed) == whole


@pytest.mark.parametrize("source", SOURCES)
def test_the_state_is_json_right_before_the_first_sample_and_behind_the_last_and_used_once(source):
    def fresh() -> TransfusionDataset:
        return TransfusionDataset.from_text(SOURCES[source](), shuffle=True, buffer_size=4)

    whole = texts(fresh())
    dataset = fresh()
    samples, states = iter(dataset), [dataset.state_dict()]
    for _ in samples:
        states.append(json.loads(json.dumps(dataset.state_dict())))
    for taken, state in enumerate(states):
        resumed = fresh()
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert texts(resumed) == whole[taken:]
        assert texts(resumed) == whole


def test_resuming_does_not_decode_what_was_seen():
    rows = damaged().select([0, 2, 4, 7])
    dataset = captions_source(rows)
    with pytest.warns(UserWarning):
        samples = iter(dataset)
        _ = [next(samples) for _ in range(2)]
    resumed = captions_source(rows, on_error="raise")
    resumed.load_state_dict(dataset.state_dict())
    assert texts(resumed) == ["7: a 7"]


# Mixing


def weights_of(samples, dataset_of) -> Counter:
    counts: Counter = Counter()
    for sample in samples:
        counts[dataset_of(sample)] += len(sample["text"])
    return counts


@pytest.mark.parametrize(("ratios", "share"), [(None, 1 / 2), ([3, 1], 3 / 4)])
def test_tokens_and_not_rows_are_in_proportion(ratios, share):
    rng = np.random.default_rng(0)
    short = Dataset.from_dict({"text": ["s" * n for n in rng.integers(1, 60, 1500)]})
    long = Dataset.from_dict({"text": ["l" * n for n in rng.integers(100, 900, 300)]})
    sources = [TransfusionDataset.from_text(rows, shuffle=True) for rows in (short, long)]
    mixed = mix_by_tokens(sources, length_fn=lambda sample: len(sample["text"]), ratios=ratios)
    samples = list(islice(mixed, 1000))
    counts = weights_of(samples, lambda sample: sample["text"][0])
    assert counts["s"] / counts.total() == pytest.approx(share, rel=0.02)
    rows_of_each = Counter(sample["text"][0] for sample in samples)
    assert rows_of_each["s"] > 5 * rows_of_each["l"]


def test_each_draw_is_from_the_source_that_is_furthest_behind(processor):
    sources = [TransfusionDataset.from_text(text_set(200)), captions_source(captions_set(40))]
    tokens = [0, 0]
    for sample in mix_by_tokens(sources, processor):
        source = int("image" in sample)
        assert tokens[source] == min(tokens)
        tokens[source] += count_tokens(sample, processor)
    assert min(tokens) > 500


@pytest.mark.parametrize("crop", [True, False])
def test_tokens_are_counted_as_the_collator_makes_them(processor, model, crop):
    collator = TransfusionDataCollator(processor, caption_dropout=0.0)
    samples = [
        {"text": "abc"},
        {"text": "red", "image": digit(1)},
        {"text": "<image>make it blue<image>", "images": [digit(1), digit(2)]},
        {"text": "none", "images": None},
    ]
    if not crop:
        processor = AutoProcessor.from_pretrained(TINY, do_resize=False, do_center_crop=False)
        collator = TransfusionDataCollator(processor, caption_dropout=0.0)
        samples.append({"text": "large", "image": PILImage.new("RGB", (16, 24))})
        samples += [
            {"text": "<image>", "latents": latents} for latents in ([torch.zeros(3, 4, 8)], torch.zeros(3, 4, 8))
        ]
    for sample in samples:
        assert count_tokens(sample, processor) == int(collator([sample])["attention_mask"].sum())


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [("first_exhausted", "a0 b0 a1 b1"), ("never", "a0 b0 a1 b1 a0 b2 a1 b3 a0 b0 a1 b1")],
)
def test_a_pass_ends_as_the_strategy_says(strategy, expected):
    a, b = (Dataset.from_dict({"text": [f"{x}{i}" for i in range(n)]}) for x, n in (("a", 2), ("b", 4)))
    sources = [TransfusionDataset.from_text(rows) for rows in (a, b)]
    mixed = mix_by_tokens(sources, length_fn=lambda sample: 1, stopping_strategy=strategy)
    for _ in range(2):
        assert texts(islice(mixed, 12)) == expected.split()


@pytest.mark.parametrize("kind", ["map", "streams"])
def test_an_endless_mixture_goes_on_beyond_its_first_pass_at_the_very_next_sample(kind):
    """Each source takes its turn, and each of its passes is whole and has an order of its own, in all epochs."""

    def fresh(epoch: int = 0):
        sources = [text_set(4), text_set(10).map(lambda row: {"text": f"b {row['text']}"})]
        if kind == "streams":
            sources = [rows.to_iterable_dataset(num_shards=2) for rows in sources]
        sources = [TransfusionDataset.from_text(rows, shuffle=True, buffer_size=3) for rows in sources]
        mixed = mix_by_tokens(sources, length_fn=lambda sample: 1, stopping_strategy="never")
        mixed.set_epoch(epoch)
        return mixed

    whole = texts(islice(fresh(), 70))
    for samples, length in ((whole[::2], 4), (whole[1::2], 10)):
        if length == 10:
            samples = samples[:30] + texts(islice(fresh(1), 1, 60, 2))
        passes = [samples[start : start + length] for start in range(0, len(samples) - length + 1, length)]
        assert len(passes) >= 6 and len({tuple(sorted(p)) for p in passes}) == 1
        assert len(set(map(tuple, passes))) == len(passes) if length == 10 else len(set(map(tuple, passes))) > 1
    mixed = fresh()
    samples = iter(mixed)
    for taken in range(50):
        if taken % 7 in (0, 1):
            resumed = fresh()
            resumed.load_state_dict(json.loads(json.dumps(mixed.state_dict())))
            assert texts(islice(resumed, 15)) == whole[taken : taken + 15]
        next(samples)


def test_workers_mix_their_own_parts(processor):
    sources = [TransfusionDataset.from_text(stream_of(4)), captions_source(captions_set(30))]
    mixed = mix_by_tokens(sources, processor)
    seen = [sample for batch in loader(mixed, 2) for sample in batch]
    expected = texts(stream_of(4)) + captions_set(30)["caption"][:]
    assert len(set(texts(seen))) == len(seen) > 20 and set(texts(seen)) <= set(expected)
    assert {sample["text"][0] for sample in seen if "image" not in sample} == {*"0123"}  # the shards of both workers


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_source_that_gives_a_worker_nothing_is_an_error(num_workers):
    rows = stream_of(1) if num_workers else text_set(1).filter(lambda row: False)
    sources = [TransfusionDataset.from_text(text_set(20)), TransfusionDataset.from_text(rows)]
    mixed = mix_by_tokens(sources, length_fn=lambda sample: 1)
    with pytest.raises(ValueError, match=r"`datasets\[1\]` gives no sample.*fewer shards than there are workers"):
        list(loader(mixed, num_workers))


def test_the_trainer_learns_from_packs_of_a_mixture(processor, tmp_path):
    model = TransfusionForCausalLMAndDiffusion.from_pretrained(TINY)
    edits = edits_set().to_iterable_dataset(num_shards=2)
    sources = [TransfusionDataset.from_text(stream_of(4), shuffle=True), TransfusionDataset.from_edits(edits)]
    args = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=8, dataloader_num_workers=2, report_to="none",
        remove_unused_columns=False, use_cpu=True, logging_steps=1, save_strategy="no",
        accelerator_config={"dispatch_batches": False},
    )  # fmt: skip
    collator = TransfusionDataCollator(processor, max_length=128)
    trainer = Trainer(model, args, data_collator=collator, train_dataset=mix_by_tokens(sources, processor))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and np.isfinite(losses).all()


def test_of_the_trainers_batches_only_the_last_is_in_part_whatever_the_workers(tmp_path):
    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, dataloader_num_workers=3, remove_unused_columns=False,
        report_to="none", use_cpu=True,
    )  # fmt: skip
    trainer = TransfusionTrainer(
        TransfusionForCausalLMAndDiffusion.from_pretrained(TINY),
        args,
        train_dataset=TransfusionDataset.from_text(text_set(22), shuffle=True),
        data_collator=lambda rows: {"texts": [row["text"] for row in rows]},
    )
    batches = [batch["texts"] for batch in trainer.get_train_dataloader()]
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4, 2]
    assert len({text for batch in batches for text in batch}) == 22


@pytest.mark.parametrize(("num_workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_every_evaluation_is_of_the_same_batches(processor, tmp_path, num_workers, persistent):
    """The order is shuffled, and the collator drops captions."""
    args = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=4, dataloader_num_workers=num_workers, report_to="none",
        dataloader_persistent_workers=persistent, remove_unused_columns=False, use_cpu=True,
    )  # fmt: skip
    trainer = TransfusionTrainer(
        TransfusionForCausalLMAndDiffusion.from_pretrained(TINY),
        args,
        eval_dataset=TransfusionDataset.from_captions(captions_set(), caption_column="caption", shuffle=True),
        data_collator=TransfusionDataCollator(processor, caption_dropout=0.5),
    )
    losses = []
    for _ in range(3):
        torch.rand(1)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[1:] == losses[:1] * 2


def test_a_source_that_cannot_be_repeated_is_an_error_and_no_endless_loop():
    rows = iter([{"text": "b"}, {"text": "c"}])
    once = IterableDataset.from_generator(lambda: rows, features=Features({"text": Value("string")}))
    sources = [TransfusionDataset.from_text(text_set(20)), TransfusionDataset.from_text(once)]
    mixed = mix_by_tokens(sources, length_fn=lambda sample: 1, stopping_strategy="never")
    with pytest.raises(ValueError, match=r"`datasets\[1\]` gives no sample: .* it can be read only once"):
        list(mixed)


ONE = TransfusionDataset.from_text(text_set())


@pytest.mark.parametrize(
    ("sources", "kwargs", "message"),
    [
        ([], {}, r"`datasets` must be one or more `TransfusionDataset`; got \[\]"),
        ([text_set()], {}, r"must be one or more `TransfusionDataset`; got \['Dataset'\]"),
        ([ONE, ONE], {}, "holds a source twice"),
        ([ONE], {"ratios": [1, 1]}, r"`ratios` must hold a positive number for each of 1 sources; got \[1, 1\]"),
        ([ONE], {"ratios": [0]}, "`ratios` must hold a positive number"),
        ([ONE], {"length_fn": None}, "Pass one of `processor` and `length_fn`"),
        ([ONE], {"processor": "both"}, "Pass one of `processor` and `length_fn`"),
        ([ONE], {"stopping_strategy": "once"}, "`stopping_strategy` must be 'first_exhausted' or 'never'; got 'once'"),
    ],
)
def test_bad_mixtures_are_refused(sources, kwargs, message):
    with pytest.raises(ValueError, match=message):
        mix_by_tokens(sources, **{"length_fn": len, **kwargs})


def imported_files(file: Path) -> set[Path]:
    """The files of the package that an import of this one reads, this one included."""
    found = {file}
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            target = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            names = [target.with_suffix(".py"), target / "__init__.py", *target.parents[0].glob("__init__.py")]
            found |= {name for name in names if name.exists()}
    return found


def test_the_package_works_without_datasets_and_its_data_say_how_to_get_it(monkeypatch):
    files, reached = set(), {Path(transfusion_hf.__file__)}
    while new := reached - files:
        files |= new
        reached = set().union(*map(imported_files, new))
    assert Path(collator.__file__) in files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert "datasets" not in {name.split(".")[0] for name in names}, file
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "transfusion_hf.data.dataset")
    with pytest.raises(ImportError, match=r"`transfusion_hf.data.dataset` needs datasets; run `pip install datasets`"):
        importlib.import_module("transfusion_hf.data.dataset")
