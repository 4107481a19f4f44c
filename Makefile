# `make train`: set up and train a small model on the Python sources. `make test`: set up and run every test.
# `make gpu`: every operation checked and timed on one GPU, eight minutes (DEVICE=cpu: the same commands with tiny shapes).
# Both start from a machine with only Python >= 3.11 (with venv). PYTHON=python3.12 make ... picks another interpreter.
PYTHON ?= python3
BIN = .venv/bin
DEVICE ?= cuda

train: .venv/base
	$(BIN)/python train.py

gpu: .venv/base
	$(BIN)/python bench_gpu.py --device $(DEVICE)

test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2

.venv/base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e . -c constraints.txt
	touch $@

.venv/test: .venv/base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]' -c constraints.txt
	touch $@

.PHONY: train test gpu
