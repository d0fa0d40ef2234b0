# Two commands matter: `make demo` and `make test`. Both work in .venv, which they make.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := cpu,openvino,export,train,cli,charts,signing,debug,tensorrt-rtx,dev,docs
# Their own requirements hold a torchvision that no CPU torch loads, and a hundred packages that no test needs.
FOREIGN := denoising-diffusion-pytorch torchcfm monai

.PHONY: demo samplers gallery emoji test test-runtime lint mutants trust docs bench gpu clean

demo: .venv/installed
	$(BIN)/python examples/digits.py

samplers: .venv/installed
	$(BIN)/python examples/samplers.py

gallery: .venv/installed
	$(BIN)/python examples/gallery.py
	$(BIN)/python examples/emoji_gallery.py

# Forty minutes on two cores; stopped, it goes on.
emoji: .venv/installed
	$(BIN)/python examples/emoji.py

# A file's tests stay in one process, and each process on one core: they would only wait for each other's threads.
test: lint docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# The runtime's tests, and whatever else needs no torch, where there is none.
test-runtime: .venv-runtime/installed
	OMP_NUM_THREADS=1 .venv-runtime/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile tests/runtime tests/test_structure.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests/typed_request.py

# The site, in out/site: a broken link or reference fails. The variable keeps an advertisement of the theme's out.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# Some 850 small changes to the core, one at a time: the tests must notice nine in ten. Half an hour on two cores.
mutants: .venv/installed
	mkdir -p out
	$(BIN)/python tests/mutation --json out/mutants.json

# What an embedder may rely on, an hour on two cores; stopped, it goes on. atheris guides its fuzzing where it installs.
trust: .venv/installed
	$(BIN)/python -c 'import atheris' 2> /dev/null || $(BIN)/python -m pip install --quiet -c constraints.txt atheris || true
	$(BIN)/python tests/trust --json docs/evidence/trust.json

bench: .venv/installed
	$(BIN)/python benchmarks/micro.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/race.py
	$(BIN)/python benchmarks/linear.py

# On a machine with an NVIDIA GPU, in .venv or without it, ten minutes: make gpu [ARGS="--parts digits,race --retry"]
gpu:
	PYTHONPATH=$(CURDIR)/runtime:$(CURDIR)/export:$(CURDIR)/trainer:$(CURDIR)/command$(if $(PYTHONPATH),:$(PYTHONPATH)) \
		$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu_quick.py $(ARGS)

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "epsrt needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps $(FOREIGN)
	touch $@

.venv-runtime/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-runtime
	.venv-runtime/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e '.[cpu,openvino,signing,cli]' pytest pytest-xdist
	touch $@

clean:
	rm -rf .venv .venv-runtime out dist build .pytest_cache .mypy_cache .ruff_cache
