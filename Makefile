# `make solve` and `make test` each do all the set-up they need in .venv, and are quick the second time.
#
#   PYTHON   the Python to make .venv with. Where it already has a suitable torch (2.11 to 2.13), .venv uses that one.
#   TORCH    what to give to `pip install` for torch otherwise; naming one that was not named the time before installs
#            it, for example
#            make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
#   OFFLINE  set to 1 to install nothing from an index: all that is needed must be in PYTHON; a missing linter is named
#            and skipped.
#   BENCH    the benchmark files of `make bench` and `make bench-quick`.    PYTEST_ARGS   more arguments for pytest.
#   WORKERS  processes that run tests, as many as there are cores up to eight; 1 runs them in the process of pytest.
#
# `make test` is lint and every test: some 16 minutes on two cores of an EPYC Zen 4. `make test-quick`, for while you
# edit, leaves out the tests that are marked slow (more than a second), tooling (of benchmarks/) or gpu, and lint: about
# 90 seconds.
# PYTEST_ARGS narrows either: make test-quick PYTEST_ARGS="tests/solve -k race"
#
# `make gpu-check` installs nothing: it builds the extension in place with GPU_PYTHON (.venv's where there is one, else
# PYTHON), which must have torch with CUDA, and tests and measures on the GPU for at most nine minutes.
#   DRY_RUN  set to 1 to go through its stages without a GPU.    RESULTS  the folder of its JSON, benchmarks/results.
#   PUZZLES  dev.csv.gz with real puzzles, or its folder.
PYTHON ?= python3
TORCH ?= torch==2.13.0
OFFLINE ?=
BENCH ?=
PYTEST_ARGS ?=
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
DRY_RUN ?=
RESULTS ?=
PUZZLES ?=

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
export PIP_DISABLE_PIP_VERSION_CHECK := 1

VENV := .venv
PY := $(VENV)/bin/python
GPU_PYTHON ?= $(or $(wildcard $(PY)),$(PYTHON))
PIP := $(PY) -m pip install --quiet $(if $(OFFLINE),--no-index --no-deps)
STAMPS := $(VENV)/.stamps
# The torch stamp holds this: empty where none was named.
export NAMED_TORCH := $(if $(filter-out file,$(origin TORCH)),$(strip $(TORCH)))
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)

# Prints the folder that holds a suitable torch, and the Python version that it is for; fails where there is none.
define FIND_TORCH
import importlib.metadata as m, re, sys
d = m.distribution("torch")
ok = (2, 11) <= tuple(map(int, re.match(r"(\d+)\.(\d+)", d.version).groups())) < (2, 14)
sys.exit(not ok or print(d.locate_file(""), *sys.version_info[:2], sep="\n"))
endef
export FIND_TORCH

# The scripts of a virtual environment name its folder: in a checkout that was moved or copied they would run the old
# one's.
export VENV_MADE_AS := $(shell sed -n 's|^command = .* -m venv [^/]*||p' $(VENV)/pyvenv.cfg 2>/dev/null)
export VENV_NOW := $(CURDIR)/$(VENV)
define MEND_VENV
import os, pathlib
old, new = (os.fsencode(os.environ[name]) for name in ("VENV_MADE_AS", "VENV_NOW"))
for file in [*pathlib.Path("$(VENV)/bin").iterdir(), pathlib.Path("$(VENV)/pyvenv.cfg")]:
    if file.is_symlink() or not file.is_file() or b"\0" in (text := file.read_bytes()): continue
    first, _, rest = text.partition(b"\n")
    if first.startswith(b"#!" + old + b"/bin/python"):  # a first line takes no path with spaces
        text = b"#!/bin/sh\n'''exec' \"" + first[2:] + b"\" \"$$0\" \"$$@\"\n' '''\n" + rest
    if old in text: file.write_bytes(text.replace(old, new))
endef
export MEND_VENV

CPP_FILES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: solve test test-quick lint format docs bench bench-quick gpu-check sanitize dist build clean distclean \
  named-anew moved

solve: build
	$(VENV)/bin/eqr solve --demo --model sudoku-paper --halt q

# A file's tests stay in one process: they share what they build.
PARALLEL = $(if $(filter-out 1,$(WORKERS)),$(shell $(PY) -c 'import xdist' 2>/dev/null && \
  echo "-n $(WORKERS) --dist loadfile --no-loadscope-reorder --benchmark-disable"))

test: build lint
	$(PY) -m pytest $(PARALLEL) $(PYTEST_ARGS)

test-quick: build
	$(PY) -m pytest -q $(PARALLEL) -m "not slow and not tooling and not gpu" $(PYTEST_ARGS)

lint: build
	@for tool in ruff mypy lint-imports clang-format; do \
	  if test -x $(VENV)/bin/$$tool; then :; \
	  elif [ -n "$(OFFLINE)" ]; then echo "lint: $$tool is not installed, skipped (OFFLINE=$(OFFLINE))"; continue; \
	  else echo "lint: $$tool is not installed; run: $(PY) -m pip install -e '.[dev]'"; exit 1; fi; \
	  case $$tool in \
	    ruff) $(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . ;; \
	    mypy) $(VENV)/bin/mypy ;; \
	    lint-imports) $(VENV)/bin/lint-imports --no-cache ;; \
	    clang-format) $(VENV)/bin/clang-format --dry-run -Werror $(CPP_FILES) ;; \
	  esac; \
	done

format: build
	$(VENV)/bin/ruff check --fix . && $(VENV)/bin/ruff format . && $(VENV)/bin/clang-format -i $(CPP_FILES)

# The site, from docs/ and the docstrings; a dead link or an unresolved name fails.
docs: build
	@test -x $(VENV)/bin/mkdocs || { \
	  $(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
	    > $(STAMPS)/docs-requires.txt; $(PIP) -r $(STAMPS)/docs-requires.txt; }
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet && echo "make: the site is build/site/index.html"

# Each file in a fresh process: what one leaves in the allocator changes the timings of the next. The quick one takes
# under five minutes on two cores.
bench: build
	@$(PY) -m benchmarks.suites $(BENCH) --results benchmarks/results $(PYTEST_ARGS)

bench-quick: build
	@$(PY) -m benchmarks.suites $(BENCH) --quick --results benchmarks/results $(PYTEST_ARGS)

gpu-check:
	@exec $(GPU_PYTHON) -m benchmarks.gpu_check $(if $(DRY_RUN),--dry-run) $(if $(RESULTS),--results $(RESULTS)) \
	  $(if $(PUZZLES),--puzzles $(PUZZLES))

# The C++ tests under sanitizers. The thread sanitizer leaves out what runs on one thread, slowly; and it cannot place
# its memory where the kernel randomises too many bits of an address.
sanitize:
	@cmake=$(firstword $(wildcard $(VENV)/bin/cmake) cmake); fixed=; \
	if setarch -R true 2>/dev/null; then fixed="setarch -R"; fi; \
	for kind in address,undefined thread; do \
	  echo "make: C++ tests under the sanitizers $$kind"; folder=build/sanitize-$${kind%,*}; \
	  grep -qsxF "CMAKE_HOME_DIRECTORY:INTERNAL=$$PWD/tests/cpp" $$folder/CMakeCache.txt || rm -rf $$folder; \
	  $$cmake -S tests/cpp -B $$folder -G "Unix Makefiles" -DEQR_SANITIZE=$$kind >/dev/null; \
	  $$cmake --build $$folder --parallel $$(nproc) -- --no-print-directory -s; \
	  case $$kind in thread) skip=-operator_against ;; *) skip= ;; esac; \
	  UBSAN_OPTIONS=print_stacktrace=1 $$fixed $$folder/eqr_cpp_tests $$skip; \
	done

dist: build
	$(PY) -m build --no-isolation

build: $(STAMPS)/build

ifneq ($(NAMED_TORCH),)
ifneq ($(NAMED_TORCH),$(strip $(shell cat $(STAMPS)/torch 2>/dev/null)))
$(STAMPS)/torch: named-anew
endif
endif

ifneq ($(VENV_MADE_AS),)
ifneq ($(VENV_MADE_AS),$(VENV_NOW))
$(STAMPS)/torch: moved
moved:
	@echo "make: $(VENV) was made as $$VENV_MADE_AS; mending the paths in its scripts"
	@$(PY) -c "$$MEND_VENV"
endif
endif

# (The setuptools that venv brings up to Python 3.11 is too old, and would hide the one of PYTHON.)
$(STAMPS)/torch:
	@test -w . || { echo "make: $(CURDIR) cannot be written; work in a copy of it, or install the package from it with"; \
	  echo "  pip install --no-build-isolation '$(CURDIR)'"; exit 1; }
	@test -x $(PY) || { echo "make: creating $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@mkdir -p $(STAMPS)
	@if [ -n "$$NAMED_TORCH" ]; then \
	  echo "make: installing $(TORCH)"; $(PIP) $(TORCH); \
	elif $(PY) -c "$$FIND_TORCH" >/dev/null 2>&1; then :; \
	elif there=$$($(PYTHON) -c "$$FIND_TORCH" 2>/dev/null) && \
	     [ "$${there#*$$'\n'}" = "$$($(PY) -c 'import sys; print(*sys.version_info[:2], sep="\n")')" ]; then \
	  echo "make: using the torch of $(PYTHON) in $${there%%$$'\n'*}"; \
	  echo "$${there%%$$'\n'*}" > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch-of-python.pth"; \
	  if [ -n "$(OFFLINE)" ]; then $(PY) -m pip uninstall -q -y setuptools 2>/dev/null; fi; \
	else echo "make: installing $(TORCH)"; $(PIP) $(TORCH); fi
	@$(PY) -c "$$FIND_TORCH" >/dev/null 2>&1 || \
	  { echo "make: $(VENV) has no torch 2.11 to 2.13; run: make distclean, then name one with TORCH=..."; exit 1; }
	@printf '%s\n' "$$NAMED_TORCH" > $@

$(STAMPS)/build: $(STAMPS)/torch $(BUILD_INPUTS)
	@echo "make: installing eqr_kernels in $(VENV)"
	@$(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
	  > $(STAMPS)/build-requires.txt
	$(if $(OFFLINE),,@$(PIP) -r $(STAMPS)/build-requires.txt)
	@$(PIP) --no-build-isolation -e '.[dev]'
	@$(PY) -c 'from eqr_kernels.ops import extension_status; print("make:", *extension_status()[1:])'
	@touch $@

clean:
	rm -rf build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache $(STAMPS)/build
	rm -f eqr_kernels/_C*.so eqr_kernels/_no_extension.txt
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
