"""`transfusion_hf.evaluation`, text to text: against lm-eval with the language model."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import tiny_text
from test_processes import launch

from transfusion_hf.evaluation import perplexity
from transfusion_hf.evaluation.language_tasks import LLAMA2_SUITE, LmEvalTask
from transfusion_hf.evaluation.perplexity import PerplexityTask
from transfusion_hf.evaluation.run import Run

pytest.importorskip("lm_eval")
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from transfusion_hf.evaluation.lm_eval_model import RecordedLM, TransfusionLM

CHOICES = """
task: tiny_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}{more}]
"""
WRITING = """
task: tiny_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[label]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 5, do_sample: {do_sample}}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_text.tokenizer()


@pytest.fixture(scope="module")
def language_model():
    return tiny_text.language_model()


@pytest.fixture(scope="module")
def converted(language_model):
    return tiny_text.converted(language_model)


@pytest.fixture(scope="module")
def texts():
    return tiny_text.texts()


@pytest.fixture(scope="module")
def task_files(tmp_path_factory):
    """Two tasks of multiple choice, one with and one without `acc_norm`, and two that write."""
    folder, rng = tmp_path_factory.mktemp("tasks"), np.random.default_rng(1)
    for name, size in (("choices", 24), ("others", 7)):
        rows = []
        for _ in range(size):
            choices = [" ".join(rng.choice(tiny_text.WORDS, rng.integers(1, 4))) for _ in range(3)]
            label = int(rng.integers(3))
            rows.append({"question": " ".join(rng.choice(tiny_text.WORDS, 5)), "choices": choices, "label": label})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data, more = folder / "choices.jsonl", ", {metric: acc_norm, aggregation: mean, higher_is_better: true}"
    (folder / "choices.yaml").write_text(CHOICES.format(data=data, more=more))
    others = CHOICES.replace("tiny_choices", "tiny_others").format(data=folder / "others.jsonl", more="")
    (folder / "others.yaml").write_text(others)
    (folder / "writing.yaml").write_text(WRITING.format(data=data, do_sample="false"))
    sampling = WRITING.replace("tiny_writing", "tiny_sampling").format(data=data, do_sample="true")
    (folder / "sampling.yaml").write_text(sampling)
    return folder


@pytest.fixture(autouse=True)
def without_a_list_of_packages(monkeypatch):
    """Which lm-eval writes into its results, and takes seconds for."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def by_hand(lm, task_files, tasks, num_fewshot=None):
    manager = TaskManager(include_path=str(task_files), include_defaults=False)
    options = {"task_manager": manager, "bootstrap_iters": 0, "num_fewshot": num_fewshot}
    return simple_evaluate(lm, tasks=tasks, **options)["samples"]


def run_of(model, tokenizer, folder, **kwargs) -> Run:
    return Run(model, tokenizer, Path(folder), **kwargs)


def test_perplexity_is_the_rolling_log_likelihood_of_lm_eval(language_model, converted, tokenizer, texts, tmp_path):
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    # Else lm-eval would count the token, too, by which this tokenizer begins a text.
    options = {"tokenizer": tokenizer, "batch_size": 3, "add_bos_token": False}
    expected = HFLM(language_model, **options).loglikelihood_rolling(requests)
    assert len(tokenizer(texts[4])["input_ids"]) > 2 * 64, "several windows"
    assert TransfusionLM(converted, **options).loglikelihood_rolling(requests) == pytest.approx(expected, rel=1e-5)
    recorded = RecordedLM(run_of(converted, tokenizer, tmp_path / "lm"), "rolling").loglikelihood_rolling(requests)
    by_default = HFLM(language_model, tokenizer=tokenizer).loglikelihood_rolling(requests)
    assert recorded == pytest.approx(by_default, rel=1e-5)
    for name, model in (("language_model", language_model), ("converted", converted)):
        for text, loglikelihood in zip(texts, expected, strict=True):
            assert perplexity(model, tokenizer, [text]).nll == pytest.approx(-loglikelihood, rel=1e-5)
        task = PerplexityTask(texts, name="text")
        task.prepare(model, tokenizer)
        task.run(run_of(model, tokenizer, tmp_path / name))
        lines = [json.loads(line) for line in (tmp_path / name / "text" / "texts.jsonl").read_text().splitlines()]
        assert [line["nll"] for line in lines] == pytest.approx([-value for value in expected], rel=1e-5)


def test_the_scores_of_texts_are_those_of_all_texts_together(converted, tokenizer, texts, tmp_path):
    task = PerplexityTask(["", *texts], name="wikipedia", max_length=48, stride=16)
    task.prepare(converted, tokenizer)
    result = task.run(run_of(converted, tokenizer, tmp_path))
    whole = perplexity(converted, tokenizer, texts, 48, 16)
    assert list(result.scores) == ["perplexity", "bits per byte", "word perplexity"]
    found = [score.value for score in result.scores.values()]
    assert found == pytest.approx([whole.perplexity, whole.bits_per_byte, whole.word_perplexity], rel=1e-5)
    for score in result.scores.values():
        assert score.interval[0] < score.value < score.interval[1] and score.num_items == len(texts)
    settings = {"max_length": 48, "stride": 16, "num_tokens": whole.num_tokens, "num_words": whole.num_words}
    assert settings | {"num_texts": 6, "num_bytes": whole.num_bytes} | result.settings == result.settings


def test_texts_are_streamed_from_files_until_the_limit(converted, tokenizer, tmp_path):
    rows = [{"text": f"text {i}", "page": f"page number {i}"} for i in range(9)]
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = str(tmp_path / "*.jsonl")
    size = len(tokenizer("page number 0", add_special_tokens=False)["input_ids"])
    for limit in ({"max_tokens": 3 * size}, {"num_samples": 3}):
        task = PerplexityTask(data, text_column="page", **limit)
        task.prepare(converted, tokenizer)
        settings = task.run(run_of(converted, tokenizer, tmp_path / str(limit))).settings
        assert settings["num_texts"] == 3 and settings["num_tokens"] == 3 * size and settings["data"] == data
    with pytest.raises(ValueError, match=r"`text_column` is 'title', but the columns .* are \['text', 'page'\]"):
        PerplexityTask(data, text_column="title").prepare(converted, tokenizer)
    (tmp_path / "lists.jsonl").write_text('{"text": ["a", "b"]}\n')
    message = r"The task `text` needs strings; the column 'text' of .*lists.jsonl holds list: \['a', 'b'\]"
    with pytest.raises(ValueError, match=message):
        PerplexityTask(str(tmp_path / "lists.jsonl")).prepare(converted, tokenizer)
    with pytest.raises(ValueError, match="needs strings; `data` holds int: 7"):
        PerplexityTask([7]).prepare(converted, tokenizer)
    with pytest.raises(ValueError, match="`data` of the task `c4` holds no text"):
        PerplexityTask(["", ""], name="c4").prepare(converted, tokenizer)
    with pytest.raises(ValueError, match="`max_length` must be 1 to 64"):
        PerplexityTask(data, max_length=65).prepare(converted, tokenizer)
    with pytest.raises(ValueError, match=r"The task `text` cannot read `data` .*nowhere"):
        PerplexityTask(str(tmp_path / "nowhere*.jsonl")).prepare(converted, tokenizer)


def test_special_tokens_that_a_text_spells_are_text(converted, tokenizer):
    score = perplexity(converted, tokenizer, ["an <image> here</s>"])
    assert score.num_tokens > len(tokenizer("an <image> here</s>", add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_the_conversion_answers_lm_eval_as_the_language_model_does(
    language_model, converted, tokenizer, task_files, tmp_path, num_fewshot
):
    tasks = ["tiny_choices", "tiny_others"]
    expected = by_hand(HFLM(language_model, tokenizer=tokenizer, batch_size=4), task_files, tasks, num_fewshot)
    for name, model in (("language_model", language_model), ("converted", converted)):
        task = LmEvalTask("suite", tasks, num_fewshot, include_path=str(task_files))
        task.prepare(model, tokenizer)
        result = task.run(run_of(model, tokenizer, tmp_path / name))
        metrics = {"tiny_choices": "acc_norm", "tiny_others": "acc"}
        assert {task: how["metric"] for task, how in result.settings["tasks"].items()} == metrics
        means = {}
        lines = [json.loads(line) for line in (tmp_path / name / "suite/examples.jsonl").read_text().splitlines()]
        for task, metric in metrics.items():
            scores = [sample[metric] for sample in sorted(expected[task], key=lambda sample: sample["doc_id"])]
            assert [line["score"] for line in lines if line["task"] == task] == scores
            means[f"{task} {metric}"] = np.mean(scores)
        assert 0 < means["tiny_choices acc_norm"] < 1
        assert list(result.scores) == ["accuracy", *means]
        assert {key: result.scores[key].value for key in means} == pytest.approx(means)
        assert result.scores["accuracy"].value == pytest.approx(np.mean([*means.values()]))
        assert result.scores["accuracy"].num_items == 31
        low, high = result.scores["accuracy"].interval
        assert low < result.scores["accuracy"].value < high
    answers = by_hand(TransfusionLM(converted, tokenizer=tokenizer, batch_size=4), task_files, tasks, num_fewshot)
    for task in tasks:
        for sample, own in zip(expected[task], answers[task], strict=True):
            for [(likelihood, is_greedy)], [(own_likelihood, own_is_greedy)] in zip(
                sample["resps"], own["resps"], strict=True
            ):
                assert own_likelihood == pytest.approx(likelihood, rel=1e-5) and own_is_greedy == is_greedy


def test_the_conversion_writes_what_the_language_model_writes(
    language_model, converted, tokenizer, task_files, tmp_path
):
    expected = by_hand(HFLM(language_model, tokenizer=tokenizer, batch_size=4), task_files, ["tiny_writing"])
    answers = by_hand(TransfusionLM(converted, tokenizer=tokenizer, batch_size=4), task_files, ["tiny_writing"])
    texts = [sample["resps"] for sample in expected["tiny_writing"]]
    assert [sample["resps"] for sample in answers["tiny_writing"]] == texts and len({str(text) for text in texts}) > 5
    task = LmEvalTask("writing", ["tiny_writing"], include_path=str(task_files))
    task.prepare(converted, tokenizer)
    result = task.run(run_of(converted, tokenizer, tmp_path))
    assert list(result.scores) == ["mean", "tiny_writing exact_match"]
    lines = (tmp_path / "writing" / "generate_until.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["answer"] for line in lines) == sorted(text for [[text]] in texts)
    task = LmEvalTask("sampling", ["tiny_sampling"], include_path=str(task_files))
    task.prepare(converted, tokenizer)
    with pytest.raises(ValueError, match="samples"):
        task.run(run_of(converted, tokenizer, tmp_path))


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def uninterrupted(converted, tokenizer, task_files, tmp_path_factory):
    """The results of one process, their folder, and how many passes through the model they took."""
    folder, calls = tmp_path_factory.mktemp("whole"), []
    with converted.register_forward_pre_hook(lambda *_: calls.append(1)):
        return results(converted, tokenizer, task_files, folder), folder, len(calls)


def results(model, tokenizer, task_files, folder):
    tasks = tiny_text.tasks(task_files)
    for task in tasks:
        task.prepare(model, tokenizer)
    return [task.run(run_of(model, tokenizer, folder, batch_size=5)) for task in tasks]


def assert_same_files(folder, expected):
    files = sorted(file.relative_to(expected) for file in expected.rglob("*.jsonl"))
    assert sorted(file.relative_to(folder) for file in folder.rglob("*.jsonl")) == files and len(files) == 3
    for file in files:
        assert (folder / file).read_bytes() == (expected / file).read_bytes()


def test_tasks_that_were_killed_go_on_to_the_same_scores(converted, tokenizer, task_files, uninterrupted, tmp_path):
    class Killed(BaseException):
        pass

    def kill(*_):
        calls.append(1)
        if len(calls) == 8:
            raise Killed

    expected, folder, num_calls = uninterrupted
    found, num_kills, calls_of_all = None, 0, 0
    while found is None and num_kills < 20:
        calls: list[int] = []
        with converted.register_forward_pre_hook(kill):
            try:
                found = results(converted, tokenizer, task_files, tmp_path)
            except Killed:
                num_kills += 1
        calls_of_all += len(calls)
    assert found == expected and 2 <= num_kills and calls_of_all <= num_calls + 4 * num_kills
    assert_same_files(tmp_path, folder)


@pytest.mark.slow  # test_evaluation_table.py has two processes, too
def test_two_processes_give_the_scores_of_one(task_files, uninterrupted, tmp_path):
    expected, folder, _ = uninterrupted
    launch(tmp_path, 2, "text_scores.py", str(tmp_path), str(task_files))
    for rank in range(2):
        found = json.loads((tmp_path / f"results-{rank}.json").read_text())
        assert found == json.loads(json.dumps([asdict(result) for result in expected]))
    assert_same_files(tmp_path, folder)


def test_lm_eval_finds_the_model_by_its_name(converted, tokenizer, task_files, tmp_path):
    for part in (converted, tokenizer):
        part.save_pretrained(tmp_path)
    manager = TaskManager(include_path=str(task_files), include_defaults=False)
    options = {"tasks": ["tiny_choices"], "task_manager": manager, "bootstrap_iters": 0, "device": "cpu"}
    found = simple_evaluate("transfusion", f"pretrained={tmp_path},dtype=float32", **options)
    expected = by_hand(TransfusionLM(converted, tokenizer=tokenizer), task_files, ["tiny_choices"])
    for sample, own in zip(expected["tiny_choices"], found["samples"]["tiny_choices"], strict=True):
        assert (own["acc"], own["acc_norm"]) == (sample["acc"], sample["acc_norm"])


def test_tasks_that_cannot_run_are_refused_before_anything_is_scored(converted, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    absent = CHOICES.replace("json", "nobody/nothing").replace("dataset_kwargs", "metadata")
    (tmp_path / "absent.yaml").write_text(absent.format(data="", more=""))
    with pytest.raises(
        FileNotFoundError, match=r"data \('nobody/nothing'\) of lm-eval's task `tiny_choices` .*`HF_HOME`"
    ):
        LmEvalTask("suite", ["tiny_choices"], include_path=str(tmp_path)).prepare(converted, tokenizer)
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "choices": ["a"], "label": 0}\n')
    rolling = CHOICES.replace("multiple_choice", "loglikelihood_rolling").replace("tiny_choices", "tiny_rolling")
    rolling = rolling.replace("metric: acc, aggregation: mean", "metric: word_perplexity")
    (tmp_path / "rolling.yaml").write_text(rolling.format(data=tmp_path / "rows.jsonl", more=""))
    with pytest.raises(ValueError, match="`tiny_rolling` is scored by word_perplexity, none a mean"):
        LmEvalTask("suite", ["tiny_rolling"], include_path=str(tmp_path)).prepare(converted, tokenizer)


@pytest.mark.slow
def test_lm_eval_has_the_suite_of_llama_2(converted, tokenizer, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert {*LLAMA2_SUITE} <= {*TaskManager().all_subtasks}
    with pytest.raises(ValueError, match=r"names 'nonsense', which is none of .* no task of lm-eval"):
        LmEvalTask(tasks=["nonsense"]).prepare(converted, tokenizer)
