# One command each; people and CI run the same ones. `make help` lists them.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
TRAIN_CFG ?= rwkv-lm-tiny

.DEFAULT_GOAL := help
.PHONY: help install serve train test slow kernels clients check fmt bench load clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: .venv/.installed ## create .venv and install pinned dependencies

.venv/.installed: pyproject.toml .ci/constraints.txt .ci/install
	@PYTHON="$(PYTHON)" bash .ci/install
	@touch $@

serve: .venv/.installed ## serve the embedded model on http://127.0.0.1:8080 (ARGS="--infer-cfg NAME ...")
	@exec $(BIN)/python -m api $(ARGS)

train: .venv/.installed ## train, or go on with a run that was stopped (TRAIN_CFG=rwkv-lm-tiny ARGS="--steps N")
	@exec $(BIN)/python -m train --train-cfg $(TRAIN_CFG) $(ARGS)

test: .venv/.installed ## every test that is not marked slow, gpu or kernels, two at a time (ARGS="-n 8" for more)
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

slow: .venv/.installed ## the long tests
	@$(BIN)/python -m pytest -m slow --timeout 1800 $(ARGS)

kernels: .venv/.installed ## every GPU kernel without a GPU: interpreted against float64, compiled for seven, and judged
	@$(BIN)/python -m pytest -n 2 --dist load -m kernels tests/engine/kernels
	@$(BIN)/python -m tests.engine.kernels.machine_code $(ARGS)

clients: .venv-clients/.installed ## the tests with litellm, instructor and lm-eval, in an environment of their own (2 GB)
	@.venv-clients/bin/python -m pytest --timeout 1800 -m "not gpu" -W ignore::ResourceWarning \
		-W ignore::pytest.PytestUnraisableExceptionWarning \
		tests/end_to_end/test_langchain.py tests/end_to_end/test_litellm.py \
		tests/end_to_end/test_instructor.py tests/end_to_end/test_lm_eval.py \
		tests/end_to_end/test_client_docs.py $(ARGS)

.venv-clients/.installed: pyproject.toml .ci/constraints-clients.txt .ci/install
	@PYTHON="$(PYTHON)" VENV=.venv-clients EXTRAS=dev,conformance PINS=.ci/constraints-clients.txt \
		bash .ci/install
	@touch $@

check: .venv/.installed ## ruff, mypy, import rules and file sizes
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_layering.py

fmt: .venv/.installed ## format and fix what ruff can fix
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: .venv/.installed ## offline engine throughput, then the server under a fixed arrival rate
	@$(BIN)/python -m benchmarks.engine $(ARGS)
	@$(BIN)/python -m benchmarks.serve $(ARGS)

load: .venv/.installed ## locust against a server that is running already
	@$(BIN)/locust -f benchmarks/locustfile.py --headless -u 8 -r 4 -t 20s --only-summary $(ARGS)

clean: ## remove the environment and caches
	@rm -rf .venv .venv-clients .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
