# `make sft` on a fresh machine sets everything up and runs the built-in recipe. `make help` lists the rest.
RECIPE ?= tiny-pydoc
SET ?=
UNTIL ?=
GPUS ?= 1
CONFIG ?=
UV ?=
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EDITS := $(foreach s,$(SET),--set '$(s)') $(if $(UNTIL),--until $(UNTIL))
# UV=1 installs with uv, if it is installed, under the index settings of pip
INSTALL := $(BIN)/python $(if $(and $(filter 1,$(UV)),$(shell command -v uv)),scripts/uv_install.py,-m pip install -q --disable-pip-version-check) -c constraints.txt
# CONFIG=fsdp or deepspeed_zero2 goes through accelerate; plain data parallel training needs no launcher but our own
LAUNCH := $(if $(CONFIG),PYTHONSAFEPATH=1 $(BIN)/accelerate launch --config_file recipes/accelerate/$(CONFIG).yaml --num_processes $(GPUS) -m finetune,$(BIN)/finetune)

# two test processes whose threads spin for the same two cores would take turns, not run
test test-slow: export OMP_NUM_THREADS := 1

.PHONY: sft setup plan check test test-slow push docs site release home clean help
.DEFAULT_GOAL := help

sft: $(VENV)/.ready ## run a recipe to a certified, merged model: RECIPE=NAME SET="train.learning_rate=1e-4" UNTIL=STAGE
ifneq ($(filter deepspeed%,$(CONFIG)),)
	@$(BIN)/python -c 'import deepspeed' 2>/dev/null || \
	  { echo "CONFIG=$(CONFIG) needs DeepSpeed: $(BIN)/pip install -e '.[deepspeed]'" >&2; exit 2; }
endif
	@$(LAUNCH) run $(RECIPE) $(EDITS) $(if $(CONFIG),,$(if $(filter-out 1,$(GPUS)),--processes $(GPUS)))

plan: $(VENV)/.ready ## what a recipe would do and need; builds nothing
	@$(BIN)/finetune plan $(RECIPE) $(foreach s,$(SET),--set '$(s)')

push: $(VENV)/.ready ## publish what a recipe made to the Hub
	@$(BIN)/finetune publish $(RECIPE) $(foreach s,$(SET),--set '$(s)')

setup: $(VENV)/.ready ## make .venv and install; UV=1 with uv

test: $(VENV)/.ready-test ## the test suite
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" --durations=10

test-slow: $(VENV)/.ready-test ## the long harnesses
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m slow --durations=10

check: $(VENV)/.ready-check ## lint, format, types, recipes and the documentation site
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/finetune validate recipes/*.yaml
	@$(BIN)/python scripts/docs_site.py

docs: $(VENV)/.ready ## write recipes/schema.json and docs/recipe-reference.md from the models
	@$(BIN)/python -m finetune.recipe.reference

site: $(VENV)/.ready-check ## build the documentation site in build/site, links checked
	@$(BIN)/python scripts/docs_site.py

release: $(VENV)/.ready-check ## build sdist and wheel, check them, run tiny-pydoc from the wheel in a fresh environment
	@rm -rf dist
	@$(BIN)/python -m build
	@$(BIN)/python -m twine check --strict dist/*
	@bash scripts/try_wheel.sh "$(abspath $(VENV))/bin/python" dist/*.whl

NAMED_IN := README.md pyproject.toml zensical.toml docs/index.md scripts/colab_launcher.ipynb
home: ## name the place where this package is published, in the notebook and the badges: REPO=OWNER/NAME
	@test -n "$(REPO)" || { echo "make home REPO=OWNER/NAME" >&2; exit 2; }
	@sed -i.old 's#OWNER/REPO#$(REPO)#g' $(NAMED_IN)
	@rm $(addsuffix .old,$(NAMED_IN))

clean: ## drop what none of the newest runs uses (asks first)
	@$(BIN)/finetune clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "python3 has no venv module: apt-get install python3-venv" >&2; exit 2; }

$(VENV)/.ready: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV) (some minutes, once) …" >&2
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	@$(INSTALL) -e ".[test]"
	@touch $@

$(VENV)/.ready-check: $(VENV)/.ready
	@$(INSTALL) -e ".[check,docs,release]"
	@touch $@
