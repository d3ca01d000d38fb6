# `make demo` and `make test` set everything up themselves, in .venv, from pyproject.toml and constraints.txt.
SHELL := bash
PYTHON ?= python3
BIN := .venv/bin
SUDO := $(shell test "$$(id -u)" = 0 || echo sudo)
# One thread per test process. They share the files: the tests of one share its slow fixtures. Three, as many tests wait
# for a browser or for other processes.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: demo demo-vae evaluate experiments emoji emoji-small smollm2-emoji
.PHONY: test test-demo test-real test-slow test-newest browser lint docs clean

demo: .venv/installed
	$(BIN)/python examples/quickstart.py

# The same on the latents of a VAE that is trained first, on one thread: its convolutions are too small for two.
demo-vae: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python examples/train_vae.py --digits
	$(BIN)/python examples/quickstart.py --vae outputs/vae/vae --output_dir outputs/quickstart-vae

# Scores the demo's model, and a small model of shapes that is trained first: 10 minutes on two cores.
# `make evaluate SHAPES_STEPS=50 NUM_SAMPLES=4` shows in one that all of it runs.
SHAPES_STEPS ?= 2000
NUM_SAMPLES ?= 100
EVALUATE := $(BIN)/transfusion evaluate
DIGITS := outputs/quickstart
evaluate: .venv/installed
	test -f $(DIGITS)/model/config.json || $(MAKE) demo
	rm -rf outputs/evaluation/digits outputs/evaluation/shapes
	$(EVALUATE) $(DIGITS)/model -o outputs/evaluation/digits --batch_size 50 --tasks text captions \
		--data text=$(DIGITS)/held_out/metadata.jsonl captions=$(DIGITS)/held_out \
		$$(command -v java > /dev/null || echo --set captions.tokenizer=words)
	test -f outputs/shapes-$(SHAPES_STEPS)/model.safetensors || OMP_NUM_THREADS=2 $(BIN)/python \
		examples/train_shapes.py --max_steps $(SHAPES_STEPS) --output_dir outputs/shapes-$(SHAPES_STEPS)
	$(EVALUATE) outputs/shapes-$(SHAPES_STEPS) -o outputs/evaluation/shapes --batch_size 50 --tasks shapes \
		--num_samples $(NUM_SAMPLES)

# That every table of the paper's comparisons can be made, at toy size. docs/comparisons.md has the real ones.
experiments: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python experiments/tables.py all --scale toy --seeds 1 \
		--output_dir outputs/experiments-toy --results_dir outputs/experiments-toy/results

# Emoji from scratch, on two cores; the small form leaves out most categories. Both go on where they were broken off.
EMOJI_STEPS ?= 15000
BF16 := $(shell grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo 2> /dev/null && echo --bf16 true --use_cpu true)
emoji: .venv/installed
	OMP_NUM_THREADS=2 $(BIN)/python examples/emoji.py --max_steps $(EMOJI_STEPS) $(BF16) --output_dir \
		outputs/emoji-$(EMOJI_STEPS) --resume_from_checkpoint true $(EMOJI_CATEGORIES)
	$(BIN)/python examples/judge_emoji.py outputs/emoji-$(EMOJI_STEPS) $(EMOJI_CATEGORIES)

emoji-small:
	$(MAKE) emoji EMOJI_STEPS=5000 EMOJI_CATEGORIES='--categories "Animals & Nature" "Food & Drink"'

# A language model that learns to draw food and drink. It goes on where it was broken off.
smollm2-emoji: .venv/installed
	OMP_NUM_THREADS=2 $(BIN)/python examples/smollm2_emoji.py $(BF16)
	$(BIN)/python examples/judge_emoji.py outputs/smollm2-emoji/model --categories "Food & Drink"

test: .venv/installed
	$(PYTEST)

# Judges what `make demo` has just made.
test-demo: .venv/installed
	TRANSFUSION_DEMO=$(CURDIR)/outputs/quickstart $(BIN)/python -m pytest -m slow tests/test_quickstart.py -k 'digits and not vae'

test-slow: .venv/installed
	$(PYTEST) -m slow

# The examples on real weights and pictures, a few steps each. What cannot be fetched is skipped.
test-real: .venv/installed
	$(PYTEST) -m slow --dist load tests/test_real_material.py

# Chromium of Debian, for the tests of the page; without it they are skipped.
browser:
	command -v chromium || { $(SUDO) apt-get update && $(SUDO) apt-get install -y --no-install-recommends chromium; }

# The newest transformers there is, over the environment: what the package as a whole promises, and a drawing. A failure
# is reported and blocks nothing.
test-newest: .venv/installed
	rm -rf .venv-newest
	-$(BIN)/pip install --quiet --disable-pip-version-check --target .venv-newest transformers \
		--constraint <(grep -vE '^(transformers|tokenizers|huggingface_hub|safetensors)==' constraints.txt)
	-PYTHONPATH=.venv-newest $(BIN)/python -c 'import transformers; print("transformers", transformers.__version__)'
	-PYTHONPATH=.venv-newest $(PYTEST) tests/test_package.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in outputs/site. A broken link or a docstring that cannot be read is an error.
docs: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf .venv .venv-newest outputs
