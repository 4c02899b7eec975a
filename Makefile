# Everything a person needs: `make demo` and `make test`. Both create .venv on first use.
VENV ?= .venv
PY = $(VENV)/bin/python

.PHONY: demo test quick check docs bench clean

demo: $(VENV)/.runtime ; $(VENV)/bin/krona demo
test: check ; $(PY) -m pytest -n 2 --dist worksteal
quick: $(VENV)/.ready ; $(PY) -m pytest -n 2 --dist worksteal -m "not slow"
check: $(VENV)/.ready ; $(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy
docs: $(VENV)/.ready ; $(PY) -m scripts.make_docs
bench: $(VENV)/.ready ; for b in benchmarks/bench_*.py; do $(PY) $$b || exit 1; done

$(VENV)/.runtime: pyproject.toml constraints.txt
	python3 -m venv $(VENV) && $(VENV)/bin/pip install -q -c constraints.txt torch && $(VENV)/bin/pip install -q -c constraints.txt -e . && touch $@
$(VENV)/.ready: $(VENV)/.runtime
	$(VENV)/bin/pip install -q -c constraints.txt -e '.[test]' && touch $@
clean: ; rm -rf $(VENV) build dist *.egg-info
