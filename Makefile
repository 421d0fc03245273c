# Every target makes the environment (.venv) first. `make help` lists them.
VENV := .venv
STAMP := $(VENV)/.installed
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
PYTHON ?= python3

.PHONY: help repro sweep test test-all ui check params deps clean
help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; run make PYTHON=python3.12"; exit 1; }
	@echo "making the environment in $(VENV) (a few minutes, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check --requirement constraints.txt
	@touch $(STAMP)

repro: $(STAMP)  ## rebuild everything that changed, log it, print the results
	@$(RUN) dvc repro; status=$$?; \
	$(RUN) python -m pipeline.tracking sync; \
	[ $$status -eq 0 ] || echo "dvc repro failed (see above); figures below may be of an earlier run"; \
	$(RUN) python -m pipeline.summary; exit $$status

sweep: $(STAMP)  ## rank by targets by learning rate on the embedded data, compared (some minutes)
	@$(RUN) python -m stages.train -m experiment=rank_sweep train.max_steps=60 train.eval_steps=15 hydra/launcher=fused \
		hydra.launcher.num_workers=2 hydra.launcher.num_threads=1 hydra.sweep.dir=multirun/rank_sweep

test: $(STAMP)  ## the default tests
	@$(RUN) python -m pytest -q -n 2 --dist loadscope -m "not slow"

test-all: $(STAMP)  ## all tests, the slow ones too
	@$(RUN) python -m pytest -q -n 2 --dist loadscope

ui: $(STAMP)  ## the MLflow UI on 127.0.0.1
	@$(RUN) python -m pipeline.tracking ui

check: $(STAMP)  ## ruff, mypy, fast tests
	@$(RUN) ruff check . && $(RUN) ruff format --check . && $(RUN) mypy && $(RUN) python -m pytest -q -n 2 --dist loadscope tests/unit

params: $(STAMP)  ## write params.yaml from conf/
	@$(RUN) python -m pipeline.config

deps: $(STAMP)  ## write the stages' code deps into dvc.yaml
	@$(RUN) python -m pipeline.imports

clean:  ## remove the environment and everything by hand or by sweep; DVC's outs and cache stay
	rm -rf $(VENV) outputs multirun
