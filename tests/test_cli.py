import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForMultimodalLM, AutoProcessor

import transfusion_command
import transfusion_hf
from transfusion_command import main
from transfusion_hf import TransfusionPipeline

TINY = str(Path(__file__).parent / "fixtures" / "tiny-transfusion")


@pytest.fixture
def picture(tmp_path):
    file = tmp_path / "red.png"
    Image.new("RGB", (20, 20), "red").save(file)
    return str(file)


def test_draw_writes_a_picture_that_the_seed_decides(tmp_path, capsys):
    files = [tmp_path / "new" / f"{name}.png" for name in "abc"]
    for file, seed in zip(files, (0, 0, 1), strict=True):
        arguments = ["draw", TINY, "a seven", "-o", str(file), "--num_inference_steps", "3", "--seed", str(seed)]
        assert main([*arguments, "--device", "cpu", "--guidance_scale", "2", "--scheduler", "DDIMScheduler"]) == 0
    assert capsys.readouterr().out.split() == [str(file) for file in files]
    first, second, third = (Image.open(file).tobytes() for file in files)
    assert first == second != third and Image.open(files[0]).size == (8, 8)


def test_draw_takes_the_words_of_the_pipelines(tmp_path, capsys):
    command = ["draw", TINY, "a seven", "-o", str(tmp_path / "a.png"), "--num_inference_steps", "3", "--seed", "0"]
    words = ["--guidance_scale", "2", "--negative_prompt", "blue", "--num_images_per_prompt", "2"]
    assert main([*command, "--device", "cpu", *words]) == 0
    files = [tmp_path / f"a-{i}.png" for i in (1, 2)]
    assert capsys.readouterr().out.split() == [str(file) for file in files]
    pipe, kwargs = TransfusionPipeline.from_pretrained(TINY), {"guidance_scale": 2.0, "num_images_per_prompt": 2}
    kwargs |= {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0), "negative_prompt": "blue"}
    assert [Image.open(file).tobytes() for file in files] == [i.tobytes() for i in pipe("a seven", **kwargs).images]


def test_caption_prints_text(picture, capsys):
    assert main(["caption", TINY, picture, "--device", "cpu", "--max_new_tokens", "3"]) == 0
    assert capsys.readouterr().out.strip()


def test_a_seed_decides_a_caption_that_is_sampled(tmp_path, picture, capsys):
    model = AutoModelForMultimodalLM.from_pretrained(TINY)
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path / "model")
    AutoProcessor.from_pretrained(TINY).save_pretrained(tmp_path / "model")
    command = ["caption", str(tmp_path / "model"), picture, "--device", "cpu", "--max_new_tokens", "8", "--seed"]
    captions = []
    for seed in "001":
        assert main([*command, seed]) == 0
        captions.append(capsys.readouterr().out)
    assert captions[0] == captions[1] != captions[2]


def test_edit_writes_a_picture(tmp_path, picture):
    output = tmp_path / "out.png"
    command = ["edit", TINY, picture, "make it blue", "-o", str(output), "--num_inference_steps", "2"]
    assert main([*command, "--device", "cpu", "--input_image_guidance_scale", "1.5", "--width", "4"]) == 0
    assert Image.open(output).size == (4, 8)


def test_chat_answers_and_shows_pictures(tmp_path, picture, capsys, monkeypatch):
    lines = ["hello", f"/image {picture}", f"/image {tmp_path / 'none.png'}", "what is it?", "an <image> too many"]
    lines = "\n".join([*lines, "", "/quit", "never read", ""])
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    command = ["chat", TINY, "--device", "cpu", "--max_new_tokens", "4", "-o", str(tmp_path / "c.png")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "/quit" in printed and "none.png is no picture that can be read" in printed
    assert "markers <image>" not in printed  # what somebody types is text


class Terminal(io.StringIO):
    """A standard input that someone types at, who ends with Ctrl-D, or with Ctrl-C."""

    def __init__(self, lines, last_key):
        super().__init__(lines)
        self.last_key = last_key

    def isatty(self):
        return True

    def readline(self, size=-1):
        line = super().readline(size)
        if not line and self.last_key == "Ctrl-C":
            raise KeyboardInterrupt
        return line


@pytest.mark.parametrize("last_key", ["Ctrl-D", "Ctrl-C"])
def test_a_chat_in_a_terminal_has_a_prompt_sign_and_ends_without_a_traceback(last_key, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", Terminal("/image nowhere.png\n", last_key))
    assert main(["chat", TINY, "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert [line[:2] for line in printed.out.splitlines()[1:]] == ["> ", "> "]
    assert "Traceback" not in printed.err


def test_a_chat_that_is_piped_in_has_no_prompt_sign(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("/image nowhere.png\n"))
    assert main(["chat", TINY, "--device", "cpu"]) == 0
    assert ">" not in capsys.readouterr().out


def test_ctrl_c_ends_any_command_with_the_status_of_the_shell(capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(AutoModelForMultimodalLM, "from_pretrained", interrupted)
    assert main(["draw", TINY, "a seven"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def in_a_process(code):
    path = str(Path(transfusion_command.__file__).parent)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TORCH_", "DIFFUSERS_"))}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment | {"PYTHONPATH": path}
    )


def test_help_and_wrong_arguments_import_no_torch():
    code = """
import sys
from transfusion_command import main
for arguments in (["--help"], ["draw", "--help"], ["--version"], ["drow"], ["draw", "MODEL"]):
    try:
        main(arguments)
    except SystemExit as ended:
        print("status", ended.code)
assert not {"torch", "transformers", "transfusion_hf"} & sys.modules.keys()
"""
    run = in_a_process(code)
    assert run.returncode == 0, run.stderr
    assert [line for line in run.stdout.splitlines() if "status" in line] == [f"status {n}" for n in (0, 0, 0, 2, 2)]


@pytest.mark.slow
def test_a_command_prints_no_notes_of_the_libraries(tmp_path):
    code = f"from transfusion_command import main; main(['caption', {TINY!r}, {str(tmp_path / 'none.png')!r}])"
    run = in_a_process(code)
    lines = [line for line in run.stderr.splitlines() if line and "Loading weights" not in line]
    assert not run.stdout and len(lines) == 1 and lines[0].startswith("transfusion: "), run.stderr


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"transfusion-hf {transfusion_hf.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["draw", TINY, "a", "--num_inference_steps", "0"], "`num_inference_steps` must be 1 to 1000; got 0"),
        (["draw", TINY, "a", "--scheduler", "None"], "`scheduler` must name a scheduler of diffusers"),
        (["caption", TINY, "nowhere.png"], "nowhere.png is no picture that can be read"),
        (["draw", "/nowhere/at/all", "a"], "nowhere"),
        (["draw", TINY, "a", "-o", "seven.jpgg"], "`--output` seven.jpgg has no image suffix"),
        (
            ["draw", TINY, "a", "--dtype", "foo"],
            "`--dtype` must be 'auto' or a type of torch such as 'bfloat16'; got 'foo'",
        ),
        (["draw", TINY, "a", "--device", "nowhere"], "nowhere"),
    ],
)
def test_errors_are_one_line_and_an_exit_status(arguments, message, capsys):
    assert main([arguments[0], "--device", "cpu", *arguments[1:]]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["draw", "doctor"])
def test_a_weight_file_that_is_cut_off_is_told_in_one_line(tmp_path, command, capfd):
    folder = shutil.copytree(TINY, tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert main([command, str(folder), *(["a seven"] if command == "draw" else []), "--device", "cpu"]) == 1
    message = f"transfusion: A weight file of {folder} is cut off or damaged; get it again. SafetensorError: "
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("transfusion: ")]
    assert line.startswith(message)


def test_a_command_is_needed():
    with pytest.raises(SystemExit):
        main([])


def test_the_doctor_is_a_command_with_its_own_exit_status(tmp_path, capsys):
    assert main(["doctor", TINY, "--no_overfit", "--device", "cpu"]) == 0
    assert "ok      attention mask" in capsys.readouterr().out
    assert main(["doctor", str(tmp_path / "nowhere")]) == 1
    assert "transfusion: " in capsys.readouterr().err


def test_latents_is_a_command(tmp_path, capsys):
    assert main(["latents", TINY, str(tmp_path / "nowhere"), str(tmp_path / "latents"), "--device", "cpu"]) == 1
    assert "transfusion: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["draw", "app", "doctor", "latents", "Finds out why a model does not learn"]),
        (["doctor"], ["usage: transfusion doctor", "--no_overfit"]),
        (["latents"], ["usage: transfusion latents", "--shard_size"]),
        (["train"], ["usage: transfusion train", "--caption_dataset", "--learning_rate"]),
        (["app"], ["usage: transfusion app", "--share"]),
    ],
)
def test_every_command_has_its_help(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--help"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and all(word in printed for word in words), printed
