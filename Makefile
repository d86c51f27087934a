# make demo   install into .venv, draw what the method does with the embedded model and print its measurements
# make test   install into .venv and run every check and test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# transformers 4.57 still has Flax CLIP: an oracle, and the older of the two versions we support
OLD := $(VENV)/transformers-4

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

$(VENV)/installed: setup.py Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dynaip_jax needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[test]'
	$(BIN)/pip install --quiet --no-deps --target $(OLD) --upgrade transformers==4.57.6 'huggingface_hub<1' 'tokenizers<=0.23.0'
	touch $@

demo: $(VENV)/installed
	mkdir -p out
	$(BIN)/dynaip demo --output out/demo.png --overwrite
	@echo 'look at out/demo.png'

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 3 --dist loadfile

clean:
	rm -rf $(VENV) out build *.egg-info
