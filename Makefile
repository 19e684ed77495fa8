# Every target sets up what it needs: `.venv` from pyproject.toml and constraints.txt, again only when one of them has changed.
# torch comes first and by exact version: any wider request may fetch a build of several GB.

PYTHON ?= python3
BIN := .venv/bin
PROMPT ?= a red ball moves right over grass
SIZE ?= 4k
# spin briefly at the end of parallel work: long spins stall a busy machine, none at all cost a third of the decoding speed
export GOMP_SPINCOUNT ?= 10000

.PHONY: demo test lint format clean

demo: .venv/ready
	mkdir -p out
	$(BIN)/muralist generate "$(PROMPT)" --size $(SIZE) --num-frames 29 --seed 0 --output out/demo.mp4
	$(BIN)/python examples/contact_sheet.py out/demo.mp4 out/demo.png
	@echo "the video: out/demo.mp4   four of its frames: out/demo.png"

# one process a core with one thread each: most tests are Python and small models, which more threads do not hasten
test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal --durations 15 --durations-min 5

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf out .pytest_cache .ruff_cache .import_linter_cache
