# Two commands do everything on a fresh Linux machine with Python 3.11 and make:
#   make quickstart     environment, install, then raw log -> live endpoint   (ARGS="--exit" passes arguments on)
#   make test           environment, install, then the whole suite            (ARGS="-k dare" passes arguments on)

PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
# faiss-cpu and faiss-gpu own the same module: exactly one is installed, the GPU one where an NVIDIA driver is present.
FAISS  ?= $(if $(wildcard /proc/driver/nvidia/version),gpu,cpu)
EXTRAS ?= $(FAISS),data,text,dev,redis
ARGS   ?=
SECONDS ?= 300

.PHONY: env quickstart test soak lint types layers format clean

env: $(VENV)/installed-$(FAISS)

$(VENV)/installed-$(FAISS): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/installed-*
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip setuptools
	$(BIN)/python -m pip uninstall -qq --yes faiss-cpu faiss-gpu
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

quickstart: env
	$(BIN)/recsys quickstart $(ARGS)

test: env
	$(BIN)/python -m pytest $(ARGS)

soak: env
	$(BIN)/python tests/benchmarks/soak.py --seconds $(SECONDS) $(ARGS)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env
	$(BIN)/mypy

layers: env
	$(BIN)/lint-imports

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
