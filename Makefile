# Two commands on a fresh machine: make demo, make test. Everything is installed into .venv of this folder.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lab export readme render benchmarks docs docs-test docs-links docs-tutorial help
help:
	@echo "make demo        install, run the main job on phantoms (and on real films where G2D_DATA is set), say where the page is"
	@echo "make test        install the development extra and run all tests"
	@echo "make lab         open the notebooks in JupyterLab"
	@echo "make export      notebooks -> g2d/, then clean the notebooks"
	@echo "make readme      nbs/index.ipynb -> README.md"
	@echo "make render      run the notebooks and keep their pictures (on phantoms only, never on real films)"
	@echo "make docs        build the site from the committed pictures (EXECUTE=1 runs the notebooks first), say where it is"
	@echo "make docs-test   build it without a warning, check links, anchors and alternative text"
	@echo "make docs-links  check the links that lead outside (needs a network)"
	@echo "make docs-tutorial  run every command of the tutorial and write what it printed into the page (minutes)"
	@echo "make benchmarks  run every benchmark by hand (minutes)"

# torch and torchvision are asked for together and unpinned: only then they match on every machine
$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "g2d needs Python 3.10 or newer; set PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch torchvision

$(VENV)/.demo: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.demo

$(VENV)/.docs: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@ $(VENV)/.dev $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/g2d demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

lab: $(VENV)/.dev
	$(BIN)/jupyter lab nbs

export: $(VENV)/.dev
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean

readme: $(VENV)/.dev
	$(BIN)/jupyter nbconvert --log-level=ERROR --to markdown --stdout nbs/index.ipynb | sed 's#](images/#](nbs/images/#' > README.md

# G2D_DATA is emptied: a picture of a real film must not enter the repository
render: $(VENV)/.dev
	for file in $$(ls nbs/[0-9]*.ipynb nbs/data/*.ipynb nbs/data/sets/*.ipynb nbs/models/*.ipynb nbs/tasks/*.ipynb nbs/lessons/*.ipynb); do \
	  G2D_DATA= $(BIN)/nbdev-test --save $$file && $(BIN)/python -c "import sys; from g2d.views import shrink_pictures; shrink_pictures(sys.argv[1])" $$file || exit 1; done
	$(BIN)/nbdev-clean

benchmarks: $(VENV)/.dev
	for file in benchmarks/*.py; do $(BIN)/python $$file || exit 1; done

# the pictures of the notebooks are committed, so that a build runs none of them; EXECUTE=1 runs those that changed since the last time
docs: $(VENV)/.docs
	$(if $(EXECUTE),G2D_DATA= )$(BIN)/python -m sphinx -q $(if $(EXECUTE),-D nb_execution_mode=cache) -b html docs docs/_build/html
	@echo "The site: $(CURDIR)/docs/_build/html/index.html"

docs-test: $(VENV)/.docs
	$(BIN)/python -m pytest tests/test_docs.py

docs-links: $(VENV)/.docs
	$(BIN)/python -m sphinx -q -b linkcheck docs docs/_build/links

docs-tutorial: $(VENV)/.dev
	$(BIN)/python docs/run_tutorial.py
