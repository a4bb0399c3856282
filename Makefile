# What is done often, by one word each: make NAME [PYTHON=python3]
PYTHON ?= .venv/bin/python

.PHONY: test slow layers lint types coverage docs bench constraints wheel

test:  ## everything but the slow tests, as the README says
	$(PYTHON) -m pytest -n 2 --dist loadfile

slow:  ## tests of wall-clock time, on idle cores, and long ones
	$(PYTHON) -m pytest -m slow

layers:  ## who may import whom
	$(PYTHON) -m pytest -q tests/layers -k "layer or offences or optional"

lint:
	$(PYTHON) -m ruff check .

types:
	$(PYTHON) -m mypy marginroute envs/economics evaluation

coverage:  ## lines of Python; what Numba compiled does not count as run
	$(PYTHON) -m pytest --cov=marginroute --cov=envs --cov=agents --cov=evaluation --cov-report=term:skip-covered

docs:  ## the site, in site/
	$(PYTHON) -m mkdocs build --strict

bench:  ## every benchmark, into docs/figures.md, on idle cores
	$(PYTHON) -m benchmarks

wheel:  ## what a gateway host installs, in dist/
	$(PYTHON) -m pip wheel --no-deps --wheel-dir dist .

constraints:  ## the versions of a fresh environment, in constraints.txt
	rm -rf build/constraints && python3 -m venv build/constraints
	build/constraints/bin/pip install -q ".[train,test,dev,docs]"
	sed -n '/^#/p' constraints.txt > build/constraints.txt
	build/constraints/bin/pip freeze --exclude marginroute | sed 's/+cpu$$//' >> build/constraints.txt
	mv build/constraints.txt constraints.txt
