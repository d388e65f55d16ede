# Everything runs in .venv, which is made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# On two cores, page faults of large allocations take more time than the arithmetic: keep memory once it was had.
# glibc only; elsewhere these variables do nothing.
FAST := MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456 \
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 THP_MEM_ALLOC_ENABLE=1

# One thread each: the tests' models are too small for more, and two processes with two threads each stand in each
# other's way.
TESTS := OMP_NUM_THREADS=1 $(FAST)
WORKERS := -n auto --maxprocesses 4 --dist worksteal
# Of these the wheel is asked again: all that reads files which a wheel could lack.
SHIPPED := ../tests/test_packaging.py ../tests/prompts ../tests/pipelines/test_emojinette.py ../tests/erase/test_recipe.py \
	../tests/cli/test_list.py ../tests/eval/test_page.py ../tests/eval/test_report.py

# Of these the oldest versions that pyproject.toml allows are asked too: all that depends on what diffusers and
# transformers call things, from loading to exporting, and the commands.
LOWEST := .venv-lowest
LOWEST_TESTS := tests/pipelines/test_load.py tests/pipelines/test_bad_models.py tests/pipelines/test_from_single_file.py \
	tests/pipelines/test_single_file.py tests/pipelines/test_tokenizer.py tests/pipelines/test_emojinette.py \
	tests/erase/test_export.py tests/erase/test_recipe.py tests/cli

.PHONY: demo test faults faults-full test-lowest lint wheel-test fuzz audit docs rehearsal bench load comparison classification ddpm \
	wire train measure clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e '.[eval,classification,tokenizer,nudenet,imagenet,classifiers,nsfw,train,cpu,8bit,dev]'
	touch $@

demo: $(VENV)/installed  ## erase "church" from the built-in model and write the report
	$(FAST) $(BIN)/erase-concept demo --out runs/demo

test: $(VENV)/installed  ## run the tests, then those that need shipped files again on the built wheel
	$(TESTS) $(BIN)/pytest $(WORKERS) --ignore tests/faults
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target faults wheel-test

faults: $(VENV)/installed  ## kill every command at seeded moments and run it again, and fill disks under it
	$(TESTS) $(BIN)/pytest tests/faults

faults-full: $(VENV)/installed  ## the same at every operation on a file (over an hour on one core)
	$(TESTS) FAULTS=full $(BIN)/pytest tests/faults

wheel-test: $(VENV)/installed
	rm -rf build  # setuptools would pack what an earlier build left there
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(BIN)/pip install --quiet --no-deps --target build/site build/wheel/*.whl
	cd build && $(TESTS) PYTHONPATH=site WHEEL_SITE=$(CURDIR)/build/site ../$(BIN)/python -m pytest \
		-c ../pyproject.toml --rootdir=.. -p no:cacheprovider -m "not slow" $(WORKERS) $(SHIPPED)

# PyTorch is the one of .venv; every other dependency is at its lower bound, and theirs are what pip chooses. peft is for
# the rehearsal.
$(LOWEST)/installed: $(VENV)/installed
	$(PYTHON) -m venv $(LOWEST)
	sed -n '/^dependencies/,/^]/s/^ *"\([a-z0-9_-]*\)>=\([0-9.]*\)".*/\1==\2/p' pyproject.toml | grep -v '^torch' > $(LOWEST)/lowest.txt
	$(BIN)/pip list --format freeze | grep -E '^(torch|torchvision)==' >> $(LOWEST)/lowest.txt
	$(LOWEST)/bin/pip install --quiet --constraint $(LOWEST)/lowest.txt -e '.[tokenizer]' 'pytest>=8.2' 'pytest-xdist>=3.6' 'peft>=0.17'
	touch $@

test-lowest: $(LOWEST)/installed  ## run the tests of loading, exporting and the commands with the oldest libraries
	$(TESTS) $(LOWEST)/bin/pytest -p no:cacheprovider -p no:anyio \
		-W ignore::DeprecationWarning:typer $(WORKERS) $(LOWEST_TESTS) --ignore tests/cli/test_demo.py

$(VENV)/installed-fuzz: $(VENV)/installed
	$(BIN)/pip install --quiet -e '.[fuzz]'
	touch $@

# MINUTES and SEED may be given. What broke a reader is kept in runs/fuzz.
fuzz: $(VENV)/installed-fuzz  ## feed every reader with hostile files for five minutes
	cd tests && $(TESTS) ../$(BIN)/python -m fuzz --minutes $(or $(MINUTES),5) --seed $(or $(SEED),0) --keep ../runs/fuzz

# pip-audit has an environment of its own, so that it does not audit itself. By itself it passes over a library of which
# it finds nothing, and so over all of them where the advisories cannot be reached; --strict makes that a failure.
AUDIT := .venv-audit
$(AUDIT)/installed:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/pip install --quiet 'pip-audit>=2.7'
	touch $@

audit: $(VENV)/installed $(AUDIT)/installed  ## ask the advisories about every installed library (needs the network)
	@$(BIN)/pip list --format freeze --exclude-editable | sed 's/+.*//' > $(AUDIT)/libraries.txt  # advisories know no +cpu
	@$(AUDIT)/bin/pip-audit --progress-spinner off --strict --disable-pip --no-deps --requirement $(AUDIT)/libraries.txt \
		|| { echo "audit: a library has an advisory, or the advisories could not be reached: see above" >&2; exit 1; }

lint: $(VENV)/installed  ## check style, docstrings, shape, types and imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/shape.py
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --target build/types .
	MYPYPATH=build/types $(BIN)/mypy --config-file pyproject.toml -p erase_concept
	PYTHONPATH=build/types $(BIN)/lint-imports --no-cache --no-logo

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/pip install --quiet -e '.[docs]'
	touch $@

docs: $(VENV)/installed-docs  ## build the documentation, and run its notebooks, into docs/build
	$(FAST) $(BIN)/python -m sphinx -b html -W --keep-going -q docs docs/build/html

# stable-diffusion.cpp, which is compiled.
PROGRAMS := .venv-programs
$(PROGRAMS)/installed:
	$(PYTHON) -m venv $(PROGRAMS)
	$(PROGRAMS)/bin/pip install --quiet 'stable-diffusion-cpp-python>=0.4.7'
	touch $@

rehearsal: $(VENV)/installed $(LOWEST)/installed $(PROGRAMS)/installed  ## erase at full size, random weights, and open the exports elsewhere
	ERASE_CONCEPT_CACHE= $(BIN)/python benchmarks/rehearsal.py runs/rehearsal --programs $(CURDIR)/$(PROGRAMS)/bin/python \
		--oldest $(CURDIR)/$(LOWEST)/bin/python

bench: $(VENV)/installed  ## measure time, memory, and what the defaults erase and keep (over an hour on two cores)
	$(BIN)/python benchmarks/run.py

load: $(VENV)/installed  ## measure how time and memory grow with prompts, images, layers and processes (half an hour on one core)
	OMP_NUM_THREADS=1 $(FAST) $(BIN)/python benchmarks/load.py

comparison: $(VENV)/installed  ## measure what docs/comparison.md still lacks (some seven hours in all on two cores)
	$(FAST) $(BIN)/python benchmarks/comparison.py

classification: $(VENV)/installed  ## measure what docs/classification.md still lacks (resumable; it needs Fashion-MNIST)
	$(FAST) $(BIN)/python benchmarks/classification.py

ddpm: $(VENV)/installed  ## measure what docs/ddpm.md still lacks (resumable; it needs Fashion-MNIST)
	OMP_NUM_THREADS=1 $(FAST) $(BIN)/python benchmarks/ddpm.py

wire: $(VENV)/installed  ## measure what two processes send each other, for docs/how-to/several-processes.md
	$(BIN)/python benchmarks/wire.py

train: $(VENV)/installed  ## train the built-in model again (two hours on two cores)
	$(FAST) $(BIN)/python -m erase_concept.pipelines.emojinette.train --work runs/emojinette

measure: $(VENV)/installed  ## measure the built-in model and write its card
	$(FAST) $(BIN)/python -m erase_concept.eval.benchmarks.emojinette --work runs/emojinette --grid runs/emojinette/grid.png

clean:
	rm -rf $(VENV) $(LOWEST) $(AUDIT) build dist *.egg-info
