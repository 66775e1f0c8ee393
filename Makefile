# Two commands: `make demo` and `make test`. Both set up .venv inside this clone by themselves.
PYTHON ?= python3
BIN := .venv/bin
NATIVE := $(wildcard $(addprefix onnx_export/custom_ops/,*.cpp *.h *.inc CMakeLists.txt))
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-torch test-oldest sanitize lint types docs benchmark clean

demo: .venv/demo.done
	$(BIN)/nsq demo

test: .venv/test.done
	$(BIN)/python -m pytest -n auto --maxprocesses 4

test-torch: .venv/torch.done
	$(BIN)/python -m pytest tests/with_torch
	$(BIN)/nsq check docs/examples/nsq_port_torch.py:encode --decode docs/examples/nsq_port_torch.py:decode

# The oldest onnxruntime that is supported, in front of the one in .venv.
test-oldest: .venv/test.done
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target build/oldest onnxruntime==1.22.1
	PYTHONPATH=build/oldest NSQ_TEST_PROFILE=few $(BIN)/python -m pytest -n 2 -q \
	  tests/test_native_operators.py tests/test_native_codec.py tests/test_native_attention.py \
	  tests/test_onnx_attention.py tests/test_onnx_codec.py tests/test_onnx_host.py

# Python itself leaks, by intention; hypothesis draws few examples, as this is slow. The sanitizer
# finds what onnxruntime throws with only if libstdc++ is loaded as early as it is.
sanitize: .venv/test.done
	@mkdir -p build/sanitize
	cd build/sanitize && PATH="$(abspath $(BIN)):$$PATH" cmake ../../onnx_export/custom_ops \
	  -DNSQ_SANITIZE=address,undefined && PATH="$(abspath $(BIN)):$$PATH" cmake --build . --parallel 2
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) \
	  $$($${CXX:-c++} -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	NSQ_CUSTOM_OPS="$(CURDIR)/build/sanitize/libnsq_onnx.so" NSQ_TEST_PROFILE=few \
	  $(BIN)/python -m pytest -n 2 -q \
	  tests/test_native_operators.py tests/test_native_codec.py tests/test_native_attention.py \
	  tests/test_onnx_attention.py

lint: .venv/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev.done
	$(BIN)/mypy

docs: .venv/docs.done
	$(BIN)/python -m sphinx -b html -W --keep-going -E -q -j 4 docs docs/_build/html
	@echo "docs/_build/html/index.html"

benchmark: .venv/benchmark.done
	$(BIN)/python -m benchmarks.codec
	$(BIN)/python -m benchmarks.cache
	$(BIN)/python -m benchmarks.attention
	$(BIN)/python -m benchmarks.onnx
	$(BIN)/python -m benchmarks.growth
	$(BIN)/python -m benchmarks.start
	$(BIN)/python -m benchmarks.conformance

.venv/%.done: pyproject.toml $(NATIVE)
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Setting up .venv for 'make $*' (once)"
	@$(BIN)/python -m pip install --quiet --editable ".[$*]"
	@touch $@

clean:
	rm -rf .venv build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis nsq-demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
