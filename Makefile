# Two commands do all their own set-up: `make demo`, `make test`.
PYTHON   ?= python3
VENV     ?= .venv
DATA_DIR ?= ecgfm-data
TEST_JOBS ?= 2
INSTALLED = $(VENV)/.installed

.PHONY: demo test check docs install clean

demo: $(INSTALLED)  ## run the whole line on embedded synthetic ECGs; names the report it wrote
	$(VENV)/bin/ecgfm run demo --data-dir $(DATA_DIR)

test: $(INSTALLED)  ## run the tests
	$(VENV)/bin/python -m pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder

check: $(INSTALLED)  ## format, lint and types
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy

docs: $(INSTALLED)  ## build the documentation as a site: site/index.html, readable without a network
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet

install: $(INSTALLED)

$(INSTALLED): pyproject.toml docker/constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"ecgfm needs Python 3.11 or newer, found {v.major}.{v.minor}; set PYTHON=/path/to/python3.11")'
	@echo "installing into $(VENV), in silence: some minutes, most of them downloads"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c docker/constraints.txt -e '.[dev]'
	@touch $@

clean:  ## remove the virtual environment and what the demo made
	rm -rf $(VENV) $(DATA_DIR)
