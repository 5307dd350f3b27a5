# From a machine with Python 3.11+ and make, `make reproduce` and `make test` do all of their own set-up.
PYTHON ?= python3
SEED ?= 0
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup reproduce test test-long notebooks export parameters clean-notebooks readme lab docs dist

# reproduce.ipynb is run by `mice reproduce`; the index comes last, as it quotes results
NOTEBOOKS = $(filter-out %/reproduce.ipynb,$(sort $(wildcard nbs/*/*.ipynb))) nbs/index.ipynb
NBCONVERT = $(BIN)/jupyter-nbconvert --to notebook --execute --inplace --ExecutePreprocessor.coalesce_streams=True

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{ printf "make %-16s %s\n", $$1, $$2 }'

setup: .venv/.ready ## create .venv with the versions of requirements.lock; reused until something changes

reproduce: .venv/.ready ## train on the digits for one seed (SEED=0) and print the result line
	@$(BIN)/mice reproduce digits --seed $(SEED)

test: .venv/.ready ## run everything: notebooks, mathematics, package, site
	@$(BIN)/python -m pytest

test-long: .venv/.ready ## the long tests of reliability: kills, faults, damage (RECORD=1: keep the figures)
	@$(BIN)/python -m pytest -m "long or recorded"

notebooks: .venv/.ready ## export, execute all notebooks in place, clean, write README.md
	$(BIN)/nbdev_export
	$(BIN)/python tools/parameters.py
	env -u MPLBACKEND $(NBCONVERT) $(NOTEBOOKS)
	$(BIN)/nbdev_clean
	$(BIN)/python tools/readme.py

export: .venv/.ready ## write the modules in mice/ from the notebooks
	$(BIN)/nbdev_export

parameters: .venv/.ready ## write the parameters cell of reproduce.ipynb from Config
	$(BIN)/python tools/parameters.py

clean-notebooks: .venv/.ready ## strip metadata that only makes noise in a diff
	$(BIN)/nbdev_clean

readme: .venv/.ready ## write README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py

lab: .venv/.ready ## open the notebooks in JupyterLab; without a screen it prints its address
	$(BIN)/jupyter-lab $(if $(DISPLAY)$(WAYLAND_DISPLAY)$(filter Darwin,$(shell uname)),,--no-browser) --ip=127.0.0.1 --LabApp.default_url=/lab/tree/nbs/index.ipynb

docs: .venv/.ready ## render the site to _docs/ (needs Quarto)
	@command -v quarto > /dev/null || { echo "make docs needs Quarto: install it from https://quarto.org/docs/get-started" >&2; exit 1; }
	$(BIN)/python tools/pages.py
	cd _proc && PATH="$(abspath $(BIN)):$$PATH" quarto render --no-cache
	rm -rf _docs && mv _proc/_docs _docs

dist: .venv/.ready ## build the wheel and the source archive into dist/
	$(BIN)/python -m build --no-isolation --outdir dist .

.venv/.ready: requirements.lock settings.ini setup.py
	@command -v $(PYTHON) > /dev/null || { echo "$(PYTHON) was not found: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "mice needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + ": name another, as in make PYTHON=python3.12")'
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { echo "$(PYTHON) cannot create virtual environments: install its venv module (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "Setting up .venv: some minutes and up to 6 GB the first time, nothing the next"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --use-pep517 --editable .
	@touch $@
