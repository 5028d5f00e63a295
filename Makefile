# `make` builds build/pith. Quiet unless something fails. Every target installs and builds what it needs.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.PHONY: build build-cuda setup setup-cuda demo test test-cuda bench bundle asan build-times clean

# Compiler output, not the small talk of ninja and cmake.
quiet_ninja = ninja -C $(1) --quiet $(2) | { grep -vE '^(ninja: no work to do|-- )' || true; }

build: build/build.ninja
	@$(call quiet_ninja,build)

setup:
	@tools/setup.sh

# Both back ends in one program; it starts on a machine without a GPU.
build-cuda: build-cuda/build.ninja
	@$(call quiet_ninja,build-cuda)

setup-cuda: setup
	@tools/setup_cuda.sh

# The program, its tests and every library of theirs that is not the C library's, for another machine.
bundle: build-cuda
	@tools/bundle.sh build-cuda/pith build-cuda/pith_tests bundle

# Ops on the GPU against the same references, the golden model, a loss curve beside the CPU's, the same bits twice, and
# memcheck. Needs the driver; the rest it finds or names.
test-cuda: build-cuda
	@tools/test_cuda.sh build-cuda

# Every operator and one workload against ceilings measured in the same run. On a GPU, after make build-cuda:
#   make bench PITH=build-cuda/pith WORKLOAD=W2
PITH ?= build/pith
WORKLOAD ?= tiny
bench: build
	@$(PITH) bench ops
	@$(PITH) bench train --workload $(WORKLOAD)

# From an empty machine to a trained model and a sample of its writing, in minutes.
demo: build/build.ninja
	@$(call quiet_ninja,build,pith)
	@examples/tiny/demo.sh

test: build
	@tools/run_tests.sh build/pith_tests

# The tests under AddressSanitizer and UndefinedBehaviorSanitizer.
asan: build-asan/build.ninja
	@$(call quiet_ninja,build-asan)
	@tools/run_tests.sh build-asan/pith_tests

# Seconds that each file takes to compile, without ccache.
build-times: build-times/build.ninja
	@tools/build_times.sh build-times

build/build.ninja: | setup
	@cmake -S . -B build -G Ninja >/dev/null
build-cuda/build.ninja: | setup-cuda
	@PATH="$$PATH:/usr/local/cuda/bin" cmake -S . -B build-cuda -G Ninja -DPITH_CUDA=ON -DPITH_MARCH=x86-64-v3 -DPITH_CUDNN_FRONTEND=$(CURDIR)/deps/include >/dev/null
build-asan/build.ninja: | setup
	@cmake -S . -B build-asan -G Ninja -DPITH_SANITIZE=ON >/dev/null
build-times/build.ninja: | setup
	@cmake -S . -B build-times -G Ninja -DCCACHE= >/dev/null

clean:
	@rm -rf build build-cuda build-asan build-times bundle
