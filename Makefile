# make demo   set up .venv, run the default experiment, print the report's path
# make test   set up .venv with what tests need, and run the suite
# make lint   style and types

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
FILES := pyproject.toml constraints/py311.txt
RUN_STAMP := .venv/.ready-run
TEST_STAMP := .venv/.ready-test

.PHONY: demo test slow vbench lint clean

demo: $(RUN_STAMP)
	@$(BIN)/causvid run tiny/causvid

test: $(TEST_STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not vbench" --durations=10 \
		-n auto --maxprocesses 4 --dist loadfile
	@echo "left out: tests marked slow (make slow) and vbench (make vbench); .ci/run runs them" >&2

slow: $(TEST_STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not vbench" --durations=10

# Sets up upstream VBench once per user, outside the clone (3 minutes, 2.2 GB), and compares with it.
vbench: $(TEST_STAMP)
	@$(BIN)/causvid vbench setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m vbench --durations=10

lint: $(TEST_STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

# A stamp is written only when the whole set-up has worked, so one that failed is not taken for finished.
$(RUN_STAMP): $(FILES)
	@echo "setting up .venv (a few minutes, once)" >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints/py311.txt -e '.[train]' >&2
	@touch $@

$(TEST_STAMP): $(RUN_STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints/py311.txt -e '.[train,wandb,wan,serve,eval,cluster,dev]' >&2
	@touch $@

clean:
	rm -rf .venv build dist
