"""`evaluate` and `transfusion evaluate`: from tasks to `results.json`, `report.md` and grids."""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from PIL import Image
from test_processes import launch
from transformers import AutoModelForMultimodalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import transfusion_command
from transfusion_hf import TransfusionProcessor
from transfusion_hf.evaluation import TASKS, Run, Score, Task, TaskResult, Verdict, evaluate, make_task
from transfusion_hf.evaluation.language_tasks import LLAMA2_SUITE
from transfusion_hf.evaluation.report import PAPER, _paper
from transfusion_hf.hub import make_model_card

TINY = Path(__file__).parent / "fixtures" / "tiny-transfusion"
STEPS = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def model():
    return AutoModelForMultimodalLM.from_pretrained(TINY)


@pytest.fixture(scope="module")
def processor():
    return TransfusionProcessor.from_pretrained(TINY)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures with captions, and texts."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "pictures").mkdir()
    lines = []
    for i, text in enumerate(["a dark square", "a bright square", "a gray square", "nothing"]):
        Image.new("L", (16, 16), 60 * i).convert("RGB").save(folder / "pictures" / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": text}))
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(lines))
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": "a b c " * n}) for n in (1, 5, 9)))
    return folder


@dataclass
class Brightness(Task):
    """Whether drawings are bright."""

    name: str
    prompts: tuple[str, ...] = ("a", "b", "c")
    log: list[str] | None = None
    modalities = "text → image"

    def prepare(self, model: Any, processor: Any) -> None:
        if self.log is not None:
            self.log.append(f"prepare {self.name}")
        if not self.prompts:
            raise ValueError("`prompts` is empty.")

    def run(self, run: Run) -> TaskResult:
        if self.log is not None:
            self.log.append(f"run {self.name}")
        files = run.draw(self.name, self.prompts)
        values = [float(np.asarray(Image.open(file)).mean()) for file in files]
        rows = zip(files, self.prompts, values, strict=True)
        verdicts = [Verdict(file, f"{prompt}: brightness {x:.0f}", x > 127) for file, prompt, x in rows]
        return TaskResult({"brightness": Score.of(np.mean, values)}, {"judge": "the mean"}, verdicts)


def test_the_table_is_written_and_returned(model, processor, tmp_path):
    results = evaluate(model, processor, [Brightness("bright")], tmp_path, drawing=STEPS)
    assert results == json.loads((tmp_path / "results.json").read_text())
    files = sorted((tmp_path / "bright" / "images").glob("*.png"))
    values = [np.asarray(Image.open(file)).mean() for file in files]
    (score,) = results["tasks"]["bright"]["scores"].values()
    assert len(values) == score["num_items"] == 3 and score["value"] == pytest.approx(np.mean(values))
    low, high = score["interval"]
    assert min(values) <= low <= score["value"] <= high <= max(values)
    assert results["model"]["num_parameters"] == model.num_parameters()
    made_with = results["tasks"]["bright"]["made_with"]
    assert made_with["drawing"] == STEPS and made_with["seed"] == 0 and made_with["batch_size"] == 8
    assert made_with["generation_config"]["eos_token_id"] == model.generation_config.eos_token_id
    report = (tmp_path / "report.md").read_text()
    cells = f"{score['value']:.1f} | {low:.1f} to {high:.1f} | 3 |"
    assert f"| text → image | bright | brightness ↑ | {cells}  |" in report.splitlines()
    assert "- judge: the mean" in report and "(bright/grid.png)" in report
    assert Image.open(tmp_path / "bright" / "grid.png").width > 1000
    assert f"{score['value']:.4g}" in make_model_card(model.config, "someone/digits", results=results).text


def test_signs_of_mathematics_and_tables_do_not_break_a_report(model, processor, tmp_path):
    prompts = (r"a sign: $\5 or $ 6 each", "from $5 to $10_", "a | b", "<b> & `c`")
    evaluate(model, processor, [Brightness("bright", prompts)], tmp_path, drawing=STEPS)
    assert (tmp_path / "bright" / "grid.png").is_file()


def test_the_papers_value_stands_beside_the_papers_benchmark_alone():
    assert _paper("llama2-suite", "accuracy", {"tasks": dict.fromkeys(LLAMA2_SUITE)}) == "0.615"
    assert _paper("llama2-suite", "accuracy", {"tasks": {"boolq": {}}}) == ""
    assert _paper("coco-captions", "CIDEr", {"split": "test", "is_coco": True}) == "27.2"
    assert _paper("coco-captions", "CIDEr", {"split": "train", "is_coco": True}) == ""
    assert _paper("clip-score", "CLIP score", {"split": "test", "is_coco": False}) == ""
    assert _paper("coco-captions", "CIDEr (words)", {"split": "test", "is_coco": True}) == ""
    assert _paper("wikipedia", "perplexity", {}) == "4.28"


def test_a_model_of_nan_has_no_scores(processor, data, tmp_path):
    model = AutoModelForMultimodalLM.from_pretrained(TINY)
    model.lm_head.weight.data[:] = math.nan
    with pytest.raises(ValueError, match="log-likelihood nan; look for NaN in its weights"):
        evaluate(model, processor, [make_task("text", data=["a text"])], tmp_path)

    class NoNumber(Brightness):
        def run(self, run):
            return TaskResult({"brightness": Score(math.nan, None, 1)}, {})

    with pytest.raises(ValueError, match="The task `bright`: brightness is nan"):
        evaluate(model, processor, [NoNumber("bright")], tmp_path)
    assert not (tmp_path / "results.json").exists()


def test_texts_without_blanks_have_no_perplexity_per_word(model, processor, tmp_path):
    text = "これは空白のない文です。" * 9
    results = evaluate(model, processor, [make_task("text", data=[text, text[:50]])], tmp_path)
    assert [*results["tasks"]["text"]["scores"]] == ["perplexity", "bits per byte"]


def test_two_runs_at_the_same_time_keep_both_tasks(model, processor, tmp_path):
    class Slow(Brightness):
        def run(self, run):
            evaluate(model, processor, [Brightness("quick")], tmp_path, drawing=STEPS)
            return super().run(run)

    results = evaluate(model, processor, [Slow("slow")], tmp_path, drawing=STEPS)
    assert {*results["tasks"]} == {"quick", "slow"}


def test_tasks_are_prepared_before_the_first_runs(model, processor, tmp_path):
    log = []
    tasks = [Brightness("one", log=log), Brightness("two", log=log)]
    evaluate(model, processor, tasks, tmp_path, drawing=STEPS)
    assert log == ["prepare one", "prepare two", "run one", "run two"]
    log.clear()
    with pytest.raises(ValueError, match="`prompts` is empty"):
        evaluate(model, processor, [Brightness("three", log=log), Brightness("four", (), log)], tmp_path)
    assert log == ["prepare three", "prepare four"] and not (tmp_path / "three").exists()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("num_passes", [1, 9, 14])
def test_a_killed_evaluation_goes_on_to_the_same_results(model, processor, tmp_path, num_passes):
    def tasks():
        return [Brightness("one"), Brightness("two", ("d", "e"))]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    evaluate(model, processor, tasks(), whole, batch_size=2, drawing=STEPS)
    passes = []

    def kill(*_):
        passes.append(1)
        if len(passes) == num_passes:
            raise Killed

    with model.register_forward_pre_hook(kill):
        try:
            evaluate(model, processor, tasks(), killed, batch_size=2, drawing=STEPS)
        except Killed:
            assert not (killed / "results.json").exists() or "two" not in (killed / "results.json").read_text()
        else:
            assert len(passes) < num_passes, "choose fewer passes"
    evaluate(model, processor, tasks(), killed, batch_size=2, drawing=STEPS)
    for name in ("results.json", "report.md", "one/images.jsonl", "two/images/000001.png"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


def test_tasks_of_several_calls_share_a_table_in_its_order(model, processor, data, tmp_path):
    evaluate(model, processor, [Brightness("bright")], tmp_path, drawing=STEPS)
    captions = make_task("captions", data=str(data / "pictures"), tokenizer="words", max_new_tokens=4)
    evaluate(model, processor, [captions], tmp_path)
    text = make_task("text", data=str(data / "texts.jsonl"))
    together = evaluate(model, processor, [text], tmp_path)
    assert [*together["tasks"]] == ["text", "captions", "bright"]
    rows = [
        line for line in (tmp_path / "report.md").read_text().splitlines() if " → " in line and "in → " not in line
    ]
    assert [row.split(" | ")[1] for row in rows] == ["text", "captions", "bright"]
    # A task again replaces its row.
    (tmp_path / "bright" / "images.settings.json").unlink()
    (tmp_path / "bright" / "images.jsonl").unlink()
    again = evaluate(model, processor, [Brightness("bright", ("a", "b", "c", "d"))], tmp_path, drawing=STEPS)
    assert again["tasks"]["bright"]["scores"]["brightness"]["num_items"] == 4 and len(again["tasks"]) == 3


def test_another_models_folder_is_refused(model, processor, tmp_path):
    evaluate(model, processor, [Brightness("bright")], tmp_path, drawing=STEPS)
    other = AutoModelForMultimodalLM.from_pretrained(TINY)
    other.lm_head.weight.data += 1
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(
        ValueError, match=r"holds results of .*tiny-transfusion with other weights.*pass another folder"
    ):
        evaluate(other, processor, [Brightness("bright")], tmp_path, drawing=STEPS)
    assert (tmp_path / "results.json").read_bytes() == before


def test_what_cannot_be_a_task_is_refused(model, processor, tmp_path):
    with pytest.raises(ValueError, match="`tasks` is empty; name some of wikipedia, c4"):
        evaluate(model, processor, [], tmp_path)
    with pytest.raises(ValueError, match="`tasks` names 'one' twice"):
        evaluate(model, processor, [Brightness("one"), Brightness("one")], tmp_path)
    for number in (0, -3):
        with pytest.raises(ValueError, match=f"`num_samples` must be at least 1; got {number}"):
            evaluate(model, processor, [make_task("text", data=["a"], num_samples=number)], tmp_path)
    with pytest.raises(ValueError, match="`batch_size` must be at least 1; got 0"):
        evaluate(model, processor, [make_task("text", data=["a"])], tmp_path, batch_size=0)
    with pytest.raises(ValueError, match=r"`stride` of the task `text` must be int \| None; got 'abc'"):
        make_task("text", stride="abc")
    assert make_task("llama2-suite", tasks="boolq,piqa").tasks == ["boolq", "piqa"]
    task = make_task("/somewhere/mine.yaml")
    assert (task.name, task.tasks) == ("mine", ["/somewhere/mine.yaml"])
    with pytest.raises(ValueError, match="The task `shapes` has no option `clip`; it has num_samples, "):
        make_task("shapes", clip="somewhere")
    assert not [*tmp_path.glob("*/*")]


@pytest.mark.parametrize("name", TASKS)
def test_every_task_of_the_table_is_made_by_its_name(name):
    task = make_task(name, num_samples=2)
    assert task.name == name and task.num_samples == 2
    assert {task for task, _ in PAPER} <= {*TASKS}


def command(*words: Any) -> int:
    return transfusion_command.main(["evaluate", *map(str, words)])


def test_the_command_writes_a_table_and_prints_it(data, tmp_path, capsys):
    words = ["--tasks", "text", "captions", "-o", tmp_path, "--device", "cpu", "--num_samples", 3]
    words += ["--data", f"text={data / 'texts.jsonl'}", f"captions={data / 'pictures'}"]
    words += ["--set", "text.max_length=16", "captions.tokenizer=words", "captions.max_new_tokens=4"]
    assert command(TINY, *words) == 0
    printed = capsys.readouterr().out
    assert "| text → text | text | perplexity ↓ |" in printed and str(tmp_path / "report.md") in printed
    tasks = json.loads((tmp_path / "results.json").read_text())["tasks"]
    assert tasks["text"]["settings"]["max_length"] == 16 and tasks["text"]["settings"]["num_samples"] == 3
    assert "CIDEr (words)" in tasks["captions"]["scores"] and tasks["captions"]["settings"]["num_pictures"] == 3


def test_a_language_model_is_evaluated_by_the_same_command(data, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=262, **sizes)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = ["-o", tmp_path / "out", "--device", "cpu", "--data", f"text={data / 'texts.jsonl'}"]
    assert command(tmp_path / "model", "--tasks", "text", *words) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["text"]["scores"]["perplexity"]
    words[5] = f"captions={data / 'pictures'}"
    assert command(tmp_path / "model", "--tasks", "captions", *words) == 1


def test_an_adapter_is_evaluated_with_its_base(model, data, tmp_path):
    base = AutoModelForMultimodalLM.from_pretrained(TINY)
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(TINY)
    adapted.save_pretrained(tmp_path / "adapter")
    scores = []
    for name in (TINY, tmp_path / "adapter"):
        words = ["-o", tmp_path / f"out{len(scores)}", "--device", "cpu", "--data", f"text={data / 'texts.jsonl'}"]
        assert command(name, "--tasks", "text", *words) == 0
        results = json.loads((words[1] / "results.json").read_text())
        scores.append(results["tasks"]["text"]["scores"]["perplexity"]["value"])
    assert scores[0] != scores[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "shapes", "--data", "geneval=x"], "`--data geneval=…` belongs to none of the `--tasks` shapes."),
        (["--tasks", "shapes", "--weights", "clip=x"], "`--weights clip=…` belongs to none"),
        (["--tasks", "shapes", "--set", "num_samples=3"], "`--set num_samples=…` belongs to none"),
        (["--tasks", "shapes", "--set", "shapes.depth=3"], "has no option `depth`"),
        (["--tasks", "shapes", "--dtype", "bf16"], "`--dtype` must be 'auto' or a type of torch"),
        (["--tasks", "text", "--data", "text=nothing.jsonl"], "The task `text` cannot read `data` 'nothing.jsonl'"),
        (["--tasks", "shapes", "--data", "x"], "`--data` takes NAME=VALUE; got 'x'."),
        (["--tasks", "wikipedia"], "The task `wikipedia` needs `data`: held-out texts"),
        (["--tasks", "geneval"], "Fetch `prompts/evaluation_metadata.jsonl`"),
        (["--tasks", "captions"], "The task `captions` needs `data`"),
        (
            ["--tasks", "clip-score", "--weights", "clip=nowhere"],
            "`clip`: CLIPModel and its processor cannot be loaded",
        ),
        (["--tasks", "shapes"], "The task `shapes` needs pictures of at least 32×32 pixels"),
    ],
)
def test_bad_words_end_the_command_with_one_line(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert command(TINY, *words, "-o", tmp_path / "out", "--device", "cpu") == 1
    assert message in capsys.readouterr().err
    assert not [*(tmp_path / "out").glob("*/*")]


def test_two_processes_write_what_one_writes(data, tmp_path):
    words = ["evaluate", TINY, "--tasks", "text", "captions", "--device", "cpu", "--batch_size", 2]
    words += ["--data", f"text={data / 'texts.jsonl'}", f"captions={data / 'pictures'}"]
    words += ["--set", "captions.tokenizer=words", "captions.max_new_tokens=4"]
    launch(tmp_path, 2, "command.py", *map(str, [*words, "-o", tmp_path / "two"]))
    assert transfusion_command.main([*map(str, words), "-o", str(tmp_path / "one")]) == 0
    files = sorted(file.relative_to(tmp_path / "one") for file in (tmp_path / "one").rglob("*.*"))
    assert files == sorted(file.relative_to(tmp_path / "two") for file in (tmp_path / "two").rglob("*.*"))
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    shutil.rmtree(tmp_path / "two")
