# Everything that a machine with Python 3.12, git and make needs to serve, test and check DS-JAX.
# Packages go into the virtual environment .venv; the stamp files in it make a second call instant.

VENV   ?= .venv
CONFIG ?= configs/story.py
EXTRAS ?=
ARGS   ?=
PY     := $(VENV)/bin/python
READY   = $(VENV)/.installed-

.DEFAULT_GOAL := help
.PHONY: help serve test lint format clean

help:
	@echo "make serve    serve the embedded story model at http://127.0.0.1:8000 (OpenAI API)"
	@echo "              CONFIG=configs/story.py  ARGS=\"--port=8001 --config.decode.tp=2\"  EXTRAS=cuda (NVIDIA GPU)"
	@echo "              ARGS=--help lists every setting"
	@echo "make test     run all tests; ARGS=\"tests/test_flags.py -k tuple\" some of them"
	@echo "make lint     ruff and mypy"
	@echo "make format   let ruff rewrite the sources"
	@echo "make clean    remove .venv, caches and build output"
	@echo "PYTHON=/path/to/python3.12 names the Python to use; it is searched for otherwise."

serve: $(READY)$(or $(EXTRAS),base)
	@if [ -z "$(EXTRAS)" ] && command -v nvidia-smi >/dev/null 2>&1; then \
		echo "serving on the CPU; make serve EXTRAS=cuda uses the GPU"; fi
	@exec $(PY) -m experiments.serve --config=$(CONFIG) $(ARGS)

test: $(READY)test
	@$(PY) -m pytest --numprocesses=auto --dist=loadfile $(ARGS)

lint: $(READY)dev
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format: $(READY)dev
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

clean:
	rm -rf $(VENV) .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

# $(VENV)/.installed-EXTRA: the project, editable, with the extra's packages in the tested versions.
$(READY)%: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "installing packages into $(VENV) (once; a minute or so)"
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt \
		-e '.$(if $(filter-out base,$*),[$*])' \
		|| { echo "make: packages could not be installed (see above); this needs a connection to a package index" >&2; exit 1; }
	@touch $(READY)base $@

$(VENV)/.created:
	@python="$$(sh .ci/find-python)" && echo "making $(VENV) with $$python" && "$$python" -m venv $(VENV) && touch $@
